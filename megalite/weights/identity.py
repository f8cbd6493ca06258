"""Whether two copies of a model are the same, told in a moment from a sample of them. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import xxhash

_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Suffixes of files that a run may read."""
WEIGHTS = (".safetensors",)
"""Suffixes of files that hold weights."""
_PIECES, _PIECE = 64, 4 << 10
"""Of a large file this many pieces, evenly spaced, of this many bytes are read."""
_WHOLE = 64 << 20
"""Bytes up to which a file that holds no weights is read whole."""


def sampled_digest(folder: Path, suffixes: Collection[str] = _SUFFIXES) -> str:
    """A digest of names, sizes and a sample of the contents of a model folder's files, in hexadecimal digits.

    Copies of different models, fine-tuned ones of one model too, differ all over; a few changed bytes are not found,
    which `tools/verify.py` does. OSError: a file can't be read.
    """
    digest = xxhash.xxh3_128()
    for file in sorted(folder.iterdir()):
        if file.suffix in suffixes and not file.name.startswith(".") and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            _update(digest, file, whole=file.suffix != ".safetensors")
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, file: Path, *, whole: bool) -> None:
    with open(file, "rb", buffering=0) as opened:
        descriptor = opened.fileno()
        size = os.fstat(descriptor).st_size
        if (whole and size <= _WHOLE) or size <= _PIECES * _PIECE:
            digest.update(os.pread(descriptor, size, 0))
            return
        for piece in range(_PIECES):  # the first has the header's beginning, the last the file's end
            digest.update(os.pread(descriptor, _PIECE, piece * (size - _PIECE) // (_PIECES - 1)))


def file_digest(path: str | Path) -> str:
    """A digest of a whole file, in hexadecimal digits. OSError: it can't be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
