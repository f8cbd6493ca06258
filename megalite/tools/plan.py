"""Which layout should a model have on these devices? All of them, best first, with memory, speed, and why each loses.

Needs the model's config.json, no weights and no GPU. Times are predictions: docs/planner.md says how they are made and
how far off they were.

example:
  megalite plan --model Qwen/Qwen3-8B --devices 8 --hosts 2 --device h200
  megalite plan --model MODEL --devices 8 --device h100 --workload input=1024,output=100-512,concurrency=256
  megalite plan --model checkpoints/demo --devices 4 --device cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from megalite.config.schema import EngineSection
from megalite.errors import ConfigError, Problem, ResourceError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.quantization import as_applied
from megalite.monitor.words import aligned, format_bytes, format_seconds
from megalite.planner.cost import Cluster
from megalite.planner.device_map import compare
from megalite.planner.devices import named, visible_gpus
from megalite.planner.generation import Prediction, Workload, parse
from megalite.planner.hybrid import search_pairs
from megalite.planner.memory import Footprint
from megalite.planner.search import Choice, Objective, search, search_training
from megalite.planner.training import TrainingPrediction, TrainingWork
from megalite.planner.training import parse as parse_training
from megalite.tools.toolkit import Parser, positive
from megalite.weights.dtypes import DTYPE_BYTES, SAFETENSORS
from megalite.weights.hf import resolve

SHOWN = 10
"""Pairs of layouts of a hybrid job that are printed."""
MOST_TOKENS = 1 << 14
"""Of prompts and outputs, that a CPU measures: with more it would take minutes."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="a folder with config.json, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="all together (default: 1)")
    parser.add_argument("--hosts", type=positive, default=1, metavar="N", help="that they are on (default: 1)")
    text = "a100, h100, h200, b200, l4, rtx4090 or cpu (default: cpu, this one)"
    parser.add_argument("--device", default="cpu", help=text)
    text = "tokens and requests: input=1024,output=512,concurrency=256; requests=N: a job of so many"
    parser.add_argument("--workload", type=str, default="", metavar="WHAT", help=f"{text} (these are the defaults)")
    parser.add_argument("--dtype", choices=("auto", *SAFETENSORS), default="auto", help="default: the checkpoint's")
    text = "fp8: as `model.quantization: fp8` makes weights of a model of numbers (default: as the checkpoint says)"
    parser.add_argument("--quantization", choices=("fp8",), help=text)
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="see engine.kv_cache_dtype")
    text = "what the best layout is best at (default: throughput)"
    parser.add_argument("--objective", choices=get_args(Objective), default="throughput", help=text)
    text = "a job that trains: --workload sequence=4096,batch=256,micro=1,zero=1 (the defaults)"
    parser.add_argument("--train", action="store_true", help=text)
    text = "a job that samples as --workload says (requests=N an iteration) and trains on what it sampled"
    parser.add_argument("--hybrid", action="store_true", help=text)
    text = 'beside what transformers\' device_map="auto" would do with the same devices'
    parser.add_argument("--compare-device-map", action="store_true", help=text)
    text = "measure this machine, in under a minute, and keep the result for --device cpu, or its GPUs"
    parser.add_argument("--calibrate", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="everything, for a program")


def run(args: argparse.Namespace) -> int:
    if args.calibrate:
        return _calibrate()
    if args.model is None:
        raise ConfigError(Problem(key="--model", rule="is needed", fix="Give a folder with config.json, or a hub id."))
    folder = resolve(args.model, args.revision, weights=False)
    config = as_applied(families.read(folder), args.quantization)
    cluster = Cluster(named(args.device), args.devices, args.hosts)
    itemsize = DTYPE_BYTES[SAFETENSORS[args.dtype if args.dtype != "auto" else _usual(config, cluster)]]
    if args.hybrid:
        return _hybrid(config, cluster, args, itemsize)
    if args.train:
        work = parse_training(args.workload)
        what, choices = str(work), search_training(config, cluster, work, itemsize=itemsize)
    else:
        load = parse(args.workload) if args.workload else Workload()
        if args.compare_device_map:  # one call of `generate` takes a batch, so both get one
            load = replace(load, requests=load.requests or load.concurrency)
            load = replace(load, concurrency=load.requests or 0)
        what, engine = str(load), _engine(load, args.kv_cache_dtype)
        choices = search(config, cluster, load, engine, itemsize=itemsize, objective=args.objective)
        if load.longest > config.max_position_embeddings:
            rule = f"requests of {load.longest:,} tokens, and the model was made for {config.max_position_embeddings:,}"
            print(f"warning: --workload: {rule}", file=sys.stderr)
    if args.compare_device_map and not args.train:
        facts = _device_map(folder, config, cluster, load, choices, itemsize)
        print(json.dumps(facts, indent=2) if args.json else "\n".join(aligned(facts)))
    elif args.json:
        print(json.dumps([_facts(choice) for choice in choices], indent=2))
    else:
        print("\n".join(_page(config, cluster, what, choices)))
    if all(choice.prediction.short for choice in choices):
        raise ResourceError(f"{config.family}: fits {cluster.devices} x {cluster.device.name} in no layout")
    return 0


