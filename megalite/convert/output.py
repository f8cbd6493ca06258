"""A folder of weight files under construction: it can be killed at any moment and gone on with.

Weight files grow under temporary names and get their own, durably, when all their tensors are in. A journal notes each
finished file with the digests of its ranges; whoever runs the same work again checks those files against it and makes
only the others. Torch-free.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalite.errors import CheckpointError, ConfigError, Problem, ResourceError, maybe_fault
from megalite.files import DurableFile, LineFile, left_behind, lock_at_once, sync_folder, told_clearly
from megalite.monitor.words import format_bytes
from megalite.weights import manifest as manifests
from megalite.weights.copying import OpenFiles, allow_open_files, digest_extent, in_parallel, perform
from megalite.weights.hf import INDEX, SINGLE
from megalite.weights.moves import Extent, Move
from megalite.weights.rounding import Elements
from megalite.weights.shards import JOURNAL, STEP
from megalite.weights.side_files import of_model

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


class ByteProgress:
    """Is told how many bytes a piece of work has, and how many more of them are done; this one keeps it to itself."""

    def begin(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


SILENT = ByteProgress()


@dataclass(frozen=True, slots=True)
class NewFile:
    """A weight file to be made."""

    name: str
    header: bytes
    nbytes: int
    """Header included."""

    @property
    def is_last(self) -> bool:
        """Whether it makes the folder look whole, so that it gets its name after everything else."""
        return self.name == SINGLE

    def fits(self, path: Path) -> bool:
        """Whether `path` is a file of this size that begins with this header."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with open(path, "rb") as old:
            return old.read(len(self.header)) == self.header


