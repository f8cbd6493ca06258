"""Megatron-LM's names for who-am-I, answered by a `ParallelState`: get_tensor_model_parallel_rank(state) and friends.

Megatron asks a module, whose state is global; here the layout is an argument, since a job may hold two.

| Megatron-LM, megatron.core.parallel_state | here |
|---|---|
| get_tensor_model_parallel_rank, _world_size, _group | state.tp.rank, .size, .group |
| get_pipeline_model_parallel_rank, _world_size, _group | state.pp.rank, .size, .group |
| get_data_parallel_rank, _world_size, _group | state.dp.rank, .size, .group |
| get_model_parallel_rank, _world_size, _group | state.replica.rank, .size, .group |
| is_pipeline_first_stage, is_pipeline_last_stage | state.is_first_stage, state.is_last_stage |
| get_tensor_model_parallel_src_rank | state.tp.ranks[0] |
| get_data_parallel_src_rank | state.dp.ranks[0] |
| get_pipeline_model_parallel_first_rank, _last_rank | state.pp.ranks[0], state.pp.ranks[-1] |
| get_pipeline_model_parallel_next_rank, _prev_rank | the neighbours of state.rank in state.pp.ranks, round in a ring |

A group is None where its axis has one rank. Of an LLM the state is `llm.replica.state`.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup

from megalite.core.parallel_state import ParallelState


def get_tensor_model_parallel_rank(state: ParallelState) -> int:
    return state.tp.rank


def get_tensor_model_parallel_world_size(state: ParallelState) -> int:
    return state.tp.size


def get_tensor_model_parallel_group(state: ParallelState) -> ProcessGroup | None:
    return state.tp.group


def get_tensor_model_parallel_src_rank(state: ParallelState) -> int:
    """Global rank of the first of this rank's tensor parallel group."""
    return state.tp.ranks[0]


def get_pipeline_model_parallel_rank(state: ParallelState) -> int:
    return state.pp.rank


def get_pipeline_model_parallel_world_size(state: ParallelState) -> int:
    return state.pp.size


def get_pipeline_model_parallel_group(state: ParallelState) -> ProcessGroup | None:
    return state.pp.group


def get_pipeline_model_parallel_first_rank(state: ParallelState) -> int:
    return state.pp.ranks[0]


def get_pipeline_model_parallel_last_rank(state: ParallelState) -> int:
    return state.pp.ranks[-1]


def get_pipeline_model_parallel_next_rank(state: ParallelState) -> int:
    """Global rank of the next stage; after the last comes the first."""
    return state.pp.ranks[(state.pp.rank + 1) % state.pp.size]


def get_pipeline_model_parallel_prev_rank(state: ParallelState) -> int:
    return state.pp.ranks[(state.pp.rank - 1) % state.pp.size]


def is_pipeline_first_stage(state: ParallelState) -> bool:
    return state.is_first_stage


def is_pipeline_last_stage(state: ParallelState) -> bool:
    return state.is_last_stage


def get_data_parallel_rank(state: ParallelState) -> int:
    return state.dp.rank


def get_data_parallel_world_size(state: ParallelState) -> int:
    return state.dp.size


def get_data_parallel_group(state: ParallelState) -> ProcessGroup | None:
    return state.dp.group


def get_data_parallel_src_rank(state: ParallelState) -> int:
    return state.dp.ranks[0]


def get_model_parallel_rank(state: ParallelState) -> int:
    """Place in the tp x pp block of this rank."""
    return state.replica.rank


def get_model_parallel_world_size(state: ParallelState) -> int:
    return state.replica.size


def get_model_parallel_group(state: ParallelState) -> ProcessGroup | None:
    return state.replica.group
