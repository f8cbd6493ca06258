"""Collectives along one axis, with gradients where training needs them. On an axis of one rank they do nothing.

A layer brackets its work on sharded weights with `enter_tp` and `leave_tp`. Forward that is identity and all-reduce,
backward all-reduce and identity; with sequence parallelism all-gather and reduce-scatter over tokens, backward the
other way round (Megatron-LM, arXiv 1909.08053 figure 3 and arXiv 2205.05198 figure 5).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.parallel_state import Axis, ParallelState, run_track
from megalite.kernels.symmetric import SymmetricColumns, SymmetricSum, Unavailable
from megalite.monitor.metrics import RankReport

log = logging.getLogger(__name__)

Collective = Callable[[Tensor, Axis], Tensor]
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""By the name that this version of torch has for it."""


def enter_tp(x: Tensor, state: ParallelState) -> Tensor:
    """The input of sharded weights: `x` [T, D], or this rank's tokens of it [T/tp, D] -> [T, D] on every tp rank."""
    return _apply(x, state.tp, *((_all_gather, _reduce_scatter) if state.sequence_parallel else (_identity, _sum)))


def leave_tp(x: Tensor, state: ParallelState) -> Tensor:
    """The sum over tp of partial outputs `x` [T, D]: [T, D], or [T/tp, D] under sequence parallelism.

    Without gradients the sum may be made in `x` itself.
    """
    return _apply(x, state.tp, *((_reduce_scatter, _all_gather) if state.sequence_parallel else (_sum, _identity)))


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce whose backward pass is an all-reduce too: for sums that every rank goes on to compute with."""
    return _apply(x, axis, _sum, _sum)


def fusable_sum(x: Tensor, state: ParallelState) -> SymmetricSum | None:
    """The all-reduce over tp of partial outputs x [T, D] that can be one kernel with the addition and norm after it.

    None: there is none for x; call `leave_tp`. Always None with gradients and under sequence parallelism.
    """
    if state.tp.size == 1 or state.sequence_parallel or torch.is_grad_enabled():
        return None
    sums = symmetric_sum(x, state.tp)
    if sums is None or not sums.fuses(x):
        return None
    state.meter.count_bytes("tp", x.numel() * x.element_size())
    state.tp.track.begun("all_reduce")
    return sums


def gather_columns(x: Tensor, widths: list[int], axis: Axis) -> Tensor:
    """Concatenate the ranks' columns: `x` [R, widths[axis.rank]] -> [R, sum(widths)]. No gradient."""
    if axis.size == 1:
        return x
    rows, widest = x.shape[0], max(widths)
    if x.shape[1] < widest:  # what is behind a narrow part is never read
        padded = x.new_empty(rows, widest)
        padded[:, : x.shape[1]] = x
        x = padded
    parts = gather(x, axis)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


def gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x -> [ranks, *x.shape]. No gradient."""
    out = x.new_empty(axis.size, *x.shape)
    with _communicating(out, axis, "all_gather"):
        _gather_into(out.view(-1), x.reshape(-1), group=axis.group)
    return out


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum in place over the axis and return `x`. No gradient."""
    if axis.size > 1:
        with _communicating(x, axis, "all_reduce"):
            dist.all_reduce(x, group=axis.group)
    return x


def all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """Maximum in place over the axis and return `x`. No gradient."""
    if axis.size > 1:
        with _communicating(x, axis, "all_reduce"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def broadcast_from_last(x: Tensor, axis: Axis) -> Tensor:
    """Overwrite `x` with the values of the axis' last rank, and return it. No gradient."""
    if axis.size > 1:
        with _communicating(x, axis, "broadcast"):
            dist.broadcast(x, axis.ranks[-1], group=axis.group)
    return x


def prepare_sums(axis: Axis, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Prepare all-reduces of few rows of this width and dtype that go past NCCL, where the GPUs allow it.

    For calls without gradients. Collective over the axis, with nothing else under way in its group.
    """
    key = width, dtype
    if device.type != "cuda" or axis.size == 1 or key in axis.sums:
        return
    assert axis.group is not None
    try:
        axis.sums[key] = SymmetricSum(axis.group, width=width, dtype=dtype, device=device)
    except Unavailable as reason:
        axis.sums[key] = None
        if axis.is_first:
            log.warning("sums over ranks %s go through NCCL, the slower way for few tokens: %s", axis.ranks, reason)


def prepare_columns(
    axis: Axis, sums: SymmetricSum | None, *, widths: Sequence[int], max_rows: int, dtype: torch.dtype
) -> SymmetricColumns | None:
    """Prepare to gather columns of `widths` of at most `max_rows` rows, of those that need it, past NCCL.

    `sums`: of the axis; None: they go through NCCL, and so do columns. Collective over the axis as `prepare_sums`.
    """
    if sums is None:
        return None
    key = (*widths, max_rows, dtype)
    if key not in axis.columns:
        assert axis.group is not None
        try:
            axis.columns[key] = SymmetricColumns(
                sums, axis.group, widths=widths, max_rows=max_rows, dtype=dtype, device=sums.memory.device
            )
        except Unavailable as reason:
            axis.columns[key] = None
            if axis.is_first:
                log.warning("logits of ranks %s are gathered by NCCL, the slower way: %s", axis.ranks, reason)
    return axis.columns[key]


def symmetric_sum(x: Tensor, axis: Axis) -> SymmetricSum | None:
    """The all-reduce that is faster than NCCL's for x [T, D]; None: there is none, or `prepare_sums` was not called."""
    sums = axis.sums.get((x.shape[-1], x.dtype)) if axis.sums and x.ndim == 2 else None
    return sums if sums is not None and sums.takes(x) else None


def _communicating(x: Tensor, axis: Axis, name: str) -> AbstractContextManager[None]:
    """The phase of a collective, whose bytes are counted; the watch sees that this rank is in it."""
    return axis.track.entering(name, axis.meter.communication(axis.name, x.numel() * x.element_size(), name))


def _apply(x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
    """`forward` of the values; the gradient goes through `backward`."""
    if axis.size == 1:
        return x
    if not torch.is_grad_enabled():
        return _sum_without_gradient(x, axis) if forward is _sum else forward(x, axis)
    apply: Callable[..., Tensor] = _WithGradient.apply
    return apply(x, axis, forward, backward)


def _sum_without_gradient(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, which may be made in `x` itself."""
    sums = symmetric_sum(x, axis)
    if sums is None:
        return all_reduce_sum(x.contiguous(), axis)
    with _communicating(x, axis, "all_reduce"):
        return sums(x)


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
    return gather(x, axis).flatten(0, 1)


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of [T, D], of which each rank gets its T/n tokens."""
    if x.shape[0] % axis.size:
        raise ValueError(f"sequence parallel cuts {x.shape[0]} tokens over {axis.size} ranks, which does not divide")
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    with _communicating(x, axis, "reduce_scatter"):
        dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


def gather_reports(own: RankReport) -> list[RankReport]:
    """Every rank's report, on every rank of the run. Collective over the run."""
    if not dist.is_initialized():
        return [own]
    mine = torch.frombuffer(bytearray(json.dumps(own.as_dict()).encode()), dtype=torch.uint8)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with run_track().entering("all_gather"):
        dist.all_gather(sizes, torch.tensor([len(mine)]))
    longest = int(max(sizes))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    with run_track().entering("all_gather"):
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    pairs = zip(texts, sizes, strict=True)
    return [RankReport.from_dict(json.loads(text[: int(size)].numpy().tobytes())) for text, size in pairs]
