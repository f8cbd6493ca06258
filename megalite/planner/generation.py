"""How fast a layout generates, and how many sequences fit: predictions of a workload. Imports no torch.

Endless work, of which so many requests are at work at once, is a cycle: in as many rounds as an output has tokens,
every running sequence gains its tokens and as many prompts are computed as end. A job of a number of requests is played
through: prompts in chunks as there is room, then rounds until each has its tokens, fewer and fewer at once.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from functools import lru_cache

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.planner.cost import Batch, Cluster, Round, StageCosts, Times
from megalite.planner.memory import PROCESS, Footprint, RankMemory, blocks_for, fitting_blocks


@dataclass(frozen=True, slots=True)
class Span:
    """Lengths in tokens, evenly spread from `low` to `high`."""

    low: int
    high: int

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is asked of an engine."""

    input: Span = Span(1024, 1024)
    output: Span = Span(512, 512)
    concurrency: int = 256
    """Requests at work at once, over all replicas."""
    requests: int | None = None
    """All there are, and all are there at the start; None: there are always more."""

    @property
    def longest(self) -> int:
        return self.input.high + self.output.high

    @property
    def tokens(self) -> float:
        """Of the prompts and outputs of all requests, or of those at work at once."""
        return (self.input.mean + self.output.mean) * (self.requests or self.concurrency)

    def __str__(self) -> str:
        many = f"concurrency={self.concurrency}" if self.requests is None else f"requests={self.requests}"
        return f"input={self.input},output={self.output},{many}"


def parse(text: str) -> Workload:
    """`input=1024,output=100-512,concurrency=256` or with `requests=N`; ConfigError for anything else."""
    found: dict[str, Span] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        low, _, high = value.partition("-")
        numbers = low.isdecimal() and low.isascii() and (high or low).isdecimal() and (high or low).isascii()
        span = Span(int(low), int(high or low)) if numbers else Span(0, 0)
        named = name in ("input", "output", "concurrency", "requests") and name not in found
        single = name in ("input", "output") or span.low == span.high
        if not (named and single and 1 <= span.low <= span.high <= 1 << 24):
            rule = "must be numbers of tokens and requests, such as input=1024,output=100-512,concurrency=256"
            fix = "requests=N in place of concurrency is a job of so many."
            raise ConfigError(Problem(key="--workload", rule=rule, value=part or text, fix=fix))
        found[name] = span
    workload = Workload()
    requests = found["requests"].low if "requests" in found else None
    concurrency = found["concurrency"].low if "concurrency" in found else requests or workload.concurrency
    spans = {name: found[name] for name in ("input", "output") if name in found}
    return replace(workload, concurrency=concurrency, requests=requests, **spans)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One layout."""

    layout: Layout
    memory: tuple[Footprint, ...]
    """Of the fullest rank of each stage."""
    short: int = 0
    """Bytes that some rank has too few; 0: it fits."""
    fits: int = 0
    """Sequences of the workload's longest that fit at once, over all replicas."""
    concurrency: int = 0
    """Sequences at work at once."""
    throughput: float = 0.0
    """Output tokens a second, of all replicas."""
    first_token: float = 0.0
    """Seconds from a request's start to its first token: in endless work of one that finds room, in a job the mean."""
    per_token: float = 0.0
    """Seconds between two tokens of a request, prompts of others in between included."""
    seconds: float | None = None
    """Of the whole job, if it has an end."""
    sent: float = 0.0
    """Bytes that the rank which sends most sends for an output token of its replica."""
    idle: tuple[float, ...] = ()
    """Share of a decoding round that each stage waits."""
    spent: Times = field(default_factory=Times)
    """Of the time an output token takes, of the whole cluster: seconds of the busiest stage."""
    spent_first: Times = field(default_factory=Times)
    """Of the time to the first token."""


