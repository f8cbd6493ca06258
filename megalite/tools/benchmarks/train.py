"""A training step: megalite beside the same model of transformers, under one DeepSpeed config, in one process.

One rank, on the CPU or a GPU, ZeRO stage 1, the same AdamW on both sides, gradients clipped; transformers computes its
own loss. Both begin with the same weights, get the same new tokens in every round and take turns; who goes first
changes. Printed are the medians over the rounds, in milliseconds a step, and the median of the rounds' ratios, megalite
over transformers: below 1 is faster; by the clock, and by processor time, which other work on the machine disturbs
less. The losses of both are compared on the way. Then megalite's tokens a second, and the share that the model's
operations have of what the device does in matmuls, measured in the same call, and of its peak on paper.

With --ragged the sequences are of unequal lengths: transformers pads them, and on a GPU packs them too. "equal" is
megalite's own step over sequences of one length with as many tokens and the same sum of squared lengths.

With --ranks megalite trains alone: by tensor parallelism with sequence parallelism, or along another axis.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megalite.config.schema import DistributedSection, OptimizerSection
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.kernels.device import device_name, release_memory
from megalite.model import families
from megalite.planner.devices import peak_flops
from megalite.run.facts import Given
from megalite.run.launch_env import LaunchEnv
from megalite.run.launcher import run_ranks
from megalite.run.runtime import prepare_deepspeed, start
from megalite.tools.benchmarks.floor import matmul_rate
from megalite.tools.benchmarks.frame import Timed, timed, write_figures
from megalite.tools.benchmarks.shapes import SHAPES, save_config, save_random
from megalite.tools.toolkit import say_time_left
from megalite.train.data.packing import pack
from megalite.train.flops import training_flops
from megalite.train.micro_batch import from_sequences, from_windows
from megalite.train.optimizer import deepspeed_config, make_optimizer
from megalite.train.trainer import Trainer
from megalite.train.zero import one_optimizer_for_stages_1_and_2
from megalite.weights import transfer
from megalite.weights.dtypes import torch_dtype

ALL_STEPS = 1 << 20
"""Of the learning rate's schedule: it stays at its peak while this measures."""
OPTIMIZER = OptimizerSection(learning_rate=1e-4, min_learning_rate=1e-4, warmup_steps=0)
QUICK: dict[str, dict[str, Any]] = {
    "cpu": {"models": ["qwen3-10M"], "dtypes": ["float32"], "rounds": 3},
    "cuda": {"models": ["qwen3-0.6B"], "dtypes": ["bfloat16"], "rounds": 5, "batch": 8, "length": 1024},
}
"""What --quick sets, by device."""
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}
"""Largest difference between the losses of a step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen3-10M", "llama-34M"], help="shapes")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE), help="numbers")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument(
        "--ragged",
        nargs="*",
        metavar="LENGTH",
        help="sequences of unequal lengths: these (128x16 is 128 of 16 tokens), or without any drawn up to --length",
    )
    parser.add_argument("--ranks", type=int, default=1, help="above 1: megalite alone on so many")
    parser.add_argument("--axis", choices=("tp", "pp", "dp"), default="tp", help="along which they share the work")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a replica's step with --ranks")
    parser.add_argument("--recompute", action="store_true", help="with --ranks: keep only the inputs of layers")
    parser.add_argument("--quick", action="store_true", help="one shape, one dtype: below 2 minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of either side")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    if args.quick:
        vars(args).update(QUICK[args.device])
    if args.ranks > 1 and LaunchEnv.of(os.environ) is None:
        return run_ranks([sys.argv[0].removesuffix(" train"), "train", *sys.argv[1:]], args.ranks, stopped_timeout=60.0)
    figures = []
    section = DistributedSection(device=args.device)
    with (
        start(section, Given(sha256="", config_text=""), handle_signals=False) as runtime,
        tempfile.TemporaryDirectory() as tmp,
    ):
        torch.set_num_threads(args.threads)
        prepare_deepspeed(runtime)
        if args.ranks > 1:
            for name in args.models:
                for dtype in args.dtypes:
                    words = measure_ranks(save_config(name, Path(tmp) / name), dtype, runtime.device, args)
                    if runtime.rank == 0:
                        print(f"{name}, {dtype}, {args.axis}={args.ranks}: {words}", flush=True)
            return 0
        print(f"{args.threads} threads, {described(args)} a step, {args.rounds} rounds; ms a step, and ratios")
        limits = device_limits(runtime.device)
        words = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in limits.items())
        print(f"{device_name(runtime.device) or 'CPU'}: {words}", flush=True)
        for name in args.models:
            folder = Path(tmp) / name
            save_random(name, folder)
            for dtype in args.dtypes:
                row = {"model": name, "dtype": dtype, **measure(folder, dtype, runtime.device, args, limits)}
                figures.append(row)
                words = ", ".join(
                    f"{key} {value:.2f}" if value < 10 else f"{key} {value:.0f}"
                    for key, value in row.items()
                    if key not in ("model", "dtype")
                )
                print(f"{name}, {dtype}: {words}", flush=True)
    write_figures(figures, args.json)
    return 0


def device_limits(device: torch.device) -> dict[str, float]:
    """Operations a second: measured in bfloat16 on a GPU and in float32 on a CPU, and on paper where that is known."""
    limits = {"matmul rate": matmul_rate(device)}
    release_memory(device)
    peak = peak_flops(device_name(device))
    return limits if peak is None else {**limits, "peak": peak}


def described(args: argparse.Namespace) -> str:
    if args.ragged is None:
        return f"{args.batch} x {args.length} tokens"
    return f"{' + '.join(args.ragged)} tokens" if args.ragged else f"{args.batch} x 16 to {args.length} tokens"


def lengths_of(args: argparse.Namespace, generator: torch.Generator) -> list[int]:
    """Tokens of the sequences of a step. Drawn ones are as likely to be between 16 and 32 as between 32 and 64."""
    if args.ragged is None:
        return [args.length] * args.batch
    if args.ragged:
        parts = [part.split("x") for part in args.ragged]
        return [int(part[-1]) for part in parts for _ in range(int(part[0]) if len(part) > 1 else 1)]
    drawn = torch.rand(args.batch, generator=generator) * math.log(args.length / 16)
    return [round(16 * math.exp(one)) for one in drawn.tolist()]


def as_equal(lengths: list[int]) -> list[int]:
    """About as many tokens in sequences of one length, with the same sum of squares: as much work."""
    length = round(sum(one * one for one in lengths) / sum(lengths))
    return [length] * max(1, round(sum(lengths) / length))


def measure(
    folder: Path, dtype: str, device: torch.device, args: argparse.Namespace, limits: dict[str, float]
) -> dict[str, float]:
    """Medians of all sides, and of their ratios; what megalite's come to beside `limits`."""
    sides = {"megalite": ours(folder, dtype, device), "transformers": theirs(folder, dtype, device, padded)}
    if args.ragged is not None and device.type == "cuda":
        sides["packed"] = theirs(folder, dtype, device, packed)
    model = families.read(folder)
    vocab = model.vocab_size
    rates: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(0)
    rounds: list[dict[str, Timed[float]]] = []
    for number in range(args.rounds + 1):
        began = time.monotonic()
        lengths = lengths_of(args, generator)
        rows = [torch.randint(vocab, (length + 1,), generator=generator) for length in lengths]
        order = list(sides) if number % 2 else list(reversed(sides))
        found = {side: timed(partial(sides[side], rows)) for side in order}
        losses = {side: one.result for side, one in found.items()}
        assert max(losses.values()) - min(losses.values()) < TOLERANCE[dtype], f"the losses differ: {losses}"
        if args.ragged is not None:
            even = as_equal(lengths)
            rows = list(torch.randint(vocab, (len(even), even[0] + 1), generator=generator))
            one = timed(partial(sides["megalite"], rows))
            scale = sum(lengths) / sum(even)  # what rounding has changed
            found["equal"] = Timed(one.seconds * scale, one.cpu_seconds * scale, one.result)
            for name in sides:  # the others learn from the same, or their losses would part
                if name != "megalite":
                    sides[name](rows)
        if number:  # the first round warms up
            rounds.append(found)
            seconds = found["megalite"].seconds
            rates.append((sum(lengths) / seconds, training_flops(model, lengths) / seconds))
        if number == 1:
            say_time_left(time.monotonic() - began, args.rounds - number, f"{folder.name}, {dtype}")
    mine, others = "megalite", [name for name in rounds[0] if name != "megalite"]
    medians = {name: 1000 * statistics.median(one[name].seconds for one in rounds) for name in (mine, *others)}
    ratios = {
        f"megalite / {name}": statistics.median(one[mine].seconds / one[name].seconds for one in rounds)
        for name in others
    }
    cpu = statistics.median(one[mine].cpu_seconds / one["transformers"].cpu_seconds for one in rounds)
    tokens, operations = (statistics.median(column) for column in zip(*rates, strict=True))
    shares = {f"of {name}": operations / limit for name, limit in limits.items()}
    return {**medians, **ratios, "of processor time": cpu, "tokens/s": tokens, **shares}


