"""Simulates replicas under LoadBalancer on recorded arrivals: makespan, cached prefixes, time to first token."""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from megalite.files import write_durably
from megalite.inference.balancer import LoadBalancer, Policy
from megalite.inference.feeds import Feed, SharedQueue, deal
from megalite.inference.request import Request
from megalite.tools.benchmarks.arrivals import LIMIT, RECORDINGS, Recording, many, read_trace, record, shared, tailed
from megalite.tools.benchmarks.frame import head
from megalite.tools.benchmarks.frame import row as table_row
from megalite.tools.benchmarks.replica_model import BLOCK, Machine, SimRequest, least_seconds
from megalite.tools.benchmarks.simulation import MemoryStore, Result, Simulation, run_batch
from megalite.tools.toolkit import Parser

BATCHES = {"heavy-tailed": tailed, "shared prefixes": shared}
SPEEDS = {"": (1.0, 1.0, 1.0, 1.0), ", one at half speed": (0.5, 1.0, 1.0, 1.0)}
EPILOG = """\
examples:
  python tools/bench.py balance --json balance.json
  python tools/bench.py balance --trace conversation_trace.jsonl --replicas 16 --rows 128 --blocks 32768
  python tools/bench.py balance --scale --replicas 256 --requests 1000000 --blocks 8192"""


@dataclass(frozen=True)
class Row:
    """What came of one recording under one policy; times in seconds."""

    recording: str
    policy: str
    requests: int
    least: float
    """What no schedule can beat."""
    makespan: float
    hits: float
    """Share of the prompt tokens that were found in a cache."""
    most_hits: float
    """The share that one endless cache would have found."""
    first_p50: float
    first_p99: float
    moved: int
    router_us: float
    """Microseconds of CPU time a request in the balancer, in the median."""

    @property
    def line(self) -> str:
        """Of the table of what is served."""
        first = (f"{seconds * 1e3:,.0f}" for seconds in (self.first_p50, self.first_p99))
        return table_row(*self._cells, *first, self.moved, f"{self.router_us:.0f}")

    @property
    def batch_line(self) -> str:
        """Of the table of batch jobs."""
        return table_row(*self._cells)

    @property
    def _cells(self) -> tuple[str, ...]:
        ratio, hits = f"{self.makespan / self.least:.3f}", f"{self.hits:.3f} of {self.most_hits:.3f}"
        return self.recording, self.policy, ratio, hits


RESULTS = ("makespan / bound", "cached prompt tokens")
SERVED = head("requests", "policy", *RESULTS, "first token p50, ms", "p99, ms", "moved", "router, us")
BATCHED = head("batch job", "dp_mode", *RESULTS)


def most_hits(requests: Sequence[SimRequest]) -> float:
    """Share of the prompt tokens that an endless cache of one replica would have found."""
    seen: set[int] = set()
    found = 0
    for request in requests:
        for content, blocks in request.parts:
            found += blocks * BLOCK * (content in seen)
            seen.add(content)
    return found / sum(request.prompt for request in requests)


def row(
    name: str, policy: str, requests: Sequence[SimRequest], machine: Machine, speeds: Sequence[float], result: Result
) -> Row:
    return Row(
        recording=name,
        policy=policy,
        requests=len(requests),
        least=least_seconds(requests, machine, speeds),
        makespan=result.makespan,
        hits=result.found / sum(request.prompt for request in requests),
        most_hits=most_hits(requests),
        first_p50=result.first_token(0.5),
        first_p99=result.first_token(0.99),
        moved=result.moved,
        router_us=result.router * 1e6,
    )


def served(args: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Requests that arrive while others run."""
    if args.trace:
        speeds = (1.0,) * args.replicas
        recordings = {args.trace.stem: (speeds, read_trace(args.trace, 1 / args.load)[: args.requests])}
    else:
        recordings = {
            name: (one.speeds, record(one, args.requests, machine, one.speeds, args.load))
            for name, one in RECORDINGS.items()
        }
    for name, (speeds, requests) in recordings.items():
        for policy in get_args(Policy):
            yield row(name, policy, requests, machine, speeds, Simulation(machine, speeds, policy).run(requests))


def batches(machine: Machine, count: int) -> Iterator[Row]:
    """Batch jobs, whose requests are all there: the shares as they are, and taken from by replicas that are done."""
    for name, make in BATCHES.items():
        for told in (True, False):
            requests = [replace(one, max_tokens=one.output if told else LIMIT) for one in make(random.Random(0), count)]
            for suffix, speeds in SPEEDS.items():
                title = f"{name}{suffix}, {'lengths known' if told else 'only limits known'}"
                shares = deal(cast(list[Request], requests), len(speeds))
                store = MemoryStore()
                feeds: dict[str, list[Feed]] = {
                    "sync": list(map(Feed, shares)),
                    "async": [SharedQueue(shares, own, store, "shares") for own in range(len(speeds))],
                }
                for mode, sources in feeds.items():
                    yield row(title, mode, requests, machine, speeds, run_batch(machine, speeds, sources))


def index_bytes(balancer: LoadBalancer) -> int:
    """Memory of the prefix index: its tables, and the numbers in them."""
    caches, holders = balancer.index.tables()
    tables = sum(map(sys.getsizeof, caches)) + sys.getsizeof(holders)
    return tables + sum(sys.getsizeof(key) + sys.getsizeof(mask) for key, mask in holders.items())


def scale(args: argparse.Namespace, machine: Machine) -> Iterator[dict[str, Any]]:
    """Many replicas, with and without a tenth of them lost in the middle."""
    speeds = (1.0,) * args.replicas
    requests = record(Recording(many), args.requests, machine, speeds, args.load)
    gc.freeze()  # millions of objects that stay
    for losing in (0, args.replicas // 10):
        began = time.process_time()
        simulation = Simulation(machine, speeds, "prefix")
        result = simulation.run(requests, losing=losing)
        what = row(f"{losing} of {args.replicas} lost", "prefix", requests, machine, speeds, result)
        yield {
            **asdict(what),
            "prompt": sum(request.prompt for request in requests) / len(requests),
            "pages": len(simulation.balancer.index),
            "index_bytes": index_bytes(simulation.balancer),
            "replayed": result.replayed,
            "losing_seconds": result.losing,
            "simulated_in": time.process_time() - began,
        }


def add_arguments(parser: Parser) -> None:
    parser.epilog = EPILOG
    default = Machine()
    parser.add_argument("--requests", type=int, default=4000, help="of a recording (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1000, help="requests of a batch job (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.75, help="what arrives over what can be done at best")
    parser.add_argument("--rows", type=int, default=default.rows, help="sequences at once (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=default.blocks, help="KV blocks (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=4, help="with --trace or --scale (default: %(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines: timestamp, input_length, ... hash_ids")
    parser.add_argument("--scale", action="store_true", help="one recording for many replicas, some of them lost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows for a program")


def run(args: argparse.Namespace) -> int:
    machine = Machine(rows=args.rows, blocks=args.blocks)
    rows: list[dict[str, Any]] = []
    if args.scale:
        for values in scale(args, machine):
            rows.append(values)
            print(json.dumps(values), flush=True)
    else:
        print(SERVED)
        for one in served(args, machine):
            rows.append(asdict(one))
            print(one.line, flush=True)
    if not args.scale and not args.trace:
        print(f"\n{BATCHED}")
        for one in batches(replace(machine, rows=16), args.batch):
            rows.append(asdict(one))
            print(one.batch_line, flush=True)
    if args.json:
        write_durably(args.json, json.dumps(rows, indent=1) + "\n")
    return 0
