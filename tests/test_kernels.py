"""The Triton kernels, paged attention and cache writer, and attention on CUDA against plain float64 torch.

The Triton kernels run compiled where there is a CUDA device and under Triton's interpreter where there is none; without
Triton their tests are skipped. Cache slots that no query may read hold NaN.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton and the kernels are imported

from reference import attention as reference  # noqa: E402
from test_attention import check_packed, packed_case  # noqa: E402

from megalite.errors import ResourceError  # noqa: E402
from megalite.kernels import attention as kernels  # noqa: E402
from megalite.kernels import jit  # noqa: E402
from megalite.kernels.fresh import fresh_attention, which  # noqa: E402
from megalite.kernels.reduce import Peers, all_reduce, all_reduce_add_norm  # noqa: E402
from megalite.kernels.store import _store_kernel, store_kv  # noqa: E402
from megalite.model.attention import PackedAttention  # noqa: E402
from megalite.model.config import AttentionSpec  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
interpreted = type(_store_kernel).__name__ == "InterpretedFunction"
old_numpy = tuple(int(part) for part in numpy.__version__.split(".")[:2]) < (2, 4)  # Triton 3.6's interpreter wants it
needs_triton = pytest.mark.skipif(
    not (CUDA or (interpreted and old_numpy)),
    reason="needs CUDA, or numpy < 2.4 and Triton imported with TRITON_INTERPRET=1",
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def make_spec(dim: int, window: int | None = None, softcap: float | None = None) -> AttentionSpec:
    return AttentionSpec(layer=0, scale=1.3 / math.sqrt(dim), window=window, softcap=softcap)


def scaled(spec: AttentionSpec) -> dict[str, float | int | None]:
    """What the kernel is told of a layer."""
    return {"scale": spec.scale, "window": spec.window, "chunk": spec.chunk, "softcap": spec.softcap}


@dataclass
class Step:
    """A batch over a paged cache; each row is (context_len, queries)."""

    rows: list[tuple[int, int]]
    heads: int
    kv_heads: int
    dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    spec: AttentionSpec | None = None
    table_width: int | None = None
    has_sinks: bool = False

    def __post_init__(self):
        torch.manual_seed(sum(context for context, _ in self.rows) + self.heads + self.dim)
        self.spec = self.spec or make_spec(self.dim)
        counts = [-(-context // self.block_size) for context, _ in self.rows]
        poisoned = sum(counts)  # the last block; entries that must not be used point to it
        free = torch.randperm(poisoned, dtype=torch.int32)
        width = self.table_width or max(1, *counts)
        self.block_table = torch.full((len(counts), width), poisoned, dtype=torch.int32)
        self.cache = torch.full(
            (2, self.kv_heads, (poisoned + 1) * self.block_size, self.dim), math.nan, dtype=self.dtype, device=DEVICE
        )
        self.k, self.v = [], []
        for b, ((context, count), blocks) in enumerate(zip(self.rows, free.split(counts), strict=True)):
            kv = torch.randn(context, 2, self.kv_heads, self.dim, device=DEVICE).to(self.dtype)
            first_seen = self.spec.first_key(max(0, context - count))
            seen = torch.arange(first_seen, context)
            self.block_table[b, seen // self.block_size] = blocks[seen // self.block_size]
            slots = blocks[seen // self.block_size].long() * self.block_size + seen % self.block_size
            self.cache[:, :, slots.to(DEVICE)] = kv[first_seen:].permute(1, 2, 0, 3)
            self.k.append(kv[:, 0])
            self.v.append(kv[:, 1])
        self.starts = starts = list(accumulate((count for _, count in self.rows), initial=0))
        self.query_start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        self.context_len = torch.tensor([c for c, _ in self.rows], dtype=torch.int32, device=DEVICE)
        self.block_table = self.block_table.to(DEVICE)
        fused = torch.randn(starts[-1], self.heads + 2 * self.kv_heads, self.dim, device=DEVICE).to(self.dtype)
        self.q = fused[:, : self.heads]
        self.sinks = torch.randn(self.heads, device=DEVICE) if self.has_sinks else None

    @property
    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.spec.values is None:
            return self.cache[0], self.cache[1]
        return self.cache[0], self.cache[0, ..., : self.spec.values]

    def run(self, **overrides) -> torch.Tensor:
        arguments = {
            "query_start": self.query_start,
            "context_len": self.context_len,
            "block_table": self.block_table,
            "block_size": self.block_size,
            **scaled(self.spec),
            "sinks": self.sinks,
            "max_query_len": max(count for _, count in self.rows),
        }
        return kernels.paged_attention(self.q, *self.caches, **(arguments | overrides))

    def expected(self) -> torch.Tensor:
        parts = []
        for b, (context, _) in enumerate(self.rows):
            q = self.q[self.starts[b] : self.starts[b + 1]]
            v = self.v[b] if self.spec.values is None else self.k[b][..., : self.spec.values]
            nothing = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64, device=DEVICE)
            parts.append(reference(q, self.k[b], v, self.spec, self.sinks) if context else nothing)
        return torch.cat(parts)

    def part(self, row: int, first: int, last: int, context_len: int) -> torch.Tensor:
        """Only queries first..last of the pack, which are the newest of a row's `context_len` positions."""
        return kernels.paged_attention(
            self.q[first:last],
            *self.cache,
            query_start=torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE),
            context_len=torch.tensor([context_len], dtype=torch.int32, device=DEVICE),
            block_table=self.block_table[row : row + 1],
            block_size=self.block_size,
            **scaled(self.spec),
            max_query_len=max(2, last - first),  # never cut along the keys, as in a step of longer rows
        )

    def check(self, **overrides) -> torch.Tensor:
        out = self.run(**overrides)
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(out.double(), self.expected(), rtol=tolerance, atol=tolerance)
        return out


