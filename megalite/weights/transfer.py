"""Fills a decoder with weights: from a checkpoint of any form and layout, by byte ranges, or at random.

The weight table's `owned` says which ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.core.linear import Linear
from megalite.core.parallel_state import ParallelState
from megalite.core.progress import here
from megalite.errors import maybe_fault
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.model.layers.softmax import Attention
from megalite.weights.checkpoint import extents_for
from megalite.weights.copying import OpenFiles, in_parallel, matrices, overlap
from megalite.weights.dtypes import torch_dtype
from megalite.weights.manifest import Manifest
from megalite.weights.moves import Extent, Move, by_part, reading
from megalite.weights.table import Piece, Range, Weights, expected, owned
from megalite.weights.upload import InPlace, Ring, uploading

INIT_STD = 0.02
"""Standard deviation of new weights (GPT-2, Llama)."""
READERS = 4
"""Threads that read a rank's files."""
FEW_BYTES = 1 << 20
"""So many are read by the thread that asks."""


def build(config: ModelConfig, state: ParallelState, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """This rank's stage with uninitialised parameters; follow with `load_folder` or `initialise`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Decoder(config, state)
    finally:
        torch.set_default_dtype(before)


def twin(decoder: Decoder, state: ParallelState) -> Decoder:
    """Another decoder of the same stage over the very parameters of `decoder`, with the groups of `state`."""
    weight = decoder.some_weight
    other = build(decoder.config, state, dtype=weight.dtype, device=torch.device("meta"))
    for path, module in other.named_modules():
        own = decoder.get_submodule(path)
        module._parameters = dict(own._parameters)
        if isinstance(module, Linear) and isinstance(own, Linear):
            module.format = own.format  # with its adapters, and as the weight was settled
        elif isinstance(module, Attention) and isinstance(own, Attention):
            module.spec = own.spec  # with scales of a cache in fp8
    return other


def load_folder(decoder: Decoder, folder: str | Path, *, whole: bool = False) -> None:
    """Fill a decoder from a folder in Hugging Face layout, or of rank shards of any layout, such as a training state.

    A rank reads its own ranges and no others. Ranges of rank shards are checked against their digests where all of one
    is needed; with `whole` all of it is always read. CheckpointError: the folder is damaged or of another model.
    """
    here.step = ("loading weights", None)
    state = decoder.state
    place = (decoder.config, state.layout, state.rank)
    fill(dict(decoder.named_parameters()), owned(*place), extents_for(Path(folder), *place), whole=whole)


@torch.no_grad()
def fill(params: Mapping[str, Tensor], ranges: Iterable[Range], extents: Iterable[Extent], *, whole: bool) -> None:
    """Read the `ranges` of local parameters, by name, from the files that `extents`, all of one kind, lie in.

    Parameters may be of any dtype and on any device. A few threads read the files in order: right into parameters on
    the CPU that have the dtype and the rows of the file; else a band of rows at a time, which a GPU copies while the
    next one is read. A matrix that the file holds turned (GPT-2) is in memory whole. `whole`: see `moves.reading`.
    """
    there = {part[:2]: mine for part, mine in by_part(extents).items()}
    filled = Filled(params)
    work: list[tuple[Move, Range, Tensor]] = []
    for one in ranges:
        view = filled.view(one)
        move = reading(there[one.piece.hf, one.piece.hf_start], one, whole=whole)
        work.append((move, one, view if view.ndim == 2 else view[:, None]))
    filled.check()
    work.sort(key=lambda item: item[0].place)
    with OpenFiles() as files, uploading({param.device for param in params.values()}) as rings:

        def copy(item: tuple[Move, tuple[Move, Range, Tensor]]) -> None:
            move, (_, one, view) = item
            maybe_fault("weights.read")
            if _lies_as_stored(move, one, view):
                for _ in matrices(files, move, one.dim, InPlace(view)):
                    pass
            else:
                _copy(files, move, one, view, rings.get(view.device))

        # In a forked process the first thread that computes starts torch's threads anew, and only one may.
        torch.set_num_threads(torch.get_num_threads())
        items = zip(files.expecting([move for move, *_ in work]), work, strict=True)
        if sum(view.nbytes for *_, view in work) <= FEW_BYTES:  # sooner read than threads are started
            for item in items:
                copy(item)
        else:
            in_parallel(copy, items, READERS)


def _lies_as_stored(move: Move, one: Range, view: Tensor) -> bool:
    """Whether the bytes that a move reads are exactly those of the view, in order, and the view is on the CPU."""
    same = (move.lo, move.hi, move.sources[0].range.dim) == (one.lo, one.hi, one.dim)
    return same and view.device.type == "cpu" and view.dtype == torch_dtype(move.dtype) and view.is_contiguous()


@torch.no_grad()
def _copy(files: OpenFiles, move: Move, one: Range, view: Tensor, ring: Ring | None) -> None:
    """Fill the view of a parameter that a range lies in; with `ring` a GPU copies a band while the next is read."""
    dtype = torch_dtype(move.dtype)
    with ring.copying() if ring is not None else nullcontext():
        for lo, hi, band in matrices(files, move, one.dim, *([ring] if ring is not None else [])):
            first, rows, columns = overlap(one, move, lo, hi)
            values = torch.from_numpy(band.view(np.uint8)[rows]).view(dtype)
            held = ring is not None and ring.holds(band)
            view[first : first + len(values)].copy_(values[:, columns], non_blocking=held)
            if ring is not None and held:
                ring.copied()


def read_parameters(
    folder: Path, config: Weights, layout: Layout, rank: int, kind: str, manifest: Manifest | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and values, on the CPU and in the stored dtype, of each parameter that `rank` holds, one after the other.

    Out of rank shards of any layout, whose digests are all checked: a rank reads each range whole of which it needs
    some rows. With twice the tp of the files that is twice the bytes. `manifest`: see `extents_for`. CheckpointError
    if a file is damaged.
    """
    extents = by_part(extents_for(folder, config, layout, rank, kind, manifest))
    for name, (shape, ranges) in expected(config, layout, rank).items():
        mine = [extent for one in ranges for extent in extents[one.piece.hf, one.piece.hf_start, kind]]
        values = torch.empty(shape, dtype=torch_dtype(mine[0].info.dtype))
        fill({name: values}, ranges, mine, whole=True)
        yield name, values


@torch.no_grad()
def initialise(decoder: Decoder, seed: int, *, std: float = INIT_STD) -> None:
    """New weights: normal(0, std) matrices, unit norms, zero biases; the same whole model in every layout."""
    state = decoder.state
    filled = Filled(dict(decoder.named_parameters()))
    for one in owned(decoder.config, state.layout, state.rank):
        view = filled.view(one)
        if not one.piece.other:
            if one.piece.spread is not None:
                whole = torch.linspace(*one.piece.spread, one.piece.split.total, device=view.device)
                view.copy_(whole.narrow(0, one.lo - one.piece.hf_start, one.count))
                continue
            is_norm = one.piece.param.endswith("norm.weight")
            view.fill_(1.0 if is_norm and not decoder.config.zero_centred else 0.0)
            continue
        own = std if one.piece.std is None else one.piece.std
        values = random_matrix(one.piece, seed, view.device, std=own)
        view.copy_(values.narrow(one.dim, one.lo - one.piece.hf_start, one.count))
    filled.check()


def random_matrix(piece: Piece, seed: int, device: torch.device, *, std: float = INIT_STD) -> Tensor:
    """The whole matrix behind a piece, oriented as the local parameter: a function of its name and the seed alone."""
    whole = _whole_matrix(piece, device)
    return whole.normal_(0.0, std, generator=_generator(piece, seed, device))


def uniform_matrix(piece: Piece, seed: int, device: torch.device, *, bound: float) -> Tensor:
    """As `random_matrix`, uniform from -bound to bound."""
    whole = _whole_matrix(piece, device)
    return whole.uniform_(-bound, bound, generator=_generator(piece, seed, device))


def _whole_matrix(piece: Piece, device: torch.device) -> Tensor:
    return torch.empty(piece.shape(piece.dim, piece.split.total), dtype=torch.float32, device=device)


def _generator(piece: Piece, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{piece.hf}:{piece.hf_start}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


class Filled:
    """Counts what is written, so that no element of any parameter is left uninitialised."""

    def __init__(self, params: Mapping[str, Tensor]):
        self.params = params
        self.left = {name: param.numel() for name, param in params.items()}

    def view(self, one: Range) -> Tensor:
        """The view of a local parameter that a range fills; counts it as filled."""
        name = one.piece.param
        self.left[name] -= one.elements
        return self.params[name].detach().narrow(one.dim, one.start, one.count)

    def check(self) -> None:
        gaps = {name: left for name, left in self.left.items() if left}
        assert not gaps, f"the weight table does not fill {gaps}"
