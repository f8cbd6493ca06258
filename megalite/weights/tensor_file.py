"""The header of a safetensors file: read and checked against every rule, or made for a new file.

The file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes end to end. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite import json_text
from megalite.errors import CheckpointError
from megalite.weights.dtypes import DTYPE_BYTES

MAX_HEADER_BYTES = 100 << 20
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    """Name in the file."""
    dtype: str
    """safetensors' name, e.g. `BF16`."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Position of the first byte, from the start of the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in file order.

    CheckpointError, naming the file and the tensor, if it is not one, is cut short, or its header breaks any rule:
    known dtypes, unique plain names, byte counts that fit the shapes, ranges without gap or overlap.
    """
    size, length, text = _raw_header(path)
    try:
        header = json_text.parse(text)
    except json_text.JsonError as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged: not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header must map names to strings")
    start = 8 + length
    tensors = [_entry(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {tensor.name} {what}")
        end += tensor.nbytes
    if end > size:
        raise CheckpointError(f"{path}: cut short: {size} bytes, its header promises {end}. Download it again.")
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes more than its header accounts for")
    return {tensor.name: tensor for tensor in tensors}


def _raw_header(path: Path) -> tuple[int, int, bytes]:
    """File size, header length and header bytes."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the weights. Fetch them with `git lfs pull` in that folder."
                )
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(f"{path}: cut short or not a safetensors file ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are believed")
            file.seek(8)
            return size, length, file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def stored_bytes(info: TensorInfo) -> bytearray:
    """All of a tensor, which must be small."""
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        return bytearray(file.read(info.nbytes))


def is_plain_name(name: str) -> bool:
    """Whether a tensor name can't be mistaken for a path: no separators, no `..`, nothing unprintable."""
    return bool(name) and name.isprintable() and ".." not in name and "/" not in name and "\\" not in name


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def problem(rule: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:100]!r} {rule}")

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)

    if not is_plain_name(name):
        raise problem("does not have a plain name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise problem("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise problem(f"has an unknown dtype {str(dtype)[:20]!r}")
    if not counts(shape) or len(shape) > 16:
        raise problem("has a damaged shape")
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise problem("has damaged offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise problem(f"has {nbytes} bytes, which is not what {dtype} of shape {shape} takes")
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def new_header(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file that is to hold `entries` (name -> dtype, shape), and where each tensor goes.

    Wider dtypes come first, so that every tensor is aligned to its elements.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]):
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    del header["__metadata__"]
    return first, {name: _entry(path, name, entry, len(first)) for name, entry in header.items()}
