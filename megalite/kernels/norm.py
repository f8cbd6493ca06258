"""RMSNorm of the residual stream on CUDA, as one Triton kernel with the addition before it.

RMSNorm: arXiv 1910.07467. Sums are in float32; what is stored is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import jit, next_power_of_2, require_triton, tl


@jit
def _norm_kernel(
    x,
    update,
    rows,
    weight,
    out,
    eps,
    x_stride,
    update_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    source = row
    if GATHER:
        source = tl.load(rows + row)
    value = tl.load(x + source * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(update + row * update_stride + column, mask=inside, other=0.0).to(tl.float32)
        # The norm sees what is stored, so a stage of a pipeline that starts here computes the same.
        stored = (value + added).to(x.dtype.element_ty)
        tl.store(x + source * x_stride + column, stored, mask=inside)
        value = stored.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        scale += 1.0
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps) * scale
    tl.store(out + row * DIM + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centred: bool = False,
    update: Tensor | None = None,
    rows: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of each row: [T, D], [D] -> [T, D]; * (1 + weight) when `zero_centred`.

    With `update` [T, D] x += update comes first, in place. `rows` (int64 [R]; not with `update`): only these rows of x
    -> [R, D]. The last dim of x and of update is contiguous. `pdl`: launched before the kernel in front of it ends, for
    which it waits (programmatic dependent launch).
    """
    require_triton()
    dim = x.shape[-1]
    count = x.shape[0] if rows is None else rows.shape[0]
    assert x.ndim == 2 and x.stride(1) == 1 and (update is None or (update.shape == x.shape and update.stride(1) == 1))
    assert rows is None or update is None
    out = torch.empty((count, dim), dtype=x.dtype, device=x.device)
    if count == 0:
        return out
    block = next_power_of_2(dim)
    _norm_kernel[(count,)](
        x,
        x if update is None else update,
        x if rows is None else rows,
        weight,
        out,
        eps,
        x.stride(0),
        0 if update is None else update.stride(0),
        DIM=dim,
        BLOCK=block,
        ADD=update is not None,
        GATHER=rows is not None,
        ZERO_CENTRED=zero_centred,
        PDL=pdl,
        num_warps=min(16, max(1, block // 512)) if block > 2048 else 4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out
