"""A client that asks a server for many completions at once, or as they arrive, and notes when what came. Torch-free.

It shares the machine with the server, so it does little while answers come: bytes are kept with their time and read
afterwards. One connection a request, HTTP/1.1; any server of OpenAI's API will do.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from megalite.errors import ConfigError, MegaliteError, Problem

PATIENCE = 300.0
"""Seconds that a server may be silent."""


class BadAnswer(MegaliteError):
    """The server refused a request, or its answer is none of the API's."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request and when its answer came, by time.perf_counter()."""

    sent: float
    ended: float
    tokens: int
    """Of output, as `usage` has it."""
    times: tuple[float, ...]
    """When each event with text came; of one that was not streamed none."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events, which mostly hold one token."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    url: str
    model: str | None = None
    key: str | None = None

    def request(self, method: str, path: str, value: dict[str, Any] | None = None) -> bytes:
        """A whole HTTP request, after which the server closes the connection."""
        body = b"" if value is None else json.dumps(value).encode()
        parts = urlsplit(self.url)
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if value is not None else []
        return "\r\n".join([*lines, "", ""]).encode() + body

    def completion(self, prompt: Sequence[int] | str, max_tokens: int, *, stream: bool) -> bytes:
        value: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        if self.model is not None:
            value["model"] = self.model
        if stream:
            value |= {"stream": True, "stream_options": {"include_usage": True}}
        return self.request("POST", "/v1/completions", value)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of an answer. OSError: nobody is there."""
        [answer] = exchange(self.url, [self.request("GET", path)], [0.0])
        return answer.status, b"".join(data for _, data in answer.body())

    def ask(self, requests: Sequence[bytes], delays: Sequence[float]) -> list[Answered]:
        """All requests, each sent so many seconds after the beginning. BadAnswer, OSError."""
        return [one.answered() for one in exchange(self.url, requests, delays)]


def exchange(url: str, requests: Sequence[bytes], delays: Sequence[float]) -> list[Exchange]:
    """Send each request after so many seconds, over a connection of its own, and wait for the end of all answers.

    ConfigError: not http; OSError: a connection failed; BadAnswer: for PATIENCE seconds nothing came.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ConfigError(Problem(key="--url", rule="must be http://HOST:PORT", value=url))
    family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[
        0
    ]
    began = time.perf_counter()
    found = [Exchange(began + delay) for delay in delays]
    later = deque(sorted(range(len(requests)), key=delays.__getitem__))
    open_: dict[int, tuple[socket.socket, Exchange]] = {}
    with ExitStack() as stack, select.epoll() as poll:
        while later or open_:
            while later and (wait := found[later[0]].sent - time.perf_counter()) <= 0:
                index = later.popleft()
                made = stack.enter_context(socket.socket(family, kind, protocol))
                made.settimeout(PATIENCE)
                made.connect(address)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                made.sendall(requests[index])
                open_[made.fileno()] = made, found[index]
                poll.register(made, select.EPOLLIN)
            ready = poll.poll(wait if later else PATIENCE)
            if not ready and not later:
                raise BadAnswer(f"nothing came for {PATIENCE:g} s")
            for number, _ in ready:
                source, one = open_[number]
                data = source.recv(1 << 16)
                now = time.perf_counter()
                if data:
                    one.pieces.append((now, data))
                else:
                    poll.unregister(number)
                    source.close()
                    del open_[number]
    return found


class Exchange:
    """One request and what came of it."""

    def __init__(self, sent: float):
        self.sent = sent
        self.pieces: list[tuple[float, bytes]] = []

    @property
    def status(self) -> int:
        line = b"".join(data for _, data in self.pieces).split(b"\r\n", 1)[0].split(b" ")
        if len(line) < 2 or not line[1].isdigit():
            raise BadAnswer("the server closed a connection without an answer")
        return int(line[1])

    def body(self) -> Iterator[tuple[float, bytes]]:
        """The parts of the body, as they came."""
        rest, chunked, in_body, left = b"", False, False, 0
        for when, data in self.pieces:
            rest += data
            if not in_body:
                head, border, after = rest.partition(b"\r\n\r\n")
                if not border:
                    continue
                in_body, rest, chunked = True, after, b"transfer-encoding: chunked" in head.lower()
            if not chunked:
                yield when, rest
                rest = b""
            while chunked and rest:
                if left == 0:
                    size, border, after = rest.removeprefix(b"\r\n").partition(b"\r\n")
                    if not border:
                        break
                    left, rest = int(size.partition(b";")[0], 16), after
                    if left == 0:
                        return
                yield when, rest[:left]
                rest, left = rest[left:], max(0, left - len(rest))

    def answered(self) -> Answered:
        if self.status != 200:
            raise BadAnswer(f"status {self.status}: {b''.join(data for _, data in self.body()).decode()[:500]}")
        parts = list(self.body())
        whole = b"".join(data for _, data in parts)
        if not whole.startswith(b"data:"):
            return Answered(self.sent, self.pieces[-1][0], json.loads(whole)["usage"]["completion_tokens"], ())
        tokens, times, rest = 0, [], b""
        for when, data in parts:
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    continue
                value = json.loads(event.removeprefix(b"data: "))
                if "error" in value:
                    raise BadAnswer(f"a stream ended with an error: {str(value['error'])[:500]}")
                if any(choice.get("text") for choice in value["choices"]):
                    times.append(when)
                tokens = (value.get("usage") or {}).get("completion_tokens", tokens)
        if not times:
            raise BadAnswer("a stream without text")
        return Answered(self.sent, self.pieces[-1][0], tokens, tuple(times))
