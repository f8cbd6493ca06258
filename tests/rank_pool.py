"""Ranks for tests: forked processes joined by gloo, which run one function after another.

A job is a function of a test module, `f(rank, *args)`. A rank that raises or dies fails the test at once with its
traceback; a hang ends with a timeout that says which ranks were still at work and where.

    test process --asks--> zygote --forks--> rank 0, 1, ... --connect back--> test process

The zygote is forked before the first test runs: a process that has threads (or has run a backward pass) can't be
forked safely any more.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from waiting import PATIENCE, wait_until

from megalite import errors

SETTLE_SECONDS = 0.3
"""After a first failure the others are given this long: the rank that failed first may not be the first to say so."""


class Zygote:
    """A process forked early, which forks ranks on demand."""

    def __init__(self, preload: Sequence[str] = ()):
        """`preload`: modules that it imports, so that no rank has to."""
        torch.set_num_threads(1)
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.pipe.close()
            _serve_forks(theirs, preload)
        theirs.close()

    def start(self, size: int, address: str) -> None:
        self.pipe.send((size, address))

    def close(self) -> None:
        self.pipe.close()
        os.waitpid(self.pid, 0)


def _serve_forks(pipe: Connection, preload: Sequence[str]) -> None:
    """The zygote's life: ends, by os._exit, when the test process closes its end or dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")  # deepspeed looks when it is imported
    for name in preload:
        import_module(name)
    gc.freeze()  # what was imported stays, and is shared by all ranks until a collection looks at it
    while True:
        try:
            size, address = pipe.recv()
        except EOFError:
            os._exit(0)
        for rank in range(size):
            if os.fork() == 0:
                pipe.close()
                _serve_jobs(rank, size, address)


def restore(environment: dict[str, str]) -> None:
    """Undo what was changed in os.environ since."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _die_with_parent() -> None:
    """Linux: SIGKILL when the zygote goes, so that no rank outlives a killed test run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _serve_jobs(rank: int, size: int, address: str) -> None:
    """A rank's life; never returns."""
    try:
        _die_with_parent()
        folder = Path(address).parent
        trace = open(folder / f"trace-{rank}", "w")
        faulthandler.register(signal.SIGUSR1, file=trace)
        link = Client(address)
        link.send((rank, os.getpid()))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(minutes=5)
        )
        while True:
            function, args = pickle.loads(link.recv_bytes())
            errors._passages.clear()  # faults are counted from the beginning of each job
            environment = dict(os.environ)
            try:
                answer = (True, function(rank, *args))
            except BaseException:
                answer = (False, traceback.format_exc())
            restore(environment)
            link.send_bytes(pickle.dumps(answer))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class RankPool:
    """`size` ranks that live until closed or until one of them fails."""

    def __init__(self, zygote: Zygote, size: int):
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.links: dict[int, Connection] = {}
        self.pids: dict[int, int] = {}
        with Listener(str(self.folder / "socket"), backlog=size) as listener:
            zygote.start(size, listener.address)
            for _ in range(size):
                link = listener.accept()
                rank, pid = link.recv()
                self.links[rank], self.pids[rank] = link, pid

    @property
    def alive(self) -> bool:
        return bool(self.links)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE) -> list[Any]:
        """Call `function(rank, *args)` on every rank; what each returned, in rank order.

        AssertionError with the traceback of every rank that failed, or with where each unfinished rank stands after
        `timeout` seconds. The pool is closed then.
        """
        job = pickle.dumps((function, args))
        for link in self.links.values():
            link.send_bytes(job)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(results) + len(failures) < self.size:
            waiting = {self.links[r]: r for r in range(self.size) if r not in results and r not in failures}
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for link in ready:
                rank = waiting[link]
                ok, value = self._receive(link)
                (results if ok else failures)[rank] = value
                if not ok:
                    end = min(end, time.monotonic() + SETTLE_SECONDS)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        if failures:
            message = "\n".join(f"rank {rank} failed:\n{trace}" for rank, trace in failures.items())
        else:
            message = self._hang_report(sorted(set(range(self.size)) - results.keys()), timeout)
        self.close()
        raise AssertionError(message)

    @staticmethod
    def _receive(link: Connection) -> tuple[bool, Any]:
        try:
            return pickle.loads(link.recv_bytes())
        except (EOFError, ConnectionResetError):
            return False, "the process died"

    def _hang_report(self, ranks: list[int], timeout: float) -> str:
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGUSR1)
        for rank in ranks:
            wait_until(lambda rank=rank: __file__ in self._trace(rank), f"rank {rank} says where it stands", within=60)
        traces = [f"rank {rank}:\n{self._stack(rank)}" for rank in ranks]
        return f"ranks {ranks} of {self.size} were not done after {timeout} s\n" + "\n".join(traces)

    def _stack(self, rank: int) -> str:
        """Where a rank stands, innermost call first, without the calls that led to the job."""
        return self._trace(rank).partition(f'  File "{__file__}"')[0]

    def _trace(self, rank: int) -> str:
        return (self.folder / f"trace-{rank}").read_text()

    def close(self) -> None:
        """Kill the ranks."""
        for rank, link in self.links.items():
            try:
                os.kill(self.pids[rank], signal.SIGKILL)
            except ProcessLookupError:
                pass  # it died by itself, which is why the pool is being closed
            link.close()
        self.links.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Pools:
    """One pool a size, made when first asked for and again after a failure."""

    def __init__(self, preload: Sequence[str] = ()):
        self.zygote = Zygote(preload)
        self.pools: dict[int, RankPool] = {}

    def __call__(self, size: int) -> RankPool:
        if size not in self.pools or not self.pools[size].alive:
            self.pools[size] = RankPool(self.zygote, size)
        return self.pools[size]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.zygote.close()
