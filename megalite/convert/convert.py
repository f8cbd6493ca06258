"""Checkpoints from one form and layout to another: `convert`, `reshard` and `export`. No processes, no model instance.

Each makes a plan (which block of which file goes where) and has it performed on a bounded pool of threads; see
blocks.py, copying.py and output.py. Values are never changed, but for their dtype where that is asked for. Importable
without torch.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megalite.convert.output import NewFile, Outcome, Output, Progress
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.files import as_json, write_json
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.weights import manifest as manifests
from megalite.weights import side_files as companions
from megalite.weights.blocks import Block, Move, hf_blocks, merged, plan, rank_blocks, stored_blocks
from megalite.weights.copying import Reading, digest_block, in_parallel, perform
from megalite.weights.dtypes import NAMES
from megalite.weights.hf import INDEX, SINGLE
from megalite.weights.manifest import WEIGHT, Manifest, Range, StoredFile, StoredTensor, file_name
from megalite.weights.shards import JOURNAL, expected, layout_words, metadata, open_manifest, stored_layout
from megalite.weights.sources import Source, open_source
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import DTYPE_BYTES, TensorInfo, new_header

DEFAULT_SHARD_BYTES = 5 * 10**9

Begin = Callable[[int], None]
"""Is told, before the work begins, how many bytes there will be."""


def default_jobs() -> int:
    """Threads that are worth having: copying is bound by memory and disks, not by cores."""
    return max(1, min(8, os.cpu_count() or 1))


def parse_layout(text: str) -> Layout:
    """`tp=4,pp=2` as a layout, `tp=4,pp=2,interleave=2` for pipelined training; ConfigError if not written so."""
    sizes = {"tp": 1, "pp": 1, "interleave": 1}
    fix = "Write it as tp=4,pp=2."
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        if key == "dp":
            raise ConfigError(Problem(key="--layout", rule="has no dp: replicas share the same files", fix=fix))
        if key not in sizes or not (value.isascii() and value.isdecimal()) or not 1 <= int(value) <= 4096:
            raise ConfigError(Problem(key="--layout", rule="must be tp and pp", value=text, fix=fix))
        sizes[key] = int(value)
    if sizes["interleave"] > 1 and sizes["pp"] == 1:
        raise ConfigError(Problem(key="--layout", rule="has interleave only with pp", value=text, fix=fix))
    return Layout(**sizes)


def convert(model: str | Path, layout: Layout, out: str | Path, *, revision: str | None = None, **how: Any) -> Outcome:
    """A Hugging Face folder or hub id into one file a rank of `layout`; `how` as in `write_shards`."""
    source = open_source(model, revision)
    if source.form != "hf":
        fix = f"Use python tools/reshard.py --from {source.folder} ..."
        raise ConfigError(Problem(key="--model", rule=f"{source.folder} holds rank shards", fix=fix))
    return write_shards(source, layout, Path(out), **how)


def reshard(shards: str | Path, layout: Layout, out: str | Path, **how: Any) -> Outcome:
    """Rank shards or training state of one layout into another; `how` as in `write_shards`."""
    source = open_source(shards)
    if source.form != "shards":
        fix = f"Use python tools/convert.py --model {source.folder} ..."
        raise ConfigError(Problem(key="--from", rule=f"{source.folder} is a model in Hugging Face layout", fix=fix))
    return write_shards(source, layout, Path(out), **how)


def write_shards(
    source: Source,
    layout: Layout,
    out: Path,
    *,
    dtype: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    begin: Begin = lambda total: None,
    progress: Progress = lambda count: None,
) -> Outcome:
    """Cut a checkpoint for a layout.

    Args:
        dtype: what the weights become (`bfloat16`, ...); None keeps them bit for bit. Optimizer state stays float32.
        jobs: threads at work.
        overwrite: `out` may hold something else, which is then removed.
        begin, progress: are told the bytes to come, and those in place.

    Raises CheckpointError for a source or an output that can't be used, ConfigError for a wish that can't be met,
    ResourceError when the disk is too small. Interrupted, the same call goes on where it stopped.
    """
    layout = stored_layout(layout)
    _check_places(source, out)
    _check_layout(source.model, layout)
    files, tensors = rank_files(source, layout, out, dtype)
    copies = companions.chosen(source.folder, source.values, dtype)
    work = _fingerprint("shards", source, files, copies, [layout_words(layout)])
    if not overwrite and _is_done(out, work):
        return Outcome(out, files=len(files), was_done=True)
    targets = merged(
        rank_blocks(source.model, layout, rank, tensors[file_name(rank, kind)], kind=kind)
        for kind in source.kinds
        for rank in layout.ranks
    )
    moves = plan(source.blocks, targets)
    begin(sum(move.nbytes for move in moves))
    with Output(out, files, work, overwrite=overwrite, extra_bytes=companions.nbytes(copies)) as output:
        digests = output.run(moves, jobs or default_jobs(), progress)
        written = companions.write(copies, out)
        manifest = Manifest(
            layout=layout,
            config=companions.with_dtype(source.values, dtype),
            files=_stored_files(source, layout, files, tensors, digests),
            copies=written,
            bare=source.bare,
            left_out=source.left_out,
            made_from=work,
            training=source.manifest.training if source.manifest else {},
        )
        output.finish(lambda: manifests.write(out, manifest))
    output.outcome.notes = tuple(source.notes)
    return output.outcome


def export(
    shards: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    begin: Begin = lambda total: None,
    progress: Progress = lambda count: None,
) -> Outcome:
    """Rank shards, or the weights of training state, as a folder in Hugging Face layout; arguments as above.

    `max_shard_bytes`: of the tensors in one file; a larger tensor has a file of its own.
    """
    source, out = open_source(shards), Path(out)
    if source.form != "shards":
        rule = f"{source.folder} is in Hugging Face layout already"
        raise ConfigError(Problem(key="--from", rule=rule, fix="Give a folder of rank shards."))
    _check_places(source, out)
    prefix = families.weight_names(source.model).prefix if source.bare else ""
    dtypes = {name: _new_dtype(source, name, WEIGHT, dtype) for name in source.dtypes}
    files, tensors = hf_files(source.model, out, dtypes, max_shard_bytes, prefix)
    copies = companions.chosen(source.folder, source.values, dtype)
    work = _fingerprint("export", source, files, copies, [])
    moves = plan(source.blocks, hf_blocks(source.model, tensors))
    index = {INDEX: as_json(index_of(tensors)).encode()} if len(files) > 1 else {}
    begin(sum(move.nbytes for move in moves))
    if not overwrite and _looks_exported(out, files, copies | index) and _is_same(moves, jobs, progress):
        return Outcome(out, files=len(files), was_done=True)
    with Output(out, files, work, overwrite=overwrite, extra_bytes=companions.nbytes(copies)) as output:
        output.run(moves, jobs or default_jobs(), progress)
        companions.write(copies, out)
        output.finish(lambda: companions.write(index, out))
    output.outcome.notes = tuple(source.notes)
    return output.outcome


# ---- checks before anything is written ---------------------------------------------------------------------------


def _check_places(source: Source, out: Path) -> None:
    if out.exists() and out.resolve() == source.folder.resolve():
        raise ConfigError(Problem(key="--out", rule="is the folder that is read", fix="Choose another folder."))
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem(key="--out", rule=f"{out} is a file", fix="Choose a folder."))


def _check_layout(model: ModelConfig, layout: Layout) -> None:
    if layout.pp * layout.interleave > model.num_layers:
        chunks = "pp" if layout.interleave == 1 else "pp x interleave"
        rule = f"{chunks} must be at most the model's {model.num_layers} layers"
        raise ConfigError(Problem(key="--layout", rule=rule, value=layout.pp * layout.interleave))


def _is_done(out: Path, work: str) -> bool:
    """Whether `out` is the whole result of this very work, with no more to be done."""
    whole = (out / manifests.NAME).is_file() and not (out / JOURNAL).exists()
    return whole and open_manifest(out).made_from == work


def _looks_exported(out: Path, files: list[NewFile], beside: companions.Companions) -> bool:
    """Whether all but the weights is as an export leaves it."""
    finished = not (out / JOURNAL).exists() and all(file.fits(out / file.name) for file in files)
    return finished and companions.are_in(beside, out)


def _is_same(moves: list[Move], jobs: int | None, progress: Progress) -> bool:
    """Whether the targets hold already what the moves would write: a Hugging Face folder does not say what it was made
    of, so every byte is compared, until one differs."""
    differs = threading.Event()
    with Reading() as files:

        def compare(move: Move) -> None:
            if differs.is_set():
                return
            digests = perform(files, move, lambda block, row, rows: None)
            if digests != [digest_block(files, block) for block in move.targets]:
                differs.set()
            progress(move.nbytes)

        in_parallel(compare, files.expecting(moves), jobs or default_jobs())
    return not differs.is_set()


def _fingerprint(form: str, source: Source, files: list[NewFile], copies: companions.Companions, more: Any) -> str:
    """Of everything that decides what the output will be."""
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
    source: Source, layout: Layout, out: Path, dtype: str | None
) -> tuple[list[NewFile], dict[str, dict[str, TensorInfo]]]:
    """The rank files to be made, and where each of their tensors will lie."""
    files, tensors = [], {}
    for kind in source.kinds:
        for rank in layout.ranks:
            entries = {}
            for name, (shape, parts) in expected(source.model, layout, rank).items():
                dtypes = {one.piece.hf: _new_dtype(source, one.piece.hf, kind, dtype) for one in parts}
                if len(set(dtypes.values())) > 1:
                    listed = ", ".join(f"{hf} is {one}" for hf, one in dtypes.items())
                    raise CheckpointError(
                        f"{source.folder}: {listed}; they share one parameter, so give them one dtype with --dtype"
                    )
                entries[name] = (next(iter(dtypes.values())), shape)
            name = file_name(rank, kind)
            header, tensors[name] = new_header(out / name, entries, metadata(layout, rank, kind))
            files.append(NewFile(name, header, len(header) + sum(info.nbytes for info in tensors[name].values())))
    return files, tensors


def _new_dtype(source: Source, hf: str, kind: str, dtype: str | None) -> str:
    if kind != WEIGHT:
        return "F32"
    return NAMES[dtype] if dtype else source.dtypes[hf]


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
    files, tensors = [], {}
    for index, group in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        entries = {name.removeprefix(prefix): entry for name, entry in group.items()}
        header, infos = new_header(out / file, entries, {"format": "pt"})
        tensors |= {name: infos[name.removeprefix(prefix)] for name in group}
        nbytes = len(header) + sum(info.nbytes for info in infos.values())
        files.append(NewFile(file, header, nbytes, is_last=file == SINGLE))
    return files, tensors


def index_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Content of the file that makes several weight files one model."""
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {info.name: info.file.name for info in tensors.values()}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_index(out: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Put that file beside the weights."""
    write_json(out / INDEX, index_of(tensors))


def _stored_files(
    source: Source,
    layout: Layout,
    files: list[NewFile],
    tensors: dict[str, dict[str, TensorInfo]],
    digests: dict[Block, str],
) -> dict[str, StoredFile]:
    """What the manifest says of the rank files."""
    by_name = {file.name: file for file in files}
    found = {}
    for kind in source.kinds:
        for rank in layout.ranks:
            file = by_name[file_name(rank, kind)]
            infos = tensors[file.name]
            ranges: dict[str, list[Range]] = {}
            for name, one, block in stored_blocks(source.model, layout, rank, infos):
                piece = one.piece
                ranges.setdefault(name, []).append(Range(piece.hf, piece.hf_dim, one.lo, one.hi, digests[block]))
            stored = {name: StoredTensor(infos[name].dtype, infos[name].shape, tuple(ranges[name])) for name in ranges}
            found[file.name] = StoredFile(rank, kind, file.nbytes, manifests.digest_of(file.header), stored)
    return found
