"""Two replicas under each policy of the balancer, and as simulated: `python tests/balance_served.py [COUNT]`.

The demo model with little memory and eight sequences at once gets COUNT requests at the same moment, after forty common
beginnings. Says how many prompt tokens were in a replica's cache, and what the requests took, by the clock and in
processor time of all of the server. Simulated times are shares of the first policy's.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import get_args

import httpx
from serve_demo import Demo, demo

from megalite.inference.balancer import Policy
from megalite.tools.benchmarks.replica_model import BLOCK, Machine, SimRequest
from megalite.tools.benchmarks.serve import tree_seconds
from megalite.tools.benchmarks.simulation import Simulation

BEGINNINGS = 40
MACHINE = Machine(rows=8, tokens=2048, blocks=200, step=4e-3, prefill=4e-4, row=1.5e-3, kv=1e-6)
"""With times about as they are for the demo model on one core."""
KEYS = (
    "parallel.dp=2",
    f"engine.max_num_seqs={MACHINE.rows}",
    f"engine.max_num_batched_tokens={MACHINE.tokens}",
    f"engine.num_kv_blocks={MACHINE.blocks}",
)


def recording(count: int) -> list[SimRequest]:
    """Outputs are heavy-tailed, beginnings asked for by Zipf's law."""
    r = random.Random(0)
    lengths = [r.randint(4, 20) for _ in range(BEGINNINGS)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(BEGINNINGS)))
    found = []
    for index in range(count):
        [one] = r.choices(range(BEGINNINGS), cum_weights=weights)
        output = max(4, min(100, round(r.lognormvariate(0, 0.8) * 16)))
        found.append(SimRequest(index, 0.0, ((one, lengths[one]),), r.randint(8, 64), output, output))
    return found


def token_ids(request: SimRequest) -> list[int]:
    """Below 4,000, equal where the content is."""
    ids: list[int] = []
    for content, blocks in request.parts:
        ids += random.Random(content).choices(range(300, 4000), k=blocks * BLOCK)
    return ids + random.Random(-1 - request.index).choices(range(300, 4000), k=request.tail)


async def ask(server: Demo, requests: list[SimRequest]) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:

        async def one(request: SimRequest) -> None:
            body = {"prompt": token_ids(request), "max_tokens": request.output, "temperature": 0, "ignore_eos": True}
            (await http.post("/v1/completions", json=body)).raise_for_status()

        await asyncio.gather(*map(one, requests))


def main() -> int:
    requests = recording(int(sys.argv[1]) if len(sys.argv) > 1 else 160)
    prompt = sum(one.prompt for one in requests)
    print(f"{len(requests)} requests, {prompt} prompt tokens, {sum(one.output for one in requests)} output tokens")
    print("| policy | cached prompt tokens | simulated | seconds | of the first | simulated | processor s |")
    print("|---|---|---|---|---|---|---|")
    first = first_seconds = 0.0
    for policy in get_args(Policy):
        simulated = Simulation(MACHINE, (1.0, 1.0), policy).run(requests)
        first = first or simulated.makespan
        with tempfile.TemporaryDirectory() as name, demo(Path(name), f"server.balance={policy}", *KEYS) as server:
            before, began = tree_seconds(server.process.pid), time.monotonic()
            asyncio.run(ask(server, requests))
            seconds, cpu = time.monotonic() - began, tree_seconds(server.process.pid) - before
            cached = sum(one["cached_tokens"] for one in server.replicas())
            server.end()
        first_seconds = first_seconds or seconds
        shares = f"{cached / prompt:.3f} | {simulated.found / prompt:.3f}"
        times = f"{seconds:.1f} | {seconds / first_seconds:.2f} | {simulated.makespan / first:.2f} | {cpu:.1f}"
        print(f"| {policy} | {shares} | {times} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
