"""Fills a decoder with weights: out of a checkpoint of any form and layout by byte ranges, or at random.

Every piece goes through `owned`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import maybe_fault
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.weights.blocks import Blocks, Move, Part, reading, region_of
from megalite.weights.copying import Reading, in_parallel, matrices
from megalite.weights.manifest import WEIGHT
from megalite.weights.shards import expected
from megalite.weights.sources import blocks_for
from megalite.weights.table import Owned, Piece, owned
from megalite.weights.tensor_file import WEIGHT_DTYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INIT_STD = 0.02
"""Standard deviation of new weights (GPT-2, Llama)."""
READERS = 4
"""Threads that read a rank's files."""


@contextmanager
def _new_parameters(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(config: ModelConfig, state: ParallelState, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """This rank's stage with uninitialised parameters; follow with `load` or `initialise`."""
    with _new_parameters(dtype, device):
        decoder = Decoder(config, state)
    return decoder


def twin(decoder: Decoder, state: ParallelState) -> Decoder:
    """Another decoder of the same stage over the very parameters of `decoder`, with the groups of `state`."""
    weight = next(decoder.parameters())
    other = build(decoder.config, state, dtype=weight.dtype, device=torch.device("meta"))
    params = dict(decoder.named_parameters(remove_duplicate=False))
    for path, module in other.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            module.register_parameter(name, params[f"{path}.{name}"])
    return other


def load_folder(decoder: Decoder, folder: str | Path, *, whole: bool = False) -> None:
    """Fill a decoder from a folder in Hugging Face layout, or of rank shards of any layout, such as a training state.

    A rank reads its own ranges and no others, and what is read of shards is checked where a range is read whole.
    `whole`: it always is. CheckpointError if the folder is damaged or of another model.
    """
    state = decoder.state
    place = (decoder.config, state.layout, state.rank)
    fill(dict(decoder.named_parameters()), owned(*place), blocks_for(Path(folder), *place), whole=whole)


@torch.no_grad()
def fill(
    params: Mapping[str, Tensor], parts: Iterable[Owned], blocks: Blocks, *, kind: str = WEIGHT, whole: bool = False
) -> None:
    """Read local parameters, by name, which are made of `parts`, out of the files that `blocks` of `kind` lie in.

    They may be of any dtype and on any device. Files are read in order, by a few threads, each of which holds a band of
    rows; of a matrix that the file holds turned (GPT-2) the whole. `whole`: see `blocks.reading`.
    """
    work: list[tuple[Move, Tensor, int, int]] = []
    left = {name: param.numel() for name, param in params.items()}
    for one in parts:
        name = one.piece.param
        left[name] -= one.elements
        view = params[name].detach().narrow(one.piece.dim, one.start, one.hi - one.lo)
        part = Part(one.piece.hf, one.piece.hf_start, kind)
        move, row, column = reading(part, blocks[part], region_of(one), whole=whole)
        work.append((move, view if view.ndim == 2 else view[:, None], row, column))
    assert not any(left.values()), f"the weight table does not fill {[name for name, count in left.items() if count]}"
    work.sort(key=lambda item: (str(item[0].sources[0].file), item[0].sources[0].offset))  # disks and caches like that
    with Reading() as files:

        def copy(item: tuple[Move, tuple[Move, Tensor, int, int]]) -> None:
            move, (_, view, row, column) = item
            maybe_fault("weights.read")
            _copy(files, move, view, row, column)

        moves = files.expecting([move for move, *_ in work])
        in_parallel(copy, zip(moves, work, strict=True), READERS)


@torch.no_grad()
def _copy(files: Reading, move: Move, view: Tensor, row: int, column: int) -> None:
    """Fill `view` with the rows and columns of a move's matrix that begin at `row` and `column`."""
    rows, columns = view.shape
    dtype = getattr(torch, WEIGHT_DTYPES[move.dtype])
    for lo, hi, band in matrices(files, move):
        first, last = max(lo, row), min(hi, row + rows)
        if first < last:
            values = torch.from_numpy(band[first - lo : last - lo]).view(dtype)
            view[first - row : last - row].copy_(values[:, column : column + columns])


def read_parameters(
    folder: Path, config: ModelConfig, layout: Layout, rank: int, kind: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and values, on the CPU and in the stored dtype, of each parameter that `rank` holds, one after the other.

    Out of rank shards of any layout, whose digests are all checked: a rank reads each range whole of which it needs
    some rows. With twice the tp of the files that is twice the bytes. CheckpointError if a file is damaged.
    """
    blocks = blocks_for(folder, config, layout, rank, kind)
    for name, (shape, parts) in expected(config, layout, rank).items():
        source = blocks[Part(parts[0].piece.hf, parts[0].piece.hf_start, kind)][0]
        values = torch.empty(shape, dtype=getattr(torch, WEIGHT_DTYPES[source.dtype]))
        fill({name: values}, parts, blocks, kind=kind, whole=True)
        yield name, values


@torch.no_grad()
def initialise(decoder: Decoder, seed: int, *, std: float = INIT_STD) -> None:
    """New weights: normal(0, std) matrices, unit norms, zero biases; the same whole model in every layout."""
    state = decoder.state
    filled = _Filled(decoder)
    for part in owned(decoder.config, state.layout, state.rank):
        target = filled.target(part)
        if not part.piece.other:
            is_norm = part.piece.param.endswith("norm.weight")
            target.fill_(1.0 if is_norm and decoder.config.norm != "rms_zero_centred" else 0.0)
            continue
        values = random_matrix(part.piece, seed, target.device, std=std)
        target.copy_(values.narrow(part.piece.dim, part.lo - part.piece.hf_start, part.hi - part.lo))
    filled.check()


def random_matrix(piece: Piece, seed: int, device: torch.device, *, std: float = INIT_STD) -> Tensor:
    """The whole matrix behind a piece, oriented as the local parameter: a function of its name and the seed alone."""
    shape = list(piece.other)
    shape.insert(piece.dim, piece.split.total)
    digest = hashlib.blake2b(f"{seed}:{piece.hf}:{piece.hf_start}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)


class _Filled:
    """Counts what was written, so that no element of any parameter is left uninitialised."""

    def __init__(self, decoder: Decoder):
        self.params = dict(decoder.named_parameters(remove_duplicate=False))
        self.left = {name: param.numel() for name, param in decoder.named_parameters()}

    def target(self, part: Owned) -> Tensor:
        """The view of the local parameter that `part` fills."""
        name = part.piece.param
        self.left[name] -= part.elements
        return self.params[name].detach().narrow(part.piece.dim, part.start, part.hi - part.lo)

    def check(self) -> None:
        gaps = {name: left for name, left in self.left.items() if left}
        assert not gaps, f"the weight table does not fill {gaps}"
