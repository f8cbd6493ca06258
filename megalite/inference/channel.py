"""What the control rank of a replica tells the others each step.

Every rank of a replica runs the same scheduler. All it cannot know by itself travels in one small message a step: the
sampled token ids, which stop strings completed, which requests the replica takes on or gives up, whether to stop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist

from megalite.core.parallel_state import ParallelState
from megalite.core.progress import here
from megalite.inference.request import Request, Sampled

_STOP, _EXHAUSTED = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What reaches a replica from outside with one step."""

    arrivals: tuple[int, int] = (0, 0)
    """Half-open range of the requests that every rank knows already: the replica takes them on now."""
    requests: tuple[Request, ...] = ()
    """Requests that only the control rank knows: they travel with the step's message."""
    aborts: tuple[str, ...] = ()
    """Ids of requests to give up."""
    exhausted: bool = False
    """No more arrivals will follow."""
    stop: bool = False
    """Leave off now; unfinished requests are dropped."""

    def payload(self) -> bytes:
        """Requests and aborts; empty if there are none."""
        return msgspec.msgpack.encode((self.requests, self.aborts)) if self.requests or self.aborts else b""


_Payload = tuple[tuple[Request, ...], tuple[str, ...]]
_read = msgspec.msgpack.Decoder(_Payload).decode


def read_payload(data: bytes) -> _Payload:
    """The inverse of `News.payload`."""
    return _read(data) if data else ((), ())


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The control rank's message of one step. Nothing received is ever run."""

    results: tuple[Sampled, ...]
    """For the sampled rows of the plan that this message answers, in order."""
    news: News
    arriving: int = 0
    """Number of sequences of the message's requests; known on the control rank only."""
    state_hash: int = 0
    """Hash of the control rank's scheduler after the plan that this message answers; debug mode only."""


class ReplicaChannel:
    """Messages from the control rank to every rank of its replica (itself included), in order.

    A message goes to each rank by itself, and is received up to `pp` steps later: a broadcast would pass through ranks
    that compute, and the next stage would wait for them.
    """

    def __init__(self, state: ParallelState):
        self.state = state
        self.others = [rank for rank in state.replica.ranks if rank != state.control_rank]
        self.track = here.track("a step's news", (state.control_rank, *self.others), flow=True)
        self.sent: deque[tuple[StepMessage, list[tuple[dist.Work | None, torch.Tensor]]]] = deque()

    def send(self, message: StepMessage) -> None:
        """Control rank only."""
        parts: list[tuple[dist.Work | None, torch.Tensor]] = []
        if self.state.replica.size > 1:
            news, payload = message.news, message.news.payload()
            flags = _STOP * news.stop | _EXHAUSTED * news.exhausted
            # A token id may be below 0; twice it, and one more where a stop string ended, keeps both.
            tokens = [result.token_id * 2 + result.stopped for result in message.results]
            header = torch.tensor([flags, *news.arrivals, message.state_hash, len(payload), *tokens])
            buffers = [header, torch.frombuffer(bytearray(payload), dtype=torch.uint8)] if payload else [header]
            for buffer in buffers:
                parts += [(dist.isend(buffer, rank, group=self.state.replica.group), buffer) for rank in self.others]
                self.track.begun("send")
        self.sent.append((message, parts))

    @property
    def num_arriving(self) -> int:
        """Sequences that messages on their way announce; known on the control rank."""
        return sum(message.arriving for message, _ in self.sent)

    def receive(self, num_results: int) -> StepMessage:
        """The next message; `num_results` is the number of sampled rows in the plan it answers."""
        if self.state.is_control:
            message, parts = self.sent.popleft()
            with self.track.waiting("send"):
                for work, _ in parts:
                    if work is not None:
                        work.wait()
            return message
        flags, lo, hi, state_hash, size, *tokens = self._received(torch.empty(5 + num_results, dtype=torch.int64))
        payload = bytes(self._received(torch.empty(size, dtype=torch.uint8))) if size else b""
        requests, aborts = read_payload(payload)
        news = News(
            arrivals=(lo, hi),
            requests=requests,
            aborts=aborts,
            exhausted=bool(flags & _EXHAUSTED),
            stop=bool(flags & _STOP),
        )
        results = tuple(Sampled(token // 2, bool(token % 2)) for token in tokens)
        return StepMessage(results, news, state_hash=state_hash)

    def _received(self, buffer: torch.Tensor) -> list[int]:
        with self.track.entering("receive"):
            dist.recv(buffer, self.state.control_rank, group=self.state.replica.group)
        numbers: list[int] = buffer.tolist()
        return numbers
