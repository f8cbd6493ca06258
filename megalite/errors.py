"""Errors that a user can act on, the exit code of each, and the one point where tests inject faults."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_CONFIG = 2
EXIT_CHECKPOINT = 3
EXIT_RESOURCES = 4
EXIT_PROMPTS_FAILED = 5
EXIT_RANK_LOST = 70
EXIT_SIGINT = 128 + signal.SIGINT
EXIT_SIGTERM = 128 + signal.SIGTERM

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the system says that a disk or a quota has no room."""
_HOST_MEMORY = "DefaultCPUAllocator: "
"""Of which torch's RuntimeError speaks when the host has no memory left."""


class MegaliteError(Exception):
    """A failure whose message is meant for the user: one to three lines, no traceback unless `--debug`."""

    exit_code = EXIT_CRASH

    def lines(self) -> list[str]:
        """What a command that it ends prints."""
        return [f"error: {self}"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with the configuration: the key, its value, the rule it breaks and how to mend it."""

    key: str
    """Dotted path, e.g. `parallel.tp`; empty for a problem of the whole command."""
    rule: str
    value: object = None
    fix: str = ""
    origin: str = ""
    """Where the value came from: `file.yaml:3`, `the command line`, `default`."""

    def __str__(self) -> str:
        head = f"{self.key}: " if self.key else ""
        got = f", got {self.value!r}" if self.value is not None else ""
        origin = f" (from {self.origin})" if self.origin else ""
        fix = f" {self.fix}" if self.fix else ""
        return f"{head}{self.rule}{got}.{fix}{origin}"


class ConfigError(MegaliteError, ValueError):
    """The configuration, the command line or an argument can't be used; carries every problem found, not just the
    first. A ValueError too, which is what callers of a Python API expect of a wrong argument."""

    exit_code = EXIT_CONFIG

    def __init__(self, *problems: Problem | str):
        self.problems = tuple(Problem(key="", rule=p.rstrip(".")) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def lines(self) -> list[str]:
        return [f"error: {problem}" for problem in self.problems]


class CheckpointError(MegaliteError):
    """A model folder, weight file or training checkpoint is missing, damaged or does not fit the model."""

    exit_code = EXIT_CHECKPOINT


class ResourceError(MegaliteError):
    """The job does not fit: memory, disk space or KV cache."""

    exit_code = EXIT_RESOURCES


def resource_error(error: BaseException) -> ResourceError | None:
    """What the user is told of memory or a disk that turned out too small in the middle of the work; None: another
    error."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}{os.strerror(error.errno)}. Free some space, or write to another disk.")
    said = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _HOST_MEMORY in said:
        what = f"out of memory ({said})" if said else "out of memory"
        return ResourceError(f"{what}. Use more ranks or a smaller batch; --dry-run shows what each rank needs.")
    return None


class RankLost(MegaliteError):
    """A rank of this run died, was killed or never came; the message names it."""

    exit_code = EXIT_RANK_LOST


class Stopped(MegaliteError):
    """A signal asked the run to stop and it drained cleanly."""

    def __init__(self, signum: int):
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name}; finished work is kept")

    def lines(self) -> list[str]:
        return [str(self)]


FAULT_VARIABLE = "MEGALITE_FAULT"


def maybe_fault(point: str, rank: int | None = None, *, offers: tuple[str, ...] = ()) -> str | None:
    """Fail here if the environment asks for it; otherwise do nothing.

    `MEGALITE_FAULT="POINT[@RANK][#N]=ACTION"` acts on the Nth passage (from 1) of POINT on RANK (default: any); `rank`
    is by default the one that the launcher gave this process. ACTION is `raise` (RuntimeError), a key of `FAULTS`, or
    one that the caller `offers` to perform itself: it is returned. Every fault test uses this one point of entry
    instead of patching code.
    """
    spec = os.environ.get(FAULT_VARIABLE)
    return _fault(spec, point, rank, offers) if spec else None


def _hang() -> None:
    while True:
        signal.pause()


def _fill_memory() -> None:
    bytearray(1 << 60)


def _fill_disk() -> None:
    # what the kernel then says of every write is EFBIG, which we treat as ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(EXIT_DONE),
    "hang": _hang,
    "memory": _fill_memory,
    "disk": _fill_disk,
}
"""SIGKILL, SIGSTOP, an end without a word and with status 0, standing still for ever, MemoryError, and that no file of
this process can grow from here on."""
_passages: dict[str, int] = {}


def _fault(spec: str, point: str, rank: int | None, offers: tuple[str, ...]) -> str | None:
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    where, _, action = spec.partition("=")
    where, _, nth = where.partition("#")
    where, _, only_rank = where.partition("@")
    if where != point or (only_rank and int(only_rank) != rank):
        return None
    _passages[point] = passage = _passages.get(point, 0) + 1  # threads may count one passage twice, but skip none
    if passage != int(nth or 1):
        return None
    if action in offers:
        return action
    if action == "raise":
        raise RuntimeError(f"injected fault at {point} on rank {rank}")
    if action not in FAULTS:
        known = ", ".join(("raise", *FAULTS, *offers))
        raise ConfigError(f"{FAULT_VARIABLE}={spec!r}: the action must be one of {known}")
    FAULTS[action]()
    return None
