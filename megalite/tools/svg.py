"""The little SVG that the pictures of the documentation are made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

COLOURS = ("#2563eb", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", "#a21caf")


WIDE, WIDE_BOLD = 0.56, 0.66
"""Of the font's size: how wide a character is at most on average, in fonts wider than the one that is asked for."""


def text(
    x: float,
    y: float,
    words: str,
    size: float = 12,
    anchor: str = "start",
    fill: str = "#223",
    bold: bool = False,
    *,
    room: float,
) -> str:
    """One line, in smaller letters where a reader's wide font would need more than `room`."""
    size = min(size, room / max(1, len(words)) / (WIDE_BOLD if bold else WIDE))
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.1f}" font-size="{size:.3g}" text-anchor="{anchor}" fill="{fill}"{weight}>'
        f"{escape(words)}</text>"
    )


def page(width: float, height: float, parts: Iterable[str]) -> str:
    """A whole picture, on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
            'font-family="Helvetica, Arial, sans-serif">',
            f'<rect width="{width}" height="{height:.0f}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )
