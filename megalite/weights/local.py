"""The local parameters of one rank, read whole out of rank shards that may be cut for any layout.

What `reshard` does to files this does in memory, with the same plans: a training state goes on in another layout
without a copy of it on the disk. Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.weights.blocks import Block, Blocks, Part, merged, plan_needed, stored_blocks
from megalite.weights.copying import Reading, perform
from megalite.weights.manifest import Manifest, StoredFile
from megalite.weights.shards import expected
from megalite.weights.sources import file_blocks
from megalite.weights.tensor_file import DTYPE_BYTES, WEIGHT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def read_local(
    folder: Path, manifest: Manifest, config: ModelConfig, layout: Layout, rank: int, kind: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and values, on the CPU and in the stored dtype, of each parameter that `rank` of `layout` holds.

    `layout` is of one replica. Only stored ranges of which the rank holds something are read, a band at a time, into
    one parameter after the other. They are read whole even if the rank holds only some of their rows, because
    their digests are of the whole: with twice the tp of the files, twice the bytes. Where the files are cut for
    `layout`, the rank reads its own file and nothing else.

    CheckpointError if a file is damaged, or is not what its manifest says.
    """
    wanted = expected(config, layout, rank)
    files = _holders(manifest, layout, rank, kind, {one.piece.hf for _, parts in wanted.values() for one in parts})
    sources = merged(file_blocks(folder, file, config, manifest.layout)[1] for file in files)
    dtypes = {
        name: sources[Part(parts[0].piece.hf, parts[0].piece.hf_start, kind)][0].dtype
        for name, (_, parts) in wanted.items()
    }
    targets = _in_memory(config, layout, rank, dtypes, kind)
    with Reading() as reading:
        for name, (shape, _) in wanted.items():
            memory = np.empty(math.prod(shape) * DTYPE_BYTES[dtypes[name]], np.uint8)

            def put(block: Block, row: int, rows: NDArray[np.uint8], memory: NDArray[np.uint8] = memory) -> None:
                start = block.offset + row * block.stride
                memory[start : start + rows.size] = rows.reshape(-1)

            for move in plan_needed(sources, targets[name]):
                perform(reading, move, put)
            yield name, _as_tensor(memory, dtypes[name], shape)


def _holders(manifest: Manifest, layout: Layout, rank: int, kind: str, names: set[str]) -> list[StoredFile]:
    """The files of `kind` to read from: the rank's own, or in another layout all that hold something of `names`."""
    files = [file for file in manifest.files.values() if file.kind == kind]
    if manifest.layout == layout:
        return [file for file in files if file.rank == rank]
    return [file for file in files if any(one.hf in names for held in file.tensors.values() for one in held.ranges)]


def _in_memory(config: ModelConfig, layout: Layout, rank: int, dtypes: dict[str, str], kind: str) -> dict[str, Blocks]:
    """Where the parts of each parameter lie in its memory: offsets are from its first byte."""
    infos = {
        name: TensorInfo(name, dtypes[name], shape, Path(name), 0, math.prod(shape) * DTYPE_BYTES[dtypes[name]])
        for name, (shape, _) in expected(config, layout, rank).items()
    }
    found: dict[str, Blocks] = {}
    for name, one, block in stored_blocks(config, layout, rank, infos):
        found.setdefault(name, {})[Part(one.piece.hf, one.piece.hf_start, kind)] = [block]
    return found


def _as_tensor(memory: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.from_numpy(memory).view(getattr(torch, WEIGHT_DTYPES[dtype])).view(shape)
