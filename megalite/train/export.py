"""Writes a decoder in training as a model in Hugging Face layout, one parameter in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.progress import here
from megalite.errors import maybe_fault
from megalite.files import DurableFile, as_json
from megalite.model.decoder import Decoder
from megalite.model.generation import NAME as GENERATION
from megalite.train.zero import WEIGHT, get_whole
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.dtypes import SAFETENSORS, torch_dtype
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.hf import SINGLE
from megalite.weights.shards import stored_layout
from megalite.weights.side_files import SideFiles, beside, is_of_tokenizer, of_tokenizer, with_dtype, write
from megalite.weights.table import Range, Weights, expected, hf_shapes, pieces
from megalite.weights.tensor_file import new_header

SMALL_BYTES = 64 << 20
"""Files up to this size are kept in memory."""


def export_model(decoder: Decoder, path: Path, dtype: torch.dtype, adapter: AdapterTable | None = None) -> None:
    """Write the float32 weights, rounded to `dtype`, as one safetensors file under Hugging Face names.

    `adapter`: of the adapters that are meant instead, under PEFT's names.
    Collective: the ranks of the first replica send what they hold to its first rank, which writes. It holds one
    parameter at a time, and one rank's share of it.
    """
    state = decoder.state
    table: Weights = adapter or decoder.config
    tensors = _whole_tensors(decoder, table, dtype)
    if state.rank != state.layout.first_rank:
        for _ in tensors:
            raise AssertionError("only the first rank puts tensors together")
        return
    shapes = hf_shapes(table)
    order = [name for names in _tensors_of_parameters(table).values() for name in names]
    entries = {name: (SAFETENSORS[str(dtype).removeprefix("torch.")], shapes[name]) for name in order}
    with DurableFile(path) as file:
        file.write(new_header(path, entries, {"format": "pt"})[0])
        for tensor in tensors:
            file.write(as_bytes(tensor))
        maybe_fault("export.save", state.rank)


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's elements in row-major order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def _tensors_of_parameters(config: Weights) -> dict[str, dict[str, None]]:
    """The Hugging Face tensors behind each parameter, over all ranks. A tied embedding is that of the first stage."""
    names: dict[str, dict[str, None]] = {}
    for piece in pieces(config):
        if not (config.tie_embeddings and piece.param == "head.weight"):
            names.setdefault(piece.param, {})[piece.hf] = None
    return names


def _whole_tensors(decoder: Decoder, config: Weights, dtype: torch.dtype) -> Iterator[Tensor]:
    """Every Hugging Face tensor on the first rank of the first replica; nothing elsewhere. Collective."""
    replica = decoder.state.replica
    layout = stored_layout(decoder.state.layout)
    held = [expected(config, layout, rank) for rank in layout.ranks]
    shapes = hf_shapes(config)
    params = dict(decoder.named_parameters())
    for name, tensors in _tensors_of_parameters(config).items():
        mine = name in held[replica.rank]
        local = get_whole(params[name], WEIGHT).to("cpu", dtype) if mine else torch.empty(0)  # collective over dp
        if decoder.state.dp.rank > 0:
            continue
        if not replica.is_first:
            if mine:
                with here.track("weights", (replica.ranks[replica.rank], replica.ranks[0]), flow=True).entering("send"):
                    dist.send(local.contiguous(), replica.ranks[0], group=replica.group)
            continue
        whole = {hf: torch.empty(shapes[hf], dtype=dtype) for hf in tensors}
        for rank, ranges in zip(replica.ranks, held, strict=True):
            if name in ranges:
                shape, parts = ranges[name]
                if rank != decoder.state.rank:
                    local = torch.empty(shape, dtype=dtype)
                    with here.track("weights", (rank, replica.ranks[0]), flow=True).entering("receive"):
                        dist.recv(local, rank, group=replica.group)
                _place(local, parts, whole)
        yield from whole.values()


def _place(local: Tensor, parts: list[Range], whole: dict[str, Tensor]) -> None:
    """Copy one rank's share of a parameter to where it belongs."""
    for one in parts:
        values = local.narrow(one.dim, one.start, one.count)
        tensor = whole[one.piece.hf]
        if one.piece.stored:
            tensor = tensor.flatten(0, -2 if one.piece.other else -1)
        target = tensor.narrow(one.piece.hf_dim, one.lo, one.count)
        target.copy_(values.t() if one.piece.transpose else values)


def files_beside(base: ModelFolder) -> SideFiles:
    """What belongs beside weights that were trained from `base`, by name.

    All that goes along with the base's own weights but its model card, with the tokenizer of `base.tokenizer_path`.
    What is small is read now: the base may be gone when the training ends.
    """
    own = beside(base.path) if (base.path / CONFIG).exists() else {}
    found: SideFiles = {name: path for name, path in own.items() if name != "README.md" and not is_of_tokenizer(name)}
    found |= of_tokenizer(base.tokenizer_path)
    for name, file in found.items():
        if isinstance(file, Path) and file.stat().st_size <= SMALL_BYTES:
            found[name] = file.read_bytes()
    return {**found, CONFIG: as_json(base.values).encode(), GENERATION: base.generation.to_bytes()}


def export_folder(decoder: Decoder, folder: Path, base: ModelFolder, files: SideFiles, dtype: str) -> None:
    """Make `folder` hold the present model, trained from `base`, with its `files_beside`. Collective."""
    if decoder.state.rank == decoder.state.layout.first_rank:
        write({**files, CONFIG: as_json(with_dtype(base.values, dtype)).encode()}, folder)
    export_model(decoder, folder / SINGLE, torch_dtype(dtype))
