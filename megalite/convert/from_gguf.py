"""GGUF files into Hugging Face folders, dequantised, with tokenizer and chat template. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megalite.convert.convert import NewFolder, write_model
from megalite.convert.gguf_model import GgufModel
from megalite.convert.output import ByteProgress, Written
from megalite.core.layout import Layout
from megalite.files import as_json
from megalite.text.gguf_tokenizer import tokenizer_files
from megalite.weights import side_files
from megalite.weights.dtypes import SAFETENSORS
from megalite.weights.folder import CONFIG
from megalite.weights.rounding import Elements
from megalite.weights.rounding import convert as rounded
from megalite.weights.tensor_file import TensorInfo


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
    return write_model(partial(_write_folder, GgufModel(model), dtype), layout, Path(out), **how)


def _write_folder(source: GgufModel, dtype: str | None, out: Path, overwrite: bool, progress: ByteProgress) -> Written:
    stored = SAFETENSORS[dtype] if dtype else source.dtype
    beside: side_files.SideFiles = {
        CONFIG: as_json(side_files.with_dtype(source.values, dtype)).encode(),
        **_generation(source),
        **tokenizer_files(source.metadata, source.path),
    }

    def make(name: str, info: TensorInfo) -> Iterator[Elements]:
        return (rounded(part, "F32", stored, f"{source.path}: {name}") for part in source.tensor(name))

    state = source.path.stat()
    work = ["gguf", str(source.path.resolve()), state.st_size, state.st_mtime_ns]
    dtypes = dict.fromkeys(source.shapes, stored)
    return NewFolder(source.config, out, dtypes, beside, work, overwrite=overwrite).write(make, progress)


def _generation(source: GgufModel) -> side_files.SideFiles:
    """generation_config.json, with every token that ends a text or a turn."""
    ids = [source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(index for index in ids if index is not None))
    return {"generation_config.json": as_json({"eos_token_id": ends}).encode()} if ends else {}
