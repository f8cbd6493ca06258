"""What the ranks' watchdogs say to each other: JSON lines `[KIND, VALUE, ...]` over TCP, checked on arrival."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import socket
from contextlib import suppress
from typing import Any

_LONGEST = 1 << 16
"""Bytes of one line; who sends more is not one of us."""

_UNREACHED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
"""How the kernel says that the other host has not answered."""

_KINDS: dict[str, tuple[Any, ...]] = {
    "nonce": (str,),
    "hello": (int, str),
    "together": (),
    "signal": (int,),
    "finish": (int,),
    "fail": (int, bool, str),
    "stopped": (int,),
    "here": (),
    "still": (),
    "ask": (),
    "account": (str,),
    "kill": (int,),
    "end": (int, int | None),
}
"""The kinds of lines and the types of their values.

On arrival the hub sends a `nonce`, a rank answers `hello` (rank, proof); when all are here it sends `together`, and at
last the `end` (exit code, speaker). Ranks report that they `finish` (exit code), that they `fail` (exit code, whether
by a crash, a line for the user or ''), that another rank is `stopped`. Both pass on a `signal` (number). Both say now
and then that their watch is `here`. A rank that has stood `still` says so; then the hub may `ask` all for their
`account` (see `stall`), and have a rank that does not answer `kill`ed by those who see its process.
"""


def parse(line: bytes) -> tuple[str, list[Any]]:
    """Kind and values of one line; ValueError or TypeError unless it is a known kind with values of its types."""
    kind, *values = json.loads(line)
    if kind not in _KINDS or len(values) != len(_KINDS[kind]):
        raise ValueError("not a known kind with its values")
    for place, (value, wanted) in enumerate(zip(values, _KINDS[kind], strict=True)):
        # bool is an int to isinstance, and who mixes them up is not one of us
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{kind}: wrong type")
        if isinstance(value, int) and not 0 <= value < 1 << 31:
            raise ValueError(f"{kind}: out of range")
        if isinstance(value, str):  # may end on a terminal, which must not take orders from it
            values[place] = printable(value)
    return kind, values


def printable(text: str) -> str:
    """Without what drives a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text)


def proof(token: bytes, nonce: str, rank: int) -> str:
    """Shows the hub that `rank` knows the run's token without sending it."""
    return hmac.new(token, f"{nonce}/{rank}".encode(), hashlib.sha256).hexdigest()


class Connection:
    """One end of a connection between two watchdogs. Never blocks."""

    def __init__(self, sock: socket.socket, *, now: float, timeout: float, rank: int | None = None):
        """`timeout`: seconds without an answer of the other host's kernel after which it counts as gone."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(timeout / 4)))
        self.socket, self.rank, self._timeout = sock, rank, timeout
        """`rank`: the rank at the other end; None until it has proved itself."""
        self.nonce = ""
        self.since = now
        """When it came (monotonic seconds)."""
        self.broken = ""
        """Why it is of no use any more, for the user; '' while it is."""
        self._rest = b""

    def send(self, kind: str, *values: object) -> None:
        """Send one line. A peer whose buffer is full has not read for minutes and is as good as gone."""
        data = json.dumps([kind, *values]).encode() + b"\n"
        try:
            if self.socket.send(data) != len(data):
                self._fault("it does not read what it is sent")
        except OSError as error:
            self._failed("sending", error)

    def receive(self) -> list[tuple[str, list[Any]]]:
        """What has come; sets `broken` at the end of the stream, on an error and on anything that `parse` refuses."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            self._failed("receiving", error)
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        parsed = []
        try:
            if max(map(len, [*lines, self._rest])) > _LONGEST:
                raise ValueError("too long")
            parsed = [parse(line) for line in lines]
        except (ValueError, TypeError, RecursionError):
            self._fault("it sent what none of us sends")
        if not data:
            self._failed("receiving", BrokenPipeError())
        return parsed

    def _failed(self, doing: str, error: OSError) -> None:
        if isinstance(error, BrokenPipeError | ConnectionResetError):
            self.broken = self.broken or "ended without a word (killed, out of memory or crashed)"
        elif error.errno in _UNREACHED:
            self.broken = self.broken or no_sign_of_life(self._timeout)
        else:
            self._fault(f"{doing} failed: {error.strerror}")

    def _fault(self, fault: str) -> None:
        self.broken = self.broken or f"the connection to its watch broke: {fault}"

    def close(self) -> None:
        with suppress(OSError):  # it is broken already
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def no_sign_of_life(timeout: float) -> str:
    """Why a rank counts as lost that is stopped, or whose host does not answer."""
    return f"no sign of life for {timeout:g} s (stopped or cut off)"
