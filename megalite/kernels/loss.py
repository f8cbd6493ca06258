"""Softmax over logits on CUDA, as Triton kernels that read them once: its statistics, and its gradient in their place.

The maximum and the sum of exponentials of a row are kept together while it is read (arXiv 1805.02867). A row's logits
are z = cap * tanh(x / cap) / temperature of what is stored, x; all arithmetic is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, next_power_of_2, require_triton, tl

READ, WRITTEN = 8192, 4096
"""Columns of a row that a program of the first and of the second kernel works on at a time, at most."""


@jit
def _logits(x, scale, cap, CAPPED: tl.constexpr):
    """The logits of stored numbers; `scale` is 1 / temperature, and capped logits are `cap` at most before it."""
    if CAPPED:
        x = (2 / (1 + tl.exp(-2 * (x / cap))) - 1) * cap  # tanh
    return x * scale


@jit
def _statistics_kernel(
    scores, targets, lse, chosen, row_stride, width, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_stride
    column = tl.arange(0, BLOCK)
    x = tl.load(scores + column, mask=column < width, other=0.0).to(tl.float32)
    z = tl.where(column < width, _logits(x, scale, cap, CAPPED), float("-inf"))
    highest = tl.max(z, 0)
    total = tl.sum(tl.exp(z - highest), 0)
    for start in range(BLOCK, width, BLOCK):
        place = start + column
        x = tl.load(scores + place, mask=place < width, other=0.0).to(tl.float32)
        z = tl.where(place < width, _logits(x, scale, cap, CAPPED), float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    target = tl.load(targets + row)
    mine = (target >= 0) & (target < width)
    z = _logits(tl.load(scores + target, mask=mine, other=0.0).to(tl.float32), scale, cap, CAPPED)
    tl.store(lse + row, normaliser)
    tl.store(chosen + row, tl.where(mine, z - normaliser, 0.0))


@jit
def _gradient_kernel(
    scores, targets, lse, slopes, row_stride, width, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scores += row * row_stride + place
    x = tl.load(scores, mask=place < width, other=0.0).to(tl.float32)
    z = _logits(x, scale, cap, CAPPED)
    here = (place == tl.load(targets + row)).to(tl.float32)
    gradient = (here - tl.exp(z - tl.load(lse + row))) * (tl.load(slopes + row) * scale)
    if CAPPED:
        part = z / (scale * cap)  # tanh(x / cap)
        gradient = gradient * (1 - part * part)
    tl.store(scores, gradient.to(scores.dtype.element_ty), mask=place < width)


def softmax_statistics(
    scores: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of stored logits [R, V]: log of each row's sum of exponentials, and the log-probability of its target.

    `targets`: columns, int64 [R]; the log-probability of one outside of 0..V - 1 is 0. float32 [R] both. V is at least
    1 and the last dim contiguous.
    """
    require_triton()
    rows, width = scores.shape
    assert scores.stride(1) == 1 and width > 0
    lse = torch.empty(rows, dtype=torch.float32, device=scores.device)
    chosen = torch.empty_like(lse)
    if rows:
        block = min(READ, next_power_of_2(width))
        _statistics_kernel[(rows,)](
            scores,
            targets,
            lse,
            chosen,
            scores.stride(0),
            width,
            1.0 / temperature,
            softcap or 1.0,
            CAPPED=softcap is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return lse, chosen


def softmax_gradient_(
    scores: Tensor,
    targets: Tensor,
    lse: Tensor,
    slopes: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Overwrite stored logits [R, V] by the gradient of sum(slopes * log-probability of the target); gives `scores`.

    `lse`: log of the sum of exponentials over the whole vocabulary, of which `scores` may be a part; `targets` as
    `softmax_statistics` (none is here where it is outside). float32 [R] and int64 [R].
    """
    require_triton()
    torch.autograd.graph.increment_version(scores)  # whoever saved the logits is told
    rows, width = scores.shape
    assert scores.stride(1) == 1 and lse.is_contiguous() and slopes.is_contiguous() and targets.is_contiguous()
    if scores.numel():
        block = min(WRITTEN, next_power_of_2(width))
        _gradient_kernel[(rows, cdiv(width, block))](
            scores,
            targets,
            lse,
            slopes,
            scores.stride(0),
            width,
            1.0 / temperature,
            softcap or 1.0,
            CAPPED=softcap is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return scores
