"""A client's connection, as uvicorn has it, with bounds on what comes before there is a request. Torch-free."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from megalite.serve.envelope import ApiError
from megalite.serve.gate import MAX_HEADER_BYTES

MAX_HEAD = 2 * MAX_HEADER_BYTES
"""Bytes of a request's first line and headers, as they come."""


BODY = "megalite.body"
"""The name of a `Body` among the extensions of a request's ASGI scope."""


class Body:
    """The rest of a streamed answer whose head is sent, for who writes without waiting."""

    __slots__ = ("_cycle", "_flow")

    def __init__(self, cycle: RequestResponseCycle):
        self._cycle, self._flow = cycle, cycle.flow

    def is_ready(self) -> bool:
        """Its client is there and keeps up. If not, write through ASGI's `send`, which waits."""
        return not self._flow.write_paused and not self._cycle.disconnected

    def write(self, data: bytes) -> None:
        """Send `data`, if there is any, as one chunk of an answer of unknown length; only while `is_ready`."""
        if data:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class Connection(HttpToolsProtocol):
    """A client must send the head of a request within `patience` seconds and MAX_HEAD bytes; what is no HTTP is
    answered with an error envelope. Bodies are read by `gate.Bodies`; what is left of one after its answer is read
    for at most `patience` seconds and thrown away."""

    patience = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._rest_timer: asyncio.TimerHandle | None = None
        self._is_whole = True
        """The whole of the last request has come."""
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._has_head()
        self._has_rest()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(431, f"The head of a request may have {MAX_HEAD} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._has_head()
        self._is_whole = False
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            scope: Any = self.scope  # uvicorn's own extensions are dicts
            scope.setdefault("extensions", {})[BODY] = Body(self.cycle)

    def on_message_complete(self) -> None:
        self._has_rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_whole and self._rest_timer is None and not self.transport.is_closing():
            self._rest_timer = asyncio.get_running_loop().call_later(self.patience, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            words = f"The head of a request did not arrive within {self.patience:g} s."
            self._head_timer = asyncio.get_running_loop().call_later(self.patience, self._refuse, 408, words)

    def _has_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _has_rest(self) -> None:
        self._is_whole = True
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _refuse(self, status: int, words: str) -> None:
        """Answer what is no request, and close. Nothing is said in the middle of another answer."""
        self._has_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = ApiError(status, words).body
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
