"""A generation that is read while it runs: what `LLM.generate(..., stream=True)` gives."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import torch
import torch.distributed as dist

from megalite.core.agreement import broadcast_bytes, reduce
from megalite.core.parallel_state import Axis
from megalite.inference.channel import News
from megalite.inference.engine import Engine, Events
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.replica import Replica
from megalite.inference.request import Request
from megalite.inference.run import agree_on_end, exchanged, make_feed
from megalite.kernels.device import use_device

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[TokenDelta]).decode


class Generation:
    """An iterator of what the samples of the requests gain, as they gain it; also an async one.

        for delta in llm.generate(prompts, stream=True): ...
        async for delta in llm.generate(prompts, stream=True): ...

    Nothing is computed but while the next delta is waited for: in the caller's thread or, for `async for`, in one of
    its own. Leaving early (`close`, or letting go of this object, as `break` does) gives up what runs.

    Under a launcher every rank iterates, and sees the same deltas in the same order; replicas step together. A rank
    that leaves early ends the iteration on all ranks.
    """

    def __init__(self, run: StreamedRun):
        self._run = run
        self._thread: ThreadPoolExecutor | None = None

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests in the order of the prompts, to which `TokenDelta.request_id` refers."""
        return self._run.names

    @property
    def ended(self) -> bool:
        """Nothing runs any more."""
        return self._run.ended

    @property
    def outputs(self) -> list[RequestOutput]:
        """After the end: the results, in the order of the prompts, without those of requests that were given up."""
        return self._run.outputs

    def __iter__(self) -> Iterator[TokenDelta]:
        return self

    def __next__(self) -> TokenDelta:
        """Raises what `LLM.generate` does in the middle of a run."""
        self._run.fill()
        if not self._run.gained:
            raise StopIteration
        return self._run.gained.popleft()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TokenDelta:
        """As `__next__`. What a call that was cancelled would have given, the next one gives."""
        run = self._run
        if not run.gained:
            if self._thread is None:
                begin = partial(use_device, run.replica.device)
                self._thread = ThreadPoolExecutor(1, "generation", initializer=begin)
            await asyncio.get_running_loop().run_in_executor(self._thread, run.fill)
        if not run.gained:
            raise StopAsyncIteration
        return run.gained.popleft()

    def close(self) -> None:
        """Give up what runs; idempotent. Under a launcher every rank must do so, or iterate on."""
        self._run.close()
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        self.close()


class StreamedRun:
    """The engine's side of a `Generation`: it outlives one that is let go while a thread still works for it."""

    def __init__(
        self,
        replica: Replica,
        engine: Engine,
        requests: list[Request],
        *,
        key: str,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        """`requests` have `stream` set; `key`: unique in the run. Every rank of the layout makes one alike."""
        self.replica = replica
        self.names = [request.id for request in requests]
        self.gained: deque[TokenDelta] = deque()
        self.outputs: list[RequestOutput] = []
        self.ended = False
        self._engine = engine
        self._feed = make_feed(replica, requests, key)
        self._stop_requested = stop_requested
        self._axis = replica.state.aside()
        self._lock = threading.Lock()
        """Held during a step: one thread may close while another waits for the next delta."""
        self._left = False
        """The run is to be given up."""
        self._events = Events()
        """Events of this replica's last step."""
        self._finished: list[RequestOutput] = []
        """Results of this replica; on its control rank."""

    def fill(self) -> None:
        """Go on until something was gained, or all has ended."""
        with self._lock:
            while not self.gained and not self.ended:
                self._round()

    def close(self) -> None:
        """Give up what runs; idempotent."""
        with self._lock:
            if not self.ended:
                self._round(leaving=True)
            self.gained.clear()

    def discard(self) -> None:
        """End it after an error: the engine computes nothing more."""
        self.ended = True

    def _round(self, *, leaving: bool = False) -> None:
        """A step of each replica that still runs, and what they gained. Collective over the layout."""
        try:
            deltas = self._step()
            left, running, gained = _shared(self._axis, self.replica, deltas, leaving, not self._events.ended)
            self.gained.extend(gained)
            if running and not left:
                return
            self._left = left
            while not self._events.ended:
                self._step()
        except BaseException:
            self.ended = True
            self._engine.abandon()
            raise
        self.ended = True
        agree_on_end(self.replica, left or not self._events.stopped)
        found = {output.request_id: output for output in exchanged(self._finished, self.replica)}
        self.outputs = [found[name] for name in self.names if name in found]

    def _step(self) -> list[TokenDelta]:
        """A step of this replica, if it still runs; collective over the replica."""
        if self._events.ended:
            return []
        self._events = self._engine.step(self._news, self._feed.requests)
        self._finished += self._events.outputs
        return self._events.deltas

    def _news(self, room: int) -> News:
        return Engine.next_news(self._feed, lambda: self._left or self._stop_requested(), room)


def _shared(
    axis: Axis, replica: Replica, deltas: list[TokenDelta], leaving: bool, running: bool
) -> tuple[bool, bool, list[TokenDelta]]:
    """What any rank says of leaving, and any replica of running, and the deltas of all replicas, on every rank."""
    if axis.size == 1:
        return leaving, running, deltas
    packed = _encode(deltas) if deltas else b""
    flags = torch.tensor([leaving, running, bool(packed)], dtype=torch.int64)
    left, runs, gained = map(bool, reduce(flags, dist.ReduceOp.MAX, axis).tolist())
    everything: list[TokenDelta] = []
    for source in replica.layout.control_ranks if gained else ():
        data = broadcast_bytes(packed if replica.state.rank == source else None, source, axis)
        everything += _decode(data) if data else ()
    return left, runs, everything
