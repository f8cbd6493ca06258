"""Packaging of megalite; the README's first commands install it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

SERVE = [
    "fastapi>=0.115",
    "uvicorn>=0.34",
    "httptools>=0.6",
    "uvloop>=0.21",
    "pydantic>=2.10",
    "prometheus_client>=0.21",
]
GRAMMAR = ["llguidance>=1,<2"]
GGUF = ["gguf>=0.17"]
LIVE = ["rich>=13", "nvidia-ml-py>=12"]

setup(
    name="megalite",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "megalite/__init__.py").read_text(encoding="utf-8"))[1],
    description="Run and train large language models over many accelerators from one config",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megalite", "megalite.*"]),
    package_data={"megalite": ["py.typed", "serve/page.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "safetensors>=0.8",
        "omegaconf>=2.4,<3",
        "huggingface_hub>=1.0",
        "tokenizers>=0.22",
        "jinja2>=3.1.6",
        "numpy>=2.0",
        "tqdm>=4.66",
        "xxhash>=3.4",
        "psutil>=5.9",
        "pyyaml>=6",
        "msgspec>=0.19",
    ],
    entry_points={
        # Where lm-evaluation-harness looks for models; version 0.4.13 does not yet, so there is a command of ours.
        "lm_eval.models": ["megalite = megalite.evals:MegaliteLM"],
        "console_scripts": ["megalite = megalite.cli:megalite", "megalite-eval = megalite.cli:evaluate"],
    },
    extras_require={
        "tensorboard": ["tensorboard>=2.16"],
        "serve": SERVE,
        "grammar": GRAMMAR,
        "gguf": GGUF,
        "live": LIVE,
        "eval": ["lm_eval>=0.4.13,<0.5"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5.24,<6",
            "ruff>=0.9",
            "mypy>=1.18",
            "setuptools>=77",
            "peft>=0.17",
            "httpx>=0.28",
            "openai>=2",
            "playwright>=1.50",
            *SERVE,
            *GRAMMAR,
            *GGUF,
            *LIVE,
            "compressed-tensors>=0.12",
        ],
    },
)
