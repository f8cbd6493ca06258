"""Draw what the policies of LoadBalancer do to recorded arrivals, from the rows of `bench balance --json`, as SVG.

For each recording and policy: prompt tokens found in a cache, and the time to first token that one request in a hundred
exceeds, on a logarithmic axis.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.files import open_regular, write_durably
from megalite.tools.svg import COLOURS, page, text
from megalite.tools.toolkit import Parser, main

POLICIES = ("round_robin", "least_tokens", "prefix")
WIDTH, LEFT, PANEL, BETWEEN, BAR, TOP = 900, 150, 340, 50, 11, 70
GROUP = BAR * len(POLICIES) + 12


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of requests that were served, by recording and policy."""
    try:
        with open_regular(path) as file:
            rows = [row for row in json.load(file) if row["policy"] in POLICIES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(Problem(key=str(path), rule=f"is not what bench balance writes: {error}")) from error
    if not rows:
        raise ConfigError(Problem(key=str(path), rule="has no request that was served"))
    return rows


def panel(
    rows: Sequence[dict[str, Any]], x: float, title: str, share: Callable[[dict[str, Any]], float], words: str
) -> Iterator[str]:
    """One bar a row; `share` is its length as a part of the panel, `words` a format for its value."""
    yield text(x, TOP - 14, title, 13, bold=True, room=PANEL)
    yield f'<line x1="{x}" y1="{TOP - 4}" x2="{x}" y2="{TOP + len(rows) // 3 * GROUP}" stroke="#99a"/>'
    for number, row in enumerate(rows):
        policy = POLICIES.index(row["policy"])
        y = TOP + number // len(POLICIES) * GROUP + policy * BAR
        length = max(1.0, (PANEL - 60) * share(row))
        yield f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{COLOURS[policy]}"/>'
        yield text(x + length + 4, y + BAR - 3, words.format(**row), 9, room=56)


def draw(rows: Sequence[dict[str, Any]]) -> str:
    rows = [{**row, "percent": row["hits"] * 100, "ms": row["first_p99"] * 1e3} for row in rows]
    slowest, fastest = (math.log(pick(row["ms"] for row in rows)) for pick in (max, min))
    parts = [
        text(LEFT + 170 * n, 28, name, 13, fill=COLOURS[n], bold=True, room=160) for n, name in enumerate(POLICIES)
    ]
    for group, row in enumerate(rows[:: len(POLICIES)]):
        y = TOP + group * GROUP + BAR * 1.5 + 4
        parts.append(text(LEFT - 10, y, row["recording"], 12, "end", room=LEFT - 16))
    cached = panel(rows, LEFT, "prompt tokens found in a cache", lambda row: row["hits"], "{percent:.0f}%")
    late = panel(
        rows,
        LEFT + PANEL + BETWEEN,
        "time to first token, 99th percentile (log)",
        lambda row: 0.05 + 0.95 * (math.log(row["ms"]) - fastest) / ((slowest - fastest) or 1.0),
        "{ms:,.0f} ms",
    )
    return page(WIDTH, TOP + len(rows) / len(POLICIES) * GROUP + 10, [*parts, *cached, *late])


def run(args: argparse.Namespace) -> int:
    write_durably(args.out, draw(read(args.rows)))
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip())
    parser.add_argument("rows", type=Path, help="what bench balance --json wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the picture")
    sys.exit(main(parser, run))