def _engine(load: Workload, kv_cache_dtype: Literal["auto", "fp8"]) -> EngineSection:
    """One that takes as many requests as there are."""
    return EngineSection(
        max_model_len=load.longest,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=min(load.concurrency, 1024),
        max_num_batched_tokens=max(8192, min(load.concurrency, 1024)),
    )


def _calibrate() -> int:
    from megalite.tools.benchmarks.calibrate import calibrate  # imports torch

    name, found, file = calibrate()
    print(f"{name}, kept in {file}")
    for key, value in found.items():
        unit = {"matmul": "operations a second", "read": "bytes a second", "link": "bytes a second"}.get(key, "seconds")
        print(f"  {key:14}{value:.3g} {unit}")
    return 0


def _hybrid(config: ModelConfig, cluster: Cluster, args: argparse.Namespace, itemsize: int) -> int:
    """Pairs of layouts. The samples of an iteration are what is trained on."""
    load = parse(args.workload) if args.workload else Workload()
    load = replace(load, requests=load.requests or load.concurrency)
    assert load.requests is not None
    length = load.longest
    work = TrainingWork(sequence=length, batch=load.requests)
    pairs, trained = search_pairs(config, cluster, work, load, _engine(load, args.kv_cache_dtype), itemsize=itemsize)
    if not pairs:
        best = trained[0] if trained else None
        raise ResourceError(f"no two layouts fit together; to train: {best.reason if best else 'none can'}")
    if args.json:
        facts = [
            {**asdict(pair), "train": _facts_of(pair.train), "infer": _facts_of(pair.infer), "seconds": pair.seconds}
            for pair in pairs
        ]
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{config.family} on {cluster.devices} x {cluster.device.name}: an iteration of {load}\n")
    rows = [
        {
            "train": str(pair.train.layout),
            "infer": str(pair.infer.layout),
            "seconds": f"{pair.seconds:.3g}",
            "sampling": f"{pair.sampling:.3g}",
            "learning": f"{pair.learning:.3g}",
            "weights": f"{pair.sync:.2g}",
            "train GiB": f"{max(stage.total for stage in pair.train.memory) / 2**30:.1f}",
            "recompute": "yes" if pair.train.recompute else "no",
            "why": pair.reason,
        }
        for pair in pairs[:SHOWN]
    ]
    print("\n".join(aligned(rows)))
    return 0


def _device_map(
    folder: Path, config: ModelConfig, cluster: Cluster, load: Workload, choices: Sequence[Choice], itemsize: int
) -> list[dict[str, str]]:
    """`device_map="auto"` beside the best layout, and both measured where the devices and the weights are here."""
    theirs, ours = compare(config, cluster, load, itemsize=itemsize), choices[0].prediction
    stages = [len(ours.layout.layers(stage, config.layer_costs())) for stage in range(ours.layout.pp)]
    rows = [
        {
            "": 'device_map="auto"',
            "layers a device": " ".join(map(str, theirs.layers)),
            "idle": " ".join(f"{share:.0%}" for share in theirs.idle),
            "tokens/s predicted": f"{theirs.throughput:,.0f}",
        },
        {
            "": str(ours.layout),
            "layers a device": " ".join(map(str, stages)) + (" (each over tp)" if ours.layout.tp > 1 else ""),
            "idle": " ".join(f"{share:.0%}" for share in ours.idle),
            "tokens/s predicted": f"{ours.throughput:,.0f}",
        },
    ]
    if cluster.device.shared:
        rows[0]["layers a device"] += " (a CPU is one device)"
    for row, speed in zip(rows, _measured(folder, cluster, load, ours), strict=False):
        row["measured"] = f"{speed:,.0f}"
    return rows


