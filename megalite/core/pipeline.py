"""Hidden states from stage to stage.

Sends are asynchronous: a stage goes on with its next cohort while the last one's activations are on their way.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.parallel_state import ParallelState

MAX_SENDS = 8
"""Sends in flight before a stage waits for the oldest; bounds the memory that a slow neighbour can hold."""


class StageLink:
    """This rank's connection to the same tp rank of the neighbouring stages.

    gloo cannot send CUDA tensors (it aborts the process), so over gloo they pass through host memory.
    """

    def __init__(self, state: ParallelState, *, hidden_size: int, dtype: torch.dtype, device: torch.device):
        self.state = state
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        backend = dist.get_backend(state.pp.group) if state.pp.size > 1 else ""
        self.transport = device if "nccl" in backend else torch.device("cpu")
        self.sends: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden] from the previous stage; blocks until it is here."""
        buffer = torch.empty(num_tokens, self.hidden_size, dtype=self.dtype, device=self.transport)
        dist.recv(buffer, self.state.pp.ranks[self.state.pp.rank - 1])
        return buffer.to(self.device)

    def send(self, hidden: Tensor) -> None:
        """Hand [T, hidden] to the next stage and return at once."""
        while len(self.sends) >= MAX_SENDS or (self.sends and self.sends[0][0].is_completed()):
            self.sends.popleft()[0].wait()
        buffer = hidden.to(self.transport).contiguous()
        work = dist.isend(buffer, self.state.pp.ranks[self.state.pp.rank + 1])
        self.sends.append((work, buffer))

    def drain(self) -> None:
        """Wait until every send has arrived."""
        while self.sends:
            self.sends.popleft()[0].wait()
