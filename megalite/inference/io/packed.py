"""Text and long rows of numbers as bytes, for the way from rank to rank. Torch-free.

The numbers of a rollout are millions. As one JSON text they would hold Python's lock for seconds. They are in the byte
order of the machine, which the ranks of a run have in common.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

import numpy as np


def pack(text: bytes, ints: Collection[Collection[int]], floats: Collection[Collection[float]]) -> bytes:
    """`text`, rows of 32-bit integers and rows of float64, each row of its own length; `unpack` is the inverse."""
    lengths = array("q", [len(text), len(ints), len(floats), *map(len, ints), *map(len, floats)])
    rows = [array(kind, row).tobytes() for kind, rows in (("i", ints), ("d", floats)) for row in rows]
    return b"".join([lengths.tobytes(), text, *rows])


def unpack(data: bytes) -> tuple[bytes, list[list[int]], list[list[float]]]:
    size, *counts = np.frombuffer(data, "i8", 3).tolist()
    lengths = np.frombuffer(data, "i8", sum(counts), 24).tolist()
    at = 24 + 8 * len(lengths)
    text, at = data[at : at + size], at + size
    rows = []
    for place, length in enumerate(lengths):
        kind = np.dtype("i4" if place < counts[0] else "f8")
        rows.append(np.frombuffer(data, kind, length, at).tolist())
        at += length * kind.itemsize
    return text, rows[: counts[0]], rows[counts[0] :]


def pack_texts(texts: Sequence[str | None]) -> tuple[bytes, list[int]]:
    """All texts as UTF-8 and their lengths in characters, -1 for None; `unpack_texts` is the inverse.

    Half a surrogate pair, which only a refused prompt can hold, is kept too.
    """
    joined = "".join([text for text in texts if text])
    return joined.encode("utf-8", "surrogatepass"), [-1 if text is None else len(text) for text in texts]


def unpack_texts(data: bytes, lengths: Sequence[int]) -> list[str | None]:
    joined = data.decode("utf-8", "surrogatepass")
    texts: list[str | None] = []
    at = 0
    for length in lengths:
        texts.append(None if length < 0 else joined[at : at + length])
        at += max(length, 0)
    return texts
