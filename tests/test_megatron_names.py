"""Megatron's names say where each rank of a layout is."""

from __future__ import annotations

import inspect

from megalite.core import megatron
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState

FUNCTIONS = [f for name, f in inspect.getmembers(megatron, inspect.isfunction) if name.startswith(("get_", "is_"))]


def answers(rank: int, shape: tuple[int, int, int]) -> dict[str, object]:
    state = ParallelState(Layout(*shape))
    plain = {f.__name__: f(state) for f in FUNCTIONS if not f.__name__.endswith("_group")}
    groups = {f.__name__: f(state) for f in FUNCTIONS if f.__name__.endswith("_group")}
    return plain | {name: group and group.size() for name, group in groups.items()}


def test_every_name_says_where_a_rank_is(ranks):
    shape = Layout(2, 2, 1)
    for rank, found in enumerate(ranks(4).run(answers, (2, 2, 1))):
        place = shape.coord(rank)
        stages = [shape.rank(tp=place.tp, pp=stage, dp=0) for stage in range(2)]
        assert found["get_tensor_model_parallel_rank"] == place.tp
        assert found["get_pipeline_model_parallel_rank"] == place.pp
        assert found["get_data_parallel_rank"] == 0 and found["get_data_parallel_group"] is None
        assert found["get_tensor_model_parallel_world_size"] == found["get_tensor_model_parallel_group"] == 2
        assert found["get_pipeline_model_parallel_world_size"] == found["get_pipeline_model_parallel_group"] == 2
        assert found["get_model_parallel_world_size"] == found["get_model_parallel_group"] == 4
        assert found["get_tensor_model_parallel_src_rank"] == shape.rank(tp=0, pp=place.pp, dp=0)
        ends = [found[f"get_pipeline_model_parallel_{end}_rank"] for end in ("first", "last")]
        assert ends == stages
        other = stages[1 - place.pp]
        assert found["get_pipeline_model_parallel_next_rank"] == other == found["get_pipeline_model_parallel_prev_rank"]
        assert (found["is_pipeline_first_stage"], found["is_pipeline_last_stage"]) == (place.pp == 0, place.pp == 1)
    replicas = ranks(2).run(answers, (1, 1, 2))
    assert [(one["get_data_parallel_rank"], one["get_data_parallel_world_size"]) for one in replicas] == [
        (0, 2),
        (1, 2),
    ]
    assert [one["get_data_parallel_src_rank"] for one in replicas] == [0, 0]


def test_every_name_is_in_the_table():
    for function in FUNCTIONS:
        stem = function.__name__.removesuffix("_group").removesuffix("_world_size").removesuffix("_rank")
        assert stem.removesuffix("_first").removesuffix("_last").removesuffix("_next").removesuffix("_prev") in (
            megatron.__doc__
        )
