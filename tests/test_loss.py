"""Cross-entropy over a cut vocabulary equals PyTorch's over the whole one, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from megalite.core.layout import Even, Layout
from megalite.core.parallel_state import ParallelState
from megalite.train.loss import cross_entropy

VOCAB = 103


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, V], targets [T] that include the first and the last row, and an uneven gradient of the losses [T]."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, VOCAB, generator=generator) * 8
    logits[3] += 500  # a softmax that forgets to subtract the maximum overflows here
    logits[4] -= 500
    targets = torch.randint(VOCAB, (40,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return logits.to(dtype), targets, torch.randn(40, generator=generator)


def cut_loss(rank: int, tp: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of this rank's columns."""
    state = ParallelState(Layout(tp=tp))
    logits, targets, weights = example(dtype)
    lo, hi = Even(VOCAB).range(tp, rank)
    mine = logits[:, lo:hi].clone().requires_grad_()
    losses = cross_entropy(mine, targets, lo, state.tp)
    (losses * weights).sum().backward()
    return losses.detach(), mine.grad


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_loss_over_the_whole_vocabulary(tp, dtype, ranks):
    logits, targets, weights = example(dtype)
    logits.requires_grad_()
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    (losses * weights).sum().backward()
    results = ranks(tp).run(cut_loss, tp, dtype)
    for got, _ in results:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, losses.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([grad for _, grad in results], 1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, logits.grad)


def test_a_target_is_not_counted_where_its_row_is_not(ranks):
    """A rank without the target's row has the plain softmax as gradient: every column positive."""
    _, gradient = ranks(2).run(cut_loss, 2, torch.float32)[1]
    _, targets, weights = example(torch.float32)
    lo, _ = Even(VOCAB).range(2, 1)
    elsewhere = (targets < lo) & (weights > 0)
    assert elsewhere.any() and (gradient[elsewhere] >= 0).all()
