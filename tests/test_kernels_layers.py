"""The Triton kernels of norms, gates, rotation and cache write against plain float64 torch.

They run compiled where there is a CUDA device and under Triton's interpreter where there is none; without Triton their
tests are skipped. What a kernel must write holds NaN before, what it must not touch is compared afterwards.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_kernels import CUDA, DEVICE, needs_cuda, needs_triton, randn, roundable
from tiny_models import VOCAB

from megalite.core import functional, layers, linear
from megalite.core.functional import ACTIVATIONS
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.kernels import gate as gate_kernels
from megalite.kernels import jit as kernels
from megalite.kernels import norm as norm_kernels
from megalite.kernels import rope as rope_kernels
from megalite.model import decoder as decoders
from megalite.model import device_attention, families
from megalite.model.attention import PackedAttention
from megalite.model.device_attention import DeviceAttention
from megalite.model.kv_cache import DeviceCache
from megalite.weights.transfer import build, load_folder

UNIT = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Twice the largest relative error of one rounding, for float32 of a few."""
DTYPES = list(UNIT)


def check(got: torch.Tensor, exact: torch.Tensor, steps: int = 1) -> None:
    """Equal but for `steps` roundings of numbers of this size."""
    unit = UNIT[got.dtype] * steps
    torch.testing.assert_close(got.double(), exact, rtol=unit, atol=unit * max(1.0, exact.abs().max().item()))


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
    """In float64."""
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + zero_centred)


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel allocates holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, dim", [(1, 16), (5, 80), (3, 1024), (2, 2304), (2, 4096)])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_a_norm_and_the_sum_before_it(tokens, dim, zero_centred, dtype, poisoned):
    torch.manual_seed(dim)
    x, weight = randn(tokens, dim, dtype=dtype), randn(dim, dtype=dtype)
    update = randn(tokens, 2 * dim, dtype=dtype)[:, :dim]  # as an output of a wider product
    given = {"zero_centred": zero_centred}
    check(norm_kernels.rms_norm(x, weight, 1e-5, **given), normed(x, weight, 1e-5, zero_centred))
    stream = x.clone()
    out = norm_kernels.rms_norm(stream, weight, 1e-5, update=update, **given)
    check(stream, x.double() + update.double())
    check(out, normed(stream, weight, 1e-5, zero_centred))  # of what is stored


@needs_triton
def test_a_norm_of_some_rows(poisoned):
    x, weight = randn(9, 48, dtype=torch.bfloat16), randn(48, dtype=torch.bfloat16)
    rows = torch.tensor([8, 0, 3, 3], device=DEVICE)
    got = norm_kernels.rms_norm(x, weight, 1e-6, rows=rows)
    assert torch.equal(got, norm_kernels.rms_norm(x, weight, 1e-6)[rows])
    assert norm_kernels.rms_norm(x, weight, 1e-6, rows=rows[:0]).shape == (0, 48)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens, dim", [(1, 7), (3, 1024), (2, 3000)])
def test_a_gate(tokens, dim, activation, dtype, poisoned):
    torch.manual_seed(dim)
    hidden = 3 * randn(tokens, 2 * dim, dtype=dtype)
    gate, up = hidden.double().chunk(2, -1)
    check(gate_kernels.gate(hidden, activation), ACTIVATIONS[activation](gate) * up, 4)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_a_gate(activation, dtype, poisoned):
    hidden, grad = 3 * randn(3, 2 * 1030, dtype=dtype), randn(3, 1030, dtype=dtype)
    exact = hidden.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    (ACTIVATIONS[activation](gate) * up).backward(grad.double())
    check(gate_kernels.gate_backward(grad, hidden, activation), exact.grad, 4)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim, rotary", [(16, 128, 128), (5, 80, 80), (3, 96, 64), (1, 8, 2)])
def test_a_rotation_there_and_back(heads, dim, rotary, dtype, poisoned):
    x = randn(6, heads + 3, dim, dtype=dtype)[:, 1 : heads + 1]
    table, positions = randn(20, rotary), torch.tensor([0, 19, 3, 3, 7, 1], device=DEVICE)
    cos, sin = table[positions].double()[:, None].chunk(2, -1)
    for place in ((table, positions), (table[positions].contiguous(), None)):
        check(rope_kernels.rotate(x, *place), rotated(x.double(), cos, sin), 2)
        check(rope_kernels.rotate(x, *place, back=True), rotated(x.double(), cos, -sin), 2)


