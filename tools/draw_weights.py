"""Draw how weights travel from a Hugging Face file into rank files, from the real weight table, as SVG.

`python tools/draw_weights.py --out docs/weights.svg` draws the picture of the README.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megalite.convert.convert import parse_layout, rank_files
from megalite.core.layout import Layout
from megalite.errors import ConfigError, Problem
from megalite.files import write_durably
from megalite.tools.svg import COLOURS, page, text
from megalite.tools.toolkit import Parser, main
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.manifest import file_name
from megalite.weights.table import hf_shapes

EPILOG = """\
example:
  python tools/draw_weights.py --layout tp=5 --out /tmp/weights.svg"""
WIDTH, TOP, HEIGHT, GAP = 940, 96, 430, 26
LEFT_X, RIGHT_X, BAR = 300, 590, 46


@dataclass(frozen=True)
class Strip:
    """A range on its way: where it is cut out on the left, where it lies on the right."""

    hf: str
    lo: int
    hi: int
    rank: int
    offset: int
    """Bytes from the start of the rank file."""
    nbytes: int
    words: str
    """The range, for people."""


def strips_of(source: Checkpoint, layout: Layout, param: str) -> list[Strip]:
    """Every range of one local parameter on every rank that has it."""
    found = []
    for (rank, _), (_, extents) in rank_files(source, layout, Path(), None).items():
        for extent in extents:
            if extent.info.name == param:
                one = extent.range
                found.append(Strip(one.piece.hf, one.lo, one.hi, rank, extent.offset, extent.nbytes, str(one)))
    if source.manifest:
        raise ConfigError(Problem(key="--model", rule="must be in Hugging Face layout"))
    if not found:
        raise ConfigError(Problem(key="--param", rule=f"no parameter is called {param}"))
    return found


def bar(x: float, y: float, height: float, fill: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{height:.1f}" fill="{fill}" fill-opacity="{opacity}" '
        'stroke="#445"/>'
    )


def ribbon(left: tuple[float, float], right: tuple[float, float], colour: str) -> str:
    """A band from y-range `left` of the left bars to y-range `right` of the right ones."""
    x1, x2, middle = LEFT_X + BAR, RIGHT_X, (LEFT_X + BAR + RIGHT_X) / 2
    (a, b), (c, d) = left, right
    return (
        f'<path d="M {x1} {a:.1f} C {middle} {a:.1f} {middle} {c:.1f} {x2} {c:.1f} L {x2} {d:.1f} '
        f'C {middle} {d:.1f} {middle} {b:.1f} {x1} {b:.1f} Z" fill="{colour}" fill-opacity="0.28"/>'
    )


def tensors(source: Checkpoint, extent: dict[str, int], scale: float) -> tuple[list[str], dict[str, float], float]:
    """The file's tensors, one bar each: SVG, the top of each bar, and where they end."""
    shapes, lines, tops, y = hf_shapes(source.model), [], {}, float(TOP)
    for hf, rows in extent.items():
        tops[hf] = y
        first = min(extent.offset for extent in source.extents if extent.part[0] == hf)
        height = rows * scale
        shape = " x ".join(map(str, shapes[hf]))
        where = f"{shape} {source.dtypes[hf]}, bytes from {first:,}"
        lines.append(bar(LEFT_X, y, height, "#f1f5f9"))
        x, name = LEFT_X - 10, hf.partition(".")[2]
        lines.append(text(x, y + height / 2 - 4, name, 12, "end", bold=True, room=x))
        lines.append(text(x, y + height / 2 + 12, where, 11, "end", room=x))
        y += height + GAP
    return lines, tops, y


def files(strips: list[Strip], tops: dict[str, float], scale: float) -> tuple[list[str], list[str], float]:
    """The parameter in each rank file: ribbons from the tensors, bars, and where they end."""
    ribbons, lines, y = [], [], float(TOP)
    for rank in dict.fromkeys(strip.rank for strip in strips):
        colour = COLOURS[rank % len(COLOURS)]
        mine = [strip for strip in strips if strip.rank == rank]
        where = f"{file_name(rank)}, bytes {mine[0].offset:,}..{mine[-1].offset + mine[-1].nbytes:,}"
        lines.append(text(RIGHT_X, y - 6, where, 12, fill=colour, bold=True, room=WIDTH - RIGHT_X))
        for strip in mine:
            height, begin = (strip.hi - strip.lo) * scale, tops[strip.hf] + strip.lo * scale
            ribbons.append(ribbon((begin, begin + height), (y, y + height), colour))
            lines.append(bar(RIGHT_X, y, height, colour, 0.55))
            name, x = strip.words.partition(".")[2], RIGHT_X + BAR + 12
            lines.append(text(x, y + height / 2 + 4, name, 11, room=WIDTH - x))
            y += height
        y += GAP
    return ribbons, lines, y


def draw(source: Checkpoint, layout: Layout, param: str) -> str:
    """The picture: the file's tensors on the left, the rank files' parameter on the right, ranges as ribbons."""
    strips = strips_of(source, layout, param)
    extent: dict[str, int] = {}
    for strip in strips:
        extent[strip.hf] = max(extent.get(strip.hf, 0), strip.hi)
    scale = HEIGHT / max(sum(extent.values()), sum(strip.hi - strip.lo for strip in strips))
    left, tops, left_end = tensors(source, extent, scale)
    ribbons, right, right_end = files(strips, tops, scale)
    height = max(left_end, right_end) + 40
    title = f"How weights travel: {param}, cut for tp={layout.tp},pp={layout.pp}"
    note = "Replicated rows are read once and written to each rank; manifest.json holds one digest for each range."
    return page(
        WIDTH,
        height,
        [
            text(WIDTH / 2, 28, title, 17, "middle", bold=True, room=WIDTH),
            text(LEFT_X + BAR, 66, f"Hugging Face: {next(iter(source.files))}", 13, "end", "#445", room=LEFT_X + BAR),
            text(RIGHT_X, 66, "one safetensors file a rank", 13, "start", "#445", room=WIDTH - RIGHT_X),
            *ribbons,
            *left,
            *right,
            text(WIDTH / 2, height - 14, note, 12, "middle", "#445", room=WIDTH),
        ],
    )


def run(args: argparse.Namespace) -> int:
    write_durably(args.out, draw(open_checkpoint(args.model), parse_layout(args.layout), args.param))
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip(), EPILOG)
    parser.add_argument("--model", default="checkpoints/demo", help="Hugging Face folder (default: %(default)s)")
    parser.add_argument("--layout", default="tp=3,pp=1", help="what it is cut for (default: %(default)s)")
    parser.add_argument("--param", default="layers.0.attn.qkv.weight", help="local parameter (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the SVG to write")
    sys.exit(main(parser, run))
