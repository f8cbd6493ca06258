"""What a checkpoint is, in numbers: a Hugging Face folder, rank shards or training state. Torch-free."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.copying import OpenFiles, matrices
from megalite.weights.dtypes import DTYPE_BYTES
from megalite.weights.folder import ModelFolder
from megalite.weights.manifest import WEIGHT
from megalite.weights.moves import Extent, Move, move_of
from megalite.weights.rounding import Elements, to_float
from megalite.weights.table import Piece, hf_shapes, pieces


def describe(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Facts that JSON can hold. Sizes are bytes, `tensors` are the model's own, the largest first."""
    source = open_checkpoint(path, revision)
    shapes, dtypes = hf_shapes(source.model), source.dtypes
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtypes[name]] for name, shape in shapes.items()}
    by_dtype: Counter[str] = Counter()
    for name, size in sizes.items():
        by_dtype[dtypes[name]] += size
    layout = source.layout
    interleaved: dict[str, Any] = {"interleave": layout.interleave} if layout.interleave > 1 else {}
    if layout.stages:
        interleaved["layers"] = list(layout.stages)
    training = source.manifest.training if source.manifest else {}
    return {
        "path": str(source.folder),
        "form": _form(source),
        "family": source.model.family,
        "architecture": families.FAMILIES[source.model.family].architecture,
        "parameters": sum(piece.split.total * piece.row * piece.numbers for piece in _once(source.model)),
        "quantization": source.model.quantization.words if source.model.quantization else None,
        "layers": source.model.num_layers,
        **_model(source.model),
        **_beside(source.beside),
        "layout": {"tp": layout.tp, "pp": layout.pp, **interleaved} if source.manifest else None,
        "bytes": source.nbytes,
        "dtypes": dict(by_dtype.most_common()),
        "kinds": source.kinds,
        "files": _files(source),
        "tensors": [
            {"name": name, "shape": list(shapes[name]), "dtype": dtypes[name], "bytes": sizes[name]}
            for name in sorted(sizes, key=lambda name: -sizes[name])
        ],
        "left_out": list(source.left_out),
        "training": {
            key: f"{len(value)} entries" if isinstance(value, dict | list) else value for key, value in training.items()
        },
        "notes": source.notes,
    }


def _once(model: ModelConfig) -> list[Piece]:
    """The weights, a tied embedding once."""
    return list({(piece.hf, piece.hf_start): piece for piece in pieces(model)}.values())


def _model(model: ModelConfig) -> dict[str, Any]:
    """The model's shape, in the words of a model card."""
    experts = next(iter(model.of(Experts)), None)
    attention = next(iter(model.of(SoftmaxAttention)), None)
    scalings = sorted({rope.scaling.kind for rope in model.ropes if rope.scaling is not None})
    return {
        "hidden_size": model.hidden_size,
        "heads": {"query": attention.heads, "key_value": attention.kv_heads, "size": attention.head_dim}
        if attention
        else None,
        "experts": {"count": experts.num_experts, "per_token": experts.top_k} if experts else None,
        "context": model.max_position_embeddings,
        "rope_scaling": " ".join(scalings) or None,
        "windows": sorted({kind.window for kind in model.of(SoftmaxAttention) if kind.window is not None}),
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


def _form(source: Checkpoint) -> str:
    if not source.manifest:
        return "Hugging Face folder"
    return "rank shards" if source.kinds == [WEIGHT] else "training state"


def _files(source: Checkpoint) -> list[dict[str, Any]]:
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


def describe_tensor(
    path: str | Path, name: str, revision: str | None = None, *, statistics: bool = False
) -> dict[str, Any]:
    """Shape, dtype and where it lies of one tensor, by its Hugging Face name.

    For rank shards also by the name of a local parameter, of each rank that has it. `statistics`: of its elements as
    well, which are read for that. ConfigError if there is no such tensor.
    """
    source = open_checkpoint(path, revision)
    if source.bare and name not in source.dtypes:
        name = families.weight_names(source.model).prefix + name
    if name in source.dtypes:
        extents = [extent for extent in source.extents if extent.part[0] == name and extent.kind == WEIGHT]
        starts = sorted({extent.part for extent in extents})
        moves = [move_of(extent for extent in extents if extent.part == part) for part in starts]
        return {
            "name": name,
            "shape": list(hf_shapes(source.model)[name]),
            "dtype": source.dtypes[name],
            "places": [
                {"file": extent.file.name, "tensor": extent.info.name, "range": str(extent.range)} for extent in extents
            ],
            **({"statistics": _statistics(moves)} if statistics else {}),
        }
    ranks = [
        _local([extent for extent in source.extents if extent.info is infos[name]], statistics)
        for infos in source.files.values()
        if name in infos
    ]
    if not ranks:
        known = sorted({*source.dtypes, *(name for infos in source.files.values() for name in infos)})
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"Did you mean {close[0]}?" if close else "--all lists all names."
        raise ConfigError(Problem(key="--tensor", rule=f"no tensor is called {name}", fix=fix))
    return {"name": name, "ranks": ranks}


def _local(extents: list[Extent], statistics: bool) -> dict[str, Any]:
    """A local parameter as one rank has it."""
    info = extents[0].info
    return {
        "file": info.file.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "ranges": [str(extent.range) for extent in extents],
        **({"statistics": _statistics([Move((extent,)) for extent in extents])} if statistics else {}),
    }


def _statistics(moves: list[Move]) -> dict[str, Any]:
    """Statistics of all elements of the moves' parts; NaN and infinities are counted and left out of the rest."""
    totals = _Totals()
    with OpenFiles() as files:
        for move in moves:
            for _, _, matrix in matrices(files, move, move.sources[0].range.dim):
                totals.add(to_float(matrix, move.dtype))
    return totals.result()


class _Totals:
    """Sums that grow band by band, in float64."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.total = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Elements) -> None:
        good = values[np.isfinite(values)].astype(np.float64)
        nans = int(np.isnan(values).sum())
        self.counts += Counter(count=values.size, zeros=int((good == 0).sum()), nan=nans)
        self.counts["infinite"] += values.size - good.size - nans
        if good.size:
            self.total += float(good.sum())
            self.squares += float(np.square(good).sum())
            self.low, self.high = min(self.low, float(good.min())), max(self.high, float(good.max()))

    def result(self) -> dict[str, Any]:
        facts: dict[str, Any] = {key: self.counts[key] for key in ("count", "zeros", "nan", "infinite")}
        if finite := facts["count"] - facts["nan"] - facts["infinite"]:
            mean = self.total / finite
            variance = max(0.0, self.squares / finite - mean * mean)
            facts |= {"min": self.low, "max": self.high, "mean": mean, "std": math.sqrt(variance)}
        return facts
