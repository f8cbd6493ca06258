"""The Triton kernels of training, compiled or interpreted, against autograd in float64: see `test_kernels`."""

from __future__ import annotations

import pytest
import torch
from test_kernels import CUDA, DEVICE, needs_triton, randn  # first: it chooses the interpreter

from megalite.core import fused
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.kernels import loss as kernels
from megalite.kernels import training
from megalite.model import families
from megalite.train import loss
from megalite.train.loss import target_logprobs
from megalite.train.micro_batch import from_windows
from megalite.train.model import LanguageModel
from megalite.weights.transfer import build, load_folder

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
    for kernels_used in (False, True):
        monkeypatch.setattr(loss, "has_kernels", lambda x, used=kernels_used: used)
        inputs = [one.detach().to(dtype).requires_grad_() for one in (hidden, weight)]
        found = target_logprobs(*inputs, targets, axis=axis, first_row=0, temperature=temperature, softcap=softcap)
        (found * upstream).sum().backward()
        results.append([found.detach(), *(one.grad for one in inputs)])
    rough = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, **rough)


def test_logits_that_were_overwritten_are_not_used_again(monkeypatch):
    monkeypatch.setattr(loss, "has_kernels", lambda x: True)
    hidden = torch.randn(6, 4, device=DEVICE).requires_grad_()
    weight, targets = torch.randn(9, 4, device=DEVICE), torch.arange(6, device=DEVICE)
    found = target_logprobs(hidden, weight, targets, axis=ParallelState(Layout()).tp, first_row=0).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel allocates holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def check(found, leaves, exact, exact_leaves):
    """Outputs and the gradients of leaves (either None) from a random gradient of the outputs, against float64's."""
    tolerance = TOLERANCE[found[0].dtype]
    upstream = [torch.randn_like(one) for one in found]
    grads = torch.autograd.grad(found, [one for one in leaves if one is not None], upstream)
    exact_grads = torch.autograd.grad(
        exact, [one for one in exact_leaves if one is not None], [u.double() for u in upstream]
    )
    for got, wanted in zip((*found, *grads), (*exact, *exact_grads), strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=tolerance, atol=tolerance * scale)


def leaves_of(*tensors: torch.Tensor | None):
    """The tensors, to be differentiated by, and in float64."""
    mine = [None if one is None else one.detach().requires_grad_() for one in tensors]
    return mine, [None if one is None else one.detach().double().requires_grad_() for one in tensors]


def normed(x, weight, zero_centred):
    return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (weight + zero_centred)


@pytest.mark.parametrize("tokens, dim", [(1, 8), (40, 100), (3, 2560)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("adds, zero_centred", [(True, False), (False, True), (True, True)])
def test_a_norm_with_the_sum_before_it(tokens, dim, dtype, adds, zero_centred, poisoned):
    torch.manual_seed(dim)
    x = randn(tokens, dim + 3, dtype=dtype)[:, :dim]
    mine, exact = leaves_of(x, randn(tokens, dim, dtype=dtype) if adds else None, randn(dim, dtype=dtype))
    found = fused.add_norm(*mine, 1e-3, zero_centred=zero_centred)
    stream = exact[0] + exact[1] if adds else exact[0] * 1
    rounded = stream + (found[0].detach().double() - stream.detach())  # the norm sees what is stored
    check(found, mine, (rounded, normed(rounded, exact[2], zero_centred)), exact)


def test_a_norm_whose_stream_or_norm_goes_nowhere():
    mine, exact = leaves_of(randn(5, 12), randn(5, 12), randn(12))
    stream, norm = fused.add_norm(*mine, 1e-3, zero_centred=False)
    wanted = normed(exact[0] + exact[1], exact[2], False)
    check((norm,), mine, (wanted,), exact)
    stream, norm = fused.add_norm(*mine, 1e-3, zero_centred=False)
    check((stream,), mine[:2], (exact[0] + exact[1],), exact[:2])


@pytest.mark.parametrize("heads, keys, dim, rotated", [(4, 2, 16, 16), (3, 3, 80, 80), (7, 1, 24, 12), (2, 2, 128, 32)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norms, zero_centred", [(True, False), (True, True), (False, False)])
def test_heads_after_norms_and_rotation(heads, keys, dim, rotated, dtype, norms, zero_centred, poisoned):
    tokens, counts = 9, (heads, keys)
    torch.manual_seed(heads * dim)
    weights = [randn(dim, dtype=dtype) for _ in counts] if norms else [None, None]
    mine, exact = leaves_of(randn(tokens, heads + 2 * keys, dim, dtype=dtype), *weights)
    by_position = heads % 2 == 0
    angles = torch.rand(30 if by_position else tokens, rotated // 2, device=DEVICE) * 6
    positions = torch.randint(30, (tokens,), device=DEVICE) if by_position else None
    table = torch.cat([angles.cos(), 1.3 * angles.sin()], 1)
    given = (*mine[1:], 1e-3) if norms else None
    found = fused.turned_heads(mine[0], counts, table, positions, given, zero_centred=zero_centred)
    cos, sin = (table if positions is None else table[positions]).double()[:, None].split(rotated // 2, -1)
    wanted, v = [], exact[0][:, heads + keys :] * 1
    for x, weight in zip(exact[0][:, : heads + keys].split(counts, 1), exact[1:], strict=True):
        x = normed(x, weight, zero_centred) if norms else x
        first, second, rest = x.split([rotated // 2, rotated // 2, dim - rotated], -1)
        wanted.append(torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1))
    check(found, mine, (*wanted, v), exact)


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 2048)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_add_up_in_float32(shape, dtype):
    total = torch.full(shape, torch.nan, device=DEVICE)
    first, second = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    assert training.accumulate_(total, first, first=True) is total and torch.equal(total, first.float())
    training.accumulate_(total, second, first=False)
    assert torch.equal(total, first.float() + second.float())


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


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma2", "qwen3_moe", "phi3_longrope"])
def test_a_model_learns_the_same_by_kernels(name, tiny, monkeypatch):
    """Log-probabilities and the gradient of every parameter, in float32."""
    results = []
    for used in (False, True):
        monkeypatch.setattr(loss, "has_kernels", lambda x, used=used: used)
        monkeypatch.setattr(fused, "learns_by_kernels", lambda x, *weights, used=used: used and torch.is_grad_enabled())
        decoder = build(
            families.read(tiny(name)), ParallelState(Layout()), dtype=torch.float32, device=torch.device(DEVICE)
        )
        load_folder(decoder, tiny(name))
        windows = torch.randint(decoder.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(1))
        found = LanguageModel(decoder)(from_windows(windows).to(torch.device(DEVICE)))
        (found * torch.linspace(-1, 1, 10, device=DEVICE)).sum().backward()
        grads = {key: param.grad for key, param in decoder.named_parameters() if param.grad is not None}
        results.append({"log-probabilities": found.detach(), **grads})
    plain, kernels_used = results
    assert plain.keys() == kernels_used.keys()
    for key, wanted in plain.items():
        difference = (kernels_used[key] - wanted).abs().max().item()
        assert difference <= 1e-4 * max(0.1, wanted.abs().max().item()), key
