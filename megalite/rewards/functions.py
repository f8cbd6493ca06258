"""Rewards that need nothing but the text: `hybrid.reward: megalite.rewards:NAME`.

Each takes the prompt, the completion and the example (the record that the prompt comes from) and gives a number, most
between 0 and 1. They are run in the workers of a `RewardPool`, whose time limit covers whatever takes too long here.
A completion ends where the model ended it, or where it was cut off at `sampling.max_tokens`; a reward can't tell which.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalite.rewards import sandbox

_UNREADABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that the parser takes for an error of the caller's."""


def exact_match(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion up to its first line end, stripped, is `example["answer"]`; else 0."""
    return float(completion.partition("\n")[0].strip() == str(_field(example, "answer")).strip())


def matches_pattern(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the whole completion matches the regular expression `example["pattern"]`; else 0."""
    return float(re.fullmatch(_field(example, "pattern"), completion) is not None)


def length_close(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion has `example["length"]` characters, falling to 0 at none and at twice as many."""
    wanted: float = _field(example, "length")
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
    lines = lines_of(prompt + completion)
    parsed = longest_parsing(lines, len(lines_of(prompt)) - 1)
    if parsed is None:
        return 0.0
    return float(sandbox.run("\n".join(lines[: parsed.lines]) + "\n", tests).passed)


# ---- parsing


@dataclass(frozen=True, slots=True)
class Parsed:
    """The longest beginning of a text that is Python."""

    lines: int
    """Number of lines of it."""
    tree: ast.Module


def longest_parsing(lines: Sequence[str], least: int) -> Parsed | None:
    """The longest beginning of `lines` (see `lines_of`) that parses; None if none of at least `least` lines does."""
    count = next((number for number, line in enumerate(lines) if _UNREADABLE.search(line)), len(lines))
    while count >= max(1, least):
        parsed = _parse("\n".join(lines[:count]))
        if isinstance(parsed, ast.Module):
            return Parsed(count, parsed)
        # Nothing with the line of the error in it parses, but within f-strings Python before 3.12 miscounts lines.
        line = parsed.lineno if isinstance(parsed, SyntaxError) and "f-string" not in parsed.msg else None
        count = min(count, line or count) - 1
    return None


def lines_of(text: str) -> list[str]:
    """The lines as the parser counts them, without their ends; the last one is empty if the text ends in a line's."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _parse(text: str) -> ast.Module | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, for example
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return error


def _field(example: Mapping[str, Any], name: str) -> Any:
    if name not in example:
        raise ValueError(f"the example has no {name!r}, which this reward needs")
    return example[name]
