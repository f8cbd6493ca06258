"""Attention over the host cache: however rows lie in it, the result is that of the plain formula."""

import pytest
import torch

from megalite.model.attention import PackedAttention
from megalite.model.config import AttentionSpec
from megalite.model.host_attention import CacheRow, HostAttention, HostCache

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 8


def formula(spec, q, k, v, start):
    """q [count, H, D] at positions start.., k and v [start + count, K, D]; float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        for i in range(q.shape[0]):
            low = max(0, start + i + 1 - spec.window) if spec.window else 0
            scores = k[low : start + i + 1, kv] @ q[i, head] * spec.scale
            if spec.softcap:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            out[i, head] = scores.softmax(0) @ v[low : start + i + 1, kv]
    return out.float()


SPECS = [
    AttentionSpec(layer=3, scale=0.3),
    AttentionSpec(layer=3, scale=0.3, window=5),
    AttentionSpec(layer=3, scale=0.3, softcap=2.0),
    AttentionSpec(layer=3, scale=0.3, window=5, softcap=2.0),
]

LAYOUTS = {
    # (start, count, blocks) of each row; blocks that ascend by one are one run
    "one decode": [(6, 1, [2, 3])],
    "even lanes": [(6, 1, [0, 1]), (2, 1, [4, 5]), (7, 1, [8, 9])],
    "a lane between is free": [(6, 1, [0, 1]), (2, 1, [8, 9])],
    "last lane at the end of the cache": [(11, 1, [0, 1, 2]), (2, 1, [15])],
    "scattered": [(6, 1, [7, 3]), (9, 1, [1, 9, 4])],
    "prefill, chunk and decode": [(0, 7, [0, 1]), (4, 3, [9, 2]), (5, 6, [4, 5, 6]), (3, 1, [12]), (1, 1, [14])],
}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_host_attention(spec, name):
    generator = torch.Generator().manual_seed(0)
    cache = HostCache([3], KV_HEADS, 16, DIM, block_size=BLOCK, dtype=torch.float32)
    cache.layers[3].normal_(generator=generator)  # other sequences' old keys
    rows, slots, positions, expected, packs = [], [], [], [], []
    for start, count, blocks in LAYOUTS[name]:
        q, k, v = (torch.randn(start + count, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
        mine = [blocks[place // BLOCK] * BLOCK + place % BLOCK for place in range(start + count)]
        cache.layers[3][0][:, mine[:start]] = k[:start].transpose(0, 1)
        cache.layers[3][1][:, mine[:start]] = v[:start].transpose(0, 1)
        run = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        rows.append(CacheRow(len(slots), start, count, mine[0] if run else None, None if run else torch.tensor(blocks)))
        slots += mine[start:]
        positions += range(start, start + count)
        expected.append(formula(spec, q[start:], k, v, start))
        packs.append((q[start:], k[start:], v[start:]))
    q, k, v = (torch.cat(parts) for parts in zip(*packs, strict=True))
    context = HostAttention(cache, rows, torch.tensor(positions), torch.tensor(positions), torch.tensor(slots))
    torch.testing.assert_close(context.attend(spec, q, k, v), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("lengths", [[9], [6, 6], [3, 8, 1]], ids=str)
def test_packed_attention(spec, lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([formula(spec, *part, 0) for part in parts])
    context = PackedAttention(lengths)
    assert context.positions.tolist() == [place for length in lengths for place in range(length)]
    assert context.lengths.tolist() == [length for length in lengths for _ in range(length)]
    torch.testing.assert_close(context.attend(spec, q, k, v), expected, atol=1e-5, rtol=1e-5)
