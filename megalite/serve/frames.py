"""Messages to bytes and back, and how a replica on another host proves that it belongs to the run. Torch-free."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from megalite.serve.messages import FromReplica, ToReplica

MAX_FRAME = 1 << 30
"""Bytes of a frame; who announces more is none of us."""
NONCE_BYTES = 32
"""What the HTTP process sends first over TCP; a replica answers with as many, `proof`, before its first frame."""
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def frame(messages: Sequence[FromReplica] | Sequence[ToReplica]) -> bytes:
    """One frame with these messages. ValueError: longer than MAX_FRAME."""
    data = _encoder.encode(messages)
    if len(data) > MAX_FRAME:
        raise ValueError(f"a frame of {len(data)} bytes")
    return _LENGTH.pack(len(data)) + data


M = TypeVar("M")


class Frames(Generic[M]):
    """Messages out of a stream of bytes, however it was cut on its way.

    Frames.of_replica() is for the HTTP process's end, Frames.to_replica() for a replica's.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[M]]):
        self._decoder = decoder
        self._rest = bytearray()

    @staticmethod
    def of_replica() -> Frames[FromReplica]:
        return Frames(msgspec.msgpack.Decoder(list[FromReplica]))

    @staticmethod
    def to_replica() -> Frames[ToReplica]:
        return Frames(msgspec.msgpack.Decoder(list[ToReplica]))

    def feed(self, data: bytes) -> Iterator[M]:
        """The messages that are whole with `data`, in order. ValueError or msgspec.MsgspecError: it is none of ours."""
        self._rest += data
        start = 0
        while len(self._rest) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._rest, start)
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes")
            end = start + _LENGTH.size + size
            if len(self._rest) < end:
                break
            with memoryview(self._rest) as view:
                messages = self._decoder.decode(view[start + _LENGTH.size : end])
            start = end
            yield from messages
        del self._rest[:start]


def proof(token: bytes, nonce: bytes) -> bytes:
    """Shows the HTTP process that a replica knows the run's token without sending it; compare_digest it."""
    return hmac.new(token, nonce, hashlib.sha256).digest()
