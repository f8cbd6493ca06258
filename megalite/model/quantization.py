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

from megalite.core.formats import ALL, Awq, Elementwise, Gptq, Mxfp4, Packed, Quantization, WeightFormat
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.model.family_spec import WeightNames
from megalite.model.kinds.base import Layer, LayerKind, Row
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.softmax import SoftmaxAttention

CONFIG_KEYS = ("quantization_config", "compression_config")
Choice = Callable[[str], WeightFormat | None]
"""Name of a module -> the format of its weight."""
LINEAR = "Linear"
"""What compressed-tensors calls all linear maps."""


@dataclass(frozen=True)
class _Values:
    """A `quantization_config`, whose values are checked as they are read."""

    path: Path
    values: Mapping[str, Any]

    def refusal(self, key: str, rule: str, value: object = None) -> CheckpointError:
        shown = "" if value is None else f", got {value!r:.80}"
        return CheckpointError(f"{self.path}: quantization_config.{key} {rule}{shown}")

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
        return _Values(self.path, value)

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
    if choice("lm_head") is not None:
        raise config.refusal("ignore", "must name lm_head: a quantized output head is not supported")
    formats = []
    for layer in range(model.num_layers):
        rows = [row for row in model.layer_rows(layer) if row.linear]
        formats += [(layer, weight, format) for weight, format in _layer_formats(config, rows, layer, names, choice)]
    if not formats:
        return model
    model = replace(model, quantization=Quantization(tuple(formats), str(method)))
    return replace(model, layers=tuple(_with_units(model, layer, index) for index, layer in enumerate(model.layers)))


def format_of(path: Path, given: Mapping[str, Any], module: str) -> WeightFormat | None:
    """How a `quantization_config` says that the weight of a module is stored."""
    config = _Values(path, given)
    return READERS[config.one_of("quant_method", tuple(READERS))](config)(module)


