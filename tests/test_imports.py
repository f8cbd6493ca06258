"""The structure holds: imports point down, and the check that says so notices when they do not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from check_imports import check  # noqa: E402


def test_imports_point_down():
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("megalite/core/a.py", "from megalite.model import config", "must not know megalite.model"),
        ("megalite/train/a.py", "import megalite.inference.engine", "must not know megalite.inference"),
        ("megalite/monitor/a.py", "from megalite.errors import RankLost", "imports nothing of ours"),
        ("megalite/inference/a.py", "import deepspeed", "deepspeed may be imported only in"),
        ("megalite/config/a.py", "import torch", "importable without torch"),
        ("megalite/model/a.py", '"""Sums.\n\nImportable without\ntorch."""\nimport torch', "importable without torch"),
        ("megalite/model/a.py", "def f():\n    import transformers", "transformers may be imported only in"),
    ],
)
def test_wrong_imports_are_found(tmp_path, file, line, reason):
    target = tmp_path / file
    target.parent.mkdir(parents=True)
    target.write_text(line + "\n")
    (found,) = check(tmp_path)
    assert reason in found


def test_importing_megalite_is_light():
    assert imported("import megalite", "torch", "deepspeed", "transformers", "tokenizers", "fastapi", "omegaconf") == []


def test_generation_imports_only_what_it_needs():
    others = "deepspeed", "transformers", "omegaconf", "jinja2", "huggingface_hub", "torch._dynamo", "pandas", "scipy"
    assert imported("from megalite import LLM", *others) == []


def imported(code: str, *names: str) -> list[str]:
    """Those of the modules that running `code` imports."""
    code += f"; import json, sys; print(json.dumps([name for name in {names} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_public_names_stay_where_programs_find_them():
    from megalite.text import tokenizer
    from megalite.tokenizer import Tokenizer

    assert Tokenizer is tokenizer.Tokenizer


def test_the_page_of_the_structure_names_every_module_and_none_that_is_not_there():
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    files = [path for path in ROOT.glob("[!.]*/**/*.py") if path.stem != "__init__"]
    modules = [path for path in files if path.is_relative_to(ROOT / "megalite") and "tools" not in path.parts]
    words = {*re.findall(r"\w+", page), *(path.stem for path in modules if path.stem.endswith("_rules"))}
    assert not [path for path in modules if path.stem not in words]
    named = re.findall(r"`([\w/]+\.py)`", page)
    assert named and not [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in files)]
