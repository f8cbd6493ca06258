"""How long ranks take to load a model: from its Hugging Face folder, and from rank shards cut for their layout.

A rank of every process reads its own byte ranges of the folder into its decoder, all at the same time, one thread of
torch each. Both folders take turns; each is read cold (taken out of the page cache before) and then warm. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from megalite.convert.convert import convert, parse_layout
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.monitor.words import format_bytes
from megalite.tools.benchmarks.convert import evict, generate, total_size
from megalite.tools.toolkit import say_time_left
from megalite.weights.transfer import build, load_folder

FORMS = {"Hugging Face folder": "model", "rank shards": "cut"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=float, default=4.0, help="GB of random weights (default: %(default)s)")
    parser.add_argument("--layout", default="tp=2", help="of the ranks that load (default: %(default)s)")
    parser.add_argument("--folder", help="where to work, with twice the model's size free (default: a new one)")
    parser.add_argument("--rounds", type=int, default=5, help="times each folder is read (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with tempfile.TemporaryDirectory(prefix="megalite-bench-", dir=args.folder) as name:
        folder = Path(name)
        size = total_size(generate(folder / "model", args.size))
        convert(folder / "model", layout, folder / "cut")
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.spawn(rank_main, (folder, layout, args.rounds), layout.size)
        seconds = json.loads((folder / "seconds").read_text())
    print(f"{format_bytes(size)}, {layout}, medians of {args.rounds} rounds\n")
    print("| loaded from | cold, seconds | warm, seconds |\n|---|---|---|")
    for form, found in seconds.items():
        print(f"| {form} | {statistics.median(found['cold']):.2f} | {statistics.median(found['warm']):.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(seconds, indent=1) + "\n")
    return 0


def rank_main(rank: int, folder: Path, layout: Layout, rounds: int) -> None:
    """Load again and again; rank 0 writes down how long all of them took."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, patience = f"file://{folder}/store", timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=layout.size, timeout=patience)
    model = families.read(folder / "model")
    decoder = build(model, ParallelState(layout), dtype=torch.bfloat16, device=torch.device("cpu"))
    for param in decoder.parameters():
        param.data.zero_()  # so that no round pays for memory that was never touched
    seconds: dict[str, dict[str, list[float]]] = {form: {"cold": [], "warm": []} for form in FORMS}
    for number in range(rounds):
        start = time.monotonic()
        for form, name in FORMS.items():
            if rank == 0:
                evict(folder / name)
            for state in ("cold", "warm"):
                dist.barrier()
                began = time.monotonic()
                load_folder(decoder, folder / name)
                dist.barrier()
                seconds[form][state].append(time.monotonic() - began)
        if rank == 0:
            say_time_left(time.monotonic() - start, rounds - number - 1)
    if rank == 0:
        (folder / "seconds").write_text(json.dumps(seconds))
    dist.destroy_process_group()
