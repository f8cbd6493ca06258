"""The wheel in an environment of its own, with megalite's dependencies and no checkout: commands and Python API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from waiting import PATIENCE

import megalite

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
GENERATE = """
import megalite
from megalite import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM("demo", max_model_len=64)
    (output,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=8))
    print(megalite.__file__)
    print(len(output.outputs[0].token_ids))
"""


class Installed:
    """A virtual environment with the wheel; commands run in a folder that holds the demo model and nothing else."""

    def __init__(self, folder: Path):
        source, self.folder, self.venv = folder / "source", folder / "work", folder / "venv"
        shutil.copytree(ROOT / "megalite", source / "megalite", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel", "--no-index"]
        call([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source])
        (self.wheel,) = folder.glob("megalite-*.whl")
        call([sys.executable, "-m", "venv", "--without-pip", self.venv])
        (packages,) = self.venv.glob("lib/python*/site-packages")
        # not what a .pth file of theirs names, such as the checkout
        seen = [path for path in sys.path if path.endswith("-packages")]
        (packages / "dependencies.pth").write_text("\n".join(seen))
        # what is imported is compiled then
        install = ["install", "--no-compile", "--no-deps", "--no-index", self.wheel]
        call([self.venv / "bin" / "python", "-m", "pip", "--quiet", *install])
        self.folder.mkdir()
        (self.folder / "demo").symlink_to(DEMO)

    def run(self, command: str, *arguments: str) -> str:
        """What a command of the environment prints."""
        return call([self.venv / "bin" / command, *arguments], cwd=self.folder)


def call(command: list[str | Path], **options: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_package_is_shipped_whole_with_types_and_nothing_beside_it(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megalite").rglob("*.py")}
    assert modules | {"megalite/py.typed", "megalite/serve/page.html"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megalite"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], [f"megalite {megalite.__version__}"]),
        (["bench", "convert", "--help"], ["usage: megalite bench convert"]),
        (["verify", "demo"], ["demo: all is well"]),
    ],
)
def test_commands(installed, arguments, words):
    said = installed.run("megalite", *arguments)
    assert all(word in said for word in words), said


def test_generation_through_python(installed):
    (installed.folder / "generate.py").write_text(GENERATE)
    where, tokens = installed.run("python", "generate.py").splitlines()[-2:]
    assert Path(where).is_relative_to(installed.venv) and tokens == "8"


def test_a_job_on_two_ranks(installed):
    config = {
        "model": {"path": "demo"},
        "parallel": {"tp": 2},
        "distributed": {"device": "cpu"},
        "input": {"prompts": ["Once upon a time"]},
        "sampling": {"temperature": 0, "max_tokens": 8},
        "output": {"file": "out.jsonl"},
    }
    (installed.folder / "job.yaml").write_text(json.dumps(config))
    installed.run("megalite", "infer", "--config", "job.yaml")
    (line,) = (installed.folder / "out.jsonl").read_text().splitlines()
    assert len(json.loads(line)["outputs"][0]["token_ids"]) == 8
