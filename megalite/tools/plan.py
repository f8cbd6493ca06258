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
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

from megalite.config.schema import EngineSection
from megalite.errors import ResourceError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.monitor.words import format_bytes
from megalite.planner.cost import Cluster
from megalite.planner.devices import named
from megalite.planner.generation import Prediction, Workload, parse
from megalite.planner.memory import Footprint
from megalite.planner.search import Choice, Objective, search
from megalite.tools.toolkit import Parser, positive
from megalite.weights.dtypes import DTYPE_BYTES, SAFETENSORS
from megalite.weights.hf import resolve


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a folder with config.json, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="all together (default: 1)")
    parser.add_argument("--hosts", type=positive, default=1, metavar="N", help="that they are on (default: 1)")
    text = "a100, h100, h200, b200, l4, rtx4090 or cpu (default: cpu, this one)"
    parser.add_argument("--device", default="cpu", help=text)
    text = "tokens and requests: input=1024,output=512,concurrency=256; requests=N: a job of so many"
    parser.add_argument("--workload", type=str, default="", metavar="WHAT", help=f"{text} (these are the defaults)")
    parser.add_argument("--dtype", choices=("auto", *SAFETENSORS), default="auto", help="default: the checkpoint's")
    text = "what the best layout is best at (default: throughput)"
    parser.add_argument("--objective", choices=get_args(Objective), default="throughput", help=text)
    parser.add_argument("--json", action="store_true", help="everything, for a program")


def run(args: argparse.Namespace) -> int:
    config = families.read(resolve(args.model, args.revision, weights=False))
    workload = parse(args.workload) if args.workload else Workload()
    cluster = Cluster(named(args.device), args.devices, args.hosts)
    itemsize = DTYPE_BYTES[SAFETENSORS[args.dtype if args.dtype != "auto" else _usual(config, cluster)]]
    engine = EngineSection(
        max_model_len=workload.longest,
        max_num_seqs=min(workload.concurrency, 1024),
        max_num_batched_tokens=max(8192, workload.concurrency),
    )
    choices = search(config, cluster, workload, engine, itemsize=itemsize, objective=args.objective)
    if args.json:
        print(json.dumps([_facts(choice) for choice in choices], indent=2))
    else:
        print("\n".join(_page(config, cluster, workload, choices)))
    if all(choice.prediction.short for choice in choices):
        raise ResourceError(f"{config.family}: fits {cluster.devices} x {cluster.device.name} in no layout")
    return 0


def _usual(config: ModelConfig, cluster: Cluster) -> str:
    """As `model.dtype: auto` chooses; a CPU is taken to have no fast bfloat16."""
    return "float32" if cluster.device.kind == "cpu" else config.dtype


def _facts(choice: Choice) -> dict[str, Any]:
    one = choice.prediction
    layout = {"tp": one.layout.tp, "pp": one.layout.pp, "dp": one.layout.dp}
    memory = [{**asdict(stage), "total": stage.total} for stage in one.memory]
    return {**asdict(one), "layout": layout, "memory": memory, "reason": choice.reason}


def _page(config: ModelConfig, cluster: Cluster, workload: Workload, choices: Sequence[Choice]) -> list[str]:
    """The ranking for people."""
    device = cluster.device
    hosts = f" on {cluster.hosts} hosts" if cluster.hosts > 1 else ""
    title = f"{config.family}, {config.num_layers} layers, on {cluster.devices} x {device.name}{hosts}: {workload}"
    lines = [title, f"{device.name}: {device.source}", ""]
    lines += table([_cells(choice.prediction) for choice in choices])
    lines += ["", "why", *(f"  {choice.layout}: {choice.reason}" for choice in choices)]
    lines += ["", "memory of the fullest rank of each stage"]
    lines += table([row for choice in choices for row in _memory(choice.prediction)])
    return lines


def _cells(one: Prediction) -> dict[str, str]:
    shown = {"tp": str(one.layout.tp), "pp": str(one.layout.pp), "dp": str(one.layout.dp)}
    shown["GiB a rank"] = f"{max(stage.total - stage.kv - stage.reserve for stage in one.memory) / 2**30:.1f}"
    if one.short:
        return {**shown, "fit": "no", "tokens/s": f"{format_bytes(one.short)} short"}
    idle = [f"{share:.0%}" for share in one.idle]
    return {
        **shown,
        "fit": str(one.fits),
        "at once": str(one.concurrency),
        "tokens/s": f"{one.throughput:,.0f}",
        "first token": f"{one.first_token * 1e3:,.0f} ms",
        "a token": f"{one.per_token * 1e3:.3g} ms",
        "sent a token": format_bytes(int(one.sent)),
        "idle": " ".join(idle if len(idle) <= 4 else [idle[0], idle[1], "..", idle[-1]]),
    }


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


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Right-aligned columns; a cell that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    head = "  ".join(f"{name:>{widths[name]}}" for name in names)
    return [head, *("  ".join(f"{row.get(name, ''):>{widths[name]}}" for name in names).rstrip() for row in rows)]
