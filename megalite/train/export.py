"""Writes a decoder in training as a model in Hugging Face layout, one parameter in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import maybe_fault
from megalite.files import DurableFile, write_durably
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.tokenizer import TOKENIZER_FILES
from megalite.train.zero import WEIGHT, get_whole
from megalite.weights.hf import SINGLE
from megalite.weights.mapping import Owned, hf_shapes, pieces
from megalite.weights.shards import expected, stored_layout
from megalite.weights.tensor_file import new_header
from megalite.weights.transfer import DTYPES

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


def model_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the model with weights in `dtype`."""
    return {**config, "dtype": dtype}


def files_beside(config: dict[str, Any], model: ModelConfig, dtype: str, tokenizer_folder: Path) -> dict[str, bytes]:
    """What a model folder holds beside weights in `dtype`, by name."""
    ends = list(model.eos_token_ids)
    end = ends[0] if len(ends) == 1 else ends
    generation = {"eos_token_id": end, "pad_token_id": ends[0], "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    files = {"config.json": model_config(config, dtype), "generation_config.json": generation}
    found = {name: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode() for name, values in files.items()}
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            found[name] = (tokenizer_folder / name).read_bytes()
    return found


def export_folder(decoder: Decoder, folder: Path, files: Mapping[str, bytes], dtype: str) -> None:
    """Make `folder` hold the present model, with `files` beside its weights. Collective."""
    if decoder.state.rank == decoder.state.layout.first_rank:
        for name, content in files.items():
            write_durably(folder / name, content)
    export_model(decoder, folder / SINGLE, DTYPES[dtype])
