"""The folder in TMPDIR through which the ranks of a run find each other on one host. Imports no torch."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from megalite.errors import ConfigError, Problem, ResourceError
from megalite.run.network import pid_namespace
from megalite.run.processes import Process

_NEEDED = 1 << 20
"""Bytes that have to be free where it lies."""
_ROOM = "a run needs 1 MiB there. Free some, or set TMPDIR to another place."


def run_folder(owner: Process, restart: str = "0") -> Path:
    """A folder for the ranks that `owner` started on this host, which no other user can open; made if missing.

    All of them find the same one without a word, because it is named for a process that they have in common. It stays
    until the owner removes it, or until a later run finds that the owner is gone.
    ConfigError if someone else may write there, ResourceError if there is no room.
    """
    base, folder = _base(), _folder_of(owner, restart)
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            rule = "must be a folder of yours that nobody else can open"
            fix = f"Remove it, or `chmod 700 {base}`, or set TMPDIR to another place."
            raise ConfigError(Problem(key=str(base), rule=rule, fix=fix))
        if not folder.exists():
            _sweep(base)
        free = shutil.disk_usage(base).free
        if free < _NEEDED:
            raise ResourceError(f"TMPDIR: {base.parent} has {free >> 10:,} KiB left; {_ROOM}")
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"TMPDIR: {folder} can't be made ({error.strerror}); {_ROOM}") from error
    return folder


def remove_run_folder(owner: Process) -> None:
    """What an owner does at the end of its run."""
    shutil.rmtree(_folder_of(owner, "0"), ignore_errors=True)


def _base() -> Path:
    """This user's folder in TMPDIR. ResourceError if there is no such place."""
    try:
        return Path(tempfile.gettempdir()) / f"megalite-{os.getuid()}"
    except OSError as error:
        raise ResourceError(f"TMPDIR: nothing can be written there ({error.strerror}); {_ROOM}") from error


def _folder_of(owner: Process, restart: str) -> Path:
    return _base() / f"{_prefix()}{owner.pid}-{owner.start}-{restart}"


def _prefix() -> str:
    boot, namespace = pid_namespace().split("/")
    return f"run-{boot[:8]}-{namespace}-"


def _sweep(base: Path) -> None:
    """Remove the folders of earlier runs on this host, whose owner is gone."""
    for folder in base.glob(f"{_prefix()}*"):
        pid, start, _ = folder.name.removeprefix(_prefix()).split("-")
        if not Process(int(pid), int(start)).alive():
            shutil.rmtree(folder, ignore_errors=True)  # another run may be sweeping too


def claim(folder: Path) -> bool:
    """True for the first process that asks in a run's folder: that one tells the user how the run ended."""
    try:
        os.close(os.open(folder / "told", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except FileExistsError:
        return False
    except OSError:  # swept away with its owner, or the disk is full: better told twice than not at all
        return True
    return True
