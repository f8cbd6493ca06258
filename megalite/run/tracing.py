"""What a run shows of its steps: the timeline, whose clocks are brought together at the start, and the live table."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.config.schema import MonitorSection, TrainMonitorSection
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.kernels.device import timing_event
from megalite.monitor.collector import Meter
from megalite.monitor.live import LiveBoard, LiveFeed
from megalite.monitor.timeline import Timeline
from megalite.run.runtime import Runtime

log = logging.getLogger(__name__)

PINGS = 8
"""Messages to rank 0 and back by which a rank learns what its clock says; the quickest counts."""
_KEY = "timeline"


def begin(file: str | None, runtime: Runtime, state: ParallelState) -> None:
    """Measure phases on the rank's device too, where it has one, and from now on write the timeline into `file`.

    Collective over the run. Ranks of one host write to one file, and so do hosts that share it. ConfigError: it can't
    be written.
    """
    meter, rank, store = state.meter, runtime.rank, runtime.store
    if runtime.device.type == "cuda":
        meter.watch_device(timing_event)
    if file is None:
        return
    path, offset, origin, makes = Path(file), 0.0, meter.clock(), True
    try:
        if runtime.world_size > 1:
            hosts = [info.machine for info in runtime.ranks]
            far = [other for other, host in enumerate(hosts) if host != hosts[0]]
            offset = clock_offset(store, rank, far, meter.clock)
            if rank == 0:
                token = secrets.token_hex(8)
                Timeline.create(path, token)
                store.set(f"{_KEY}/origin", f"{token} {origin!r}")
            token, _, text = store.get(f"{_KEY}/origin").decode().partition(" ")
            origin, makes = float(text), rank == 0
            if rank == hosts.index(hosts[rank]) and not Timeline.was_created(path, token):
                Timeline.create(path, token)
                makes = True
            _meet(store, "made", runtime.world_size)
        else:
            Timeline.create(path, "")
        place = state.coord
        meter.sink = Timeline(
            path,
            rank=rank,
            ranks=runtime.world_size,
            label=f"rank {rank}: stage {place.pp}, tp {place.tp}, replica {place.dp}",
            to_origin=lambda at: at + offset - origin,
            ends=makes,
        )
    except OSError as error:
        rule = f"can't be written: {error.strerror}"
        raise ConfigError(Problem(key="monitor.timeline", rule=rule, value=file)) from error


def end(runtime: Runtime, meter: Meter) -> None:
    """Write the rest; the file is whole then. Collective over the run."""
    timeline, meter.sink = meter.sink, None
    if timeline is None:
        return
    timeline.close()
    if timeline.dropped:
        log.warning("the timeline is full: the last %d events of rank %d are missing", timeline.dropped, runtime.rank)
    if runtime.world_size > 1:
        _meet(runtime.store, "closed", runtime.world_size)
    if timeline.ends:
        timeline.finish()


@contextmanager
def live(wanted: bool, runtime: Runtime, state: ParallelState, *, shows: bool) -> Iterator[None]:
    """Context in which this rank tells how it is doing; the one that `shows` draws it all, if it has a terminal.

    Every rank of the run calls it; none waits for another.
    """
    if not wanted:
        yield
        return
    store, place, key = runtime.store, state.coord, f"live/{runtime.rank}"
    gpu = partial(gpu_use, runtime.device)
    feed = LiveFeed(state.meter, lambda text: store.set(key, text), gpu, tp=place.tp, pp=place.pp, dp=place.dp)

    def read() -> dict[int, str]:
        keys = {rank: f"live/{rank}" for rank in range(runtime.world_size)}
        return {rank: store.get(one).decode() for rank, one in keys.items() if store.check([one])}

    with LiveBoard(read) if shows and sys.stderr.isatty() else nullcontext():
        try:
            yield
        finally:
            feed.close()


def gpu_use(device: torch.device) -> dict[str, float] | None:
    """What a GPU does now, by its driver: see `LiveFeed`. None: there is none, or nothing that reads it."""
    if device.type != "cuda":
        return None
    try:
        use, watts = torch.cuda.utilization(device) / 100, torch.cuda.power_draw(device) / 1000
        return {"use": use, "watts": watts, "memory": torch.cuda.device_memory_used(device)}
    except Exception:  # without the extra `live`, or a driver that does not say
        return None


@contextmanager
def measured(
    section: MonitorSection | TrainMonitorSection, runtime: Runtime, state: ParallelState, *, shows: bool
) -> Iterator[None]:
    """Context of a run's work, which is measured, traced and shown as `section` says; an error leaves it at once.

    Collective over the run. `shows`: see `live`.
    """
    begin(section.timeline, runtime, state)
    state.meter.start()
    with live(section.live, runtime, state, shows=shows):
        yield
    state.meter.stop()
    end(runtime, state.meter)


def clock_offset(store: dist.Store, rank: int, far: Sequence[int], clock: Callable[[], float]) -> float:
    """Seconds to add to this rank's clock to get rank 0's; 0 on ranks that are not `far` and share its clock.

    Of several messages to rank 0 and back the quickest is believed: rank 0 answered in its middle (RFC 5905).
    """
    if rank == 0:
        for other in far:
            for number in range(PINGS):
                store.get(f"{_KEY}/ping/{other}/{number}")
                store.set(f"{_KEY}/pong/{other}/{number}", repr(clock()))
    if rank not in far:
        return 0.0
    best = (float("inf"), 0.0)
    for number in range(PINGS):
        asked = clock()
        store.set(f"{_KEY}/ping/{rank}/{number}", "")
        answer = float(store.get(f"{_KEY}/pong/{rank}/{number}"))
        back = clock()
        best = min(best, (back - asked, answer - (asked + back) / 2))
    return best[1]


def _meet(store: dist.Store, name: str, count: int) -> None:
    """Wait until as many ranks have come here."""
    here = store.add(f"{_KEY}/{name}", 1)
    while here < count:
        time.sleep(0.005)
        here = store.add(f"{_KEY}/{name}", 0)