DECODE = [(1, 1), (45, 1), (70, 1)]
MIXED = [(37, 1), (19, 19), (61, 7), (1, 1), (33, 10)]


BASE = {"heads": 4, "kv_heads": 2, "dim": 16}
SHAPES = {
    **{f"{group} query heads a KV head": {"heads": 2 * group, "dim": 32} for group in (1, 2, 4, 8)},
    **{f"heads {h}:{kv}": {"heads": h, "kv_heads": kv} for h, kv in ((7, 1), (6, 2), (20, 1))},
    **{f"head dim {dim}": {"dim": dim} for dim in (8, 64, 80, 96, 128, 256)},
    **{f"block size {size}": {"block_size": size} for size in (8, 12, 64)},
    **{f"window {window}": {"spec": make_spec(16, window=window)} for window in (1, 7, 16, 33, 500)},
    **{f"chunks of {size}": {"spec": AttentionSpec(layer=0, scale=0.3, chunk=size)} for size in (1, 16, 20, 500)},
    "sinks": {"has_sinks": True},
    "sinks and a window": {"has_sinks": True, "spec": make_spec(16, window=7)},
    **{
        f"{values} of {dim} channels are values, {heads} heads": {
            "heads": heads,
            "kv_heads": 1,
            "dim": dim,
            "spec": AttentionSpec(layer=0, scale=0.2, values=values),
        }
        for heads, values, dim in ((3, 24, 28), (32, 64, 80))
    },
    "float16": {"dim": 64, "dtype": torch.float16},
    "bfloat16": {"dim": 64, "dtype": torch.bfloat16},
}
"""What differs from BASE."""


@needs_triton
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(shape, rows):
    if shape.get("dtype") == torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter multiplies bfloat16 tiles wrongly")
    step = Step(rows, **{**BASE, **shape})
    step.check()
    if rows == DECODE and (step.spec.window or step.has_sinks or step.spec.values or step.spec.chunk):
        step.check(num_splits=4)


