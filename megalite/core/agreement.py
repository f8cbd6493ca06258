"""What all ranks of an axis must have alike: one rank's bytes given to all, inputs compared, the least of a number.

Every function is collective over `axis` (None: over the run).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalite.core.parallel_state import Axis
from megalite.errors import ConfigError, Problem


def _alone(axis: Axis | None) -> bool:
    return not dist.is_initialized() or (axis is not None and axis.size == 1)


def broadcast_bytes(data: bytes | None, source: int, axis: Axis | None = None) -> bytes:
    """Give every rank of `axis` what global rank `source` has; the others pass None."""
    if _alone(axis):
        assert data is not None
        return data
    group = axis.group if axis is not None else None
    size = torch.tensor([0 if data is None else len(data)])
    dist.broadcast(size, source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if buffer.numel():
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
    dist.all_gather(each, mine, group=axis.group if axis is not None else None)
    different = [rank for rank, other in zip(ranks, each, strict=True) if not torch.equal(other, each[0])]
    if different:
        names = ", ".join(map(str, different))
        who = f"rank {names} has" if len(different) == 1 else f"ranks {names} have"
        fix = "Every rank must be given the same; a file must be the same on every host."
        raise ConfigError(Problem(key=what, rule=f"{who} others than rank {ranks[0]}", fix=fix))


def minimum(value: int, axis: Axis) -> int:
    """The least of the ranks' values."""
    if axis.size == 1:
        return value
    least = torch.tensor([value])
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=axis.group)
    return int(least)
