"""A folder of weight files under construction: it can be killed at any moment and gone on with.

Weight files grow under temporary names (`rank-000.safetensors.part`), are synced and renamed when all their tensors
are in. A journal notes the digests of every part of the model once it is written; whoever runs the same work again
checks what the journal lists against the files and writes only the rest. Importable without torch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megalite.errors import CheckpointError, ConfigError, Problem, ResourceError, maybe_fault
from megalite.files import LineFile, left_behind, sync_folder, told_clearly
from megalite.monitor.words import format_bytes
from megalite.weights import manifest as manifests
from megalite.weights.blocks import Block, Move, Part
from megalite.weights.copying import Reading, allow_open_files, digest_block, in_parallel, perform
from megalite.weights.hf import INDEX, SINGLE
from megalite.weights.shards import JOURNAL, STEP
from megalite.weights.side_files import of_model

PART = ".part"
SPARE_BYTES = 32 << 20
"""Free space to leave beside what is written: manifest, tokenizer, the file system's own."""
_OURS = re.compile(r"(\w+-\d{3,}|model(-\d{5}-of-\d{5})?)\.safetensors(\.part)?")
"""Weight files of rank shards and of exports, which --overwrite removes."""
_SEALS = {manifests.NAME, INDEX, SINGLE}
"""What makes a folder look whole."""

_WRITEBACK_BYTES = 64 << 10
"""Smaller writes are not worth a call of their own."""
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

Progress = Callable[[int], None]
"""Is told of bytes that are in place."""


