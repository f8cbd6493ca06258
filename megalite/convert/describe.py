"""What a checkpoint is, in numbers: a Hugging Face folder, rank shards or training state. Importable without torch."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.weights.blocks import Block, Blocks, Move, plan
from megalite.weights.copying import Reading, matrices
from megalite.weights.dtypes import STORAGE, to_float
from megalite.weights.folder import ModelFolder
from megalite.weights.manifest import WEIGHT
from megalite.weights.sources import Source, open_source
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import DTYPE_BYTES


def describe(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Facts that JSON can hold. Sizes are bytes, `tensors` are the model's own, the largest first."""
    source = open_source(path, revision)
    shapes = hf_shapes(source.model)
    tensors = [
        {
            "name": name,
            "shape": list(shape),
            "dtype": source.dtypes[name],
            "bytes": math.prod(shape) * DTYPE_BYTES[source.dtypes[name]],
        }
        for name, shape in shapes.items()
    ]
    dtypes = Counter()
    for tensor in tensors:
        dtypes[tensor["dtype"]] += tensor["bytes"]
    return {
        "path": str(source.folder),
        "form": _form(source),
        "family": source.model.family,
        "architecture": families.FAMILIES[source.model.family].architecture,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "layers": source.model.num_layers,
        **_model(source.model),
        **_beside(source.beside),
        "layout": _layout(source) if source.form == "shards" else None,
        "bytes": source.nbytes,
        "dtypes": dict(dtypes.most_common()),
        "kinds": source.kinds,
        "files": _files(source),
        "tensors": sorted(tensors, key=lambda tensor: -tensor["bytes"]),
        "left_out": list(source.left_out),
        "training": _plain(source.manifest.training) if source.manifest else {},
        "notes": source.notes,
    }


def _model(model: ModelConfig) -> dict[str, Any]:
    """Its shape, in the words of a model card."""
    experts = next((moe for moe in model.moe if moe is not None), None)
    return {
        "hidden_size": model.hidden_size,
        "heads": {"query": model.num_heads, "key_value": model.num_kv_heads, "size": model.head_dim},
        "experts": {"count": experts.num_experts, "per_token": experts.top_k} if experts else None,
        "context": model.max_position_embeddings,
        "rope_scaling": model.rope.scaling.kind if model.rope and model.rope.scaling else None,
        "windows": sorted({spec.window for spec in model.attention if spec.window is not None}),
        "vocabulary": model.vocab_size,
        "tied_embeddings": model.tie_embeddings,
    }


def _beside(folder: ModelFolder) -> dict[str, Any]:
    """Tokenizer and generation settings; null for what there is none of, and what is wrong with a damaged one."""
    found: dict[str, Any] = {"end_tokens": [], "sampling": {}, "tokenizer": None, "chat_template": False}
    try:
        found["end_tokens"] = [{"id": token, "text": None} for token in folder.generation.eos_token_ids]
        found["sampling"] = folder.generation.sampling
        tokenizer = folder.tokenizer
    except CheckpointError as error:
        return {**found, "tokenizer": str(error)}
    if tokenizer is not None:
        found |= {"tokenizer": len(tokenizer), "chat_template": tokenizer.has_chat_template}
        for end in found["end_tokens"]:
            end["text"] = tokenizer.token_text(end["id"]) or None
    return found


def _form(source: Source) -> str:
    if source.form == "hf":
        return "Hugging Face folder"
    return "rank shards" if source.kinds == [WEIGHT] else "training state"


def _layout(source: Source) -> dict[str, int]:
    interleaved = {"interleave": source.layout.interleave} if source.layout.interleave > 1 else {}
    return {"tp": source.layout.tp, "pp": source.layout.pp, **interleaved}


def _files(source: Source) -> list[dict[str, Any]]:
    """Each weight file; of a rank file also which rank and layers."""
    found = []
    costs = source.model.layer_costs()
    for name, infos in source.files.items():
        entry: dict[str, Any] = {"name": name, "bytes": sum(info.nbytes for info in infos.values())}
        entry["tensors"] = len(infos)
        if source.manifest:
            stored = source.manifest.files[name]
            place = source.layout.coord(stored.rank)
            entry |= {"rank": stored.rank, "kind": stored.kind, "tp": place.tp, "pp": place.pp}
            entry["layers"] = [[chunk.start, chunk.stop] for chunk in source.layout.chunks(place.pp, costs)]
        found.append(entry)
    return found


