"""What can be read: a model in Hugging Face layout, rank shards of any layout, or training state of ours.

`open_source` finds out which, checks every header and says where each part of the model lies. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.weights import manifest as manifests
from megalite.weights.blocks import Blocks, hf_blocks, merged, rank_blocks
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.hf import Checkpoint, check_names, open_checkpoint, resolve
from megalite.weights.manifest import Manifest, StoredFile
from megalite.weights.shards import check_file, is_sharded, open_manifest, stored_layout
from megalite.weights.table import hf_shapes, owned
from megalite.weights.tensor_file import WEIGHT_DTYPES, TensorInfo


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint whose headers have been checked; nothing of its weights is read yet."""

    beside: ModelFolder
    """What the folder holds beside its weights."""
    form: Literal["hf", "shards"]
    layout: Layout
    """tp=1,pp=1 for a Hugging Face folder."""
    blocks: Blocks
    files: dict[str, dict[str, TensorInfo]]
    """Weight files by name, and their tensors by the names in the file."""
    dtypes: dict[str, str]
    """Of each Hugging Face tensor."""
    identity: list[Any]
    """Changes when the weights change, as far as that shows without reading them."""
    bare: bool = False
    left_out: tuple[str, ...] = ()
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)
    """What the user should know of it."""

    @property
    def folder(self) -> Path:
        return self.beside.path

    @property
    def values(self) -> dict[str, Any]:
        """Of config.json."""
        return self.beside.values

    @property
    def model(self) -> ModelConfig:
        return self.beside.model

    @property
    def kinds(self) -> list[str]:
        return self.manifest.kinds if self.manifest else [manifests.WEIGHT]

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(info.nbytes for tensors in self.files.values() for info in tensors.values())


def open_source(path: str | Path, revision: str | None = None) -> Source:
    """The checkpoint at a path or under a hub id. CheckpointError if it is none, unfinished, damaged or hostile."""
    folder = resolve(path, revision, beside=True)
    return _open_shards(folder) if is_sharded(folder) else _open_hf(folder)


def blocks_for(folder: Path, model: ModelConfig, layout: Layout, rank: int, kind: str = manifests.WEIGHT) -> Blocks:
    """Where the parts of which `rank` of `layout` holds something lie: in a Hugging Face folder, or in rank shards.

    Shards may be cut for any layout; where they are cut for this one, the rank's own file holds everything. Headers are
    checked, of those files only. CheckpointError: the folder is damaged, unfinished or of another model.
    """
    if not is_sharded(folder):
        return hf_blocks(model, _open_weights(folder, model).tensors)
    manifest = open_manifest(folder)
    files = [file for file in manifest.files.values() if file.kind == kind]
    if manifest.layout == stored_layout(layout):
        place = layout.coord(rank)
        own = manifest.layout.rank(tp=place.tp, pp=place.pp)
        files = [file for file in files if file.rank == own]
    else:
        names = {one.piece.hf for one in owned(model, layout, rank)}
        files = [file for file in files if not names.isdisjoint(_tensors_of(file))]
    return merged(file_blocks(folder, file, model, manifest.layout)[1] for file in files)


def _tensors_of(file: StoredFile) -> set[str]:
    """The Hugging Face tensors of which a rank file holds something."""
    return {one.hf for held in file.tensors.values() for one in held.ranges}


def _open_weights(folder: Path, model: ModelConfig) -> Checkpoint:
    """The weights of a Hugging Face folder, once they are known to be the model's."""
    checkpoint = open_checkpoint(folder, names=families.weight_names(model))
    check_names(model, checkpoint, str(folder))
    for name in hf_shapes(model):
        info = checkpoint.tensors[name]
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} is {info.dtype}; weights must be {', '.join(WEIGHT_DTYPES)}"
            )
    return checkpoint


def _open_hf(folder: Path) -> Source:
    beside = ModelFolder.open(folder)
    model = beside.model
    checkpoint = _open_weights(folder, model)
    tensors, shapes = checkpoint.tensors, hf_shapes(model)
    files: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors.values():
        files.setdefault(info.file.name, {})[info.name] = info
    left_out = tuple(sorted(info.name for name, info in tensors.items() if name not in shapes))
    notes = [f"left out, as the model does not use them: {', '.join(left_out[:4])}{', ...' * (len(left_out) > 4)}"]
    return Source(
        form="hf",
        beside=beside,
        layout=Layout(),
        blocks=hf_blocks(model, tensors),
        files=files,
        dtypes={name: tensors[name].dtype for name in shapes},
        identity=["hf", *_states(folder, files)],
        bare=checkpoint.bare,
        left_out=left_out,
        notes=notes if left_out else [],
    )


def _states(folder: Path, files: dict[str, dict[str, TensorInfo]]) -> Iterator[list[Any]]:
    for name in sorted(files):
        state = (folder / name).stat()
        yield [name, state.st_size, state.st_mtime_ns]


def file_blocks(
    folder: Path, file: StoredFile, model: ModelConfig, layout: Layout
) -> tuple[dict[str, TensorInfo], Blocks]:
    """The tensors of a rank file of `layout` and the blocks in it, once its header is checked; else CheckpointError."""
    infos = check_file(folder, file, model, layout)
    digests = {name: [one.digest for one in tensor.ranges] for name, tensor in file.tensors.items()}
    return infos, rank_blocks(model, layout, file.rank, infos, digests, file.kind)


def _open_shards(folder: Path) -> Source:
    manifest = open_manifest(folder)
    beside = ModelFolder.open(folder)
    model = beside.model
    files: dict[str, dict[str, TensorInfo]] = {}
    blocks, dtypes = [], {}
    for name, file in manifest.files.items():
        files[name], mine = file_blocks(folder, file, model, manifest.layout)
        blocks.append(mine)
        if file.kind == manifests.WEIGHT:
            dtypes |= {one.hf: tensor.dtype for tensor in file.tensors.values() for one in tensor.ranges}
    notes = []
    config = manifest.copies.get(CONFIG)
    if config is not None and manifests.digest_of((folder / CONFIG).read_bytes()) != config:
        notes.append(f"{folder / CONFIG} was changed after the shards were written; it is used as it is now")
    return Source(
        form="shards",
        beside=beside,
        layout=manifest.layout,
        blocks=merged(blocks),
        files=files,
        dtypes=dtypes,
        identity=["shards", manifests.digest_of((folder / manifests.NAME).read_bytes())],
        bare=manifest.bare,
        left_out=manifest.left_out,
        manifest=manifest,
        notes=notes,
    )
