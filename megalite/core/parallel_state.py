"""The process groups of one layout as this rank sees them.

`ParallelState` is an argument, never a global: a job that trains in one layout and generates in another holds two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from megalite.core.layout import Coord, Layout
from megalite.monitor.metrics import Meter

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""Groups by their ranks, so that layouts which agree on an axis share its communicator."""


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


class ParallelState:
    """This rank's place in `layout` and its axes tp, pp, dp and replica (the tp x pp block it belongs to).

    Collective: every rank of the world must construct the same layouts in the same order, because process groups are
    made by all ranks together. Without torch.distributed only a layout of one rank is possible.
    """

    def __init__(self, layout: Layout, *, sequence_parallel: bool = False, meter: Meter | None = None):
        self.layout = layout
        self.meter = meter or Meter()
        self.rank = dist.get_rank() if dist.is_initialized() else layout.first_rank
        self.coord: Coord = layout.coord(self.rank)
        self.tp = self._join(layout.groups("tp"))
        self.pp = self._join(layout.groups("pp"))
        self.dp = self._join(layout.groups("dp"))
        self.replica = self._join(layout.replicas())
        self.sequence_parallel = sequence_parallel and self.tp.size > 1
        """Activations between the parallel layers are cut by token over tp."""

    def _join(self, groups: list[tuple[int, ...]]) -> Axis:
        mine: Axis | None = None
        for ranks in groups:
            group = _group(ranks)
            if self.rank in ranks:
                mine = Axis(ranks, ranks.index(self.rank), group, self.meter)
        assert mine is not None, "layout.coord accepted a rank that is in none of its groups"
        return mine

    @property
    def is_first_stage(self) -> bool:
        return self.pp.is_first

    @property
    def is_last_stage(self) -> bool:
        return self.pp.is_last

    @property
    def control_rank(self) -> int:
        """The global rank of this replica that samples and decides: tp rank 0 of the last stage."""
        return self.layout.rank(tp=0, pp=self.layout.pp - 1, dp=self.coord.dp)

    @property
    def is_control(self) -> bool:
        return self.rank == self.control_rank

    def as_mpu(self) -> DeepSpeedView:
        """The same groups under the names that DeepSpeed's `mpu` argument asks for."""
        return DeepSpeedView(self)


class DeepSpeedView:
    """Adapter from `ParallelState` to DeepSpeed's mpu: "model parallel" is tp x pp, "tensor model parallel" is tp."""

    def __init__(self, state: ParallelState):
        self._state = state
        # DeepSpeed reduces over these also when they have one rank, so every axis needs a real group here.
        self._model, self._tensor, self._data = (
            _own_group(groups, state.rank)
            for groups in (state.layout.replicas(), state.layout.groups("tp"), state.layout.groups("dp"))
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


def _group(ranks: tuple[int, ...], *, even_one: bool = False) -> dist.ProcessGroup | None:
    """The group of `ranks`, made once; None for a single rank unless `even_one`. All ranks must call alike."""
    if len(ranks) == 1 and not even_one:
        return None
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def _own_group(groups: list[tuple[int, ...]], rank: int) -> dist.ProcessGroup:
    made = {ranks: _group(ranks, even_one=True) for ranks in groups}
    return next(group for ranks, group in made.items() if rank in ranks and group is not None)


def forget_groups() -> None:
    """Drop the cached groups; call after torch.distributed was shut down in this process."""
    _groups.clear()
