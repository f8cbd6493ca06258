"""Processes as /proc shows them: which one exactly, whether it lives, who its parents and children are. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_LAUNCHER_MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run")
_LAUNCHER_SCRIPTS = ("deepspeed", "torchrun")


@dataclass(frozen=True)
class Process:
    """One process; its start time (clock ticks since boot) tells it from a later one with the same id."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The live process with this id, or None."""
        stat = _stat(pid)
        return cls(pid, stat.start) if stat and stat.state not in "ZX" else None

    def alive(self) -> bool:
        """False once it has ended, also while its parent has not collected it yet."""
        return Process.of(self.pid) == self

    def parent(self) -> Process | None:
        stat = _stat(self.pid)
        return Process.of(stat.parent) if stat and stat.start == self.start else None

    def command(self) -> list[str]:
        """The process's command line; empty when it is gone or not ours to see."""
        return _read(self.pid, "cmdline").decode(errors="replace").split("\0")[:-1]

    def environment(self) -> list[bytes]:
        """The `NAME=VALUE`s it was started with; empty when it is gone or not ours to see."""
        return _read(self.pid, "environ").split(b"\0")

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal if it still lives."""
        with suppress(ProcessLookupError):  # ended by itself just now
            if self.alive():
                os.kill(self.pid, signum)

    def __str__(self) -> str:
        name = launcher_name(self) or " ".join(self.command()[:2]).strip() or "process"
        return f"{name} (pid {self.pid})"


class _Stat(NamedTuple):
    state: str
    parent: int
    start: int


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _stat(pid: int) -> _Stat | None:
    fields = _read(pid, "stat").rpartition(b")")[2].split()  # the name before it may hold spaces and brackets
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[19])) if fields else None


def this_process() -> Process:
    me = Process.of(os.getpid())
    assert me is not None, "this process lives"
    return me


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP), not by a debugger."""
    stat = _stat(pid)
    return stat is not None and stat.state == "T"


def launcher_name(process: Process) -> str:
    """Which known launcher the process is: `deepspeed`, `deepspeed.launcher.launch`, `torchrun`...; '' if none."""
    arguments = process.command()[1:]
    while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
        arguments.pop(0)
    if arguments[:1] == ["-m"]:
        return next((name for name in arguments[1:2] if name in _LAUNCHER_MODULES), "")
    script = os.path.basename(arguments[0]) if arguments else ""
    return script if script in _LAUNCHER_SCRIPTS else ""


def ancestors(process: Process) -> list[Process]:
    """Parent, grandparent and so on up to the first process of the machine or container."""
    line = [process]
    while (above := line[-1].parent()) is not None:
        line.append(above)
    return line[1:]


def descendants(pid: int) -> list[Process]:
    """All live children of `pid`, their children and so on; parents before children."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        stat = _stat(int(name)) if name.isdigit() else None
        if stat and stat.state not in "ZX":
            children.setdefault(stat.parent, []).append(Process(int(name), stat.start))
    found = list(children.get(pid, []))
    for process in found:  # which grows
        found += children.get(process.pid, [])
    return found


def launchers(process: Process, door: int | None = None) -> list[Process]:
    """The processes above a rank without which its run must not go on, nearest first; empty if it has no parent.

    They reach from its parent to the topmost of the launchers over it (`deepspeed` is two processes); `door` is the id
    of a process that started the launcher itself and is counted as one. On a host that was reached over ssh they
    reach to the connection. Under nothing that is known as a launcher: the parent alone.
    """
    line = ancestors(process)
    known = [bool(launcher_name(above)) or above.pid == door for above in line]
    if True not in known:
        return line[:1]
    top = known.index(True)
    while known[top + 1 : top + 2] == [True]:
        top += 1
    if launcher_name(line[top]) == "deepspeed.launcher.launch":  # its other half is on another host
        names = [os.path.basename(above.command()[0]) if above.command() else "" for above in line]
        top = next((i for i in range(top, len(line)) if names[i].startswith("sshd")), top)
    return line[: top + 1]


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """From now on the kernel sends this process `signum` when its parent ends; 0 takes that back.

    A rank calls it first thing, before the long imports during which nothing else can watch its launcher.
    """
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signum)
    if signum and os.getppid() != parent:  # it ended in between, and no signal will come
        os.kill(os.getpid(), signum)


def adopt_orphans(adopt: bool = True) -> None:
    """Orphaned descendants become children of this process instead of the machine's first one, so it can find them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))
