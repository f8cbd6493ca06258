"""The one collector of where a rank's time went: phases on the host and on its device, traffic by group, steps.

Every second counts once: a phase within a phase stops the outer one's watch. On a device the same phases are marked by
events in its stream, which are read a step or more later, so that nothing waits for it. What a captured graph holds is
one phase, around its replay; the bytes of the collectives inside are counted at its capture and added on each replay.
The timeline, if there is one, also gets every span as it ends.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megalite.monitor.memory import peak_memory, run_delays
from megalite.monitor.metrics import PHASES, Phase, RankReport, Traffic

if TYPE_CHECKING:
    from megalite.monitor.timeline import Timeline

_OF_STEPS = ("steps", "prefill_tokens", "decode_tokens", "prefill_seconds", "decode_seconds")
"""Fields of RankReport that `Meter.step` counts up."""


class Event(Protocol):
    """A mark in a device's stream; `torch.cuda.Event` with timing is one."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any) -> float: ...


class _Span:
    """A phase as a context manager; one object serves every use."""

    __slots__ = ("group", "meter", "name", "on_device", "phase")

    def __init__(self, meter: Meter, phase: Phase, name: str, group: str, on_device: bool):
        self.meter, self.phase, self.name, self.group, self.on_device = meter, phase, name, group, on_device

    def __enter__(self) -> None:
        self.meter._enter(self)

    def __exit__(self, *error: object) -> None:
        self.meter._leave()


class DeviceClock:
    """Phases as a device passes them: events in its stream, read once they have happened."""

    def __init__(self, make_event: Callable[[], Event], clock: Callable[[], float]):
        self._make, self._clock = make_event, clock
        self._free: list[Event] = []
        self._marks: deque[tuple[Event, float, _Span | None]] = deque()
        """Not read yet: the event, the host's time when it was given to the stream, the phase from there on."""
        self._at = 0.0
        """When the oldest mark happened, by the host's clock."""

    def mark(self, span: _Span | None, now: float) -> None:
        """From this point of the stream on it is the phase of `span`; None: of none."""
        event = self._free.pop() if self._free else self._make()
        event.record()
        if not self._marks:
            self._at = now
        self._marks.append((event, now, span))

    def read(self, took: Callable[[_Span, float, float], None]) -> None:
        """Give `took` every phase that is over: the span, and when it began and ended by the host's clock.

        An event happened after it was recorded and before it is read; so both clocks stay together.
        """
        marks = self._marks
        while len(marks) > 1 and marks[1][0].query():
            event, _, span = marks.popleft()
            following, recorded, _ = marks[0]
            seconds = event.elapsed_time(following) / 1000
            began, self._at = self._at, min(max(self._at + seconds, recorded), self._clock())
            if span is not None:
                took(span, max(began, self._at - seconds), self._at)
            self._free.append(event)

    def forget(self) -> None:
        """Whatever is on its way counts for nothing."""
        self._marks.clear()


@dataclass
class Tally:
    """What the collectives inside a captured graph move on each replay: (bytes, messages) by group."""

    moved: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, group: str, num_bytes: int) -> None:
        size, count = self.moved.get(group, (0, 0))
        self.moved[group] = size + num_bytes, count + 1


