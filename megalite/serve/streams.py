"""One request on its way: what its client has had so far, wherever it runs. Torch-free.

A `Job` outlives the replicas that run it: it keeps the tokens that went out, so that another replica can go on behind
them. A `Stream` is its reader's end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megalite.inference.logprobs import Logprobs
from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import FinishReason, Request
from megalite.serve.errors import RequestLost


class Stream:
    """A request that was taken on; made by `Router.submit`:

        async with router.submit(request) as stream:
            async for delta in stream: ...
            output = await stream.result()

    A body that is left before the end (a client went away) gives the request up.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None]):
        self.request = job.request
        self._job, self._cancel = job, cancel

    def __aiter__(self) -> Stream:
        """What each sample gains, in order, across losses of replicas; one reader. What comes while the reader is busy
        is one delta. Ends with the request; nothing comes unless request.stream."""
        return self

    async def __anext__(self) -> TokenDelta:
        """The next delta; RequestLost as `result`."""
        job = self._job
        while not job.unread:
            if self.has_ended():
                raise StopAsyncIteration
            await job.news.wait()
        return job.unread.popleft()

    def has_ended(self) -> bool:
        """Whether nothing more will come; RequestLost as `result`."""
        done = self._job.done
        if not done.done():
            return False
        if not done.cancelled() and (error := done.exception()) is not None:
            raise error
        return True

    async def result(self) -> RequestOutput:
        """The whole result, once it is there. Its `error` says why the request could not run, or not to the end.

        RequestLost: its replicas were lost. asyncio.CancelledError: it was given up by `cancel`.
        """
        return await asyncio.shield(self._job.done)

    def cancel(self) -> None:
        """Give the request up: its memory is free within a step. Does nothing once it has ended."""
        self._cancel(self._job)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


Gain = tuple[int, TokenDelta]
"""What a sample gained, and the place of its stream."""


class Merged:
    """The deltas of several streams for one reader, each with the index of its stream; read instead of the streams."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams = streams
        self._jobs = [stream._job for stream in streams]
        self._news = self._jobs[0].news
        for job in self._jobs:
            job.news = self._news

    async def next(self) -> list[Gain]:
        """All that has come since the last call, at least one; empty: all streams have ended.

        RequestLost: one is lost, and what came of the others has been given out.
        """
        while True:
            found = self._unread()
            if found or all([stream.has_ended() for stream in self.streams]):
                return found
            await self._news.wait()

    def _unread(self) -> list[Gain]:
        found: list[Gain] = []
        for place, job in enumerate(self._jobs):
            unread = job.unread
            while unread:
                found.append((place, unread.popleft()))
        return found

    def give_to(self, write: Callable[[list[Gain]], object], is_ready: Callable[[], bool]) -> None:
        """From now on, what comes while the reader waits in `next` goes to `write`, and the reader sleeps on: a task
        that wakes costs more than all else of a token. What comes while not `is_ready` wakes the reader, as the end
        does, and what `write` raises."""

        def hand_over() -> bool:
            if not is_ready():
                return False
            write(self._unread())
            return True

        self._news.hand_over = hand_over


class Turn:
    """One turn of the event loop: what all requests gain in it goes out at its end, in one call."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._gained: list[News] = []

    def add(self, news: News) -> None:
        """`news` is to be offered what has come for it."""
        if not self._gained:
            self._loop.call_soon(self._end)
        self._gained.append(news)

    def _end(self) -> None:
        gained, self._gained = self._gained, []
        for news in gained:
            news.offer()


class News:
    """Wakes the one that waits. An asyncio.Event costs several times as much, which counts with every token."""

    __slots__ = ("_is_due", "_loop", "_turn", "_waiting", "hand_over")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._is_due = False
        """`offer` is about to be called."""
        self.hand_over: Callable[[], bool] | None = None
        """Takes what is unread off the one that waits, which sleeps on if this is True; see `Merged.give_to`."""

    def gained(self) -> None:
        """Something is unread."""
        if self.hand_over is None:
            self.set()
        elif not self._is_due:
            self._is_due = True
            self._turn.add(self)

    def offer(self) -> None:
        """The turn ends in which something was gained."""
        self._is_due = False
        waiting = self._waiting
        if waiting is None or waiting.done() or self.hand_over is None:
            return
        try:
            taken = self.hand_over()
        except Exception as error:
            waiting.set_exception(error)
        else:
            if not taken:
                waiting.set_result(None)

    def set(self) -> None:
        """Wake it."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def wait(self) -> asyncio.Future[None]:
        """A future that the next `set` completes; to be awaited at once."""
        self._waiting = self._loop.create_future()
        return self._waiting


@dataclass(slots=True)
class _Sample:
    """What came of one sample of a streamed request."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def output(self, index: int, last: CompletionOutput | None, wants_logprobs: bool) -> CompletionOutput:
        """The sample's result; `last`: what the replica that ended the request says of it, if anything."""
        own = [entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=False)]
        return CompletionOutput(
            index=index,
            text="".join(self.pieces),
            token_ids=self.token_ids,
            cumulative_logprob=sum(own) if wants_logprobs or last is None else last.cumulative_logprob,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            token_logprobs=own,
            finish_reason=self.finish_reason or (last.finish_reason if last is not None else None),
            stop_reason=self.stop_reason,
        )


