"""LoRA adapters as PEFT stores them: a folder with adapter_config.json and adapter_model.safetensors. Torch-free.

`read_adapter` believes nothing: every tensor must be a low-rank part of a linear of the model, of the right shape, and
whatever would add more than scale * B A to a weight is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.model.hf_config import read_json
from megalite.weights.table import Piece, pieces
from megalite.weights.tensor_file import TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""
_NEEDED = {
    "bias": ("none", "trained biases change the base model; merge it with PEFT, or train with bias none"),
    "use_dora": (False, "DoRA scales the base model's weights too; merge it with PEFT"),
    "modules_to_save": (None, "whole modules are no low-rank adapter; merge it with PEFT"),
    "trainable_token_indices": (None, "embeddings are not adapted; merge it with PEFT"),
    "target_parameters": (None, "parameters that are not linears are not adapted; merge it with PEFT"),
    "layer_replication": (None, "layers are not replicated"),
    "megatron_config": (None, "only plain linears are adapted"),
    "alora_invocation_tokens": (None, "activated LoRA is not supported"),
    "lora_bias": (False, "a bias of B is not supported; merge it with PEFT"),
    "use_qalora": (False, "QALoRA is not supported"),
    "arrow_config": (None, "routing between adapters is not supported"),
}
"""Key -> the value that is supported, and why no other is."""
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the weights beside which the adapter was trained."""


@dataclass(frozen=True, slots=True)
class LowRankInfo:
    """An adapter's part in one linear module, where it lies."""

    module: str
    """Name of the base model's tensor without `.weight`."""
    a: TensorInfo
    """[r, in]."""
    b: TensorInfo
    """[out, r]."""
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter in a PEFT folder."""

    folder: Path
    modules: Mapping[str, LowRankInfo]


@lru_cache(maxsize=8)
def linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The modules that can have adapters, by their checkpoint tensors without `.weight`: (outputs, inputs)."""
    found: dict[str, tuple[int, int]] = {}
    for piece in pieces(unquantized(model)):
        if is_adaptable(piece):
            rows, columns = found.get(module_of(piece), (0, 0))
            inputs = piece.other[0] if piece.dim == 0 else piece.split.total
            outputs = rows + piece.split.total if piece.dim == 0 else piece.other[0]
            found[module_of(piece)] = outputs, max(columns, inputs)
    return found


def unquantized(model: ModelConfig) -> ModelConfig:
    """The model with plain weights, cut over tp as the quantized ones are, beside which adapters lie."""
    return replace(model, quantization=None)


def is_adaptable(piece: Piece) -> bool:
    """Whether a weight is that of a linear in a layer that is no expert's, and is not absorbed into others."""
    in_layer = isinstance(piece.stage, int) and piece.param.endswith(".weight")
    return piece.linear and piece.expert is None and in_layer and not piece.param.endswith(".kv_up.weight")


def module_of(piece: Piece) -> str:
    return piece.hf.removesuffix(".weight")


def read_adapter(folder: str | Path, model: ModelConfig) -> Adapter:
    """Read the headers of a PEFT folder. CheckpointError: damaged, of another model, or more than LoRA of linears."""
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; a LoRA adapter is a folder as PEFT saves it")
    config = read_json(path)
    _check_config(path, config)
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        way = " adapter_model.bin is a pickle, which can run code; save it again with safe_serialization=True."
        raise CheckpointError(f"{folder}: has no {WEIGHTS}.{way if pickle else ''}")
    return Adapter(folder, _modules(folder / WEIGHTS, config, model))


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key, (usual, reason) in _NEEDED.items():
        if config.get(key) not in (usual, None, [], {}, False):
            raise CheckpointError(f"{path}: {key} is {config[key]!r:.80}: {reason}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_RESIDUAL):
        raise CheckpointError(
            f"{path}: init_lora_weights is {begun!r}, which changed the base model's weights; save it for the plain "
            "base model with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise CheckpointError(f"{path}: {key} must be a number above 0, got {config.get(key)!r:.80}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{path}: {key} must be an object")


def _modules(path: Path, config: Mapping[str, Any], model: ModelConfig) -> dict[str, LowRankInfo]:
    tensors, known = read_header(path), linears(model)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B)\.weight", name)
        if match is None:
            what = "the embeddings are not adapted" if "embed" in name else "it is no low-rank part of a linear"
            raise CheckpointError(f"{path}: tensor {name}: {what}")
        pairs.setdefault(match[1], {})[match[2]] = info
    found = {}
    for module, pair in pairs.items():
        if module not in known:
            raise CheckpointError(f"{path}: {module} can't be adapted: {_why_not(module)}")
        if pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{path}: {module} lacks {'lora_B' if 'lora_A' in pair else 'lora_A'}")
        a, b, (outputs, inputs) = pair["lora_A"], pair["lora_B"], known[module]
        rank = rank_of(config, module)
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise CheckpointError(
                f"{path}: {module} has A {a.shape} and B {b.shape}; rank {rank} of this model's linear is "
                f"{(rank, inputs)} and {(outputs, rank)}"
            )
        found[module] = LowRankInfo(module, a, b, scale_of(config, module, rank))
    if not found:
        raise CheckpointError(f"{path}: adapts nothing")
    return found


def _why_not(module: str) -> str:
    if "embed" in module or module.endswith("wte"):
        return "the embeddings are not adapted"
    if module.endswith("lm_head"):
        return "the head is not adapted"
    return "experts and routers are not adapted" if "expert" in module else "this model has no linear of that name"


def _pattern(config: Mapping[str, Any], key: str, module: str) -> str | None:
    """The key of a pattern's mapping that a module matches at its end, as in PEFT; the first that fits counts."""
    patterns = config.get(key) or {}
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), None)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """r of a module by adapter_config.json."""
    pattern = _pattern(config, "rank_pattern", module)
    return int(config["rank_pattern"][pattern] if pattern else config["r"])


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of B A of a module: alpha / r, or rank-stabilised (arXiv 2312.03732) alpha / sqrt(r)."""
    pattern = _pattern(config, "alpha_pattern", module)
    alpha = float(config["alpha_pattern"][pattern] if pattern else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def chosen_modules(targets: str | Collection[str], model: ModelConfig, exclude: Collection[str] = ()) -> list[str]:
    """The modules that PEFT's `target_modules` means: `all-linear`, one pattern for whole names, or a list of names at
    whose end a module's name has a whole part. CheckpointError: it means none, or one that can't be adapted."""
    known = list(linears(model))

    def means(one: str) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, one) is not None
        return any(one == name or one.endswith(f".{name}") for name in targets)

    found = [one for one in known if means(one) and not any(one == x or one.endswith(f".{x}") for x in exclude)]
    unmet = (
        []
        if isinstance(targets, str)
        else [name for name in targets if not any(one == name or one.endswith(f".{name}") for one in known)]
    )
    if unmet or not found:
        wrong = unmet[0] if unmet else targets
        ends = sorted({one.rpartition(".")[2] for one in known})
        raise CheckpointError(
            f"lora targets: {wrong!r} is no linear that can be adapted ({_why_not(str(wrong))}); there are: "
            f"{', '.join(ends)}"
        )
    return found