@needs_triton
@pytest.mark.parametrize("window", [None, 20])
def test_softcap(window):
    spec = make_spec(16, window=window, softcap=1.5)
    for rows in (DECODE, MIXED):
        step = Step(rows, **BASE, spec=spec)
        out = step.check()
        assert not torch.allclose(out, step.run(**scaled(make_spec(16, window=window))), atol=1e-3)  # the cap is felt
    Step(DECODE, **BASE, spec=AttentionSpec(layer=0, scale=40.0, softcap=2.0)).check()  # scores saturate


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 8, 16])
def test_decode_does_not_depend_on_the_number_of_splits(splits):
    step = Step([(1, 1), (200, 1), (0, 1), (33, 1), (32, 1)], heads=2, kv_heads=1, dim=80)
    torch.testing.assert_close(step.check(num_splits=splits), step.run(num_splits=4), rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("splits", [1, 4])
def test_padding_rows_give_zeros(splits):
    step = Step([(40, 1), (0, 1), (9, 1), (0, 1)], heads=4, kv_heads=2, dim=32)
    out = step.check(num_splits=splits)
    assert out[[1, 3]].count_nonzero() == 0
    assert Step([(40, 3), (0, 1), (0, 1)], heads=4, kv_heads=2, dim=32).check()[3:].count_nonzero() == 0


@needs_triton
def test_rows_without_queries_are_passed_over():
    Step([(40, 0), (12, 5), (3, 0), (3, 0), (30, 30), (7, 0)], heads=4, kv_heads=2, dim=16).check()
    Step([(40, 0), (12, 1), (3, 0), (30, 1)], heads=4, kv_heads=2, dim=16).check()


@needs_triton
def test_a_row_does_not_depend_on_its_batch():
    step = Step([(61, 9), (37, 1), (90, 20)], heads=4, kv_heads=2, dim=32)
    whole = step.run()
    for row, (first, last) in enumerate(pairwise(step.starts)):
        assert torch.equal(step.part(row, first, last, step.rows[row][0]), whole[first:last])


@pytest.fixture
def equal_lines(monkeypatch):
    """In the interpreter, products of tiles whose lines are summed alike: the BLAS below numpy sums the first and the
    last lines of a matrix in different orders, tensor cores don't."""
    if not CUDA:
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: (a[..., None] * b[..., None, :, :]).sum(-2, dtype=dtype)
        )


@needs_triton
def test_a_prompt_in_chunks_gives_the_same_bits(equal_lines):
    step = Step([(55, 55)], heads=4, kv_heads=2, dim=32)
    whole = step.check()
    chunks = [step.part(0, first, last, last) for first, last in pairwise((0, 13, 40, 55))]
    assert torch.equal(torch.cat(chunks), whole)


@needs_triton
@pytest.mark.parametrize("window, softcap", [(None, None), (9, None), (40, 2.0)])
@pytest.mark.parametrize("dim, kv_heads", [(32, 2), (80, 1)])
def test_fresh_rows_give_the_same_bits_as_their_keys_in_the_cache(dim, kv_heads, window, softcap):
    step = Step([(70, 70), (1, 1), (33, 33)], heads=4, kv_heads=kv_heads, dim=dim, spec=make_spec(dim, window, softcap))
    k, v = torch.cat([torch.stack([k, v], 1) for k, v in zip(step.k, step.v, strict=True)]).unbind(1)
    place = {"query_start": step.query_start, "max_query_len": 70}
    expected = step.check()
    for keys, values in ((k, v), (k.contiguous(), v), (k, v.transpose(0, 1).contiguous().transpose(0, 1))):
        assert torch.equal(fresh_attention(step.q, keys, values, **place, **scaled(step.spec)), expected)


def test_what_computes_fresh_rows():
    def chosen(tokens, rows, longest, dim=128, dtype=torch.bfloat16, window=None, softcap=None, capability=(9, 0)):
        return which(tokens, rows, longest, dim, dtype, window, softcap, capability)

    assert chosen(8 * 2048, 8, 2048) == chosen(2048, 1, 2048, window=2048) == chosen(4096, 8, 512, 64) == "cudnn"
    others = [
        chosen(8 * 2048 - 1, 8, 2048),  # ragged
        chosen(2 * 2000, 2, 2000),  # a length of its own
        chosen(512, 1, 512),  # short
        chosen(2048, 1, 2048, window=2000),
        chosen(2048, 1, 2048, softcap=50.0),
        chosen(2048, 1, 2048, 256),
        chosen(2048, 1, 2048, dtype=torch.float32),
        chosen(2048, 1, 2048, capability=(8, 0)),
    ]
    assert set(others) == {"triton"}


