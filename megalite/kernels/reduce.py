"""Sums over the GPUs of one host through memory that each of them maps (symmetric memory), as one Triton kernel.

A rank copies its summand into its own symmetric buffer, tells the others, waits for them and reads theirs over the
links: one-shot (every rank sums everything) or two-shot (every rank sums its share of the rows and reads the other
sums). Sums are in float32, in the order of the ranks, rounded once: every rank gets the same bits.

    buffer of a rank    half 0 | half 1 | flags [blocks, ranks]

Calls alternate between the halves, and a program works on the same rows of the buffer whatever their number. So a rank
that has met its peers in one call knows that their programs of the call before are done: it may write to that call's
half in the next one, and one meeting a call is enough (two in two shots). What a call needs to know of the one before
(`epochs`) is in device memory, so calls can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.kernels.jit import jit, next_power_of_2, require_triton, tl

MAX_WIDTH = 16_384
"""Longest row that one program takes at once."""
ELEMENTS_A_WARP = 512


@dataclass(frozen=True)
class Peers:
    """The symmetric buffers of a group's ranks as this rank maps them. Calls come from one stream, alike on all."""

    rank: int
    size: int
    width: int
    """Elements a row."""
    dtype: torch.dtype
    max_rows: int
    blocks: int
    """Programs of a call, the same on every rank: at most so many, all of which fit on the GPU at once."""
    buffers: Tensor
    """Addresses of the ranks' buffers, int64 [size]."""
    flags: Tensor
    """Addresses of their flags, which are int32 [blocks, size] and zero at first; int64 [size]."""
    epochs: Tensor
    """Calls that each program has taken part in, int32 [blocks], zero at first; this rank's own."""

    @staticmethod
    def num_bytes(size: int, width: int, dtype: torch.dtype, max_rows: int, blocks: int) -> tuple[int, int]:
        """Bytes of a rank's two halves, behind which the flags are, and of all."""
        halves = -(-2 * max_rows * width * dtype.itemsize // 16) * 16
        return halves, halves + 4 * blocks * size


@jit
def _row(addresses, rank, offset, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a row of a rank's buffer begins, a multiple of ALIGN bytes: what is loaded as an address tells nothing."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(TYPE)) + offset, ALIGN)


@jit
def _meet(flags, block, epoch, RANK: tl.constexpr, SIZE: tl.constexpr):
    """What this program wrote is seen by the peers' programs of this number, and the other way round."""
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + block * SIZE + RANK, epoch, sem="release", scope="sys")
    own = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + block * SIZE
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            while tl.atomic_add(own + peer, 0, sem="acquire", scope="sys") - epoch < 0:  # right when they wrap around
                pass
    tl.debug_barrier()


@jit
def _sum_kernel(
    x,
    out,
    residual,
    weight,
    eps,
    buffers,
    flags,
    epochs,
    num_rows,
    x_stride,
    half_size,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    NORM: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
):
    """Program b has the rows b, b + MAX_BLOCKS, ..."""
    block = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    epoch = tl.load(epochs + block) + 1
    half = (epoch & 1).to(tl.int64) * half_size
    element: tl.constexpr = x.dtype.element_ty
    turns = tl.cdiv(num_rows - block, MAX_BLOCKS)
    for turn in range(0, turns):
        row = (block + turn * MAX_BLOCKS).to(tl.int64)
        value = tl.load(x + row * x_stride + column, mask=inside)
        mine = _row(buffers, RANK, half + row * DIM, element, ALIGN)
        tl.store(mine + column, value, mask=inside)
    _meet(flags, block, 2 * epoch, RANK, SIZE)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            scale += 1.0
    first: tl.constexpr = RANK if TWO_SHOT else 0
    step: tl.constexpr = SIZE if TWO_SHOT else 1
    for turn in range(first, turns, step):
        row = (block + turn * MAX_BLOCKS).to(tl.int64)
        total = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(SIZE):
            theirs = _row(buffers, peer, half + row * DIM, element, ALIGN)
            total += tl.load(theirs + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if NORM:
            before = tl.load(residual + row * DIM + column, mask=inside, other=0.0).to(tl.float32)
            stored = (before + total).to(element)
            tl.store(residual + row * DIM + column, stored, mask=inside)
            value = stored.to(tl.float32)
            total = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps) * scale
        if TWO_SHOT:
            mine = _row(buffers, RANK, half + row * DIM, element, ALIGN)
            tl.store(mine + column, total.to(element), mask=inside)
        else:
            tl.store(out + row * DIM + column, total.to(out.dtype.element_ty), mask=inside)
    if TWO_SHOT:
        _meet(flags, block, 2 * epoch + 1, RANK, SIZE)
        for turn in range(0, turns):
            row = (block + turn * MAX_BLOCKS).to(tl.int64)
            owner = _row(buffers, turn % SIZE, half + row * DIM, element, ALIGN)
            value = tl.load(owner + column, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + row * DIM + column, value, mask=inside)
    tl.store(epochs + block, epoch)


def all_reduce(x: Tensor, peers: Peers, *, two_shot: bool = False) -> Tensor:
    """The sum over the peers of x [R, width], R at most `max_rows`, with contiguous rows -> a new tensor [R, width]."""
    return _launch(x, peers, two_shot=two_shot)


def all_reduce_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: Peers, *, zero_centred: bool = False
) -> Tensor:
    """residual += the sum over the peers of x, in place; returns residual / rms(residual) * weight.

    x and residual [R, width], residual contiguous; weight [width], `zero_centred`: 1 + weight. RMSNorm:
    arXiv 1910.07467. One shot: every rank makes all of it.
    """
    assert residual.is_contiguous() and residual.shape == x.shape and residual.dtype == x.dtype
    return _launch(x, peers, residual=residual, weight=weight, eps=eps, zero_centred=zero_centred)


def _launch(
    x: Tensor,
    peers: Peers,
    *,
    two_shot: bool = False,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    zero_centred: bool = False,
) -> Tensor:
    require_triton()
    rows, width = x.shape
    assert x.stride(1) == 1 and x.dtype == peers.dtype and width == peers.width <= MAX_WIDTH and rows <= peers.max_rows
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    block = next_power_of_2(width)
    _sum_kernel[(min(rows, peers.blocks),)](
        x,
        out,
        x if residual is None else residual,
        x if weight is None else weight,
        eps,
        peers.buffers,
        peers.flags,
        peers.epochs,
        rows,
        x.stride(0),
        peers.max_rows * width,
        RANK=peers.rank,
        SIZE=peers.size,
        DIM=width,
        BLOCK=block,
        ALIGN=16 if width * x.element_size() % 16 == 0 else x.element_size(),
        MAX_BLOCKS=peers.blocks,
        TWO_SHOT=two_shot,
        NORM=weight is not None,
        ZERO_CENTRED=zero_centred,
        num_warps=min(16, max(4, block // ELEMENTS_A_WARP)),
    )
    return out
