"""The process groups of one layout as this rank sees them.

`ParallelState` is an argument, never a global: a job that trains in one layout and generates in another holds two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from megalite.core.layout import Coord, Layout
from megalite.core.schedules import MessageKind
from megalite.monitor.metrics import Meter

_groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}
"""Groups by their ranks and purpose, so that layouts which agree on an axis share its communicator."""


@dataclass(frozen=True)
class Axis:
    """One direction of the process grid through this rank."""

    ranks: tuple[int, ...]
    """Global ranks along the axis."""
    rank: int
    """This rank's place in `ranks`."""
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    """None when the axis has one rank: nothing is communicated."""
    meter: Meter = field(default_factory=Meter, repr=False)
    """Collectives along the axis count as its phase `communication`."""

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
    """Messages of one kind from a pipeline stage to a neighbouring one."""

    sender: int
    """Global rank."""
    receiver: int
    kind: MessageKind


class ParallelState:
    """This rank's place in `layout` and its axes: tp, pp, dp, replica (its tp x pp block) and world (the whole layout).

    Collective: every rank of the run must construct or `join` the same layouts in the same order, because process
    groups are made by all ranks together. Where layouts leave ranks out, all ranks `join`. Without torch.distributed
    only a layout of one rank is possible.
    """

    def __init__(self, layout: Layout, *, sequence_parallel: bool = False, meter: Meter | None = None):
        self.layout = layout
        self.meter = meter or Meter()
        self.rank = dist.get_rank() if dist.is_initialized() else layout.first_rank
        self.coord: Coord = layout.coord(self.rank)
        _make_groups(layout)
        self.tp = self._axis(layout.groups("tp"))
        self.pp = self._axis(layout.groups("pp"))
        self.dp = self._axis(layout.groups("dp"))
        self.replica = self._axis(layout.replicas())
        self.world = Axis(tuple(layout.ranks), self.rank - layout.first_rank, _world_group(layout), self.meter)
        self.sequence_parallel = sequence_parallel and self.tp.size > 1
        """Activations between the parallel layers are cut by token over tp."""

    @classmethod
    def join(
        cls, layout: Layout, *, sequence_parallel: bool = False, meter: Meter | None = None
    ) -> ParallelState | None:
        """The state on a rank of `layout`, None on the others. Collective over the run; see the class."""
        if dist.is_initialized() and dist.get_rank() not in layout.ranks:
            _make_groups(layout)
            return None
        return cls(layout, sequence_parallel=sequence_parallel, meter=meter)

    @staticmethod
    def make_training_groups(layout: Layout) -> None:
        """Make the groups that `as_mpu`, `pipeline_flows` and `pipeline_ends` need besides.

        Collective over the run, once for a layout. Those three call it; where a layout leaves ranks out, all ranks of
        the run call it before.
        """
        for groups in _mpu_groups(layout):
            for ranks in groups:
                _group(ranks, even_one=True)
        if layout.pp > 1:
            for flow in _flows(layout):
                _flow_group(flow)
            for ranks in _ends(layout):
                _group(ranks)

    def _axis(self, groups: list[tuple[int, ...]]) -> Axis:
        ranks = next(ranks for ranks in groups if self.rank in ranks)
        return Axis(ranks, ranks.index(self.rank), _group(ranks), self.meter)

    @property
    def is_first_stage(self) -> bool:
        return self.pp.is_first

    @property
    def is_last_stage(self) -> bool:
        return self.pp.is_last

    @property
    def control_rank(self) -> int:
        """The global rank of this replica that samples and decides: tp rank 0 of the last stage."""
        return self.layout.control_ranks[self.coord.dp]

    @property
    def is_control(self) -> bool:
        return self.rank == self.control_rank

    def as_mpu(self) -> DeepSpeedView:
        """The same groups under the names that DeepSpeed's `mpu` argument asks for; see `make_training_groups`."""
        self.make_training_groups(self.layout)
        return DeepSpeedView(self)

    def pipeline_flows(self) -> dict[Flow, dist.ProcessGroup]:
        """The flows that begin or end here, each with a communicator of its own; see `make_training_groups`."""
        if self.pp.size == 1:
            return {}
        self.make_training_groups(self.layout)
        return {flow: _flow_group(flow) for flow in _flows(self.layout) if self.rank in (flow.sender, flow.receiver)}

    def pipeline_ends(self) -> Axis | None:
        """The ranks that hold the same rows of embedding and head as this one; see `make_training_groups`.

        They are this tp rank on the first and the last stage, of all replicas; None on the stages between.
        """
        self.make_training_groups(self.layout)
        mine = [ranks for ranks in _ends(self.layout) if self.rank in ranks]
        return self._axis(mine) if mine else None