@needs_triton
def test_gradients_go_through_kernels(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(functional, "has_kernels", lambda x: True)
    hidden, table = randn(4, 12).requires_grad_(), randn(4, 6)
    heads = functional.rotate_by_table(functional.gated(hidden, "silu").unflatten(1, (1, 6)), table, None)
    heads.square().sum().backward()
    exact = hidden.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    cos, sin = table.double()[:, None].chunk(2, -1)
    rotated((F.silu(gate) * up)[:, None], cos, sin).square().sum().backward()
    check(hidden.grad, exact.grad, 8)


HEADS = [(1, 1), (4, 1), (16, 8), (5, 5), (6, 2), (7, 1), (0, 0)]
"""(query heads, KV heads)."""


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim, rotary", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 96), (80, 32), (8, 2)]
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_head_norms_rotation_and_cache_write(dim, rotary, with_norm, dtype):
    if not CUDA and dtype != torch.bfloat16 and dim != 80:
        pytest.skip("the same but for the dtype, and slow")
    for case, (queries, keys) in enumerate(HEADS if dim == 64 and dtype == torch.bfloat16 else HEADS[1:3]):
        torch.manual_seed(dim + case)
        tokens, slots = 5, torch.tensor([3, -1, 0, 11, 7], device=DEVICE)
        whole = randn(tokens, (queries + 2 * keys) * dim + 16, dtype=dtype)
        qkv = whole[:, :-16].unflatten(-1, (-1, dim)) if queries else whole[:, :-16].reshape(tokens, 0, dim)
        before, cache = whole.clone(), randn(2, keys, 12, dim, dtype=dtype)
        cached = cache.clone()
        positions = torch.tensor([0, 2, 39, 1, 20], device=DEVICE)
        table = randn(40, rotary)
        weights = (randn(dim, dtype=dtype), randn(dim, dtype=dtype), 1e-5)
        by_position, keep, zero_centred = bool(case % 2), case % 3 == 0, case % 4 == 2
        q, k, v = qkv.clone().split([queries, keys, keys], 1)
        if with_norm:
            q, k = (normed(x, weight, 1e-5, zero_centred) for x, weight in ((q, weights[0]), (k, weights[1])))
        rope_kernels.rotate_and_store(
            qkv,
            *cache,
            slots,
            table if by_position else table[positions].contiguous(),
            positions=positions if by_position else None,
            norms=weights if with_norm else None,
            zero_centred=zero_centred,
            keep_keys=keep,
        )
        cos, sin = table[positions].double()[:, None].chunk(2, -1)
        q, k = (rotated(x.double(), cos, sin) for x in (q, k))
        got_q, got_k, got_v = qkv.split([queries, keys, keys], 1)
        if queries:
            check(got_q, q, 2)
            untouched = before[:, :-16].unflatten(-1, (-1, dim))[:, queries : queries + keys].double()
            check(got_k, k if keep else untouched, 2)
        assert torch.equal(got_v, v) and torch.equal(whole[:, -16:], before[:, -16:])
        written = slots >= 0
        if keys:
            check(cache[0][:, slots[written]].transpose(0, 1), k[written], 2)
        cached[:, :, slots[written]] = cache[:, :, slots[written]]
        assert torch.equal(cache, cached), "no other slot is written"
        assert torch.equal(cache[1][:, slots[written]].transpose(0, 1), v[written])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if CUDA else []))
def test_a_cache_in_fp8_gets_what_another_gets_rounded(dtype):
    torch.manual_seed(1)
    slots, table = torch.tensor([3, -1, 0], device=DEVICE), randn(3, 32)
    if not CUDA:  # keys stay as they are
        table[:, :16], table[:, 16:] = 1, 0
    qkv, cache = roundable(randn(3, 8, 48, dtype=dtype)), torch.zeros(2, 2, 4, 48, dtype=dtype, device=DEVICE)
    qkv[0] *= 1024
    kept = torch.zeros_like(cache, dtype=torch.float8_e4m3fn)
    other = qkv.clone()
    rope_kernels.rotate_and_store(qkv, *cache, slots, table, positions=None)
    rope_kernels.rotate_and_store(other, *kept, slots, table, positions=None, scales=(0.25, 2.0))
    assert torch.equal(qkv, other)
    scales = torch.tensor([0.25, 2.0], device=DEVICE)[:, None, None, None]
    want = (cache.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(kept.view(torch.uint8), want.view(torch.uint8))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


# ---- the whole decoder


def emulated_norm(x, weight, eps, *, zero_centred=False, update=None, rows=None, pdl=False):
    if update is not None:
        x.copy_(x.float() + update.float())
    x = (x if rows is None else x[rows]).float()
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.float() + zero_centred)).to(weight.dtype)


def emulated_gate(hidden, activation, *, pdl=False):
    gate, up = hidden.float().chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(hidden.dtype)


