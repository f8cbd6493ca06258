"""Programs as forks of one process that has imported what they need: hundreds of starts without seconds of imports.

    test process --asks--> server --forks--> supervisor --forks--> program --forks--> the ranks, if it is a door

The door's ranks are forks of the door; what it finds out from the environment that a process was started with
(leftovers, which it kills) is tested with real starts in test_launcher.py.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ("cli", "inference.job", "serve.worker", "tools.convert", "tools.describe", "tools.export")
"""What the server imports of megalite when it starts."""
TRAINING = (
    *("megalite.hybrid.job", "deepspeed", "torch._dynamo"),
    "deepspeed.ops.op_builder.all_ops",
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
)
"""`preload` for programs that train."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """As subprocess has it: negative for a signal."""
    out: str
    err: str
    written: int
    """Bytes that it gave to write calls."""
    left_running: bool
    """Something that it started lived on."""


class Program:
    """A program that was started."""

    def __init__(self, link: Connection, folder: Path):
        self._link, self._folder = link, folder
        self.pid: int = link.recv()

    @property
    def runs(self) -> bool:
        return not self._link.poll()

    @property
    def out(self) -> str:
        """What it has written to its standard output."""
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        """What it has written to its standard error."""
        return (self._folder / "err").read_text()

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def ended(self, within: float = PATIENCE) -> Ended:
        """Wait for its end; AssertionError after `within` seconds."""
        if not self._link.poll(within):
            self.signal(signal.SIGKILL)
            raise AssertionError(f"not done after {within} s: {(self._folder / 'err').read_text()}")
        code, written, left_running = self._link.recv()
        self._link.close()
        return Ended(code, self.out, self.err, written, left_running)


class Forks:
    """`run` and `start` are as `python SCRIPT ARGUMENT...` in the folder `cwd`. Use as a context manager."""

    def __init__(self, folder: Path):
        """`folder`: for what the programs print."""
        self._folder, self._address = folder, str(folder / "socket")
        command = [sys.executable, __file__, self._address]
        # As jobs have it that train.
        environment = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
        options = {"cwd": ROOT, "env": {**os.environ, **environment}}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
        self._server = subprocess.Popen(command, **options, **pipes)
        assert self._server.stdout.readline() == b"ready\n"

    def start(
        self,
        script: str | Path,
        *arguments: object,
        cwd: Path = ROOT,
        stdin: str | Path = os.devnull,
        preload: Sequence[str] = (),
        **environment: str | None,
    ) -> Program:
        """`environment`: over this process's; None takes a variable away."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        for name in ("out", "err"):
            (folder / name).touch()
        changed = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
        environment = {name: value for name, value in changed.items() if value is not None}
        link = Client(self._address)
        words = [str(script), *map(str, arguments)]
        link.send((preload, [words, environment, str(cwd), str(stdin), str(folder / "out"), str(folder / "err")]))
        return Program(link, folder)

    def run(self, script: str | Path, *arguments: object, within: float = PATIENCE, **options: Any) -> Ended:
        return self.start(script, *arguments, **options).ended(within)

    def hosts(self, number: int, script: str | Path, *arguments: object, **options: Any) -> list[Program]:
        """The script as one rank on each of so many hosts, with what a launcher there gives to it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        here = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **options}
        return [self.start(script, *arguments, RANK=str(rank), **world, **here) for rank in range(number)]

    def tool(self, name: str, *arguments: object, **environment: str) -> Ended:
        """As `python tools/NAME.py ARGUMENT...`."""
        return self.run(ROOT / "tools" / f"{name}.py", *arguments, **environment)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


# ---- in the server


def main(address: str) -> None:
    """Ends with the test process, and all that it has started with it."""
    for name in (*(f"megalite.{name}" for name in PRELOAD), "omegaconf"):  # which config/ imports when it reads one
        import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        os.write(1, b"ready\n")
        supervisors = 0
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            link = Connection(listener.accept()[0].detach())
            preload, program = link.recv()
            for name in preload:
                import_module(name)
            gc.freeze()  # what was imported stays, and is shared by all forks until a collection looks at it
            supervisors += 1
            if os.fork() == 0:
                _supervise(link, *program)
            link.close()
            while supervisors and os.waitpid(-1, os.WNOHANG)[0]:
                supervisors -= 1


def _supervise(link: Connection, *program: Any) -> NoReturn:
    """The program's standard error goes through a pipe, which takes messages also of a process whose disk is full."""
    _die_with_parent()
    *rest, err = program
    there, here = os.pipe()
    pid = os.fork()
    if pid == 0:
        _die_with_parent()
        _program(*rest, f"/dev/fd/{here}")
    link.send(pid)
    os.close(here)
    ended, open_ = os.pidfd_open(pid), True
    with open(err, "ab", buffering=0) as file:
        while open_ and (there in (ready := select.select([there, ended], [], [])[0]) or ended not in ready):
            open_ = file.write(os.read(there, 1 << 16)) > 0
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        counts = dict(entry.split(": ") for entry in Path(f"/proc/{pid}/io").read_text().splitlines())
        link.send((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(counts["wchar"]), open_))
        while open_:  # what it has left running may still say something
            open_ = file.write(os.read(there, 1 << 16)) > 0
    os._exit(0)


