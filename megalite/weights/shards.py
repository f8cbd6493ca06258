"""A model cut for a layout: one safetensors file for each (tp, pp) rank, under local parameter names, and a manifest.

    FOLDER/rank-000.safetensors ...     rank = pp * tp_size + tp; replicas (dp) share the files
           manifest.json                written last: a folder without one is unfinished
           config.json tokenizer.json   as in the Hugging Face folder

`expected` derives from the weight table what each file must hold,
so that writing, loading, resharding and verifying agree. Importable without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.weights import manifest as manifests
from megalite.weights.hf import INDEX, SINGLE, inside
from megalite.weights.manifest import Manifest, StoredFile, file_name
from megalite.weights.table import Owned, owned
from megalite.weights.tensor_file import TensorInfo, read_header

JOURNAL = ".unfinished.jsonl"
"""Where a conversion notes what it has done, until the manifest takes its place."""
STEP = "shards.step"
"""Fault point that is passed after every change to a folder under construction, so that tests can kill at each."""


def is_sharded(folder: str | Path) -> bool:
    """Whether a folder holds rank shards, finished or not, rather than a model in Hugging Face layout."""
    folder = Path(folder)
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return False
    return (folder / file_name(0)).exists() or (folder / JOURNAL).exists() or _has_manifest(folder)


def _has_manifest(folder: Path) -> bool:
    """Whether manifest.json is one of ours: other formats use that name too."""
    try:
        with open(folder / manifests.NAME, "rb") as file:
            return manifests.FORMAT.encode() in file.read(200)
    except OSError:
        return False


def open_manifest(folder: str | Path) -> Manifest:
    """The manifest of a finished folder. CheckpointError if it is unfinished, damaged or lacks a file."""
    folder = Path(folder)
    if not (folder / manifests.NAME).exists():
        raise CheckpointError(
            f"{folder}: unfinished: it has no {manifests.NAME}, which is written last. "
            "Run the command that was writing it again; it goes on where it stopped."
        )
    manifest = manifests.read(folder)
    for name, file in manifest.files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {manifests.NAME} lists it. Copy the folder again.")
        size = path.stat().st_size
        if size != file.nbytes:
            raise CheckpointError(f"{path}: has {size} bytes, {manifests.NAME} says {file.nbytes}. Copy it again.")
    return manifest


def stored_layout(layout: Layout) -> Layout:
    """What the files of a run in `layout` are cut for: one replica, whose ranks count from 0."""
    return replace(layout, dp=1, first_rank=0)


def layout_words(layout: Layout) -> str:
    """As `--layout` takes it: `tp=4,pp=2`."""
    interleaved = f",interleave={layout.interleave}" if layout.interleave > 1 else ""
    return f"tp={layout.tp},pp={layout.pp}{interleaved}"


def metadata(layout: Layout, rank: int, kind: str) -> dict[str, str]:
    """What a rank file says of itself in its header."""
    return {"format": "pt", "layout": layout_words(layout), "rank": str(rank), "kind": kind}


def expected(config: ModelConfig, layout: Layout, rank: int) -> dict[str, tuple[tuple[int, ...], list[Owned]]]:
    """Shape of each local parameter that `rank` stores, and the ranges it is made of, in the order they lie in it.

    Parameters of which this rank has nothing are left out.
    """
    parts: dict[str, list[Owned]] = {}
    for part in owned(config, layout, rank):
        parts.setdefault(part.piece.param, []).append(part)
    found = {}
    for name, mine in parts.items():
        mine.sort(key=lambda part: part.start)
        dim, other = mine[0].piece.dim, mine[0].piece.other
        end = 0
        for part in mine:
            same = (part.piece.dim, part.piece.other) == (dim, other)
            assert part.start == end and same, f"the weight table leaves a gap in {name}"
            end += part.hi - part.lo
        assert dim == 0 or len(mine) == 1, f"{name}: ranges along dim 1 would not lie one after another"
        shape = list(other)
        shape.insert(dim, end)
        found[name] = (tuple(shape), mine)
    return found


def check_file(folder: Path, file: StoredFile, config: ModelConfig, layout: Layout) -> dict[str, TensorInfo]:
    """The tensors of a rank file, once its header, the manifest and the weight table agree; else CheckpointError."""
    path = inside(folder, file.name)
    if layout.pp * layout.interleave > config.num_layers:
        raise CheckpointError(
            f"{folder / manifests.NAME}: {layout_words(layout)} is not possible with {config.num_layers} layers"
        )
    wanted = expected(config, layout, file.rank)
    if file.tensors.keys() != wanted.keys():
        wrong = sorted(file.tensors.keys() ^ wanted.keys())[0]
        what = "lacks" if wrong in wanted else "has the unknown"
        raise CheckpointError(f"{folder / manifests.NAME}: {file.name} {what} tensor {wrong}")
    for name, (shape, parts) in wanted.items():
        stored = file.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{folder / manifests.NAME}: {file.name}: {name} is {list(stored.shape)}, config.json implies "
                f"{list(shape)}"
            )
        ranges = [(one.hf, one.dim, one.lo, one.hi) for one in stored.ranges]
        if ranges != [(part.piece.hf, part.piece.hf_dim, part.lo, part.hi) for part in parts]:
            raise CheckpointError(
                f"{folder / manifests.NAME}: {file.name}: {name} is not made of the ranges that rank {file.rank} of "
                f"{layout_words(layout)} holds"
            )
    tensors = read_header(path)
    listed = {name: (stored.dtype, stored.shape) for name, stored in file.tensors.items()}
    found = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    if found != listed:
        wrong = next(name for name in {**listed, **found} if listed.get(name) != found.get(name))
        raise CheckpointError(
            f"{path}: its header does not say of {wrong} what {manifests.NAME} says. Is it the file of another rank?"
        )
    return tensors
