"""What a run of many ranks costs beside its work: ranks simulated on this machine, plans of weight moves, the planner.

`ranks`: how they meet (the store of several hosts) and are watched (rank 0's hub), as in a run; a simulated
rank is a thread, then a socket, a few hundred to a process. `plans`: moving the weights of a model in memory from a
training to a generating layout over 512 ranks, as every rank computes it. `planner`: all layouts of 512 GPUs on 64
hosts, and layouts that others have published. CPU seconds say more than seconds where other programs run.

example:
  python tools/bench.py scale
  python tools/bench.py scale --parts ranks --ranks 256
"""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.core.layout import Layout
from megalite.model import families
from megalite.monitor.words import aligned, format_bytes
from megalite.tools import toolkit
from megalite.tools.benchmarks import published, published_training
from megalite.tools.benchmarks.frame import write_figures
from megalite.tools.benchmarks.shapes import decoder
from megalite.tools.benchmarks.simulated_ranks import ADDRESS, HOST, Task
from megalite.weights.reshard_plan import buckets, plan
from megalite.weights.table import pieces

PER_PROCESS = 256
"""Simulated ranks of one process."""
IDLE = 10.0
"""Seconds for which nothing happens, and traffic and CPU are measured."""
BUCKET = 512 << 20
"""Bytes, as `hybrid.bucket_mib` has it by default."""


def add_arguments(parser: toolkit.Parser) -> None:
    every = list(PARTS)
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="(default: all)")
    parser.add_argument("--ranks", type=int, default=1024, help="that are simulated (default: %(default)s)")
    parser.add_argument("--rounds", type=toolkit.positive, default=3, help="runs of simulated ranks (default: 3)")
    parser.add_argument("--json", help="write the figures here")


def run(args: Namespace) -> int:
    found = {}
    for part in args.parts:
        rows = PARTS[part](args)
        found[part] = rows
        print("\n".join([f"{part}", *aligned([{k: shown(v) for k, v in row.items()} for row in rows]), ""]), flush=True)
    write_figures(found, args.json)
    return 0


