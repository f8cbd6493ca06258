"""How fast a device's memory can be read, as a Triton kernel that does nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, require_triton, tl

CHUNK = 1 << 16
"""Numbers that one program reads."""
BLOCK = 1 << 12
"""Numbers that it reads at a time."""


@jit
def _read_kernel(x, sums, length, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the sum of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < length, other=0.0)
    tl.store(sums + chunk, tl.sum(total, 0))


def read_all(x: Tensor) -> Tensor:
    """Sums of a float32 vector's chunks: every byte is read once and next to nothing is written."""
    require_triton()
    count = cdiv(x.numel(), CHUNK)
    sums = torch.empty(count, dtype=torch.float32, device=x.device)
    _read_kernel[(count,)](x, sums, x.numel(), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)
    return sums
