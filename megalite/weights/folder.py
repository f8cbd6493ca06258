"""Reads a model folder, the same way for every job and tool: shape, generation settings, tokenizer. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import read_json
from megalite.text.tokenizer import Tokenizer

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a folder in Hugging Face layout, or of rank shards, holds beside its weights.

        folder = ModelFolder.open("checkpoints/demo")
        folder.model                      the decoder in numbers, its end tokens among them
        folder.generation.sampling        default sampling by SamplingParams' names, e.g. {"temperature": 0.7}
        folder.generation.eos_token_ids   end tokens as the files name them; `model` leaves out impossible ones
        folder.generation.values          all else of generation_config.json: pad_token_id, do_sample, ...
        folder.tokenizer                  None if the folder has none; read on first use

    generation_config.json goes before config.json, see `GenerationConfig`.
    """

    path: Path
    tokenizer_path: Path
    values: dict[str, Any]
    """The values of config.json."""
    generation: GenerationConfig
    model: ModelConfig

    @classmethod
    def open(cls, path: str | Path, *, tokenizer: str | Path | None = None) -> ModelFolder:
        """`tokenizer`: the folder of a tokenizer to use in place of the model's own.

        CheckpointError: a file is missing, damaged or contradicts itself; ConfigError: an unknown architecture.
        """
        path = Path(path)
        values = read_json(path / CONFIG)
        generation = GenerationConfig.read(path, values)
        model = families.from_values(path / CONFIG, values, generation)
        return cls(path=path, tokenizer_path=Path(tokenizer or path), values=values, generation=generation, model=model)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """See `Tokenizer.load`."""
        return Tokenizer.load(self.tokenizer_path)
