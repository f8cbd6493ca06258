"""Attention over the host cache and over packs, with gradients: the result is that of the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from reference import attention as formula

from megalite.model import attention
from megalite.model.attention import PackedAttention
from megalite.model.config import AttentionSpec
from megalite.model.host_attention import CacheRow, HostAttention
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import HostCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
SPECS = [
    AttentionSpec(layer=3, scale=0.3, window=window, softcap=softcap)
    for window, softcap in ((None, None), (5, None), (None, 2.0), (5, 2.0), (100, None))
]
SPECS.append(AttentionSpec(layer=3, scale=0.3, chunk=4))

LAYOUTS = {
    # (start, count, blocks) of each row; blocks that ascend by one are one run
    "one decode": [(6, 1, [2, 3])],
    "even lanes": [(6, 1, [0, 1]), (2, 1, [4, 5]), (7, 1, [8, 9])],
    "a lane between is free": [(6, 1, [0, 1]), (2, 1, [8, 9])],
    "last lane at the end of the cache": [(11, 1, [0, 1, 2]), (2, 1, [15])],
    "scattered": [(6, 1, [7, 3]), (9, 1, [1, 9, 4])],
    "prefill, chunk and decode": [(0, 7, [0, 1]), (4, 3, [9, 2]), (5, 6, [4, 5, 6]), (3, 1, [12]), (1, 1, [14])],
}


def placed(offset, start, count, blocks):
    """A row, and the slots of all its positions."""
    slots = [blocks[place // BLOCK] * BLOCK + place % BLOCK for place in range(start + count)]
    run = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    return CacheRow(offset, start, count, slots[0] if run else None, None if run else torch.tensor(blocks)), slots


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_host_attention(spec, name, sinks):
    generator = torch.Generator().manual_seed(0)
    cache = HostCache({3: CacheSpec.keys_and_values(KV_HEADS, DIM)}, 16, block_size=BLOCK, dtype=torch.float32)
    cache.stacks[3][0].normal_(generator=generator)  # other sequences' old keys
    rows, slots, positions, expected, packs = [], [], [], [], []
    of_heads = torch.randn(HEADS, generator=generator) if sinks else None
    for start, count, blocks in LAYOUTS[name]:
        q, k, v = (torch.randn(start + count, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
        row, mine = placed(len(slots), start, count, blocks)
        cache.layers[3][0][:, mine[:start]] = k[:start].transpose(0, 1)
        cache.layers[3][1][:, mine[:start]] = v[:start].transpose(0, 1)
        rows.append(row)
        slots += mine[start:]
        positions += range(start, start + count)
        expected.append(formula(q[start:], k, v, spec, of_heads))
        packs.append((q[start:], k[start:], v[start:]))
    q, k, v = (torch.cat(parts) for parts in zip(*packs, strict=True))
    context = HostAttention(cache, rows, torch.tensor(positions), torch.tensor(positions), torch.tensor(slots))
    out = context.attend(spec, q, k, v, sinks=of_heads)
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cache_in_fp8_is_one_of_rounded_keys_and_values(name):
    generator = torch.Generator().manual_seed(0)
    of = CacheSpec.keys_and_values(KV_HEADS, DIM)
    caches = [HostCache({3: of}, 16, block_size=BLOCK, dtype=torch.float32, fp8=fp8) for fp8 in (False, True)]
    old = torch.randn(caches[0].stacks[3][0].shape, generator=generator)
    caches[0].stacks[3][0].copy_(old.to(torch.float8_e4m3fn))
    caches[1].stacks[3][0].copy_(old)
    assert caches[0].nbytes == 4 * caches[1].nbytes
    rows, slots = [], []
    for start, count, blocks in LAYOUTS[name]:
        row, mine = placed(len(slots), start, count, blocks)
        rows.append(row)
        slots += mine[start:]
    q, k, v = (torch.randn(len(slots), heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k[0] = 1e4  # beyond what e4m3 can be, and so the largest that it can
    places = torch.zeros(len(slots), dtype=torch.int64)
    spec = AttentionSpec(layer=3, scale=0.3, key_scale=0.5, value_scale=4.0)
    got = HostAttention(caches[1], rows, places, places, torch.tensor(slots)).attend(spec, q, k, v)
    k, v = ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() for x, scale in ((k, 0.5), (v, 4.0)))
    plain = AttentionSpec(layer=3, scale=0.15)
    want = HostAttention(caches[0], rows, places, places, torch.tensor(slots)).attend(plain, q, k, v) * 4
    assert torch.equal(got, want)


def packed_case(lengths, heads, kv_heads, dim, dtype=torch.float32):
    """A fused projection [T, H + 2 K, D] that requires gradients, and its q, k and v."""
    torch.manual_seed(len(lengths) + heads)
    fused = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, device=DEVICE).to(dtype).requires_grad_()
    return fused, fused.split([heads, kv_heads, kv_heads], 1)


def check_packed(lengths, heads, kv_heads, spec, *, dim=32, dtype=torch.float32, tolerance=1e-5):
    """Outputs and gradients against the formula, sequence by sequence."""
    fused, qkv = packed_case(lengths, heads, kv_heads, dim, dtype)
    out = PackedAttention(lengths, DEVICE).attend(spec, *qkv)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), fused)
    rows = zip(*(x.split(lengths) for x in qkv), strict=True)
    expected = torch.cat([formula(*row, spec) for row in rows])
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), fused)
    assert out.shape == qkv[0].shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("lengths", [[1], [12] * 3, [5, 1, 30, 17], [2, 2, 2, 9, 9, 20, 2]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_attention(lengths, heads, kv_heads, spec, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 8)
    check_packed(lengths, heads, kv_heads, spec)


def test_a_pack_knows_its_positions_and_may_have_no_heads():
    context = PackedAttention([3, 4], DEVICE, beyond=1)
    assert context.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] and context.lengths.tolist() == [4] * 3 + [5] * 4
    _, (q, k, v) = packed_case([3, 4], 4, 2, 8)
    assert context.attend(SPECS[0], q[:, :0], k, v).shape == (7, 0, 8)


BF16 = {"head_dim": 128, "dtype": torch.bfloat16, "capability": (9, 0)}


@pytest.mark.parametrize(
    "wanted, runs, changes",
    [
        ("cudnn", [(8, 1024)], {}),
        ("cudnn", [(8, 1024)], {"window": 1024}),
        ("batched", [(8, 1000)], {}),
        ("batched", [(8, 1024)], {"capability": (8, 0)}),
        ("batched", [(8, 1024)], {"capability": (12, 0)}),
        ("batched", [(8, 1024)], {"head_dim": 256}),
        ("varlen", [(8, 1024)], {"window": 512}),
        ("varlen", [(8, 1024), (1, 3)], {}),
        ("varlen", [(1, 40), (1, 3)], {"head_dim": 256, "capability": (8, 6), "window": 2}),
        ("batched", [(1, 40), (1, 3)], {"softcap": 20.0}),
        ("batched", [(1, 40), (1, 3)], {"dtype": torch.float32}),
        ("batched", [(1, 40), (1, 3)], {"head_dim": 12}),
        ("batched", [(1, 40), (1, 3)], {"capability": (7, 5)}),
        ("batched", [(1, 40), (1, 3)], {"capability": None}),
    ],
)
def test_the_kernel_of_a_pack(wanted, runs, changes):
    facts = BF16 | {name: value for name, value in changes.items() if name in BF16}
    layer = {name: value for name, value in changes.items() if name not in BF16}
    spec = AttentionSpec(layer=0, scale=1.0, **{"window": None, "softcap": None, **layer})
    assert attention.choose_kernel(spec, runs, **facts) == wanted