def emulated_thin(x, weight, *, bias, norm, gated, residual, out, pdl):
    wide = x.float()
    if norm is not None:
        wide = normed(x, *norm).to(x.dtype if x.shape[0] > 1 else torch.float32).float()
    y = wide @ weight.float().T + (0 if bias is None else bias.float())
    if gated is not None:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[gated](gate) * up
    return y.to(x.dtype) if residual is None else out.copy_(residual.float() + y)


def emulated_rope(qkv, k_cache, v_cache, slots, table, *, positions, norms, zero_centred, keep_keys, scales, pdl):
    keys = len(k_cache)
    q, k, v = qkv.float().split([qkv.shape[1] - 2 * keys, keys, keys], 1)
    if norms is not None:
        q, k = (normed(x, weight, norms[2], zero_centred).float() for x, weight in ((q, norms[0]), (k, norms[1])))
    cos, sin = (table if positions is None else table[positions])[:, None].chunk(2, -1)
    qkv[:, : q.shape[1]] = rotated(q, cos, sin).to(qkv.dtype)
    k_cache[:, slots] = rotated(k, cos, sin).to(k_cache.dtype).transpose(0, 1)
    v_cache[:, slots] = v.to(v_cache.dtype).transpose(0, 1)


def kernels_where_gradients_are_off(monkeypatch):
    if not CUDA:
        for module in (functional, layers, linear, decoders, device_attention):
            monkeypatch.setattr(module, "by_kernels", lambda x: not torch.is_grad_enabled())


@pytest.fixture
def kernels_run(monkeypatch):
    """Interpreted where there is no CUDA."""
    kernels_where_gradients_are_off(monkeypatch)


@pytest.fixture
def kernels_or_their_roundings(monkeypatch):
    """Emulated where there is no CUDA: float32, rounded once to nearest, which the interpreter does not do."""
    kernels_where_gradients_are_off(monkeypatch)
    if not CUDA:
        monkeypatch.setattr(norm_kernels, "rms_norm", emulated_norm)
        monkeypatch.setattr(gate_kernels, "gate", emulated_gate)
        monkeypatch.setattr(linear, "thin_linear", emulated_thin)
        monkeypatch.setattr(device_attention, "rotate_and_store", emulated_rope)
        monkeypatch.setattr(device_attention, "store_kv", stored)


def stored(k, v, k_cache, v_cache, slots, scales):
    k_cache[:, slots], v_cache[:, slots] = k.transpose(0, 1), v.transpose(0, 1)


class CachedAttention(DeviceAttention):
    """One whole sequence, whose attention is torch's over what was written to the cache."""

    def _attend_stored(self, spec, q, k, v, sinks=None):
        assert sinks is None
        k, v = (cached[:, : len(q)].transpose(0, 1) for cached in self.cache.layers[spec.layer])
        return PackedAttention([len(q)], q.device).attend(spec, q, k, v)


