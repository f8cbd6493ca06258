"""generation_config.json: a model's default sampling parameters and end-of-sequence tokens. Torch-free.

Precedence is as in transformers: if the file exists only it counts, else the same keys of config.json. The one
exception is `eos_token_id`: where the file names none, config.json's are used, since otherwise nothing would stop the
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megalite.config.load import Loaded, with_defaults
from megalite.config.schema import GeneratingConfig
from megalite.model.hf_config import HFConfig, read_json

Generating = TypeVar("Generating", bound=GeneratingConfig)

NAME = "generation_config.json"
SAMPLING = {
    "repetition_penalty": ("repetition_penalty", float),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "max_new_tokens": ("max_tokens", int),
}
"""Keys with default sampling parameters, as in vLLM -> (field of SamplingParams, type)."""
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", *SAMPLING)
"""Keys that older models keep in config.json."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The generation settings of a model folder; made by `read`."""

    path: Path
    """The file that the values are from, for messages: generation_config.json, or config.json where there is none."""
    values: Mapping[str, Any]
    """Every key of generation_config.json; where there is none, those of `KEYS` that config.json has."""
    config: Mapping[str, Any]
    """The values of config.json."""
    content: bytes | None = None
    """The file as it is; None: there is none, or the values were changed."""

    @classmethod
    def read(cls, folder: str | Path, config: Mapping[str, Any]) -> GenerationConfig:
        """The settings of a model folder whose config.json holds `config`. CheckpointError if the file is damaged."""
        path = Path(folder) / NAME
        if path.exists():
            return cls(path=path, values=read_json(path), config=config, content=path.read_bytes())
        return cls.of_config(path.with_name("config.json"), config)

    @classmethod
    def of_config(cls, path: Path, config: Mapping[str, Any]) -> GenerationConfig:
        """The settings of a model that has only a config.json, at `path`."""
        values = {key: config[key] for key in KEYS if config.get(key) is not None}
        return cls(path=path, values=values, config=config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence tokens as listed, those beyond the vocabulary too. CheckpointError if they are no ids."""
        of_config = HFConfig(self.path.with_name("config.json"), self.config)
        inner = self.config.get("text_config")
        of_text = HFConfig(of_config.path, inner if isinstance(inner, dict) else {})
        key = "eos_token_id"
        return self.token_ids(key) or of_config.token_ids(key) or of_text.token_ids(key) or ()

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One token id or a list of them among the values; None when absent or null."""
        return HFConfig(self.path, self.values).token_ids(key)

    @property
    def sampling(self) -> dict[str, Any]:
        """Default sampling of the model, by the names of SamplingParams' fields: only what is given and not null.

        `do_sample` is not obeyed, as in vLLM. CheckpointError if a value is no number; ranges are those of
        `config.sampling.sampling_problems`, and `path` is their origin.
        """
        given = HFConfig(self.path, self.values)
        found: dict[str, Any] = {}
        for key, (field, kind) in SAMPLING.items():
            value = self.values.get(key)
            if value is None:
                continue
            if type(value) not in (int, float) or not abs(value) < 1e300 or (kind is int and value != int(value)):
                raise given.problem(key, f"must be a {'whole ' if kind is int else ''}number", value)
            found[field] = kind(value)
        return found

    def under(self, loaded: Loaded[Generating]) -> Loaded[Generating]:
        """A generating job's config; these sampling parameters fill those that it leaves open, if it asks for them."""
        if loaded.config.model.generation_config == "none":
            return loaded
        return with_defaults(loaded, "sampling", self.sampling, str(self.path))

    def with_ends(self, token_ids: Iterable[int]) -> GenerationConfig:
        """These settings with `token_ids` as further end tokens. If all are listed, the bytes of the file stay."""
        if set(token_ids) <= set(self.token_ids("eos_token_id") or ()):
            return self
        ends = list(dict.fromkeys([*self.eos_token_ids, *token_ids]))
        values = {**self.values, "eos_token_id": ends[0] if len(ends) == 1 else ends}
        return replace(self, values=values, content=None)

    def to_bytes(self) -> bytes:
        """generation_config.json: the file as it was read where nothing was changed."""
        if self.content is not None:
            return self.content
        return (json.dumps(dict(self.values), indent=2, ensure_ascii=False) + "\n").encode()
