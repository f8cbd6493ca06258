"""From the API's requests to replicas: what is taken on, who gets it, and what happens when one is lost. Torch-free.

All of it runs in one event loop, and nothing here waits for anything but a stream's own reader.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megalite.inference.io.inputs import PromptLimits
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.serve.messages import Hello, Step

ReplicaState = Literal["starting", "ready", "lost", "restarting", "ended"]
"""starting, restarting: it has not said Hello (again); lost: its end was noticed, and what is left of it is being
removed; ended: it will not be started again."""


@dataclass(slots=True)
class ReplicaView:
    """One replica as the page and the metrics show it."""

    replica: int
    state: ReplicaState
    restarts: int
    """Times that it was started again."""
    hello: Hello | None
    """Its last one."""
    step: Step | None
    """The last one that it sent; None since it was lost."""
    requests: int
    """Assigned to it."""
    tokens: int
    """Prompt + max_tokens of these, all samples."""


class Stream:
    """A request that was taken on. Made by `Router.submit`; used as

        async with router.submit(request) as stream:
            async for delta in stream: ...
            output = await stream.result()

    A body that is left before the end (a client went away) gives the request up.
    """

    request: Request

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """What each sample gains, in order, across losses of replicas; one reader. Ends with the request; nothing
        comes unless request.stream. RequestLost: see there."""
        raise NotImplementedError

    async def result(self) -> RequestOutput:
        """The whole result, once it is there. Its `error` says why the request could not run, or not to the end.

        RequestLost: see there. asyncio.CancelledError: it was given up by `cancel`.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Give the request up: its memory is free within a step. Does nothing once it has ended."""
        raise NotImplementedError

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class Router:
    """Takes requests on, spreads them over the replicas and gives each its stream."""

    state: Literal["starting", "ready", "draining", "lost"]
    """starting: no replica has been ready yet; ready: at least one has been, and one is or is being started again;
    draining: nothing new is taken; lost: no replica is left, the process is about to end."""
    limits: PromptLimits
    """What a prompt must fit on every replica; while `state` is starting, by the config alone (max_model_len may turn
    out smaller)."""
    healthy: bool
    """False: all replicas stall or are lost; the process is about to end itself."""
    ready: bool
    """A replica is there, takes requests and finished a step within the last seconds, or has nothing to do."""

    def submit(self, request: Request) -> Stream:
        """Take a request on; its id must be new. Overloaded, Draining, NoReplica: not now."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Take all on, or none."""
        raise NotImplementedError

    def admit(self, requests: int, tokens: int) -> None:
        """Raise what `submit` would for so many requests with so many tokens (samples * (prompt + max_tokens)), before
        any of them is made."""
        raise NotImplementedError

    def replicas(self) -> list[ReplicaView]:
        """By number."""
        raise NotImplementedError
