"""Writes a decoder in training as a model in Hugging Face layout, one parameter in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import maybe_fault
from megalite.files import DurableFile
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.model.generation import NAME as GENERATION
from megalite.train.zero import WEIGHT, get_whole
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.hf import SINGLE
from megalite.weights.shards import expected, stored_layout
from megalite.weights.side_files import Companions, as_json, beside, is_of_tokenizer, of_tokenizer, with_dtype, write
from megalite.weights.table import Owned, hf_shapes, pieces
from megalite.weights.tensor_file import new_header
from megalite.weights.transfer import DTYPES

SMALL_BYTES = 64 << 20
"""Files up to this size are kept in memory."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def export_model(decoder: Decoder, path: Path, dtype: torch.dtype) -> None:
    """Write the float32 weights, rounded to `dtype`, as one safetensors file under Hugging Face names.

    Collective: the ranks of the first replica send what they hold to its first rank, which writes. It holds one
    parameter at a time, and one rank's share of it.
    """
    state = decoder.state
    tensors = _whole_tensors(decoder, dtype)
    if state.rank != state.layout.first_rank:
        for _ in tensors:
            raise AssertionError("only the first rank puts tensors together")
        return
    shapes = hf_shapes(decoder.config)
    order = [name for names in _tensors_of_parameters(decoder.config).values() for name in names]
    entries = {name: (DTYPE_NAMES[dtype], shapes[name]) for name in order}
    with DurableFile(path) as file:
        file.write(new_header(path, entries, {"format": "pt"})[0])
        for _, tensor in tensors:
            file.write(as_bytes(tensor))
        maybe_fault("export.save", state.rank)


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's elements in row-major order."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _tensors_of_parameters(config: ModelConfig) -> dict[str, list[str]]:
    """The Hugging Face tensors behind each parameter, over all ranks. A tied embedding is that of the first stage."""
    names: dict[str, list[str]] = {}
    for piece in pieces(config):
        if piece.param == "head.weight" and config.tie_embeddings:
            continue
        mine = names.setdefault(piece.param, [])
        if piece.hf not in mine:
            mine.append(piece.hf)
    return names


def _whole_tensors(decoder: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor on the first rank of the first replica; nothing elsewhere. Collective."""
    config, state = decoder.config, decoder.state
    layout = stored_layout(state.layout)
    held = [expected(config, layout, rank) for rank in layout.ranks]
    shapes = hf_shapes(config)
    params = dict(decoder.named_parameters())
    for name, tensors in _tensors_of_parameters(config).items():
        local = get_whole(params[name], WEIGHT).to("cpu", dtype) if name in held[state.replica.rank] else None
        if state.dp.rank > 0:
            continue
        if not state.replica.is_first:
            if local is not None:
                dist.send(local.contiguous(), state.replica.ranks[0], group=state.replica.group)
            continue
        whole = {hf: torch.empty(shapes[hf], dtype=dtype) for hf in tensors}
        for rank, ranges in zip(state.replica.ranks, held, strict=True):
            if name not in ranges:
                continue
            shape, parts = ranges[name]
            if rank != state.rank:
                local = torch.empty(shape, dtype=dtype)
                dist.recv(local, rank, group=state.replica.group)
            _place(local, parts, whole)
        yield from whole.items()


def _place(local: Tensor, parts: list[Owned], whole: dict[str, Tensor]) -> None:
    """Copy one rank's share of a parameter to where it belongs."""
    for one in parts:
        values = local.narrow(one.piece.dim, one.start, one.hi - one.lo)
        target = whole[one.piece.hf].narrow(one.piece.hf_dim, one.lo, one.hi - one.lo)
        target.copy_(values.t() if one.piece.transpose else values)


def files_beside(base: ModelFolder) -> Companions:
    """What belongs beside weights that were trained from `base`, by name.

    All that goes along with the base's own weights but its model card, with the tokenizer of `base.tokenizer_path`.
    What is small is read now: the base may be gone when the training ends.
    """
    found: Companions = {}
    if (base.path / CONFIG).exists():
        found = {name: path for name, path in beside(base.path).items() if not is_of_tokenizer(name)}
        found.pop("README.md", None)
    found |= of_tokenizer(base.tokenizer_path)
    found = {name: path.read_bytes() if path.stat().st_size <= SMALL_BYTES else path for name, path in found.items()}
    return {**found, CONFIG: as_json(base.values), GENERATION: base.generation.to_bytes()}


def export_folder(decoder: Decoder, folder: Path, base: ModelFolder, files: Companions, dtype: str) -> None:
    """Make `folder` hold the present model, trained from `base`, with its `files_beside`. Collective."""
    if decoder.state.rank == decoder.state.layout.first_rank:
        write({**files, CONFIG: as_json(with_dtype(base.values, dtype))}, folder)
    export_model(decoder, folder / SINGLE, DTYPES[dtype])
