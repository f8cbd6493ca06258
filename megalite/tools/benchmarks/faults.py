"""How long a run takes to end, from a fault on until no process of it is left.

Ranks of this machine join as every job's do and sum over all of them, step after step, until one meets the fault: see
`megalite.errors.FAULTS`; `raise` is an exception, and memory and disk leave as such too. A rank that is stopped, or
that others wait for in vain, is noticed after a time-out only (`distributed.peer_timeout`, `distributed.step_timeout`),
which is small here; `beyond it` is what a run takes besides. First and last rank take turns.

example:
  python tools/bench.py faults
  python tools/bench.py faults --faults kill hang --rounds 3
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from megalite.config.schema import DistributedSection
from megalite.errors import FAULTS, MegaliteError
from megalite.files import write_json
from megalite.monitor.words import aligned
from megalite.run.launch_env import LaunchEnv
from megalite.run.launcher import run_ranks
from megalite.tools import toolkit
from megalite.tools.benchmarks.frame import write_figures

KINDS = ("raise", *FAULTS)
STEPS = 20
"""Before the fault."""
PEER_TIMEOUT, STEP_TIMEOUT = 2.0, 4.0
WAITS = {"stop": PEER_TIMEOUT, "hang": STEP_TIMEOUT}
"""Seconds until a fault can be noticed."""
PATIENCE = 300.0


@dataclass(frozen=True)
class Task:
    """What the ranks are told."""

    ranks: int
    victim: int
    fault: str
    mark: str
    """File in which the victim leaves the time."""


def add_arguments(parser: toolkit.Parser) -> None:
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    parser.add_argument("--ranks", type=toolkit.positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=toolkit.positive, default=4, help="of each fault (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: Namespace) -> int:
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for fault in args.faults:
            ends = [
                measure(Task(args.ranks, (args.ranks - 1) * (number % 2), fault, f"{folder}/{fault}-{number}.json"))
                for number in range(args.rounds)
            ]
            seconds, wait = [end["seconds"] for end in ends], WAITS.get(fault, 0.0)
            figures[fault] = {"ends": ends, "timeout": wait}
            codes = sorted({end["code"] for end in ends})
            rows.append(
                {
                    "fault": fault,
                    "exit code": " ".join(f"{code:g}" for code in codes),
                    "median s": f"{statistics.median(seconds):.2f}",
                    "most": f"{max(seconds):.2f}",
                    "time-out": f"{wait:g}" if wait else "",
                    "beyond it": f"{statistics.median(seconds) - wait:.2f}",
                }
            )
    print("\n".join(aligned(rows)))
    write_figures(figures, args.json)
    return 0


def measure(task: Task) -> dict[str, float]:
    """Exit code, and seconds from the fault to the end of all."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(task))]
    done = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=PATIENCE)
    ended = time.monotonic()
    return {"code": done.returncode, "seconds": ended - float(json.loads(Path(task.mark).read_text()))}


def rank(task: Task) -> int:
    import torch

    from megalite.core.collectives import all_reduce_sum
    from megalite.core.layout import Layout
    from megalite.core.parallel_state import ParallelState
    from megalite.run import runtime as distributed
    from megalite.run.facts import Given

    section = DistributedSection(device="cpu", peer_timeout=PEER_TIMEOUT, step_timeout=STEP_TIMEOUT)
    try:
        with distributed.start(section, Given(sha256="0", config_text="")) as runtime:
            state, steps = ParallelState(Layout(tp=task.ranks)), 0
            while True:
                all_reduce_sum(torch.ones(1), state.world)
                steps += 1
                if steps == STEPS and runtime.rank == task.victim:
                    strike(task)
                time.sleep(0.001)
    except MegaliteError as error:
        return error.exit_code


def strike(task: Task) -> None:
    write_json(task.mark, time.monotonic())  # one clock for all processes of a machine
    if task.fault == "raise":
        raise RuntimeError("injected fault")
    FAULTS[task.fault]()
    write_json(f"{task.mark}.more", "")


def main() -> int:
    task = Task(**json.loads(sys.argv[1]))
    if LaunchEnv.of(os.environ) is None:
        module = ["-m", "megalite.tools.benchmarks.faults", sys.argv[1]]
        return run_ranks(module, task.ranks, stopped_timeout=2 * PEER_TIMEOUT)
    return rank(task)


if __name__ == "__main__":
    sys.exit(main())