def _plain(training: dict[str, Any]) -> dict[str, Any]:
    """The short facts of a training run; what is long is only counted."""
    return {
        key: value if not isinstance(value, dict | list) else f"{len(value)} entries" for key, value in training.items()
    }


def describe_tensor(path: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """Shape, dtype, where it lies and statistics of one tensor, by its Hugging Face name.

    For rank shards also by the name of a local parameter, which is then told of each rank that has it. ConfigError if
    there is no such tensor.
    """
    source = open_source(path, revision)
    weights: Blocks = {part: blocks for part, blocks in source.blocks.items() if part.kind == WEIGHT}
    if source.bare and name not in source.dtypes:
        name = families.weight_names(source.model).prefix + name
    if name in source.dtypes:
        moves = plan(weights, {part: [] for part in weights if part.hf == name})
        places = [(block.file.name, block.tensor, block.range) for move in moves for block in weights[move.part]]
        return {
            "name": name,
            "shape": list(hf_shapes(source.model)[name]),
            "dtype": source.dtypes[name],
            "places": [{"file": file, "tensor": tensor, "range": text} for file, tensor, text in places],
            "statistics": _statistics(moves),
        }
    local = {name for infos in source.files.values() for name in infos}
    if name not in local:
        known = sorted({*source.dtypes, *local})
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"Did you mean {close[0]}?" if close else "Without --tensor, all names are listed."
        raise ConfigError(Problem(key="--tensor", rule=f"no tensor is called {name}", fix=fix))
    return {
        "name": name,
        "ranks": [_local(source, file, name) for file, infos in source.files.items() if name in infos],
    }


def _local(source: Source, file: str, name: str) -> dict[str, Any]:
    """A local parameter as one rank has it."""
    info = source.files[file][name]
    mine = {
        part: [block for block in blocks if (block.file.name, block.tensor) == (file, name)]
        for part, blocks in source.blocks.items()
    }
    ranges = [block.range for blocks in mine.values() for block in blocks]
    moves = [
        Move(part, block.rows, block.cols, (_at_origin(block),), ())
        for part, blocks in mine.items()
        for block in blocks
    ]
    shape = list(info.shape)
    return {"file": file, "shape": shape, "dtype": info.dtype, "ranges": ranges, "statistics": _statistics(moves)}


def _at_origin(block: Block) -> Block:
    return replace(block, top=0, left=0)


def _statistics(moves: list[Move]) -> dict[str, Any]:
    """Of all elements of the moves' parts; NaN and infinities are counted and left out of the rest."""
    totals = _Totals()
    with Reading() as files:
        for move in moves:
            for _, _, matrix in matrices(files, move):
                totals.add(to_float(matrix.view(STORAGE[move.dtype]), move.dtype))
    return totals.result()


class _Totals:
    """Sums that grow band by band, in float64."""

    def __init__(self) -> None:
        self.count = self.finite = self.zeros = self.nans = 0
        self.total = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: NDArray) -> None:
        good = values[np.isfinite(values)].astype(np.float64)
        self.count += values.size
        self.nans += int(np.isnan(values).sum())
        self.finite += good.size
        self.zeros += int((good == 0).sum())
        if good.size:
            self.total += float(good.sum())
            self.squares += float(np.square(good).sum())
            self.low, self.high = min(self.low, float(good.min())), max(self.high, float(good.max()))

    def result(self) -> dict[str, Any]:
        infinities = self.count - self.finite - self.nans
        facts: dict[str, Any] = {"count": self.count, "zeros": self.zeros, "nan": self.nans, "infinite": infinities}
        if self.finite:
            mean = self.total / self.finite
            variance = max(0.0, self.squares / self.finite - mean * mean)
            facts |= {"min": self.low, "max": self.high, "mean": mean, "std": math.sqrt(variance)}
        return facts