def _measured(folder: Path, cluster: Cluster, load: Workload, ours: Prediction) -> list[float]:
    """Tokens a second of both; none where the devices, the weights or the time for it are lacking."""
    cuda = not cluster.device.shared
    here = len(visible_gpus()) == cluster.devices if cuda else load.tokens <= MOST_TOKENS
    if not (here and any(folder.glob("*.safetensors")) and find_spec("transformers") and find_spec("accelerate")):
        return []
    from megalite.tools.benchmarks import device_map

    return [device_map.theirs(folder, load, cuda=cuda), device_map.ours(folder, load, ours.layout, cuda=cuda)]


def _usual(config: ModelConfig, cluster: Cluster) -> str:
    """As `model.dtype: auto` chooses; a CPU is taken to have no fast bfloat16."""
    return "float32" if cluster.device.kind == "cpu" else config.dtype


def _facts(choice: Choice) -> dict[str, Any]:
    return {**_facts_of(choice.prediction), "reason": choice.reason}


def _facts_of(one: Prediction) -> dict[str, Any]:
    layout = {"tp": one.layout.tp, "pp": one.layout.pp, "dp": one.layout.dp}
    memory = [{**asdict(stage), "total": stage.total} for stage in one.memory]
    return {**asdict(one), "layout": layout, "memory": memory}


def _page(config: ModelConfig, cluster: Cluster, workload: str, choices: Sequence[Choice]) -> list[str]:
    """The ranking for people."""
    device = cluster.device
    hosts = f" on {cluster.hosts} hosts" if cluster.hosts > 1 else ""
    title = f"{config.family}, {config.num_layers} layers, on {cluster.devices} x {device.name}{hosts}: {workload}"
    lines = [title, f"{device.name}: {device.source}", ""]
    lines += aligned([_cells(choice.prediction) for choice in choices])
    lines += ["", "why", *(f"  {choice.layout}: {choice.reason}" for choice in choices)]
    lines += ["", "memory of the fullest rank of each stage"]
    lines += aligned([row for choice in choices for row in _memory(choice.prediction)])
    return lines


def _cells(one: Prediction) -> dict[str, str]:
    shown = {"tp": str(one.layout.tp), "pp": str(one.layout.pp), "dp": str(one.layout.dp)}
    shown["GiB a rank"] = f"{max(stage.total - stage.kv - stage.reserve for stage in one.memory) / 2**30:.1f}"
    if one.short:
        return {**shown, "fit": "no", "tokens/s": f"{format_bytes(one.short)} short"}
    if isinstance(one, TrainingPrediction):
        return {
            **shown,
            "fit": "recomputing" if one.recompute else "yes",
            "tokens/s": _rate(one.throughput),
            "a step": format_seconds(one.seconds or 0.0),
            "bubble": f"{one.bubble:.1%}",
            "activations": format_bytes(one.kept),
            "recomputed": format_bytes(one.recomputed),
            "sent a token": format_bytes(int(one.sent)),
            "idle": " ".join(f"{share:.0%}" for share in one.idle[:8]),
        }
    idle = [f"{share:.0%}" for share in one.idle]
    return {
        **shown,
        "fit": str(one.fits),
        "at once": str(one.concurrency),
        "tokens/s": _rate(one.throughput),
        "first token": format_seconds(one.first_token),
        "a token": format_seconds(one.per_token),
        "sent a token": format_bytes(int(one.sent)),
        "idle": " ".join(idle if len(idle) <= 4 else [idle[0], idle[1], "..", idle[-1]]),
    }


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 99.95 else f"{tokens:.3g}"


def _memory(one: Prediction) -> list[dict[str, str]]:
    """A line for each stage; of many only the first, second and last."""
    rows = []
    for stage, held in enumerate(one.memory):
        if 2 <= stage < len(one.memory) - 1:
            continue
        cells = {"layout": str(one.layout), "stage": str(stage)}
        names = [kind.name for kind in fields(Footprint) if any(getattr(other, kind.name) for other in one.memory)]
        rows.append({**cells, **{name: format_bytes(getattr(held, name)) for name in names}})
    return rows
