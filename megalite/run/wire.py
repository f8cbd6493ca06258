"""What the ranks' watchdogs say to each other: JSON lines over TCP, checked before anyone looks at them."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megalite.run.referee import End

_LONGEST = 4096
"""Bytes of one line; who sends more is not one of us."""

_UNREACHED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
"""How the kernel says that the other host has not answered."""

_FIELDS: dict[str, dict[str, Any]] = {
    "nonce": {"nonce": str},
    "hello": {"rank": int, "proof": str},
    "together": {},
    "stopped": {},
    "signal": {"signum": int},
    "finish": {"code": int},
    "fail": {"code": int, "crash": bool},
    "orphan": {"line": str},
    "abort": {"signum": int},
    "end": {"code": int, "speaker": int | None, "line": str, "lost": list},
}
"""The messages, and the fields of each."""


@dataclass(frozen=True)
class Message:
    kind: str
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def end_fields(end: End) -> dict[str, Any]:
    """An `End` as the fields of a message, cut to what fits in one."""
    return {"code": end.code, "speaker": end.speaker, "line": end.line[:500], "lost": list(end.lost[:100])}


def end_of(message: Message) -> End:
    """The inverse of `end_fields`."""
    fields = {**message.fields, "lost": tuple(rank for rank in message["lost"] if type(rank) is int)}
    return End(**fields)


def parse(line: bytes) -> Message:
    """One message; ValueError unless it is a known one with exactly its fields, of the right types."""
    value = json.loads(line)
    if not isinstance(value, dict) or value.get("kind") not in _FIELDS:
        raise ValueError("not a message")
    kind, wanted = value["kind"], _FIELDS[value.pop("kind")]
    if value.keys() != wanted.keys():
        raise ValueError(f"{kind}: wrong fields")
    for name, field_type in wanted.items():
        # bool is an int to isinstance, and a message that mixes them up is not ours
        if not isinstance(value[name], field_type) or (isinstance(value[name], bool) and field_type is not bool):
            raise ValueError(f"{kind}.{name}: wrong type")
        if isinstance(value[name], int) and not 0 <= value[name] < 1 << 31:
            raise ValueError(f"{kind}.{name}: out of range")
        if isinstance(value[name], str):  # may end on a terminal, which must not take orders from it
            value[name] = "".join(c if c.isprintable() else "?" for c in value[name])
    return Message(kind, value)


def proof(token: bytes, nonce: str, rank: int) -> str:
    """Shows the hub that `rank` knows the run's token without sending it."""
    return hmac.new(token, f"{nonce}/{rank}".encode(), hashlib.sha256).hexdigest()


class Connection:
    """One end of a connection between two watchdogs. Never blocks; a peer that breaks the rules is `closed`."""

    def __init__(self, sock: socket.socket, *, now: float, timeout: float, rank: int | None = None):
        """`timeout`: seconds without an answer of the other host's kernel after which it counts as gone."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(timeout / 4)))
        self.socket = sock
        self.rank = rank
        """The rank at the other end; None until it has proved itself."""
        self.nonce = ""
        self.heard = now
        """When anything last came (monotonic seconds)."""
        self.closed = False
        self.silent = False
        """The rank gives no sign of life: it is stopped, or its host does not answer."""
        self.fault = ""
        """What closed it, where that was not the peer."""
        self._rest = b""

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message. A peer whose buffer is full has not read for minutes and is as good as gone."""
        data = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        try:
            if self.socket.send(data) != len(data):
                self._break("it does not read what it is sent")
        except (BrokenPipeError, ConnectionResetError):
            self.closed = True
        except OSError as error:
            self._break(f"sending failed: {error.strerror}", error)

    def receive(self, now: float) -> list[Message]:
        """What has come; sets `closed` at the end of the stream, on an error and on anything that is not a message."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        except OSError as error:
            data = b""
            self._break(f"receiving failed: {error.strerror}", error)
        self.heard = now
        self.closed |= not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = []
        try:
            if max(map(len, [*lines, self._rest])) > _LONGEST:
                raise ValueError("too long")
            messages = [parse(line) for line in lines]
        except (ValueError, RecursionError):
            self._break("it sent what is no message")
        return messages

    def _break(self, fault: str, error: OSError | None = None) -> None:
        self.closed, self.fault = True, self.fault or fault
        self.silent |= error is not None and error.errno in _UNREACHED

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):  # it is broken already
            self.socket.shutdown(socket.SHUT_RDWR)  # for the guardian's copy too
        self.socket.close()
