"""Norms and heads of training on CUDA as autograd sees them; the kernels are in `kernels/training`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.core.functional import has_kernels
from megalite.kernels import training


def learns_by_kernels(x: Tensor, *weights: Tensor) -> bool:
    """Whether our kernels take `x` and give its gradient: on CUDA, with gradients, where there is Triton.

    `weights`: parameters of other modules that the kernel reads. Under ZeRO stage 3 (they have a ds_id) they may be
    empty outside their own module's call, where no kernel can read them.
    """
    return has_kernels(x) and torch.is_grad_enabled() and not any(hasattr(weight, "ds_id") for weight in weights)


def add_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, *, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """x + update and its RMSNorm, [T, D] both; see `training.add_norm`."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _AddNorm.apply
    return apply(x, update, weight, eps, zero_centred)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, zero_centred: bool
    ) -> tuple[Tensor, Tensor]:
        stream, out = training.add_norm(x, update, weight, eps, zero_centred=zero_centred)
        ctx.save_for_backward(stream, weight)
        ctx.eps, ctx.zero_centred, ctx.adds = eps, zero_centred, update is not None
        ctx.set_materialize_grads(False)
        return stream.view_as(stream), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight = ctx.saved_tensors
        if grad is None:
            return past, past if ctx.adds else None, None, None, None
        into, into_weight = training.norm_gradient(stream, weight, grad, past, ctx.eps, zero_centred=ctx.zero_centred)
        return into, into if ctx.adds else None, into_weight, None, None


def turned_heads(
    qkv: Tensor,
    counts: tuple[int, int],
    table: Tensor,
    positions: Tensor | None,
    norms: tuple[Tensor, Tensor, float] | None,
    *,
    zero_centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D] after norms and rotation, and values [T, K, D], of qkv [T, H + 2 K, D].

    `counts`: (H, K); see `training.turn_heads`.
    """
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _TurnedHeads.apply
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    return apply(qkv, q_weight, k_weight, eps, counts, table, positions, zero_centred)


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        counts: tuple[int, int],
        table: Tensor,
        positions: Tensor | None,
        zero_centred: bool,
    ) -> tuple[Tensor, ...]:
        norms = None if q_weight is None or k_weight is None else (q_weight, k_weight, eps)
        queries, keys = counts
        turned = training.turn_heads(qkv, counts, table, positions, norms, zero_centred=zero_centred)
        ctx.save_for_backward(qkv, q_weight, k_weight, table, positions)
        ctx.eps, ctx.zero_centred = eps, zero_centred
        return *turned.split(counts, 1), qkv[:, queries + keys :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_q: Tensor, into_k: Tensor, into_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, table, positions = ctx.saved_tensors
        norms = None if q_weight is None else (q_weight, k_weight, ctx.eps)
        grads = (into_q, into_k, into_v)
        found = training.heads_gradient(qkv, table, positions, norms, *grads, zero_centred=ctx.zero_centred)
        return *found, None, None, None, None, None
