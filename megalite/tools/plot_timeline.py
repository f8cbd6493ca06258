"""Draws a few steps of a run as a picture (SVG): of every rank what it computed, sent and waited for.

The timeline is what `monitor.timeline=FILE` of infer, train, hybrid or serve wrote. Several timelines are drawn below
each other on one scale of time, such as before and after a change of parallel.layers.

example:
  megalite infer --config configs/infer/demo.yaml parallel.pp=4 monitor.timeline=before.json.gz
  megalite plot_timeline before.json.gz --out before.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalite.errors import ConfigError, Problem
from megalite.files import write_durably
from megalite.monitor.timeline import read_timeline
from megalite.monitor.words import format_count, format_percent
from megalite.tools import svg, toolkit

COLOURS = {
    "waiting": "#e5e7eb",
    "compute": "#2563eb",
    "sampling": "#7c3aed",
    "scheduling": "#0e7490",
    "communication": "#b45309",
}
"""By phase; a later one is drawn over an earlier one."""
WIDTH, LEFT, RIGHT, ROW, GAP = 960, 150, 110, 22, 6


@dataclass(frozen=True, slots=True)
class Span:
    """Times in microseconds."""

    phase: str
    name: str
    begin: float
    end: float


@dataclass(slots=True)
class Track:
    """What a rank did."""

    label: str = ""
    spans: list[Span] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)

    def share(self, phase: str, begin: float, end: float) -> float:
        """Of the time from `begin` to `end`; spans within others count for these."""
        marks = sorted((max(s.begin, begin), min(s.end, end)) for s in self.spans if s.phase == phase)
        covered, at = 0.0, begin
        for start, stop in marks:
            covered += max(0.0, stop - max(start, at))
            at = max(at, stop)
        return covered / (end - begin)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a run that is drawn."""

    tracks: list[Track]
    begin: float
    end: float

    @property
    def waiting(self) -> float:
        """Share of the time, on average over the ranks."""
        return sum(track.share("waiting", self.begin, self.end) for track in self.tracks) / len(self.tracks)


def add_arguments(parser: toolkit.Parser) -> None:
    parser.add_argument("timeline", nargs="+", help="a file that monitor.timeline wrote")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture, SVG")
    text = "how many steps to draw (default: 1 of training, one round of the pipeline else)"
    parser.add_argument("--steps", type=toolkit.positive, metavar="N", help=text)
    parser.add_argument("--first", type=int, metavar="N", help="number of the first one (default: a typical one)")
    parser.add_argument("--title", action="append", default=[], help="of each timeline, in turn (default: its name)")


def run(args: argparse.Namespace) -> int:
    windows = [window_of(read_tracks(path), path, args.first, args.steps) for path in args.timeline]
    titles = [*args.title, *map(str, args.timeline[len(args.title) :])]
    write_durably(Path(args.out), draw(titles, windows))
    for title, window in zip(titles, windows, strict=True):
        length = (window.end - window.begin) / 1000
        print(
            f"{title}: {length:.1f} ms, in which {format_count(len(window.tracks), 'rank')} waited "
            f"{format_percent(window.waiting)} on average"
        )
    return 0


def read_tracks(path: str) -> list[Track]:
    """What each rank of a timeline did, by rank. ConfigError: it is none."""
    tracks: dict[int, Track] = {}
    on_device: set[int] = set()
    names: dict[tuple[int, int], str] = {}
    try:
        events = list(read_timeline(Path(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(key="timeline", rule=f"can't be read: {error}", value=path)) from error
    for event in events:
        if event.get("name") == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
        elif event.get("name") == "process_name":
            tracks.setdefault(event["pid"], Track()).label = event["args"]["name"]
        elif event.get("ph") == "X":
            on_device |= {event["pid"]} if names.get((event["pid"], event["tid"])) == "device" else set()
    for event in events:
        if event.get("ph") != "X":
            continue
        rank, lane = event["pid"], names.get((event["pid"], event["tid"]), "")
        begin, end, phase = event["ts"], event["ts"] + event["dur"], event.get("cat", "")
        track = tracks.setdefault(rank, Track())
        if lane == "steps":
            track.steps.append((begin, end))
        elif phase in COLOURS and (rank not in on_device or lane == "device" or phase in ("sampling", "scheduling")):
            track.spans.append(Span(phase, event["name"], begin, end))
    return [track for _, track in sorted(tracks.items())]


def window_of(tracks: list[Track], path: str, first: int | None, count: int | None) -> Window:
    """`count` steps of the last rank from the `first` on; None: of as many steps those that took a typical time."""
    steps = tracks[-1].steps if tracks else []
    trains = any(span.name.startswith("backward") for track in tracks for span in track.spans)
    count = count or (1 if trains else len(tracks))
    last = len(steps) - count
    if last < 0 or (first is not None and not 0 <= first <= last):
        rule = f"has {format_count(len(steps), 'step')}, too few for {count} from {first or 0} on"
        raise ConfigError(Problem(key="timeline", rule=rule, value=path, fix="Lower --first or --steps."))
    if first is None:
        lengths = [(steps[at + count - 1][1] - steps[at][0], at) for at in range(last + 1)]
        first = sorted(lengths)[len(lengths) // 2][1]
    return Window(tracks, steps[first][0], steps[first + count - 1][1])


def draw(titles: Sequence[str], windows: Sequence[Window]) -> str:
    """The picture, all windows on one scale."""
    scale = (WIDTH - LEFT - RIGHT) / max(window.end - window.begin for window in windows)
    parts, top = _legend(18), 44.0
    for title, window in zip(titles, windows, strict=True):
        told = f"{title}: {(window.end - window.begin) / 1000:.1f} ms, {format_percent(window.waiting)} waiting"
        parts.append(svg.text(8, top, told, 13, bold=True, room=WIDTH - 16))
        top += 10
        for track in window.tracks:
            parts += _row(track, window, scale, top)
            top += ROW + GAP
        top += 24
    return svg.page(WIDTH, top - 12, parts)


def _legend(y: float) -> list[str]:
    parts, x = [], float(LEFT)
    for phase, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(svg.text(x + 17, y, phase, 12, room=110))
        x += 130
    return parts


def _row(track: Track, window: Window, scale: float, top: float) -> list[str]:
    """A rank: its name, its spans, and how long it waited."""
    label = track.label.partition(", replica 0")[0]
    right = LEFT + (window.end - window.begin) * scale
    parts = [
        svg.text(8, top + 15, label, 12, room=LEFT - 14),
        f'<rect x="{LEFT}" y="{top:.0f}" width="{right - LEFT:.1f}" height="{ROW}" fill="#f8fafc"/>',
    ]
    for phase, colour in COLOURS.items():
        for span in track.spans:
            begin, end = max(span.begin, window.begin), min(span.end, window.end)
            if span.phase != phase or end <= begin:
                continue
            x, width = LEFT + (begin - window.begin) * scale, (end - begin) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.0f}" width="{max(width, 0.3):.1f}" height="{ROW}" fill="{colour}"/>'
            )
            kind, _, number = span.name.partition(" ")
            if number and width > 14:
                parts.append(svg.text(x + 3, top + 15, f"{kind[0].upper()}{number}", 11, fill="#fff", room=width - 4))
    waited = format_percent(track.share("waiting", window.begin, window.end))
    parts.append(svg.text(right + 6, top + 15, f"waits {waited}", 12, room=RIGHT - 10))
    return parts
