"""Numbers and tables for people: how bytes, counts and rates are written everywhere, and lines that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

COLUMNS = 80
"""What a terminal shows on one line."""
_WHOLE = "\0"
"""Stands for a space at which no line may end."""


def format_bytes(count: int) -> str:
    """E.g. `12 B`, `640 KiB`, `12.5 MiB`, `3.2 GiB`; at most eight characters below 10,000 TiB."""
    if count < 1024:
        return f"{count} B"
    size, units = float(count), iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    while size >= 999.5 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


def format_count(number: int, noun: str) -> str:
    """E.g. `1 prompt`, `2,000 prompts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_rate(number: float, seconds: float) -> str:
    """How many a second, to two or more digits: `0.031`, `4.2`, `57`, `1,300`, `1.1M`; `-` where there is nothing."""
    if number <= 0 or seconds <= 0:
        return "-"
    rate = number / seconds
    if rate >= 99_999.5:
        return f"{rate / 1e3:.0f}k" if rate < 999_500 else f"{rate / 1e6:.3g}M"
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


def format_percent(share: float) -> str:
    """E.g. `31%` of a share of 0.31."""
    return f"{100 * share:.0f}%"


def format_duration(seconds: float) -> str:
    """About how long: `40 s`, `12 min`, `3 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def format_seconds(seconds: float) -> str:
    """To three digits: `0 s`, `3.27 us`, `12.5 ms`, `29.7 s`."""
    for limit, scale, unit in ((0.9995e-3, 1e6, "us"), (0.9995, 1e3, "ms")):
        if 0 < seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def aligned(rows: Sequence[Mapping[str, str]], *, missing: str = "", left: bool = False) -> list[str]:
    """Rows of cells as the lines of a table under a head, right-aligned or left; `missing`: a cell that a row lacks."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines: list[Mapping[str, str]] = [dict(zip(names, names, strict=True)), *rows]
    cells = [[line.get(name, missing) for name in names] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = str.ljust if left else str.rjust
    return ["  ".join(map(pad, line, widths)).rstrip() for line in cells]


def wrapped(text: str) -> str:
    """A line as several that fit a terminal, the further ones indented; words are not cut.

    Where two spaces part it, as they do in the lines of a log, it breaks there alone, but for parts that are too long.
    """
    parts = text.split("  ")
    if len(parts) > 1:
        text = "  ".join(part if len(part) > COLUMNS - 2 else part.replace(" ", _WHOLE) for part in parts)
    lines = textwrap.fill(text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines.replace(_WHOLE, " ")
