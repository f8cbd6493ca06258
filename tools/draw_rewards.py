"""Draw how the mean reward of hybrid jobs went, iteration by iteration, from their logs, as SVG.

Each log is one run; runs that differ in their seeds alone are drawn thin, and their mean thick.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalite.errors import ConfigError, Problem
from megalite.files import open_regular, write_durably
from megalite.tools.svg import COLOURS, page, text
from megalite.tools.toolkit import Parser, main

EPILOG = """\
example:
  python tools/draw_rewards.py outputs/seed-*/training/log.jsonl --title "Sums of two digits" --out rewards.svg"""
WIDTH, HEIGHT = 760, 408
LEFT, RIGHT, TOP, BOTTOM = 70, 730, 60, 320


def read(path: Path, key: str) -> list[float]:
    """The values under `key` in a job's log, one an iteration, from the first."""
    try:
        with open_regular(path) as lines:
            logged = [values for values in map(json.loads, lines) if "iteration" in values]
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(key=str(path), rule=f"is not the log of a hybrid job: {error}")) from error
    if [values["iteration"] for values in logged] != list(range(1, len(logged) + 1)) or not logged:
        raise ConfigError(Problem(key=str(path), rule="must have every iteration of a hybrid job, from the first"))
    if any(key not in values for values in logged):
        known = ", ".join(name for name, value in logged[0].items() if isinstance(value, float))
        raise ConfigError(Problem(key="--key", rule=f"{key} is not in {path}", fix=f"It has {known}."))
    return [values[key] for values in logged]


def step_of(span: float) -> float:
    """The distance between marks on an axis: 1, 2 or 5 times a power of ten, four to ten of them in `span`."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= span / 4)


def marks(lo: float, hi: float) -> Iterator[float]:
    """Where an axis from `lo` to `hi` has its marks."""
    step = step_of(hi - lo)
    return (number * step for number in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1))


def draw(runs: Sequence[Sequence[float]], title: str, words: str) -> str:
    """The runs over their iterations; `words` say what is drawn."""
    count = min(map(len, runs))
    mean = [statistics.fmean(values) for values in zip(*(run[:count] for run in runs), strict=True)]
    everything = [value for run in runs for value in run]
    lo, hi = min(0.0, *everything), max(everything)
    hi = 1.0 if lo == 0 and 0.2 < hi <= 1 else hi + (hi == lo)
    last = max(map(len, runs))

    def x(iteration: float) -> float:
        return LEFT + (RIGHT - LEFT) * (iteration - 1) / max(1, last - 1)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - lo) / (hi - lo)

    def line(values: Sequence[float], colour: str, width: float, opacity: float) -> str:
        points = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in enumerate(values, 1))
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
        )

    parts = [text(WIDTH / 2, 30, title, 17, "middle", bold=True, room=WIDTH)]
    for value in marks(lo, hi):
        parts.append(f'<path d="M {LEFT} {y(value):.1f} H {RIGHT}" stroke="#e2e8f0"/>')
        parts.append(text(LEFT - 8, y(value) + 4, f"{value:g}", 12, "end", "#445", room=LEFT - 8))
    for number in [1, *(number for number in marks(1, max(last, 5)) if number >= 1)]:
        if number <= last and (number == 1 or x(number) - x(1) > 30):
            parts.append(text(x(number), BOTTOM + 18, f"{number:.0f}", 12, "middle", "#445", room=60))
    parts += [line(run, COLOURS[1 + place % (len(COLOURS) - 1)], 1, 0.45) for place, run in enumerate(runs)]
    parts.append(line(mean, COLOURS[0], 2.5, 1))
    tenth = max(1, count // 10)
    change = f"{statistics.fmean(mean[:tenth]):.2f} to {statistics.fmean(mean[-tenth:]):.2f}"
    parts.append(text(WIDTH / 2, BOTTOM + 36, "iteration", 12, "middle", "#445", room=WIDTH))
    several = f"; thin: {len(runs)} runs, thick: their mean" if len(runs) > 1 else ""
    ends = "first and last iteration" if tenth == 1 else f"means of the first and the last {tenth} iterations"
    for place, caption in enumerate((f"{words}{several}", f"from {change} ({ends})")):
        parts.append(text(WIDTH / 2, HEIGHT - 28 + 18 * place, caption, 12, "middle", "#445", room=WIDTH))
    return page(WIDTH, HEIGHT, parts)


def run(args: argparse.Namespace) -> int:
    write_durably(args.out, draw([read(path, args.key) for path in args.logs], args.title, args.words))
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip(), EPILOG)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="training/log.jsonl of a run's folder")
    parser.add_argument("--title", default="Mean reward", help="above the picture (default: %(default)s)")
    parser.add_argument("--words", default="mean reward of an iteration's samples", help="what is drawn")
    parser.add_argument("--key", default="reward", help="what of the log is drawn (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the SVG to write")
    sys.exit(main(parser, run))
