"""A LoRA adapter merged into the weights beside which it was trained: W + scale * B A, as a Hugging Face folder.

Torch-free. A tensor without an adapter keeps its very bytes; the sums are made in float32 and rounded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megalite.convert.convert import DEFAULT_SHARD_BYTES, NewFolder, check_places
from megalite.convert.output import SILENT, ByteProgress, Written
from megalite.errors import CheckpointError
from megalite.model import families
from megalite.weights import side_files
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.copying import OpenFiles, perform
from megalite.weights.dtypes import SAFETENSORS, STORAGE
from megalite.weights.identity import file_digest
from megalite.weights.lora import CONFIG, WEIGHTS, Adapter, LowRankInfo, linears, module_of, read_adapter
from megalite.weights.manifest import WEIGHT
from megalite.weights.moves import Extent, hf_extents, plan
from megalite.weights.rounding import Elements, convert, to_float
from megalite.weights.table import pieces
from megalite.weights.tensor_file import TensorInfo, stored_bytes


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: ByteProgress = SILENT,
    **_: Any,
) -> Written:
    """Merge a PEFT folder into a model, in Hugging Face layout or rank shards of any layout; else as `export`.

    CheckpointError: the adapter is not this model's, or the model's weights are quantized.
    """
    source, out = open_checkpoint(model), Path(out)
    if source.model.quantization is not None:
        raise CheckpointError(f"{source.folder}: its weights are quantized; merge into the model that it was made from")
    check_places(source, out)
    read = read_adapter(adapter, source.model)
    dtypes = {name: SAFETENSORS[dtype] if dtype else own for name, own in source.dtypes.items()}
    prefix = families.weight_names(source.model).prefix if source.bare else ""
    copies = side_files.chosen(source.folder, source.values, dtype)
    digests = [file_digest(read.folder / name) for name in (CONFIG, WEIGHTS)]
    how: dict[str, Any] = {"prefix": prefix, "max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
    new = NewFolder(source.model, out, dtypes, copies, ["merge", source.identity, *digests], **how)
    with OpenFiles() as opened:
        written = new.write(_Merged(source, read, new.tensors, opened).tensor, progress)
    written.notes = tuple(source.notes)
    return written


class _Merged:
    """Makes the tensors of the merged model."""

    def __init__(self, source: Checkpoint, adapter: Adapter, tensors: dict[str, TensorInfo], files: OpenFiles):
        self._adapter, self._tensors, self._files = adapter, tensors, files
        weights = [extent for extent in source.extents if extent.kind == WEIGHT]
        self._moves: dict[str, list[Any]] = {}
        for move in plan(weights, hf_extents(source.model, tensors)):
            self._moves.setdefault(move.part[0], []).append(move)
        known = linears(source.model)
        self._turned = {one.hf: one.transpose for one in pieces(source.model) if module_of(one) in known}

    def tensor(self, name: str, info: TensorInfo) -> list[Elements]:
        """A tensor as it is stored: see `NewFolder.write`."""
        values: Elements = np.empty(info.shape, STORAGE[info.dtype])

        def put(extent: Extent, row: int, rows: Elements) -> None:
            at, matrix = extent.range.start, values if values.ndim == 2 else values[:, None]
            if extent.range.dim == 0:
                matrix[at + row : at + row + len(rows)] = rows
            else:
                matrix[row : row + len(rows), at : at + rows.shape[1]] = rows

        for move in self._moves[name]:
            perform(self._files, move, put)
        part = self._adapter.modules.get(name.removesuffix(".weight"))
        if part is None:
            return [values]
        added = _product(part)
        total = to_float(values, info.dtype) + (added.T if self._turned[name] else added)
        return [convert(np.ascontiguousarray(total, np.float32), "F32", info.dtype, f"{self._adapter.folder}: {name}")]


def _product(part: LowRankInfo) -> Elements:
    """scale * B A, float32 [out, in]."""
    a, b = (_read(info) for info in (part.a, part.b))
    product: Elements = np.float32(part.scale) * (b @ a)
    return product


def _read(info: TensorInfo) -> Elements:
    stored = np.frombuffer(stored_bytes(info), STORAGE[info.dtype])
    return to_float(stored, info.dtype).reshape(info.shape).astype(np.float32)
