"""JSON read strictly: whole texts with `parse`, JSON lines with `lines`. Torch-free.

What the json module lets pass is refused here: a key that occurs twice in an object, NaN and infinities.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_LINE = 1 << 26
"""Longest line that `lines` reads, bytes."""


class JsonError(ValueError):
    """What is wrong with a JSON text, in words that follow its name: `is not valid JSON at column 3: ...`."""

    def __init__(self, problem: str, readable: Any = None):
        super().__init__(problem)
        self.readable = readable
        """What could be read nevertheless: without keys that occur twice, None for NaN; None if it is no JSON."""


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line that is not blank."""

    number: int
    """From 1, blank lines counted."""
    raw: bytes
    """Without the white space around it and a byte order mark; of a line that is too long, its beginning."""
    value: Any
    problem: JsonError | None
    """Why `value` is None."""


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. JsonError: it has none, or more than one reader could read out of it."""
    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            problems.append(f"the key {twice[:100]!r} occurs twice")
            del values[twice]
        return values

    def no_constant(name: str) -> None:
        problems.append(f"{name} is not a JSON number")

    readable = None
    try:
        if isinstance(text, bytes):
            text = _decoded(text, problems)
        readable = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problems.append(f"is not valid JSON at {line}column {error.colno}: {error.msg}")
    except ValueError as error:  # a number of very many digits
        problems.append(str(error))
    except RecursionError:
        problems.append("is nested too deeply")
    if problems:
        raise JsonError(problems[0], readable)
    return readable


def _decoded(text: bytes, problems: list[str]) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        problems.append(f"is not UTF-8 at byte {error.start + 1}")
        return text.decode(errors="replace")


def lines(file: BinaryIO) -> Iterator[JsonLine]:
    """Every line of `file` that is not blank, each with its value or what is wrong with it.

    A line longer than MAX_LINE costs itself only, and no memory beyond that.
    """
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE)
            yield JsonLine(number, raw, None, JsonError(f"the line is longer than {MAX_LINE >> 20} MiB"))
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        value, problem = None, None
        try:
            value = parse(raw.rstrip())
        except JsonError as error:
            problem = error
        yield JsonLine(number, raw.strip(), value, problem)
