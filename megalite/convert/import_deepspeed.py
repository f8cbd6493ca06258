"""Weights out of DeepSpeed checkpoints that were written elsewhere, into a folder in Hugging Face layout.

    CHECKPOINT/latest                          the tag below
               TAG/mp_rank_00_model_states.pt  and one optimizer file for each data-parallel rank: ZeRO stages 1 to 3
    CHECKPOINT/zero/NAME/fp32.pt               a universal checkpoint: one whole parameter a file

They are pickles, which can run code when they are read: the one place where this project reads any, and only when it
is told to. The float32 master weights are taken; optimizer state is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.convert.convert import DEFAULT_SHARD_BYTES, NewFolder
from megalite.convert.output import SILENT, ByteProgress, Written
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.hf_config import read_json
from megalite.weights import side_files
from megalite.weights.dtypes import SAFETENSORS, torch_dtype
from megalite.weights.folder import CONFIG
from megalite.weights.hf import check_names, resolve
from megalite.weights.rounding import Elements
from megalite.weights.table import hf_shapes, pieces
from megalite.weights.tensor_file import TensorInfo

WRAPPERS = ("module.", "_forward_module.", "_orig_mod.")
"""What training frameworks put before a model's own names."""

Tensors = dict[str, Callable[[], Tensor]]
"""Float32 tensors by name, made when they are needed."""


def import_checkpoint(
    checkpoint: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    allow_pickle: bool,
    tag: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: ByteProgress = SILENT,
) -> Written:
    """Write a DeepSpeed checkpoint's weights as a Hugging Face folder.

    Args:
        checkpoint: the folder given to `save_checkpoint`, or what ds_to_universal made of it.
        model: folder or hub id whose config.json and tokenizer the weights belong to.
        allow_pickle: must be true; the checkpoint must be one you trust.
        tag: which save; None: the one that `latest` names.
        dtype: of the written weights.
        overwrite: `out` may hold something else, which is then removed.

    Interrupted, the same call begins anew in the same folder. CheckpointError if names or shapes are not the model's;
    nothing is skipped.
    """
    if not allow_pickle:
        rule = "is needed: DeepSpeed's checkpoints are pickles, which can run any code when they are read"
        raise ConfigError(Problem(key="--allow-pickle", rule=rule, fix="Add it only for files that you trust."))
    checkpoint, out = Path(checkpoint), Path(out)
    folder = resolve(model, weights=False, beside=True)
    config = families.read(folder)
    copies = side_files.chosen(folder, read_json(folder / CONFIG), dtype)
    dtypes, files = dict.fromkeys(hf_shapes(config), SAFETENSORS[dtype]), filter(Path.is_file, checkpoint.rglob("*"))
    states = [[str(one.relative_to(checkpoint)), one.stat().st_size, one.stat().st_mtime_ns] for one in sorted(files)]
    how: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
    new = NewFolder(config, out, dtypes, copies, ["import", states], **how)
    new.output.check()
    with contextlib.ExitStack() as stack:
        tensors = _whole(config, _open(checkpoint, tag, stack), str(checkpoint))

        def make(name: str, info: TensorInfo) -> list[Elements]:
            values = tensors[name]().to(torch_dtype(info.dtype)).contiguous()
            return [values.view(-1).view(torch.uint8).numpy()]

        return new.write(make, progress)


# ---- DeepSpeed's files -------------------------------------------------------------------------------------------


def _open(checkpoint: Path, tag: str | None, stack: contextlib.ExitStack) -> list[Tensors]:
    """The tensors of each tensor-parallel rank; a universal checkpoint holds whole ones, as of one rank."""
    for folder in _candidates(checkpoint, tag):
        if (folder / "zero").is_dir():
            return [_universal(folder / "zero")]
        ranks = sorted({match[1] for path in folder.glob("*.pt") if (match := re.search(r"mp_rank_(\d+)_", path.name))})
        if ranks:
            return [_zero(folder, rank, stack) for rank in ranks]
    raise CheckpointError(
        f"{checkpoint}: not a DeepSpeed checkpoint: neither mp_rank_*_model_states.pt nor a folder zero in it. "
        "Give the folder that save_checkpoint was called with."
    )