@dataclass
class Written:
    """What a conversion wrote."""

    folder: Path
    nbytes: int = 0
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
        self.written = Written(folder, files=len(files))
        self._files = {folder / file.name: file for file in files}
        self._extra_bytes = extra_bytes
        self._open: dict[Path, tuple[DurableFile, int]] = {}
        """Files under construction and their descriptors."""
        self._digests: dict[tuple[Path, int], str] = {}
        """Digests of what was written, by file and offset."""
        self._lock = threading.Lock()

    def __enter__(self) -> Output:
        with told_clearly(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        self._check_space()
        with ExitStack() as stack:
            with told_clearly(self.folder):
                stack.callback(os.close, self._lock_folder())
            self._journal = stack.enter_context(LineFile(self.folder / JOURNAL))
            stack.push(self._give_up)
            self._journal.cut_torn_line()
            allow_open_files(len(self._files))
            self._clear()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _give_up(self, *error: Any) -> None:
        """Leave nothing of files that are not finished."""
        while self._open:
            self._open.popitem()[1][0].__exit__(*error)

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
            return bool(json.loads(first) == {"work": self.work})
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
        """Take away what makes the folder look whole, before anything else in it is touched; litter; other work."""
        is_own = self._is_own()
        old = [] if is_own else self._old_files()
        seals = {self.folder / name for name in _SEALS} - (self._files.keys() if is_own else set())
        with told_clearly(self.folder):
            for path in sorted(seals):
                path.unlink(missing_ok=True)
                maybe_fault(STEP)
            sync_folder(self.folder)
            for path in [*left_behind(self.folder), *old]:
                path.unlink(missing_ok=True)
                maybe_fault(STEP)
            if is_own:
                return
            os.truncate(self.folder / JOURNAL, 0)
        self._journal.append(json.dumps({"work": self.work}))
        maybe_fault(STEP)

    def _check_space(self) -> None:
        needed = sum(file.nbytes for file in self._files.values()) + self._extra_bytes + SPARE_BYTES
        held = sum(path.lstat().st_blocks * 512 for path in [*self._old_files(), *left_behind(self.folder)])
        free = shutil.disk_usage(self.folder).free
        if needed > free + held:
            raise ResourceError(
                f"{self.folder}: {format_bytes(needed)} are needed and {format_bytes(free)} are free. Free some "
                "space, or write to another disk."
            )

    def _lock_folder(self) -> int:
        """Lock it and give the descriptor. A file system without locks is taken at its word.

        CheckpointError if another process is at work here.
        """
        lock = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        maybe_fault(STEP)
        free = lock_at_once(lock)
        if not free or os.fstat(lock).st_nlink == 0:
            os.close(lock)
            problem = "has just finished with it" if free else "is writing to it"
            raise CheckpointError(f"{self.folder}: another process {problem}")
        return lock

    # ---- weight files --------------------------------------------------------------------------------------------

    def _begin(self, path: Path) -> None:
        """Make a weight file anew, with its header."""
        with told_clearly(path):
            path.unlink(missing_ok=True)
        target = DurableFile(path)
        self._open[path] = target, target.__enter__().fileno()
        maybe_fault(STEP)
        with told_clearly(path):
            _write(self._open[path][1], memoryview(self._files[path].header), 0)

    def _put(self, extent: Extent, row: int, rows: Elements) -> None:
        """Write stored rows of an extent from `row` on."""
        descriptor = self._open[extent.file][1]
        start = extent.offset + row * extent.stride
        with told_clearly(extent.file):
            if extent.row_bytes == extent.stride:
                _write(descriptor, _bytes(rows), start)
                _start_writeback(descriptor, start, rows.nbytes)
                return
            for index in range(len(rows)):
                _write(descriptor, _bytes(rows[index]), start + index * extent.stride)

    def _complete(self, path: Path, digests: list[str]) -> None:
        """All of a file is written; `digests` of its ranges, by offset."""
        if self._files[path].is_last:
            return
        self._open.pop(path)[0].__exit__(None, None, None)
        maybe_fault(STEP)
        with self._lock:
            self._journal.append(json.dumps({"file": path.name, "digests": digests}))
        maybe_fault(STEP)

    # ---- the work ------------------------------------------------------------------------------------------------

    def run(self, moves: list[Move], jobs: int, progress: ByteProgress) -> Mapping[tuple[Path, int], str]:
        """Perform all moves but those into files that an earlier run finished; digests by file and offset."""
        held: dict[Path, list[Extent]] = {}
        for move in moves:
            for extent in move.targets:
                held.setdefault(extent.file, []).append(extent)
        for extents in held.values():
            extents.sort(key=lambda extent: extent.offset)
        kept = {path for path, digests in self._noted().items() if self._is_kept(held[path], digests, jobs, progress)}
        self.written.reused = sum(extent.nbytes for path in kept for extent in held[path])
        for path in held.keys() - kept:
            self._begin(path)
        left = Counter({path: len(extents) for path, extents in held.items()})
        todo = [replace(one, targets=tuple(to for to in one.targets if to.file not in kept)) for one in moves]
        with OpenFiles() as files:

            def work(move: Move) -> None:
                digests = perform(files, move, self._put)
                maybe_fault("shards.written")
                with self._lock:
                    for extent, digest in zip(move.targets, digests, strict=True):
                        self._digests[extent.file, extent.offset] = digest
                        left[extent.file] -= 1
                    ready = {extent.file for extent in move.targets if not left[extent.file]}
                    self.written.nbytes += move.nbytes
                for path in ready:
                    self._complete(path, [self._digests[path, extent.offset] for extent in held[path]])
                progress.advance(move.nbytes)

            in_parallel(work, files.expecting([move for move in todo if move.targets]), jobs)
        return self._digests

    def _is_kept(self, extents: list[Extent], digests: list[str], jobs: int, progress: ByteProgress) -> bool:
        """Whether a file that an earlier run finished is still what it was then. Notes its digests."""
        path = extents[0].file
        if not self._files[path].fits(path) or len(digests) != len(extents):
            return False
        found: dict[tuple[Path, int], str] = {}
        with OpenFiles() as files:

            def check(extent: Extent) -> None:
                found[path, extent.offset] = digest_extent(files, extent)
                progress.advance(extent.nbytes)

            in_parallel(check, extents, jobs)
        self._digests |= found
        return [found[path, extent.offset] for extent in extents] == digests

    def _noted(self) -> dict[Path, list[str]]:
        """The files that the journal lists; a line that makes no sense is as good as none."""
        noted: dict[Path, list[str]] = {}
        with open(self.folder / JOURNAL, "rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    path, digests = self.folder / entry["file"], list(entry["digests"])
                except (ValueError, KeyError, TypeError):
                    continue
                if path in self._files:
                    noted[path] = digests
        return noted

    def fill(self, name: str, tensors: Iterable[memoryview]) -> None:
        """Write all tensors of one weight file, in the order of its header; an earlier run's bytes are not kept."""
        path = self.folder / name
        self._begin(path)
        offset = len(self._files[path].header)
        for data in tensors:
            with told_clearly(path):
                _write(self._open[path][1], data, offset)
            offset += len(data)
            self.written.nbytes += len(data)
        assert offset == self._files[path].nbytes, f"{name} is not what its header says"
        self._complete(path, [])

    def finish(self, seal: Callable[[], object]) -> None:
        """Make the folder whole: `seal` writes what must come last, such as the manifest."""
        assert all(self._files[path].is_last for path in self._open), "finished before all was written"
        with told_clearly(self.folder):
            sync_folder(self.folder)
        maybe_fault("shards.seal")
        seal()
        maybe_fault(STEP)
        while self._open:
            self._open.popitem()[1][0].__exit__(None, None, None)
        with told_clearly(self.folder):
            sync_folder(self.folder)
            maybe_fault(STEP)
            (self.folder / JOURNAL).unlink()
            maybe_fault(STEP)
            sync_folder(self.folder)


def _bytes(rows: Elements) -> memoryview:
    return rows.reshape(-1).view("uint8").data


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
