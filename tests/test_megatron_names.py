"""Megatron's functions answer what a rank's coordinates say; DeepSpeed's `mpu` has real groups everywhere."""

from __future__ import annotations

import pytest

from megalite.core import megatron
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState

NAMES = [name for name in vars(megatron) if name.startswith(("get_", "is_"))]


def answers(rank: int, layout: Layout) -> tuple[dict[str, object], dict[str, object]]:
    """Of the functions and of the mpu; a group is the number of its ranks."""
    state = ParallelState(layout)
    plain = {name: getattr(megatron, name)(state) for name in NAMES}
    mpu = {name: function() for name, function in vars(megatron.as_mpu(state)).items()}
    return tuple({n: v.size() if n.endswith("_group") and v else v for n, v in found.items()} for found in (plain, mpu))


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(1, 1, 2), Layout(1, 2, 2)], ids=str)
def test_every_name_says_where_a_rank_is(ranks, layout):
    for rank, (found, mpu) in enumerate(ranks(layout.size).run(answers, layout)):
        at = layout.coord(rank)
        stages = [layout.rank(tp=at.tp, pp=stage, dp=at.dp) for stage in range(layout.pp)]
        expected = {
            "get_tensor_model_parallel_src_rank": layout.rank(pp=at.pp, dp=at.dp),
            "get_data_parallel_src_rank": layout.rank(tp=at.tp, pp=at.pp),
            "get_pipeline_model_parallel_first_rank": stages[0],
            "get_pipeline_model_parallel_last_rank": stages[-1],
            "get_pipeline_model_parallel_next_rank": stages[(at.pp + 1) % layout.pp],
            "get_pipeline_model_parallel_prev_rank": stages[at.pp - 1],
            "is_pipeline_first_stage": at.pp == 0,
            "is_pipeline_last_stage": at.pp == layout.pp - 1,
        }
        axes = {
            "tensor_model": (at.tp, layout.tp),
            "pipeline_model": (at.pp, layout.pp),
            "data": (at.dp, layout.dp),
            "model": (at.pp * layout.tp + at.tp, layout.tp * layout.pp),
        }
        for name, (place, size) in axes.items():
            expected[f"get_{name}_parallel_rank"] = place
            expected[f"get_{name}_parallel_world_size"] = size
            expected[f"get_{name}_parallel_group"] = size if size > 1 else None
        assert found == expected
        assert mpu == {name: expected[name] or (1 if name.endswith("_group") else 0) for name in mpu} and len(mpu) == 11
