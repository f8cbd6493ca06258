"""JSON read strictly: whole texts with `parse` or `parse_in_pieces`, JSON lines with `lines`. Torch-free.

What the json module lets pass is refused here: a key that occurs twice in an object, NaN and infinities.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, BinaryIO

MAX_LINE = 1 << 26
"""Longest line that `lines` reads, bytes."""
PIECE = 1 << 14
"""Characters that `parse_in_pieces` reads in one call into C, but for a text or a number."""
BETWEEN_PAUSES = 1 << 11
"""Characters after which it pauses at the next chance."""
MAX_DEPTH = 200
"""Arrays and objects of more than PIECE characters that may lie in each other."""
MAX_VALUES = 1 << 16
"""Objects of a text that is read in pieces, and entries of each array but for numbers: more are refused, since even to
let go of them takes long."""
MAX_MEMBERS = 1 << 18
"""Of an object in it."""

Pause = Callable[[], Awaitable[object]]


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
    reader = _Reader()
    with reader:
        reader.readable = reader.decoder.decode(reader.decoded(text))
    return reader.readable


async def parse_in_pieces(text: bytes, pause: Pause) -> Any:
    """What `parse` gives or raises, within MAX_VALUES; awaits `pause` after every millisecond or so, however large the
    text is."""
    if len(text) <= PIECE:
        return parse(text)
    reader = _Reader(MAX_VALUES)
    with reader:
        reader.readable = await reader.read(reader.decoded(text), pause)
    return reader.readable


class _Reader:
    """Reads one text, as a context in which the errors of the json module become JsonError."""

    def __init__(self, most: float = inf):
        """`most`: objects."""
        self._most = most
        self.problems: list[str] = []
        self.readable: Any = None
        self.decoder = json.JSONDecoder(object_pairs_hook=self._unique, parse_constant=self._no_constant)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            self.problems.append(f"is not valid JSON at {line}column {error.colno}: {error.msg}")
        elif isinstance(error, ValueError):  # a number of very many digits, too many values
            self.problems.append(str(error))
        elif isinstance(error, RecursionError):
            self.problems.append("is nested too deeply")
        elif error is not None:
            return
        if self.problems:
            raise JsonError(self.problems[0], self.readable) from None

    def decoded(self, text: str | bytes) -> str:
        if isinstance(text, str):
            return text
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            self.problems.append(f"is not UTF-8 at byte {error.start + 1}")
            return text.decode(errors="replace")

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._most -= 1
        if self._most < 0:
            raise ValueError(f"has more than {MAX_VALUES} objects")
        values = dict(pairs)
        if len(values) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            self.problems.append(f"the key {twice[:100]!r} occurs twice")
            del values[twice]
        return values

    def _no_constant(self, name: str) -> None:
        self.problems.append(f"{name} is not a JSON number")

    # ---- in pieces

    async def read(self, text: str, pause: Pause) -> Any:
        """The value of `text`."""
        self._text, self._pause, self._paused = text, pause, 0
        value, end = await self._value(self._after_space(0), 0)
        end = self._after_space(end)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value

    async def _value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends."""
        text = self._text
        if text[at : at + 1] not in ("[", "{"):
            return self.decoder.raw_decode(text, at)
        piece = text[at : at + PIECE]
        try:
            value, end = self.decoder.raw_decode(piece)
            return value, at + end
        except json.JSONDecodeError:  # it may only be longer; what is wrong with it shows below
            pass
        if depth == MAX_DEPTH:
            raise RecursionError
        await self._pause()
        return await (self._array if text[at] == "[" else self._object)(at + 1, depth + 1)

    async def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        """One whose first value begins behind `at`, where there may be space."""
        values: list[Any] = []
        are_numbers, others = True, 0
        at, ended = self._begin(at, "]")
        while not ended:
            found, end = self._numbers(at) if are_numbers else ([], at)
            are_numbers = bool(found)
            if not found:
                value, end = await self._value(at, depth)
                found, others = [value], others + 1
                if others > MAX_VALUES:
                    raise ValueError(f"has an array of more than {MAX_VALUES} values that are no numbers")
            values += found
            at, ended = await self._next(end, "]")
        return values, at

    def _numbers(self, at: int) -> tuple[list[Any], int]:
        """Values of an array from `at` on, as many as fit into a piece, if they hold no comma; and where they end."""
        last = self._text.rfind(",", at, at + PIECE)
        if last <= at or self._text[at] not in "-0123456789":
            return [], at
        try:
            values, end = self.decoder.raw_decode(f"[{self._text[at:last]}]")
        except json.JSONDecodeError:
            return [], at
        return values, at + end - 2  # both brackets count

    async def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        """Read an object; see `_array`."""
        pairs: list[tuple[str, Any]] = []
        at, ended = self._begin(at, "}")
        while not ended:
            if self._text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", self._text, at)
            key, at = self.decoder.raw_decode(self._text, at)
            at = self._after_space(at)
            if self._text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", self._text, at)
            value, at = await self._value(self._after_space(at + 1), depth)
            pairs.append((key, value))
            if len(pairs) > MAX_MEMBERS:
                raise ValueError(f"has an object of more than {MAX_MEMBERS} members")
            at, ended = await self._next(at, "}")
        return self._unique(pairs), at

    def _begin(self, at: int, closed: str) -> tuple[int, bool]:
        """See `_next`; behind the bracket that opens an array or object."""
        at = self._after_space(at)
        ended = self._text[at : at + 1] == closed
        return at + ended, ended

    async def _next(self, at: int, closed: str) -> tuple[int, bool]:
        """Behind a value of an array or object: where the next one begins, or where it ends, and whether it does."""
        if at - self._paused >= BETWEEN_PAUSES:
            self._paused = at
            await self._pause()
        at = self._after_space(at)
        mark = self._text[at : at + 1]
        if mark == closed:
            return at + 1, True
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
        return self._after_space(at + 1), False

    def _after_space(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        assert found is not None
        return found.end()


_SPACE = re.compile(r"[ \t\n\r]*")


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
