"""From the streams of a request to its answer: whole, or server-sent events as tokens come. Torch-free.

Events are bytes put together by hand, and those that are ready at one moment go out in one write: one core sends far
more of them than a model makes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request as EngineRequest
from megalite.serve.connection import BODY, Body
from megalite.serve.envelope import ApiError, api_error
from megalite.serve.gate import ClientGone, until_gone
from megalite.serve.metrics import ServeMetrics
from megalite.serve.protocol import StreamOptions
from megalite.serve.router import Router
from megalite.serve.streams import Gain, Merged, Stream

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Facts that all parts of one answer share."""

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


class Writer(ABC):
    """Makes the events of a streamed answer. An event is `_head`, one choice, and `_end()`."""

    def __init__(self, answer: Answer, options: StreamOptions | None, requests: Sequence[EngineRequest]):
        with_usage = bool(options and options.include_usage)
        self._continuous = bool(with_usage and options and options.continuous_usage_stats)
        self._head = b"data: " + encode({**answer.head(), "choices": []})[:-2]
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._n = requests[0].params.n
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        """Choices, by their index in the answer."""
        self._made = 0
        self._prompt = sum(len(one.prompt_token_ids) for one in requests)

    @abstractmethod
    def delta(self, place: int, delta: TokenDelta) -> bytes:
        """The events of what one sample of prompt `place` gained; may be none."""

    def missing(self, place: int, output: RequestOutput) -> bytes:
        """The events of what no delta said of a prompt that has ended."""
        left = (one for one in output.outputs if place * self._n + one.index not in self._ended)
        return b"".join([self.delta(place, ended(one)) for one in left])

    def usage(self, value: dict[str, Any]) -> bytes:
        """The event of the usage of the whole request."""
        return self._head + b'],"usage":' + encode(value) + b"}\n\n"

    def _end(self) -> bytes:
        if self._continuous:
            return b'],"usage":' + encode(usage_value(self._prompt, self._made)) + b"}\n\n"
        return self._tail


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
    """A finished sample as its last delta: the reason of its end, without text."""
    delta = TokenDelta(request_id="", index=one.index, text="", token_ids=[])
    delta.finish_reason, delta.stop_reason = one.finish_reason, one.stop_reason
    return delta


def check(output: RequestOutput) -> RequestOutput:
    """ApiError: a request could not run, or not to its end."""
    if output.error is not None or any(one.finish_reason == "error" for one in output.outputs):
        raise ApiError(500, f"The request failed: {output.error or 'no reason was given'}")
    return output


async def _begun(stack: AsyncExitStack, router: Router, requests: list[EngineRequest], answer: Answer) -> list[Stream]:
    """The streams of requests that are taken on; what has not ended when the stack is left is given up."""
    streams = router.submit_all(requests)
    for stream in streams:
        answer.metrics.request_started(stream.request)
        await stack.enter_async_context(stream)
    return streams


def check_stream_options(options: StreamOptions | None, stream: bool | None) -> None:
    """ApiError: stream_options were given for an answer that is not streamed."""
    if options is not None and not stream:
        raise ApiError(400, "stream_options: only with stream true.", param="stream_options")


async def whole(http: Request, router: Router, requests: list[EngineRequest], answer: Answer) -> list[RequestOutput]:
    """The results of all requests. ClientGone: nobody waits for them any more, and they have been given up."""
    async with AsyncExitStack() as stack:
        streams = await _begun(stack, router, requests, answer)
        async with until_gone(http):
            outputs = [await stream.result() for stream in streams]
    for output in outputs:
        answer.finished(output, None)
    return [check(output) for output in outputs]


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
        async with AsyncExitStack() as stack:
            streams = await _begun(stack, router, requests, self._answer)
            self._merged = Merged(streams)
            async with until_gone(self._http):
                self._first = await self._merged.next()
            if not self._first:
                for stream in streams:
                    check(await stream.result())
            self._stack = stack.pop_all()
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        to_client: Send = scope["state"].get("send", send)
        """Without the layers between, which do nothing more once the head of an answer is sent."""

        def write(chunk: bytes) -> Awaitable[None]:
            return to_client({"type": "http.response.body", "body": chunk, "more_body": True})

        async with self._stack, until_gone(self._http):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            body = (scope.get("extensions") or {}).get(BODY)
            if isinstance(body, Body):
                self._merged.give_to(lambda ready: body.write(self._events(ready)), body.is_ready)
            try:
                await self._write(write)
            except (asyncio.CancelledError, ClientGone):
                raise
            except Exception as error:  # too late for a status
                found = api_error(error)
                if found is None:
                    log.exception("the stream %s failed", self._answer.id)
                    found = ApiError(500, "The server failed at this request; its log says why.")
                await write(b"data: " + found.body + b"\n\n" + DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _events(self, ready: Sequence[Gain]) -> bytes:
        """What its client is to read of this; may be nothing."""
        if len(self._first_tokens) < len(self._merged.streams):
            now = time.monotonic()
            for place, _ in ready:
                self._first_tokens.setdefault(place, now)
        events = self._writer.delta
        if len(ready) == 1:
            [(place, delta)] = ready
            return events(place, delta)
        return b"".join([events(place, delta) for place, delta in ready])

    async def _write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        merged, ready = self._merged, self._first
        while ready:
            if chunk := self._events(ready):
                await write(chunk)
            ready = await merged.next()
        outputs = [await stream.result() for stream in merged.streams]
        for place, output in enumerate(outputs):
            self._answer.finished(output, self._first_tokens.get(place))
        for output in outputs:
            check(output)
        parts = [self._writer.missing(place, output) for place, output in enumerate(outputs)]
        if self._with_usage:
            parts.append(self._writer.usage(usage(outputs)))
        await write(b"".join([*parts, DONE]))
