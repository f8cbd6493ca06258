"""Agreement between the ranks of an axis: broadcast of bytes, comparison of inputs, reductions in host memory.

Every function is collective over `axis` (None: over the run).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalite.core.parallel_state import Axis, run_track
from megalite.core.progress import Track
from megalite.errors import ConfigError, Problem


def _alone(axis: Axis | None) -> bool:
    return not dist.is_initialized() or (axis is not None and axis.size == 1)


def _members(axis: Axis | None) -> tuple[dist.ProcessGroup | None, Track]:
    """Process group and track of an axis; None: of the run."""
    return (axis.group, axis.track) if axis is not None else (None, run_track())


def broadcast_bytes(data: bytes | None, source: int, axis: Axis | None = None) -> bytes:
    """Give every rank of `axis` what global rank `source` has; the others pass None."""
    if _alone(axis):
        assert data is not None
        return data
    group, track = _members(axis)
    size = torch.tensor([0 if data is None else len(data)])
    with track.entering("broadcast"):
        dist.broadcast(size, source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if buffer.numel():
        with track.entering("broadcast"):
            dist.broadcast(buffer, source, group=group)
    return buffer.numpy().tobytes()


def compare_ranks(digest: bytes, what: str, axis: Axis | None = None) -> None:
    """ConfigError on every rank of `axis`, naming those that differ, unless all digests are equal.

    `digest`: 32 bytes made of what this rank was given; `what` names that in the message.
    """
    if _alone(axis):
        return
    ranks = axis.ranks if axis is not None else range(dist.get_world_size())
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    each = [torch.empty_like(mine) for _ in ranks]
    group, track = _members(axis)
    with track.entering("all_gather"):
        dist.all_gather(each, mine, group=group)
    different = [rank for rank, other in zip(ranks, each, strict=True) if not torch.equal(other, each[0])]
    if different:
        names = ", ".join(map(str, different))
        who = f"rank {names} has" if len(different) == 1 else f"ranks {names} have"
        fix = "Every rank must be given the same; a file must be the same on every host."
        raise ConfigError(Problem(key=what, rule=f"{who} others than rank {ranks[0]}", fix=fix))


def minimum(value: int, axis: Axis) -> int:
    """The least of the ranks' values."""
    return int(reduce(torch.tensor([value]), dist.ReduceOp.MIN, axis))


def reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType, axis: Axis | None = None) -> torch.Tensor:
    """`values`, in host memory, reduced in place over the ranks."""
    if not _alone(axis):
        group, track = _members(axis)
        with track.entering("all_reduce"):
            dist.all_reduce(values, op=op, group=group)
    return values


def wait_for_all(axis: Axis | None = None) -> None:
    """Return once every rank has called it."""
    if not _alone(axis):
        group, track = _members(axis)
        with track.entering("barrier"):
            dist.barrier(group)
