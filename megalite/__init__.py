"""megalite: run and train large language models over many accelerators from one config."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalite.config.schema import SamplingParams as SamplingParams
    from megalite.config.structured import StructuredOutputsParams as StructuredOutputsParams
    from megalite.inference.balancer import LoadBalancer as LoadBalancer
    from megalite.inference.llm import LLM as LLM

os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
"""On a CPU: MKL gives back what it packs for a product, measured as fast; it reads this when torch is loaded."""

__version__ = "0.8.0"
__all__ = ["LLM", "LoadBalancer", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LLM": "inference.llm",
    "LoadBalancer": "inference.balancer",
    "SamplingParams": "config.schema",
    "StructuredOutputsParams": "config.structured",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import megalite` stays light (no torch, deepspeed or tokenizers)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'megalite' has no attribute {name!r}")
    return getattr(import_module(f"megalite.{_HOMES[name]}"), name)
