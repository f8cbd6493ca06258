"""The gate of an MLP, act(gate) * up (arXiv 2002.05202), on CUDA: a Triton kernel forward and one backward.

Computed in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import cdiv, jit, require_triton, tl
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


@jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activated`."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        y = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = share * (1.0 + x * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return y


@jit
def _gate_backward_kernel(
    grad, hidden, out, grad_stride, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One program a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    gate = tl.load(hidden + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * stride + DIM + column, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    target = out + row * (2 * DIM) + column
    tl.store(target, (above * up * _slope(gate, ACTIVATION)).to(out.dtype.element_ty), mask=inside)
    tl.store(target + DIM, (above * activated(gate, ACTIVATION)).to(out.dtype.element_ty), mask=inside)


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
        _gate_kernel[(tokens, cdiv(dim, BLOCK))](
            hidden, out, hidden.stride(0), DIM=dim, BLOCK=BLOCK, ACTIVATION=activation, PDL=pdl, num_warps=4, **extra
        )
    return out


def gate_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """The gradient of `gate`'s hidden [T, 2 I] from that of its result, [T, I]; last dims contiguous."""
    require_triton()
    assert hidden.ndim == 2 and hidden.stride(1) == grad.stride(1) == 1
    tokens, dim = grad.shape
    out = torch.empty((tokens, 2 * dim), dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        strides = grad.stride(0), hidden.stride(0)
        _gate_backward_kernel[(tokens, cdiv(dim, BLOCK))](
            grad, hidden, out, *strides, DIM=dim, BLOCK=BLOCK, ACTIVATION=activation, num_warps=4
        )
    return out