def predict(
    config: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    workload: Workload,
    engine: EngineSection,
    *,
    itemsize: int,
) -> Prediction:
    """Memory and speed of a layout."""
    costs = StageCosts(config, layout, cluster, itemsize, engine.kv_cache_dtype)
    replica_rows = -(-workload.concurrency // layout.dp)
    memory, short, tokens = stage_memory(costs, engine, longest=engine.max_model_len or workload.longest)
    fits = int(tokens // blocks_for(workload.longest, engine.block_size) // engine.block_size)
    if short or fits < 1:
        if not short:
            need = blocks_for(workload.longest, engine.block_size) * engine.block_size - tokens
            ranks = _stage_ranks(costs)
            short = math.ceil(need * max(rank.kv_block(1) for rank in ranks))
        return Prediction(layout=layout, memory=memory, short=short)
    rows = min(replica_rows, fits, engine.max_num_seqs)
    play = _Play(costs, workload, engine, rows)
    prediction = play.endless() if workload.requests is None else play.job(-(-workload.requests // layout.dp))
    return replace(prediction, memory=memory, fits=fits * layout.dp)


def _stage_ranks(costs: StageCosts) -> list[RankMemory]:
    """The widest rank of each stage."""
    layout = costs.layout
    places = [(costs.config, layout, layout.rank(pp=pp), costs.itemsize) for pp in range(layout.pp)]
    return [RankMemory(*place, kv_cache_dtype=costs.kv_cache_dtype) for place in places]


def stage_memory(costs: StageCosts, engine: EngineSection, *, longest: int) -> tuple[tuple[Footprint, ...], int, float]:
    """The fullest rank of each stage, the bytes that one has too few, and the tokens that every cache holds.

    The engine takes what is left for its cache on a GPU, and on a CPU what its requests need; see `Replica`.
    """
    device = costs.cluster.device
    ranks_here = min(costs.cluster.per_host, costs.layout.size) if device.shared else 1
    room = device.memory // ranks_here
    most = max(stage.elements for stage in costs.stages)
    wanted = engine.max_num_seqs * blocks_for(longest, engine.block_size)
    found, short, tokens = [], 0, math.inf
    for rank, stage in zip(_stage_ranks(costs), costs.stages, strict=True):
        weights = stage.nbytes
        process = PROCESS if device.shared else 0
        captures = device.kind == "cuda" and not engine.enforce_eager
        longest_here = longest if device.kind == "cuda" else 0
        beside = rank.beside(engine, stage_weights=most, captures=captures, longest=longest_here)
        left = room - weights - process
        budget = left * engine.gpu_memory_utilization - beside.total
        block = rank.kv_block(engine.block_size)
        blocks = engine.num_kv_blocks or fitting_blocks(budget, block, most=wanted)
        tokens = min(tokens, blocks * engine.block_size)
        reserve = int(left * (1 - engine.gpu_memory_utilization)) + process
        found.append((replace(beside, weights=weights, reserve=max(reserve, 0)), block))
        if budget < block:
            short = max(short, int((block - budget) if left >= 0 else block + beside.total - left))
    blocks = int(tokens // engine.block_size)
    if device.shared and engine.num_kv_blocks is None:
        blocks = min(blocks, wanted)
    return tuple(replace(one, kv=blocks * block) for one, block in found), short, tokens


class _Play:
    """A workload on one replica, of at most `rows` sequences at once."""

    def __init__(self, costs: StageCosts, workload: Workload, engine: EngineSection, rows: int):
        self.costs, self.workload, self.engine, self.rows = costs, workload, engine, rows
        self.round = lru_cache(maxsize=None)(costs.round)

    def cohorts(self, rows: float) -> int:
        return max(1, min(self.costs.layout.pp, int(rows)))

    def batch(self, rows: float, context: float, fresh: float = 0.0, prompt: float = 0.0) -> tuple[Batch, int]:
        """`rows` sequences of a mean context, and `fresh` prompt tokens of prompts of `prompt` tokens, over cohorts."""
        cohorts = self.cohorts(rows + (fresh / prompt if fresh else 0.0))
        started = fresh / prompt if fresh else 0.0
        return Batch(
            rows=round(rows / cohorts, 2),
            keys=round(rows * context / cohorts),
            fresh=round(fresh / cohorts),
            fresh_keys=round(fresh * prompt / 2 / cohorts),
            sampled=round((rows + started) / cohorts, 2),
        ), cohorts

    def endless(self) -> Prediction:
        """As a cycle in which every running sequence ends once."""
        load = self.workload
        prompt, output = load.input.mean, load.output.mean
        rows = self.rows
        context = prompt + output / 2
        cohorts = self.cohorts(rows)
        plain = self.round(*self.batch(rows, context))
        alone = max(1.0, self.engine.max_num_batched_tokens - rows / cohorts)
        room = cohorts * alone
        fresh = min(room, rows * prompt)
        mixed = self.round(*self.batch(rows, context, fresh, prompt))
        count = rows * prompt / fresh
        seconds = count * mixed.seconds + max(0.0, output - count) * plain.seconds
        spent = Times()
        spent.add(mixed.spent, count)
        spent.add(plain.spent, max(0.0, output - count))
        decoding, _ = self.batch(rows, context)
        chunk = min(prompt, alone)  # of a prompt, which is in one cohort
        batch = replace(decoding, fresh=chunk, fresh_keys=chunk * prompt / 2, sampled=decoding.sampled + 1)
        arriving = self.round(batch, cohorts)
        waited = Times(waiting=plain.seconds / 2)
        waited.add(arriving.along, math.ceil(prompt / alone))
        tokens = rows * output
        return self._prediction(tokens, seconds, spent, plain, first=waited, per_token=seconds / output)

    def job(self, requests: int) -> Prediction:
        """All requests at the start; the lengths are drawn evenly from their spans."""
        draw = random.Random(0)
        load = self.workload
        waiting = [
            (draw.randint(load.input.low, load.input.high), draw.randint(load.output.low, load.output.high))
            for _ in range(requests)
        ][::-1]
        running: list[list[int]] = []  # context, tokens left
        clock, first, decoding, produced = 0.0, 0.0, 0.0, 0
        spent = Times()
        full = self.round(*self.batch(min(self.rows, requests), load.input.mean + load.output.mean / 2))
        while waiting or running:
            chunk = 0
            begun: list[list[int]] = []
            room = self.cohorts(self.rows) * self.engine.max_num_batched_tokens - len(running)
            while waiting and len(running) + len(begun) < self.rows and (chunk + waiting[-1][0] <= room or not begun):
                prompt, output = waiting.pop()
                chunk += prompt
                begun.append([prompt, output])
            count = 1 if begun else min(left for _, left in running)
            context = sum(one[0] for one in running) / max(1, len(running)) + count / 2
            batch = self.batch(len(running), context, chunk, chunk / max(1, len(begun)))
            done = self.round(*batch)
            clock += count * done.seconds
            spent.add(done.spent, count)
            decoding += count * done.seconds * len(running)
            first += clock * len(begun)
            running += begun
            produced += count * len(running)
            running = [[length + count, left - count] for length, left in running if left > count]
        per_token = decoding / max(1, produced - requests)
        until = Times()
        until.add(spent, first / requests / clock)
        plan = self._prediction(produced, clock, spent, full, first=until, per_token=per_token)
        return replace(plan, seconds=clock)

    def _prediction(
        self, tokens: float, seconds: float, spent: Times, plain: Round, *, first: Times, per_token: float
    ) -> Prediction:
        costs, layout = self.costs, self.costs.layout
        asked = self.workload.requests or self.workload.concurrency
        there = min(1.0, asked / (-(-asked // layout.dp) * layout.dp))  # replicas get no more than there are
        each = Times()
        each.add(spent, 1 / (tokens * layout.dp * there))
        decode, _ = self.batch(1, 0)
        sent = max(costs.sent(stage, decode) for stage in range(layout.pp))
        sent += sent * self.workload.input.mean / self.workload.output.mean
        return Prediction(
            layout=layout,
            memory=(),
            concurrency=min(self.rows * layout.dp, asked),
            throughput=tokens * layout.dp * there / seconds,
            first_token=first.total,
            per_token=per_token,
            sent=sent,
            idle=plain.idle,
            spent=each,
            spent_first=first,
        )