@dataclass(frozen=True, slots=True)
class NewFile:
    """A weight file to be made."""

    name: str
    header: bytes
    nbytes: int
    """Header included."""
    is_last: bool = False
    """Makes the folder look whole, so it is renamed after everything else."""

    def fits(self, path: Path) -> bool:
        """Whether `path` is a file of this size that begins with this header."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with open(path, "rb") as old:
            return old.read(len(self.header)) == self.header


@dataclass
class Outcome:
    """What a piece of work came to."""

    folder: Path
    written: int = 0
    """Bytes of tensors written by this run."""
    reused: int = 0
    """Bytes of tensors that an earlier, interrupted run had written."""
    files: int = 0
    notes: tuple[str, ...] = ()
    was_done: bool = False
    """The folder held this very result already; nothing was written."""


class Output:
    """Holds the folder's lock from `__enter__` to `__exit__`; the folder is whole only after `finish`.

    `work` is a fingerprint of what is being made: an unfinished folder is gone on with only if it has the same.
    ConfigError if the folder holds something else and `overwrite` is not set, ResourceError if the disk is too small.
    """

    def __init__(self, folder: Path, files: list[NewFile], work: str, *, overwrite: bool, extra_bytes: int = 0):
        self.folder = folder
        self.work = work
        self.overwrite = overwrite
        self.outcome = Outcome(folder, files=len(files))
        self._files = {folder / file.name: file for file in files}
        self._extra_bytes = extra_bytes
        self._descriptors: dict[Path, int] = {}
        self._left: Counter[Path] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Output:
        with told_clearly(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        self._check_space()
        with told_clearly(self.folder):
            self._lock_folder()
        self._journal = LineFile(self.folder / JOURNAL)
        allow_open_files(2 * len(self._files))  # each may also be read, to see what an earlier run has done
        try:
            self._journal.cut_torn_line()
            if self._is_own():
                self._unseal(_SEALS - {file.name for file in self._files.values()})
            else:
                self._clear()
            self._open_parts()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    # ---- what the folder holds -----------------------------------------------------------------------------------

    def check(self) -> None:
        """ConfigError if the folder holds something else that may not be overwritten; nothing is written."""
        if self.folder.exists() and not self._is_own() and not self.overwrite:
            self._refuse_content()

    def _is_own(self) -> bool:
        """Whether the folder is this very work, unfinished."""
        try:
            with open(self.folder / JOURNAL, "rb") as file:
                first = file.readline(4096)
            return json.loads(first) == {"work": self.work}
        except (OSError, ValueError):
            return False

    def _refuse_content(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        if not names or (names == [JOURNAL] and not (self.folder / JOURNAL).stat().st_size):
            return
        what = "an unfinished conversion of something else" if JOURNAL in names else ", ".join(names[:3])
        rule = f"{self.folder} already holds {what}{', ...' if JOURNAL not in names and len(names) > 3 else ''}"
        raise ConfigError(Problem(key="--out", rule=rule, fix="Choose another folder, or add --overwrite."))

    def _old_files(self) -> list[Path]:
        """What --overwrite takes away: a checkpoint of any of our formats, with what belongs to it."""
        with told_clearly(self.folder):
            names = sorted(path.name for path in self.folder.iterdir())
        weights = [self.folder / name for name in names if name in _SEALS or _OURS.fullmatch(name)]
        return weights + of_model(self.folder) if weights else []

    def _clear(self) -> None:
        """Begin anew in a folder that is empty or was given up."""
        old = self._old_files()
        self._unseal(_SEALS)
        with told_clearly(self.folder):
            for path in old:
                path.unlink(missing_ok=True)
                maybe_fault(STEP)
            os.truncate(self.folder / JOURNAL, 0)
        self._journal.append(json.dumps({"work": self.work}))
        maybe_fault(STEP)

    def _unseal(self, seals: Iterable[str]) -> None:
        """Take away what makes the folder look whole, before anything else in it is touched; and litter."""
        with told_clearly(self.folder):
            for name in sorted(seals):
                (self.folder / name).unlink(missing_ok=True)
                maybe_fault(STEP)
            for path in left_behind(self.folder):
                path.unlink(missing_ok=True)
            sync_folder(self.folder)

    def _check_space(self) -> None:
        needed = sum(file.nbytes for file in self._files.values()) + self._extra_bytes + SPARE_BYTES
        held = sum(path.lstat().st_blocks * 512 for path in self._old_files())
        free = shutil.disk_usage(self.folder).free
        if needed > free + held:
            raise ResourceError(
                f"{self.folder}: {format_bytes(needed)} are needed and {format_bytes(free)} are free. Free some "
                "space, or write to another disk."
            )

    def _lock_folder(self) -> None:
        """CheckpointError if another process is at work here. A file system without locks is taken at its word."""
        path = self.folder / JOURNAL
        self._descriptors[path] = lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        maybe_fault(STEP)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                return
            os.close(self._descriptors.pop(path))
            raise CheckpointError(f"{self.folder}: another process is writing to it") from error
        if os.fstat(lock).st_nlink == 0:
            os.close(self._descriptors.pop(path))
            raise CheckpointError(f"{self.folder}: another process has just finished with it")

    # ---- weight files --------------------------------------------------------------------------------------------

    def _open_parts(self) -> None:
        """Open what an earlier run left, if it has the right header and size; make the rest."""
        for path, file in self._files.items():
            part = path.with_name(path.name + PART)
            for there in (path, part):
                if there not in self._descriptors and path not in self._descriptors and file.fits(there):
                    os.replace(there, part)  # not finished until all of it was checked
                    maybe_fault(STEP)
                    self._descriptors[path] = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if path not in self._descriptors:
                self._descriptors[path] = self._new(path, part, file)

    def _new(self, path: Path, part: Path, file: NewFile) -> int:
        with told_clearly(path):
            part.unlink(missing_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                maybe_fault(STEP)
                os.ftruncate(descriptor, file.nbytes)
                maybe_fault(STEP)
                _write(descriptor, memoryview(file.header), 0)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _put(self, block: Block, row: int, rows: NDArray[np.uint8]) -> None:
        """Write stored rows of a block from `row` on."""
        descriptor = self._descriptors[block.file]
        start = block.offset + row * block.stride
        with told_clearly(block.file):
            if block.is_contiguous:
                _write(descriptor, memoryview(rows).cast("B"), start)
                _start_writeback(descriptor, start, rows.nbytes)
                return
            for index in range(len(rows)):
                _write(descriptor, memoryview(rows[index]), start + index * block.stride)

    # ---- the work ------------------------------------------------------------------------------------------------

    def run(self, moves: list[Move], jobs: int, progress: Progress) -> dict[Block, str]:
        """Perform all moves, but for those that an earlier run did; gives the digest of every target block."""
        digests = self._kept(moves, jobs, progress)
        for move in moves:
            self._left.update(path for path in {block.file for block in move.targets})
        for move in moves:
            if move.targets[0] in digests:
                self._finished(move)
        self.outcome.reused = sum(move.nbytes for move in moves if move.targets[0] in digests)
        todo = [move for move in moves if move.targets[0] not in digests]
        with Reading() as files:

            def work(move: Move) -> None:
                mine = perform(files, move, self._put)
                maybe_fault("shards.written")
                with self._lock:
                    self._journal.append(json.dumps({"part": _key(move.part), "digests": mine}))
                    digests.update(zip(move.targets, mine, strict=True))
                    self.outcome.written += move.nbytes
                maybe_fault(STEP)
                self._finished(move)
                progress(move.nbytes)

            in_parallel(work, files.expecting(todo), jobs)
        return digests

    def _kept(self, moves: list[Move], jobs: int, progress: Progress) -> dict[Block, str]:
        """Digests of the blocks that the journal lists and that still are what it says."""
        noted = self._noted()
        kept: dict[Block, str] = {}
        with Reading() as files:

            def check(move: Move) -> None:
                listed = noted[tuple(_key(move.part))]
                parts = [replace(block, file=block.file.with_name(block.file.name + PART)) for block in move.targets]
                if [digest_block(files, part) for part in parts] == listed:
                    with self._lock:
                        kept.update(zip(move.targets, listed, strict=True))
                    progress(move.nbytes)

            in_parallel(check, [move for move in moves if tuple(_key(move.part)) in noted], jobs)
        return kept

    def _noted(self) -> dict[tuple[str, int, str], list[str]]:
        """The journal's entries; a line that makes no sense is as good as none."""
        noted: dict[tuple[str, int, str], list[str]] = {}
        with open(self.folder / JOURNAL, "rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    hf, start, kind = entry["part"]
                    noted[str(hf), int(start), str(kind)] = list(entry["digests"])
                except (ValueError, KeyError, TypeError):
                    continue
        return noted

    def _finished(self, move: Move) -> None:
        """One move fewer to wait for; the last one of a file makes it a file."""
        ready = []
        with self._lock:
            for path in {block.file for block in move.targets}:
                self._left[path] -= 1
                if not self._left[path]:
                    ready.append(path)
        for path in ready:
            self._complete(path)

    def fill(self, name: str, tensors: Iterable[memoryview]) -> None:
        """Write all tensors of one weight file, in the order of its header; an earlier run's bytes are not kept."""
        path = self.folder / name
        offset = len(self._files[path].header)
        for data in tensors:
            with told_clearly(path):
                _write(self._descriptors[path], data, offset)
            offset += len(data)
            self.outcome.written += len(data)
        assert offset == self._files[path].nbytes, f"{name} is not what its header says"
        self._complete(path)

    def _complete(self, path: Path) -> None:
        """All of a file is written."""
        with told_clearly(path):
            os.fsync(self._descriptors[path])
            if not self._files[path].is_last:
                os.replace(path.with_name(path.name + PART), path)
                maybe_fault(STEP)

    def finish(self, seal: Callable[[], None]) -> None:
        """Make the folder whole: `seal` writes what must come last, such as the manifest."""
        assert not +self._left, "finished before all was written"
        with told_clearly(self.folder):
            sync_folder(self.folder)
        maybe_fault("shards.seal")
        seal()
        maybe_fault(STEP)
        with told_clearly(self.folder):
            for path, file in self._files.items():
                if file.is_last:
                    os.replace(path.with_name(path.name + PART), path)
            sync_folder(self.folder)
            maybe_fault(STEP)
            (self.folder / JOURNAL).unlink()
            maybe_fault(STEP)
            sync_folder(self.folder)


def _key(part: Part) -> list[str | int]:
    return [part.hf, part.start, part.kind]


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
        maybe_fault(STEP)


def _start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Have the system begin to put a range on the disk, so that syncing the file at the end finds little left to do.

    A hint: where the system or the file system has no such call, that sync does all the work.
    """
    if count >= _WRITEBACK_BYTES and _sync_file_range is not None:
        _sync_file_range(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


def total_bytes(moves: Iterable[Move]) -> int:
    """What the moves write."""
    return sum(move.nbytes for move in moves)
