"""What the control rank of a replica tells the others each step.

Every rank of a replica runs the same scheduler. All it cannot know by itself travels in one small broadcast a step: the
sampled token ids, which stop strings completed, which requests the replica takes on, whether to stop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.core.parallel_state import ParallelState
from megalite.inference.request import Sampled

_STOP, _EXHAUSTED = 1, 2


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The control rank's message of one step. Everything in it is a number; nothing received is ever run."""

    results: tuple[Sampled, ...] = ()
    """For the sampled rows of the plan that this message answers, in order."""
    arrivals: tuple[int, int] = (0, 0)
    """Half-open range of the feed's requests that the replica takes on now."""
    arriving: int = 0
    """Sequences of these; known on the control rank only."""
    exhausted: bool = False
    """No more arrivals will follow."""
    stop: bool = False
    """Leave off now; unfinished requests are dropped."""
    state_hash: int = 0
    """Of the control rank's scheduler when it had made the plan that this message answers; debug mode only."""


class ReplicaChannel:
    """Messages from the control rank to every rank of its replica (itself included), in order.

    A broadcast is started when a message is sent and completed when it is received, up to `pp` steps later, so the
    control rank never waits for a slower stage.
    """

    def __init__(self, state: ParallelState):
        self.state = state
        self.sent: deque[tuple[StepMessage, dist.Work | None, torch.Tensor | None]] = deque()

    def send(self, message: StepMessage) -> None:
        """Control rank only."""
        work = buffer = None
        if self.state.replica.size > 1:
            flags = _STOP * message.stop | _EXHAUSTED * message.exhausted
            tokens = [result.token_id * 2 + result.stopped for result in message.results]
            buffer = torch.tensor([flags, *message.arrivals, message.state_hash, *tokens])
            work = dist.broadcast(buffer, self.state.rank, group=self.state.replica.group, async_op=True)
        self.sent.append((message, work, buffer))

    @property
    def num_arriving(self) -> int:
        """Sequences that messages on their way announce; known on the control rank."""
        return sum(message.arriving for message, _, _ in self.sent)

    def receive(self, num_results: int) -> StepMessage:
        """The next message; `num_results` is the number of sampled rows in the plan it answers."""
        if self.state.is_control:
            message, work, _ = self.sent.popleft()
            if work is not None:
                work.wait()
            return message
        buffer = torch.empty(4 + num_results, dtype=torch.int64)
        dist.broadcast(buffer, self.state.control_rank, group=self.state.replica.group)
        flags, lo, hi, state_hash, *tokens = buffer.tolist()
        results = tuple(Sampled(token // 2, bool(token % 2)) for token in tokens)
        exhausted, stop = bool(flags & _EXHAUSTED), bool(flags & _STOP)
        return StepMessage(results, (lo, hi), exhausted=exhausted, stop=stop, state_hash=state_hash)