@needs_triton
@pytest.mark.parametrize("name", ["sinks", "chunks of 20", "64 of 80 channels are values, 32 heads"])
def test_fresh_rows_with_sinks_chunks_or_latents(name):
    step = Step([(70, 70), (1, 1), (33, 33)], **{**BASE, **SHAPES[name]})
    k, v = torch.cat(step.k), torch.cat(step.v)
    values = v if step.spec.values is None else k[..., : step.spec.values]
    place = {"query_start": step.query_start, "max_query_len": 70, "sinks": step.sinks}
    assert torch.equal(fresh_attention(step.q, k, values, **place, **scaled(step.spec)), step.check())


@needs_triton
def test_a_wider_block_table_changes_nothing():
    narrow = Step(DECODE, heads=4, kv_heads=2, dim=32)
    wide = Step(DECODE, heads=4, kv_heads=2, dim=32, table_width=40)
    assert torch.equal(narrow.run(), wide.run())


@needs_triton
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_rows_of_a_larger_block_table(rows):
    step = Step(rows, heads=4, kv_heads=2, dim=32)
    poisoned = step.block_table.new_full((9, step.block_table.shape[1]), step.cache.shape[2] // step.block_size - 1)
    table_rows = torch.tensor([7, 2, 8, 0, 5], dtype=torch.int32, device=DEVICE)[: len(rows)]
    poisoned[table_rows.long()] = step.block_table
    assert torch.equal(step.run(block_table=poisoned, table_rows=table_rows), step.run())


@needs_triton
def test_no_tokens_and_no_heads():
    step = Step(DECODE, heads=4, kv_heads=2, dim=32)
    step.q = step.q[:, :0]
    assert step.run().shape == (3, 0, 32)
    step.cache = step.cache[:, :0]
    assert step.run().shape == (3, 0, 32)
    nothing = torch.empty(0, 2, 32, device=DEVICE)
    store_kv(nothing, nothing, nothing, nothing, torch.empty(0, dtype=torch.int64, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("heads, dim", [(1, 16), (3, 80), (8, 32)])
def test_store_kv_writes_its_slots_and_no_other(heads, dim):
    torch.manual_seed(0)
    qkv = torch.randn(6, 4 + 2 * heads, dim, device=DEVICE)
    k, v = qkv[:, 4 : 4 + heads], qkv[:, 4 + heads :]
    cache = torch.randn(2, heads, 20, dim, device=DEVICE)
    expected = cache.clone()
    slots = [3, -1, 19, 0, -1, 8]
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[0, :, slot], expected[1, :, slot] = k[token], v[token]
    store_kv(k, v, *cache, torch.tensor(slots, device=DEVICE))
    assert torch.equal(cache, expected)


FP8 = torch.float8_e4m3fn


@needs_triton
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("shape", ["float16", "window 7", "24 of 28 channels are values, 3 heads"])
def test_a_cache_in_fp8_is_read_as_the_numbers_it_holds(shape, rows):
    step = Step(rows, **{**BASE, **SHAPES[shape]})
    kept = step.cache.float().to(FP8)
    step.cache = kept.to(step.dtype)
    expected = step.run()
    step.cache = kept
    assert torch.equal(step.run(), expected)


def roundable(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are rounded to fp8 rightly: any but in the interpreter, which gets only such as need no rounding."""
    return x if CUDA else x.float().clamp(-448, 448).to(FP8).to(x.dtype)


@needs_triton
def test_store_kv_in_fp8():
    torch.manual_seed(0)
    k, v = roundable(torch.randn(2, 3, 2, 80, device=DEVICE) * 300)
    k[0, 0, 0] = 1e5
    cache = torch.zeros(2, 2, 8, 80, device=DEVICE).to(FP8)
    store_kv(k, v, *cache, torch.tensor([5, -1, 2], device=DEVICE), scales=(1.0, 4.0))
    want = torch.zeros(2, 2, 8, 80, device=DEVICE).to(FP8)
    for slot, token in ((5, 0), (2, 2)):
        want[0, :, slot] = k[token].clamp(-448, 448).to(FP8)
        want[1, :, slot] = (v[token] / 4).clamp(-448, 448).to(FP8)
    assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8))


def test_the_number_of_splits_is_a_power_of_two_that_falls_as_rows_grow():
    chosen = [kernels._num_splits(rows, 8, 132) for rows in range(1, 300)]
    assert chosen[0] == 16 and chosen[15] == 1
    assert chosen == sorted(chosen, reverse=True)
    assert all(splits & (splits - 1) == 0 for splits in chosen)
    assert kernels._num_splits(1, 1, 132) == 32 and kernels._num_splits(5, 5, 100) == 4


def test_without_triton_generation_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(jit, "triton", None)
    step = Step(DECODE, heads=4, kv_heads=2, dim=32)
    with pytest.raises(ResourceError, match="Triton"):
        step.run()


@needs_cuda
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window, softcap", [(None, None), (300, 20.0)])
def test_long_prompts_in_chunks_and_fresh_give_the_same_bits_on_cuda(dim, window, softcap):
    spec = make_spec(dim, window, softcap)
    step = Step([(1700, 1700)], heads=16, kv_heads=8, dim=dim, dtype=torch.bfloat16, spec=spec)
    whole = step.check()
    cuts = (0, 130, 131, 700, 1280, 1700)
    assert torch.equal(torch.cat([step.part(0, first, last, last) for first, last in pairwise(cuts)]), whole)
    place = {"query_start": step.query_start, "max_query_len": 1700}
    assert torch.equal(fresh_attention(step.q, step.k[0], step.v[0], **place, **scaled(spec)), whole)


@needs_cuda
@pytest.mark.parametrize("rows", [[(1700, 1), (300, 1)], [(1700, 1700), (300, 40)]], ids=["decode", "prompts"])
@pytest.mark.parametrize("heads", [16, 128])
def test_latents_of_the_usual_size_on_cuda(heads, rows):
    spec = AttentionSpec(layer=0, scale=0.05, values=512)
    Step(rows, heads, 1, 576, dtype=torch.bfloat16, spec=spec).check()


@needs_cuda
@pytest.mark.parametrize("heads, kv_heads, dim", [(16, 8, 128), (8, 8, 64), (14, 2, 64)])
@pytest.mark.parametrize("lengths", [[512] * 5, [2048], [512, 2048, 3]])
def test_fresh_rows_on_cuda(lengths, heads, kv_heads, dim):
    step = Step([(length, length) for length in lengths], heads, kv_heads, dim, dtype=torch.bfloat16)
    kv = torch.cat([torch.stack([k, v], 1) for k, v in zip(step.k, step.v, strict=True)])
    place = {"query_start": step.query_start, "max_query_len": max(lengths)}
    out = fresh_attention(step.q, kv[:, 0], kv[:, 1], **place, **scaled(step.spec))
    torch.testing.assert_close(out.double(), step.expected(), rtol=1.6e-2, atol=1.6e-2)


@needs_cuda
@pytest.mark.parametrize("splits", [1, 8])
def test_dependent_launch_gives_the_same_bits(splits):
    if not jit.launches_dependents(torch.device(DEVICE, 0)):
        pytest.skip("needs compute capability 9.0")
    for rows in ([(900, 1), (0, 1), (33, 1)], [(400, 300), (7, 7)]):
        step = Step(rows, heads=16, kv_heads=8, dim=128, dtype=torch.bfloat16)
        expected = step.run(num_splits=splits)
        for _ in range(50):
            assert torch.equal(step.run(num_splits=splits, pdl=True), expected)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window, softcap", [(None, None), (300, 20.0)])
def test_long_contexts_on_cuda(dtype, dim, window, softcap):
    spec = make_spec(dim, window, softcap)
    decode = [(context, 1) for context in (3000, 1, 511, 64, 2049)]
    Step(decode, heads=16, kv_heads=4, dim=dim, dtype=dtype, spec=spec).check()
    mixed = [(1500, 700), (900, 1), (130, 130), (2000, 33), (1, 1)]
    Step(mixed, heads=16, kv_heads=4, dim=dim, dtype=dtype, spec=spec).check()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("lengths", [[700, 700], [513, 40, 900, 1]], ids=["even", "ragged"])
def test_packed_attention_on_cuda(dtype, dim, lengths):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    for window, softcap in ((None, None), (200, None), (None, 20.0), (200, 20.0)):
        check_packed(lengths, 8, 2, make_spec(dim, window, softcap), dim=dim, dtype=dtype, tolerance=tolerance)


@needs_cuda
@pytest.mark.parametrize("rows", [2, 64], ids=["split", "whole"])
def test_a_captured_decode_step_gives_the_same_bits(rows):
    """Captured with padding rows only, replayed with other lengths, tables, queries and keys in the same tensors."""
    contexts = [(17 * b % 900 + 1, 1) for b in range(rows - 1)] + [(0, 1)]
    step = Step(contexts, heads=16, kv_heads=8, dim=128, dtype=torch.bfloat16, table_width=64)
    k, v = torch.randn(2, rows, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.full((rows,), -1, device=DEVICE)
    context_len, block_table = step.context_len.clone(), step.block_table.clone()
    last = context_len[:-1].long() - 1
    new_slots = block_table[:-1].gather(1, (last // 16)[:, None])[:, 0].long() * 16 + last % 16

    def attend():
        store_kv(k, v, *step.cache, slots)
        return step.run(context_len=context_len, block_table=block_table)

    context_len.zero_()
    block_table.zero_()
    attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    graph.replay()
    assert captured.count_nonzero() == 0
    context_len.copy_(step.context_len)
    block_table.copy_(step.block_table)
    slots[:-1] = new_slots
    graph.replay()
    replayed = captured.clone()
    for b in range(rows - 1):
        step.k[b][-1], step.v[b][-1] = k[b], v[b]
    torch.testing.assert_close(replayed.double(), step.expected(), rtol=1.6e-2, atol=1.6e-2)
    assert torch.equal(attend(), replayed)
    assert replayed[-1].count_nonzero() == 0


@needs_cuda
@pytest.mark.skipif(CUDA and torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GiB of free GPU memory")
def test_caches_of_more_than_2_to_the_31_elements():
    slots = 20_000_000
    cache = torch.empty(2, slots, 128, dtype=torch.bfloat16, device=DEVICE)  # both the keys and the values
    k = torch.randn(40, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    block_table = torch.tensor([[slots // 16 - 1, 0, slots // 16 - 7]], dtype=torch.int32, device=DEVICE)
    position = torch.arange(40, device=DEVICE)
    store_kv(k, k, cache, cache, block_table[0, position // 16].long() * 16 + position % 16)
    q, spec = torch.randn(40, 4, 128, dtype=torch.bfloat16, device=DEVICE), make_spec(128)
    for count in (1, 40):
        out = kernels.paged_attention(
            q[-count:],
            cache,
            cache,
            query_start=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
            context_len=torch.tensor([40], dtype=torch.int32, device=DEVICE),
            block_table=block_table,
            block_size=16,
            **scaled(spec),
            max_query_len=count,
        )
        torch.testing.assert_close(out.double(), reference(q[-count:], k, k, spec), rtol=1.6e-2, atol=1.6e-2)


@needs_cuda
def test_no_launch_waits_for_the_device():
    decode = Step(DECODE, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    mixed = Step(MIXED, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    _, qkv = packed_case([5, 1, 30], 4, 2, 64, torch.bfloat16)
    packed = PackedAttention([5, 1, 30], DEVICE)
    decode.run(), mixed.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode.run(), mixed.run()
        packed.attend(decode.spec, *qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- sums over GPUs

REDUCE_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


class SharedMemory:
    """Symmetric buffers of all ranks in one process; those of the others hold what they have written for a call."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, max_rows: int, blocks: int):
        self.size, self.width = size, width
        self.halves = [torch.full((2, max_rows, width), math.nan, dtype=dtype, device=DEVICE) for _ in range(size)]
        self.flags = [torch.zeros((blocks, size), dtype=torch.int32, device=DEVICE) for _ in range(size)]
        self.epochs = [torch.zeros(blocks, dtype=torch.int32, device=DEVICE) for _ in range(size)]
        addresses = [
            torch.tensor([one.data_ptr() for one in each], dtype=torch.int64, device=DEVICE)
            for each in (self.halves, self.flags)
        ]
        self.peers = [
            Peers(rank, size, width, dtype, max_rows, blocks, *addresses, self.epochs[rank]) for rank in range(size)
        ]

    def call(self, rank: int, count: int, inputs: list[torch.Tensor], **options) -> torch.Tensor:
        """One rank's part of the call of number `count`, from 1, with that of the others done by hand."""
        for peer, x in enumerate(inputs):
            if peer != rank:
                self.halves[peer][count % 2, : x.shape[0]] = x
                self.flags[rank][:, peer] = 2 * count + 1
        return (all_reduce_add_norm if "residual" in options else all_reduce)(
            inputs[rank], peers=self.peers[rank], **options
        )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, width, rows", [(2, 64, 1), (2, 72, 11), (3, 96, 4), (4, 129, 9)])
def test_a_rank_sums_what_all_have_written(size, width, rows, dtype):
    torch.manual_seed(0)
    for rank in range(size):
        memory = SharedMemory(size, width, dtype, max_rows=12, blocks=4)
        for count in (1, 2, 3):
            inputs = [torch.randn(rows, 2 * width, device=DEVICE)[:, :width].to(dtype) for _ in range(size)]
            expected = sum(x.double() for x in inputs)
            close(memory.call(rank, count, inputs), expected, REDUCE_TOLERANCE[dtype])
            programs = min(rows, 4)
            assert memory.epochs[rank].tolist() == [count] * programs + [0] * (4 - programs)
            told = [memory.flags[peer][:programs, rank].tolist() for peer in range(size) if peer != rank]
            assert told == [[2 * count] * programs] * (size - 1)


@needs_triton
@pytest.mark.parametrize("size, rank, rows", [(2, 0, 11), (2, 1, 11), (4, 2, 12)])
def test_in_two_shots_a_rank_sums_its_rows_and_reads_the_others(size, rank, rows):
    """The others' sums are not there: their rows come as they were written."""
    memory = SharedMemory(size, 40, torch.float32, max_rows=12, blocks=2)
    inputs = [torch.randn(rows, 40, device=DEVICE) for _ in range(size)]
    turns = torch.arange(rows) // 2
    expected = sum(x.double() for x in inputs)
    for peer, x in enumerate(inputs):
        if peer != rank:
            expected[turns % size == peer] = x[turns % size == peer].double()
    close(memory.call(rank, 1, inputs, two_shot=True), expected, 1e-6)
    assert memory.flags[(rank + 1) % size][:, rank].tolist() == [3, 3]


@needs_triton
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_over_ranks_with_the_addition_and_norm_behind_it(dtype, zero_centred):
    memory = SharedMemory(2, 80, dtype, max_rows=8, blocks=4)
    inputs = [torch.randn(6, 80, device=DEVICE).to(dtype) for _ in range(2)]
    residual = torch.randn(6, 80, device=DEVICE).to(dtype)
    weight = torch.randn(80, device=DEVICE).to(dtype)
    expected = residual.double() + inputs[0].double() + inputs[1].double()
    normed = memory.call(1, 1, inputs, residual=residual, weight=weight, eps=1e-6, zero_centred=zero_centred)
    close(residual, expected, REDUCE_TOLERANCE[dtype])
    stored = residual.double()
    scale = weight.double() + zero_centred
    close(normed, stored * (stored.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale, REDUCE_TOLERANCE[dtype])


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
