"""From the streams of a request to its answer: whole, or server-sent events as tokens come. Torch-free.

Events are bytes put together by hand, and those that are ready at one moment go out in one write: one core sends far
more of them than a model makes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request as EngineRequest
from megalite.serve.envelope import ApiError, api_error
from megalite.serve.gate import ClientGone, until_gone
from megalite.serve.metrics import ServeMetrics
from megalite.serve.protocol import StreamOptions
from megalite.serve.router import Router, Stream

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What all parts of an answer have in common."""

    id: str
    object: str
    created: int
    """Seconds since 1970."""
    model: str
    arrival: float
    """When the client's request came, by time.monotonic()."""
    endpoint: str
    metrics: ServeMetrics

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}

    def finished(self, output: RequestOutput, first_token: float | None) -> None:
        """Tell the metrics."""
        self.metrics.request_finished(
            output, arrival=self.arrival, first_token=first_token, end=time.monotonic(), endpoint=self.endpoint
        )


class Writer(Protocol):
    """Makes the events of a streamed answer."""

    def delta(self, place: int, delta: TokenDelta) -> bytes:
        """The events of what one sample of prompt `place` gained; may be none."""

    def missing(self, place: int, output: RequestOutput) -> bytes:
        """The events of what no delta said of a prompt that has ended."""

    def usage(self, value: dict[str, Any]) -> bytes:
        """The event of the usage of the whole request."""


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(
        output.metrics.num_generation_tokens or _returned(output) if output.metrics else _returned(output)
        for output in outputs
    )
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    return usage_value(prompt, made) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _returned(output: RequestOutput) -> int:
    return sum(len(one.token_ids) for one in output.outputs)


def usage_value(prompt: int, made: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def ended(one: CompletionOutput) -> TokenDelta:
    """What the last delta of a sample would have said."""
    delta = TokenDelta(request_id="", index=one.index, text="", token_ids=[])
    delta.finish_reason, delta.stop_reason = one.finish_reason, one.stop_reason
    return delta


def check(output: RequestOutput) -> RequestOutput:
    """ApiError: a request could not run, or not to its end."""
    if output.error is not None or any(one.finish_reason == "error" for one in output.outputs):
        raise ApiError(500, f"The request failed: {output.error or 'no reason was given'}")
    return output


async def whole(http: Request, router: Router, requests: list[EngineRequest], answer: Answer) -> list[RequestOutput]:
    """The results of all requests. ClientGone: nobody waits for them any more, and they have been given up."""
    streams = router.submit_all(requests)
    async with AsyncExitStack() as stack:
        for stream in streams:
            answer.metrics.request_started(stream.request)
            await stack.enter_async_context(stream)
        async with until_gone(http):
            outputs = [await stream.result() for stream in streams]
    for output in outputs:
        answer.finished(output, None)
    return [check(output) for output in outputs]


class _Merged:
    """The deltas of several streams, each with the place of its own; what is ready at one moment comes together."""

    def __init__(self, streams: list[Stream]):
        self.streams = streams
        self._ready: list[tuple[int, TokenDelta]] = []
        self._something = asyncio.Event()
        self._error: BaseException | None = None
        self._open = len(streams)
        self._pumps: list[asyncio.Task[None]] = []
        if len(streams) > 1:
            self._pumps = [asyncio.create_task(self._pump(place, stream)) for place, stream in enumerate(streams)]

    async def _pump(self, place: int, stream: Stream) -> None:
        try:
            while ready := await stream.ready():
                self._ready += [(place, delta) for delta in ready]
                self._something.set()
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            self._open -= 1
            self._something.set()

    async def next(self) -> list[tuple[int, TokenDelta]]:
        """What has come since the last call; waits for the first of it. Empty: all streams have ended."""
        if not self._pumps:
            return [(0, delta) for delta in await self.streams[0].ready()]
        while not self._ready and self._open and self._error is None:
            self._something.clear()
            await self._something.wait()
        ready, self._ready = self._ready, []
        if not ready and self._error is not None:
            raise self._error
        return ready

    async def results(self) -> list[RequestOutput]:
        """Of all streams, which have ended."""
        return [await stream.result() for stream in self.streams]

    async def close(self) -> None:
        """Read no more."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


class EventStream(Response):
    """A streamed answer; `begin` waits for its first tokens, so that what fails before has a status of its own."""

    media_type = "text/event-stream"

    def __init__(self, http: Request, writer: Writer, answer: Answer, options: StreamOptions | None):
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._http, self._writer, self._answer = http, writer, answer
        self._with_usage = bool(options and options.include_usage)
        self._stack = AsyncExitStack()
        self._first_tokens: dict[int, float] = {}

    async def begin(self, router: Router, requests: list[EngineRequest]) -> EventStream:
        """Take the requests on. Errors as from `Router.submit_all`; ClientGone."""
        streams = router.submit_all(requests)
        async with AsyncExitStack() as stack:
            for stream in streams:
                self._answer.metrics.request_started(stream.request)
                await stack.enter_async_context(stream)
            self._merged = _Merged(streams)
            stack.push_async_callback(self._merged.close)
            async with until_gone(self._http):
                self._first = await self._merged.next()
            if not self._first:
                for output in await self._merged.results():
                    check(output)
            self._stack = stack.pop_all()
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack, until_gone(self._http):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (asyncio.CancelledError, ClientGone):
                raise
            except Exception as error:  # too late for a status
                found = api_error(error)
                if found is None:
                    log.exception("the stream %s failed", self._answer.id)
                    found = ApiError(500, "The server failed at this request; its log says why.")
                event = b"data: " + found.body + b"\n\n" + DONE
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        ready = self._first
        write = self._writer.delta
        while ready:
            if len(self._first_tokens) < len(self._merged.streams):
                now = time.monotonic()
                for place, _ in ready:
                    self._first_tokens.setdefault(place, now)
            chunk = b"".join([write(place, delta) for place, delta in ready])
            if chunk:
                yield chunk
            ready = await self._merged.next()
        outputs = await self._merged.results()
        for place, output in enumerate(outputs):
            self._answer.finished(output, self._first_tokens.get(place))
        for output in outputs:
            check(output)
        parts = [self._writer.missing(place, output) for place, output in enumerate(outputs)]
        if self._with_usage:
            parts.append(self._writer.usage(usage(outputs)))
        yield b"".join([*parts, DONE])
