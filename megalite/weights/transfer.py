"""Fills a decoder with weights: from a checkpoint by byte ranges, or at random. Every piece goes through `owned`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megalite.core.parallel_state import ParallelState
from megalite.errors import maybe_fault
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.weights import shards
from megalite.weights.hf import check_names, open_checkpoint
from megalite.weights.mapping import Owned, Piece, owned

__all__ = [
    "DTYPES",
    "WeightSource",
    "build",
    "check_names",
    "initialise",
    "load",
    "load_folder",
    "random_matrix",
    "twin",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INIT_STD = 0.02
"""Standard deviation of new weights (GPT-2, Llama)."""


class TensorInfo(Protocol):
    """What is known of a stored tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int


class WeightSource(Protocol):
    """Anything that gives ranges of Hugging Face tensors."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, dim: int, lo: int, hi: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) lo..hi of a stored tensor, in its stored dtype."""


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


def load_folder(decoder: Decoder, folder: str | Path) -> None:
    """Fill a decoder from a folder in Hugging Face layout, or of rank shards such as a training state.

    CheckpointError if the folder is damaged, is of another model or is cut for another layout.
    """
    if shards.is_sharded(folder):
        shards.load(decoder, folder)
        return
    prefix = families.weight_names(decoder.config).prefix
    with open_checkpoint(folder, prefix=prefix) as checkpoint:
        check_names(decoder.config, checkpoint, str(folder))
        load(decoder, checkpoint)


@torch.no_grad()
def load(decoder: Decoder, source: WeightSource) -> None:
    """Read this rank's ranges, and only those, into the decoder; one tensor is in flight at a time."""
    state = decoder.state
    filled = _Filled(decoder)
    parts = list(owned(decoder.config, state.layout, state.rank))
    parts.sort(key=lambda part: (source.tensors[part.piece.hf].file, source.tensors[part.piece.hf].offset))
    for part in parts:  # in file order: disks and caches like that
        maybe_fault("weights.read", state.rank)
        values = source.read(part.piece.hf, part.piece.hf_dim, part.lo, part.hi)
        filled.target(part).copy_(values.t() if part.piece.transpose else values)
    filled.check()


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
