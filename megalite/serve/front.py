"""What the HTTP process reads and checks before it serves, and how it starts replicas. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

from megalite.config.command_line import Options
from megalite.config.load import Loaded
from megalite.config.schema import ServeConfig
from megalite.config.validate import layout_words, num_ranks
from megalite.inference.io.inputs import PromptLimits
from megalite.monitor.words import wrapped
from megalite.preflight import as_sampled
from megalite.run.start import nameless_file
from megalite.serve.app import create_app
from megalite.serve.fleet import Start
from megalite.serve.listener import open_socket, url
from megalite.serve.server import External, Server
from megalite.weights.folder import ModelFolder
from megalite.weights.hf import resolve

__all__ = ["External", "main"]


def main(loaded: Loaded[ServeConfig], options: Options, external: External | None = None) -> int:
    """Serve until a signal or until no replica is left; gives the exit code.

    `options`: how this process was started. Replicas are started as
    `options.program --config FILE --resolved-sha256 S --replica I --socket PATH`, unless they are there (`external`).
    """
    config = as_sampled(loaded).config
    _log_requests()
    with open_socket(config.server) as sock, ExitStack() as stack:
        folder = _folder(config)
        limits = PromptLimits.of(folder, config)
        _announce(config, folder, sock)
        replicas = external or starter(loaded, options, stack)
        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                return runner.run(Server(config, limits, sock, create_app).run(replicas))
        finally:
            if limits.tokenizer is not None:
                limits.tokenizer.close()


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, as the extra `serve` does: it has a third less to do for a streamed token."""
    if find_spec("uvloop") is None:
        return None
    from uvloop import new_event_loop

    made: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    return made


def _folder(config: ServeConfig) -> ModelFolder:
    """The model's, downloaded if need be."""
    section = config.model
    assert section.path is not None
    path = resolve(section.path, section.revision, weights=section.load_format != "dummy")
    return ModelFolder.open(path, tokenizer=section.tokenizer)


def _announce(config: ServeConfig, folder: ModelFolder, sock: socket.socket) -> None:
    """What was decided for the user."""
    told = [f"{config.model.path}: {folder.model.family}, {layout_words(config)}", f"listening at {url(sock)}"]
    print("\n".join(map(wrapped, told)), file=sys.stderr)


def _log_requests() -> None:
    """Lines on standard error, one for each request among them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("megalite.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line says them


def starter(loaded: Loaded[ServeConfig], options: Options, stack: ExitStack) -> Start:
    """Starts replicas on this host, each a run of its own, with the resolved config in a file without a name."""
    file = nameless_file(loaded.given, stack)
    script, *words = options.program
    command = [sys.executable, "-u", os.path.abspath(script), *words, "--config", file]
    command += ["--resolved-sha256", loaded.sha256, *options.for_ranks]
    cores = len(os.sched_getaffinity(0)) // num_ranks(loaded.config)
    threads = {"OMP_NUM_THREADS": str(max(1, cores))}  # a door knows of its own ranks only

    async def start(replica: int, path: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*command, "--replica", str(replica), "--socket", path),
            stdin=asyncio.subprocess.DEVNULL,
            env={**threads, **os.environ},
            pass_fds=[int(os.path.basename(file))],
            start_new_session=True,  # so that a Ctrl-C at the terminal reaches it through this process alone
        )

    return start
