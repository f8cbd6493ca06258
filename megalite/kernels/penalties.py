"""Repetition, frequency and presence penalties of n rows on a GPU, as Triton kernels (vLLM's and CTRL's formulas), and
the copy of logits that they change, in which a mask may rule out ids.

A row's own tokens are the list of ids that they change; beside each stands how often it is in the output so far. A
row's parameters are those of `kernels/sampling.py`'s table; rows without penalties are left at once.
"""

from __future__ import annotations

from torch import Tensor

from megalite.kernels.jit import cdiv, jit, require_triton, tl
from megalite.kernels.weights import _load

CHUNK = 8192
"""Logits that one program copies."""
PLACES = 512
"""Tokens of a row that are looked at together."""


@jit
def _strengths(table, row):
    """Repetition, frequency and presence penalty of a row, and whether it has any."""
    place = table + row * 10 + 7
    repetition = tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)
    frequency = tl.load(place + 1).to(tl.float64, bitcast=True).to(tl.float32)
    presence = tl.load(place + 2).to(tl.float64, bitcast=True).to(tl.float32)
    return repetition, frequency, presence, (repetition != 1) | (frequency != 0) | (presence != 0)


@jit
def _copy_kernel(logits, stride, out, vocab, CHUNK: tl.constexpr):
    """One program a chunk of a row."""
    n = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(out + n * vocab + ids, _load(logits, n, stride, ids, vocab), mask=ids < vocab)


@jit
def _copy_allowed_kernel(logits, stride, out, vocab, masks, words, which, CHUNK: tl.constexpr):
    """The same, with -inf for ids whose bit in the row's mask is not set."""
    n = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = tl.load(which + n)
    bits = tl.load(masks + mask * words + ids // 32, mask=(ids < vocab) & (mask >= 0), other=-1)
    x = _load(logits, n, stride, ids, vocab)
    tl.store(out + n * vocab + ids, tl.where((bits >> (ids % 32)) & 1 == 1, x, -float("inf")), mask=ids < vocab)


@jit
def _penalise_kernel(
    source, stride, out, rows, positions, table, tokens, tokens_stride, times, vocab, PLACES: tl.constexpr
):
    """One program some places of a row. Equal tokens store equal values."""
    n = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + n)
    repetition, frequency, presence, any_penalty = _strengths(table, row)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    position = tl.load(positions + n)
    if any_penalty & (tl.program_id(0) * PLACES < position):
        there = place < position
        ids = tl.load(tokens + row * tokens_stride + place, mask=there, other=0)
        said = tl.load(times + row * tokens_stride + place, mask=there, other=0)
        x = _load(source, n, stride, ids, vocab)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x = x - frequency * said.to(tl.float32) - tl.where(said > 0, presence, 0.0)
        tl.store(out + n * vocab + ids, x, mask=there)


@jit
def _count_kernel(rows, positions, new, table, tokens, tokens_stride, times, PLACES: tl.constexpr):
    """One program a row."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + n)
    repetition, frequency, presence, any_penalty = _strengths(table, row)
    if any_penalty:
        position = tl.load(positions + n)
        prompt = tl.load(table + row * 10 + 2)
        own = tl.load(new + n)
        said = tl.zeros([PLACES], tl.int32)
        for start in range(0, position, PLACES):
            place = start + tl.arange(0, PLACES)
            at = row * tokens_stride + place
            same = (place < position) & (tl.load(tokens + at, mask=place < position, other=-1) == own)
            tl.store(times + at, tl.load(times + at, mask=same, other=0) + 1, mask=same)
            said += (same & (place >= prompt)).to(tl.int32)
        tl.store(times + row * tokens_stride + position, 1 + tl.sum(said, 0))


def copy(logits: Tensor, out: Tensor) -> None:
    """Logits [n, V] of any float dtype to `out` [n, V], contiguous float32; none above 2**100."""
    n, vocab = logits.shape
    assert logits.stride(1) == 1 and out.is_contiguous()
    if n:
        require_triton()
        grid = (cdiv(vocab, CHUNK), n)
        _copy_kernel[grid](logits, logits.stride(0), out, vocab, CHUNK=CHUNK, num_warps=8)


def copy_allowed(logits: Tensor, out: Tensor, masks: Tensor, which: Tensor) -> None:
    """As `copy`, with -inf for ids that a row's mask rules out.

    `masks` int32 [m, words], bit i of word j set: token 32 * j + i is allowed; `which` int32 [n]: the mask of each row,
    -1: all ids are allowed.
    """
    n, vocab = logits.shape
    assert logits.stride(1) == 1 and out.is_contiguous() and masks.is_contiguous()
    assert masks.shape[1] * 32 >= vocab and masks.numel() < 2**31
    if n:
        require_triton()
        grid = (cdiv(vocab, CHUNK), n)
        _copy_allowed_kernel[grid](
            logits, logits.stride(0), out, vocab, masks, masks.shape[1], which, CHUNK=CHUNK, num_warps=8
        )


def penalise(
    source: Tensor,
    out: Tensor,
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    tokens: Tensor,
    times: Tensor,
    most: int,
) -> None:
    """Put what the logits `source` [n, V] of tokens in their rows become into `out` [n, V], another tensor.

    `rows` int64 [n]: of `table` (see `sampling.choose`), of `tokens` and `times`, int32 [rows, max_len]. `positions`
    int64 [n], at most `most`: where each row's new token will stand.
    """
    n, vocab = out.shape
    assert tokens.stride() == times.stride() and source.stride(1) == 1 and out.is_contiguous()
    if n and most:
        require_triton()
        _penalise_kernel[(cdiv(most, PLACES), n)](
            *(source, source.stride(0), out, rows, positions, table, tokens, tokens.stride(0), times, vocab),
            PLACES=PLACES,
        )


def count(rows: Tensor, positions: Tensor, ids: Tensor, table: Tensor, tokens: Tensor, times: Tensor) -> None:
    """Note in `times` that rows get the tokens `ids` int64 [n]; the rest as in `penalise`."""
    assert tokens.stride() == times.stride()
    if len(rows):
        require_triton()
        _count_kernel[(len(rows),)](
            rows, positions, ids, table, tokens, tokens.stride(0), times, PLACES=PLACES, num_warps=4
        )
