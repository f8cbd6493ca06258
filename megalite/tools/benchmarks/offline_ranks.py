"""The offline engine of `bench serve`: ranks that generate when they are told to, in a folder.

Started as `python -m megalite.tools.benchmarks.offline_ranks TASK`, with a `Task` as JSON; ranks of a larger layout
start themselves. Round N is in the file `N.go`, its figures come in `N.done`; `end` ends all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.files import write_json
from megalite.run.launch_env import LaunchEnv
from megalite.tools.benchmarks.frame import LayoutTask

POLL = 0.01
"""Seconds between looks."""


@dataclass(frozen=True, kw_only=True)
class Task(LayoutTask):
    """What the ranks are told."""

    rounds: str
    """The folder where rounds are."""
    engine: dict[str, Any]


def main() -> int:
    task = Task(**json.loads(sys.argv[1]))
    if task.ranks > 1 and LaunchEnv.of(os.environ) is None:
        return task.start("megalite.tools.benchmarks.offline_ranks")
    return generate(task)


def generate(task: Task) -> int:
    from megalite import SamplingParams

    folder = Path(task.rounds)
    with task.llm(**task.engine) as llm:
        first = llm.replica.state.rank == 0
        number = 0
        if first:
            write_json(folder / "ready", True)
        while True:
            order = folder / f"{number}.go"
            while not order.exists():
                if (folder / "end").exists():
                    return 0
                time.sleep(POLL)
            work = json.loads(order.read_text())
            params = SamplingParams(temperature=0, max_tokens=work["new"], ignore_eos=True)
            began = time.perf_counter()
            done = llm.generate(work["prompts"], params, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = sum(len(output.outputs[0].token_ids) for output in done)
            if first:
                write_json(folder / f"{number}.done", {"seconds": seconds, "tokens": tokens})
            number += 1


if __name__ == "__main__":
    sys.exit(main())