def sequence(decoder, count: int, context=DeviceAttention) -> DeviceAttention:
    """The context of a step over a whole sequence of `count` tokens."""
    config, weight = decoder.config, next(decoder.parameters())
    cache = DeviceCache(
        {layer: made.cache(1, 0) for layer, made in enumerate(config.layers)},
        -(-count // 8),
        block_size=8,
        dtype=weight.dtype,
        device=weight.device,
    )
    integers = partial(torch.tensor, dtype=torch.int32, device=weight.device)
    positions = torch.arange(count, device=weight.device)
    return context(
        cache=cache,
        positions=positions,
        lengths=torch.full_like(positions, count),
        slots=positions,
        query_start=integers([0, count]),
        context_len=integers([count]),
        block_table=integers([list(range(-(-count // 8)))]),
        max_query_len=count,
    )


def decoder_of(folder, dtype: torch.dtype):
    device = torch.device(DEVICE)
    decoder = build(families.read(folder), ParallelState(Layout()), dtype=dtype, device=device)
    load_folder(decoder, folder)
    return decoder.requires_grad_(False)


FAMILIES = [
    "llama3",
    "llama_one_kv_head",
    "llama_bias",
    "qwen3",
    "gemma2",
    "phi3",
    "phi3_longrope",
    "gpt2",
    "qwen3_moe",
]


FEW, MANY = 11, 40
"""Tokens of a step whose matrices are multiplied by `thin_linear`, and by torch."""


class TwoEqualRanks:
    """As `SymmetricSum`, of two ranks that have the same summands."""

    def __call__(self, x):
        return x + x

    def add_norm(self, x, residual, weight, eps, *, zero_centred):
        return norm_kernels.rms_norm(residual, weight, eps, zero_centred=zero_centred, update=x + x)


def test_an_update_in_parts_is_summed_when_the_stream_is_read(kernels_or_their_roundings, monkeypatch):
    monkeypatch.setattr(layers, "fusable_sum", lambda x, state: TwoEqualRanks())
    x, partial = randn(3, 8), randn(3, 8)
    norm = layers.RMSNorm(8, 1e-5).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(randn(8))
    with torch.inference_mode():
        for read in (lambda stream: stream.total(), lambda stream: stream.normed(norm), lambda stream: stream.add(x)):
            stream = layers.Residual(x.clone())
            stream.add_partial(partial, ParallelState(Layout()))
            out = read(stream)
            exact = x.double() + 2 * partial.double()
            check(stream.x, exact)
            if out is not None and out is not stream.x:
                check(out, normed(exact, norm.weight, 1e-5, False), 2)
            check(stream.total(), exact + (x.double() if out is None else 0))


def check_model(folder, context, tokens: int) -> None:
    decoder = decoder_of(folder, torch.float32)
    ids = torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = decoder.logits(decoder(ids, PackedAttention([tokens], DEVICE)))
    with torch.inference_mode():
        hidden = decoder(ids, sequence(decoder, tokens, context))
        torch.testing.assert_close(decoder.logits(hidden), expected, rtol=1e-4, atol=1e-4)
        rows = torch.tensor([10, 4], device=DEVICE)
        torch.testing.assert_close(decoder.logits(hidden, rows), expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_by_kernels_is_the_model(name, tokens, tiny, kernels_or_their_roundings):
    check_model(tiny(name), DeviceAttention if CUDA else CachedAttention, tokens)


@needs_triton
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_model_by_interpreted_kernels(tokens, tiny, kernels_run):
    check_model(tiny("qwen3"), CachedAttention, tokens)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("name", [name for name in FAMILIES if "moe" not in name])  # another expert is no rounding
def test_kernels_round_less_in_reduced_precision(name, tokens, tiny, kernels_or_their_roundings):
    """Errors of bfloat16 logits against float32 ones of the same weights, with and without kernels.

    Some models have nothing that the kernels could round less; then luck decides, which makes up to 1%.
    """
    half = decoder_of(tiny(name), torch.bfloat16)
    whole = decoder_of(tiny(name), torch.float32)
    for param, rounded in zip(whole.parameters(), half.parameters(), strict=True):
        param.copy_(rounded)
    errors = {"kernels": 0.0, "torch": 0.0}
    for seed in range(16):
        ids = torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        packed = PackedAttention([tokens], DEVICE)
        exact = whole.logits(whole(ids, packed))
        plain = half.logits(half(ids, packed))
        with torch.inference_mode():
            fused = half.logits(half(ids, sequence(half, tokens, CachedAttention)))
        errors["torch"] += (plain - exact).norm().item()
        errors["kernels"] += (fused - exact).norm().item()
    assert 0 < errors["kernels"] <= 1.05 * errors["torch"], errors


@needs_cuda
@pytest.mark.skipif(CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs dependent launch")
def test_dependent_launch_in_a_graph_gives_the_same_bits():
    """A chain of kernels of which each waits for the one before, replayed."""
    x, update = randn(64, 4096, dtype=torch.bfloat16), randn(64, 4096, dtype=torch.bfloat16)
    weight = randn(4096, dtype=torch.bfloat16)
    cache, slots = randn(2, 8, 64, 128, dtype=torch.bfloat16), torch.arange(64, device=DEVICE)
    table = randn(64, 128)

    def chain(stream: torch.Tensor, cache: torch.Tensor, pdl: bool) -> torch.Tensor:
        for _ in range(20):
            hidden = norm_kernels.rms_norm(stream, weight, 1e-6, update=update, pdl=pdl)
            hidden = gate_kernels.gate(torch.cat([hidden, hidden], 1) if not pdl else twice(hidden), "silu", pdl=pdl)
            heads = hidden.view(64, 32, 128)
            rope_kernels.rotate_and_store(heads, *cache, slots, table, positions=slots, pdl=pdl)
            norm_kernels.rms_norm(stream, weight, 1e-6, update=hidden, pdl=pdl)
        return stream

    def twice(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden, hidden], 1)

    expected_cache = cache.clone()
    expected = chain(x.clone(), expected_cache, False)
    static = x.clone()
    chain(static, cache, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(static, cache, True)
    for _ in range(5):
        static.copy_(x)
        graph.replay()
        assert torch.equal(static, expected) and torch.equal(cache, expected_cache)


def test_the_kernels_take_nothing():
    nothing = torch.empty(0, 8, device=DEVICE)
    if kernels.triton is not None:
        assert norm_kernels.rms_norm(nothing, nothing.new_empty(8), 1e-6).shape == (0, 8)
        assert gate_kernels.gate(nothing, "silu").shape == (0, 4)
    assert F.rms_norm(nothing, (8,)).shape == (0, 8)
