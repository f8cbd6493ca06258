"""The process groups of one layout as this rank sees them: `ParallelState`, with an `Axis` for tp, pp and dp.

A state is an argument, never a global: a job that trains in one layout and generates in another holds two.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megalite.core.layout import Layout
from megalite.core.progress import Track, here
from megalite.core.schedules import MessageKind
from megalite.kernels.symmetric import SymmetricColumns, SymmetricSum
from megalite.monitor.collector import Meter

COLLECTIVE_TIMEOUT = timedelta(days=7)
"""Longest wait inside one collective; how long is too long is the watch's affair (distributed.step_timeout)."""

_groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}
"""By ranks and purpose: layouts that have a group in common share its communicator. The only global of this module."""


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one in one coordinate of the process grid only (itself included)."""

    ranks: tuple[int, ...]
    """Their global ranks, in the order of that coordinate."""
    rank: int
    """Index of this rank in `ranks`."""
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    """None when the axis has one rank: nothing is communicated."""
    meter: Meter = field(default_factory=Meter, repr=False)
    """Collectives along the axis count as its phase `communication`."""
    name: str = ""
    """Name under which `meter` counts the bytes of collectives along the axis."""
    track: Track = field(default_factory=lambda: Track("", ()), repr=False, compare=False)
    """Counts the collectives along the axis, for the watch."""
    sums: dict[tuple[int, torch.dtype], SymmetricSum | None] = field(default_factory=dict, repr=False, compare=False)
    """Sums without NCCL, by width and dtype of the rows; None: NCCL sums these. See `prepare_sums`."""
    columns: dict[tuple[Any, ...], SymmetricColumns | None] = field(default_factory=dict, repr=False, compare=False)
    """Gathers of columns without NCCL, by what `prepare_columns` was asked for; None: NCCL gathers these."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == len(self.ranks) - 1


@dataclass(frozen=True, slots=True)
class Flow:
    """Messages of one kind from a pipeline stage to a neighbouring one; sender and receiver are global ranks."""

    sender: int
    receiver: int
    kind: MessageKind | Literal["hidden", "ids"]
    """`hidden`, `ids`: of inference, hidden states to the next stage and sampled ids from the last to the first."""

    def __str__(self) -> str:
        return f"{self.kind} {self.sender}>{self.receiver}"

    @property
    def track(self) -> Track:
        """Counts its messages, for the watch."""
        return here.track(self.kind, (self.sender, self.receiver), flow=True)


class ParallelState:
    """Where this rank is in a layout, and with whom it communicates along each axis.

    `tp`, `pp` and `dp` are the axes of the grid: tp ranks hold slices of the same layers, pp ranks (pipeline stages)
    consecutive layers, dp ranks copies of both. `replica` is this rank's tp x pp block, one whole model; `world` the
    whole layout. With `sequence_parallel` the activations between the parallel layers are cut by token over tp.

    Collective: process groups are made by all ranks of the run together, so every rank constructs, or `join`s, the
    same layouts in the same order. A rank outside a layout can only `join`. Without torch.distributed only a layout of
    one rank is possible.
    """

    def __init__(self, layout: Layout, *, sequence_parallel: bool = False, meter: Meter | None = None):
        self.layout = layout
        self.meter = meter or Meter()
        self.rank = dist.get_rank() if dist.is_initialized() else layout.first_rank
        self.coord = layout.coord(self.rank)
        _make_groups(layout)
        self.tp = self._axis(layout.groups("tp"), "tp")
        self.pp = self._axis(layout.groups("pp"), "pp")
        self.dp = self._axis(layout.groups("dp"), "dp")
        self.replica = self._axis(layout.replicas(), "replica")
        ranks, track = tuple(layout.ranks), here.track("world", tuple(layout.ranks))
        self.world = Axis(ranks, self.rank - layout.first_rank, _world_group(layout), self.meter, "world", track)
        self.sequence_parallel = sequence_parallel and self.tp.size > 1

    @classmethod
    def join(
        cls, layout: Layout, *, sequence_parallel: bool = False, meter: Meter | None = None
    ) -> ParallelState | None:
        """The state on a rank of `layout`, None on the others. Collective over the run."""
        if dist.is_initialized() and dist.get_rank() not in layout.ranks:
            _make_groups(layout)
            return None
        return cls(layout, sequence_parallel=sequence_parallel, meter=meter)

    @staticmethod
    def make_training_groups(layout: Layout) -> None:
        """Make the groups that `axes_with_groups`, `pipeline_flows` and `pipeline_ends` need besides.

        Collective over the run, once for a layout. Those three call it; where a layout leaves ranks out, all ranks of
        the run call it before.
        """
        for ranks in (*layout.replicas(), *layout.groups("tp"), *layout.groups("dp")):
            _group(ranks)
        if layout.pp > 1:
            for flow in _flows(layout):
                _flow_group(flow, layout)
            for ranks in _ends(layout):
                _group(ranks)

    def _axis(self, groups: list[tuple[int, ...]], name: str) -> Axis:
        ranks = next(ranks for ranks in groups if self.rank in ranks)
        return Axis(ranks, ranks.index(self.rank), _axis_group(ranks), self.meter, name, here.track(name, ranks))

    @property
    def is_first_stage(self) -> bool:
        return self.pp.is_first

    @property
    def is_last_stage(self) -> bool:
        return self.pp.is_last

    @property
    def control_rank(self) -> int:
        """Global rank that samples for this replica: tp rank 0 of the last stage."""
        return self.layout.control_ranks[self.coord.dp]

    @property
    def is_control(self) -> bool:
        return self.rank == self.control_rank

    def aside(self) -> Axis:
        """`world` with a gloo group of its own, which carries no other traffic. Collective over the run."""
        if self.world.size == 1:
            return self.world
        track = here.track("aside", self.world.ranks)
        return replace(self.world, group=_group(self.world.ranks, "aside", backend="gloo"), track=track)

    def axes_with_groups(self) -> SimpleNamespace:
        """tp, pp, dp and replica, with a process group also where an axis other than pp has one rank.

        For DeepSpeed, which reduces over such groups too. See `make_training_groups`.
        """
        self.make_training_groups(self.layout)
        axes = {"tp": self.tp, "dp": self.dp, "replica": self.replica}
        return SimpleNamespace(pp=self.pp, **{name: replace(a, group=_group(a.ranks)) for name, a in axes.items()})

    def pipeline_flows(self) -> dict[Flow, dist.ProcessGroup]:
        """The flows that this rank sends or receives, each with a communicator of its own; empty without pp.

        See `make_training_groups`.
        """
        if self.pp.size == 1:
            return {}
        self.make_training_groups(self.layout)
        flows = _flows(self.layout)
        return {flow: _flow_group(flow, self.layout) for flow in flows if self.rank in (flow.sender, flow.receiver)}

    def inference_flows(self) -> dict[Flow, dist.ProcessGroup]:
        """The flows of inference that this rank sends or receives, each with a communicator of its own; none without
        pp. They are made with the state."""
        flows = _inference_flows(self.layout)
        return {flow: _inference_group(flow) for flow in flows if self.rank in (flow.sender, flow.receiver)}

    def pipeline_ends(self) -> Axis | None:
        """The ranks that hold the same rows of a tied embedding as this one; None on the stages between.

        They are this tp rank on the first and the last stage, of all replicas. See `make_training_groups`.
        """
        self.make_training_groups(self.layout)
        mine = [ranks for ranks in _ends(self.layout) if self.rank in ranks]
        return self._axis(mine, "pp") if mine else None


