"""Weights from one layout to another in memory: `Sync` beside gathering every tensor and slicing it.

Starts four ranks on this machine, joined by gloo, with one thread each. A random Llama in bfloat16 is built in both
layouts of every pair; both ways take turns and medians are printed. The usual way beside it: whoever holds a slice of
a tensor broadcasts it, every rank puts the whole tensor together and cuts out its own part. Sync's time is without the
comparison of all weights that may follow it, which has a column of its own. Seconds and bytes are those of the rank
that takes most; `lacks` is what a rank has to get at least, `needs` is memory beyond the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.hybrid.sync import Sync
from megalite.model.config import ModelConfig, Rope
from megalite.model.decoder import Decoder
from megalite.model.kinds.base import transformer_layer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.monitor.words import format_bytes
from megalite.tools.benchmarks.frame import head, join, row, spawn, write_figures
from megalite.tools.toolkit import say_time_left
from megalite.weights.reshard_plan import least_received
from megalite.weights.table import Range, local_elements, owned
from megalite.weights.transfer import build, initialise

RANKS = 4
MIB = 1 << 20
COLUMNS = ("moves: sync", "gather", "takes: sync", "gather", "ratio", "verify", "needs: sync", "gather")
CPU = torch.device("cpu")
PAIRS = (
    (Layout(2, 2, 1), Layout(4, 1, 1)),
    (Layout(2, 1, 2), Layout(4, 1, 1)),
    (Layout(4, 1, 1), Layout(2, 1, 2)),
    (Layout(1, 1, 4), Layout(4, 1, 1)),
    (Layout(2, 2, 1), Layout(1, 1, 4)),
    (Layout(2, 1, 1), Layout(2, 1, 1, first_rank=2)),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one rank and one pair of layouts: medians of seconds, and bytes."""

    pair: str
    sync: float
    verify: float
    gather: float
    least: int
    """Bytes of what the rank lacks."""
    received: int
    gather_received: int
    buffer: int
    gather_buffer: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8, help="of a model of hidden size 1024 (default: %(default)s)")
    parser.add_argument("--bucket", type=float, default=32, help="MiB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times each way runs (default: %(default)s)")
    parser.add_argument("--json", help="write the figures of all ranks here")


def run(args: argparse.Namespace) -> int:
    if args.layers < 2:
        raise ConfigError(Problem(key="--layers", value=args.layers, rule="must be >= 2: some layouts have two stages"))
    with tempfile.TemporaryDirectory(prefix="megalite-bench-") as folder:
        spawn(rank_main, RANKS, folder, args.layers, int(args.bucket * MIB), args.rounds, fork=True)
        figures = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    size = local_elements(model_of(args.layers), Layout(), 0) * 2
    bucket = format_bytes(int(args.bucket * MIB))
    print(f"{format_bytes(size)} of weights, buckets of {bucket}, {RANKS} ranks, {args.rounds} rounds\n")
    print_table(figures)
    write_figures(figures, args.json)
    return 0


def print_table(figures: list[list[dict[str, Any]]]) -> None:
    """`figures`: by rank, then by pair."""
    print(head("layouts", "lacks", *COLUMNS))
    for ranks in zip(*figures, strict=True):
        most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        worst = max((rank["received"] / rank["least"] for rank in ranks if rank["least"]), default=1.0)
        least, received, gathered, buffer, other = (
            format_bytes(most[key]) for key in ("least", "received", "gather_received", "buffer", "gather_buffer")
        )
        sync, gather, verify = (f"{most[key]:.3f} s" for key in ("sync", "gather", "verify"))
        ratio = f"{most['gather'] / most['sync']:.1f}"
        moved = f"{received} ({worst:.2f}x)"
        print(row(most["pair"], least, moved, gathered, sync, gather, ratio, verify, buffer, other))


def model_of(layers: int) -> ModelConfig:
    """With 8 layers, 238 MiB in bfloat16."""
    head = 64
    attention = SoftmaxAttention(heads=16, kv_heads=8, head_dim=head, scale=head**-0.5, rope=Rope(rotary_dim=head))
    return ModelConfig(
        family="llama",
        vocab_size=16384,
        hidden_size=1024,
        max_position_embeddings=128,
        layers=(transformer_layer(attention, DenseMLP(intermediate_size=2688)),) * layers,
        tie_embeddings=False,
    )


