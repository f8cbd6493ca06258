"""The life of the HTTP process: starts everything, serves, drains on a signal, ends if nothing can run. Torch-free."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from starlette.types import ASGIApp

from megalite.config.schema import ServeConfig
from megalite.errors import EXIT_CRASH, EXIT_DONE, EXIT_RANK_LOST
from megalite.inference.io.inputs import PromptLimits
from megalite.monitor.words import format_count, wrapped
from megalite.run.meeting_folder import remove_run_folder, run_folder
from megalite.run.processes import descendants, this_process
from megalite.serve.fleet import Fleet, Start, kill
from megalite.serve.listener import Listener
from megalite.serve.messages import PASSED_ON
from megalite.serve.metrics import ServeMetrics
from megalite.serve.router import Router

TICK = 0.5
"""Seconds between two looks at moves and stalls."""
ABORTED = 3.0
"""Seconds that replicas have to give up what still runs."""
LAUNCHED_DRAIN = 20.0
"""Seconds that running requests have at most where a launcher passed the signal on: torchrun kills ranks after 30."""
ANSWERED = 3
"""Seconds that clients have to read the end of their answers."""
HANGING = 5.0
"""Seconds that threads which still work at something have to end."""
AGAIN = 0.3
"""Seconds after which a signal counts as a second one; a terminal and a shell may both send the first."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, PASSED_ON)

MakeApp = Callable[[ServeConfig, Router, ServeMetrics], ASGIApp]


@dataclass(frozen=True, kw_only=True, slots=True)
class External:
    """The replicas are ranks of a launcher's run, whose rank 0 started this process as its child.

    The listening sockets come as inherited descriptors, so that rank 0 knows the addresses before this process runs.
    """

    unix: int
    """Descriptor of a listening unix socket, for replicas of this host."""
    tcp: int | None = None
    """Descriptor of a listening TCP socket, for replicas of other hosts; these prove that they know the token."""
    token: bytes = b""
    """The run's; see `frames.proof`."""


class Server:
    """One server from its start to its end; main thread only."""

    def __init__(self, config: ServeConfig, limits: PromptLimits, sock: socket.socket, make_app: MakeApp):
        """`limits`: what a prompt must fit by the config alone; `sock`: where it listens."""
        self._config, self._limits, self._sock, self._make_app = config, limits, sock, make_app
        self._signals: list[tuple[int, float]] = []
        """What this process was sent, and when."""
        self._shall_end = False
        """A signal asked for the end, to this process or passed on by rank 0 of a launcher's run."""

    async def run(self, replicas: Start | External) -> int:
        """Serve until a signal comes or no replica is left; gives the exit code.

        `replicas`: how they are started, or how those that somebody else starts connect.
        """
        config, loop = self._config, asyncio.get_running_loop()
        over = asyncio.Event()
        before = self._take_signals(lambda: loop.call_soon_threadsafe(over.set))
        name = config.server.model_names[0] if config.server.model_names else str(config.model.path)
        metrics = ServeMetrics(name)
        count = config.parallel.sizes[2]
        self._router = Router(config.server, self._limits, count, metrics, block_size=config.engine.block_size)
        start = None if isinstance(replicas, External) else replicas
        self._fleet = Fleet(self._router, count, start, restarts=config.server.restarts)
        self._fleet.over.add_done_callback(lambda _: over.set())
        code = EXIT_CRASH
        try:
            if isinstance(replicas, External):
                tcp = None if replicas.tcp is None else socket.socket(fileno=replicas.tcp)
                await self._fleet.listen(socket.socket(fileno=replicas.unix), tcp, replicas.token)
            else:
                await self._fleet.listen(str(run_folder(this_process()) / "replicas"))
            app, timeout = self._make_app(config, self._router, metrics), config.server.body_timeout
            listener = Listener(app, self._sock, head_timeout=timeout, patience=ANSWERED)
            self._fleet.begin()
            gc.freeze()  # what was imported and built stays; collections need not look at it
            ticking = asyncio.create_task(self._tick(over))
            await over.wait()
            longest = LAUNCHED_DRAIN if start is None else float("inf")
            code = await self._drain(min(longest, config.server.drain_timeout)) if self._shall_end else self._lost()
            ticking.cancel()
            await listener.stop()
            await self._fleet.leave(at_once=code != EXIT_DONE)
        finally:
            self._fleet.kill_all()
            remove_run_folder(this_process())
            for signum, handler in before.items():
                signal.signal(signum, handler)
            _end_within(HANGING, code)
        return code

    async def _tick(self, over: asyncio.Event) -> None:
        try:
            while self._router.healthy:
                await asyncio.sleep(TICK)
                for replica in self._router.tick():
                    if self._router.healthy:
                        self._fleet.stalls(replica)
        except Exception:
            traceback.print_exc()
        over.set()

    async def _drain(self, timeout: float) -> int:
        """A signal has come: finish what runs, as far as it can be finished in `timeout` seconds."""
        self._router.drain()
        running = sum(one.requests for one in self._router.replicas())
        name = f"{signal.Signals(self._signals[0][0]).name}: " if self._signals else ""
        left = f"; {format_count(running, 'request')} may run for {timeout:g} s more" if running else ""
        self._say(f"{name}nothing new is taken{left}")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._router.idle(), timeout)
        self._router.abort_all()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._router.idle(), ABORTED)
        return self._fleet.over.result() if self._fleet.over.done() else EXIT_DONE

    def _lost(self) -> int:
        """Nothing can run any more; clients are told so."""
        if self._fleet.over.done():
            self._say("error: no replica is left")
            return self._fleet.over.result()
        self._say(f"error: no replica has finished a step for {self._config.server.stall_timeout:g} s")
        self._router.fail_all("all replicas stall")
        return EXIT_RANK_LOST

    def _take_signals(self, first: Callable[[], object]) -> dict[int, Any]:
        """From now on the first signal calls `first`, a second ends everything at once; gives the handlers so far."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if not self._shall_end:
                self._shall_end = True
                first()
            if signum == PASSED_ON:
                return
            self._signals.append((signum, time.monotonic()))
            if len(self._signals) > 1 and self._signals[-1][1] - self._signals[0][1] >= AGAIN:
                os.write(
                    2, f"stopped by {signal.Signals(signum).name} at once; unfinished work is given up.\n".encode()
                )
                kill(descendants(os.getpid()))
                os._exit(128 + self._signals[0][0])

        ignored = [signum for signum in _SIGNALS if signal.getsignal(signum) is signal.SIG_IGN]  # nohup
        return {signum: signal.signal(signum, handle) for signum in _SIGNALS if signum not in ignored}

    def _say(self, line: str) -> None:
        print(wrapped(line), file=sys.stderr, flush=True)


def _end_within(seconds: float, code: int) -> None:
    """End this process whatever its threads do."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