def measure_ranks(folder: str, dtype: str, device: torch.device, args: argparse.Namespace) -> str:
    """Speed of megalite's steps on all ranks together, and its share of what they can do on paper. Collective."""
    model = families.read(folder)
    state = ParallelState(Layout(**{args.axis: args.ranks}), sequence_parallel=True)
    decoder = transfer.build(model, state, dtype=torch_dtype(dtype), device=device)
    transfer.initialise(decoder, seed=0)
    trainer = Trainer(decoder, OPTIMIZER, steps=ALL_STEPS, recompute=args.recompute)
    generator = torch.Generator().manual_seed(state.dp.rank)
    seconds = []
    for _ in range(args.rounds + 2):
        shape = args.micro_batches, args.batch, args.length + 1
        windows = torch.randint(model.vocab_size, shape, generator=generator)
        began = time.perf_counter()
        trainer.read(trainer.step([from_windows(part) for part in windows]))
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[2:])
    lengths = [args.length] * (args.batch * args.micro_batches * state.dp.size)
    peak = peak_flops(device_name(device))
    share = "" if peak is None else f", of peak {training_flops(model, lengths) / step / peak / args.ranks:.1%}"
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return f"{1000 * step:.4g} ms a step, {sum(lengths) / step:.4g} tokens/s{share}{memory}"