# ---- one rank --------------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: str, layers: int, bucket_bytes: int, rounds: int) -> None:
    """A rank's life: every pair of layouts, then its figures in a file."""
    join(folder, rank, RANKS)
    model = model_of(layers)
    figures = []
    for number, pair in enumerate(PAIRS):
        began = time.monotonic()
        figures.append(vars(measure(rank, model, *pair, bucket_bytes, rounds)))
        if rank == 0:
            say_time_left(time.monotonic() - began, len(PAIRS) - number - 1)
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def measure(rank: int, model: ModelConfig, source: Layout, target: Layout, bucket_bytes: int, rounds: int) -> Figures:
    decoders = [
        None if state is None else build(model, state, dtype=torch.bfloat16, device=CPU)
        for state in (ParallelState.join(layout) for layout in (source, target))
    ]
    training, generating = decoders
    if training is not None:
        initialise(training, seed=0)
    sync = Sync(model, training, generating, source, target, bucket_bytes=bucket_bytes)
    gather = Gather(model, training, generating, source, target)
    seconds: dict[str, list[float]] = {"sync": [], "verify": [], "gather": []}
    for _ in range(rounds + 1):  # the first of each is to warm up
        with filled(generating):
            dist.barrier()
            sync.push()
        seconds["sync"].append(sync.last.moving)
        seconds["verify"].append(sync.last.verifying)
        with filled(generating):
            seconds["gather"].append(timed(gather.run))
    return Figures(
        pair=f"{source} to {target}",
        **{key: statistics.median(values[1:]) for key, values in seconds.items()},
        least=least_received(model, source, target).get(rank, 0) * 2,
        received=sync.received_bytes,
        gather_received=gather.received,
        buffer=sync.buffer_bytes,
        gather_buffer=gather.buffer,
    )


def timed(work: Callable[[], None]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def filled(decoder: Decoder | None) -> Iterator[None]:
    """Fails if what happens meanwhile leaves an element of the decoder as it was."""
    params = [] if decoder is None else [param.data for param in decoder.parameters()]
    for param in params:
        param.fill_(float("nan"))
    yield
    assert not any(param.isnan().any() for param in params), "weights are missing"


class Gather:
    """The usual way: every tensor whole on every rank, one after another."""

    def __init__(
        self, model: ModelConfig, training: Decoder | None, generating: Decoder | None, source: Layout, target: Layout
    ):
        self.rank = dist.get_rank()
        self.params = [dict(decoder.named_parameters()) if decoder else {} for decoder in (training, generating)]
        self.senders: dict[str, list[tuple[int, Range]]] = {}
        """Of each tensor: the ranks of the first replica that hold its parts, each part once."""
        seen = set()
        for rank in source.replicas()[0]:
            for part in owned(model, source, rank):
                key = part.piece.hf, part.lo, part.hi
                if key not in seen:
                    self.senders.setdefault(part.piece.hf, []).append((rank, part))
                seen.add(key)
        self.mine: dict[str, list[Range]] = {}
        for part in owned(model, target, self.rank) if self.rank in target.ranks else ():
            self.mine.setdefault(part.piece.hf, []).append(part)
        self.received = self.buffer = 0

    @torch.no_grad()
    def run(self) -> None:
        self.received = 0
        for hf, senders in self.senders.items():
            piece = senders[0][1].piece
            shape = list(piece.other)
            shape.insert(piece.dim, max(part.hi for _, part in senders))
            whole = torch.empty(shape, dtype=torch.bfloat16)
            for rank, part in senders:
                shape[piece.dim] = part.hi - part.lo
                if rank == self.rank:
                    message = self._local(0, part).contiguous()
                else:
                    message = torch.empty(shape, dtype=torch.bfloat16)
                    self.received += message.nbytes
                dist.broadcast(message, rank)
                whole.narrow(piece.dim, part.lo, part.hi - part.lo).copy_(message)
                self.buffer = max(self.buffer, whole.nbytes + message.nbytes)
            for part in self.mine.get(hf, ()):
                self._local(1, part).copy_(whole.narrow(piece.dim, part.lo, part.hi - part.lo))

    def _local(self, side: int, part: Range) -> torch.Tensor:
        return self.params[side][part.piece.param].narrow(part.piece.dim, part.start, part.hi - part.lo)
