"""Draw the pictures of docs/guide.md as SVG: the layers of tensor parallelism, and pipelines with their bubbles.

The pipelines are played from the schedules that the project itself runs (`megalite.core.schedules`).
`python tools/draw_guide.py --out docs` draws docs/guide_layers.svg and docs/guide_pipeline.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from svg import COLOURS, page, text

from megalite.core.schedules import Backward, Forward, forward_only, training
from megalite.files import write_durably
from megalite.tools.toolkit import Parser, main

WIDTH, LEFT, CELL, ROW, BAR = 940, 96, 26, 30, 24
BACKWARD = 2
"""Times a forward pass that a backward pass takes."""

Block = tuple[int, int, int, bool]
"""Of a stage: start, length, micro batch, backward."""


def play(schedule: Sequence[Sequence[Forward | Backward]]) -> list[list[Block]]:
    """When each stage does what: as soon as it is its turn and what it needs from a neighbour is there."""
    stages = len(schedule)
    done: dict[tuple[int, int, bool], int] = {}
    clocks, places = [0] * stages, [0] * stages
    blocks: list[list[Block]] = [[] for _ in range(stages)]
    while any(place < len(work) for place, work in zip(places, schedule, strict=True)):
        for stage, work in enumerate(schedule):
            if places[stage] == len(work):
                continue
            step = work[places[stage]]
            backward = isinstance(step, Backward)
            source = stage + 1 if backward else stage - 1
            need = (source, step.micro_batch, backward)
            if 0 <= source < stages and need not in done:
                continue
            start = max(clocks[stage], done.get(need, 0))
            clocks[stage] = start + (BACKWARD if backward else 1)
            done[stage, step.micro_batch, backward] = clocks[stage]
            blocks[stage].append((start, clocks[stage] - start, step.micro_batch, backward))
            places[stage] += 1
    return blocks


def idle(blocks: Sequence[Sequence[Block]]) -> float:
    """Share of the time that the stages wait."""
    end = max(start + length for row in blocks for start, length, _, _ in row)
    return 1 - sum(length for row in blocks for _, length, _, _ in row) / end / len(blocks)


def chart(blocks: Sequence[Sequence[Block]], y: float, title: str) -> Iterator[str]:
    """One row a stage; forward passes full, backward passes pale."""
    yield text(20, y, f"{title}: {idle(blocks):.0%} idle", 14, bold=True, room=WIDTH - 40)
    end = max(start + length for row in blocks for start, length, _, _ in row)
    cell = min(CELL, (WIDTH - LEFT - 20) / end)
    for stage, row in enumerate(blocks):
        top = y + 14 + stage * ROW
        yield text(20, top + 16, f"stage {stage}", 12, room=LEFT - 24)
        yield f'<rect x="{LEFT}" y="{top}" width="{end * cell:.1f}" height="{BAR}" fill="#eef0f4"/>'
        for start, length, micro_batch, backward in row:
            colour = COLOURS[micro_batch % len(COLOURS)]
            pale = ' fill-opacity="0.35"' if backward else ""
            yield (
                f'<rect x="{LEFT + start * cell:.1f}" y="{top}" width="{length * cell - 1.5:.1f}" height="{BAR}" '
                f'rx="3" fill="{colour}"{pale}/>'
            )
            middle = LEFT + (start + length / 2) * cell
            yield text(middle, top + 16, str(micro_batch), 11, "middle", "#223" if backward else "#fff", room=cell)


def pipelines() -> str:
    """Four stages: one micro batch, then eight, and a training step of one forward, one backward."""

    def computed(make: object, count: int) -> list[list[Forward | Backward]]:
        assert callable(make)
        return [[one for one in make(4, s, count) if isinstance(one, Forward | Backward)] for s in range(4)]

    charts = [
        (computed(forward_only, 1), "One batch at a time"),
        (computed(forward_only, 8), "Eight micro batches"),
        (computed(training, 4), "Training (1F1B), four micro batches, backward passes pale"),
        (computed(training, 12), "Training (1F1B), twelve micro batches"),
    ]
    parts: list[str] = []
    y = 30.0
    for schedule, title in charts:
        parts += chart(play(schedule), y, title)
        y += 14 + 4 * ROW + 34
    return page(WIDTH, y - 20, parts)


def box(x: float, y: float, width: float, height: float, words: str, fill: str) -> Iterator[str]:
    yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#445"/>'
    yield text(x + width / 2, y + height / 2 + 5, words, 13, "middle", room=width - 8)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#445" stroke-width="1.5" marker-end="url(#end)"/>'


def layers() -> str:
    """The MLP of a block over two ranks: a column-parallel layer, then a row-parallel one, then one sum."""
    head = '<path d="M0,0 L10,5 L0,10 z" fill="#445"/>'
    parts = [
        '<marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f"{head}</marker>",
        text(20, 30, "An MLP over two ranks (tp=2): no communication inside, one all_reduce behind it", 15, bold=True,
             room=WIDTH - 40),
        text(265, 66, "column-parallel", 13, "middle", bold=True, room=170),
        text(265, 84, "outputs of W1 are cut", 12, "middle", room=170),
        text(555, 66, "row-parallel", 13, "middle", bold=True, room=170),
        text(555, 84, "inputs of W2 are cut", 12, "middle", room=170),
    ]  # fmt: skip
    for rank, fill in enumerate(("#dbeafe", "#fef3c7")):
        y = 104 + rank * 120
        half = ("left", "right")[rank]
        parts += box(30, y, 110, 70, f"x on rank {rank}", "#f1f5f9")
        parts += box(190, y, 150, 70, f"W1, {half} half", fill)
        parts += box(385, y, 60, 70, "gate", "#f8fafc")
        parts += box(490, y, 130, 70, f"W2, {('upper', 'lower')[rank]} half", fill)
        parts += [arrow(140, y + 35, 188, y + 35), arrow(340, y + 35, 383, y + 35), arrow(445, y + 35, 488, y + 35)]
        parts.append(text(364, y - 6, f"half of the inner numbers, on rank {rank} only", 11, "middle", room=300))
        parts += [arrow(620, y + 35, 688, y + 35), arrow(800, y + 35, 848, y + 35)]
        parts.append(text(655, y + 26, "summand", 11, "middle", room=66))
        parts += box(850, y, 66, 70, "y", "#f1f5f9")
    parts += box(690, 104, 110, 190, "all_reduce: +", "#dcfce7")
    parts.append(
        text(20, 330, "Attention is the same: q, k and v are column-parallel (cut by heads), the output projection is "
             "row-parallel.", 12, room=WIDTH - 40)
    )  # fmt: skip
    return page(WIDTH, 350, parts)


def run(args: argparse.Namespace) -> int:
    for name, picture in (("layers", layers()), ("pipeline", pipelines())):
        write_durably(args.out / f"guide_{name}.svg", picture)
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip())
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the pictures go")
    sys.exit(main(parser, run))
