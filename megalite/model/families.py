"""The model families, whose entries are in family_entries.py; importable without torch.

`read` makes a `ModelConfig` of a model folder; `weight_names` gives the tensor names from which the weight table is
built. A family of one's own is one `register("mine", Family(...))` away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.family_entries import FAMILIES
from megalite.model.family_names import LLAMA_WEIGHTS, TensorRef, WeightNames, names_of
from megalite.model.family_spec import Family, hf_config, model_config, text_values
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import HFConfig, read_json
from megalite.model.quantization import quantized
from megalite.model.unsupported import needed

__all__ = [
    "FAMILIES",
    "LLAMA_WEIGHTS",
    "Family",
    "TensorRef",
    "WeightNames",
    "from_values",
    "read",
    "register",
    "weight_names",
]


def register(name: str, family: Family) -> None:
    """Add a family of one's own; ConfigError if the name or the architecture is taken."""
    stands_for = family.architecture, family.text_model_type
    taken = [
        key
        for key, other in FAMILIES.items()
        if key == name or (other.architecture, other.text_model_type) == stands_for
    ]
    if taken:
        raise ConfigError(Problem(key=f"family {name}", rule=f"is already registered, as {taken[0]}"))
    FAMILIES[name] = family


def read(folder: str | Path) -> ModelConfig:
    """The model described by a folder's config.json (and generation_config.json, for the end-of-sequence tokens).

    CheckpointError if a file is missing, damaged or contradicts itself; ConfigError for an unknown architecture.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    return from_values(path, values, GenerationConfig.read(folder, values))


def from_values(path: Path, values: Mapping[str, object], generation: GenerationConfig | None = None) -> ModelConfig:
    """As `read`, of files already parsed. `path`: of config.json, for messages; `generation` None: no such file."""
    name = _family_of(path, values)
    family = FAMILIES[name]
    values = values if family.text_model_type is None else text_values(values)
    aside = generation or GenerationConfig.of_config(path, values)
    model = model_config(name, family, hf_config(family, path, values), aside)
    return quantized(path, values, model, weight_names(model))


def weight_names(config: ModelConfig) -> WeightNames:
    """The checkpoint tensors of a model."""
    return names_of(config.family, FAMILIES[config.family], config)


def _family_of(path: Path, values: Mapping[str, object]) -> str:
    """The family's name, by `architectures`, or by `model_type` where no architecture is given."""
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise HFConfig(path, values).problem("architectures", "must be a list of names", architectures)
    text = values.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    for architecture in architectures:
        for name, family in FAMILIES.items():
            if family.architecture == architecture and family.text_model_type in (None, text_type):
                return name
    model_type = values.get("model_type")
    if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    if not architectures and model_type is None:
        raise HFConfig(path, values).problem("architectures", "is missing")
    unknown = architectures[0] if architectures else model_type
    supported = {family.architecture for family in FAMILIES.values()}
    raise ConfigError(
        Problem(
            key="model.path",
            rule=f"architecture {unknown}{_of(text_type)} is not supported: it would need "
            f"{needed(str(unknown), values)}",
            fix=f"{len(supported)} are, such as LlamaForCausalLM: README.md has a table. One of your own can be "
            "registered from a module named in model.family_module.",
            origin=str(path),
        )
    )


def _of(text_type: object) -> str:
    return f" over a text model of type {text_type}" if isinstance(text_type, str) else ""
