"""Communication between ranks: every value arrives where it belongs and in the order it was sent."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from megalite.core.collectives import gather_columns
from megalite.core.layout import Even, Layout, width
from megalite.core.parallel_state import ParallelState
from megalite.core.pipeline import StageLink

CPU = torch.device("cpu")

# ---- from stage to stage


def run_steps(rank: int, layout: Layout, lag: int, early: bool) -> list[int]:
    """Hidden states pass through the stages, the last adds its number; `lag` steps are under way at a time."""
    state = ParallelState(layout)
    link = StageLink(state, hidden_size=3, dtype=torch.float32, device=CPU)
    pending: deque[tuple[int, int]] = deque()
    for step in range(40):
        n = (step * 7 + state.coord.dp) % 5 + 1
        base = 100 * step + 10 * state.tp.rank
        if state.is_first_stage:
            if len(pending) == lag:
                check_returned(link, state, *pending.popleft())
            link.send(torch.full((n, 3), float(base)))
            if early:
                link.expect_ids(n)
            pending.append((n, base))
            continue
        hidden = link.receive(n)
        if state.is_last_stage:
            link.return_ids((hidden[:, 0] + state.pp.rank).to(torch.int64 if step % 2 else torch.int32))
        else:
            link.send(hidden)
    while pending:
        check_returned(link, state, *pending.popleft())
    link.drain()
    return [state.rank]


def check_returned(link: StageLink, state: ParallelState, n: int, base: int) -> None:
    ids = link.returned(n)
    assert ids.dtype == torch.int32 and ids.tolist() == [base + state.pp.size - 1] * n


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("layout, lag", [(Layout(pp=2), 2), (Layout(tp=2, pp=2), 3), (Layout(pp=4), 4)], ids=str)
def test_hidden_states_and_ids_go_round_in_the_order_of_steps(ranks, layout, lag, early):
    assert ranks(layout.size).run(run_steps, layout, lag, early) == [[rank] for rank in range(layout.size)]


# ---- along tp


def check_columns(rank: int, size: int, vocab: int, rows: int, dtype: torch.dtype) -> None:
    """Cut the columns of logits over the ranks, and gather them."""
    tp = ParallelState(Layout(tp=size)).tp
    whole = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4).to(dtype)
    begin, end = Even(vocab).range(size, rank)
    mine = whole[:, begin:end]
    got = gather_columns(mine, [width(Even(vocab), size, each) for each in range(size)], tp)
    assert torch.equal(got, whole) and got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, vocab, rows", [(2, 64, 1), (2, 33, 5), (4, 10, 7), (4, 3, 2), (3, 100, 4)])
def test_columns_of_all_ranks(ranks, size, vocab, rows, dtype):
    ranks(size).run(check_columns, size, vocab, rows, dtype)
