"""The one place that writes files which must survive a crash: whole or not at all, or line by line.

`write_durably` and `DurableFile` put the bytes in a temporary file beside the target, flush them to the disk, give the
file the mode the umask asks for, rename it over the target and flush the folder. `LineFile` appends whole lines.
`open_regular` and `read_whole` read what a user names, without trusting that it is a file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megalite.errors import DISK_FULL, CheckpointError, MegaliteError, ResourceError

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]+\.tmp")
_SCAN = 1 << 16
"""Bytes read at a time when the last line of a file is looked for."""


def _refusal(path: Path, error: OSError) -> MegaliteError:
    """What the user is told when the system refuses to write `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in DISK_FULL:
        return ResourceError(f"{path}: {reason}. Free some space, or write to another disk.")
    return CheckpointError(f"{path}: can't be written: {reason}.")


@contextmanager
def told_clearly(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write `path` into ResourceError (disk full) or CheckpointError."""
    try:
        yield
    except OSError as error:
        raise _refusal(path, error) from error


class DurableFile:
    """A file under construction: `with DurableFile(path) as file: file.write(...)`.

    The target appears, whole, when the block ends without an error; until then, and after an error, it is as it was.
    Missing parent folders are made.
    ResourceError when the disk is full, CheckpointError when the path can't be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        with told_clearly(self.path):
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # open(2) applies the umask, unlike the temporary files of the standard library, which stay at 0600
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "w+b")
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None, "left before it was entered"
        try:
            if isinstance(error, OSError) and error.errno in DISK_FULL:  # met by one of the caller's writes
                raise _refusal(self.path, error) from error
            if kind is None:
                with told_clearly(self.path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    os.replace(self._temporary, self.path)
                    sync_folder(self.path.parent)
        finally:
            _abandon(self._file)
            self._temporary.unlink(missing_ok=True)


def _abandon(file: BinaryIO) -> None:
    """Close `file`. Its buffer may hold content that was given up, so a full disk is no news here."""
    try:
        file.close()
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise


def write_durably(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file by `content` (text as UTF-8), as `DurableFile` does."""
    with DurableFile(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def left_behind(folder: Path) -> list[Path]:
    """Temporary files of writers that were killed: only for who knows that no other process writes in the folder."""
    return [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]


def remove_left_behind(*folders: Path) -> None:
    """Remove them from such of the folders as are there."""
    for path in (path for folder in folders if folder.is_dir() for path in left_behind(folder)):
        path.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file to read. OSError also for a pipe, a device or a socket, which could keep a reader waiting for ever."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "a pipe or a device, not a file", os.fspath(path))


def read_whole(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a file of at most `most` bytes. OSError, which says why: larger, no regular file, unreadable."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
        raise OSError(errno.EFBIG, f"larger than {size}, so not what it should be", os.fspath(path))
    return content


def as_json(value: object) -> str:
    """Indented JSON and a final newline; ValueError for NaN and infinities."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Replace the file by `value` as `as_json` gives it."""
    write_durably(path, as_json(value))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_at_once(file: BinaryIO | int) -> bool:
    """Lock a file that is open for writing (NFS wants that) until it is closed; False: another process has it locked.

    A file system without locks is taken at its word.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


class LineFile:
    """A text file that grows by whole lines; made if missing, missing parent folders too. `anew` empties it first.

    A run that is killed can leave a last line without its end: whoever goes on with a file calls `cut_torn_line` before
    the first append, once it knows that the file is its own.
    ResourceError when the disk is full (the half-written line is taken back), CheckpointError when it can't be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, anew: bool = False):
        self.path = Path(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if anew else 0)
        with told_clearly(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, flags, 0o666)

    def cut_torn_line(self) -> int:
        """Remove what follows the last newline; returns the bytes removed."""
        if not self._is_regular():
            return 0
        size = end = os.fstat(self._descriptor).st_size
        while end > 0:
            start = max(0, end - _SCAN)
            newline = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            with told_clearly(self.path):
                os.ftruncate(self._descriptor, end)
        return size - end

    def append(self, line: str) -> None:
        """Add `line` (without its newline) and hand it to the system: it outlives this process, not a power cut."""
        if "\n" in line:
            raise ValueError("a line can't contain a newline")
        data = memoryview(f"{line}\n".encode())
        end = os.fstat(self._descriptor).st_size
        with told_clearly(self.path):
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                if self._is_regular():
                    os.ftruncate(self._descriptor, end)
                raise

    def sync(self) -> None:
        """Flush to the disk: what was appended survives a power cut."""
        if self._is_regular():
            with told_clearly(self.path):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; idempotent."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_regular(self) -> bool:
        """False for a pipe or device such as /dev/stdout, which has nothing to truncate or sync."""
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)
