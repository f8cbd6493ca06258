"""The little SVG that the pictures of the documentation are made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

COLOURS = ("#2563eb", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", "#a21caf")


def text(
    x: float, y: float, words: str, size: int = 12, anchor: str = "start", fill: str = "#223", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>'
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
