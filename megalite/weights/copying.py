"""Performs moves: reads the extents of a part in bands of rows, cuts and converts them, and passes them on.

Reading is plain `pread`, not a memory map, so that bytes arrive in large sequential requests and count as nobody's
resident memory. Memory is bounded by bands of a few MiB a thread; where a matrix has to be turned (GPT-2), the whole of
it is held once. A digest that the source's manifest knows is checked on the way, so that damage is never passed on.
Torch-free.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalite.errors import CheckpointError
from megalite.weights.dtypes import STORAGE
from megalite.weights.moves import Extent, Move
from megalite.weights.rounding import Elements, convert
from megalite.weights.table import Range

CHUNK_BYTES = 16 << 20
"""Most that one request to the system asks for."""
LONG_SEGMENT_BYTES = 256 << 10
"""Column ranges this long a row are read row by row; shorter ones cost less as whole rows, cut in memory."""
BAND_BYTES = 1 << 20
"""Rows of a part that are in memory at once: they stay in the processor's cache between reading and writing."""
AHEAD_BYTES = 16 << 20
"""Bytes of each extent that the system is asked to fetch ahead of the band that is being worked on."""
REQUEST_BYTES = 1 << 20
"""Size of one such request: the kernel may cut a longer one to its own read-ahead."""
TILE = 64
"""A matrix is transposed in tiles of this many elements by twice as many."""

Item = TypeVar("Item")


class Memory(Protocol):
    """Where the bands of a matrix are read to."""

    @property
    def band_bytes(self) -> int:
        """The size that bands should have."""

    def band(self, lo: int, hi: int, width: int) -> NDArray[np.uint8]:
        """Rows lo..hi of the matrix: [hi - lo, width] bytes, untouched until the next band is asked for."""


class _Buffers(threading.local):
    """Memory that a thread uses again for every band: new pages from the system would cost more than the copying."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    @property
    def band_bytes(self) -> int:
        return BAND_BYTES

    def band(self, lo: int, hi: int, width: int) -> NDArray[np.uint8]:
        return self.take("matrix", hi - lo, width)

    def take(self, use: str, rows: int, width: int) -> NDArray[np.uint8]:
        """[rows, width] bytes, until the same use is asked for again on this thread."""
        size = rows * width
        if size > 2 * BAND_BYTES:
            return np.empty((rows, width), np.uint8)
        if use not in self._kept:
            self._kept[use] = np.empty(2 * BAND_BYTES, np.uint8)
        return self._kept[use][:size].reshape(rows, width)


_buffers = _Buffers()


def allow_open_files(count: int) -> None:
    """Make room for `count` more open files, as far as the system lets this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class OpenFiles:
    """Files opened once, for reading by several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                allow_open_files(len(self._open))
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[path]

    def expecting(self, moves: Iterable[Move]) -> Iterator[Move]:
        """Yield the moves unchanged, each after its first bytes were requested from the disk."""
        for move in moves:
            for extent in move.sources:
                count = min(AHEAD_BYTES, extent.shape[0] * extent.stride)
                _will_need(self._descriptor(extent.file), extent.offset, count)
            yield move

    def rows(self, extent: Extent, lo: int, hi: int, out: NDArray[np.uint8]) -> None:
        """Stored rows lo..hi of an extent into contiguous `out` [hi - lo, bytes of a row]."""
        try:
            descriptor = self._descriptor(extent.file)
            width, start = out.shape[1], extent.offset + lo * extent.stride
            _fetch_ahead(descriptor, extent, lo, hi)
            if extent.row_bytes == extent.stride:
                _fill(descriptor, out.data.cast("B"), start, extent)
            elif width >= LONG_SEGMENT_BYTES:
                for index in range(hi - lo):
                    _fill(descriptor, out[index].data, start + index * extent.stride, extent)
            else:
                self._cut(descriptor, extent, start, out)
        except OSError as error:
            raise CheckpointError(f"{extent.file}: can't be read: {error.strerror}") from error

    def _cut(self, descriptor: int, extent: Extent, start: int, out: NDArray[np.uint8]) -> None:
        """Short segments: read whole rows, keep the columns that are asked for."""
        rows, width = out.shape
        step = max(1, BAND_BYTES // extent.stride)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            whole = _buffers.take("rows", 1, count * extent.stride)[0]
            used = (count - 1) * extent.stride + width  # the last row may end the file
            _fill(descriptor, whole[:used].data, start + first * extent.stride, extent)
            out[first : first + count] = whole.reshape(count, extent.stride)[:, :width]


def _fetch_ahead(descriptor: int, extent: Extent, lo: int, hi: int) -> None:
    """Have the system read on from the disk while rows lo..hi are worked on: the first time all of AHEAD_BYTES, then
    as much as has been used up. Several threads read at different places of a file, which the kernel can't foresee."""
    end = extent.shape[0] * extent.stride
    start = min(end, hi * extent.stride + (AHEAD_BYTES - (hi - lo) * extent.stride if lo else 0))
    _will_need(descriptor, extent.offset + start, min(end, hi * extent.stride + AHEAD_BYTES) - start)


