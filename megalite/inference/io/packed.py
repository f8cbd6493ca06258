"""Text and long rows of numbers as bytes, for the way from rank to rank. Torch-free.

The numbers of a rollout are millions. As one JSON text they would hold Python's lock for seconds.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def pack(text: bytes, ints: Collection[Collection[int]], floats: Collection[Collection[float]]) -> bytes:
    """`text`, rows of 32-bit integers and rows of float64, each row of its own length; `unpack` is the inverse."""
    lengths = np.array([len(text), len(ints), len(floats), *map(len, ints), *map(len, floats)], "<i8")
    rows = [np.array(row, kind).tobytes() for kind, rows in (("<i4", ints), ("<f8", floats)) for row in rows]
    return b"".join([lengths.tobytes(), text, *rows])


def unpack(data: bytes) -> tuple[bytes, list[list[int]], list[list[float]]]:
    size, *counts = np.frombuffer(data, "<i8", 3).tolist()
    lengths = np.frombuffer(data, "<i8", sum(counts), 24).tolist()
    at = 24 + 8 * len(lengths)
    text, at = data[at : at + size], at + size
    rows = []
    for place, length in enumerate(lengths):
        kind = np.dtype("<i4" if place < counts[0] else "<f8")
        rows.append(np.frombuffer(data, kind, length, at).tolist())
        at += length * kind.itemsize
    return text, rows[: counts[0]], rows[counts[0] :]