def _die_with_parent() -> None:
    """Linux: SIGKILL when the process above goes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _program(words: list[str], environment: dict[str, str], cwd: str, stdin: str, out: str, err: str) -> NoReturn:
    from megalite.run import launcher

    launcher.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _ForkedRank})
    if front := sys.modules.get("megalite.serve.front"):
        front.asyncio = SimpleNamespace(**{**vars(asyncio), "create_subprocess_exec": _ForkedDoor.start})
    if frame := sys.modules.get("megalite.tools.benchmarks.frame"):
        frame.subprocess = SimpleNamespace(run=_run_fork)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file in enumerate((os.open(stdin, os.O_RDONLY), os.open(out, flags), os.open(err, flags))):
        os.dup2(file, number)
    os.setsid()
    os.chdir(cwd)
    _run(words, environment, ())


class _ForkedRank:
    """What the door uses of subprocess.Popen, for `python -u SCRIPT ARGUMENT...`, as a fork of the door."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        stdin: int | None,
        pass_fds: Sequence[int],
        start_new_session: bool,
        preexec_fn: Callable[[], None],
    ):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            preexec_fn()
            if stdin == subprocess.DEVNULL:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(write_through=True)
            _run(command[2:], env, pass_fds)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int | None:
        return self.poll()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def _run_fork(command: list[str], *, preexec_fn: Callable[[], None]) -> SimpleNamespace:
    """What benchmarks use of subprocess.run, for `python SCRIPT ARGUMENT...`, as a fork."""
    options = {"env": dict(os.environ), "stdin": None, "pass_fds": (), "start_new_session": False}
    process = _ForkedRank([command[0], "-u", *command[1:]], preexec_fn=preexec_fn, **options)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]))


class _ForkedDoor:
    """What the server's fleet uses of a replica's asyncio.subprocess.Process."""

    def __init__(self, process: _ForkedRank):
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, *command: str, **options: Any) -> _ForkedDoor:
        return cls(_ForkedRank([*command], preexec_fn=lambda: None, **options))

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def wait(self) -> int:
        while (code := self._process.poll()) is None:
            await asyncio.sleep(0.01)
        return code


def _run(words: list[str], environment: dict[str, str], descriptors: Sequence[int]) -> NoReturn:
    """The script, as if Python had just been started: with these descriptors, and all signals at their defaults."""
    for file in map(int, os.listdir("/proc/self/fd")):
        if file > 2 and file not in descriptors:
            try:
                os.close(file)
            except OSError:
                pass  # that of the listing
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    weakref.finalize._registry.clear()  # temporary folders of the process that was forked
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads the environment when it is imported; what it imports may stay
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words if words[0] != "-m" else words[1:]
    sys.path[:0] = [str(Path(words[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    code: Any = 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
