"""GGUF files into Hugging Face folders, dequantised, with tokenizer and chat template. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.convert.convert import DEFAULT_SHARD_BYTES, hf_files, index_of, write_shards
from megalite.convert.gguf_model import GgufModel
from megalite.convert.output import SILENT, ByteProgress, NewFile, Output, Written
from megalite.core.layout import Layout
from megalite.files import as_json
from megalite.text.gguf_tokenizer import tokenizer_files
from megalite.weights import side_files
from megalite.weights.checkpoint import open_checkpoint
from megalite.weights.dtypes import SAFETENSORS
from megalite.weights.folder import CONFIG
from megalite.weights.manifest import digest_of
from megalite.weights.rounding import convert as rounded


def is_gguf(model: str | Path) -> bool:
    """Whether this is a GGUF file rather than a model folder or hub id."""
    return str(model).endswith(".gguf") and not Path(model).is_dir()


def from_gguf(
    model: str | Path, layout: Layout | None, out: str | Path, *, dtype: str | None = None, **how: Any
) -> Written:
    """A GGUF file into one file a rank of `layout`, None: into a folder in Hugging Face layout.

    `dtype`: of the weights; None: the file's own where its matrices are not quantised, else float32. `how`: as in
    `convert.write_shards`. For a layout the whole model lies beside `out` until the rank files are there.
    ConfigError and CheckpointError as `GgufModel` and `tokenizer_files`.
    """
    source, out = GgufModel(model), Path(out)
    if layout is None:
        return _write_folder(source, out, dtype, how.get("overwrite", False), how.get("progress", SILENT))
    whole = out.with_name(f".{out.name}.from-gguf")
    _write_folder(source, whole, dtype, True, ByteProgress())
    try:
        return write_shards(open_checkpoint(whole), layout, out, **how)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _write_folder(source: GgufModel, out: Path, dtype: str | None, overwrite: bool, progress: ByteProgress) -> Written:
    stored = SAFETENSORS[dtype] if dtype else source.dtype
    files, infos = hf_files(source.config, out, dict.fromkeys(source.shapes, stored), DEFAULT_SHARD_BYTES)
    beside: side_files.SideFiles = {
        CONFIG: as_json(side_files.with_dtype(source.values, dtype)).encode(),
        **_generation(source),
        **tokenizer_files(source.metadata, source.path),
    }

    def converted(file: Path) -> Iterator[memoryview]:
        mine = {name: info for name, info in infos.items() if info.file == file}
        for name, info in sorted(mine.items(), key=lambda item: item[1].offset):
            for part in source.tensor(name):
                yield rounded(part, "F32", stored, f"{source.path}: {name}").reshape(-1).view("uint8").data
            progress.advance(info.nbytes)

    progress.begin(sum(info.nbytes for info in infos.values()))
    with Output(
        out, files, _fingerprint(source, files), overwrite=overwrite, extra_bytes=side_files.nbytes(beside)
    ) as output:
        for file in files:
            output.fill(file.name, converted(out / file.name))
        side_files.write(beside, out)
        output.finish(lambda: side_files.write(index_of(infos) if len(files) > 1 else {}, out))
    return output.written


def _generation(source: GgufModel) -> side_files.SideFiles:
    """generation_config.json, with every token that ends a text or a turn."""
    ids = [source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(index for index in ids if index is not None))
    return {"generation_config.json": as_json({"eos_token_id": ends}).encode()} if ends else {}


def _fingerprint(source: GgufModel, files: list[NewFile]) -> str:
    """A digest of everything that decides what the output will be."""
    state = source.path.stat()
    what = f"gguf {source.path.resolve()} {state.st_size} {state.st_mtime_ns} ".encode()
    return digest_of(what + b"".join(file.header for file in files))
