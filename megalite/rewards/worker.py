"""A process that computes rewards: `python -m megalite.rewards.worker FUNCTION`, started by `reward_pool`.

JSON lines on its standard input and output: first it says `{"ready": true}` or `{"error": ...}`, then it answers each
`{"prompt", "completion", "example"}` by `{"reward"}` or `{"failure"}`, with `"children": true` if the reward left a
process running. What the reward itself prints goes to standard error. Imports no torch; the reward's module may.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from typing import Any, BinaryIO

from megalite.errors import ConfigError
from megalite.rewards.named import NamedFunction, described
from megalite.rewards.pool import ARGUMENTS
from megalite.run.processes import adopt_orphans, die_with_parent


def _take_over_line() -> tuple[BinaryIO, BinaryIO]:
    """Both directions under numbers of their own; whoever reads or prints gets nothing, or standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return requests, answers


def _say(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _serve(reward: Callable[..., Any], requests: BinaryIO, answers: BinaryIO) -> None:
    own_id = os.getpid()
    for line in requests:
        sample = json.loads(line)
        answer = _scored(reward, sample)
        if os.getpid() != own_id:  # a fork that the reward made and did not end
            os._exit(0)
        _say(answers, answer | {"children": _has_children()})


def _scored(reward: Callable[..., Any], sample: dict[str, Any]) -> dict[str, Any]:
    try:
        value = reward(sample["prompt"], sample["completion"], sample["example"])
        if not isinstance(value, Real) or not math.isfinite(value):
            shown = repr(value)
            return {"failure": f"returned {shown if len(shown) <= 60 else type(value)}, which is not a finite number"}
        return {"reward": float(value)}
    except BaseException as error:  # whatever a reward does costs its sample, no more
        return {"failure": f"raised {described(error)}"}


def _has_children() -> bool:
    """Whether a process is left that the reward started, or that one of those started; ended ones are collected."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
        return True
    return False


def _main(name: str) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # a wish: when memory runs out, rather this process than a rank
    requests, answers = _take_over_line()
    adopt_orphans()
    try:
        reward = NamedFunction(name=name, key="hybrid.reward", positional=ARGUMENTS).load()
    except ConfigError as error:
        return _say(answers, {"error": str(error)})
    _say(answers, {"ready": True})
    _serve(reward, requests, answers)


if __name__ == "__main__":
    _main(sys.argv[1])
