"""How long ranks take to load a model: from its Hugging Face folder, and from rank shards cut for their layout.

A rank of every process reads its own byte ranges of the folder into its decoder, on the CPU or on a GPU, all at the
same time, one thread of torch each. Beside that stands a plain read: the ranks share out the bytes of the folder's
files and read them into memory of the host, in order, by as many threads in requests of 16 MiB, and do nothing with
them. All take turns; each folder is read cold (taken out of the page cache before) and then warm. Medians, and the
median of the rounds' ratios: 1 is as fast as the plain read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.convert.convert import convert, parse_layout
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.kernels.device import synchronize
from megalite.model import families
from megalite.monitor.words import format_bytes
from megalite.tools.benchmarks.convert import evict, generate, total_size
from megalite.tools.benchmarks.frame import head, join, row, spawn, write_figures
from megalite.tools.toolkit import say_time_left
from megalite.weights.transfer import READERS, build, load_folder

FORMS = {"Hugging Face folder": "model", "rank shards": "cut"}
REQUEST = 16 << 20
"""Bytes of one request of a plain read."""
STATES = ("cold", "warm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=float, default=4.0, help="GB of random weights (default: %(default)s)")
    parser.add_argument("--layout", default="tp=2", help="of the ranks that load (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the weights go")
    parser.add_argument("--folder", help="where to work, with twice the model's size free (default: a new one)")
    parser.add_argument("--rounds", type=int, default=5, help="times each folder is read (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    layout = parse_layout(args.layout)
    with tempfile.TemporaryDirectory(prefix="megalite-bench-", dir=args.folder) as name:
        folder = Path(name)
        size = total_size(generate(folder / "model", args.size))
        convert(folder / "model", layout, folder / "cut")
        spawn(rank_main, layout.size, folder, layout, args.device, args.rounds)
        seconds = json.loads((folder / "seconds").read_text())
    print(f"{format_bytes(size)}, {layout}, {args.device}, medians of {args.rounds} rounds\n")
    print(head("loaded from", "state", "seconds", "plain read", "ratio"))
    for form, found in seconds.items():
        for state in STATES:
            loads, plain = found[state], found[f"{state}, plain"]
            ratio = statistics.median(b / a for a, b in zip(loads, plain, strict=True))
            medians = statistics.median(loads), statistics.median(plain)
            print(row(form, state, *(f"{one:.2f}" for one in (*medians, ratio))))
    write_figures(seconds, args.json)
    return 0


def rank_main(rank: int, folder: Path, layout: Layout, kind: str, rounds: int) -> None:
    """Load again and again; rank 0 writes down how long all of them took."""
    join(folder, rank, layout.size)
    model = families.read(folder / "model")
    device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
    decoder = build(model, ParallelState(layout), dtype=torch.bfloat16, device=device)
    for param in decoder.parameters():
        param.data.zero_()  # so that no round pays for memory that was never touched
    seconds: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}

    def timed(work: Callable[[], None]) -> float:
        synchronize(device)
        dist.barrier()
        began = time.monotonic()
        work()
        synchronize(device)
        dist.barrier()
        return time.monotonic() - began

    for number in range(rounds):
        start = time.monotonic()
        for form, name in FORMS.items():
            plain = partial(read_plainly, folder / name, rank, layout.size)
            load = partial(load_folder, decoder, folder / name)
            for what, work in (("", load), (", plain", plain)) if number % 2 else ((", plain", plain), ("", load)):
                if rank == 0:
                    evict(folder / name)
                for state in STATES:
                    seconds[form].setdefault(state + what, []).append(timed(work))
        if rank == 0:
            say_time_left(time.monotonic() - start, rounds - number - 1)
    if rank == 0:
        (folder / "seconds").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def read_plainly(folder: Path, rank: int, ranks: int) -> None:
    """Read this rank's share of the bytes of a folder's weight files."""
    pieces = [
        (path, offset)
        for path in sorted(folder.glob("*.safetensors"))
        for offset in range(0, path.stat().st_size, REQUEST)
    ]
    mine = pieces[len(pieces) * rank // ranks : len(pieces) * (rank + 1) // ranks]
    opened = {path: os.open(path, os.O_RDONLY) for path, _ in mine}

    def read(thread: int) -> None:
        buffer = bytearray(REQUEST)
        for path, offset in mine[thread::READERS]:
            os.preadv(opened[path], [buffer], offset)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    for descriptor in opened.values():
        os.close(descriptor)
