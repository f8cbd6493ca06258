"""A run as it goes, on the terminal: ranks, what they are at, queues, tokens a second, GPUs. Needs the extra `live`.

Every rank tells of itself twice a second, at the end of a step; one reads what all have told and draws it. Neither
waits for the other.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from megalite.monitor.collector import Meter
from megalite.monitor.words import format_bytes, format_percent, format_rate

EVERY = 0.5
"""Seconds between what a rank tells, and between pictures."""


class LiveFeed:
    """Tells of one rank, through `publish`, what its collector has measured lately."""

    def __init__(
        self, meter: Meter, publish: Callable[[str], None], gpu: Callable[[], object] = lambda: None, **place: int
    ):
        """`gpu`: what the rank's GPU does now: `use` (share of the time), `watts` and `memory` (bytes), None: unknown.
        `place`: where the rank is: tp, pp and dp."""
        self._meter, self._publish, self._gpu, self._place = meter, publish, gpu, place
        self._told = meter.clock()
        self._spent: dict[str, float] = {}
        self._tokens = self._done = 0
        meter.on_step.append(self._step)

    def close(self) -> None:
        self._meter.on_step.remove(self._step)

    def _step(self, prefill: int, decode: int) -> None:
        self._tokens += prefill + decode
        self._done += 1
        now = self._meter.clock()
        seconds = now - self._told
        if seconds < EVERY:
            return
        spent: dict[str, float] = {phase: value for phase, value in self._meter.spent.items()}
        busy = {phase: (value - self._spent.get(phase, 0.0)) / seconds for phase, value in spent.items()}
        running, queued = self._meter.queue
        told = {
            **self._place,
            "busy": busy,
            "tokens": self._tokens / seconds,
            "steps": self._done / seconds,
            "running": running,
            "queued": queued,
            "gpu": self._gpu(),
        }
        self._publish(json.dumps(told))
        self._told, self._spent, self._tokens, self._done = now, spent, 0, 0


class LiveBoard:
    """Draws what the ranks tell, in a thread, until it is closed. A context manager."""

    def __init__(self, read: Callable[[], dict[int, str]], *, stream: TextIO | None = None):
        """`read`: the latest that each rank has told."""
        from rich.console import Console
        from rich.live import Live

        self._read = read
        self._live = Live(
            console=Console(file=stream or sys.stderr, force_terminal=True), auto_refresh=False, transient=True
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live", daemon=True)

    def __enter__(self) -> LiveBoard:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._live.stop()

    def _draw(self) -> None:
        while not self._closed.wait(EVERY):
            with suppress(Exception):  # the run goes on without its picture
                self._live.update(table({rank: json.loads(text) for rank, text in self._read().items()}), refresh=True)


def table(told: dict[int, dict[str, Any]]) -> Any:
    """What the ranks tell, as a table of rich's; the ranks of a stage of a replica have one cohort in turn."""
    from rich.table import Table

    gpus = any(one["gpu"] for one in told.values())
    speeds = {one["dp"]: one["tokens"] for _, one in sorted(told.items())}
    found = Table(title=f"{format_rate(sum(speeds.values()), 1)} tokens/s", title_justify="left")
    names = ["rank", "tp/pp/dp", "busy", "comm", "wait", "host", "steps/s", "tokens/s", "running", "queued"]
    for name in [*names, "GPU", "power", "memory"] if gpus else names:
        found.add_column(name, justify="right")
    for rank, one in sorted(told.items()):
        busy = one["busy"]
        host = busy.get("scheduling", 0.0) + busy.get("sampling", 0.0)
        shares = [busy.get(phase, 0.0) for phase in ("compute", "communication", "waiting")]
        cells = [str(rank), f"{one['tp']}/{one['pp']}/{one['dp']}", *map(format_percent, [*shares, host])]
        cells += [format_rate(one["steps"], 1), format_rate(one["tokens"], 1), str(one["running"]), str(one["queued"])]
        if gpus:
            gpu = one["gpu"] or {"use": 0.0, "watts": 0.0, "memory": 0}
            cells += [format_percent(gpu["use"]), f"{gpu['watts']:.0f} W", format_bytes(gpu["memory"])]
        found.add_row(*cells)
    return found
