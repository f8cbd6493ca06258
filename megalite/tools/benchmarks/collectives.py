"""all_gather beside all_reduce: two linear layers, hidden to intermediate and back, cut over ranks in four ways.

Column-parallel: every rank has all inputs and some output columns of the weight; an all_gather puts the columns
together, and a rank receives (p - 1)/p of the output. Row-parallel: every rank has some inputs and their rows of the
weight, so each has a part of every sum; an all_reduce adds them, and a rank receives twice as much, 2 (p - 1)/p of the
output. But what a column-parallel layer puts out, left in columns, is just what a row-parallel layer takes in: in that
pair nothing is sent between them, and the one all_reduce is of the narrow output (arXiv 1909.08053, figure 3).

Bytes are what a rank receives in a ring. Each way is checked against the uncut layers. Medians, in milliseconds, of the
collectives (waiting for a slower rank included) and of all.

example:
  python tools/bench.py collectives --ranks 2 --tokens 1 64 1024
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.collectives import gather_columns, leave_tp, prepare_sums
from megalite.core.layout import Even, Layout, width
from megalite.core.parallel_state import ParallelState
from megalite.kernels.device import synchronize, timing_event
from megalite.monitor.collector import Meter
from megalite.monitor.words import format_bytes
from megalite.tools import toolkit
from megalite.tools.benchmarks.frame import head, join, row, spawn, write_figures

ITEM = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Figures:
    """One way on some tokens."""

    tokens: int
    way: str
    received: int
    """Bytes, by a rank in a ring."""
    collectives: float
    """Seconds; likewise of products and collectives together, as the collector of a run measures them."""
    whole: float


def add_arguments(parser: toolkit.Parser) -> None:
    parser.add_argument("--ranks", type=toolkit.positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each rank, over NCCL")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the stream (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=4096, help="width between (default: %(default)s)")
    text = "rows of the input (default: %(default)s)"
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256], help=text)
    parser.add_argument("--rounds", type=toolkit.positive, default=20, help="(default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="megalite-bench-") as folder:
        spawn(rank_main, args.ranks, folder, args, fork=args.device == "cpu")
        figures = [Figures(**one) for one in json.loads(Path(folder, "figures").read_text())]
    dtype = str(ITEM[args.device]).removeprefix("torch.")
    print(f"{args.hidden} > {args.intermediate} > {args.hidden}, {dtype}, {args.ranks} ranks, {args.device}\n")
    print(head("tokens", "way", "received", "collectives", "bytes/s", "with products"))
    for one in figures:
        rate = format_bytes(int(one.received / one.collectives)) + "/s" if one.received and one.collectives else "-"
        times = f"{1000 * one.collectives:.3f}", rate, f"{1000 * one.whole:.3f}"
        print(row(one.tokens, one.way, format_bytes(one.received), *times))
    write_figures([asdict(one) for one in figures], args.json)
    return 0


class Layers:
    """This rank's parts of both weights, and the ways to apply them: inputs [T, hidden] -> outputs [T, hidden]."""

    def __init__(self, state: ParallelState, hidden: int, intermediate: int, device: torch.device):
        torch.manual_seed(0)
        dtype = ITEM[device.type]
        self.state, self.axis = state, state.tp
        axis = self.axis
        self.up = (torch.randn(hidden, intermediate) / hidden**0.5).to(device, dtype)
        self.down = (torch.randn(intermediate, hidden) / intermediate**0.5).to(device, dtype)
        self.wide, self.narrow = Even(intermediate), Even(hidden)
        lo, hi = self.wide.range(axis.size, axis.rank)
        first, last = self.narrow.range(axis.size, axis.rank)
        self.up_columns, self.down_rows = self.up[:, lo:hi].contiguous(), self.down[lo:hi].contiguous()
        self.up_rows, self.down_columns = self.up[first:last].contiguous(), self.down[:, first:last].contiguous()
        self.mine, self.mine_wide = slice(first, last), slice(lo, hi)

    def column_column(self, x: Tensor) -> Tensor:
        wide = self._gathered(x @ self.up_columns, self.wide)
        return self._gathered(wide @ self.down_columns, self.narrow)

    def row_row(self, x: Tensor) -> Tensor:
        wide = leave_tp(x[:, self.mine] @ self.up_rows, self.state)
        return leave_tp(wide[:, self.mine_wide] @ self.down_rows, self.state)

    def row_column(self, x: Tensor) -> Tensor:
        wide = leave_tp(x[:, self.mine] @ self.up_rows, self.state)
        return self._gathered(wide @ self.down_columns, self.narrow)

    def column_row(self, x: Tensor) -> Tensor:
        return leave_tp((x @ self.up_columns) @ self.down_rows, self.state)

    def _gathered(self, part: Tensor, split: Even) -> Tensor:
        return gather_columns(part, [width(split, self.axis.size, rank) for rank in range(self.axis.size)], self.axis)


def ways(layers: Layers) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int]]]:
    """By what they do: how, and columns that are gathered and that are reduced, for a token."""
    hidden, intermediate = layers.up.shape
    return {
        "column, all_gather; column, all_gather": (layers.column_column, (intermediate + hidden, 0)),
        "row, all_reduce; row, all_reduce": (layers.row_row, (0, intermediate + hidden)),
        "row, all_reduce; column, all_gather": (layers.row_column, (hidden, intermediate)),
        "column; row, all_reduce": (layers.column_row, (0, hidden)),
    }


def rank_main(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Every way on every number of tokens; rank 0 writes down how long it took."""
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join(folder, rank, args.ranks, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    state = ParallelState(Layout(tp=args.ranks))
    if device.type == "cuda":
        state.meter.watch_device(timing_event)
    layers = Layers(state, args.hidden, args.intermediate, device)
    for columns in (args.hidden, args.intermediate):
        prepare_sums(state.tp, width=columns, dtype=ITEM[device.type], device=device)
    figures = []
    with torch.inference_mode():
        for tokens in args.tokens:
            x = torch.randn(tokens, args.hidden, generator=torch.Generator().manual_seed(1)).to(device, layers.up.dtype)
            wanted = (x @ layers.up) @ layers.down
            for name, (way, (gathered, reduced)) in ways(layers).items():
                torch.testing.assert_close(way(x), wanted, rtol=0.05, atol=0.05)
                collectives, whole = timed(partial(way, x), args.rounds, state.meter, device)
                share = tokens * x.element_size() * (args.ranks - 1) / args.ranks
                received = int(share * (gathered + 2 * reduced))
                figures.append(asdict(Figures(tokens, name, received, collectives, whole)))
    if rank == 0:
        Path(folder, "figures").write_text(json.dumps(figures))
    dist.destroy_process_group()


def timed(work: Callable[[], Tensor], rounds: int, meter: Meter, device: torch.device) -> tuple[float, float]:
    """Seconds of collectives and of everything, medians; all ranks begin together."""
    found = []
    for _ in range(rounds + 1):
        dist.barrier()
        synchronize(device)
        meter.start()
        work()
        synchronize(device)
        meter.stop()
        report = meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 0))
        found.append((report.spent("communication"), report.seconds))
    collectives, whole = zip(*found[1:], strict=True)
    return statistics.median(collectives), statistics.median(whole)
