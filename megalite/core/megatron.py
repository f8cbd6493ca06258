"""Megatron-LM's parallel_state functions, answered by a `ParallelState`: `get_tensor_model_parallel_rank(state)`, ...

Names and meanings are those of megatron.core.parallel_state. There they read the state of a module; here the state is
an argument, since a job may hold two layouts (of an LLM it is `llm.replica.state`). Ranks of other processes are
global. A group is None where its axis has one rank. Model parallel: the tp x pp block of one replica.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

from torch.distributed import ProcessGroup

from megalite.core.parallel_state import ParallelState

IntOf = Callable[[ParallelState], int]
BoolOf = Callable[[ParallelState], bool]
GroupOf = Callable[[ParallelState], ProcessGroup | None]

get_tensor_model_parallel_rank: IntOf = attrgetter("tp.rank")
get_tensor_model_parallel_world_size: IntOf = attrgetter("tp.size")
get_tensor_model_parallel_group: GroupOf = attrgetter("tp.group")
get_pipeline_model_parallel_rank: IntOf = attrgetter("pp.rank")
get_pipeline_model_parallel_world_size: IntOf = attrgetter("pp.size")
get_pipeline_model_parallel_group: GroupOf = attrgetter("pp.group")
is_pipeline_first_stage: BoolOf = attrgetter("is_first_stage")
is_pipeline_last_stage: BoolOf = attrgetter("is_last_stage")
get_data_parallel_rank: IntOf = attrgetter("dp.rank")
get_data_parallel_world_size: IntOf = attrgetter("dp.size")
get_data_parallel_group: GroupOf = attrgetter("dp.group")
get_model_parallel_rank: IntOf = attrgetter("replica.rank")
get_model_parallel_world_size: IntOf = attrgetter("replica.size")
get_model_parallel_group: GroupOf = attrgetter("replica.group")


def get_tensor_model_parallel_src_rank(state: ParallelState) -> int:
    """Global rank of the first of this rank's tensor parallel group."""
    return state.tp.ranks[0]


def get_data_parallel_src_rank(state: ParallelState) -> int:
    """Global rank of the first of this rank's data parallel group."""
    return state.dp.ranks[0]


def get_pipeline_model_parallel_first_rank(state: ParallelState) -> int:
    """Global rank of this pipeline's first stage."""
    return state.pp.ranks[0]


def get_pipeline_model_parallel_last_rank(state: ParallelState) -> int:
    """Global rank of this pipeline's last stage."""
    return state.pp.ranks[-1]


def get_pipeline_model_parallel_next_rank(state: ParallelState) -> int:
    """Global rank of the next stage; after the last comes the first."""
    return state.pp.ranks[(state.pp.rank + 1) % state.pp.size]


def get_pipeline_model_parallel_prev_rank(state: ParallelState) -> int:
    """Global rank of the previous stage; before the first comes the last."""
    return state.pp.ranks[state.pp.rank - 1]


def as_mpu(state: ParallelState) -> SimpleNamespace:
    """The `mpu` argument of deepspeed.initialize: an object with those of these functions that DeepSpeed calls.

    Its groups are real ones also where an axis has one rank. Collective, see `ParallelState.make_training_groups`.
    """
    axes = state.axes_with_groups()
    kinds = [(axis, what) for axis in ("model", "tensor_model", "data") for what in ("rank", "world_size", "group")]
    kinds += [("pipeline_model", "rank"), ("pipeline_model", "world_size")]
    names = [f"get_{axis}_parallel_{what}" for axis, what in kinds]
    return SimpleNamespace(**{name: partial(globals()[name], axes) for name in names})
