"""The record of where a rank's time and memory went, as ranks exchange it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["compute", "communication", "waiting", "sampling", "scheduling"]

PHASES: tuple[Phase, ...] = ("compute", "communication", "waiting", "sampling", "scheduling")
"""compute: forward passes; communication: collectives and sends; waiting: for another rank's hidden states or news."""


@dataclass(slots=True)
class Traffic:
    """What a rank put into or took out of the collectives and messages of one group."""

    seconds: float = 0.0
    """In which it did nothing else."""
    bytes: int = 0
    messages: int = 0
    timed_bytes: int = 0
    """The bytes of collectives that were waited for, which `seconds` count; none inside captured graphs."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second that collectives achieved; 0: not measured."""
        return self.timed_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def message_bytes(self) -> int:
        """Mean bytes of a message."""
        return self.bytes // self.messages if self.messages else 0


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
    running_seconds: float = 0.0
    """Sequences that ran, summed over the time; likewise those that waited for a place."""
    queued_seconds: float = 0.0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    """Traffic by group: tp, pp (messages between stages included), dp, replica, world."""
    device: dict[Phase, float] = field(default_factory=dict)
    """Seconds of phases on the device, by its own events; empty where nothing runs beside the host."""

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

    def spent(self, phase: Phase) -> float:
        """Seconds in a phase: on the device where there is one, else on the host."""
        seconds: float = self.device.get(phase, getattr(self, phase))
        return seconds

    def share(self, phase: Phase) -> float:
        """Share of the rank's time in a phase, 0 to 1."""
        return self.spent(phase) / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Numbers, None, and lists and mappings of them: fit for JSON."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankReport:
        """The inverse of `as_dict`; TypeError for a key that is no field."""
        traffic = {group: Traffic(**one) for group, one in values["traffic"].items()}
        return cls(**{**values, "layers": tuple(values["layers"]), "traffic": traffic})