def _will_need(descriptor: int, offset: int, count: int) -> None:
    for start in range(0, count, REQUEST_BYTES):
        length = min(REQUEST_BYTES, count - start)
        os.posix_fadvise(descriptor, offset + start, length, os.POSIX_FADV_WILLNEED)


def _fill(descriptor: int, out: memoryview, offset: int, extent: Extent) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done : done + CHUNK_BYTES]], offset + done)
        if count == 0:
            raise CheckpointError(f"{extent.file}: ends inside tensor {extent.info.name}; it changed while being read")
        done += count


def digest_extent(files: OpenFiles, extent: Extent) -> str:
    """The digest of an extent's bytes as they are in its file now."""
    state = xxhash.xxh3_128()
    for lo, hi in _bands(extent.shape[0], extent.row_bytes, BAND_BYTES):
        out = _buffers.take("extent", hi - lo, extent.row_bytes)
        files.rows(extent, lo, hi, out)
        state.update(out.data)
    return state.hexdigest()


def _bands(rows: int, row_bytes: int, band_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, band_bytes // max(1, row_bytes))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)


def overlap(one: Range, move: Move, lo: int, hi: int) -> tuple[int, slice, slice]:
    """What a range shares with rows lo..hi of a move's matrix: its first row in the range; rows and columns there.

    No rows, if the range lies elsewhere.
    """
    start = one.lo - move.lo
    if one.dim == 1:
        return lo, slice(0, hi - lo), slice(start, start + one.count)
    top, bottom = max(lo, start), min(hi, start + one.count)
    return top - start, slice(top - lo, max(top, bottom) - lo), slice(None)


Band = tuple[int, int, Elements]
"""First row, end, and those rows of a matrix; valid until the next band."""


def matrices(files: OpenFiles, move: Move, dim: int, memory: Memory = _buffers) -> Iterator[Band]:
    """The matrix of indices lo..hi of a move, which lie along `dim`, in bands and in the dtype of the sources.

    Bands lie in `memory`, except where the sources hold the matrix turned. After the last band known digests are
    checked: CheckpointError if the sources are damaged.
    """
    stored = move.sources[0].range.dim
    count, row = move.hi - move.lo, move.sources[0].range.piece.row
    rows, columns = (count, row) if stored == 0 else (row, count)
    if stored == dim:
        yield from _stored_bands(files, move, rows, columns, memory)
    else:
        bands = _stored_bands(files, move, rows, columns, _buffers)
        yield from _turned(bands, np.empty((rows, columns), STORAGE[move.dtype]))


def _stored_bands(files: OpenFiles, move: Move, rows: int, columns: int, memory: Memory) -> Iterator[Band]:
    """As `matrices`, in the orientation of the sources."""
    dtype = np.dtype(STORAGE[move.dtype])
    states = [xxhash.xxh3_128() for _ in move.sources]
    for lo, hi in _bands(rows, columns * dtype.itemsize, memory.band_bytes):
        matrix = memory.band(lo, hi, columns * dtype.itemsize).view(dtype)
        for extent, state in zip(move.sources, states, strict=True):
            first, mine, across = overlap(extent.range, move, lo, hi)
            where = matrix[mine, across]
            if not len(where):
                continue
            is_whole = where.flags.c_contiguous
            part = where.view(np.uint8) if is_whole else _buffers.take("part", len(where), extent.row_bytes)
            files.rows(extent, first, first + len(where), part)
            if extent.digest:
                state.update(part.data)
            if not is_whole:
                where[:] = part.view(dtype)
        yield lo, hi, matrix
    for extent, state in zip(move.sources, states, strict=True):
        if extent.digest and state.hexdigest() != extent.digest:
            raise CheckpointError(
                f"{extent.file}: damaged: tensor {extent.info.name}, {extent.range}: its bytes are not those that its "
                "manifest lists. Make this file anew or copy it again."
            )


def _turned(bands: Iterator[Band], whole: Elements) -> Iterator[Band]:
    """Bands of the transposed matrix; `whole` is memory for all of it."""
    for lo, hi, band in bands:
        whole[lo:hi] = band
    for lo, hi in _bands(whole.shape[1], whole.shape[0] * whole.itemsize, BAND_BYTES):
        out = _buffers.take("turned", hi - lo, whole.shape[0] * whole.itemsize).view(whole.dtype)
        _turn(whole[:, lo:hi], out)
        yield lo, hi, out


def _turn(values: Elements, out: Elements) -> None:
    """out = values transposed, in tiles that fit the processor's cache: four times as fast as in one go."""
    for row in range(0, out.shape[0], 2 * TILE):
        for col in range(0, out.shape[1], TILE):
            out[row : row + 2 * TILE, col : col + TILE] = values[col : col + TILE, row : row + 2 * TILE].T


Put = Callable[[Extent, int, Elements], None]
"""Takes stored rows of a target from a given row on."""


def perform(files: OpenFiles, move: Move, put: Put = lambda extent, row, rows: None) -> list[str]:
    """Give every target of a move its rows, in order; returns the targets' digests."""
    states = {extent.range.lo: xxhash.xxh3_128() for extent in move.targets}
    target = move.targets[0]
    for lo, hi, matrix in matrices(files, move, target.range.dim):
        values = convert(matrix, move.dtype, target.info.dtype, f"{move.sources[0].file}: {move.part[0]}")
        cut: dict[int, Elements] = {}
        for extent in move.targets:
            first, mine, across = overlap(extent.range, move, lo, hi)
            part = values[mine, across]
            if not len(part):
                continue
            start = extent.range.lo
            if start not in cut:  # copies of a range share the cut and the digest
                if not part.flags.c_contiguous:
                    part = _buffers.take(f"columns {len(cut)}", len(part), extent.row_bytes).view(values.dtype)
                    part[:] = values[mine, across]
                cut[start] = part
                states[start].update(part.view(np.uint8).data)
            put(extent, first, cut[start])
    return [states[extent.range.lo].hexdigest() for extent in move.targets]


def differing(files: OpenFiles, move: Move) -> list[Extent]:
    """The targets whose content is not what the move would write; known digests are compared instead of bytes."""
    made = zip(move.targets, perform(files, move), strict=True)
    return [extent for extent, digest in made if digest != (extent.digest or digest_extent(files, extent))]


def in_parallel(work: Callable[[Item], None], items: Iterable[Item], jobs: int) -> None:
    """`work` on every item, on `jobs` threads, never holding more than a few items in line.

    The first error ends it: what has begun is finished, nothing more is begun.
    """
    waiting: set[Future[None]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for item in items:
                if len(waiting) >= 2 * jobs:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for one in done:
                        one.result()
                waiting.add(pool.submit(work, item))
            for one in waiting:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)