def shown(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# ---- simulated ranks


class Process:
    """One of the processes that simulate a run."""

    def __init__(self, role: str, task: Task):
        command = [sys.executable, "-m", "megalite.tools.benchmarks.simulated_ranks", role, task.to_json()]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"a simulated process has ended: {self._process.wait()}"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def ask(self, line: str) -> dict[str, Any]:
        self.tell(line)
        return self.hear()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(role: str, tasks: Sequence[Task]) -> Iterator[list[Process]]:
    made = [Process(role, task) for task in tasks]
    try:
        yield made
    finally:
        for one in made:
            one.end()


def shares(world: int, port: int, **how: Any) -> list[Task]:
    """All ranks but the first, in processes."""
    cuts = [*range(1, world, PER_PROCESS), world]
    return [Task(world, lo, hi, port, **how) for lo, hi in zip(cuts, cuts[1:], strict=False)]


def simulate(args: Namespace) -> list[dict[str, object]]:
    """Of each property the median, as far as several runs were made."""
    runs = [one_run(args.ranks) for _ in range(args.rounds)]
    names = list(runs[0])
    return [
        {
            "of": name,
            "median": sorted(run[name] for run in runs)[len(runs) // 2],
            "most": max(run[name] for run in runs),
        }
        for name in names
    ]


def one_run(world: int) -> dict[str, float]:
    found = meeting(world)
    found |= watching(world)
    found |= {f"{name}, a host lost": value for name, value in ending(world, lose(HOST)).items()}
    found |= {f"{name}, one that does not come": value for name, value in ending(world, stand_still).items()}
    return found


def meeting(world: int) -> dict[str, float]:
    """How ranks find each other: seconds for all, and what rank 0's process takes, which serves the store."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port = probe.getsockname()[1]
    with processes("meet", [Task(world, 0, 1, port), *shares(world, port)]) as every:
        before = [one.hear() for one in every]
        for one in every:
            one.tell("go")
        after = [one.hear() for one in every]
        assert sum(one["met"] for one in after) == world, "some did not meet"
    took = max(one["at"] for one in after) - min(one["began"] for one in after)
    return {
        "to meet: seconds": took,
        "to meet: CPU seconds of rank 0": after[0]["cpu"] - before[0]["cpu"],
        "to meet: CPU seconds of another rank": sum(
            b["cpu"] - a["cpu"] for a, b in zip(before[1:], after[1:], strict=True)
        )
        / (world - 1),
    }


@contextmanager
def watched(world: int, **how: Any) -> Iterator[tuple[Process, list[Process], dict[str, float]]]:
    """A hub and ranks that are together; what that took."""
    with processes("hub", [Task(world, **how)]) as [hub]:
        start = hub.hear()
        began = time.monotonic()
        with processes("ranks", shares(world, int(start["port"]), **how)) as ranks:
            together = hub.hear()
            last = max(one.hear()["at"] for one in ranks)
            yield (
                hub,
                ranks,
                {
                    "to connect to the watch: seconds": last - began,
                    "to connect to the watch: CPU seconds of the hub": together["cpu"] - start["cpu"],
                    "memory of the hub for it: MiB": together["mib"] - start["mib"],
                },
            )


def watching(world: int) -> dict[str, float]:
    """Ranks come together, then one is lost."""
    with watched(world) as (hub, ranks, found):
        cpu, traffic = hub.ask("usage")["cpu"], sum(one.ask("traffic")["bytes"] for one in ranks)
        time.sleep(IDLE)
        found["idle: CPU of the hub, share of a core"] = (hub.ask("usage")["cpu"] - cpu) / IDLE
        found["idle: bytes a second at the hub"] = (sum(one.ask("traffic")["bytes"] for one in ranks) - traffic) / IDLE
        found |= {f"{name}, one lost": value for name, value in lose(1)(hub, ranks, world).items()}
    return found


Strike = Callable[[Process, list[Process], int], dict[str, float]]


def ending(world: int, strike: Strike) -> dict[str, float]:
    with watched(world, step_timeout=10.0) as (hub, ranks, _):
        return strike(hub, ranks, world)


def lose(count: int) -> Strike:
    """The last ranks are gone at once."""

    def strike(hub: Process, ranks: list[Process], world: int) -> dict[str, float]:
        cpu = hub.ask("usage")["cpu"]
        at = ranks[-1].ask(f"lose {world - count} {world}")["at"]
        return _told(hub, ranks, at, cpu)

    return strike


def stand_still(hub: Process, ranks: list[Process], world: int) -> dict[str, float]:
    """All say that they come no further: the hub asks each for its account, and finds the one that did not come."""
    cpu = hub.ask("usage")["cpu"]
    at = min([one.ask("still")["at"] for one in ranks])
    found = _told(hub, ranks, at, cpu)
    return found


def _told(hub: Process, ranks: list[Process], at: float, cpu: float) -> dict[str, float]:
    end = hub.hear()
    assert end["code"] == 70, end["line"]
    last = max(one.hear()["at"] for one in ranks)
    return {
        "seconds until the hub has decided": end["at"] - at,
        "seconds until all have ended": last - at,
        "CPU seconds of the hub": end["cpu"] - cpu,
    }


# ---- plans of weight moves

EXPERTS = decoder(
    *("qwen3_moe", 64, 5120, 64, 8, 8192),
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=8192,
    dtype="bfloat16",
    moe_intermediate_size=3072,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)
SHAPES = {"LLaMA v3 70B": published.SHAPES["LLaMA v3 70B"], "mixture of 394B": EXPERTS}
MOVES = (
    ("LLaMA v3 70B", Layout(8, 8, 8), Layout(8, 1, 64)),
    ("mixture of 394B", Layout(8, 8, 8), Layout(8, 1, 64)),
    ("mixture of 394B", Layout(8, 8, 8), Layout(8, 4, 16)),
)


def plans(args: Namespace) -> list[dict[str, object]]:
    """In processes of their own, so that each has its own memory."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(planned, move) for move in MOVES]


def planned(name: str, source: Layout, target: Layout) -> dict[str, object]:
    config = families.from_values(Path(name), SHAPES[name])
    pieces(config)
    before, began = _memory(), time.process_time()
    transfers = plan(config, source, target)
    made = time.process_time()
    rounds = buckets(transfers, BUCKET, 2)
    cut = time.process_time()
    return {
        "model": name,
        "training": str(source),
        "generating": str(target),
        "transfers": len(transfers),
        "plan: CPU seconds": made - began,
        "rounds": len(rounds),
        "rounds: CPU seconds": cut - made,
        "memory": format_bytes(_memory() - before),
    }


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# ---- the planner


def planner(args: Namespace) -> list[dict[str, object]]:
    return [one.row() for one in published_training.TRAINED]


PARTS: dict[str, Callable[[Namespace], list[dict[str, object]]]] = {
    "ranks": simulate,
    "plans": plans,
    "planner": planner,
}
