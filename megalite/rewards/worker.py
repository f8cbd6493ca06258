"""A process that computes rewards: `python -m megalite.rewards.worker FUNCTION SOCKET`, started by `pool`.

JSON lines over the socket: first it says `{"error": ...}`, null if it is ready, then it answers each `{"prompt",
"completion", "example"}` by `{"reward", "failure", "children"}`: one of the first two is null, and the last is whether
the reward left a process running. Imports no torch; the reward's module may.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from typing import Any

from megalite.errors import ConfigError
from megalite.rewards.named import NamedFunction, described
from megalite.rewards.pool import ARGUMENTS
from megalite.run.processes import adopt_orphans, die_with_parent

LARGEST = 1e30
"""Size of a reward, so that means and differences of many are finite, in float32 too."""


def _scored(reward: Callable[..., Any], sample: dict[str, Any]) -> dict[str, Any]:
    try:
        given = reward(*(sample[name] for name in ARGUMENTS))
        value = given.item() if getattr(given, "ndim", None) == 0 else given  # an array or tensor of one number
        number = float(value) if isinstance(value, Real) else math.nan
        if not abs(number) <= LARGEST:
            shown = repr(given)
            shown = shown if len(shown) <= 60 else str(type(given))
            wrong = f"beyond {LARGEST:g}, up or down" if math.isfinite(number) else "not a finite number"
            return {"reward": None, "failure": f"returned {shown}, which is {wrong}"}
        return {"reward": number, "failure": None}
    except BaseException as error:  # whatever a reward does costs its sample, no more
        return {"reward": None, "failure": f"raised {described(error)}"}


def _has_children() -> bool:
    """Whether a process is left that the reward started, or that one of those started; ended ones are collected."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
        return True
    return False


def _main(name: str, line: socket.socket) -> None:
    def say(**answer: Any) -> None:
        line.sendall(json.dumps(answer).encode() + b"\n")

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # a wish: when memory runs out, rather this process than a rank
    adopt_orphans()
    try:
        reward = NamedFunction(name=name, key="hybrid.reward", positional=ARGUMENTS).load()
    except ConfigError as error:
        return say(error=str(error))
    say(error=None)
    own_id = os.getpid()
    for request in line.makefile("rb"):
        answer = _scored(reward, json.loads(request))
        if os.getpid() != own_id:  # a fork that the reward made and did not end
            os._exit(0)
        say(**answer, children=_has_children())


if __name__ == "__main__":
    _main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
