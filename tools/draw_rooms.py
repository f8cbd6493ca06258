"""Draw the rooms of megalite and which imports which, from the code's own imports, as SVG.

`python tools/draw_rooms.py --out docs/rooms.svg` draws the picture of docs/structure.md. Rooms stand on the levels of
tools/check_imports.py; an arrow that others imply (a room known through a room between) is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from check_imports import LEVELS, parsed, room_of

from megalite.files import write_durably
from megalite.tools.svg import page, text
from megalite.tools.toolkit import Parser, main

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ("core", "model", "weights", "inference", "train", "hybrid")
"""What a newcomer reads, in this order."""
WIDTH, ROW, HEIGHT, GAP = 960, 104, 46, 14
PIXELS_PER_LINE, NARROWEST = 0.052, 74


def measure(root: Path) -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Lines of each room, and the pairs (importer, imported)."""
    lines: dict[str, int] = {}
    arrows = set()
    for file in sorted((root / "megalite").rglob("*.py")):
        here = room_of(file.relative_to(root).as_posix().removesuffix(".py").replace("/", "."))
        if here is None:
            continue
        lines[here[1]] = lines.get(here[1], 0) + file.read_text(encoding="utf-8").count("\n")
        for item in parsed(file)[1]:
            there = room_of(item.module)
            if there is not None and there[1] != here[1]:
                arrows.add((here[1], there[1]))
    return lines, arrows


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that a longer way implies (transitive reduction)."""

    def reaches(start: str, end: str) -> bool:
        return any(b == end or reaches(b, end) for a, b in arrows if a == start)

    return {(a, b) for a, b in arrows if not any(c != b and reaches(c, b) for x, c in arrows if x == a)}


def draw(lines: dict[str, int], arrows: set[tuple[str, str]]) -> str:
    """The picture: one row a level, the lowest at the bottom; a room's width follows its lines."""
    rows = [sorted(room for room in level if room in lines) for level in LEVELS]
    rows = [row for row in rows if row]
    boxes: dict[str, tuple[float, float, float]] = {}
    for level, row in enumerate(rows):
        widths = [max(NARROWEST, lines[room] * PIXELS_PER_LINE) for room in row]
        x = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        for room, width in zip(row, widths, strict=True):
            boxes[room] = (x, 56 + (len(rows) - 1 - level) * ROW, width)
            x += width + GAP
    parts = [text(WIDTH / 2, 28, "The rooms of megalite, and what they import", 17, "middle", bold=True, room=WIDTH)]
    for a, b in sorted(arrows):
        (ax, ay, aw), (bx, by, bw) = boxes[a], boxes[b]
        x1, y1, x2, y2 = ax + aw / 2, ay + HEIGHT, bx + bw / 2, by
        bend = (y2 - y1) / 2
        parts.append(
            f'<path d="M {x1:.0f} {y1:.0f} C {x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" stroke="#94a3b8" stroke-width="1.4"/>'
        )
    for room, (x, y, width) in boxes.items():
        name = room.removeprefix("megalite.")
        fill, stroke = ("#dbeafe", "#2563eb") if name in MACHINE else ("#f1f5f9", "#64748b")
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )
        middle = x + width / 2
        parts.append(text(middle, y + 20, name, 13, "middle", bold=True, room=width - 6))
        parts.append(text(middle, y + 37, f"{lines[room]:,} lines", 11, "middle", "#445", room=width - 6))
    height = 56 + len(rows) * ROW
    note = "Blue: the machine, read as " + ", ".join(MACHINE) + ". Grey: skip it until you need it."
    parts.append(text(WIDTH / 2, height - 24, note, 12, "middle", "#445", room=WIDTH))
    return page(WIDTH, height, parts)


def run(args: argparse.Namespace) -> int:
    lines, arrows = measure(ROOT)
    write_durably(args.out, draw(lines, reduced(arrows)))
    return 0


if __name__ == "__main__":
    parser = Parser((__doc__ or "").strip())
    parser.add_argument("--out", required=True, metavar="FILE", help="the SVG to write")
    sys.exit(main(parser, run))
