"""Requests as they arrive in time, for `bench balance`: made from a seed, or read from a file. No torch here.

A recording is the same wherever it is made. Lengths are in tokens, rates relative to what the replicas can do at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from megalite.tools.benchmarks.replica_model import BLOCK, Machine, SimRequest, least_seconds

LIMIT = 2048
"""max_tokens of every request of the recordings; nobody knows beforehand where an output ends."""


def heavy(r: random.Random, middle: float, spread: float, most: int) -> int:
    """A length from a heavy-tailed (log-normal) distribution."""
    return max(1, min(most, round(r.lognormvariate(0, spread) * middle)))


def _plain(index: int, prompt: int, output: int) -> SimRequest:
    return SimRequest(index, 0.0, (), prompt, output, LIMIT)


def uniform(r: random.Random, count: int) -> Iterator[SimRequest]:
    """Lengths of equal probability, evenly spaced arrivals."""
    for index in range(count):
        yield _plain(index, r.randint(100, 1000), r.randint(50, 500))


def tailed(r: random.Random, count: int) -> Iterator[SimRequest]:
    """Heavy-tailed prompts and outputs."""
    for index in range(count):
        yield _plain(index, heavy(r, 300, 1.3, 8192), heavy(r, 150, 1.0, LIMIT))


def shared(r: random.Random, count: int) -> Iterator[SimRequest]:
    """As `tailed`, after one of 200 prefixes of 512 to 4096 tokens, of which few are asked for often (Zipf)."""
    lengths = [r.randint(32, 256) for _ in range(200)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(200)))
    for one in tailed(r, count):
        prefix = r.choices(range(200), cum_weights=weights)[0]
        yield replace(one, parts=((prefix, lengths[prefix]),))


def turns(r: random.Random, count: int) -> Iterator[SimRequest]:
    """Conversations after one of four system prompts: every turn's prompt is all that was said before."""
    talks: list[list[tuple[int, int]]] = []
    content = 4
    for index in range(count):
        if len(talks) < 100 or r.random() < 0.2:
            talks.append([(number := r.randrange(4), 32 + 16 * number)])
            if len(talks) > 400:
                talks.pop(r.randrange(200))
        talk = r.choice(talks)
        output = heavy(r, 150, 1.0, LIMIT)
        question = heavy(r, 60, 1.0, 2048)
        yield replace(_plain(index, question, output), parts=tuple(talk))
        talk.append((content, -(-(question + output) // BLOCK)))
        content += 1
        if sum(blocks for _, blocks in talk) > 500:
            talks.remove(talk)


def many(r: random.Random, count: int) -> Iterator[SimRequest]:
    """For many replicas: moderate lengths, after one of 5,000 prefixes of 64 to 1024 tokens (Zipf)."""
    lengths = [r.randint(4, 64) for _ in range(5000)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(5000)))
    for index in range(count):
        prefix = r.choices(range(5000), cum_weights=weights)[0]
        yield replace(
            _plain(index, heavy(r, 150, 1.0, 4096), heavy(r, 100, 1.0, LIMIT)), parts=((prefix, lengths[prefix]),)
        )


@dataclass(frozen=True)
class Recording:
    """How requests come."""

    requests: Callable[[random.Random, int], Iterator[SimRequest]]
    gaps: Literal["even", "random", "bursts"] = "random"
    speeds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    """Of the replicas."""


RECORDINGS = {
    "uniform": Recording(uniform, "even"),
    "bursty": Recording(tailed, "bursts"),
    "heavy-tailed": Recording(tailed),
    "shared prefixes": Recording(shared),
    "conversations": Recording(turns),
    "one at half speed": Recording(shared, speeds=(0.5, 1.0, 1.0, 1.0)),
}


def times(r: random.Random, gaps: str, count: int) -> list[float]:
    """When they arrive, in units of the mean time between two."""
    if gaps == "even":
        return [float(index) for index in range(count)]
    if gaps == "bursts":  # 100 at once, bursts at random
        bursts = list(accumulate(r.expovariate(1 / 100) for _ in range(-(-count // 100))))
        return [bursts[index // 100] for index in range(count)]
    return list(accumulate(r.expovariate(1) for _ in range(count)))


def record(
    recording: Recording, count: int, machine: Machine, speeds: Sequence[float], load: float, seed: int = 0
) -> list[SimRequest]:
    """So many requests; `load`: what arrives in a second over what the replicas can do in it at best."""
    r = random.Random(seed)
    requests = list(recording.requests(r, count))
    gap = least_seconds(requests, machine, speeds) / count / load
    return [replace(one, arrival=at * gap) for one, at in zip(requests, times(r, recording.gaps, count), strict=True)]


def read_trace(path: Path, scale: float = 1.0) -> list[SimRequest]:
    """A trace of JSON lines: timestamp (ms), input_length, output_length (tokens), hash_ids (of 512 tokens each).

    That is the form of the traces that were published with Mooncake (Qin et al., FAST 2025). `scale`: of the times.
    """
    requests = []
    with path.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            row = json.loads(line)
            length, ids = row["input_length"], row["hash_ids"]
            whole = min(len(ids), (length - 1) // 512)
            parts = tuple((content, 512 // BLOCK) for content in ids[:whole])
            arrival = row["timestamp"] / 1000 * scale
            output = max(1, row["output_length"])
            requests.append(SimRequest(index, arrival, parts, length - whole * 512, output, max(LIMIT, output)))
    return requests
