"""Under a launcher: rank 0 starts the HTTP process as its child, and tells the control ranks where it listens.

Its listening sockets are made here and inherited, so that every address is known before it runs. Replicas of rank 0's
host come over a unix socket in the run's folder, which only its user can open; those of other hosts over TCP, with the
run's token, at the address by which the ranks reach rank 0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from types import TracebackType

from megalite.config.command_line import Options
from megalite.config.load import Loaded
from megalite.config.schema import ServeConfig
from megalite.errors import RankLost
from megalite.run.facts import RankInfo
from megalite.run.launch_env import outside
from megalite.run.processes import die_with_parent
from megalite.run.runtime import Runtime
from megalite.run.start import nameless_file
from megalite.serve.messages import PASSED_ON

_KEY = "serve/address"
_BACKLOG = 4096
"""Replicas that may connect before the HTTP process is ready for them."""
END_WITHIN = 10.0
"""Seconds that the HTTP process has to end once its replicas have left."""


class HTTPProcess:
    """The HTTP process of a launcher's run, on rank 0. A context manager; at its end the process is gone."""

    def __init__(self, loaded: Loaded[ServeConfig], options: Options, runtime: Runtime):
        folder = runtime.folder
        assert folder is not None, "the run was launched"
        path = str(folder / "http")
        token = runtime.ranks[0].token
        host = runtime.ranks[0].address
        far = any(_place(info) != _place(runtime.info) for info in runtime.ranks)
        with ExitStack() as stack:
            near = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            near.bind(path)
            near.listen(_BACKLOG)
            descriptors = [near.fileno()]
            port = 0
            if far:
                over = stack.enter_context(socket.create_server((host, 0), backlog=_BACKLOG))
                port = over.getsockname()[1]
                descriptors += [over.fileno(), _descriptor(nameless_file(token, stack))]
            config = nameless_file(loaded.given, stack)
            script, *words = options.program
            external = ",".join(map(str, descriptors))
            arguments = ["--config", config, "--resolved-sha256", loaded.sha256, "--external", external]
            self._process = subprocess.Popen(
                [sys.executable, "-u", os.path.abspath(script), *words, *arguments],
                env=outside(os.environ),
                stdin=subprocess.DEVNULL,
                pass_fds=[*descriptors, _descriptor(config)],
                start_new_session=True,  # a signal reaches it through this rank alone
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        self._passed_on = False
        runtime.store.set(_KEY, json.dumps([path, host, port]))

    def __enter__(self) -> HTTPProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.terminate()
        try:
            self._process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __str__(self) -> str:
        return f"the HTTP process (pid {self._process.pid})"

    def pass_on(self, signum: int | None) -> None:
        """Let it drain, if this run was asked to end."""
        if signum is not None and not self._passed_on:
            self._passed_on = True
            self._process.send_signal(PASSED_ON)

    def wait(self) -> None:
        """Until it has ended. SystemExit with its exit code if that is not 0; RankLost: it was killed, or does not
        end."""
        try:
            code = self._process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            raise RankLost(f"{self} has closed its connections, but does not end") from None
        if code < 0:
            raise RankLost(f"{self} was killed by signal {-code}")
        if code:
            raise SystemExit(code)


def _place(info: RankInfo) -> tuple[str, str]:
    """Equal for ranks that see the same processes and files."""
    return info.machine, info.pids


def _descriptor(path: str) -> int:
    """Descriptor of a nameless file."""
    return int(os.path.basename(path))


def replica_address(runtime: Runtime) -> tuple[str | tuple[str, int], bytes]:
    """Where a control rank of a launcher's run finds the HTTP process, and the run's token."""
    path, host, port = json.loads(runtime.store.get(_KEY))
    token = bytes.fromhex(runtime.ranks[0].token)
    near = _place(runtime.info) == _place(runtime.ranks[0])
    return (path, b"") if near else ((host, port), token)
