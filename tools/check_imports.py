"""Checks that imports point down only: `python tools/check_imports.py`. Prints each wrong import, exits 1 if any.

The rooms, from the top: launch and tools; hybrid; inference and train; weights; model; core; kernels and config. A room
may import rooms below it, never one beside or above. Some packages may be imported in a few places only, and some
modules must stay importable without torch.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVELS = [
    {"megalite.errors"},
    {"megalite.files", "megalite.json_text", "megalite.terminal", "megalite.monitor"},
    {"megalite.config", "megalite.kernels"},
    {"megalite.core"},
    {"megalite.run", "megalite.model", "megalite.text"},
    {"megalite.weights", "megalite.tokenizer"},
    {"megalite.planner"},
    {"megalite.preflight"},
    {"megalite.inference", "megalite.train", "megalite.convert", "megalite.rewards"},
    {"megalite.hybrid", "megalite.evals", "megalite.serve"},
    {"megalite.tools", "megalite.dry_run"},
    {"megalite.cli"},
    {"launch", "tools"},
]
"""From the bottom. Rooms of one level do not know each other."""

ISOLATED = {"megalite.monitor"}
"""Rooms that import nothing of ours."""

PLACES = {
    "deepspeed": (
        "megalite/train/",
        "megalite/run/runtime.py",
        "megalite/convert/import_deepspeed.py",
        "tests/",
        "megalite/tools/benchmarks/",
    ),
    "transformers": ("tests/", "megalite/tools/benchmarks/"),
    "tokenizers": (
        "megalite/text/plain_chats.py",
        "megalite/text/tokenizer.py",
        "megalite/text/tokenizer_files.py",
        "megalite/text/gguf_tokenizer.py",
        "megalite/text/detokenizer.py",
        "megalite/train/",
        "tests/",
    ),
    "llguidance": ("megalite/text/grammar.py", "megalite/inference/matchers.py", "tests/"),
    "pickle": ("tests/",),
    "lm_eval": ("megalite/evals.py", "tests/"),
}
"""Packages and the only places that may import them."""

TORCH_FREE = (
    "megalite/__init__.py",
    "megalite/cli.py",
    "megalite/config/",
    "megalite/core/layout.py",
    "megalite/core/progress.py",
    "megalite/errors.py",
    "megalite/files.py",
    "megalite/json_text.py",
    "megalite/monitor/",
    "megalite/planner/__init__.py",
    "megalite/planner/applied.py",
    "megalite/planner/choose.py",
    "megalite/planner/cost.py",
    "megalite/planner/device_map.py",
    "megalite/planner/devices.py",
    "megalite/planner/generation.py",
    "megalite/planner/hybrid.py",
    "megalite/planner/memory.py",
    "megalite/planner/search.py",
    "megalite/planner/training.py",
    "megalite/preflight.py",
    "megalite/rewards/",
    "megalite/run/facts.py",
    "megalite/run/hostfile.py",
    "megalite/run/hosts.py",
    "megalite/run/launch_env.py",
    "megalite/run/launcher.py",
    "megalite/run/placement.py",
    "megalite/terminal.py",
    "megalite/tools/__init__.py",
    "megalite/tools/bench.py",
    "megalite/tools/convert.py",
    "megalite/tools/describe.py",
    "megalite/tools/export.py",
    "megalite/tools/import_deepspeed.py",
    "megalite/tools/plan.py",
    "megalite/tools/reshard.py",
    "megalite/tools/toolkit.py",
    "megalite/tools/verify.py",
    "megalite/text/",
)
"""Files and folders whose modules must not import torch when they are imported, neither themselves nor through others.
So must every module whose docstring says so."""

BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
"""Where a statement has others."""

CLAIM = re.compile(r"torch-free|(importable|imported) without torch|imports no torch|no torch here", re.IGNORECASE)


@dataclass(frozen=True)
class Import:
    """One import statement."""

    file: Path
    line: int
    module: str
    deferred: bool
    """Inside a function or under TYPE_CHECKING: not run when the module is imported."""


def parsed(file: Path) -> tuple[str, list[Import]]:
    """The docstring of a module, and every import statement."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return ast.get_docstring(tree) or "", list(_imports(file, tree))


def _imports(file: Path, tree: ast.Module) -> Iterator[Import]:
    """Those in functions too."""
    left: list[tuple[ast.AST, bool]] = [(tree, False)]
    while left:
        node, deferred = left.pop(0)
        for child in (one for block in BLOCKS for one in getattr(node, block, ())):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, deferred)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                for alias in child.names:
                    yield Import(file, child.lineno, f"{child.module}.{alias.name}", deferred)
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                left.append((child, deferred or inner or typing_only))


@cache
def room_of(module: str) -> tuple[int, str] | None:
    """Level and name of the room that a dotted module name is in."""
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return level, room
    return None


def wrong(path: str, item: Import) -> str | None:
    """Why an import of the module at `path` is against the rules, or None."""
    package = item.module.split(".")[0]
    if package in PLACES and not path.startswith(PLACES[package]):
        return f"{package} may be imported only in {', '.join(PLACES[package]) or 'no module'}"
    here, there = room_of(path.removesuffix(".py").replace("/", ".")), room_of(item.module)
    if here is None or there is None or here[1] == there[1]:
        return None
    if here[1] in ISOLATED:
        return f"{here[1]} imports nothing of ours"
    if there[0] >= here[0]:
        return f"{here[1]} must not know {there[1]}"
    return None


def loads_torch(modules: Mapping[str, Sequence[Import]], name: str, seen: set[str]) -> Import | None:
    """The import by which importing a module loads torch, by itself or through others of ours; None: it does not."""
    seen.add(name)
    for item in modules[name]:
        if item.deferred:
            continue
        if item.module.split(".")[0] == "torch":
            return item
        candidates = (item.module, item.module.rpartition(".")[0], f"{item.module}.__init__")
        inner = next((one for one in candidates if one in modules), None)
        if inner is not None and inner not in seen and loads_torch(modules, inner, seen):
            return item
    return None


def claims(path: str, docstring: str) -> bool:
    """Whether a module must be importable without torch."""
    return path.startswith(TORCH_FREE) or CLAIM.search(" ".join(docstring.split())) is not None


def check(root: Path) -> list[str]:
    """Every wrong import below `root`, as `file:line: import module: reason`."""
    files = [file for top in ("megalite", "launch", "tools", "tests") for file in sorted((root / top).rglob("*.py"))]
    sources = {file: parsed(file) for file in files}
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    modules = {names[file]: items for file, (_, items) in sources.items()}
    found = []
    for file, (docstring, items) in sources.items():
        path = file.relative_to(root).as_posix()
        reasons = [(item, wrong(path, item)) for item in items]
        held = path.startswith("megalite/") and claims(path, docstring)
        loads = loads_torch(modules, names[file], set()) if held else None
        if loads is not None:
            reasons.append((loads, "this module must be importable without torch"))
        found += [f"{path}:{item.line}: import {item.module}: {why}" for item, why in reasons if why]
    return found


def run(args: argparse.Namespace) -> int:
    problems = check(Path(__file__).resolve().parent.parent)
    print("\n".join(problems) if problems else "imports point down only")
    return int(bool(problems))


if __name__ == "__main__":
    from megalite.tools.toolkit import Parser, main

    sys.exit(main(Parser((__doc__ or "").strip()), run))
