"""Reads which matrices of a checkpoint are stored in which format from its config.json; importable without torch.

The kinds of `quantization_config` (`quant_method`): fp8 (transformers' and vLLM's), gptq, awq, compressed-tensors
(pack-quantized, float-quantized, int-quantized), mxfp4 (gpt-oss' experts). Every error is a CheckpointError that names
the file and the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megalite.core.formats import ALL, Awq, Elementwise, Gptq, Mxfp4, Packed, Quantization, Stage, WeightFormat
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.model.family_names import WeightNames
from megalite.model.kinds.base import Layer, LayerKind, Row
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.latent import LatentAttention
from megalite.model.kinds.softmax import SoftmaxAttention

CONFIG_KEYS = ("quantization_config", "compression_config")
Choice = Callable[[str], WeightFormat | None]
"""Name of a module -> the format of its weight."""
FP8_NAMES = ("weight_scale", "input_scale")
"""What vLLM and compressed-tensors call the scales of codes of 8 bits."""
LINEAR = "Linear"
"""What compressed-tensors calls all linear maps."""


@dataclass(frozen=True)
class _Values:
    """A `quantization_config`, whose values are checked as they are read."""

    path: Path
    values: Mapping[str, Any]
    name: str = "quantization_config"

    def refusal(self, key: str, rule: str, value: object = None) -> CheckpointError:
        shown = "" if value is None else f", got {value!r:.80}"
        return CheckpointError(f"{self.path}: {self.name}.{key} {rule}{shown}")

    def one_of(self, key: str, choices: tuple[object, ...], default: object = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            listed = ", ".join(map(str, choices))
            raise self.refusal(key, f"must be {'one of ' if len(choices) > 1 else ''}{listed}", value)
        return value

    def names(self, *keys: str) -> list[str]:
        """Lists of names or patterns, under any of the keys, one after the other."""
        found: list[str] = []
        for key in keys:
            value = self.values.get(key) or []
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.refusal(key, "must be a list of names", value)
            found += value
        return found

    def inner(self, key: str) -> _Values:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.refusal(key, "must be an object", value)
        return _Values(self.path, value, f"{self.name}.{key}")

    def group(self, key: str = "group_size", per: int = 8) -> int:
        value = self.values.get(key)
        if value == -1:
            return ALL
        if type(value) is not int or not 1 <= value <= 1 << 20 or value % per:
            raise self.refusal(key, f"must be -1 or a multiple of {per}", value)
        return value

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns of a block; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(n) is not int or not 0 < n < 1 << 20 for n in value)
        ):
            raise self.refusal(key, "must be two whole numbers", value)
        return value[0], value[1]


def quantized(path: Path, values: Mapping[str, Any], model: ModelConfig, names: WeightNames) -> ModelConfig:
    """The model with the formats that config.json names, and cut only where they can be cut.

    Args:
        path: of config.json, for messages.
        values: what it holds.
        names: the tensors of the model.
    """
    given = next((values[key] for key in CONFIG_KEYS if values.get(key) is not None), None)
    if given is None:
        return model
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: quantization_config must be an object, got {given!r:.80}")
    config = _Values(path, given)
    method = config.values.get("quant_method")
    if method == "mxfp4":
        return _microscaled(config, model, names)
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        reason = REFUSED.get(str(method).lower(), f"it is none of {', '.join(READERS)}, mxfp4")
        raise config.refusal("quant_method", f"is not supported: {reason}. Use the model's unquantized weights", method)
    choice = reader(config)
    model = _with_cache_scales(config, model)
    formats: list[tuple[Stage, str, WeightFormat]] = []
    for layer in range(model.num_layers):
        rows = [row for row in model.layer_rows(layer) if row.linear]
        formats += [(layer, weight, format) for weight, format in _layer_formats(config, rows, layer, names, choice)]
    head = _head_format(config, names, choice)
    formats += [] if head is None else [("last", "lm_head", head)]
    if not formats:
        return model
    model = replace(model, quantization=Quantization(tuple(formats), str(method)))
    return replace(model, layers=tuple(_with_units(model, layer, index) for index, layer in enumerate(model.layers)))


def as_applied(model: ModelConfig, asked: str | None) -> ModelConfig:
    """A model as `model.quantization` has it: fp8 makes the layers' linear maps and experts of a model of numbers so, a
    scale a row, while it is loaded; all else is as the checkpoint says."""
    if asked != "fp8" or model.quantization is not None:
        return model
    format = Elementwise(block=(1, ALL))
    stored = {
        (layer, row.weight): format
        for layer in range(model.num_layers)
        for row in model.layer_rows(layer)
        if (row.linear and row.param != "router") or row.expert is not None
    }
    formats = tuple((layer, weight, found) for (layer, weight), found in stored.items())
    return replace(model, quantization=Quantization(formats, "fp8"))


def _head_format(config: _Values, names: WeightNames, choice: Choice) -> WeightFormat | None:
    """The head's format; None where it is the embedding. Lists may call it by its tensor's name or lm_head."""
    if "lm_head" not in names.tensors:
        if config.values.get("lm_head"):
            raise config.refusal("lm_head", "must be false where the head is the embedding, which has no codes")
        return None
    module = names.tensors["lm_head"].hf.removesuffix(".weight")
    return choice(module) if choice("lm_head") is not None else None


def _with_cache_scales(config: _Values, model: ModelConfig) -> ModelConfig:
    """The model with the scales of keys and values that `kv_cache_scheme` says are in the checkpoint."""
    if config.values.get("kv_cache_scheme") is None:
        return model
    if config.values["kv_cache_scheme"] != "static":  # which is all that vLLM's fp8 says
        scheme = config.inner("kv_cache_scheme")
        if scheme.one_of("dynamic", (True, False), False):
            return model  # computed for each token, not stored
        scheme.one_of("type", ("float",))
        scheme.one_of("num_bits", (8,), 8)
        scheme.one_of("strategy", ("tensor",), "tensor")
        scheme.one_of("symmetric", (True,), True)
    if any(model.of(LatentAttention)):
        raise config.refusal("kv_cache_scheme", "must be absent: caches of latent vectors have no scales")

    def scaled(kind: LayerKind) -> LayerKind:
        return replace(kind, cache_scales=True) if isinstance(kind, SoftmaxAttention) else kind

    return replace(model, layers=tuple(_with_kinds(layer, scaled) for layer in model.layers))


def _with_kinds(layer: Layer, changed: Callable[[LayerKind], LayerKind]) -> Layer:
    return Layer(tuple(replace(part, kind=changed(part.kind)) for part in layer.sublayers))


def format_of(path: Path, given: Mapping[str, Any], module: str) -> WeightFormat | None:
    """How a `quantization_config` says that the weight of a module is stored."""
    config = _Values(path, given)
    return READERS[config.one_of("quant_method", tuple(READERS))](config)(module)


def _microscaled(config: _Values, model: ModelConfig, names: WeightNames) -> ModelConfig:
    """gpt-oss: experts' matrices in MXFP4, which are [out, in] where those of numbers are turned."""
    skipped, layers = config.names("modules_to_not_convert"), list(model.layers)
    formats: list[tuple[Stage, str, WeightFormat]] = []
    for index, layer in enumerate(model.layers):
        if not any(kind.stored == "stacked_turned" for kind in layer.of(Experts)):
            continue
        module = names.tensors["experts_up"].hf.format(layer=index).rpartition(".")[0]
        if any(fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") for name in skipped):
            continue
        if any(size % 32 for kind in layer.of(Experts) for size in (model.hidden_size, kind.intermediate_size)):
            raise config.refusal("quant_method", "needs sizes that are multiples of 32", "mxfp4")
        formats += [(index, weight, Mxfp4()) for weight in ("experts_up", "experts_down")]
        layers[index] = _with_kinds(layer, _upright)
    if not formats:
        raise config.refusal(
            "quant_method", "is for experts whose matrices are one tensor, as gpt-oss has them", "mxfp4"
        )
    return replace(model, layers=tuple(layers), quantization=Quantization(tuple(formats), "mxfp4"))


def _upright(kind: LayerKind) -> LayerKind:
    return replace(kind, stored="stacked") if isinstance(kind, Experts) else kind


def _layer_formats(
    config: _Values, rows: list[Row], layer: int, names: WeightNames, choice: Choice
) -> list[tuple[str, WeightFormat]]:
    """The weights of a layer that have a format; matrices that lie in one parameter must have the same."""
    by_weight: dict[str, WeightFormat | None] = {}
    by_param: dict[str, tuple[str, WeightFormat | None]] = {}
    ends: dict[str, int] = {}
    for row in rows:
        source = names.tensors[row.weight]
        tensor = source.hf.format(layer=layer, expert=row.expert)
        format = choice(tensor.removesuffix(".weight")) if row.weight != "router" else None
        first, other = by_param.setdefault(row.param, (tensor, format))
        if format != other or by_weight.setdefault(row.weight, format) != format:
            raise config.refusal("ignore", f"must not part {first} and {tensor}: they are computed as one matrix")
        if format is not None and (source.transpose or not tensor.endswith(".weight")):
            raise config.refusal("quant_method", f"is not supported for {tensor}, which is stored turned or fused")
        start = ends.get(tensor, 0)
        ends[tensor] = start + row.split.total
        if format is not None and start % format.units[0]:
            kept = f"has parts in {tensor} that begin within {format.units[0]} rows, which it keeps together"
            raise config.refusal("quant_method", kept)
    return [(weight, format) for weight, format in by_weight.items() if format is not None]


def _with_units(model: ModelConfig, layer: Layer, index: int) -> Layer:
    """The layer with MLPs that are cut where their formats can be cut; gate and up have one format."""

    def cut(kind: LayerKind) -> LayerKind:
        if isinstance(kind, SoftmaxAttention) and kind.fused_by_head and model.format(index, "q") is not None:
            raise CheckpointError("query, key and value of each head in one quantized tensor are not supported")
        if isinstance(kind, DenseMLP):
            return replace(kind, unit=unit("up", "down"))
        return replace(kind, shared_unit=unit("shared_up", "shared_down")) if isinstance(kind, Experts) else kind

    def unit(up: str, down: str) -> int:
        formats = model.format(index, up), model.format(index, down)
        return math.lcm(*(format.units[side] for side, format in enumerate(formats) if format is not None))

    return _with_kinds(layer, cut)


# ---- one reader for each quant_method ----------------------------------------------------------------------------


def _unless(config: _Values, format: WeightFormat, *lists: str) -> Choice:
    """The format for all modules except those that `lists` name by the whole name or a part between dots. The head has
    it only if `lm_head` is true."""
    skipped, head = config.names(*lists), config.one_of("lm_head", (True, False), False)

    def choice(module: str) -> WeightFormat | None:
        if module.endswith("lm_head") and not head:
            return None
        return None if any(f".{name.strip('.')}." in f".{module}." for name in skipped) else format

    return choice


def _fp8(config: _Values) -> Choice:
    """transformers' FineGrainedFP8 and DeepSeek's, which say `weight_block_size`, of null one scale a matrix; vLLM's,
    which do not, with one scale a matrix and other names."""
    config.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    config.one_of("scale_fmt", ("float", "ue8m0"), "float")  # powers of two are floats as others
    if config.values.get("modules_to_convert"):
        raise config.refusal("modules_to_convert", "must be absent: embeddings are numbers; a head has lm_head: true")
    is_static = config.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    names = ("weight_scale_inv", "activation_scale") if "weight_block_size" in config.values else FP8_NAMES
    format = Elementwise(
        block=config.block("weight_block_size"), scale_name=names[0], input_scale=names[1] if is_static else None
    )
    return _unless(config, format, "modules_to_not_convert", "ignored_layers")


def _gptq(config: _Values) -> Choice:
    bits = config.one_of("bits", (4, 8))
    config.one_of("pack_dtype", ("int32",), "int32")
    if config.values.get("dynamic"):
        raise config.refusal("dynamic", "is not supported: all modules must be quantized alike")
    version = config.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    act_order = config.one_of("desc_act", (True, False), False)
    group = config.group(per=32 // bits)
    format = Gptq(bits=bits, group=group, act_order=act_order and group != ALL, zero_offset=int(version == "gptq"))
    return _unless(config, format, "modules_to_not_convert")


def _awq(config: _Values) -> Choice:
    config.one_of("bits", (4,))
    config.one_of("version", ("gemm", "GEMM"), "gemm")
    config.one_of("zero_point", (True,), True)
    return _unless(config, Awq(group=config.group()), "modules_to_not_convert")


def _compressed_tensors(config: _Values) -> Choice:
    """Groups of modules, each with a scheme; `targets` and `ignore` are names, classes, or `re:` patterns.

    Of the targets that mean a module a name goes before a pattern, and a pattern before a class.
    """
    if (config.values.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise config.refusal("sparsity_config", "must be absent: sparse weights are not supported")
    if config.values.get("transform_config"):
        raise config.refusal("transform_config", "must be absent: rotated weights are not supported")
    usual = config.values.get("format")
    formats: dict[str, WeightFormat] = {}
    schemes = config.inner("config_groups")
    for name in schemes.values:
        scheme = schemes.inner(name)
        if scheme.values.get("weights") is not None:  # else of attention, whose queries stay numbers
            format = _scheme(scheme, scheme.values.get("format") or usual)
            formats |= dict.fromkeys(scheme.names("targets"), format)
    ignored = config.names("ignore")
    targets = sorted(formats, key=lambda target: (target == LINEAR, target.startswith("re:"), target))

    def choice(module: str) -> WeightFormat | None:
        if any(_matches(module, pattern) for pattern in ignored):
            return None
        return next((formats[one] for one in targets if one == LINEAR or _matches(module, one)), None)

    return choice


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _scheme(scheme: _Values, kind: object) -> WeightFormat:
    weights, inputs = scheme.inner("weights"), scheme.inner("input_activations")
    bits = weights.one_of("num_bits", (4, 8))
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), "tensor")
    number = weights.one_of("type", ("int", "float"), "int")
    symmetric = weights.one_of("symmetric", (True, False), True)
    if scheme.values.get("output_activations"):
        raise scheme.refusal("output_activations", "must be absent: quantized outputs are not supported")
    if kind == "pack-quantized" and number == "int":
        group = weights.group(per=32 // bits) if strategy == "group" else ALL
        if strategy not in ("group", "channel"):
            raise weights.refusal("strategy", "must be group or channel where weights are packed", strategy)
        order = weights.one_of("actorder", ("group", "dynamic", "weight", "static", True, False), False)
        is_by_group = order in ("group", "dynamic", True)
        return Packed(bits=bits, group=group, symmetric=symmetric, act_order=is_by_group and group != ALL)
    expected = {"float-quantized": "float", "int-quantized": "int", "naive-quantized": number}
    if expected.get(str(kind)) != number or bits != 8:
        raise scheme.refusal("format", f"of {bits} bits ({number}) is not supported", kind)
    if not symmetric:
        raise weights.refusal("symmetric", "must be true for this format", symmetric)
    block: tuple[int, int] | None = {"tensor": None, "channel": (1, ALL)}.get(strategy)
    if strategy == "block":
        block = weights.block("block_structure")
    elif strategy == "group":
        block = (1, weights.group(per=1))
    is_static = bool(inputs.values) and inputs.values.get("dynamic") in (None, False)
    if is_static:
        inputs.one_of("strategy", ("tensor",), "tensor")
        inputs.one_of("symmetric", (True,), True)
    dtype = "F8_E4M3" if number == "float" else "I8"
    return Elementwise(dtype=dtype, block=block, input_scale=FP8_NAMES[1] if is_static else None)


READERS: dict[str, Callable[[_Values], Choice]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
REFUSED = {
    "squeezellm": "its kernels exist for CUDA only and are unmaintained, and vLLM removed it in 2024",
    "bitsandbytes": "it needs a CUDA-only library and its own kernels",
    "gguf": "it is a file format of llama.cpp's; only safetensors are read",
}
