"""`--max-restarts`: a run that was lost starts again by itself, and goes on from what is on disk. Imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megalite.config.load import COMMAND_LINE, Loaded, loaded_from
from megalite.config.schema import InferConfig
from megalite.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_PROMPTS_FAILED,
    EXIT_RESOURCES,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    FAULT_VARIABLE,
    Problem,
)

_SETTLED = {
    EXIT_DONE,
    EXIT_CONFIG,
    EXIT_CHECKPOINT,
    EXIT_RESOURCES,
    EXIT_PROMPTS_FAILED,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    128 + signal.SIGHUP,
}
"""Exit codes of runs that would end so again, or were meant to end."""
_LONGEST_PAUSE = 30.0


def problems(config: Any) -> list[Problem]:
    """What keeps a run from being started again with every prompt run exactly once."""
    if not isinstance(config, InferConfig):
        return []
    found = []
    if config.output.file is None:
        rule, fix = "is needed with --max-restarts, which goes on from it", "Set output.file=FILE."
        found.append(Problem(key="output.file", rule=rule, fix=fix))
    if config.input.file == "-":
        rule, fix = "can't be standard input with --max-restarts: it is read only once", "Give a file."
        found.append(Problem(key="input.file", rule=rule, value="-", fix=fix))
    return found


def run(loaded: Loaded[Any], start: Callable[[Loaded[Any]], int], most: int) -> int:
    """`start` the run, and again up to `most` times when it is lost or crashes; gives its last exit code."""
    began = _written(loaded.config)
    for restart in range(most + 1):
        code = start(loaded)
        if code in _SETTLED or restart == most:
            break
        pause = min(_LONGEST_PAUSE, 2.0**restart)
        _say(f"the run ended with code {code}; restart {restart + 1} of {most} in {pause:g} s, from what is on disk.")
        time.sleep(pause)
        os.environ.pop(FAULT_VARIABLE, None)  # what a test injects, one start meets
        loaded = _going_on(loaded, begun=_written(loaded.config) != began)
    return code


def _going_on(loaded: Loaded[Any], begun: bool) -> Loaded[Any]:
    """The config of a run that continues its own output; `begun`: it has written some."""
    config = loaded.config
    if isinstance(config, InferConfig):
        if not config.output.overwrite or not begun:
            return loaded
        key, output = "output.overwrite", replace(config.output, overwrite=False)
    elif not config.output.resume:  # its folder had no state when it began
        key, output = "output.resume", replace(config.output, resume=True)
    else:
        return loaded
    return loaded_from(replace(config, output=output), loaded.origins | {key: COMMAND_LINE})


def _written(config: Any) -> object:
    """Changes when the output file of inference does."""
    if not isinstance(config, InferConfig) or config.output.file is None:
        return None
    try:
        found = os.stat(config.output.file)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _say(line: str) -> None:
    with suppress(OSError):  # nobody reads any more
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
