"""The gate of an MLP, act(gate) * up (arXiv 2002.05202), on CUDA as one Triton kernel; in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import jit, require_triton, tl, triton
from megalite.kernels.thin import activated

BLOCK = 1024
"""Channels of a program."""


@jit
def _gate_kernel(
    hidden, out, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr
):
    """One program a part of a row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    gate = tl.load(hidden + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * stride + DIM + column, mask=inside, other=0.0).to(tl.float32)
    result = activated(gate, ACTIVATION) * up
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty), mask=inside)


def gate(hidden: Tensor, activation: str, *, pdl: bool = False) -> Tensor:
    """act(gate) * up of hidden = [gate | up]: [T, 2 I] -> [T, I]; silu, gelu or gelu_tanh.

    The last dim is contiguous. `pdl`: as `norm.rms_norm`.
    """
    require_triton()
    assert activation in ("silu", "gelu", "gelu_tanh") and hidden.ndim == 2 and hidden.stride(1) == 1
    tokens, dim = hidden.shape[0], hidden.shape[1] // 2
    out = torch.empty((tokens, dim), dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        extra = {"launch_pdl": True} if pdl else {}
        _gate_kernel[(tokens, triton.cdiv(dim, BLOCK))](
            hidden, out, hidden.stride(0), DIM=dim, BLOCK=BLOCK, ACTIVATION=activation, PDL=pdl, num_warps=4, **extra
        )
    return out
