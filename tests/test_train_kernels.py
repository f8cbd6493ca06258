"""The Triton kernels of training, compiled or interpreted, against autograd in float64: see `test_kernels`."""

from __future__ import annotations

import pytest
import torch
from test_kernels import CUDA, DEVICE, needs_triton  # first: it chooses the interpreter

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.kernels import loss as kernels
from megalite.train import loss
from megalite.train.loss import target_logprobs

pytestmark = needs_triton
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def logits(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a wider tensor that holds NaN besides; one has a logit far above its others."""
    torch.manual_seed(rows + width)
    whole = torch.full((rows, width + 16), torch.nan, dtype=dtype, device=DEVICE)
    whole[:, :width] = torch.randn(rows, width, device=DEVICE) * 4
    whole[0, 0] = 300.0
    return whole[:, :width]


def changed(scores: torch.Tensor, temperature: float, softcap: float | None) -> torch.Tensor:
    return (scores if softcap is None else softcap * torch.tanh(scores / softcap)) / temperature


@pytest.mark.parametrize("rows, width", [(1, 1), (3, 7), (5, 300), (2, 1024), (3, 2500)])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, None), (1.7, 5.0)])
def test_a_softmax_and_its_gradient(rows, width, temperature, softcap, monkeypatch):
    monkeypatch.setattr(kernels, "READ", 1024)
    monkeypatch.setattr(kernels, "WRITTEN", 512)
    changes = {"temperature": temperature, "softcap": softcap}
    for dtype, tolerance in TOLERANCE.items():
        scores = logits(rows, width, dtype)
        targets = torch.randint(width, (rows,), device=DEVICE)
        targets[-1] = (-3, width, width - 1)[rows % 3]
        mine = (targets >= 0) & (targets < width)
        exact = scores.double().requires_grad_()
        logs = changed(exact, temperature, softcap).log_softmax(1)
        wanted = torch.where(mine, logs.gather(1, targets.clamp(0, width - 1)[:, None])[:, 0], 0.0)
        lse, chosen = kernels.softmax_statistics(scores, targets, **changes)
        wanted_lse = changed(exact, temperature, softcap).logsumexp(1).detach()
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chosen.double(), wanted.detach(), rtol=1e-5, atol=1e-4)
        slopes = torch.randn(rows, device=DEVICE)
        into = logs.exp().detach() * -slopes[:, None].double()
        into[mine, targets[mine]] += slopes[mine].double()
        (into_exact,) = torch.autograd.grad(changed(exact, temperature, softcap), exact, into)
        found = kernels.softmax_gradient_(scores, targets, lse, slopes, **changes)
        assert found is scores
        torch.testing.assert_close(found.double(), into_exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, None), (1.7, 5.0)])
@pytest.mark.parametrize("block", [1 << 24, 200], ids=["whole", "blocks"])
def test_log_probabilities_are_those_without_kernels(dtype, temperature, softcap, block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", block)
    monkeypatch.setattr(loss, "LEAST_ROWS", 7)
    monkeypatch.setattr(loss, "SHARE", 1 << 40)
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 12, device=DEVICE), torch.randn(103, 12, device=DEVICE)
    targets, upstream = torch.randint(103, (40,), device=DEVICE), torch.randn(40, device=DEVICE)
    axis = ParallelState(Layout()).tp
    results = []
    for fused in (False, True):
        monkeypatch.setattr(loss, "has_kernels", lambda x, fused=fused: fused)
        inputs = [one.detach().to(dtype).requires_grad_() for one in (hidden, weight)]
        found = target_logprobs(*inputs, targets, axis=axis, first_row=0, temperature=temperature, softcap=softcap)
        (found * upstream).sum().backward()
        results.append([found.detach(), *(one.grad for one in inputs)])
    rough = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, **rough)


def test_logits_that_were_overwritten_are_not_used_again(monkeypatch):
    monkeypatch.setattr(loss, "has_kernels", lambda x: True)
    hidden = torch.randn(6, 4, device=DEVICE).requires_grad_()
    weight, targets = torch.randn(9, 4, device=DEVICE), torch.arange(6, device=DEVICE)
    found = target_logprobs(hidden, weight, targets, axis=ParallelState(Layout()).tp, first_row=0).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_logits_of_a_real_vocabulary():
    """As many as one GPU has in a step, a block and several: no number overflows, and there is no second copy."""
    tokens, vocab, dim = 4096, 151_936, 64
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, dim, device=DEVICE) / 8).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = target_logprobs(hidden, weight, targets, axis=ParallelState(Layout()).tp, first_row=0)
    found.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * tokens * vocab * 2 + 3 * weight.numel() * 2
    rows = torch.arange(0, tokens, 64, device=DEVICE)
    exact = (hidden[rows].detach().double() @ weight.detach().double().t()).log_softmax(1)
    wanted = exact.gather(1, targets[rows, None])[:, 0]
    torch.testing.assert_close(found.detach()[rows].double(), wanted, rtol=1e-2, atol=5e-2)
    into = -exact.exp()
    into.scatter_add_(1, targets[rows, None], torch.ones_like(wanted)[:, None])
    torch.testing.assert_close(hidden.grad[rows].double(), into @ weight.detach().double(), rtol=3e-2, atol=2e-2)
