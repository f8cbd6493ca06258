"""What a rank of the pool has in place of `distributed.start`'s runtime: the pool has joined its ranks already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class PoolRuntime:
    """The part of a `Runtime` that jobs and engines ask for."""

    rank: int
    world_size: int
    store: dist.Store | None = None
    backend: str = "gloo"
    device: torch.device = torch.device("cpu")
    before_groups_go: list[Callable[[], None]] = field(default_factory=list)
    signal_received: Callable[[], int | None] = lambda: None

    @property
    def local_rank(self) -> int:
        return self.rank

    @property
    def local_world_size(self) -> int:
        return self.world_size