class DeepSpeedView:
    """Adapter from `ParallelState` to DeepSpeed's mpu: "model parallel" is tp x pp, "tensor model parallel" is tp."""

    def __init__(self, state: ParallelState):
        self._state = state
        self._model, self._tensor, self._data = (
            next(_group(ranks, even_one=True) for ranks in groups if state.rank in ranks)
            for groups in _mpu_groups(state.layout)
        )

    def get_model_parallel_rank(self) -> int:
        return self._state.replica.rank

    def get_model_parallel_world_size(self) -> int:
        return self._state.replica.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_tensor_model_parallel_rank(self) -> int:
        return self._state.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._state.tp.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._state.pp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._state.pp.size

    def get_data_parallel_rank(self) -> int:
        return self._state.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._state.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data


def _make_groups(layout: Layout) -> None:
    """Every group of the layout, in the same order on every rank, whether it is in the layout or not."""
    for groups in (layout.groups("tp"), layout.groups("pp"), layout.groups("dp"), layout.replicas()):
        for ranks in groups:
            _group(ranks)
    _world_group(layout)


def _world_group(layout: Layout) -> dist.ProcessGroup | None:
    """The group of all ranks of the layout: the default one, which has a communicator already, where it is that."""
    if layout.size > 1 and layout.size == dist.get_world_size():
        return dist.group.WORLD
    return _group(tuple(layout.ranks))


def _mpu_groups(layout: Layout) -> tuple[list[tuple[int, ...]], ...]:
    """The ranks of the groups model, tensor and data that DeepSpeed asks for.

    It reduces over them also when they have one rank, so every one has to be a real group.
    """
    return layout.replicas(), layout.groups("tp"), layout.groups("dp")


def _flows(layout: Layout) -> list[Flow]:
    """Every flow of a pipeline that trains; interleaved chunks also need those between the last stage and the first."""
    found = []
    for ranks in layout.groups("pp"):
        pairs = list(zip(ranks, ranks[1:], strict=False))
        if layout.interleave > 1:
            pairs.append((ranks[-1], ranks[0]))
        for earlier, later in pairs:
            found += [Flow(earlier, later, "activation"), Flow(later, earlier, "gradient")]
    return found


def _flow_group(flow: Flow) -> dist.ProcessGroup:
    """Over gloo, through host memory, between GPUs too.

    NCCL's receives run on the device until what they wait for is there. Whatever waits for the whole device meanwhile
    (allocating page-locked memory does, and loading a kernel) can then wait for a message that depends on it.
    """
    return _group((flow.sender, flow.receiver), flow.kind, backend="gloo")


def _ends(layout: Layout) -> list[tuple[int, ...]]:
    """For each tp rank, its ranks on the first and the last stage in all replicas."""
    stages = (0, layout.pp - 1)
    return [
        tuple(layout.rank(tp=tp, pp=pp, dp=dp) for dp in range(layout.dp) for pp in stages) for tp in range(layout.tp)
    ]


def _group(
    ranks: tuple[int, ...], purpose: str = "", *, even_one: bool = False, backend: str | None = None
) -> dist.ProcessGroup | None:
    """The group of `ranks`, made once for each purpose; None for a single rank unless `even_one`.

    All ranks must call alike. `backend`: None for that of the run.
    """
    if len(ranks) == 1 and not even_one:
        return None
    if (ranks, purpose) not in _groups:
        _groups[ranks, purpose] = dist.new_group(list(ranks), backend=backend)
    return _groups[ranks, purpose]


def forget_groups() -> None:
    """Drop the cached groups; call after torch.distributed was shut down in this process."""
    _groups.clear()
