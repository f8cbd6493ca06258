"""Collectives along one axis, with gradients where training needs them. Every function is a no-op on one rank.

A layer brackets its work on sharded weights with `enter_tp` and `leave_tp`. Without sequence parallelism that is
identity / all-reduce (and the transpose backwards); with it, all-gather / reduce-scatter over tokens (Megatron-LM,
arXiv 1909.08053 figure 3 and arXiv 2205.05198 figure 5).
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.parallel_state import Axis, ParallelState
from megalite.monitor.metrics import RankReport


def enter_tp(x: Tensor, state: ParallelState) -> Tensor:
    """Make `x` [T or T/tp, D] whole for every tp rank."""
    if state.tp.size == 1:
        return x
    if state.sequence_parallel:
        return _GatherTokens.apply(x, state.tp)
    return sum_gradients(x, state.tp)


def leave_tp(x: Tensor, state: ParallelState) -> Tensor:
    """Sum the tp ranks' partial `x` [T, D]; the result is whole, or this rank's T/tp tokens under sequence parallel."""
    if state.tp.size == 1:
        return x
    if state.sequence_parallel:
        return _ScatterTokens.apply(x, state.tp)
    return sum_values(x, state.tp)


def gather_columns(x: Tensor, widths: list[int], axis: Axis) -> Tensor:
    """Concatenate `x` [R, widths[axis.rank]] of all ranks to [R, sum(widths)]. No gradient."""
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
    """Put the values of the axis' last rank into every rank's `x`, and return it. No gradient."""
    if axis.size > 1:
        with axis.meter.phase("communication"):
            dist.broadcast(x, axis.ranks[-1], group=axis.group)
    return x


def sum_gradients(x: Tensor, axis: Axis) -> Tensor:
    """Identity whose gradient is summed over the axis: the way in of a computation that is cut over it."""
    return _Copy.apply(x, axis) if axis.size > 1 and torch.is_grad_enabled() else x


def sum_values(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis whose gradient passes unchanged: the way out of a computation that is cut over it.

    Without gradients the sum is made in `x` itself.
    """
    if axis.size > 1 and torch.is_grad_enabled():
        return _Reduce.apply(x, axis)
    return all_reduce_sum(x.contiguous(), axis)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce_sum(grad.contiguous().clone(), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_sum(x.contiguous().clone(), axis)  # the producing op may have saved x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather_tokens(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _reduce_scatter_tokens(grad, ctx.axis), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter_tokens(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_gather_tokens(grad, ctx.axis), None


def _all_gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    with axis.meter.phase("communication"):
        dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts)


def _reduce_scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
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
