"""The weight table of LoRA adapters in training: A and B beside a model's linears, on the ranks that have these.

An `AdapterTable` stands where the functions of `weights.table` take a model's config: so adapters are saved, cut for
another layout, synchronised, fingerprinted and exported by what does it for whole models. Tensors have PEFT's names.
Importable without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config.schema import HybridConfig, LoraSection, TrainConfig
from megalite.core.layout import LayerCosts, Whole
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.hf_config import read_json
from megalite.model.kinds.experts import Experts
from megalite.weights.lora import (
    CONFIG,
    PREFIX,
    chosen_modules,
    is_adaptable,
    linears,
    module_of,
    rank_of,
    read_adapter,
    scale_of,
    unquantized,
)
from megalite.weights.table import Piece, pieces


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """The adapter of one linear: its checkpoint tensor's name without `.weight`, the rank r, and the scale of B A."""

    name: str
    rank: int
    scale: float

    @property
    def short(self) -> str:
        """The last part of its name, such as q_proj."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterTable:
    """Adapters beside `model`, in the order of its linears."""

    model: ModelConfig
    modules: tuple[AdaptedModule, ...]
    tie_embeddings = False
    quantization = None

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    def layer_costs(self) -> LayerCosts:
        """The model's own: adapters lie on the stage of their layer."""
        return self.model.layer_costs()

    def adapted(self) -> dict[str, list[Piece]]:
        """The adapted pieces of the model's own table, by the parameter that they lie in, in their order there."""
        named = {module.name for module in self.modules}
        found: dict[str, list[Piece]] = {}
        for piece in pieces(unquantized(self.model)):
            if is_adaptable(piece):
                found.setdefault(piece.param, []).append(piece)
        ordered = {param: sorted(mine, key=lambda one: len(one.before)) for param, mine in found.items()}
        return {param: mine for param, mine in ordered.items() if any(module_of(one) in named for one in mine)}

    def pieces(self) -> tuple[Piece, ...]:
        """For each linear the A's [r, in] of its modules, stacked, and each module's B [out, r].

        If a linear's outputs are cut over tp, B is cut and every rank has all of A; if its inputs are cut, A is cut and
        every rank has all of B.
        """
        known = {module.name: module for module in self.modules}
        return tuple(piece for mine in self.adapted().values() for piece in _low_rank(mine, known))

    def starts(self, tp: int, tp_rank: int) -> dict[str, list[tuple[AdaptedModule, int]]]:
        """By name of the linear in a decoder: its adapted modules, each with the index of its first output."""
        known = {module.name: module for module in self.modules}
        return {
            param.removesuffix(".weight"): [
                (module, _start(parts, tp, tp_rank)) for module, parts in _by_module(mine, known)
            ]
            for param, mine in self.adapted().items()
        }


def _by_module(mine: list[Piece], known: Mapping[str, AdaptedModule]) -> list[tuple[AdaptedModule, list[Piece]]]:
    """The adapted modules whose pieces a parameter is made of, in its order."""
    names = dict.fromkeys(module_of(piece) for piece in mine)
    return [(known[name], [one for one in mine if module_of(one) == name]) for name in names if name in known]


def _low_rank(mine: list[Piece], known: Mapping[str, AdaptedModule]) -> list[Piece]:
    found, above = [], tuple[Whole, ...]()
    for module, parts in _by_module(mine, known):
        first, linear = parts[0], parts[0].param.removesuffix(".weight")
        a, b = (f"{PREFIX}{module.name}.lora_{which}.weight" for which in "AB")
        a_param, b_param = f"{linear}.lora.a", f"{linear}.lora.b.{module.short}"
        if first.dim == 1:
            assert len(parts) == 1 and not above, "columns of several modules are not stacked"
            (outputs,) = first.other
            found += [
                Piece(a, a_param, first.stage, 1, first.split, (module.rank,), place=first.place),
                Piece(b, b_param, first.stage, 0, Whole(outputs), (module.rank,)),
            ]
            continue
        found.append(Piece(a, a_param, first.stage, 0, Whole(module.rank), first.other, above))
        above = (*above, Whole(module.rank))
        for part in parts:
            before = tuple(split for split, one in zip(part.before, mine, strict=False) if one in parts)
            found.append(
                Piece(b, b_param, part.stage, 0, part.split, (module.rank,), before, part.hf_start, place=part.place)
            )
    return found


def _start(parts: list[Piece], tp: int, tp_rank: int) -> int:
    starts = [] if parts[0].dim == 1 else [one.local_start(tp, tp_rank) for one in parts]
    return min((start for start in starts if start is not None), default=0)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def table_of(section: LoraSection, model: ModelConfig) -> AdapterTable:
    """The adapters that a config asks for. ConfigError: the model has none of its targets, or can't be adapted.

    CheckpointError: the folder of `path` is damaged or of another model.
    """
    if model.quantization is not None and any(model.of(Experts)):
        rule = f"is a mixture of experts stored as {model.quantized_as}, whose experts give no gradient of their inputs"
        raise ConfigError(Problem(key="model.path", rule=rule, fix="Train beside the model that it was made from."))
    if section.path is not None:
        there = read_adapter(section.path, model).modules
        return AdapterTable(
            model,
            tuple(AdaptedModule(one, there[one].rank, there[one].scale) for one in linears(model) if one in there),
        )
    values = peft_config(section, model, "")
    try:
        names = chosen_modules(values["target_modules"], model, section.exclude_modules)
    except CheckpointError as error:
        key = "train.lora.target_modules"
        raise ConfigError(Problem(key=key, rule=str(error).partition(": ")[2], value=section.target_modules)) from error
    ranks = {name: rank_of(values, name) for name in names}
    return AdapterTable(
        model, tuple(AdaptedModule(one, ranks[one], scale_of(values, one, ranks[one])) for one in names)
    )


def adapter_of(config: TrainConfig | HybridConfig, model: ModelConfig) -> AdapterTable | None:
    """The adapters that a job trains; None: it trains the model. Errors as of `table_of`."""
    return table_of(config.train.lora, model) if config.train.lora.is_asked else None


def peft_config(section: LoraSection, model: ModelConfig, base: str) -> dict[str, Any]:
    """What adapter_config.json says of the adapters that a section asks for, less the modules' names where it was a
    pattern; `base`: the model's path."""
    if section.path is not None:
        own = read_json(Path(section.path) / CONFIG)
        now = {"base_model_name_or_path": base, "inference_mode": True, "lora_dropout": section.lora_dropout}
        return {**own, **now}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": section.r,
        "lora_alpha": int(section.lora_alpha) if section.lora_alpha == int(section.lora_alpha) else section.lora_alpha,
        "lora_dropout": section.lora_dropout,
        "use_rslora": section.use_rslora,
        "target_modules": section.target_modules,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def exported_config(section: LoraSection, table: AdapterTable, base: str) -> dict[str, Any]:
    """adapter_config.json of the trained adapters: PEFT adapts by it the very modules that have tensors."""
    names = [module.name for module in table.modules]
    return {**peft_config(section, table.model, base), "target_modules": targets_of(names, table.model)}


def targets_of(names: Collection[str], model: ModelConfig) -> list[str]:
    """The shortest list that means these modules: their last parts where all modules of those are meant."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    # Experts have linears of the same last parts, in versions of transformers that hold them one by one.
    is_all = not any(model.of(Experts)) and chosen_modules(ends, model) == list(names)
    return ends if is_all else list(names)
