"""Runs Python text that nobody has read: in a process of its own that can compute, and nothing else.

    run(program, tests)  >  python confined.py (limits, Landlock, system call filter)  >  program, each test  >  Verdict

What holds, on x86-64 and AArch64 Linux, for any user, root included, and inside containers:
- The process may use memory, the clock and random numbers, and open the files of the standard library, the shared
  libraries these need, and time zones: no other file, folder or named pipe, nothing in /proc, whatever its permissions
  (Landlock, Linux 5.13; it needs no privilege and no namespaces). Where the kernel or the container has no Landlock,
  nothing at all can be opened, and of the standard library PRELOADED can be imported.
- Every other system call is refused (seccomp, an allow-list): it can't write, make, rename or delete a file, open a
  socket, start a process or a thread, send a signal, trace a process or change a limit; asyncio, which needs a socket,
  doesn't work. What it prints is dropped.
- It speaks to its parent through a socket, which nobody else can open, as they could a pipe through /proc.
- Processor time and memory are limited, and so is the time it may take, asleep or not. When `run` returns the process
  is gone, and it is killed when its parent dies.
- It sees no environment variable, only the standard library, and hashes strings alike every time.
- What is told of it is one of a few fixed sentences; no word of its own comes out.
What does not hold:
- It can ask whether a file exists, and how large and old it is. It can't pass that on, but for one bit: whether it
  passed.
- Program and tests share an interpreter. A program that sets out to forge the verdict can do it, for example with
  objects that are equal to anything, or by searching its interpreter for the word that stands for success. Exiting
  early, catching exceptions, printing and replacing built-in functions do not help it.
- The kernel itself and the calls that are allowed are trusted.
Where the filter can't be installed (another processor, a kernel without seccomp) nothing is run: SandboxError.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from megalite.rewards import confined
from megalite.rewards.child import Child

CPU_SECONDS = 2
SECONDS = 10.0
"""Time for one run, whatever it does: long, because a busy machine should fail no honest program."""
MEMORY = 512 << 20
"""Address space, bytes."""
MOST_SAID = 1 << 12
"""Bytes of a line of the child's."""
ALLOW_LIST = True
"""Use Landlock where the kernel has it."""


class SandboxError(RuntimeError):
    """This machine can't confine a program, so it was not run."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program passed its tests."""

    passed: bool
    """It ran to its end, and so did every test."""
    reason: str = ""
    """Why it did not pass."""


def run(
    program: str,
    tests: Sequence[str] = (),
    *,
    cpu_seconds: int = CPU_SECONDS,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Verdict:
    """Run `program` as a module, then the statements of each test among its names.

    `cpu_seconds`: whole seconds of processor time; `seconds`: of the clock; `memory`: bytes.
    SandboxError: it can't be confined here. ValueError: a test is not Python.
    """
    word = secrets.token_hex(16)
    request = {"program": program, "tests": list(tests), "word": word, "parent": os.getpid()}
    request |= {"cpu_seconds": cpu_seconds, "memory": memory, "allow_list": ALLOW_LIST}
    child = Child(
        [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", os.path.abspath(confined.__file__)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PYTHONHASHSEED": "0"},
    )
    deadline = time.monotonic() + seconds
    first = said = ""
    in_time = False
    try:
        with suppress(TimeoutError):
            child.say(json.dumps(request).encode() + b"\n", deadline)
            first = _text(child.hear(deadline, MOST_SAID))
            said = _text(child.hear(deadline, MOST_SAID))
            if not said:
                child.wait(deadline)
            in_time = True
    finally:
        child.process.kill()  # by itself, as it could start no other
        status = child.process.wait()
        child.close()
    if first.startswith(confined.BROKEN):
        raise ValueError(first)
    if first != confined.READY:
        what = first or (f"the process ended with status {status}" if in_time else f"not ready after {seconds:g} s")
        raise SandboxError(f"no program can be confined here: {what}")
    if said == word:
        return Verdict(True)
    return Verdict(False, _told(said, len(tests)) or _ending(status, in_time, cpu_seconds, seconds))


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\n")


def _told(said: str, tests: int) -> str:
    """How the child says that the program failed, if it says so as we would: the program may have written anything."""
    found = re.fullmatch(r"(the program|test ([0-9]{1,9})) raised ([A-Za-z]{1,40})", said)
    if (
        found is None
        or int(found[2] or 1) > max(1, tests)
        or found[3] not in (*confined.EXCEPTIONS.values(), confined.OTHER)
    ):
        return "said what no program has to say" if said else ""
    return found[0]


def _ending(status: int, in_time: bool, cpu_seconds: int, seconds: float) -> str:
    if not in_time:
        return f"took longer than {seconds:g} s"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"used more than {cpu_seconds} s of processor time"
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    return f"exited with status {status} before its tests were done"
