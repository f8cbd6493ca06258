"""The model that a training job begins with: its shape, its config.json and its decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalite.config.schema import NewModelSection
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.model.hf_config import read_json
from megalite.weights import transfer


def shape_of(
    section: NewModelSection, *, vocab_size: int, eos_token_id: int | None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's shape and its config.json: as given, with what the tokenizer decides filled in.

    ConfigError if the tokenizer has more tokens than the model.
    """
    path = Path(section.path or "model.config") / "config.json"
    values = dict(read_json(path) if section.path else section.config or {})
    values.setdefault("vocab_size", vocab_size)
    values.setdefault("eos_token_id", eos_token_id)
    model = families.from_values(path, values)
    values.setdefault("model_type", model.family)
    values.setdefault("architectures", [families.FAMILIES[model.family].architecture])
    if model.vocab_size < vocab_size:
        rule = f"must be at least the tokenizer's {vocab_size} tokens"
        raise ConfigError(Problem(key="model.config.vocab_size", rule=rule, value=model.vocab_size))
    return model, values


def make_decoder(
    section: NewModelSection, model: ModelConfig, state: ParallelState, *, device: torch.device, seed: int
) -> Decoder:
    """This rank's stage: with the weights of `section.path`, or new ones by `seed`.

    New matrices have the standard deviation `initializer_range` of config.json, if it names one.
    """
    decoder = transfer.build(model, state, dtype=transfer.DTYPES[section.dtype], device=device)
    if section.path is None:
        std = (section.config or {}).get("initializer_range", transfer.INIT_STD)
        transfer.initialise(decoder, seed, std=std)
    else:
        transfer.load_folder(decoder, Path(section.path))
    return decoder
