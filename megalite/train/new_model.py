"""The model that a training job begins with: its config.json, its decoder and its trainer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalite.config.schema import HybridConfig, NewModelSection, TrainConfig
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.model import families
from megalite.model.decoder import Decoder
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import read_json
from megalite.train.trained import Trained
from megalite.train.trainer import Trainer
from megalite.weights import transfer
from megalite.weights.dtypes import torch_dtype
from megalite.weights.folder import CONFIG, ModelFolder


def config_of(section: NewModelSection) -> dict[str, Any]:
    """config.json of the model, as far as it is known without its tokenizer."""
    return read_json(Path(section.path) / CONFIG) if section.path else dict(section.config or {})


def starting_point(
    section: NewModelSection, *, tokenizer: Path, vocab_size: int, end: int, taught: Collection[int]
) -> ModelFolder:
    """The model folder that training begins with, less its weights: `section.path`, or one made of `section.config`.

    `tokenizer`: the folder of its tokenizer, which has `vocab_size` tokens. A new model ends its texts with `end`;
    `taught`: tokens that responses in the training data end with, at which either model stops too from now on.
    ConfigError if the tokenizer has more tokens than the model.
    """
    if section.path is not None:
        base = ModelFolder.open(section.path, tokenizer=tokenizer)
    else:
        base = _new(config_of(section), tokenizer, vocab_size, end)
    if base.model.vocab_size < vocab_size:
        rule = f"must be at least the tokenizer's {vocab_size} tokens"
        raise ConfigError(Problem(key="model.config.vocab_size", rule=rule, value=base.model.vocab_size))
    generation = base.generation.with_ends(taught)
    return replace(base, generation=generation, model=families.from_values(base.path / CONFIG, base.values, generation))


def _new(values: dict[str, Any], tokenizer: Path, vocab_size: int, end: int) -> ModelFolder:
    """A model of `section.config`; what the tokenizer decides is filled in."""
    path = Path("model.config")
    values.setdefault("vocab_size", vocab_size)
    if values.get("eos_token_id") is None:
        values["eos_token_id"] = end
    model = families.from_values(path / CONFIG, values)
    values.setdefault("model_type", model.family)
    values.setdefault("architectures", [families.FAMILIES[model.family].architecture])
    generation = GenerationConfig.of_config(path / CONFIG, values)
    return ModelFolder(path=path, tokenizer_path=tokenizer, values=values, generation=generation, model=model)


def make_decoder(
    section: NewModelSection, trained: Trained, state: ParallelState, *, device: torch.device, seed: int
) -> Decoder:
    """This rank's stage: with the weights of `section.path`, or new ones by `seed`, and what is trained beside them.

    New matrices have the standard deviation `initializer_range` of config.json, if it names one.
    """
    decoder = transfer.build(trained.base.model, state, dtype=torch_dtype(section.dtype), device=device)
    if section.path is None:
        std = (section.config or {}).get("initializer_range", transfer.INIT_STD)
        transfer.initialise(decoder, seed, std=std)
    else:
        transfer.load_folder(decoder, Path(section.path))
    trained.begin(decoder, seed)
    return decoder


def make_trainer(
    config: TrainConfig | HybridConfig, trained: Trained, state: ParallelState, *, steps: int, device: torch.device
) -> Trainer:
    """The trainer of `make_decoder`'s model, over `steps` optimizer steps. Collective over the layout of `state`."""
    return Trainer(
        make_decoder(config.model, trained, state, device=device, seed=config.train.seed),
        config.optimizer,
        steps=steps,
        zero_stage=config.train.zero_stage,
        recompute=config.train.recompute,
        router_aux_loss_coef=config.model.router_aux_loss_coef,
        deepspeed_keys=config.deepspeed,
        adapter=trained.adapter,
    )
