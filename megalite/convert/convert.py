"""Checkpoints from one form and layout to another: `convert`, `reshard` and `export`. No processes, no model instance.

Each makes a plan (which extent of which file goes where) and has it performed on a bounded pool of threads; see
weights/moves.py, weights/copying.py and output.py. Values are never changed, but for their dtype where that is asked
for. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import xxhash

from megalite.convert.output import SILENT, ByteProgress, NewFile, Output, Written
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.files import as_json
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.weights import manifest as manifests
from megalite.weights import side_files
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.copying import OpenFiles, differing, in_parallel
from megalite.weights.dtypes import DTYPE_BYTES, SAFETENSORS
from megalite.weights.hf import INDEX, SINGLE
from megalite.weights.manifest import WEIGHT, Manifest, digest_of, file_name
from megalite.weights.moves import Extent, Move, hf_extents, plan
from megalite.weights.rounding import Elements
from megalite.weights.shards import (
    JOURNAL,
    layout_words,
    open_manifest,
    rank_extents,
    rank_header,
    stored_file,
    stored_layout,
)
from megalite.weights.table import check_cuts, expected, hf_shapes, pieces
from megalite.weights.tensor_file import TensorInfo, new_header

DEFAULT_SHARD_BYTES = 5 * 10**9
JOBS = max(1, min(8, os.cpu_count() or 1))
"""Threads that are worth having: copying is bound by memory and disks, not by cores."""


def parse_layout(text: str) -> Layout:
    """`tp=4,pp=2` as a layout, `tp=4,pp=2,interleave=2` for pipelined training; ConfigError if not written so."""
    sizes = {"tp": 1, "pp": 1, "interleave": 1}
    fix = "Write it as tp=4,pp=2."
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        if key == "dp":
            raise ConfigError(Problem(key="--layout", rule="has no dp: replicas share the same files", fix=fix))
        if key not in sizes or not (value.isascii() and value.isdecimal()) or not 1 <= int(value) <= 4096:
            raise ConfigError(Problem(key="--layout", rule="must be sizes of tp and pp from 1", value=text, fix=fix))
        sizes[key] = int(value)
    if sizes["interleave"] > 1 and sizes["pp"] == 1:
        raise ConfigError(Problem(key="--layout", rule="has interleave only with pp", value=text, fix=fix))
    return Layout(sizes["tp"], sizes["pp"], interleave=sizes["interleave"])


def convert(model: str | Path, layout: Layout, out: str | Path, *, revision: str | None = None, **how: Any) -> Written:
    """A Hugging Face folder or hub id into one file a rank of `layout`; `how` as in `write_shards`."""
    source = open_checkpoint(model, revision)
    if source.manifest:
        fix = f"Use megalite reshard --from {quote(str(source.folder))} ..."
        raise ConfigError(Problem(key="--model", rule=f"{source.folder} holds rank shards", fix=fix))
    return write_shards(source, layout, Path(out), **how)


def reshard(shards: str | Path, layout: Layout, out: str | Path, **how: Any) -> Written:
    """Rank shards or training state of one layout into another; `how` as in `write_shards`."""
    source = open_checkpoint(shards)
    if not source.manifest:
        fix = f"Use megalite convert --model {quote(str(source.folder))} ..."
        raise ConfigError(Problem(key="--from", rule=f"{source.folder} is a model in Hugging Face layout", fix=fix))
    return write_shards(source, layout, Path(out), **how)


def write_shards(
    source: Checkpoint,
    layout: Layout,
    out: Path,
    *,
    dtype: str | None = None,
    jobs: int = JOBS,
    overwrite: bool = False,
    progress: ByteProgress = SILENT,
) -> Written:
    """Cut a checkpoint for a layout.

    Args:
        dtype: what the weights become (`bfloat16`, ...); None keeps them bit for bit. Optimizer state stays float32.
        jobs: threads at work.
        overwrite: `out` may hold something else, which is then removed.
        progress: is told the bytes to come, and those in place.

    Raises CheckpointError for a source or an output that can't be used, ConfigError for a wish that can't be met,
    ResourceError when the disk is too small. Interrupted, the same call goes on with the files that are not finished.
    """
    layout = stored_layout(layout)
    check_places(source, out)
    _check_layout(source.model, layout)
    made = rank_files(source, layout, out, dtype)
    files = [file for file, _ in made.values()]
    copies = side_files.chosen(source.folder, source.values, dtype)
    work = _fingerprint("shards", source, files, copies, [layout_words(layout)])
    if not overwrite and _is_done(out, work):
        return Written(out, files=len(files), was_done=True)
    moves = plan(source.extents, (extent for _, extents in made.values() for extent in extents))
    progress.begin(sum(move.nbytes for move in moves))
    with Output(out, files, work, overwrite=overwrite, extra_bytes=side_files.nbytes(copies)) as output:
        digests = output.run(moves, jobs, progress)
        manifest = Manifest(
            layout=layout,
            config=side_files.with_dtype(source.values, dtype),
            copies=side_files.write(copies, out),
            bare=source.bare,
            left_out=source.left_out,
            made_from=work,
            training=source.manifest.training if source.manifest else {},
            files={
                file.name: stored_file(
                    file.header,
                    *place,
                    [replace(extent, digest=digests[extent.file, extent.offset]) for extent in extents],
                )
                for place, (file, extents) in made.items()
            },
        )
        output.finish(lambda: manifests.write(out, manifest))
    output.written.notes = tuple(source.notes)
    return output.written


def export(
    shards: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    jobs: int = JOBS,
    overwrite: bool = False,
    progress: ByteProgress = SILENT,
) -> Written:
    """Rank shards, or the weights of training state, as a folder in Hugging Face layout; arguments as above.

    `max_shard_bytes`: of the tensors in one file; a larger tensor has a file of its own.
    """
    source, out = open_checkpoint(shards), Path(out)
    if not source.manifest:
        rule = f"{source.folder} is in Hugging Face layout already"
        raise ConfigError(Problem(key="--from", rule=rule, fix="Give a folder of rank shards."))
    check_places(source, out)
    prefix = families.weight_names(source.model).prefix if source.bare else ""
    kept = {piece.hf for piece in pieces(source.model) if piece.keeps_dtype}
    dtypes = {name: SAFETENSORS[dtype] if dtype and name not in kept else own for name, own in source.dtypes.items()}
    files, tensors = hf_files(source.model, out, dtypes, max_shard_bytes, prefix)
    copies = side_files.chosen(source.folder, source.values, dtype)
    work = _fingerprint("export", source, files, copies, [])
    moves = plan(source.extents, hf_extents(source.model, tensors))
    index = index_of(tensors)
    progress.begin(sum(move.nbytes for move in moves))
    if not overwrite and _looks_exported(out, files, copies | index) and _is_same(moves, jobs, progress):
        return Written(out, files=len(files), was_done=True)
    with Output(out, files, work, overwrite=overwrite, extra_bytes=side_files.nbytes(copies)) as output:
        output.run(moves, jobs, progress)
        side_files.write(copies, out)
        output.finish(lambda: side_files.write(index, out))
    output.written.notes = tuple(source.notes)
    return output.written


class NewFolder:
    """A folder in Hugging Face layout whose tensors are made one after the other, not copied.

    Interrupted, the same call begins anew in the same folder.
    """

    def __init__(
        self,
        model: ModelConfig,
        out: Path,
        dtypes: Mapping[str, str],
        beside: side_files.SideFiles,
        work: list[Any],
        *,
        prefix: str = "",
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ):
        """`dtypes`, `prefix`: as in `hf_files`. `work`: what decides the tensors besides, in values of JSON."""
        self._beside = beside
        self._files, self.tensors = hf_files(model, out, dtypes, max_shard_bytes, prefix)
        told = digest_of(json.dumps(work).encode() + b"".join(file.header for file in self._files))
        size = side_files.nbytes(beside)
        self.output = Output(out, self._files, told, overwrite=overwrite, extra_bytes=size)

    def write(self, make: Callable[[str, TensorInfo], Iterable[Elements]], progress: ByteProgress) -> Written:
        """`make`: the elements of a tensor as they are stored, by its full name: parts of it, end to end."""
        out = self.output.folder

        def content(file: Path) -> Iterator[memoryview]:
            mine = {name: info for name, info in self.tensors.items() if info.file == file}
            for name, info in sorted(mine.items(), key=lambda item: item[1].offset):
                for part in make(name, info):
                    yield part.reshape(-1).view("uint8").data
                progress.advance(info.nbytes)

        progress.begin(sum(info.nbytes for info in self.tensors.values()))
        with self.output as output:
            for file in self._files:
                output.fill(file.name, content(out / file.name))
            side_files.write(self._beside, out)
            output.finish(lambda: side_files.write(index_of(self.tensors), out))
        return output.written


def write_model(
    write: Callable[[Path, bool, ByteProgress], Written], layout: Layout | None, out: Path, **how: Any
) -> Written:
    """A model that `write(folder, overwrite, progress)` writes in Hugging Face layout: to `out`, or for `layout` its
    rank files, beside which that folder lies until they are there. `how`: as in `write_shards`."""
    if layout is None:
        return write(out, how.get("overwrite", False), how.get("progress", SILENT))
    whole = out.with_name(f".{out.name}.whole")
    write(whole, True, SILENT)
    try:
        return write_shards(open_checkpoint(whole), layout, out, **how)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


# ---- checks before anything is written ---------------------------------------------------------------------------


def check_places(source: Checkpoint, out: Path) -> None:
    """ConfigError: `out` is no place to write to."""
    if out.exists() and out.resolve() == source.folder.resolve():
        raise ConfigError(Problem(key="--out", rule="is the folder that is read", fix="Choose another folder."))
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem(key="--out", rule=f"{out} is a file", fix="Choose a folder."))


def _check_layout(model: ModelConfig, layout: Layout) -> None:
    if layout.pp * layout.interleave > model.num_layers:
        chunks = "pp" if layout.interleave == 1 else "pp x interleave"
        rule = f"{chunks} must be at most the model's {model.num_layers} layers"
        raise ConfigError(Problem(key="--layout", rule=rule, value=layout.pp * layout.interleave))
    check_cuts(model, layout.tp)


def _is_done(out: Path, work: str) -> bool:
    """Whether `out` is the whole result of this very work, with no more to be done."""
    whole = (out / manifests.NAME).is_file() and not (out / JOURNAL).exists()
    return whole and open_manifest(out).made_from == work


def _looks_exported(out: Path, files: list[NewFile], beside: side_files.SideFiles) -> bool:
    """Whether all but the weights is as an export leaves it."""
    finished = not (out / JOURNAL).exists() and all(file.fits(out / file.name) for file in files)
    return finished and side_files.are_in(beside, out)


def _is_same(moves: list[Move], jobs: int, progress: ByteProgress) -> bool:
    """Whether the targets hold already what the moves would write: a Hugging Face folder does not say what it was made
    of, so every byte is compared, until one differs."""
    differs = threading.Event()
    with OpenFiles() as files:

        def compare(move: Move) -> None:
            if differs.is_set():
                return
            if differing(files, move):
                differs.set()
            progress.advance(move.nbytes)

        in_parallel(compare, files.expecting(moves), jobs)
    return not differs.is_set()


def _fingerprint(form: str, source: Checkpoint, files: list[NewFile], copies: side_files.SideFiles, more: Any) -> str:
    """A digest of everything that decides what the output will be."""
    state = xxhash.xxh3_128(json.dumps([form, manifests.VERSION, source.identity, more]).encode())
    for file in files:
        state.update(file.name.encode() + file.header)
    for name, content in copies.items():
        if isinstance(content, Path):
            content = f"{content.stat().st_size}:{content.stat().st_mtime_ns}".encode()
        state.update(name.encode() + content)
    return state.hexdigest()


# ---- the new weight files ----------------------------------------------------------------------------------------


def rank_files(
    source: Checkpoint, layout: Layout, out: Path, dtype: str | None
) -> dict[tuple[int, str], tuple[NewFile, list[Extent]]]:
    """The files to be made for each rank and kind, and what they will hold."""
    made = {}
    dtypes = {(extent.part[0], extent.kind): extent.info.dtype for extent in source.extents}
    for kind in source.kinds:
        for rank in layout.ranks:
            entries = {}
            for name, (shape, ranges) in expected(source.model, layout, rank).items():
                mine = {one.piece.hf: dtypes[one.piece.hf, kind] for one in ranges}
                if kind != WEIGHT:
                    mine = dict.fromkeys(mine, "F32")
                elif dtype and not ranges[0].piece.keeps_dtype:
                    mine = dict.fromkeys(mine, SAFETENSORS[dtype])
                if len(set(mine.values())) > 1:
                    listed = ", ".join(f"{hf} is {one}" for hf, one in mine.items())
                    raise CheckpointError(
                        f"{source.folder}: {listed}; they share one parameter, so give them one dtype with --dtype"
                    )
                entries[name] = (next(iter(mine.values())), shape)
            name = file_name(rank, kind)
            header, tensors = rank_header(out / name, entries, layout, rank, kind)
            extents = rank_extents(source.model, layout, rank, tensors, kind)
            nbytes = len(header) + sum(info.nbytes for info in tensors.values())
            made[rank, kind] = NewFile(name, header, nbytes), extents
    return made


def hf_files(
    model: ModelConfig, out: Path, dtypes: Mapping[str, str], max_shard_bytes: int, prefix: str = ""
) -> tuple[list[NewFile], dict[str, TensorInfo]]:
    """The files of a Hugging Face folder, and where each tensor will lie by its full name.

    `dtypes`: of each tensor; `prefix`: what the names in the files are to lack.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, shape in hf_shapes(model).items():
        nbytes = DTYPE_BYTES[dtypes[name]] * math.prod(shape)
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (dtypes[name], shape)
        size += nbytes
    files: list[NewFile] = []
    tensors: dict[str, TensorInfo] = {}
    for index, group in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        entries = {name.removeprefix(prefix): entry for name, entry in group.items()}
        header, infos = new_header(out / file, entries, {"format": "pt"})
        tensors |= {name: infos[name.removeprefix(prefix)] for name in group}
        nbytes = len(header) + sum(info.nbytes for info in infos.values())
        files.append(NewFile(file, header, nbytes))
    return files, tensors


def index_of(tensors: Mapping[str, TensorInfo]) -> side_files.SideFiles:
    """The file that makes several weight files one model; a single one needs none."""
    if len({info.file for info in tensors.values()}) == 1:
        return {}
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {info.name: info.file.name for info in tensors.values()}
    return {INDEX: as_json({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()}