class Job:
    """A request from its admission to its end. The router says where it is, `Stream` reads what comes."""

    def __init__(self, request: Request, arrival: int, turn: Turn | None = None):
        self.request = request
        self.arrival = arrival
        """Place among all requests, in which they are served again after a loss."""
        self.price = request.num_samples * request.longest
        """Tokens that it may take up at most."""
        self.unread: deque[TokenDelta] = deque()
        self.news = News(turn or Turn())
        """Something is unread, or it has ended."""
        self.done: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())  # its reader may have gone
        self.samples = [_Sample() for _ in range(request.num_samples)] if request.stream else []

        self.at: int | None = None
        """The replica that has it; None: it waits in the router."""
        self.to: int | None = None
        """The replica that is to have it once `at` has given it back."""
        self.recalled = False
        """`at` was asked to give it back, and has not answered."""
        self.uncounted = 0
        """Tokens gained of which the balancer has not heard."""
        self.losses = 0
        """Replicas that were lost while they had it."""
        self.fruitless = 0
        """The last of these, from which it had gained nothing."""
        self.gained = False
        """It has gained something from `at`."""
        self._replayed = False
        """Its results come from several replicas."""

    @property
    def left(self) -> int:
        """Tokens that it may yet gain."""
        most = self.request.max_tokens
        gone = sum(most if sample.finish_reason else len(sample.token_ids) for sample in self.samples)
        return self.request.num_samples * most - gone

    def to_submit(self) -> Request:
        """The request as a replica gets it: to go on after the tokens that its client has had."""
        self.gained = False
        if not any(sample.token_ids or sample.finish_reason for sample in self.samples):
            return self.request
        self._replayed = True
        given = tuple(tuple(sample.token_ids) for sample in self.samples)
        ended = frozenset(index for index, sample in enumerate(self.samples) if sample.finish_reason)
        return replace(self.request, given=given, ended=ended)

    def take(self, delta: TokenDelta) -> None:
        """A replica gave this out."""
        if delta.finish_reason == "abort" and self.recalled:  # it goes on elsewhere
            return
        self.gained = True
        sample, unread = self.samples[delta.index], self.unread
        sample.token_ids += delta.token_ids
        if delta.text:
            sample.pieces.append(delta.text)
        if delta.logprobs:
            sample.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
        if unread and unread[-1].index == delta.index:  # its reader lags: one event will say both
            unread[-1].extend(delta)
        else:
            unread.append(delta)
        self.news.gained()

    @property
    def has_all(self) -> bool:
        """Every sample has ended, as far as its client knows."""
        return bool(self.samples) and all(sample.finish_reason for sample in self.samples)

    def finish(self, output: RequestOutput) -> None:
        """End it with the result of the last replica, which does not know what earlier replicas gave out."""
        if self._replayed and (output.outputs or output.error is None):
            output.outputs = self._outputs(output.outputs)
            cached = output.num_cached_tokens
            output.num_cached_tokens = cached and min(cached, len(self.request.prompt_token_ids))
        self._end(output)

    def finish_here(self, reason: FinishReason) -> None:
        """End it without a replica: for `reason`, as far as it has not ended."""
        for index, sample in enumerate(self.samples):
            if sample.finish_reason is None:
                name = self.request.id
                self.take(TokenDelta(request_id=name, index=index, text="", token_ids=[], finish_reason=reason))
        if not self.samples:
            self.samples = [_Sample(finish_reason=reason) for _ in range(self.request.params.n)]
        self._end(
            RequestOutput(
                request_id=self.request.id,
                prompt=self.request.prompt,
                prompt_token_ids=list(self.request.prompt_token_ids),
                outputs=self._outputs([]),
            )
        )

    def _outputs(self, last: list[CompletionOutput]) -> list[CompletionOutput]:
        known = {completion.index: completion for completion in last}
        wanted = self.request.params.logprobs is not None
        return [sample.output(index, known.get(index), wanted) for index, sample in enumerate(self.samples)]

    def _end(self, output: RequestOutput) -> None:
        if not self.done.done():
            self.done.set_result(output)
        self.news.set()

    def fail(self, reason: str) -> None:
        """It will have no result."""
        if not self.done.done():
            self.done.set_exception(RequestLost(reason))
        self.news.set()

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self.done.cancel()
        self.unread.clear()
        self.news.set()
