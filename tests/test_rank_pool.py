"""The rank pool reports failures as a developer needs them: at once, and with the rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist


def add_up(rank: int, value: float) -> float:
    x = torch.tensor([value + rank])
    dist.all_reduce(x)
    return float(x)


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("boom")
    dist.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def hang_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def backward(rank: int) -> float:
    x = torch.ones(2, requires_grad=True)
    (x * (rank + 1)).sum().backward()
    return float(x.grad[0])


def test_results_come_in_rank_order(ranks):
    assert ranks(2).run(add_up, 1.0) == [3.0, 3.0]
    assert ranks(3).run(add_up, 0.0) == [3.0] * 3
    assert ranks(2).run(add_up, 2.0) == [5.0, 5.0]


@pytest.mark.parametrize("job, message", [(fail_on_one, "ValueError: boom"), (die_on_one, "the process died")])
def test_a_failing_rank_fails_the_test_at_once(ranks, job, message):
    with pytest.raises(AssertionError, match=rf"rank 1 failed:[\s\S]*{message}"):
        ranks(2).run(job, timeout=36_000)
    assert ranks(2).run(add_up, 1.0) == [3.0, 3.0]  # a new pool


def test_a_hang_names_the_rank_and_where_it_stands(ranks):
    ranks(2).run(add_up, 1.0)  # so that they are there
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 were not done after 3 s[\s\S]*hang_on_one"):
        ranks(2).run(hang_on_one, timeout=3)


def test_ranks_can_run_a_backward_pass_after_this_process_did(ranks):
    torch.ones(1, requires_grad=True).sum().backward()
    assert ranks(4).run(backward) == [1.0, 2.0, 3.0, 4.0]
