"""Log-probabilities over a cut vocabulary equal PyTorch's over the whole one, gradients included, in bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.core.layout import Even, Layout
from megalite.core.parallel_state import ParallelState
from megalite.train import loss
from megalite.train.loss import target_logprobs

TOKENS, DIM = 40, 12


def example(dtype: torch.dtype, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, targets that include the first and the last row, and an uneven gradient of the results."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, DIM, generator=generator) * 3
    weight = torch.randn(vocab, DIM, generator=generator)
    hidden[3] *= 60  # a softmax that forgets to subtract the maximum overflows here
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(TOKENS, generator=generator)


def plain(hidden, weight, targets, temperature, softcap) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def cut(rank: int, tp: int, vocab: int, dtype: torch.dtype, temperature: float, softcap: float | None, block: int):
    """Log-probabilities, the summed gradient of the hidden states, and the gradient of this rank's rows."""
    loss.BLOCK, loss.LEAST_ROWS = block, 7
    state = ParallelState(Layout(tp=tp))
    hidden, weight, targets, upstream = example(dtype, vocab)
    lo, hi = Even(vocab).range(tp, rank)
    hidden.requires_grad_()
    mine = weight[lo:hi].clone().requires_grad_()
    found = target_logprobs(
        hidden, mine, targets, axis=state.tp, first_row=lo, temperature=temperature, softcap=softcap
    )
    (found * upstream).sum().backward()
    return found.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize("tp, vocab", [(1, 103), (3, 103), (3, 2)], ids=["one", "three", "one has no rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, None), (1.7, 5.0)])
@pytest.mark.parametrize("block", [1 << 24, 200], ids=["whole", "blocks"])
def test_equals_the_log_softmax_over_the_whole_vocabulary(tp, vocab, dtype, temperature, softcap, block, ranks):
    hidden, weight, targets, upstream = example(dtype, vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    wanted = plain(hidden, weight, targets, temperature, softcap)
    (wanted * upstream).sum().backward()
    results = ranks(tp).run(cut, tp, vocab, dtype, temperature, softcap, block)
    for got, _, _ in results:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=2e-5)
    rough = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    into_hidden = sum(grad.float() for _, grad, _ in results).to(dtype)
    into_weight = torch.cat([grad for _, _, grad in results])
    assert into_weight.dtype == dtype
    torch.testing.assert_close(into_hidden, hidden.grad, **rough)
    torch.testing.assert_close(into_weight, weight.grad, **rough)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_whole(dtype, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 1 << 18)
    tokens, vocab = 512, 2000
    hidden, weight = torch.randn(tokens, 4, dtype=dtype), torch.randn(vocab, 4, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    axis = ParallelState(Layout()).tp
    with Largest() as seen:
        found = target_logprobs(hidden, weight, torch.randint(vocab, (tokens,)), axis=axis, first_row=0)
        found.sum().backward()
    assert seen.numbers <= loss.BLOCK < tokens * vocab
