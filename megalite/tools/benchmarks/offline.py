"""Offline generation: megalite beside transformers `generate`, same checkpoint, same prompts, same process.

Greedy, on the CPU, one rank. Both sides get new random prompts in every round and take turns; speeds are generated
tokens a second, of which the medians are printed, and the median of the rounds' ratios: by the clock, and by processor
time, which other work on the machine disturbs less (with one thread; several wait busily for each other). In the ragged
workload every prompt has its own length and number of tokens to generate: transformers works in left-padded batches,
each until its longest output is done, with the batch size that suits it best; only tokens that were asked for count.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalite import LLM, SamplingParams
from megalite.tools.benchmarks.frame import timed, write_figures
from megalite.tools.benchmarks.shapes import save_random
from megalite.tools.toolkit import say_time_left

RAGGED_BATCHES = (8, 16, 32, 64)
"""Batch sizes that transformers may choose from."""


@dataclass(frozen=True)
class Job:
    """Prompts of token ids and how many tokens to generate for each."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder in Hugging Face layout; default: random weights, 34M parameters")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="numbers of both sides")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each workload")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of either side")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of the even workloads")
    parser.add_argument("--new", type=int, default=128, help="generated tokens of the even workloads")
    parser.add_argument("--skip-ragged", action="store_true", help="leave the ragged workload out")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or save_random("llama-34M", Path(folder))
        theirs, vocab = load_transformers(path, args.dtype)
        with LLM(
            path,
            dtype=args.dtype,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
        ) as llm:
            figures = measure_all(args, llm, theirs, vocab)
    write_figures(figures, args.json)
    return 0


def measure_all(args: argparse.Namespace, llm: LLM, theirs: Transformers, vocab: int) -> list[dict[str, Any]]:
    random_ = random.Random(0)
    print(f"{args.threads} threads, {args.dtype}, {args.rounds} rounds; tokens/s")
    print(f"{'workload':<28}{'megalite':>10}{'transformers':>14}{'ratio':>8}{'of cpu':>8}")
    figures = []

    def compare(name: str, make: Callable[[], Job], batch: int) -> None:
        rounds = []
        for number in range(args.rounds):
            job, began = make(), time.monotonic()
            mine = timed(partial(generate_ours, llm, job))
            rounds.append((job.tokens, mine, timed(partial(theirs.generate, job, batch))))
            if number == 0:
                say_time_left(time.monotonic() - began, args.rounds - 1, name)
        row = {
            "workload": name,
            "megalite": statistics.median(tokens / mine.seconds for tokens, mine, _ in rounds),
            "transformers": statistics.median(tokens / his.seconds for tokens, _, his in rounds),
            "ratio": statistics.median(his.seconds / mine.seconds for _, mine, his in rounds),
            "cpu_ratio": statistics.median(his.cpu_seconds / mine.cpu_seconds for _, mine, his in rounds),
        }
        figures.append(row)
        speeds = f"{row['megalite']:>10.0f}{row['transformers']:>14.0f}"
        print(f"{name:<28}{speeds}{row['ratio']:>8.2f}{row['cpu_ratio']:>8.2f}", flush=True)

    def even(batch: int) -> Job:
        prompts = [random_.choices(range(3, vocab), k=args.prompt) for _ in range(batch)]
        return Job(prompts, [args.new] * batch)

    def ragged() -> Job:
        prompts = [random_.choices(range(3, vocab), k=random_.randint(16, 256)) for _ in range(64)]
        return Job(prompts, [min(400, 8 + int(random_.expovariate(1 / 64))) for _ in prompts])

    warm_up = Job([[3] * 16], [8])
    generate_ours(llm, warm_up)
    theirs.generate(warm_up, 1)
    for batch in args.batches:
        compare(f"batch {batch}, {args.prompt} + {args.new}", partial(even, batch), batch)
    if not args.skip_ragged:
        trial = ragged()
        best = min(RAGGED_BATCHES, key=lambda size: timed(lambda: theirs.generate(trial, size)).cpu_seconds)
        compare(f"64 ragged (theirs: {best} at once)", ragged, best)
    return figures


def generate_ours(llm: LLM, job: Job) -> None:
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in job.lengths]
    outputs = llm.generate(job.prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == job.lengths


class Transformers:
    """The other side, used as its documentation says."""

    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def generate(self, job: Job, batch: int) -> None:
        """In batches, longest outputs together so that the least is generated in vain."""
        order = sorted(range(len(job.prompts)), key=lambda index: job.lengths[index])
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = max(len(job.prompts[index]) for index in chosen)
            padded = [[0] * (width - len(job.prompts[index])) + job.prompts[index] for index in chosen]
            mask = [[0] * (width - len(job.prompts[i])) + [1] * len(job.prompts[i]) for i in chosen]
            longest = max(job.lengths[index] for index in chosen)
            out = self.model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
            )
            assert out.shape == (len(chosen), width + longest)


def load_transformers(path: str, dtype: str) -> tuple[Transformers, int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.eval()
    return Transformers(model), model.config.vocab_size