def _candidates(checkpoint: Path, tag: str | None) -> Iterator[Path]:
    """Where the files may be: below a tag, or right here."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder")
    if tag is None:
        yield checkpoint
        for name in ("latest_universal", "latest"):
            if (checkpoint / name).is_file():
                tag = (checkpoint / name).read_text(encoding="utf-8", errors="replace").strip()
                break
    if tag is not None:
        if not re.fullmatch(r"[\w][\w.\-]*", tag) or ".." in tag:
            raise CheckpointError(f"{checkpoint}: {tag[:100]!r} is not the plain name of a folder")
        if not (checkpoint / tag).is_dir():
            raise CheckpointError(f"{checkpoint / tag}: no such folder; is the tag right?")
        yield checkpoint / tag


def _universal(folder: Path) -> Tensors:
    def read(path: Path) -> Tensor:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            saved = saved["param"] if isinstance(saved, dict) else saved
        except Exception as error:  # whatever a damaged or hostile pickle makes torch raise
            raise CheckpointError(f"{path}: {_first_line(error)}") from error
        if not isinstance(saved, Tensor):
            raise CheckpointError(f"{path}: holds {type(saved).__name__}, not a tensor")
        return saved

    found = {path.parent.name: path for path in folder.glob("*/fp32.pt")}
    return {name: partial(read, path) for name, path in found.items()}


def _zero(folder: Path, rank: str, stack: contextlib.ExitStack) -> Tensors:
    """One tensor-parallel rank's files, put together by DeepSpeed's own code, which knows no more than one."""
    alone = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megalite-"))) / "checkpoint"
    alone.mkdir()
    for path in folder.glob(f"*mp_rank_{rank}_*.pt"):
        os.symlink(path.resolve(), alone / path.name)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            lazy = get_fp32_state_dict_from_zero_checkpoint(str(alone.parent), alone.name, lazy_mode=True)
    except Exception as error:  # whatever a damaged or foreign pickle makes DeepSpeed raise
        reason = _first_line(error).replace(str(alone), str(folder))
        raise CheckpointError(f"{folder}: DeepSpeed can't read it: {reason}") from error
    return {name: tensor.contiguous for name, tensor in lazy.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# ---- the model's tensors -----------------------------------------------------------------------------------------


def _whole(config: ModelConfig, ranks: list[Tensors], where: str) -> Tensors:
    """The model's tensors, tensor-parallel slices joined. CheckpointError unless they are exactly the model's."""
    ranks = [_own_names(config, tensors) for tensors in ranks]
    for tensors in ranks:
        check_names(config, dict.fromkeys(tensors), where)
    shapes = hf_shapes(config)
    fused = {piece.hf for piece in pieces(config) if piece.hf_start}

    def joined(name: str) -> Tensor:
        return _joined(name, [tensors[name]() for tensors in ranks], shapes[name], name in fused)

    return {name: partial(joined, name) for name in shapes}


def _own_names(config: ModelConfig, tensors: Tensors) -> Tensors:
    """Without what wrappers put before the names, and with the family's prefix if the bare model was trained."""
    while any(all(name.startswith(wrapper) for name in tensors) for wrapper in WRAPPERS if tensors):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    prefix = families.weight_names(config).prefix
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name.startswith("lm_head.") else prefix + name: one for name, one in tensors.items()}
    return tensors


def _joined(name: str, slices: list[Tensor], shape: tuple[int, ...], is_fused: bool) -> Tensor:
    """A whole tensor from what each tensor-parallel rank has: a copy of it, or a slice along one dim."""
    shapes = [tuple(one.shape) for one in slices]
    if all(one == shape for one in shapes):
        if not all(torch.equal(slices[0], other) for other in slices[1:]):
            raise CheckpointError(f"{name}: the copies of the tensor-parallel ranks differ")
        return slices[0]
    for dim in range(len(shape)):
        rest = [one[:dim] + one[dim + 1 :] for one in shapes if len(one) == len(shape)]
        fits = len(rest) == len(shapes) and all(one == shape[:dim] + shape[dim + 1 :] for one in rest)
        if fits and sum(one[dim] for one in shapes) == shape[dim]:
            if is_fused and dim == 0:
                break
            return torch.cat(slices, dim)
    reason = "are slices of a fused tensor" if is_fused else f"do not make up the {list(shape)} of config.json"
    raise CheckpointError(
        f"{name}: the parts of the ranks, {', '.join(str(list(one)) for one in shapes)}, {reason}. Make it universal "
        "first (python -m deepspeed.checkpoint.ds_to_universal, with the patterns of the model)."
    )
