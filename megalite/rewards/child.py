"""A process that speaks with its parent over a socket: pipes can be opened by others of the user, through /proc."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_PIECE = 1 << 16
"""Bytes read at a time."""


class Child:
    """A started process, in a session of its own, and the socket to it.

    `command` gets the number of its end of the socket as a last argument; `settings` are of subprocess.Popen.
    Deadlines are times of time.monotonic(); TimeoutError if one is over.
    """

    def __init__(self, command: Sequence[str], **settings: Any):
        self._socket, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            self.process = subprocess.Popen(
                [*command, str(end)], stdin=subprocess.DEVNULL, pass_fds=[end], start_new_session=True, **settings
            )
        self._heard = b""

    def say(self, data: bytes, deadline: float) -> None:
        """Send all of `data`; that the process has ended shows when it is heard."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def no_more(self) -> None:
        """Close the direction to the process; it reads an end of file."""
        with suppress(OSError):  # it may have ended
            self._socket.shutdown(socket.SHUT_WR)

    def hear(self, deadline: float, most: float = float("inf")) -> bytes:
        """The next line with its end; without one where the process ended before, or after `most` bytes."""
        while b"\n" not in self._heard and len(self._heard) < most:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = self._socket.recv(_PIECE)
            except ConnectionResetError:  # it ended before it had read all
                piece = b""
            if not piece:
                break
            self._heard += piece
        line, end, self._heard = self._heard.partition(b"\n")
        return line + end

    def wait(self, deadline: float) -> int:
        """The status with which the process ended."""
        try:
            return self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def close(self) -> None:
        """Forget the socket; the process must have ended."""
        self._socket.close()
