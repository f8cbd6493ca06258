"""Rewards that need nothing but the text: `hybrid.reward: megalite.rewards.functions:NAME`.

Each takes the prompt, the completion and the example (the record that the prompt comes from) and gives a number, most
between 0 and 1. They are run in the workers of a `RewardPool`, whose time limit covers whatever takes too long here.
A completion ends where the model ended it, or where it was cut off at `sampling.max_tokens`; a reward can't tell which.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.rewards import sandbox

MOST_WANTED = 3
"""Statements beyond which `complete_function` gives nothing for more."""
BROKEN = 0.5
"""Most that `complete_function` gives when the function does not come to its end."""

_UNREADABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that the parser takes for an error of the caller's."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def exact_match(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion up to its first line end, stripped, is `example["answer"]`; else 0."""
    return float(completion.partition("\n")[0].strip() == str(_field(example, "answer")).strip())


def matches_pattern(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the whole completion matches the regular expression `example["pattern"]`; else 0."""
    return float(re.fullmatch(_field(example, "pattern"), completion) is not None)


def length_close(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion has `example["length"]` characters, falling to 0 at none and at twice as many."""
    wanted = _field(example, "length")
    return max(0.0, 1.0 - abs(len(completion) - wanted) / max(1, wanted))


def parses_as_python(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if prompt and completion together are Python; else 0.

    A last line without its end may have been cut off: if it is what does not parse, it is left out, as long as another
    line of the completion remains.
    """
    whole, newline, _ = completion.rpartition("\n")
    texts = [prompt + completion, *([prompt + whole + newline] if whole.strip() else [])]
    return float(any(isinstance(_parse(text), ast.Module) for text in texts))


def passes_asserts(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the program runs and then every statement of `example["tests"]` does (`assert f(2) == 4`); else 0.

    The program is the prompt and as many lines of the completion as parse with it, so that a completion may run on
    into something that is cut off. It runs in `sandbox`, which says what this protects from and what not; the pool's
    time limit should be above `sandbox.SECONDS`, or a program that hangs counts as a reward that does.
    """
    tests = _field(example, "tests")
    kept = longest_parsing(prompt, completion)
    if kept is None:
        return 0.0
    return float(sandbox.run(kept, tests).passed)


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
    text, first = _lines(prompt + completion), len(_lines(prompt)) - 1
    parsed = _longest_parsing(text, first)
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
    ending = _ending(text, first, parsed.count, function)
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
    lines = _lines(prompt)
    end = len(lines), len(lines[-1].encode())
    found = [one for one in ast.walk(tree) if isinstance(one, Function) and (one.lineno, one.col_offset) < end]
    return max(found, key=lambda one: (one.lineno, one.col_offset), default=None)


# ---- parsing


@dataclass(frozen=True, slots=True)
class Parsed:
    """The beginning of a text that parses."""

    count: int
    """Lines."""
    tree: ast.Module


def longest_parsing(prompt: str, completion: str) -> str | None:
    """The prompt and as many lines of the completion as parse together; None if no number of them does."""
    text = _lines(prompt + completion)
    parsed = _longest_parsing(text, len(_lines(prompt)) - 1)
    return "\n".join(text[: parsed.count]) + "\n" if parsed else None


def _longest_parsing(text: list[str], least: int) -> Parsed | None:
    """The longest beginning of `text` with at least `least` lines that parses."""
    count = next((number for number, line in enumerate(text) if _UNREADABLE.search(line)), len(text))
    while count >= max(1, least):
        parsed = _parse("\n".join(text[:count]))
        if isinstance(parsed, ast.Module):
            return Parsed(count, parsed)
        # Nothing with the line of the error in it parses, but within f-strings Python before 3.12 miscounts lines.
        line = parsed.lineno if isinstance(parsed, SyntaxError) and "f-string" not in parsed.msg else None
        count = min(count, line or count) - 1
    return None


def _parse(text: str) -> ast.Module | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, for example
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return error


def _lines(text: str) -> list[str]:
    """The lines as the parser counts them, without their ends; the last one is empty if the text ends in a line's."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _field(example: Mapping[str, Any], name: str) -> Any:
    if name not in example:
        raise ValueError(f"the example has no {name!r}, which this reward needs")
    return example[name]
