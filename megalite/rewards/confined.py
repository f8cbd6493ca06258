"""The process that runs a program for `sandbox`: gives up all rights, then executes the program and its tests.

`python confined.py SOCKET` reads a request, a JSON line, from the socket and answers READY, or why it can't confine
itself or which test is BROKEN; then on a second line the request's word if all went well, else what was raised. Runs
as a script, without the packages that are installed: it imports only the standard library.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib.util
import json
import os
import platform
import resource
import signal
import sys
import types
from typing import Any

PRELOADED = (
    *("_strptime", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "contextlib"),
    *("copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "encodings.ascii", "encodings.latin_1", "enum"),
    *("fractions", "functools", "hashlib", "heapq", "html", "inspect", "io", "itertools", "json", "keyword", "math"),
    *("numbers", "operator", "os", "pprint", "queue", "random", "re", "secrets", "statistics", "string", "struct"),
    *("sys", "textwrap", "threading", "time", "timeit", "traceback", "types", "typing", "unicodedata", "uuid", "zlib"),
)
"""Modules that a program can import where the kernel can't tell which files it opens."""
READY = "confined"
BROKEN = "broken test"
EXCEPTIONS = {
    value: value.__name__
    for value in vars(builtins).values()
    if isinstance(value, type) and issubclass(value, BaseException)
}
OTHER = "something"
"""For an exception that the program may have named itself."""

CALLS = """
access 21 -                         arch_prctl 158 -                    brk 12 214
clock_getres 229 114                clock_gettime 228 113               clock_nanosleep 230 115
close 3 57                          exit 60 93                          exit_group 231 94
faccessat 269 48                    faccessat2 439 439                  fstat 5 80
futex 202 98                        getcwd 79 17                        getdents64 217 61
getegid 108 177                     geteuid 107 175                     getgid 104 176
getpid 39 172                       getppid 110 173                     getrandom 318 278
getrusage 98 165                    gettid 186 178                      gettimeofday 96 169
getuid 102 174                      lseek 8 62                          lstat 6 -
madvise 28 233                      mmap 9 222                          mprotect 10 226
mremap 25 216                       munmap 11 215                       nanosleep 35 101
newfstatat 262 79                   poll 7 -                            ppoll 271 73
pread64 17 67                       pselect6 270 72                     read 0 63
rt_sigaction 13 134                 rt_sigprocmask 14 135               rt_sigreturn 15 139
sched_getaffinity 204 123           sched_yield 24 124                  select 23 -
set_robust_list 273 99              sigaltstack 131 132                 stat 4 -
statx 332 291                       sysinfo 99 179                      times 100 153
uname 63 160                        write 1 64
"""
"""System calls whose arguments don't matter, and their numbers on x86-64 and AArch64, which lacks some of them.

What can be written to is what is open: the null device and the answer.
"""
ALLOWED = [{int(number) for number in CALLS.split()[column::3] if number != "-"} for column in (1, 2)]
"""The numbers by the column of the machine."""
OPENAT = (257, 56)
"""Allowed for reading, where Landlock says what."""
FCNTL = (72, 25)
"""Allowed but for commands such as F_SETOWN, with which a signal can be sent to another process."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By the machine's name: column of the numbers, and what the kernel calls it (AUDIT_ARCH in linux/audit.h)."""

_LIBC = ctypes.CDLL(None, use_errno=True)
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
    for number in sorted(ALLOWED[column]):
        lines += [(_EQUAL, 0, 1, number), allow]
    return [*lines, refuse]


def _confine(request: dict[str, Any]) -> None:
    """Give up, for good, all that a program doesn't need. OSError or KeyError if that is not possible here."""

    def prctl(option: int, value: int, more: Any = 0) -> None:
        _checked(_LIBC.prctl(option, ctypes.c_ulong(value), more, 0, 0))

    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    prctl(_PR_SET_DUMPABLE, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    has_list = request["allow_list"] and _restrict_files()
    if not has_list:
        for name in PRELOADED:
            importlib.import_module(name)
    seconds = request["cpu_seconds"]
    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 64, "AS": request["memory"]}
    for name, limit in limits.items():
        _lower(getattr(resource, f"RLIMIT_{name}"), limit, limit)
    _lower(resource.RLIMIT_CPU, seconds, seconds + 1)

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


def _restrict_files() -> bool:
    """Let this process open what `_readable` lists and nothing else; False where there is no Landlock."""
    if _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION) < 1:
        return False
    importlib.util.find_spec("no_module_of_this_name")  # what the folders of sys.path hold is known from now on

    class Rule(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]

    handled = ctypes.c_uint64(_ALL_ACCESS)
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0))
    for path in _readable():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        access = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(Rule(access, descriptor)), 0))
        os.close(descriptor)
    _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return True


def _checked(result: int) -> int:
    """What a call of the C library gave. OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


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


def _lower(kind: int, soft: int, hard: int) -> None:
    _, present = resource.getrlimit(kind)
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(kind, (soft, hard))


def _main(line: int) -> None:
    """Read the request, confine this process, run what was asked for and say how it went."""
    with open(line, "rb") as file:
        request = json.loads(file.readline())
        answers = os.dup(line)

    # What the program can replace in its interpreter is not looked up again once it has run.
    def say(text: str, write: Any = os.write, leave: Any = os._exit, last: bool = True) -> None:
        write(answers, text[:1000].replace("\n", " ").encode("utf-8", "replace") + b"\n")
        if last:
            leave(0)

    steps = []
    for number, test in enumerate(request["tests"], 1):
        try:
            steps.append((f"test {number}", compile(test, f"<test {number}>", "exec", dont_inherit=True)))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            say(f"{BROKEN} {number}: {error}")
    try:
        _confine(request)
    except (OSError, KeyError, ImportError) as error:
        say(f"{type(error).__name__}: {error}")
    say(READY, last=False)
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


def _described(error: BaseException, names: Any = EXCEPTIONS, kind_of: Any = type) -> str:
    """No word of the program's: the name of an exception of Python's own, else none."""
    return f"raised {names.get(kind_of(error), OTHER)}"


if __name__ == "__main__":
    _main(int(sys.argv[1]))
