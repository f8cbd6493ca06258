"""What the host does for a decode step: schedule, pack, record outputs, finish. No model runs, and no device is needed.

Sequences with prompts of one length all decode; a step is planned before the results of the one before are known, as
on a GPU. Medians over the steps, in milliseconds; prompts, whose steps cost more, are over before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megalite.config.schema import SamplingParams
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.request import Request, Sampled, StepPlan
from megalite.inference.rows import Rows
from megalite.inference.scheduler import Scheduler
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import HostCache
from megalite.planner.memory import blocks_for
from megalite.tools.benchmarks.frame import head, row, write_figures

BLOCK = 16
"""Tokens of a KV block."""
BATCHED_TOKENS = 16384
"""Of a step that computes prompts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="sequences (default: 1 32 256)")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    found = {}
    print(head("rows", *PARTS, "all"), flush=True)
    for rows in args.rows:
        found[rows] = measure(rows, args.prompt, args.steps)
        cells = [found[rows][part] for part in PARTS]
        print(row(rows, *(f"{one:.3f}" for one in (*cells, sum(cells)))), flush=True)
    write_figures(found, args.json)
    return 0


PARTS = ("schedule", "pack", "outputs", "finish")


class Laps:
    """Seconds of each part, step by step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part].append(time.perf_counter() - began)


def measure(rows: int, prompt: int, steps: int) -> dict[str, float]:
    """Median milliseconds of each part of a step of so many rows."""
    new = steps + 8 + 2 * rows * prompt // BATCHED_TOKENS  # those whose prompts come first go on to the end
    longest = prompt + new
    num_blocks = rows * blocks_for(longest, BLOCK)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=rows,
        max_num_batched_tokens=max(BATCHED_TOKENS, rows),
        max_model_len=longest,
        contiguous=False,
    )
    smallest = {0: CacheSpec.keys_and_values(1, 1)}
    buffers = Rows(rows, longest, cache=HostCache(smallest, num_blocks, block_size=BLOCK, dtype=torch.float32))
    outputs = OutputProcessor(None)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for index in range(rows):
        ids = tuple(range(index * prompt, (index + 1) * prompt))
        request = Request(id=str(index), prompt_token_ids=ids, params=params, seed=0, max_tokens=new)
        scheduler.add(request)
        outputs.add(request)
    laps, before = Laps(), None
    while len(laps.seconds["finish"]) < steps:
        with laps.of("schedule"):
            plan = scheduler.schedule()
        outputs.scheduled(plan)
        with laps.of("pack"):
            buffers.admit(plan.admitted)
            if plan.decodes:
                buffers.step_inputs(plan, rows)
        if before is not None:
            take(scheduler, outputs, before, laps)
        assert plan.rows, "the steps are too many"
        if not (plan.decodes and len(plan.rows) == rows):
            laps.seconds.clear()  # prompts are not over
        before = plan
    scheduler.clear()
    return {part: 1000 * statistics.median(laps.seconds[part]) for part in PARTS}


def take(scheduler: Scheduler, outputs: OutputProcessor, plan: StepPlan, laps: Laps) -> None:
    """Results of a plan have come."""
    with laps.of("outputs"):
        results = tuple(Sampled(7, outputs.append(row.sequence, 7, -1.0)) for row in plan.sampled)
    with laps.of("finish"):
        scheduler.finish(plan, results)
