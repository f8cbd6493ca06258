"""Where a rank's time and memory went: a stopwatch by phase, counters, and the record that ranks exchange."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Phase = Literal["compute", "communication", "waiting", "sampling", "scheduling"]

PHASES: tuple[Phase, ...] = ("compute", "communication", "waiting", "sampling", "scheduling")
"""compute: forward passes; communication: collectives and sends; waiting: for another rank's hidden states or news."""

_OF_STEPS = ("steps", "prefill_tokens", "decode_tokens", "prefill_seconds", "decode_seconds")
"""Fields of RankReport that `Meter.step` counts up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """What one rank has to say at the end of a run. Times are seconds, memory is bytes."""

    rank: int
    tp: int
    """Place on the tp axis; likewise pp (the stage) and dp (the replica)."""
    pp: int
    dp: int
    layers: tuple[int, int]
    """Half-open range of the layers it holds."""
    weight_bytes: int = 0
    kv_bytes: int = 0
    kv_blocks: int = 0
    load_peak_bytes: int | None = None
    """Most memory taken while weights were loaded, beyond what the process had before; None: not measured."""
    load_bound_bytes: int | None = None
    """What it should have stayed under: the rank's weights and one tensor."""
    peak_bytes: int = 0
    """Most memory the process held, since it began or last reset its peak."""

    seconds: float = 0.0
    """From `Meter.start` to `Meter.stop`: this replica's run."""
    compute: float = 0.0
    """Seconds in this phase; likewise the next four. What no phase claims is the rest of `seconds`."""
    communication: float = 0.0
    waiting: float = 0.0
    sampling: float = 0.0
    scheduling: float = 0.0
    starved: float = 0.0
    """Share of `seconds` in which its most hindered thread could have run and had no core."""
    steps: int = 0
    learnt_tokens: int = 0
    """Tokens of all training steps of the run, on all ranks together."""
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tp_bytes: int = 0
    """That it put into or took out of collectives along the tp axis; likewise pp (messages included) and dp."""
    pp_bytes: int = 0
    dp_bytes: int = 0

    # Of the replica; read from its control rank (tp rank 0 of the last stage), whatever the others say.
    prompts: int = 0
    """Finished, the failed ones included."""
    failed_prompts: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    """Looked up in the prefix cache."""
    cached_tokens: int = 0
    """Found there."""
    preemptions: int = 0

    def share(self, phase: Phase) -> float:
        """Share of the rank's time in a phase, 0 to 1."""
        return getattr(self, phase) / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Numbers, None and one list: fit for JSON."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankReport:
        """The inverse of `as_dict`; TypeError for a key that is no field."""
        return cls(**{**values, "layers": tuple(values["layers"])})


class _Span:
    """A phase as a context manager; one object serves every use."""

    __slots__ = ("_meter", "_phase")

    def __init__(self, meter: Meter, phase: Phase):
        self._meter = meter
        self._phase = phase

    def __enter__(self) -> None:
        self._meter._enter(self._phase)

    def __exit__(self, *error: object) -> None:
        self._meter._leave()


class Meter:
    """A rank's stopwatch. A phase within a phase stops the outer one's watch: every second counts once.

    It sees the host's time: a GPU's work counts where the host waits for it. A phase costs under 1 us.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._open: list[Phase] = []
        self._since = 0.0
        self._spans: dict[Phase, _Span] = {phase: _Span(self, phase) for phase in PHASES}
        self.bytes: Counter[str] = Counter()
        """Of collectives and messages, by the name of their axis."""
        self.start()

    def start(self) -> None:
        """The run starts now: forget what was measured before, e.g. while warming up. Not within a phase."""
        assert not self._open
        self._spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._began = self._step_began = self._clock()
        self._lap: tuple[float, dict[str, float]] = (self._began, dict(self._spent))
        self._ended: float | None = None
        self._delayed = _run_delays()
        self._steps: dict[str, float] = dict.fromkeys(_OF_STEPS, 0)
        self.bytes.clear()

    def stop(self) -> None:
        """The run ended: `report` says how long it took up to now."""
        self._ended = self._clock()

    def lap(self) -> dict[str, float]:
        """Share of the time in each phase since the last lap, or since `start`. Not within a phase."""
        assert not self._open
        now, spent = self._clock(), dict(self._spent)
        began, before = self._lap
        self._lap = (now, spent)
        return {phase: (spent[phase] - before[phase]) / (now - began) for phase in PHASES} if now > began else {}

    def phase(self, phase: Phase) -> _Span:
        """`with meter.phase("compute"): ...`"""
        return self._spans[phase]

    def count_bytes(self, axis: str, num_bytes: int) -> None:
        """A collective or message along an axis was begun. What a CUDA graph replays is to be counted by who does."""
        self.bytes[axis] += num_bytes

    def _enter(self, phase: Phase) -> None:
        now = self._clock()
        if self._open:
            self._spent[self._open[-1]] += now - self._since
        self._open.append(phase)
        self._since = now

    def _leave(self) -> None:
        now = self._clock()
        self._spent[self._open.pop()] += now - self._since
        self._since = now

    def step(self, *, prefill_tokens: int, decode_tokens: int) -> None:
        """A step ended. The time since the last one is divided between prefill and decode by their tokens.

        A step without tokens (the pipeline fills or drains) belongs to neither.
        """
        now = self._clock()
        tokens = prefill_tokens + decode_tokens
        if tokens:
            share = (now - self._step_began) / tokens
            counts = (1, prefill_tokens, decode_tokens, share * prefill_tokens, share * decode_tokens)
            for name, count in zip(_OF_STEPS, counts, strict=True):
                self._steps[name] += count
        self._step_began = now

    def report(self, **facts: Any) -> RankReport:
        """What was measured from `start` to `stop` (or now), and the fields of RankReport that the caller knows."""
        seconds = (self._clock() if self._ended is None else self._ended) - self._began
        delays = [delay - self._delayed.get(thread, 0.0) for thread, delay in _run_delays().items()]
        measured: dict[str, Any] = {**self._spent, **self._steps, "seconds": seconds, "peak_bytes": peak_memory()}
        measured |= {f"{axis}_bytes": self.bytes[axis] for axis in ("tp", "pp", "dp")}
        measured["starved"] = min(1.0, max(delays, default=0.0) / seconds) if seconds > 0 else 0.0
        return RankReport(**measured, **facts)


def peak_memory() -> int:
    """Most bytes of memory this process held, file pages included, since it began or `reset_peak_memory`."""
    status = _status()
    if "VmHWM" in status:
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> int:
    """Begin a new peak; return what `peak_memory` starts from, so that the difference is what was taken since.

    Where the system can't forget the old peak (proc(5), clear_refs), that is the old peak, and the difference a lower
    bound.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return peak_memory()
    return _status()["VmRSS"]


def _run_delays() -> dict[str, float]:
    """Seconds that each thread of this process has been ready to run without a core; empty where nobody counts them."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError, ValueError, IndexError):  # it has just ended
            found[thread.name] = int((thread / "schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return found


def _status() -> dict[str, int]:
    """The memory lines of /proc/self/status in bytes; empty on a system without it."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file if line.startswith("Vm")]
    except FileNotFoundError:
        return {}
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in lines}
