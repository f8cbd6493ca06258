"""Collectives along one axis, with gradients where training needs them. On an axis of one rank they do nothing.

A layer brackets its work on sharded weights with `enter_tp` and `leave_tp`. Forward that is identity and all-reduce,
backward all-reduce and identity; with sequence parallelism all-gather and reduce-scatter over tokens, backward the
other way round (Megatron-LM, arXiv 1909.08053 figure 3 and arXiv 2205.05198 figure 5).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.parallel_state import Axis, ParallelState
from megalite.monitor.metrics import RankReport

Collective = Callable[[Tensor, Axis], Tensor]


def enter_tp(x: Tensor, state: ParallelState) -> Tensor:
    """The input of sharded weights: `x` [T, D], or this rank's tokens of it [T/tp, D] -> [T, D] on every tp rank."""
    return _apply(x, state.tp, *((_all_gather, _reduce_scatter) if state.sequence_parallel else (_identity, _sum)))


def leave_tp(x: Tensor, state: ParallelState) -> Tensor:
    """The sum over tp of partial outputs `x` [T, D]: [T, D], or [T/tp, D] under sequence parallelism.

    Without gradients the sum may be made in `x` itself.
    """
    return _apply(x, state.tp, *((_reduce_scatter, _all_gather) if state.sequence_parallel else (_sum, _identity)))


def gather_columns(x: Tensor, widths: list[int], axis: Axis) -> Tensor:
    """Concatenate the ranks' columns: `x` [R, widths[axis.rank]] -> [R, sum(widths)]. No gradient."""
    if axis.size == 1:
        return x
    widest = max(widths)
    padded = x.new_zeros(x.shape[0], widest)
    padded[:, : x.shape[1]] = x
    parts = [torch.empty_like(padded) for _ in widths]
    with axis.meter.phase("communication"):
        dist.all_gather(parts, padded, group=axis.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum in place over the axis and return `x`. No gradient."""
    if axis.size > 1:
        with axis.meter.phase("communication"):
            dist.all_reduce(x, group=axis.group)
    return x


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """Maximum in place over the axis and return `x`. No gradient."""
    if axis.size > 1:
        with axis.meter.phase("communication"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def broadcast_from_last(x: Tensor, axis: Axis) -> Tensor:
    """Overwrite `x` with the values of the axis' last rank, and return it. No gradient."""
    if axis.size > 1:
        with axis.meter.phase("communication"):
            dist.broadcast(x, axis.ranks[-1], group=axis.group)
    return x


def _apply(x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
    """`forward` of the values; the gradient goes through `backward`."""
    if axis.size == 1:
        return x
    if not torch.is_grad_enabled():
        return all_reduce_sum(x.contiguous(), axis) if forward is _sum else forward(x, axis)
    apply: Callable[..., Tensor] = _WithGradient.apply
    return apply(x, axis, forward, backward)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.collective = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.collective(grad, ctx.axis), None, None, None


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce_sum(x.contiguous().clone(), axis)  # what made x may have saved it for its backward pass


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[T/n, D] of every rank -> [T, D]."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    with axis.meter.phase("communication"):
        dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts)


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of [T, D], of which each rank gets its T/n tokens."""
    if x.shape[0] % axis.size:
        raise ValueError(f"sequence parallel cuts {x.shape[0]} tokens over {axis.size} ranks, which does not divide")
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    with axis.meter.phase("communication"):
        dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


def gather_reports(own: RankReport) -> list[RankReport]:
    """Every rank's report, on every rank of the run. Collective over the run."""
    if not dist.is_initialized():
        return [own]
    mine = torch.frombuffer(bytearray(json.dumps(own.as_dict()).encode()), dtype=torch.uint8)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]))
    longest = int(max(sizes))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    pairs = zip(texts, sizes, strict=True)
    return [RankReport.from_dict(json.loads(text[: int(size)].numpy().tobytes())) for text, size in pairs]
