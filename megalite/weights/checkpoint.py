"""What weights are read from: a model in Hugging Face layout, rank shards of any layout, or training state of ours.

`open_checkpoint` finds out which, checks every header and says where each part of the model lies; `extents_for` does so
for what one rank needs. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.weights import manifest as manifests
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.hf import read_weights, resolve
from megalite.weights.manifest import WEIGHT, Manifest
from megalite.weights.moves import Extent, hf_extents
from megalite.weights.shards import file_extents, is_sharded, open_manifest, stored_layout
from megalite.weights.table import Weights, hf_shapes, owned
from megalite.weights.tensor_file import TensorInfo

BASE = "base"
"""Key of what a training state of adapters notes about the frozen model."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model whose headers have been checked; nothing of its weights is read yet."""

    beside: ModelFolder
    """What the folder holds beside its weights."""
    manifest: Manifest | None
    """The manifest of rank shards; None for Hugging Face layout."""
    extents: list[Extent]
    files: dict[str, dict[str, TensorInfo]]
    """Weight files by name, and their tensors by the names in the file."""
    bare: bool
    """See `HFWeights`."""
    left_out: tuple[str, ...]
    """Tensors that are not weights of the model."""
    notes: list[str]
    """What the user should know of it."""

    @property
    def folder(self) -> Path:
        return self.beside.path

    @property
    def values(self) -> dict[str, Any]:
        """The values of config.json."""
        return self.beside.values

    @property
    def model(self) -> ModelConfig:
        return self.beside.model

    @property
    def layout(self) -> Layout:
        """tp=1,pp=1 for a Hugging Face folder."""
        return self.manifest.layout if self.manifest else Layout()

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensors stored for each parameter: weights, and in training state Adam's moments."""
        return self.manifest.kinds if self.manifest else [WEIGHT]

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each Hugging Face tensor."""
        return {extent.part[0]: extent.info.dtype for extent in self.extents if extent.kind == WEIGHT}

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for infos in self.files.values() for info in infos.values())

    @property
    def identity(self) -> list[Any]:
        """Changes when the weights change, as far as that shows without reading them."""
        if self.manifest:
            return ["shards", manifests.digest_of((self.folder / manifests.NAME).read_bytes())]
        states = [(name, (self.folder / name).stat()) for name in sorted(self.files)]
        return ["hf", *([name, state.st_size, state.st_mtime_ns] for name, state in states)]


def open_checkpoint(path: str | Path, revision: str | None = None) -> Checkpoint:
    """A folder or hub id, its headers checked. CheckpointError if it is damaged, unfinished or not a checkpoint."""
    folder = resolve(path, revision, beside=True)
    return _open_shards(folder) if is_sharded(folder) else _open_hf(folder)


def extents_for(
    folder: Path, model: Weights, layout: Layout, rank: int, kind: str = WEIGHT, manifest: Manifest | None = None
) -> list[Extent]:
    """Where the parts of which `rank` of `layout` holds something lie: in a Hugging Face folder, or in rank shards.

    Shards may be cut for any layout; where they are cut for this one, the rank's own file holds everything. Headers are
    checked, of those files only. `manifest`: that of the shards, where it has been read already. CheckpointError: the
    folder is damaged, unfinished or of another model.
    """
    if manifest is None and not is_sharded(folder):
        assert isinstance(model, ModelConfig), "adapters in Hugging Face layout are read by `lora_training`"
        return hf_extents(model, read_weights(folder, model).tensors)
    manifest = manifest or open_manifest(folder)
    files = [file for file in manifest.files.values() if file.kind == kind]
    if manifest.layout == stored_layout(layout):
        place = layout.coord(rank)
        own = manifest.layout.rank(tp=place.tp, pp=place.pp)
        files = [file for file in files if file.rank == own]
    else:
        names = {one.piece.hf for one in owned(model, layout, rank)}
        files = [file for file in files if not names.isdisjoint(file.hf_names)]
    return [extent for file in files for extent in file_extents(folder, file, model, manifest.layout)]


def _open_hf(folder: Path) -> Checkpoint:
    beside = ModelFolder.open(folder)
    weights = read_weights(folder, beside.model)
    files: dict[str, dict[str, TensorInfo]] = {}
    for info in weights.tensors.values():
        files.setdefault(info.file.name, {})[info.name] = info
    shapes = hf_shapes(beside.model)
    left_out = tuple(sorted(info.name for name, info in weights.tensors.items() if name not in shapes))
    named = f"{', '.join(left_out[:4])}{', ...' * (len(left_out) > 4)}"
    return Checkpoint(
        beside=beside,
        manifest=None,
        extents=hf_extents(beside.model, weights.tensors),
        files=files,
        bare=weights.bare,
        left_out=left_out,
        notes=[f"left out, as the model does not use them: {named}"] if left_out else [],
    )


def _open_shards(folder: Path) -> Checkpoint:
    manifest = open_manifest(folder)
    if BASE in manifest.training:
        base = manifest.training[BASE].get("path")
        raise CheckpointError(
            f"{folder}: the state of LoRA adapters in training beside {base}; what comes of them is in the run's folder"
        )
    beside = ModelFolder.open(folder)
    extents = [
        extent
        for file in manifest.files.values()
        for extent in file_extents(folder, file, beside.model, manifest.layout)
    ]
    files: dict[str, dict[str, TensorInfo]] = {}
    for extent in extents:
        files.setdefault(extent.file.name, {})[extent.info.name] = extent.info
    notes = []
    config = manifest.copies.get(CONFIG)
    if config is not None and manifests.digest_of((folder / CONFIG).read_bytes()) != config:
        notes.append(f"{folder / CONFIG} was changed after the shards were written; it is used as it is now")
    return Checkpoint(
        beside=beside,
        manifest=manifest,
        extents=extents,
        files=files,
        bare=manifest.bare,
        left_out=manifest.left_out,
        notes=notes,
    )