def _make_groups(layout: Layout) -> None:
    """Every group of the layout, in the same order on every rank, whether it is in the layout or not."""
    for ranks in (*layout.groups("tp"), *layout.groups("pp"), *layout.groups("dp"), *layout.replicas()):
        _axis_group(ranks)
    _world_group(layout)
    for flow in _inference_flows(layout):
        _inference_group(flow)


def _world_group(layout: Layout) -> dist.ProcessGroup | None:
    """The group of all ranks of the layout; if that is the whole run, torch's default group, made already."""
    if layout.size > 1 and layout.size == dist.get_world_size():
        return dist.group.WORLD
    return _axis_group(tuple(layout.ranks))


def _flows(layout: Layout) -> list[Flow]:
    """Every flow of a pipeline that trains; interleaved chunks also need those between the last stage and the first."""
    flows = []
    for ranks in layout.groups("pp"):
        pairs = list(zip(ranks, ranks[1:], strict=False)) + ([(ranks[-1], ranks[0])] if layout.interleave > 1 else [])
        for earlier, later in pairs:
            flows += [Flow(earlier, later, "activation"), Flow(later, earlier, "gradient")]
    return flows


def _flow_group(flow: Flow, layout: Layout) -> dist.ProcessGroup:
    """A training flow's group: of the run's back end, or with interleaved chunks of gloo, through host memory.

    An NCCL message occupies the device until its peer is ready for it. What waits for the whole device meanwhile
    (allocating page-locked memory, loading a kernel) could then be what that peer waits for; `receives_with_sends` says
    where that can't be.
    """
    if layout.interleave > 1:
        return _group((flow.sender, flow.receiver), f"{flow.kind} by gloo", backend="gloo")
    return _group((flow.sender, flow.receiver), flow.kind)


def _inference_flows(layout: Layout) -> list[Flow]:
    """The flows of every pipeline in inference: hidden states from stage to stage, ids from the last to the first."""
    flows = []
    for ranks in layout.groups("pp"):
        if len(ranks) > 1:
            flows += [Flow(earlier, later, "hidden") for earlier, later in zip(ranks, ranks[1:], strict=False)]
            flows.append(Flow(ranks[-1], ranks[0], "ids"))
    return flows


def _inference_group(flow: Flow) -> dist.ProcessGroup:
    """An inference flow's group, of the run's back end; see `StageLink` for the order that avoids a deadlock."""
    return _group((flow.sender, flow.receiver), flow.kind)


def _ends(layout: Layout) -> list[tuple[int, ...]]:
    """For each tp rank, its ranks on the first and the last stage in all replicas."""
    stages = (0, layout.pp - 1)
    return [
        tuple(layout.rank(tp=tp, pp=pp, dp=dp) for dp in range(layout.dp) for pp in stages) for tp in range(layout.tp)
    ]


def _axis_group(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The group of an axis; None for a single rank, which communicates with nobody."""
    return _group(ranks) if len(ranks) > 1 else None


def _group(ranks: tuple[int, ...], purpose: str = "", *, backend: str | None = None) -> dist.ProcessGroup:
    """The group of `ranks`, made once for each purpose. All ranks of the run call alike. `backend`: None: the run's."""
    if (ranks, purpose) not in _groups:
        _groups[ranks, purpose] = dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT, backend=backend)
    return _groups[ranks, purpose]


def run_track() -> Track:
    """Counts the collectives over all ranks of the run."""
    return here.track("run", tuple(range(dist.get_world_size())))


def forget_groups() -> None:
    """Drop the cached groups; call after torch.distributed was shut down in this process."""
    _groups.clear()
