"""Checkpoints of numbers into quantized ones, rounded to nearest, scaled by activations first where prompts are given
(`scaling`): compressed-tensors' formats, which transformers and vLLM read.

    fp8    float8 e4m3, a scale a row (float-quantized)
    int8   a scale a row, or a group of a row (pack-quantized)
    int4   a scale a group of a row (pack-quantized)

Embedding, head, routers, norms and biases stay as they are. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.convert.convert import NewFolder, write_model
from megalite.convert.output import ByteProgress, Written
from megalite.core.formats import ALL, Elementwise, Packed, Part, WeightFormat
from megalite.core.layout import Layout
from megalite.errors import ConfigError, Problem
from megalite.files import as_json
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights import side_files
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.copying import OpenFiles, matrices
from megalite.weights.dtypes import SAFETENSORS
from megalite.weights.folder import CONFIG
from megalite.weights.manifest import WEIGHT
from megalite.weights.moves import move_of
from megalite.weights.rounding import Elements, convert, to_float
from megalite.weights.table import hf_shapes, pieces

if TYPE_CHECKING:
    from megalite.convert.scaling import Scales

KINDS = ("fp8", "int8", "int4")
FP8_MAX = 448.0
SCALED = "scaled_by_activations"
"""In config.json: weights of layers, norms too, are not those of the model that they were made from."""
DEFAULT_GROUP = 128
"""Columns that share a scale in int4."""


def quantize(
    model: str | Path,
    layout: Layout | None,
    out: str | Path,
    kind: str,
    *,
    group: int | None = None,
    calibrate: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    **how: Any,
) -> Written:
    """A checkpoint into a quantized one: one file a rank of `layout`, None: a folder in Hugging Face layout.

    Args:
        kind: one of KINDS.
        group: columns that share a scale, -1 for all; None: all, in int4 DEFAULT_GROUP.
        calibrate: JSON lines of texts, for whose activations int4 and int8 are scaled (see `scaling`); None: rounded to
            nearest.
        dtype: of what is not quantized, and of the scales of integers; None: the checkpoint's own.
        how: as in `convert.write_shards`.

    ConfigError if a matrix has no whole groups, or the checkpoint is quantized already.
    """
    source, out = open_checkpoint(model, revision), Path(out)
    if source.model.quantization is not None:
        rule = f"{source.folder} is quantized already: {source.model.quantization.words}"
        raise ConfigError(Problem(key="--quantize", rule=rule, fix="Give the unquantized model."))
    values = side_files.with_dtype(source.values, dtype)
    values["quantization_config"] = quantization_config(source.model, kind, group)
    target = families.from_values(source.folder / CONFIG, values, source.beside.generation)
    _check_groups(target, source.model, kind)
    scales = None if calibrate is None else _scales(source, target, Path(calibrate), kind, dtype)
    values |= {SCALED: True} if scales is not None else {}
    written = write_model(partial(_write_folder, source, target, values, dtype, scales), layout, out, **how)
    written.notes = (*written.notes, *(() if scales is None else scales.notes))
    return written


def _scales(source: Checkpoint, target: ModelConfig, prompts: Path, kind: str, dtype: str | None) -> Scales:
    """Scales of the weights, by the activations of prompts."""
    import torch

    from megalite.convert.scaling import search

    if kind == "fp8":
        rule = "is for int4 and int8: in fp8 a scaled channel has the same relative error"
        raise ConfigError(Problem(key="--calibrate", rule=rule))
    if not prompts.is_file():
        raise ConfigError(Problem(key="--calibrate", rule="must be a file of JSON lines", value=str(prompts)))
    assert target.quantization is not None
    format = target.quantization.formats[0][2]
    scale_dtype = getattr(torch, dtype or source.model.dtype)
    assert isinstance(format, Packed)

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        grouped, middle = weight.unflatten(1, (-1, format.group or weight.shape[1])), 1 << (format.bits - 1)
        steps = grouped.abs().amax(2, keepdim=True) / (middle - 0.5)
        steps = torch.where(steps == 0, 1, steps).to(scale_dtype).float()
        rounded: torch.Tensor = (grouped / steps).round_().clamp_(-middle, middle - 1).mul_(steps)
        return rounded.flatten(1)

    formats = {(stage, weight): format for stage, weight, format in target.quantization.formats}
    return search(source.folder, prompts, round_trip, formats)


def quantization_config(model: ModelConfig, kind: str, group: int | None) -> dict[str, Any]:
    """What config.json says of a model that is quantized so."""
    group = group if group is not None else DEFAULT_GROUP if kind == "int4" else -1
    number, bits = ("float", 8) if kind == "fp8" else ("int", int(kind.removeprefix("int")))
    weights: dict[str, Any] = {"num_bits": bits, "type": number, "symmetric": True, "dynamic": False}
    if kind == "fp8" and group != -1:
        raise ConfigError(Problem(key="--group", rule="is for int4 and int8; fp8 has a scale a row", value=group))
    if group != -1 and (group < 8 or group % 8):
        raise ConfigError(Problem(key="--group", rule="must be a multiple of 8, or -1", value=group))
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if kind == "fp8" else None}
    kept = ("head.weight", ".router", ".shared_scale", ".rates.weight")  # small, but the first: see `GatedDelta.rates`
    numbers = [piece.hf.removesuffix(".weight") for piece in pieces(model) if piece.param.endswith(kept)]
    per_tensor = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    has_scales = any(kind.cache_scales for kind in model.of(SoftmaxAttention))
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "fp8" else "pack-quantized",
        "kv_cache_scheme": per_tensor if has_scales else None,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(dict.fromkeys(["lm_head", *numbers])),
    }


def _check_groups(target: ModelConfig, source: ModelConfig, kind: str) -> None:
    """ConfigError where columns are no whole groups."""
    quantized = {piece.hf.removesuffix("weight_packed") for piece in pieces(target) if piece.part}
    for piece in pieces(source):
        format = next((format for _, _, format in target.quantization.formats), None) if target.quantization else None
        group = format.group if isinstance(format, Packed) else ALL
        if not group or piece.hf.removesuffix("weight") not in quantized:
            continue
        columns = piece.split.total if piece.dim == 1 else piece.other[0]
        if columns % group:
            rule = f"{piece.hf} has {columns} columns, which are no whole groups of {group}"
            raise ConfigError(Problem(key="--group", rule=rule, fix="Choose a group that divides all of them, or -1."))


def _write_folder(
    source: Checkpoint,
    target: ModelConfig,
    values: Mapping[str, Any],
    dtype: str | None,
    scales: Scales | None,
    out: Path,
    overwrite: bool,
    progress: ByteProgress,
) -> Written:
    dtypes, formats = _dtypes(source, target, dtype)
    prefix = families.weight_names(source.model).prefix if source.bare else ""
    copies = {**side_files.chosen(source.folder, source.values, dtype), CONFIG: as_json(values).encode()}
    work = ["quantize", source.identity, values, scales.digest if scales is not None else ""]
    new = NewFolder(target, out, dtypes, copies, work, prefix=prefix, overwrite=overwrite)
    with OpenFiles() as files:
        made = _Made(source, files, formats, dtypes, scales)
        written = new.write(lambda name, info: [np.ascontiguousarray(made.tensor(name))], progress)
    written.notes = tuple(source.notes)
    return written


def _dtypes(
    source: Checkpoint, target: ModelConfig, dtype: str | None
) -> tuple[dict[str, str], dict[str, tuple[str, str, WeightFormat]]]:
    """Dtype of every tensor of the target; and, for tensors of quantized weights, (weight, part of it, format)."""
    own = source.dtypes
    usual = SAFETENSORS[dtype] if dtype else None
    dtypes, formats = {}, {}
    assert target.quantization is not None
    format = target.quantization.formats[0][2]
    for piece in pieces(target):
        if piece.part is None:
            dtypes[piece.hf] = own[piece.hf] if piece.exact or usual is None else usual
            continue
        formats[piece.hf] = piece.weight, piece.part.name, format
        scales = "F32" if isinstance(format, Elementwise) else usual or own[piece.weight]
        wide = "I64" if piece.part.name == "weight_shape" else piece.part.dtypes[0]
        dtypes[piece.hf] = scales if piece.part.is_float else wide
    return dtypes, formats


class _Made:
    """Makes the tensors of the target, each weight once for its tensors where they follow one another."""

    def __init__(
        self,
        source: Checkpoint,
        files: OpenFiles,
        formats: Mapping[str, tuple[str, str, WeightFormat]],
        dtypes: Mapping[str, str],
        scales: Scales | None,
    ):
        self.source = source
        self.scales = scales
        self.formats = formats
        self.dtypes = dtypes
        self.files = files
        self.shapes = hf_shapes(source.model)
        self._small: dict[str, Elements] = {}
        """Scales of weights whose codes have been made."""
        self._last: tuple[str, dict[str, Elements]] = ("", {})

    def tensor(self, name: str) -> Elements:
        """One tensor, as it is to be stored."""
        if name not in self.formats:
            values, dtype = self._read(name)
            return convert(values, dtype, self.dtypes[name], name)
        weight, part, format = self.formats[name]
        if part == "weight_shape":
            return np.array(self.shapes[weight], np.int64)
        if name not in self._small and self._last[0] != weight:
            values, dtype = self._read(weight)
            made = codes_of(to_float(values, dtype), format, self.dtypes[f"{weight}_scale"])
            self._last = weight, made
            self._small[f"{weight}_scale"] = made["weight_scale"]
        return self._small.pop(name) if name in self._small else self._last[1][part]

    def _read(self, name: str) -> tuple[Elements, str]:
        values, dtype = whole_tensor(self.source, self.files, name)
        if self.scales is None or name not in self.scales:
            return values, dtype
        return self.scales.applied(name, to_float(values, dtype)), "F32"


def whole_tensor(source: Checkpoint, files: OpenFiles, name: str) -> tuple[Elements, str]:
    """A tensor of a checkpoint by its Hugging Face name, as it is stored, and its dtype."""
    mine = [extent for extent in source.extents if extent.part[0] == name and extent.kind == WEIGHT]
    found = []
    for part in sorted({extent.part for extent in mine}):
        move = move_of(extent for extent in mine if extent.part == part)
        bands = [band.copy() for _, _, band in matrices(files, move, move.sources[0].range.piece.hf_dim)]
        found.append(np.concatenate(bands))
    values: Elements = np.concatenate(found, mine[0].range.piece.hf_dim)
    return values.reshape(hf_shapes(source.model)[name]), mine[0].info.dtype


def rounding_errors(codes: Checkpoint, numbers: Checkpoint) -> Iterator[tuple[str, float, float]]:
    """For each quantized weight its name, its relative distance from the numbers in norm, and the largest distance."""
    import torch

    from megalite.core.quantized import dequantize

    turned = any(kind.turned for kind in numbers.model.of(Experts))
    formats: dict[str, tuple[WeightFormat, dict[str, Part]]] = {}
    for piece in pieces(codes.model):
        if piece.part is not None and piece.format is not None:
            formats.setdefault(piece.weight, (piece.format, {}))[1][piece.hf] = piece.part
    with OpenFiles() as files:
        for weight, (format, parts) in formats.items():
            stored = {}
            for name, part in parts.items():
                values, dtype = whole_tensor(codes, files, name)
                made = torch.from_numpy(values.view(np.uint8) if dtype.startswith("F8") else to_float(values, dtype))
                made = made.view(torch.float8_e4m3fn) if dtype == "F8_E4M3" else made
                made = made.flatten(0, 1).flatten(1) if made.ndim > 2 else made  # of stacked experts
                stored[part.name] = (made.t() if part.turned else made).contiguous()
            exact = torch.from_numpy(to_float(*whole_tensor(numbers, files, weight)))
            if exact.ndim == 3:
                exact = (exact.mT if turned else exact).flatten(0, 1)
            wrong = dequantize(format, stored, [exact.shape[0]], exact.shape[1]) - exact
            yield weight, float(wrong.norm() / exact.norm()), float(wrong.abs().max())


def codes_of(weight: Elements, format: WeightFormat, scale_dtype: str) -> dict[str, Elements]:
    """A matrix float32 [N, K] as the tensors of a format, scales in a dtype of their own."""
    if isinstance(format, Elementwise):
        scales = np.maximum(np.abs(weight).max(1, keepdims=True) / FP8_MAX, np.finfo(np.float32).tiny)
        scales = scales.astype(np.float32)
        return {"weight": to_e4m3(weight / scales), "weight_scale": scales}
    assert isinstance(format, Packed)
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, format.group or columns)
    middle = 1 << (format.bits - 1)
    scales = np.abs(grouped).max(2) / (middle - 0.5)
    stored = convert(np.where(scales == 0, 1, scales).astype(np.float32), "F32", scale_dtype, "a scale")
    codes = np.rint(grouped / to_float(stored, scale_dtype)[:, :, None]).clip(-middle, middle - 1) + middle
    return {
        "weight_packed": pack(codes.reshape(rows, columns).astype(np.uint32), format.bits),
        "weight_scale": stored,
    }


def pack(codes: Elements, bits: int) -> Elements:
    """Codes uint32 [N, K] in int32 [N, K * bits / 32], the first in the lowest bits."""
    per = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).reshape(len(codes), -1, per)
    words: Elements = np.bitwise_or.reduce(codes << (np.arange(per, dtype=np.uint32) * bits), axis=2)
    return words.view(np.int32)


def to_e4m3(values: Elements) -> Elements:
    """Float32 within +-448 as the bits of float8 e4m3, rounded to nearest even (arXiv 2209.05433, table 1)."""
    size = np.minimum(np.abs(values), np.float32(FP8_MAX))
    exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, -6), -6)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)  # 8..16 steps of 2^(exponent - 3); fewer: subnormal
    bits = steps + 8 * (exponent + 6)
    codes: Elements = (bits | (np.signbit(values) << 7)).astype(np.uint8)
    return codes
