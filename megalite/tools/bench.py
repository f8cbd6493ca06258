"""Measures megalite beside what it replaces; each benchmark is a module of `benchmarks` and has a --help of its own."""

from __future__ import annotations

import argparse
import sys

from megalite.tools import toolkit

BENCHMARKS = {
    "balance": "which replica gets which request: simulated on recorded arrivals",
    "collectives": "all_gather beside all_reduce, in column- and row-parallel layers",
    "convert": "convert, reshard, export and verify beside cp and transformers",
    "faults": "how long a run takes to end, from a fault on until no rank is left",
    "gpu": "generation on one GPU or several, beside what the device could do",
    "host": "what the host does for a decode step",
    "load": "ranks that load a Hugging Face folder, and shards of it",
    "offline": "generation beside transformers",
    "plan": "the planner's predictions beside what is measured here, or was published",
    "scale": "1,024 simulated ranks, plans of weight moves over 512, the planner on 512 GPUs",
    "serve": "a server's throughput beside the offline engine's, and how long its clients wait",
    "sync": "weights between two layouts in memory, beside gathering every tensor",
    "trace": "what measuring every step costs",
    "train": "a training step beside transformers, both under DeepSpeed",
}


def main() -> int:
    """`bench NAME ...`; gives the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        return toolkit.tool("bench")
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return toolkit.tool(f"benchmarks.{name}")


def add_arguments(parser: toolkit.Parser) -> None:
    assert parser.description is not None
    parser.description += "\n\nbenchmarks:\n" + "\n".join(f"  {name:11} {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, help="each has a --help of its own")


def run(args: argparse.Namespace) -> int:
    assert args.benchmark not in BENCHMARKS, "main runs these"
    return 0
