"""Rows whose columns lie on the GPUs of one host, put together through memory that each of them maps, as one kernel.

A rank copies its part of the rows into its own symmetric buffer, meets the others and reads theirs, by the protocol of
`reduce`: a program works on the same slots of the buffer in every call, calls alternate between its halves, and what a
call needs to know of the one before is in device memory. The kernel knows without the host which rows are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, require_triton, tl
from megalite.kernels.reduce import Peers, _meet, _row
from megalite.kernels.weights import _parameters

SLOT = 8192
"""Bytes of a row that a program copies at once."""


@jit
def _wanted(rows, table, row, DRAWN: tl.constexpr):
    """1 if a row is gathered, else 0: with DRAWN only those that draw their tokens."""
    if DRAWN:
        top_k, least, top_p, temperature = _parameters(table, tl.load(rows + row))
        wanted = (temperature > 0).to(tl.int32)
    else:
        wanted = (row >= 0).to(tl.int32)
    return wanted


@jit
def _width(begins, width, rank, ALIGN: tl.constexpr, EVEN: tl.constexpr):
    """Width of a rank's part."""
    found = width
    if not EVEN:
        found = tl.load(begins + rank + 1) - tl.load(begins + rank)
    return tl.multiple_of(found, ALIGN)


@jit
def _gather_kernel(
    x,
    out,
    begins,
    rows,
    table,
    buffers,
    flags,
    epochs,
    width,
    num_rows,
    x_stride,
    out_stride,
    half_size,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr,
    DRAWN: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program b has the pieces b, b + MAX_BLOCKS, ... of all rows; PIECES make a rank's part of a row, whose widths
    ALIGN divides."""
    block = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    epoch = tl.load(epochs + block) + 1
    half = (epoch & 1).to(tl.int64) * half_size
    element: tl.constexpr = x.dtype.element_ty
    turns = tl.cdiv(num_rows * PIECES - block, MAX_BLOCKS)
    own = _width(begins, width, RANK, ALIGN, EVEN)
    some = block * 0
    for turn in range(0, turns):
        piece = block + turn * MAX_BLOCKS
        row = (piece // PIECES).to(tl.int64)
        wanted = _wanted(rows, table, row, DRAWN)
        some += wanted
        column = (piece % PIECES) * CHUNK + lane
        mask = (column < own) & (wanted > 0)
        value = tl.load(x + row * x_stride + column, mask=mask)
        tl.store(_row(buffers, RANK, half + piece.to(tl.int64) * CHUNK, element, 16) + lane, value, mask=mask)
    if some > 0:  # on all ranks alike
        _meet(flags, block, 2 * epoch, RANK, SIZE)
        for turn in range(0, turns):
            piece = block + turn * MAX_BLOCKS
            row = (piece // PIECES).to(tl.int64)
            wanted = _wanted(rows, table, row, DRAWN)
            column = (piece % PIECES) * CHUNK + lane
            for peer in tl.static_range(SIZE):
                begin = peer * width
                if not EVEN:
                    begin = tl.load(begins + peer)
                mask = (column < _width(begins, width, peer, ALIGN, EVEN)) & (wanted > 0)
                theirs = _row(buffers, peer, half + piece.to(tl.int64) * CHUNK, element, 16)
                value = tl.load(theirs + lane, mask=mask, cache_modifier=".cg")
                tl.store(out + row * out_stride + tl.multiple_of(begin, ALIGN) + column, value, mask=mask)
        tl.store(epochs + block, epoch)


def gather_rows(
    x: Tensor,
    peers: Peers,
    *,
    widths: Sequence[int] = (),
    begins: Tensor | None = None,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x [n, width] of every peer -> [n, sum of widths], a new tensor.

    Parts of different `widths` have `begins` too, int32 [size + 1]: where each begins, and their sum. `drawn`:
    (rows, table) as in `sampling.choose`: only rows that draw their token are gathered, others hold anything. `peers`:
    of slots, see `pieces`.
    """
    require_triton()
    n, size = x.shape[0], x.element_size()
    rows, table = drawn or (peers.epochs, peers.epochs)
    widths = widths or [x.shape[1]] * peers.size
    out = torch.empty((n, sum(widths)), dtype=x.dtype, device=x.device)
    count = pieces(max(widths), size)
    assert x.stride(1) == 1 and n * count <= peers.max_rows and peers.width == SLOT
    if n:
        _gather_kernel[(min(n * count, peers.blocks),)](
            *(x, out, peers.epochs if begins is None else begins, rows, table),
            *(peers.buffers, peers.flags, peers.epochs),
            *(x.shape[1], n, x.stride(0), out.stride(0), peers.max_rows * SLOT // size),
            RANK=peers.rank,
            SIZE=peers.size,
            CHUNK=SLOT // size,
            PIECES=count,
            MAX_BLOCKS=peers.blocks,
            ALIGN=math.gcd(16, *widths),
            DRAWN=drawn is not None,
            EVEN=begins is None,
            num_warps=8,
        )
    return out


def pieces(width: int, itemsize: int) -> int:
    """Slots that a part of a row of `width` numbers takes."""
    return cdiv(width * itemsize, SLOT)
