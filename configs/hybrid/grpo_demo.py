"""Task and reward of grpo_demo.yaml: heads of library functions, and how whole a function a completion makes of one.

`data.source: configs.hybrid.grpo_demo:library_functions`, `hybrid.reward: configs.hybrid.grpo_demo:complete_function`.
"""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megalite.config.schema import DataSection
from megalite.rewards.functions import lines_of, longest_parsing
from megalite.train.data.records import SourceFile, find_files, is_held_out

log = logging.getLogger(__name__)
Function = ast.FunctionDef | ast.AsyncFunctionDef

NOT_CODE = (
    "encodings/*",
    "pydoc_data/topics.py",
    "*/encoded_modules/*",
    "*/test_lib2to3/data/*",
    "lib2to3/tests/data/*",
)
"""Files of the standard library that configs/train/demo.yaml leaves out: tables rather than code."""
MOST_WANTED = 3
"""Statements beyond which `complete_function` gives nothing for more."""
BROKEN = 0.5
"""Most that `complete_function` gives when the function does not come to its end."""
EVALUATION = 0.2
"""Share of the functions in the held-out files on which a hybrid job evaluates and does not train."""


def library_functions(
    *,
    split: str,
    seed: int = 0,
    source: str = "stdlib",
    pattern: str = "**/*.py",
    exclude: Sequence[str] = NOT_CODE,
    held_out: float = 0.03,
    max_head: int = 8,
    max_body: int = 20,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """Heads of functions in files that a model was not trained on: decorators, `def` line, docstring; dedented.

    `source`, `pattern`, `exclude`, `held_out`: those of the model's data section when it was trained, which decide
    together which files that are; by default the demo model's. `max_head`, `max_body`: lines of a head and of a body
    beyond which a function is left out, as are functions whose body computes nothing. `count`: at most so many.
    For the reward `complete_function`: `statements`; for supervised steps: `response`, the original body.
    """
    files = find_files(DataSection(source=source, pattern=pattern, exclude=list(exclude)))
    records: dict[str, dict[str, Any]] = {}
    for file in files:
        if is_held_out(file.name, held_out):
            for record in _functions(file, max_head, max_body):
                records.setdefault(record["prompt"], record)
    kept = [one for one in records.values() if is_held_out(one["prompt"], EVALUATION) == (split == "held_out")]
    # Neighbours in a file should not be neighbours here.
    kept.sort(key=lambda one: hashlib.blake2b(f"{seed} {one['prompt']}".encode(), digest_size=8).digest())
    return kept[:count]


def _functions(file: SourceFile, max_head: int, max_body: int) -> Iterator[dict[str, Any]]:
    """The functions of a file that are fit to be completed, in its order."""
    try:
        text = file.path.read_bytes().decode("utf-8")
        tree = ast.parse(text)
    except (ValueError, SyntaxError) as error:
        log.info("%s: passed over: %s", file.path, error)
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, Function):
            documented = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if documented else node.body
            statements = len(set(statements_of(body)))
            start = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            middle = node.body[0].end_lineno if documented else _first_line(node.body[0]) - 1
            end = node.end_lineno
            assert middle is not None and end is not None
            fits = node.lineno <= middle <= start + max_head and middle < end <= middle + max_body
            head, response = (_dedented(part, node.col_offset) for part in (lines[start:middle], lines[middle:end]))
            if statements and fits and head and response and _is_function(head + response):
                yield {
                    "prompt": head,
                    "response": response,
                    "statements": statements,
                    "origin": f"{file.name}:{node.lineno} {node.name}",
                }


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])


def _dedented(lines: list[str], column: int) -> str | None:
    """The lines moved left by `column`; None if one of them doesn't begin so far right."""
    if any(line[:column].strip() for line in lines):
        return None
    return "".join(f"{line[column:]}\n" for line in lines)


def _is_function(text: str) -> bool:
    """Whether the text is one function still, now that it stands by itself."""
    try:
        return len(ast.parse(text).body) == 1
    except SyntaxError:
        return False


# ---- the reward