def _microscaled(config: _Values, model: ModelConfig, names: WeightNames) -> ModelConfig:
    """gpt-oss: experts' matrices in MXFP4, which are [out, in] where those of numbers are turned."""
    skipped, formats, layers = config.names("modules_to_not_convert"), [], list(model.layers)
    for index, layer in enumerate(model.layers):
        if not any(kind.stored == "stacked_turned" for kind in layer.of(Experts)):
            continue
        module = names.tensors["experts_up"].hf.format(layer=index).rpartition(".")[0]
        if any(fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") for name in skipped):
            continue
        if any(size % 32 for kind in layer.of(Experts) for size in (model.hidden_size, kind.intermediate_size)):
            raise config.refusal("quant_method", "needs sizes that are multiples of 32", "mxfp4")
        formats += [(index, weight, Mxfp4()) for weight in ("experts_up", "experts_down")]
        layers[index] = Layer(tuple(replace(part, kind=_upright(part.kind)) for part in layer.sublayers))
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
    for row in rows:
        source = names.tensors[row.weight]
        tensor = source.hf.format(layer=layer, expert=row.expert)
        format = choice(tensor.removesuffix(".weight")) if row.weight != "router" else None
        first, other = by_param.setdefault(row.param, (tensor, format))
        if format != other or by_weight.setdefault(row.weight, format) != format:
            raise config.refusal("ignore", f"must not part {first} and {tensor}: they are computed as one matrix")
        if format is not None and (source.transpose or not tensor.endswith(".weight")):
            raise config.refusal("quant_method", f"is not supported for {tensor}, which is stored turned or fused")
    return [(weight, format) for weight, format in by_weight.items() if format is not None]


def _with_units(model: ModelConfig, layer: Layer, index: int) -> Layer:
    """The layer with dense MLPs that are cut where their formats can be cut."""

    def cut(kind: LayerKind) -> LayerKind:
        if isinstance(kind, SoftmaxAttention) and kind.fused_by_head and model.format(index, "q") is not None:
            raise CheckpointError("query, key and value of each head in one quantized tensor are not supported")
        if not isinstance(kind, DenseMLP):
            return kind
        units = [format.units[0] for name in ("gate", "up") if (format := model.format(index, name))]
        units += [format.units[1] for name in ("down",) if (format := model.format(index, name))]
        return replace(kind, unit=math.lcm(*units))

    return Layer(tuple(replace(part, kind=cut(part.kind)) for part in layer.sublayers))


# ---- one reader for each quant_method ----------------------------------------------------------------------------


def _unless(format: WeightFormat, skipped: list[str], *, parts: bool = True) -> Choice:
    """The format for all modules but those that a list names: as a whole, or as a part of their name between dots."""

    def choice(module: str) -> WeightFormat | None:
        if module.endswith("lm_head"):
            return None
        dotted = f".{module}."
        named = any(f".{name.strip('.')}." in dotted if parts else name == module for name in skipped)
        return None if named else format

    return choice


def _fp8(config: _Values) -> Choice:
    """transformers' FineGrainedFP8 and DeepSeek's (`weight_block_size`); without blocks vLLM's, one scale a matrix."""
    config.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    config.one_of("scale_fmt", ("float",), "float")
    scheme = config.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    skipped = config.names("modules_to_not_convert", "ignored_layers")
    block = config.block("weight_block_size")
    if block is not None:
        inputs = "activation_scale" if scheme == "static" else None
        return _unless(Elementwise(block=block, scale_name="weight_scale_inv", input_scale=inputs), skipped)
    return _unless(Elementwise(block=None, input_scale="input_scale" if scheme == "static" else None), skipped)


def _gptq(config: _Values) -> Choice:
    bits = config.one_of("bits", (4, 8))
    if config.values.get("lm_head"):
        raise config.refusal("lm_head", "must be false: a quantized output head is not supported")
    if config.values.get("dynamic"):
        raise config.refusal("dynamic", "is not supported: all modules must be quantized alike")
    version = config.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    act_order = config.one_of("desc_act", (True, False), False)
    group = config.group(per=32 // bits)
    format = Gptq(bits=bits, group=group, act_order=act_order and group != ALL, zero_offset=int(version == "gptq"))
    return _unless(format, config.names("modules_to_not_convert"))


def _awq(config: _Values) -> Choice:
    config.one_of("bits", (4,))
    config.one_of("version", ("gemm", "GEMM"), "gemm")
    config.one_of("zero_point", (True,), True)
    return _unless(Awq(group=config.group()), config.names("modules_to_not_convert"))


def _compressed_tensors(config: _Values) -> Choice:
    """Groups of modules, each with a scheme; `targets` and `ignore` are names, classes, or `re:` patterns."""
    if (config.values.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise config.refusal("sparsity_config", "must be absent: sparse weights are not supported")
    if config.values.get("transform_config"):
        raise config.refusal("transform_config", "must be absent: rotated weights are not supported")
    usual = config.values.get("format")
    groups: list[tuple[list[str], WeightFormat]] = []
    schemes = config.inner("config_groups")
    for name in schemes.values:
        scheme = schemes.inner(name)
        groups.append((scheme.names("targets"), _scheme(scheme, scheme.values.get("format") or usual)))
    ignored = config.names("ignore")

    def choice(module: str) -> WeightFormat | None:
        if any(_matches(module, pattern) for pattern in ignored):
            return None
        for targets, format in groups:
            if any(one == LINEAR or _matches(module, one) for one in targets):
                return format
        return None

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
        order = weights.one_of("actorder", ("group", "weight", "static", False), False)
        return Packed(bits=bits, group=group, symmetric=symmetric, act_order=order == "group")
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
    static = bool(inputs.values) and inputs.values.get("dynamic") in (None, False)
    dtype = "F8_E4M3" if number == "float" else "I8"
    return Elementwise(dtype=dtype, block=block, input_scale="input_scale" if static else None)


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