Step = Callable[[list[Tensor]], float]
"""A step over sequences [L + 1]; gives its mean loss."""


def ours(folder: Path, dtype: str, device: torch.device) -> Step:
    model = families.read(folder)
    decoder = transfer.build(model, ParallelState(Layout()), dtype=torch_dtype(dtype), device=device)
    transfer.load_folder(decoder, folder)
    trainer = Trainer(decoder, OPTIMIZER, steps=ALL_STEPS)

    def step(rows: list[Tensor]) -> float:
        lengths = [len(row) - 1 for row in rows]
        if len(set(lengths)) == 1:
            batch = from_windows(torch.stack(rows))
        else:
            [[order]] = pack(lengths, sum(lengths), 1)
            batch = from_sequences([rows[place].tolist() for place in order], [[1.0] * lengths[i] for i in order])
        return trainer.read(trainer.step([batch]))["loss"]

    return step


def theirs(
    folder: Path, dtype: str, device: torch.device, arrange: Callable[[list[Tensor]], dict[str, Tensor]]
) -> Step:
    """The same by transformers, in the same engine with the same optimizer."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    number = torch_dtype(dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=number)
    model.to(device)
    model.config.use_cache = False
    model.train()
    config = deepspeed_config(OPTIMIZER, zero_stage=1, dtype=number, more={})
    with one_optimizer_for_stages_1_and_2():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model, OPTIMIZER), config=config, dist_init_required=False
        )

    def step(rows: list[Tensor]) -> float:
        inputs = {name: values.to(device) for name, values in arrange(rows).items()}
        targets = inputs.pop("targets")
        loss = engine(**inputs, labels=targets, shift_labels=targets).loss
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch, on the right filled up to the longest."""
    ids = pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
    mask = targets != -100
    return {"input_ids": ids, "targets": targets, **({} if mask.all() else {"attention_mask": mask.long()})}


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    """One row, in which positions say where a sequence begins."""
    ids, targets = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
    positions = torch.cat([torch.arange(len(row) - 1) for row in rows])
    return {"input_ids": ids[None], "targets": targets[None], "position_ids": positions[None]}