class Meter:
    """A rank's collector. A phase costs about 1 us."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.sink: Timeline | None = None
        self.on_step: list[Callable[[int, int], None]] = []
        """Told of the end of every step: its prefill and decode tokens."""
        self._open: list[tuple[_Span, float]] = []
        """Phases that go on, outermost first, and when each began."""
        self._since = 0.0
        self._spans: dict[tuple[Phase, str, str, bool], _Span] = {}
        self._device: DeviceClock | None = None
        self._capture: Tally | None = None
        self._flows: Counter[str] = Counter()
        self.start()

    def watch_device(self, make_event: Callable[[], Event]) -> None:
        """From now on phases are measured on the device too; `make_event` gives an event that can be timed."""
        if self._device is None:
            self._device = DeviceClock(make_event, self.clock)

    def start(self) -> None:
        """The run starts now: forget what was measured before, e.g. while warming up. Not within a phase."""
        assert not self._open
        self._spent: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._on_device: dict[Phase, float] = {}
        self.traffic: dict[str, Traffic] = {}
        """Traffic by group."""
        self._parts: dict[str, float] = {}
        """Seconds, by name, until somebody takes them."""
        self._began = self._step_began = self.clock()
        self._lap: tuple[float, dict[Phase, float]] = (self._began, self.spent)
        self._ended: float | None = None
        self._delayed = run_delays()
        self._steps: dict[str, float] = dict.fromkeys(_OF_STEPS, 0)
        self._queue = {"running": 0.0, "queued": 0.0}
        self.queue = 0, 0
        """Sequences that ran and that waited in the last step."""
        if self._device is not None:
            self._device.forget()

    def stop(self) -> None:
        """The run ended: `report` says how long it took up to now."""
        self._ended = self.clock()
        self._read_device()

    def lap(self) -> dict[str, float]:
        """Share of the time in each phase since the last lap, or since `start`. Not within a phase."""
        assert not self._open
        self._read_device()
        now, spent = self.clock(), self.spent
        began, before = self._lap
        self._lap = (now, spent)
        return {phase: (spent[phase] - before[phase]) / (now - began) for phase in PHASES} if now > began else {}

    # ---- spans

    def phase(self, phase: Phase, name: str = "", group: str = "", *, on_device: bool = True) -> _Span:
        """`with meter.phase("compute"): ...`

        `name`: what the timeline calls it; `group`: among whom, of communication and waiting. `on_device`: the device
        works on it in its stream; not where the host alone does, or waits for the device.
        """
        key = phase, name, group, on_device
        span = self._spans.get(key)
        if span is None:
            if phase not in self._spent:
                raise KeyError(phase)
            span = self._spans[key] = _Span(self, phase, name or phase, group, on_device)
        return span

    def communication(self, group: str, num_bytes: int, name: str = "collective") -> _Span:
        """The phase of a collective that is waited for: its bytes and its time give the bandwidth."""
        self.count_bytes(group, num_bytes)
        if self._capture is None:
            self.traffic[group].timed_bytes += num_bytes
        return self.phase("communication", name, group)

    def count_bytes(self, group: str, num_bytes: int) -> None:
        """A collective or message among the ranks of a group was begun."""
        if self._capture is not None:
            self._capture.add(group, num_bytes)
            return
        traffic = self.traffic.get(group)
        if traffic is None:
            traffic = self.traffic[group] = Traffic()
        traffic.bytes += num_bytes
        traffic.messages += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a job, of phases and of whatever else: its seconds are added to what `take_parts` gives."""
        began = self.clock()
        try:
            yield
        finally:
            now = self.clock()
            self._parts[name] = self._parts.get(name, 0.0) + now - began
            if self.sink is not None:
                self.sink.span("parts", name, began, now)

    def take_parts(self) -> dict[str, float]:
        """Seconds of the parts since they were taken last, by name."""
        taken, self._parts = self._parts, {}
        return taken

    @contextmanager
    def capturing(self) -> Iterator[Tally]:
        """What happens meanwhile is captured, not done: no time and no bytes are counted, but what a replay will move
        is in the tally."""
        before, tally = self._capture, Tally()
        self._capture = tally
        try:
            yield tally
        finally:
            self._capture = before

    def replayed(self, tally: Tally) -> None:
        """A graph was replayed whose capture gave `tally`."""
        for group, (num_bytes, messages) in tally.moved.items():
            traffic = self.traffic.setdefault(group, Traffic())
            traffic.bytes += num_bytes
            traffic.messages += messages

    def message(self, flow: str, *, begins: bool) -> None:
        """A message of a flow (same name on both ends, messages in order) leaves or has arrived."""
        key = f"{flow} out" if begins else f"{flow} in"
        number = self._flows[key]
        self._flows[key] = number + 1
        if self.sink is not None:
            self.sink.flow(flow, number, self.clock(), begins=begins)

    def _enter(self, span: _Span) -> None:
        if self._capture is not None:
            return
        now = self.clock()
        if self._open:
            self._charge(self._open[-1][0], now - self._since)
        self._open.append((span, now))
        self._since = now
        if self._device is not None and span.on_device:
            self._device.mark(span, now)

    def _leave(self) -> None:
        if self._capture is not None:
            return
        now = self.clock()
        span, began = self._open.pop()
        self._charge(span, now - self._since)
        self._since = now
        if self.sink is not None:
            self.sink.span(span.group or "host", span.name, began, now, phase=span.phase)
        if self._device is not None and span.on_device:
            outer = (one for one, _ in reversed(self._open) if one.on_device)
            self._device.mark(next(outer, None), now)

    def _charge(self, span: _Span, seconds: float) -> None:
        self._spent[span.phase] += seconds
        if span.phase == "communication" and self._device is None:
            self.traffic.setdefault(span.group, Traffic()).seconds += seconds

    def _read_device(self) -> None:
        if self._device is not None:
            self._device.read(self._took)

    def _took(self, span: _Span, began: float, ended: float) -> None:
        """The device has had a phase."""
        self._on_device[span.phase] = self._on_device.get(span.phase, 0.0) + ended - began
        if span.phase == "communication":
            self.traffic.setdefault(span.group, Traffic()).seconds += ended - began
        if self.sink is not None:
            self.sink.span("device", span.name, began, ended, phase=span.phase)

    # ---- steps

    def step(
        self,
        *,
        prefill_tokens: int = 0,
        decode_tokens: int = 0,
        learnt_tokens: int = 0,
        running: int = 0,
        queued: int = 0,
    ) -> None:
        """A step ended. The time since the last one is divided between prefill and decode by their tokens.

        A step without tokens (the pipeline fills or drains) belongs to neither. `running`, `queued`: sequences that ran
        in it and that waited to run; a training step has `learnt_tokens` only.
        """
        now = self.clock()
        seconds = now - self._step_began
        tokens = prefill_tokens + decode_tokens
        if tokens:
            share = seconds / tokens
            counts = (1, prefill_tokens, decode_tokens, share * prefill_tokens, share * decode_tokens)
            for name, count in zip(_OF_STEPS, counts, strict=True):
                self._steps[name] += count
        elif learnt_tokens:
            self._steps["steps"] += 1
        self.queue = running, queued
        self._queue["running"] += seconds * running
        self._queue["queued"] += seconds * queued
        self._read_device()
        if self.sink is not None:
            if tokens or learnt_tokens:
                values = {"prefill": prefill_tokens, "decode": decode_tokens, "learnt": learnt_tokens}
                values = {kind: count for kind, count in values.items() if count}
                self.sink.span("steps", "step", self._step_began, now, values=values)
            if tokens:
                self.sink.values("queue", now, {"running": running, "queued": queued})
            self.sink.tick(now)
        self._step_began = now
        for told in self.on_step:
            told(prefill_tokens, decode_tokens)

    # ---- what came of it

    @property
    def spent(self) -> dict[Phase, float]:
        """Seconds of each phase: on the device where it was measured there, else on the host."""
        return {**self._spent, **self._on_device}

    def report(self, **facts: Any) -> RankReport:
        """What was measured from `start` to `stop` (or now), and the fields of RankReport that the caller knows."""
        self._read_device()
        seconds = (self.clock() if self._ended is None else self._ended) - self._began
        delays = [delay - self._delayed.get(thread, 0.0) for thread, delay in run_delays().items()]
        measured: dict[str, Any] = {**self._steps, "seconds": seconds, "peak_bytes": peak_memory()}
        measured |= {phase: spent for phase, spent in self._spent.items()}
        measured |= {f"{name}_seconds": value for name, value in self._queue.items()}
        measured["traffic"] = dict(self.traffic)
        measured["device"] = dict(self._on_device)
        measured["starved"] = min(1.0, max(delays, default=0.0) / seconds) if seconds > 0 else 0.0
        return RankReport(**{**measured, **facts})
