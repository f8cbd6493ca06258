"""A model cut for a layout: one safetensors file for each (tp, pp) rank, under local parameter names, and a manifest.

    FOLDER/rank-000.safetensors ...     rank = pp * tp_size + tp; replicas (dp) share the files
           manifest.json                written last: a folder without one is unfinished
           config.json tokenizer.json   as in the Hugging Face folder

What each file must hold follows from the weight table, so that writing, loading, resharding and verifying agree.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.weights import manifest as manifests
from megalite.weights.hf import INDEX, SINGLE
from megalite.weights.manifest import WEIGHT, Manifest, StoredFile, StoredRange, StoredTensor, digest_of, file_name
from megalite.weights.moves import Extent
from megalite.weights.table import Weights, expected
from megalite.weights.tensor_file import TensorInfo, new_header, read_header

JOURNAL = ".unfinished.jsonl"
"""Where a conversion notes which files it has finished, until the manifest takes its place."""
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
        path = folder / name
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
    """A layout as `--layout` takes it: `tp=4,pp=2`."""
    interleaved = f",interleave={layout.interleave}" if layout.interleave > 1 else ""
    by_hand = f",layers={list(layout.stages)}".replace(" ", "") if layout.stages else ""
    return f"tp={layout.tp},pp={layout.pp}{interleaved}{by_hand}"


def rank_header(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], layout: Layout, rank: int, kind: str
) -> tuple[bytes, dict[str, TensorInfo]]:
    """`new_header` of a rank's file, with the rank and kind among its metadata."""
    said = {"format": "pt", "layout": layout_words(layout), "rank": str(rank), "kind": kind}
    return new_header(path, entries, said)


def rank_extents(
    config: Weights,
    layout: Layout,
    rank: int,
    tensors: Mapping[str, TensorInfo],
    kind: str = WEIGHT,
    file: StoredFile | None = None,
) -> list[Extent]:
    """The ranges that the file of one rank holds, in the order of `expected`; `file` has their digests."""
    return [
        Extent(one, tensors[name], file.tensors[name].ranges[index].digest if file else "", kind)
        for name, (_, ranges) in expected(config, layout, rank).items()
        for index, one in enumerate(ranges)
    ]


def stored_file(header: bytes, rank: int, kind: str, extents: Iterable[Extent]) -> StoredFile:
    """What a manifest says of a rank file, from its `extents` with their digests."""
    infos: dict[str, TensorInfo] = {}
    ranges: dict[str, list[StoredRange]] = {}
    for extent in extents:
        infos[extent.info.name] = extent.info
        one = extent.range
        listed = StoredRange(one.piece.hf, one.piece.hf_dim, one.lo, one.hi, extent.digest)
        ranges.setdefault(extent.info.name, []).append(listed)
    tensors = {name: StoredTensor(info.dtype, info.shape, tuple(ranges[name])) for name, info in infos.items()}
    nbytes = len(header) + sum(info.nbytes for info in infos.values())
    return StoredFile(rank, kind, nbytes, digest_of(header), tensors)


def file_extents(folder: Path, file: StoredFile, config: Weights, layout: Layout) -> list[Extent]:
    """What a rank file of `layout` holds, once its header, the manifest and the weight table agree.

    Else CheckpointError.
    """
    manifest, path = folder / manifests.NAME, folder / file.name
    if layout.pp * layout.interleave > config.num_layers or sum(layout.stages) not in (0, config.num_layers):
        raise CheckpointError(f"{manifest}: {layout_words(layout)} is not possible with {config.num_layers} layers")
    wanted = expected(config, layout, file.rank)
    if file.tensors.keys() != wanted.keys():
        wrong = sorted(file.tensors.keys() ^ wanted.keys())[0]
        what = "lacks" if wrong in wanted else "has the unknown"
        raise CheckpointError(f"{manifest}: {file.name} {what} tensor {wrong}")
    for name, (shape, ranges) in wanted.items():
        stored = file.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{manifest}: {file.name}: {name} is {list(stored.shape)}, config.json implies {list(shape)}"
            )
        listed = [(one.hf, one.dim, one.lo, one.hi) for one in stored.ranges]
        if listed != [(one.piece.hf, one.piece.hf_dim, one.lo, one.hi) for one in ranges]:
            raise CheckpointError(
                f"{manifest}: {file.name}: {name} is not made of the ranges that rank {file.rank} of "
                f"{layout_words(layout)} holds"
            )
    tensors = read_header(path)
    said = {name: (stored.dtype, stored.shape) for name, stored in file.tensors.items()}
    found = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    if found != said:
        wrong = next(name for name in {**said, **found} if said.get(name) != found.get(name))
        raise CheckpointError(
            f"{path}: its header does not say of {wrong} what {manifests.NAME} says. Is it the file of another rank?"
        )
    return rank_extents(config, layout, file.rank, tensors, file.kind, file)
