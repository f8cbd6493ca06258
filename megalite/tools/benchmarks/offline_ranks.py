"""The offline engine of `bench serve`: ranks that generate when they are told to, in a folder.

Started as `python -m megalite.tools.benchmarks.offline_ranks TASK`, with a `Task` as JSON; ranks of a larger layout
start themselves. Round N is in the file `N.go`, its figures come in `N.done`; `end` ends all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalite.files import write_json
from megalite.run.launch_env import LaunchEnv
from megalite.run.launcher import run_ranks

POLL = 0.01
"""Seconds between looks."""
STOPPED_TIMEOUT = 60.0


@dataclass(frozen=True)
class Task:
    """What the ranks are told."""

    folder: str
    """Where rounds are."""
    model: str
    load_format: str
    dtype: str
    device: str
    tp: int
    pp: int
    dp: int
    engine: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    task = Task(**json.loads(sys.argv[1]))
    ranks = task.tp * task.pp * task.dp
    if ranks > 1 and LaunchEnv.of(os.environ) is None:
        module = ["-m", "megalite.tools.benchmarks.offline_ranks", task.to_json()]
        return run_ranks(module, ranks, stopped_timeout=STOPPED_TIMEOUT)
    return generate(task)


def generate(task: Task) -> int:
    from megalite import LLM, SamplingParams

    folder = Path(task.folder)
    with LLM(
        task.model,
        device=task.device,
        dtype=task.dtype,
        load_format="dummy" if task.load_format == "dummy" else "auto",
        generation_config="vllm",
        tensor_parallel_size=task.tp,
        pipeline_parallel_size=task.pp,
        data_parallel_size=task.dp,
        **task.engine,
    ) as llm:
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
