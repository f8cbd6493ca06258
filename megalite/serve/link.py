"""A control rank's connection to the HTTP process: messages over a socket, without ever waiting for it. Torch-free."""

from __future__ import annotations

import os
import select
import socket
import time

import msgspec

from megalite.errors import RankLost
from megalite.serve.frames import NONCE_BYTES, Frames, frame, proof
from megalite.serve.messages import FromReplica, ToReplica

CONNECT_WITHIN = 10.0
"""Seconds within which the HTTP process, which listens before any replica is started, must have answered."""
_READ = 1 << 20
_LONGEST_PATH = 100
"""Bytes that the address of a unix socket may have for sure."""


class LinkError(RankLost):
    """The HTTP process is gone, does not read, or sent what none of us sends."""


def connect(address: str | tuple[str, int], *, token: bytes = b"") -> socket.socket:
    """A connection to the HTTP process: `address` is the path of a unix socket, or the host and port of one that asks
    for a proof of the run's token. LinkError: nobody answers there."""
    try:
        if isinstance(address, str):
            return _connect_unix(address)
        made = socket.create_connection(address, CONNECT_WITHIN)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.sendall(proof(token, made.recv(NONCE_BYTES, socket.MSG_WAITALL)))
        return made
    except OSError as error:
        raise LinkError(f"no HTTP process answers at {address}: {error.strerror or error}") from error


def _connect_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        made.connect(path)
        return made
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    try:
        made.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
    return made


class Link:
    """The replica's end of the connection. Only `wait` blocks: what can't be sent at once is kept and sent later."""

    def __init__(self, connection: socket.socket, *, patience: float):
        """`patience`: seconds without reading after which the HTTP process counts as lost."""
        connection.setblocking(False)
        self._socket = connection
        self._patience = patience
        self._frames = Frames.to_replica()
        self._unsent = bytearray()
        self._moved = 0.0
        """When something was last sent, or nothing was left to send (time.monotonic())."""
        self.ended = False
        """The HTTP process has closed its end, or is gone."""

    def wait(self, seconds: float) -> None:
        """Block until a message or the end has come, unsent bytes can be sent, or so many seconds have passed."""
        select.select([self._socket], [self._socket] if self._unsent else [], [], seconds)

    def receive(self) -> list[ToReplica]:
        """The messages that have come so far. LinkError: they can't be read."""
        messages: list[ToReplica] = []
        while not self.ended:
            try:
                data = self._socket.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            try:
                messages += self._frames.feed(data)
            except (ValueError, msgspec.MsgspecError) as error:
                raise LinkError(f"what the HTTP process sent can't be read: {error}") from error
        return messages

    def send(self, *messages: FromReplica) -> None:
        """Send these after what is still unsent, as far as that goes at once; with none, go on sending.

        LinkError: for as long as it is given, the HTTP process has read nothing.
        """
        now = time.monotonic()
        if not self._unsent:
            self._moved = now
        if messages:
            self._unsent += frame(messages)
        try:
            while self._unsent and not self.ended:
                del self._unsent[: self._socket.send(self._unsent)]
                self._moved = now
        except BlockingIOError:
            if now - self._moved > self._patience:
                raise LinkError(f"the HTTP process has read nothing for {self._patience:g} s") from None
        except OSError:
            self.ended = True

    def close(self) -> None:
        self._socket.close()
