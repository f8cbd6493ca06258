"""A training step: megalite beside the same model of transformers, under one DeepSpeed config, in one process.

One rank, on the CPU or a GPU, ZeRO stage 1, the same AdamW on both sides, gradients clipped; transformers computes its
own loss. Both begin with the same weights, get the same new tokens in every round and take turns; who goes first
changes. Printed are the medians over the rounds, in milliseconds a step, and the median of the rounds' ratios, megalite
over transformers: below 1 is faster; by the clock, and by processor time, which other work on the machine disturbs
less. The losses of both are compared on the way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config.schema import DistributedSection, OptimizerSection
from megalite.core.distributed import prepare_deepspeed, start
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.train.batch import from_windows
from megalite.train.optimizer import deepspeed_config, make_optimizer
from megalite.train.trainer import Trainer
from megalite.weights import transfer

ALL_STEPS = 1 << 20
"""Of the learning rate's schedule: it stays at its peak while this measures."""
OPTIMIZER = OptimizerSection(learning_rate=1e-4, min_learning_rate=1e-4, warmup_steps=0)
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}
"""Largest difference between the losses of a step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen3-10M", "llama-34M"], help="shapes")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE), help="numbers")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of either side")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    figures = []
    section = DistributedSection(device=args.device)
    with (
        start(section, sha256="", config_text="", handle_signals=False) as runtime,
        tempfile.TemporaryDirectory() as tmp,
    ):
        torch.set_num_threads(args.threads)
        prepare_deepspeed(runtime)
        print(f"{args.threads} threads, {args.batch} x {args.length} tokens a step, {args.rounds} rounds; ms a step")
        print(f"{'model':<24}{'numbers':<10}{'megalite':>10}{'transformers':>14}{'ratio':>8}{'of cpu':>8}")
        for name in args.models:
            folder = Path(tmp) / name
            MODELS[name]().save_pretrained(folder)
            for dtype in args.dtypes:
                row = {"model": name, "dtype": dtype, **measure(folder, dtype, runtime.device, args)}
                figures.append(row)
                line = (
                    f"{row['megalite']:>10.0f}{row['transformers']:>14.0f}{row['ratio']:>8.2f}{row['cpu_ratio']:>8.2f}"
                )
                print(f"{name:<24}{dtype:<10}{line}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(folder: Path, dtype: str, device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """Medians of both sides, and of their ratios."""
    sides = [ours(folder, dtype, device), theirs(folder, dtype, device)]
    vocab = families.read(folder).vocab_size
    generator = torch.Generator().manual_seed(0)
    rounds: list[tuple[Timed, Timed]] = []
    for number in range(args.rounds + 1):
        windows = torch.randint(vocab, (args.batch, args.length + 1), generator=generator)
        order = (0, 1) if number % 2 else (1, 0)
        found = {side: timed(sides[side], windows) for side in order}
        mine, his = found[0], found[1]
        assert abs(mine.loss - his.loss) < TOLERANCE[dtype], f"the losses differ: {mine.loss} and {his.loss}"
        if number:  # the first round warms up
            rounds.append((mine, his))
    return {
        "megalite": 1000 * statistics.median(mine.seconds for mine, _ in rounds),
        "transformers": 1000 * statistics.median(his.seconds for _, his in rounds),
        "ratio": statistics.median(mine.seconds / his.seconds for mine, his in rounds),
        "cpu_ratio": statistics.median(mine.cpu_seconds / his.cpu_seconds for mine, his in rounds),
    }


@dataclass(frozen=True)
class Timed:
    """One step of one side."""

    seconds: float
    cpu_seconds: float
    loss: float


def timed(step: Callable[[Tensor], float], windows: Tensor) -> Timed:
    clock, cpu = time.perf_counter(), time.process_time()
    loss = step(windows)
    return Timed(time.perf_counter() - clock, time.process_time() - cpu, loss)


def ours(folder: Path, dtype: str, device: torch.device) -> Callable[[Tensor], float]:
    """A step of windows [B, L + 1]; gives its mean loss."""
    model = families.read(folder)
    decoder = transfer.build(model, ParallelState(Layout()), dtype=transfer.DTYPES[dtype], device=device)
    transfer.load_folder(decoder, folder)
    trainer = Trainer(decoder, OPTIMIZER, steps=ALL_STEPS)
    return lambda windows: trainer.read(trainer.step([from_windows(windows)]))["loss"]


def theirs(folder: Path, dtype: str, device: torch.device) -> Callable[[Tensor], float]:
    """The same by transformers, in the same engine with the same optimizer."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    number = transfer.DTYPES[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=number).to(device)
    model.config.use_cache = False
    model.train()
    config = deepspeed_config(OPTIMIZER, zero_stage=1, dtype=number, more={})
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model, OPTIMIZER), config=config, dist_init_required=False
    )

    def step(windows: Tensor) -> float:
        windows = windows.to(device)
        targets = windows[:, 1:].contiguous()
        loss = engine(input_ids=windows[:, :-1], labels=targets, shift_labels=targets).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def demo_shape() -> Any:
    """The shape of checkpoints/demo: a Qwen3 of 10.5M parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=320,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=4096,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def llama_shape() -> Any:
    """A Llama of 34M parameters: hidden 512, 8 layers, vocabulary 8192."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=8192,
            max_position_embeddings=1024,
        )
    )


def qwen_shape() -> Any:
    """The shape of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )


MODELS = {"qwen3-10M": demo_shape, "llama-34M": llama_shape, "qwen3-0.6B": qwen_shape}
