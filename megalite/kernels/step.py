"""The inputs of a decode step, read from the buffers of all rows in one Triton kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.kernels.jit import jit, require_triton, tl


class StepRows(NamedTuple):
    """One token a row of a decode step, [N] each."""

    token_ids: Tensor
    """int64; in padding what stands in its row."""
    positions: Tensor
    """int64; 0 in padding."""
    next_positions: Tensor
    """int64: where the token that is sampled will stand; 0 in padding."""
    lengths: Tensor
    """int64: longest length of the row's sequence."""
    slots: Tensor
    """int64: cache slot of the token; -1 in padding."""
    context_len: Tensor
    """int32: keys that the row sees; 0 in padding."""
    rows: Tensor
    """int64: row numbers."""


@jit
def _read_kernel(inputs, tokens, table, longest, out, context_len, num_rows, max_len, table_stride, PAGE: tl.constexpr):
    """One program a row; `out` int64 [6, N] are the fields of `StepRows` without context_len."""
    place = tl.program_id(0)
    row = tl.load(inputs + place).to(tl.int64)
    position = tl.load(inputs + num_rows + place).to(tl.int64)
    block = tl.load(inputs + 2 * num_rows + place)
    token = tl.load(inputs + 3 * num_rows + place)
    real = position >= 0
    at = tl.maximum(position, 0)
    if token < 0:
        token = tl.load(tokens + row * max_len + at)
    cell = table + row * table_stride + at // PAGE
    if block < 0:
        block = tl.load(cell)
    else:
        tl.store(cell, block)
    slot = tl.where(real, block.to(tl.int64) * PAGE + at % PAGE, -1)
    tl.store(out + place, token.to(tl.int64))
    tl.store(out + num_rows + place, at)
    tl.store(out + 2 * num_rows + place, position + 1)
    tl.store(out + 3 * num_rows + place, tl.load(longest + row).to(tl.int64))
    tl.store(out + 4 * num_rows + place, slot)
    tl.store(out + 5 * num_rows + place, row)
    tl.store(context_len + place, (position + 1).to(tl.int32))


def read_rows(inputs: Tensor, tokens: Tensor, block_table: Tensor, longest: Tensor, *, block_size: int) -> StepRows:
    """What a decode step of N rows computes on.

    `inputs` int32 [>= 4, N]: row number, position (-1: padding), the row's new block at that position (-1: none; it is
    written into the table), and the token there (-1: the one in `tokens`). `tokens` int32 [rows, max_len],
    `block_table` int32 [rows, blocks], `longest` int32 [rows].
    """
    require_triton()
    size = inputs.shape[1]
    out = torch.empty(6, size, dtype=torch.int64, device=inputs.device)
    context_len = torch.empty(size, dtype=torch.int32, device=inputs.device)
    strides = (tokens.stride(0), block_table.stride(0))
    _read_kernel[(size,)](
        inputs, tokens, block_table, longest, out, context_len, size, *strides, PAGE=block_size, num_warps=1
    )
    ids, positions, following, lengths, slots, rows = out.unbind(0)
    return StepRows(ids, positions, following, lengths, slots, context_len, rows)
