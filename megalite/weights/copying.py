"""Performs moves: reads the blocks of a part band by band, cuts and converts them, and gives them to whoever asks.

Memory is bounded by bands of a few MiB a thread; where a matrix has to be turned (GPT-2), the whole of it is held once.
A digest that the source's manifest knows is checked on the way, so that damage is never passed on. Importable without
torch.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalite.errors import CheckpointError
from megalite.weights.blocks import Block, Move
from megalite.weights.dtypes import STORAGE, convert
from megalite.weights.tensor_file import CHUNK_BYTES, DTYPE_BYTES, LONG_SEGMENT_BYTES

BAND_BYTES = 1 << 20
"""Rows of a part that are in memory at once: they stay in the processor's cache between reading and writing."""
AHEAD_BYTES = 16 << 20
"""What the system is asked to fetch from the disk of each block while a band of it is being worked on."""
REQUEST_BYTES = 1 << 20
"""Of one such request: of a longer one the kernel may fetch no more than its own read-ahead."""
TILE = 64
"""Elements of a matrix that are turned at once, this many by twice as many."""

Item = TypeVar("Item")


class _Buffers(threading.local):
    """Memory that a thread uses again for every band: new pages from the system would cost more than the copying."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

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


class Reading:
    """Files opened once, for reading by several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reading:
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
        """The moves as they are; the disk is asked for the first bytes of each before it is handed out."""
        for move in moves:
            for block in move.sources:
                count = min(AHEAD_BYTES, block.stored_shape[0] * block.stride)
                _will_need(self._descriptor(block.file), block.offset, count)
            yield move

    def rows(self, block: Block, lo: int, hi: int, out: NDArray[np.uint8]) -> None:
        """Stored rows lo..hi of a block into contiguous `out` [hi - lo, bytes of a row]."""
        try:
            descriptor = self._descriptor(block.file)
            width, start = out.shape[1], block.offset + lo * block.stride
            _fetch_ahead(descriptor, block, lo, hi)
            if block.is_contiguous:
                _fill(descriptor, memoryview(out).cast("B"), start, block)
            elif width >= LONG_SEGMENT_BYTES:
                for index in range(hi - lo):
                    _fill(descriptor, memoryview(out[index]), start + index * block.stride, block)
            else:
                self._cut(descriptor, block, start, out)
        except OSError as error:
            raise CheckpointError(f"{block.file}: can't be read: {error.strerror}") from error

    def _cut(self, descriptor: int, block: Block, start: int, out: NDArray[np.uint8]) -> None:
        """Short segments: read whole rows, keep the columns that are asked for."""
        rows, width = out.shape
        step = max(1, BAND_BYTES // block.stride)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            whole = _buffers.take("rows", 1, count * block.stride)[0]
            used = (count - 1) * block.stride + width  # the last row may end the file
            _fill(descriptor, memoryview(whole[:used]), start + first * block.stride, block)
            out[first : first + count] = whole.reshape(count, block.stride)[:, :width]


def _fetch_ahead(descriptor: int, block: Block, lo: int, hi: int) -> None:
    """Have the system read on from the disk while rows lo..hi are worked on: the first time all of AHEAD_BYTES, then
    as much as has been used up. Several threads read at different places of a file, which the kernel can't foresee."""
    end = block.stored_shape[0] * block.stride
    start = min(end, hi * block.stride + (AHEAD_BYTES - (hi - lo) * block.stride if lo else 0))
    _will_need(descriptor, block.offset + start, min(end, hi * block.stride + AHEAD_BYTES) - start)


def _will_need(descriptor: int, offset: int, count: int) -> None:
    for start in range(0, count, REQUEST_BYTES):
        length = min(REQUEST_BYTES, count - start)
        os.posix_fadvise(descriptor, offset + start, length, os.POSIX_FADV_WILLNEED)


def _fill(descriptor: int, out: memoryview, offset: int, block: Block) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done : done + CHUNK_BYTES]], offset + done)
        if count == 0:
            raise CheckpointError(f"{block.file}: ends inside tensor {block.tensor}; it changed while being read")
        done += count


def read_block(files: Reading, block: Block) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a block in bands of stored rows [rows, bytes of a row], each valid until the next."""
    rows, _ = block.stored_shape
    for lo, hi in _bands(rows, block.stored_row_bytes):
        out = _buffers.take("block", hi - lo, block.stored_row_bytes)
        files.rows(block, lo, hi, out)
        yield out


def digest_block(files: Reading, block: Block) -> str:
    """The digest of a block's bytes as they are in its file now."""
    state = xxhash.xxh3_128()
    for band in read_block(files, block):
        state.update(band)
    return state.hexdigest()


