"""Measures what the planner needs to know of this machine: `megalite plan --calibrate`. Under a minute.

Matmul and memory rates, sums and messages between two ranks, and what a step, a row and a kernel cost beside, which is
taken from steps of two tiny models: one of few layers, one of many, so that their difference is the layers'.

Started as `python -m megalite.tools.benchmarks.calibrate DEVICE FILE` it is one of the two ranks.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megalite.planner.cost import END_KERNELS, KERNELS, KERNELS_OF_ONE
from megalite.planner.devices import keep, named, visible_gpus
from megalite.run.facts import Given
from megalite.run.launcher import run_ranks
from megalite.tools.benchmarks.shapes import decoder

DEPTHS = (2, 18)
"""Layers of the two tiny models."""
ROWS = 32
"""Rows of a step beside those of one."""
SMALL, LARGE = 1 << 11, 1 << 21
"""Numbers, in float32, of the messages from which latency and rate are taken."""
DeviceKind = Literal["cpu", "cuda"]


def calibrate() -> tuple[str, dict[str, float], Path]:
    """Measure this machine's device; gives its name, what was measured and the file where that is kept."""
    gpus = visible_gpus()
    device = named(gpus[0][0]) if gpus else named("cpu")
    kind: DeviceKind = "cuda" if gpus else "cpu"
    found = rates(kind) | steps(kind)
    if not gpus or len(gpus) > 1:
        found |= between_ranks(kind)
    return device.name, found, keep(device.name, found)


def rates(kind: DeviceKind) -> dict[str, float]:
    """Operations and bytes a second, of matmuls as generation has them: of many rows, and of one."""
    import torch

    from megalite.tools.benchmarks.floor import matmul_rate, read_rate, seconds_of

    device = torch.device(kind)
    if kind == "cuda":
        return {"matmul": matmul_rate(device), "read": read_rate(device)}
    rows, inner = torch.randn(256, 1024), torch.randn(1024, 4096)
    many = seconds_of(partial(torch.matmul, rows, inner), device)
    weights = [torch.randn(1024, 4096) for _ in range(16)]

    def one() -> None:
        for weight in weights:
            torch.matmul(rows[:1], weight)

    nbytes = sum(weight.nbytes for weight in weights)
    return {"matmul": 2 * rows.numel() * inner.shape[1] / many, "read": nbytes / seconds_of(one, device)}


def steps(kind: DeviceKind) -> dict[str, float]:
    """Seconds of a step, of each of its rows and of each kernel, beside reading and computing."""
    short, long = (_decode(kind, layers) for layers in DEPTHS)
    more = DEPTHS[1] - DEPTHS[0]
    if kind == "cuda":  # the host prepares a step while the device runs one, so whichever takes longer counts
        kernel = long[0] / (DEPTHS[1] * KERNELS_OF_ONE + END_KERNELS)
        row = max(0.0, short[1] - short[0]) / (ROWS - 1)
        return {"kernel": kernel, "row": row, "step": max(short[0] - row, 0.0)}
    kernel = max(long[0] - short[0], 0.0) / (more * KERNELS_OF_ONE)
    ends = short[0] - (DEPTHS[0] * KERNELS_OF_ONE + END_KERNELS) * kernel
    widest = short[1] - (DEPTHS[0] * KERNELS + END_KERNELS) * kernel
    both = [max(0.0, batch - one) for one, batch in (short, long)]
    row_layer = max(0.0, both[1] - both[0] - more * (KERNELS - KERNELS_OF_ONE) * kernel) / more / (ROWS - 1)
    row = max(0.0, (widest - ends) / (ROWS - 1) - DEPTHS[0] * row_layer)
    return {"kernel": kernel, "row": row, "row_layer": row_layer, "step": max(ends - row - row_layer, 0.0)}


def _decode(kind: DeviceKind, layers: int) -> tuple[float, float]:
    """Seconds of a decode step of one row, and of ROWS, of a tiny model."""
    from megalite import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model = decoder("llama", layers, 64, 4, 4, 128, vocab_size=512, max_position_embeddings=128, dtype="float32")
        Path(folder, "config.json").write_text(json.dumps(model))
        sizes: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": ROWS, "max_num_batched_tokens": 512}
        with LLM(folder, device=kind, dtype="float32", load_format="dummy", skip_tokenizer_init=True, **sizes) as llm:

            def seconds(batch: int, tokens: int) -> float:
                params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, detokenize=False)
                prompts = [[number % 500] * (2 + number % 11) for number in range(batch)]
                began = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                return time.perf_counter() - began

            def step(batch: int) -> float:
                """What disturbs only adds time, so the shortest counts."""
                few, many = (min(seconds(batch, tokens) for _ in range(4)) for tokens in (4, 100))
                return (many - few) / 96

            return step(1), step(ROWS)


def between_ranks(kind: DeviceKind) -> dict[str, float]:
    """Latency and rate of a sum over two ranks, and latency of a message."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        code = run_ranks(["-m", __name__, kind, str(out)], 2, stopped_timeout=60.0)
        return json.loads(out.read_text()) if code == 0 else {}


def rank(kind: str, out: Path) -> int:
    """One of two ranks."""
    import torch
    import torch.distributed as dist

    from megalite.config.schema import DistributedSection
    from megalite.kernels.device import synchronize
    from megalite.run import runtime

    section = DistributedSection(device="cuda" if kind == "cuda" else "cpu")
    with runtime.start(section, Given(sha256="", config_text="")) as run:

        def median(work: Callable[[], object], times: int) -> float:
            spent = []
            for _ in range(times):
                synchronize(run.device)
                began = time.perf_counter()
                work()
                synchronize(run.device)
                spent.append(time.perf_counter() - began)
            return statistics.median(spent)

        few, many = (torch.ones(count, device=run.device) for count in (SMALL, LARGE))

        def message() -> None:
            for sender in (0, 1):
                if run.rank == sender:
                    dist.send(few, 1 - sender)
                else:
                    dist.recv(few, sender)

        for numbers in (few, many):
            dist.all_reduce(numbers)
        work = torch.ones(256, 512, device=run.device)
        inner = torch.ones(512, 512, device=run.device)

        def summed(numbers: torch.Tensor, times: int) -> float:
            """Behind a matmul, as in a layer: on a CPU its threads and those of the sum get in each other's way."""

            def both() -> None:
                torch.matmul(work, inner)
                dist.all_reduce(numbers)

            return max(median(both, times) - median(lambda: torch.matmul(work, inner), times), 1e-7)

        small, large = summed(few, 200), summed(many, 20)
        message()
        hop = median(message, 100) / 2
        if run.rank == 0:
            rate = (many.nbytes - few.nbytes) / max(large - small, 1e-9)
            out.write_text(json.dumps({"link_latency": small, "link": rate, "hop_latency": hop}))
    return 0


if __name__ == "__main__":
    sys.exit(rank(sys.argv[1], Path(sys.argv[2])))
