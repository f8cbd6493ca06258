"""Runs Python text that nobody has read: in a process of its own that can compute, and nothing else.

    run(program, tests)  >  python sandbox.py (limits, Landlock, system call filter)  >  program, each test  >  Outcome

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

The child is this file, run as a script: it imports only the standard library.
"""

from __future__ import annotations

import builtins
import errno
import importlib.util
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CPU_SECONDS = 2
SECONDS = 10.0
"""Time for one run, whatever it does: long, because a busy machine should fail no honest program."""
MEMORY = 512 << 20
"""Address space, bytes."""
MAX_ANSWER = 1 << 12
"""Bytes read of what the child says."""

PRELOADED = (
    *("_strptime", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "contextlib"),
    *("copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "encodings.ascii", "encodings.latin_1", "enum"),
    *("fractions", "functools", "hashlib", "heapq", "html", "inspect", "io", "itertools", "json", "keyword", "math"),
    *("numbers", "operator", "os", "pprint", "queue", "random", "re", "secrets", "statistics", "string", "struct"),
    *("sys", "textwrap", "threading", "time", "timeit", "traceback", "types", "typing", "unicodedata", "uuid", "zlib"),
)
"""Modules that a program can import where the kernel can't tell which files it opens."""
ALLOW_LIST = True
"""Use Landlock where the kernel has it."""

_READY = "confined"
_BROKEN = "broken test"
_EXCEPTIONS = {
    value: value.__name__
    for value in vars(builtins).values()
    if isinstance(value, type) and issubclass(value, BaseException)
}
_OTHER = "something"
"""For an exception that the program may have named itself."""


class SandboxError(RuntimeError):
    """This machine can't confine a program, so it was not run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

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
) -> Outcome:
    """Run `program` as a module, then the statements of each test among its names.

    `cpu_seconds`: whole seconds of processor time; `seconds`: of the clock; `memory`: bytes.
    SandboxError: it can't be confined here. ValueError: a test is not Python.
    """
    word = secrets.token_hex(16)
    request = {"program": program, "tests": list(tests), "word": word, "parent": os.getpid()}
    request |= {"cpu_seconds": cpu_seconds, "memory": memory, "allow_list": ALLOW_LIST}
    command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", os.path.abspath(__file__)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        theirs.close()
        try:
            answer, in_time = _converse(child, ours, json.dumps(request).encode(), time.monotonic() + seconds)
        finally:
            child.kill()  # by itself, as it could start no other
            status = child.wait()
    first, _, rest = answer.partition("\n")
    if first.startswith(_BROKEN):
        raise ValueError(first)
    if first != _READY:
        what = first or (f"the process ended with status {status}" if in_time else f"not ready after {seconds:g} s")
        raise SandboxError(f"no program can be confined here: {what}")
    if rest.strip() == word:
        return Outcome(True)
    return Outcome(False, _told(rest, len(tests)) or _ending(status, in_time, cpu_seconds, seconds))


def _converse(child: subprocess.Popen[bytes], ours: socket.socket, request: bytes, deadline: float) -> tuple[str, bool]:
    """Send the request; what the child said until it ended, and whether it ended in time."""
    said = b""
    try:
        ours.settimeout(max(0.001, deadline - time.monotonic()))
        ours.sendall(request)
        ours.shutdown(socket.SHUT_WR)
        while len(said) < MAX_ANSWER:
            ours.settimeout(max(0.001, deadline - time.monotonic()))
            piece = ours.recv(MAX_ANSWER)
            if not piece:
                break
            said += piece
        if len(said) < MAX_ANSWER:
            child.wait(max(0.0, deadline - time.monotonic()))
    except (BrokenPipeError, ConnectionResetError):
        pass  # it ended early, and what it said tells why
    except (TimeoutError, subprocess.TimeoutExpired):  # also if it has closed its end and goes on
        return said.decode(errors="replace"), False
    return said.decode(errors="replace"), True


def _told(said: str, tests: int) -> str:
    """How the child says that the program failed, if it says so as we would: the program may have written anything."""
    found = re.fullmatch(r"(the program|test ([0-9]{1,9})) raised ([A-Za-z]{1,40})", said.rstrip("\n"))
    if found is None or int(found[2] or 1) > max(1, tests) or found[3] not in (*_EXCEPTIONS.values(), _OTHER):
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


# ---- the child ---------------------------------------------------------------------------------------------------

ALLOWED = {
    "access": (21, None),
    "arch_prctl": (158, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "read": (0, 63),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "set_robust_list": (273, 99),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),  # to what is open: the null device and the answer
}
"""System calls whose arguments don't matter, and their numbers on x86-64 and AArch64 (None: it has no such call)."""
OPENAT = (257, 56)
"""Allowed for reading, where Landlock says what."""
FCNTL = (72, 25)
"""Allowed but for commands such as F_SETOWN, with which a signal can be sent to another process."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By the machine's name: column of the numbers, and what the kernel calls it (AUDIT_ARCH in linux/audit.h)."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; an argument takes 8 bytes, low half first."""
_F_SETFL, _F_DUPFD_CLOEXEC = 4, 1030


def filter_program(machine: str, *, may_open: bool) -> list[tuple[int, int, int, int]]:
    """The filter in classic BPF, as (code, jump if true, jump if false, operand). KeyError: an unknown machine.

    A refused call fails with ENOSYS, as on a kernel without it, so that the C library tries what else there is;
    opening a file to write it fails as on a read-only disk. `may_open`: others can be opened.
    """
    column, architecture = ARCHITECTURES[machine]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    refuse = (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 6, OPENAT[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 2 * 8),
        (_ANY_BIT, 0, 1, writing),
        (_RETURN, 0, 0, _REFUSE | errno.EROFS),
        (_ANY_BIT, 1, 0, os.O_PATH),  # on which Landlock says nothing
        allow if may_open else (_RETURN, 0, 0, _REFUSE | errno.EACCES),
        (_RETURN, 0, 0, _REFUSE | errno.EACCES),
        (_EQUAL, 0, 5, FCNTL[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 1 * 8),
        (_EQUAL, 2, 0, _F_DUPFD_CLOEXEC),
        (_ABOVE, 0, 1, _F_SETFL),
        refuse,
        allow,
    ]
    numbers = [numbers[column] for numbers in ALLOWED.values()]
    for number in numbers:
        if number is not None:
            lines += [(_EQUAL, 0, 1, number), allow]
    return [*lines, refuse]


def _confine(request: dict[str, Any]) -> None:
    """Give up, for good, all that a program doesn't need. OSError or KeyError if that is not possible here."""
    import ctypes
    import resource

    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, value: int, more: Any = 0) -> None:
        if libc.prctl(option, ctypes.c_ulong(value), more, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    prctl(_PR_SET_DUMPABLE, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    has_list = request["allow_list"] and _restrict_files(libc)
    if not has_list:
        for name in PRELOADED:
            importlib.import_module(name)
    seconds = request["cpu_seconds"]
    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 64, "AS": request["memory"]}
    for name, limit in limits.items():
        _lower(resource, getattr(resource, f"RLIMIT_{name}"), limit, limit)
    _lower(resource, resource.RLIMIT_CPU, seconds, seconds + 1)

    class Line(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.POINTER(Line))]

    lines = filter_program(platform.machine(), may_open=has_list)
    program = Program(len(lines), (Line * len(lines))(*(Line(*line) for line in lines)))
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, with the same numbers on every machine (linux/landlock.h)."""
_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR, _ALL_ACCESS = 1 << 2, 1 << 3, (1 << 13) - 1


def _restrict_files(libc: Any) -> bool:
    """Let this process open what `_readable` lists and nothing else; False where there is no Landlock."""
    import ctypes

    if libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION) < 1:
        return False
    importlib.util.find_spec("no_module_of_this_name")  # what the folders of sys.path hold is known from now on

    class Rule(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]

    def checked(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    handled = ctypes.c_uint64(_ALL_ACCESS)
    ruleset = checked(libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0))
    for path in _readable():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        access = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(Rule(access, descriptor)), 0))
        os.close(descriptor)
    checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return True


def _readable() -> list[str]:
    """The standard library without what is installed beside it, shared libraries, and time zones."""
    found = ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    for folder in sys.path:
        if os.path.isdir(folder):
            found += [one.path for one in os.scandir(folder) if not one.name.endswith("-packages")]
        else:
            found.append(folder)
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if ".so" in line}
    roots = [os.path.realpath(folder) for folder in (*sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix)]
    for folder in {os.path.realpath(os.path.dirname(library)) for library in mapped if library.startswith("/")}:
        if any(f"{root}/".startswith(f"{folder}/") for root in roots):
            found += [one.path for one in os.scandir(folder) if ".so" in one.name and one.is_file()]
        else:
            found.append(folder)
    return found


def _lower(resource: Any, kind: int, soft: int, hard: int) -> None:
    _, present = resource.getrlimit(kind)
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(kind, (soft, hard))


def _main() -> None:
    """Read the request, confine this process, run what was asked for and say how it went."""
    import types

    request = json.load(sys.stdin.buffer)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)

    # What the program can replace in its interpreter is not looked up again once it has run.
    def say(text: str, write: Any = os.write, leave: Any = os._exit, last: bool = True) -> None:
        write(answers, text[:1000].encode("utf-8", "replace") + b"\n")
        if last:
            leave(0)

    steps = []
    for number, test in enumerate(request["tests"], 1):
        try:
            steps.append((f"test {number}", compile(test, f"<test {number}>", "exec", dont_inherit=True)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            say(f"{_BROKEN} {number}: {error}")
    try:
        _confine(request)
    except (OSError, KeyError, ImportError) as error:
        say(f"{type(error).__name__}: {error}")
    say(_READY, last=False)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    names = vars(module)
    names["__builtins__"] = builtins
    place, execute, anything, describe = "the program", exec, BaseException, _described
    try:
        execute(compile(request["program"], "<program>", "exec", dont_inherit=True), names)
        for place, test in steps:  # noqa: B007  named in the message below
            execute(test, names)
    except anything as error:
        say(f"{place} {describe(error)}")
    say(request["word"])


def _described(error: BaseException, names: Any = _EXCEPTIONS, kind_of: Any = type) -> str:
    """No word of the program's: the name of an exception of Python's own, else none."""
    return f"raised {names.get(kind_of(error), _OTHER)}"


if __name__ == "__main__":
    _main()
