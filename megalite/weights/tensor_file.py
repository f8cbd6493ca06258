"""One safetensors file: a header that is believed only after every rule is checked, and byte ranges of its tensors.

The file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes end to end. Reading is plain
`pread`, not a memory map, so that ranges arrive in large sequential requests and count as nobody's resident memory.
Importable without torch; only `read` needs it.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite import json_text
from megalite.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Formats a weight may have, and torch's names for them."""

MAX_HEADER_BYTES = 100 << 20
CHUNK_BYTES = 16 << 20
"""Most that is read at once beyond what was asked for."""
LONG_SEGMENT_BYTES = 256 << 10
"""Column ranges this long a row are read row by row; shorter ones cost less as whole rows, cut in memory."""
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    """As in the file."""
    dtype: str
    """safetensors' name, e.g. `BF16`."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in file order.

    CheckpointError, naming the file and the tensor, if it is not one, is cut short, or its header breaks any rule:
    known dtypes, unique plain names, byte counts that fit the shapes, ranges without gap or overlap.
    """
    size, length, text = _raw_header(path)
    try:
        header = json_text.parse(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged: not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header must map names to strings")
    start = 8 + length
    tensors = sorted((_entry(path, name, entry, start) for name, entry in header.items()), key=_place)
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


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes


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


def is_plain_name(name: str) -> bool:
    """Whether a tensor name can't be mistaken for a path: no separators, no `..`, nothing unprintable."""
    return bool(name) and name.isprintable() and ".." not in name and not set(name) & set("/\\")


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


class TensorFiles:
    """Ranges of the tensors of one or more files; holds the files open between reads.

    `tensors` may list them under other names than the files do. Threads may share it. Use as a context manager, or
    call `close`.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = dict(tensors)
        self._open: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, name: str, dim: int | None = None, lo: int = 0, hi: int | None = None) -> Tensor:
        """Elements lo..hi of a tensor along dim 0 or 1 (None: all of it) as a new CPU tensor in its stored dtype.

        CheckpointError if it is not of a floating-point type that weights may have, or the file can't be read.
        """
        import torch

        info = self.tensors[name]
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} is {info.dtype}; weights must be {', '.join(WEIGHT_DTYPES)}"
            )
        shape = range_shape(info, dim, lo, hi)
        dtype = getattr(torch, WEIGHT_DTYPES[info.dtype])
        data = self.read_bytes(name, dim, lo, hi)
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    def read_bytes(self, name: str, dim: int | None = None, lo: int = 0, hi: int | None = None) -> bytearray:
        """As `read`, the bytes of the range in row-major order."""
        info = self.tensors[name]
        data = bytearray(math.prod(range_shape(info, dim, lo, hi)) * DTYPE_BYTES[info.dtype])
        self.read_into(memoryview(data), name, dim, lo, hi)
        return data

    def read_into(self, out: memoryview, name: str, dim: int | None = None, lo: int = 0, hi: int | None = None) -> None:
        """As `read_bytes`, into a writable buffer of exactly that size."""
        info = self.tensors[name]
        shape = range_shape(info, dim, lo, hi)
        if not math.prod(shape):
            return
        if dim != 1 or shape == info.shape:
            row = info.nbytes // info.shape[0] if info.shape else info.nbytes
            self._pread(info, info.offset + (lo * row if dim == 0 else 0), out)
            return
        item = DTYPE_BYTES[info.dtype]
        row, at, want = info.shape[1] * item, lo * item, shape[1] * item
        if want >= LONG_SEGMENT_BYTES:
            for index in range(info.shape[0]):
                self._pread(info, info.offset + index * row + at, out[index * want : (index + 1) * want])
            return
        for first, rows in _row_chunks(info.shape[0], row):
            chunk = memoryview(bytearray(rows * row))
            self._pread(info, info.offset + first * row, chunk)
            for index in range(rows):
                to = (first + index) * want
                out[to : to + want] = chunk[index * row + at : index * row + at + want]

    def _pread(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        try:
            with self._opening:
                if info.file not in self._open:
                    self._open[info.file] = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < len(out):
                count = os.preadv(self._open[info.file], [out[done : done + CHUNK_BYTES]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{info.file}: ends inside tensor {info.name}; it changed while being read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{info.file}: can't be read: {error.strerror}") from error


def range_shape(info: TensorInfo, dim: int | None, lo: int, hi: int | None) -> tuple[int, ...]:
    """Shape of elements lo..hi along `dim`; ValueError if there is no such range."""
    if dim is None:
        return info.shape
    if dim not in (0, 1) or dim >= len(info.shape) or (dim == 1 and len(info.shape) != 2):
        raise ValueError(f"tensor {info.name} of shape {info.shape} can't be read along dim {dim}")
    end = info.shape[dim] if hi is None else hi
    if not 0 <= lo <= end <= info.shape[dim]:
        raise ValueError(f"tensor {info.name} has {info.shape[dim]} elements along dim {dim}, asked for {lo}..{end}")
    return (*info.shape[:dim], end - lo, *info.shape[dim + 1 :])


def _row_chunks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of rows of at most CHUNK_BYTES, at least one row each."""
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
