"""The HTTP server's socket, and uvicorn in the event loop of the HTTP process. Torch-free."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from megalite.config.schema import ServerSection
from megalite.errors import ConfigError, Problem
from megalite.serve.connection import Connection

KEEP_ALIVE = 75
"""Seconds that a connection is kept open for a next request. Longer than clients keep one (httpx 5, aiohttp 15): who
closes first must be the client, else a request may be sent into a connection that is being closed."""


def open_socket(section: ServerSection) -> socket.socket:
    """A listening socket at server.host and port. ConfigError: that can't be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            section.host, section.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(Problem(key="server.host", rule=f"{error.strerror}", value=section.host)) from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        rule = f"can't listen on {section.host} ({error.strerror})"
        fix = "Choose another port, or 0 for a free one."
        raise ConfigError(Problem(key="server.port", rule=rule, value=section.port, fix=fix)) from error
    return made


def url(sock: socket.socket) -> str:
    """Where clients find it."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the HTTP process's own affair."""
        yield


class Listener:
    """Serves an app at a socket until `stop`."""

    def __init__(self, app: ASGIApp, sock: socket.socket, *, head_timeout: float, patience: int):
        """`head_timeout`: seconds for the head of a request; `patience`: for answers to be sent to their end by
        `stop`."""

        class Own(Connection):
            patience = head_timeout

        config = uvicorn.Config(
            app,
            http=Own,
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # nothing here asks where a client is
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=patience,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve([sock]))

    async def stop(self) -> None:
        """Accept nothing more, send what is left of the answers, close."""
        self._server.should_exit = True
        await self._task