def complete_function(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """How much of a plausible function the completion makes of the prompt, which ends in the head of one; 0 to 1.

    The head is the `def` line, perhaps with decorators before it and a docstring after it. The completion counts up to
    the function's end: the next statement at the column of the `def`, or the end of the text. The reward is the product
    of five measures:

    - **It comes to an end**: 1 if this much parses and ends in such a statement or in a whole line. Otherwise BROKEN
      times the share of its lines, but for blank ones, before the first that doesn't parse.
    - **It does something**: its different statements over those of the original (`example["statements"]`; 1 if that is
      not given), of which at most MOST_WANTED are wanted; at most 1. See `statements_of` for what is counted.
    - **It doesn't repeat itself**: the share of the counted statements that are different.
    - **It is code**: 1 if half of its lines or more are, not comments or strings by themselves; else in proportion.
    - **It uses what it is given**: half of this for nothing, the other half in proportion to the parameters it reads.

    So an empty body, nothing but comments, or `return None` gets 0; the same line again and again gets next to nothing;
    `return x` gets a third where the original does more; and a body that breaks off gets at most half of what it would
    get if it ended. Not measured: whether the function does what its name says, and whether the names in it exist.
    """
    text, first = lines_of(prompt + completion), len(lines_of(prompt)) - 1
    parsed = longest_parsing(text, first)
    function = _last_function(parsed.tree, prompt) if parsed else None
    if parsed is None or function is None:
        return 0.0
    written = [node for node in function.body if node.lineno > first]
    counted = statements_of(written)
    if not counted:
        return 0.0
    wanted = min(MOST_WANTED, max(1, int(example.get("statements", 1))))
    different = len(set(counted))
    something = min(1.0, different / wanted)
    fresh = different / len(counted)
    code = min(1.0, 2 * _share_of_code(text[first : function.end_lineno], written, first))
    ending = _ending(text, first, parsed.lines, function)
    return ending * something * fresh * code * (1 + _share_read(function.args, written)) / 2


def statements_of(nodes: Iterable[ast.stmt]) -> list[str]:
    """The statements in `nodes` and below that compute something, each in a form that tells whether two are equal.

    Not counted: `pass`, `break`, `continue`, `global`, `nonlocal`; a constant or a plain name by itself; `return`
    without a value or of a constant; `raise NotImplementedError`; `x = x`. Of `if`, `for`, `def` and other statements
    that hold statements, only those are counted.
    """
    below = (one for node in nodes for one in ast.walk(node) if isinstance(one, ast.stmt))
    return [ast.dump(one) for one in below if not hasattr(one, "body") and _computes(one)]


def _computes(node: ast.stmt) -> bool:
    match node:
        case ast.Pass() | ast.Break() | ast.Continue() | ast.Global() | ast.Nonlocal():
            return False
        case ast.Return(value=None | ast.Constant()) | ast.Expr(value=ast.Constant() | ast.Name()):
            return False
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return False
        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=source)):
            return target != source
    return True


def _ending(text: list[str], first: int, parsed: int, function: Function) -> float:
    """The measure of whether the function comes to an end; `parsed` lines of `text` parse."""

    def is_beside(line: str) -> bool:
        code = line.lstrip()
        return bool(code) and code[0] != "#" and len(line) - len(code) <= function.col_offset

    assert function.end_lineno is not None
    if any(map(is_beside, text[function.end_lineno : parsed + 1])) or (parsed == len(text) and not text[-1].strip()):
        return 1.0
    end = next((number for number in range(parsed, len(text)) if is_beside(text[number])), len(text))
    filled = [number for number in range(first, end) if text[number].strip()]
    return BROKEN * sum(number < parsed for number in filled) / len(filled)


def _share_of_code(lines: list[str], written: list[ast.stmt], first: int) -> float:
    """The share of code among the lines, the first of which is number `first` of the text, that are not blank."""
    strings: set[int] = set()
    for node in (one for top in written for one in ast.walk(top)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            strings |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
    filled = [(number, line.lstrip()) for number, line in enumerate(lines, first) if line.strip()]
    return sum(line[0] != "#" and number not in strings for number, line in filled) / max(1, len(filled))


def _share_read(arguments: ast.arguments, written: list[ast.stmt]) -> float:
    """The share of the parameters that the statements read; 1 if there are none."""
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = {one.arg for one in given if one is not None}
    nodes = [one for top in written for one in ast.walk(top)]
    read = {one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
    read |= {one.target.id for one in nodes if isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name)}
    return len(names & read) / len(names) if names else 1.0


def _last_function(tree: ast.Module, prompt: str) -> Function | None:
    """The last function whose head begins in the prompt."""
    lines = lines_of(prompt)
    end = len(lines), len(lines[-1].encode())
    found = [one for one in ast.walk(tree) if isinstance(one, Function) and (one.lineno, one.col_offset) < end]
    return max(found, key=lambda one: (one.lineno, one.col_offset), default=None)