def _bands(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BAND_BYTES // max(1, row_bytes))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)


class _Gathering:
    """Fills bands of a part's matrix from its sources, checking the digests that are known."""

    def __init__(self, files: Reading, move: Move):
        self.files = files
        self.move = move
        self.item = DTYPE_BYTES[move.dtype]
        self.states = {block: xxhash.xxh3_128() for block in move.sources if block.digest}
        self.whole = {block: self._stored(block) for block in move.sources if block.transposed}

    def _stored(self, block: Block) -> NDArray:
        """All of a block as it is stored, [its columns, its rows] elements: any band of rows takes from all of it."""
        stored = np.empty((block.cols, block.stored_row_bytes), np.uint8)
        self._read(block, 0, block.cols, stored)
        return stored.view(STORAGE[block.dtype])

    def band(self, lo: int, hi: int) -> NDArray[np.uint8]:
        """Rows lo..hi of the matrix, [rows, bytes of a row]; valid until the next band."""
        matrix = _buffers.take("matrix", hi - lo, self.move.cols * self.item)
        for block in self.move.sources:
            top, bottom = max(lo, block.top), min(hi, block.top + block.rows)
            if top >= bottom:
                continue
            where = matrix[top - lo : bottom - lo, block.left * self.item : (block.left + block.cols) * self.item]
            if block in self.whole:
                stored = self.whole[block]
                _turn(stored[:, top - block.top : bottom - block.top], where.view(stored.dtype))
            elif where.flags.c_contiguous:
                self._read(block, top - block.top, bottom - block.top, where)
            else:
                part = _buffers.take("part", *where.shape)
                self._read(block, top - block.top, bottom - block.top, part)
                where[:] = part
        return matrix

    def _read(self, block: Block, lo: int, hi: int, out: NDArray[np.uint8]) -> None:
        self.files.rows(block, lo, hi, out)
        if block in self.states:
            self.states[block].update(out)

    def check(self) -> None:
        for block, state in self.states.items():
            if state.hexdigest() != block.digest:
                raise CheckpointError(
                    f"{block.file}: damaged: tensor {block.tensor}, {block.range}: its bytes are not those that its "
                    "manifest lists. Make this file anew or copy it again."
                )


def matrices(files: Reading, move: Move) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """(lo, hi, rows lo..hi) of a part's matrix, in order, in the dtype of its sources; each valid until the next.

    After the last band known digests are checked: CheckpointError if the sources are damaged.
    """
    gathering = _Gathering(files, move)
    for lo, hi in _bands(move.rows, move.cols * gathering.item):
        yield lo, hi, gathering.band(lo, hi)
    gathering.check()


Put = Callable[[Block, int, NDArray[np.uint8]], None]
"""Takes stored rows of a target from a given row on, [rows, bytes of a row]."""


def perform(files: Reading, move: Move, put: Put) -> list[str]:
    """Give every target of a move its rows, in order; returns the targets' digests."""
    if move.targets[0].transposed:
        if not move.sources[0].transposed:
            return _perform_turned(files, move, put)
        return perform(files, _upright(move), put)
    states = {block.region: xxhash.xxh3_128() for block in move.targets}
    target = move.targets[0].dtype
    item = DTYPE_BYTES[target]
    for lo, hi, matrix in matrices(files, move):
        values = _converted(matrix, move, target)
        cut: dict[tuple[int, int, int, int], NDArray[np.uint8]] = {}
        for block in move.targets:
            top, bottom = max(lo, block.top), min(hi, block.top + block.rows)
            if top >= bottom:
                continue
            if block.region not in cut:  # copies of a range share the cut and the digest
                part = values[top - lo : bottom - lo, block.left * item : (block.left + block.cols) * item]
                if not part.flags.c_contiguous:
                    columns = _buffers.take(f"columns {len(cut)}", *part.shape)
                    columns[:] = part
                    part = columns
                cut[block.region] = part
                states[block.region].update(part)
            put(block, top - block.top, cut[block.region])
    return [states[block.region].hexdigest() for block in move.targets]


def _perform_turned(files: Reading, move: Move, put: Put) -> list[str]:
    """As `perform`, where stored rows of the targets are columns of the matrix."""
    matrix = np.empty((move.rows, move.cols * DTYPE_BYTES[move.dtype]), np.uint8)
    for lo, hi, rows in matrices(files, move):
        matrix[lo:hi] = rows
    elements = matrix.view(STORAGE[move.dtype])
    digests = []
    for block in move.targets:
        state = xxhash.xxh3_128()
        mine = elements[block.top : block.top + block.rows, block.left : block.left + block.cols]
        for lo, hi in _bands(block.cols, block.rows * elements.itemsize):
            turned = np.empty((hi - lo, block.rows), elements.dtype)
            _turn(mine[:, lo:hi], turned)
            rows = _converted(turned.view(np.uint8), move, block.dtype)
            state.update(rows)
            put(block, lo, rows)
        digests.append(state.hexdigest())
    return digests


def _turn(values: NDArray, out: NDArray) -> None:
    """out = values transposed, in tiles that fit the processor's cache: four times as fast as in one go."""
    for row in range(0, out.shape[0], 2 * TILE):
        for col in range(0, out.shape[1], TILE):
            out[row : row + 2 * TILE, col : col + TILE] = values[col : col + TILE, row : row + 2 * TILE].T


def _upright(move: Move) -> Move:
    """The same move where all blocks are stored turned, in terms of the turned matrix."""

    def turn(block: Block) -> Block:
        assert block.transposed, "some blocks are turned, some are not"
        top, left, rows, cols = block.left, block.top, block.cols, block.rows
        return replace(block, top=top, left=left, rows=rows, cols=cols, transposed=False)

    return Move(move.part, move.cols, move.rows, tuple(map(turn, move.sources)), tuple(map(turn, move.targets)))


def _converted(matrix: NDArray[np.uint8], move: Move, target: str) -> NDArray[np.uint8]:
    if target == move.dtype:
        return matrix
    values = convert(matrix.view(STORAGE[move.dtype]), move.dtype, target, f"{move.sources[0].file}: {move.part.hf}")
    return np.ascontiguousarray(values).view(np.uint8)


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
