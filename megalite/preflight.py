"""Everything that can be found out about a run before torch is imported and before any rank is started."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalite.config.load import Loaded, with_origins
from megalite.config.schema import Config, GeneratingConfig, HybridConfig, InferConfig, TokenizerSection
from megalite.config.validate import model_location, parallel_sections, validate
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, MegaliteError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import read_json
from megalite.run.facts import Given
from megalite.weights import shards
from megalite.weights.adapter_table import adapter_of
from megalite.weights.hf import at_hand, read_weights, resolve
from megalite.weights.identity import file_digest, sampled_digest
from megalite.weights.lora import read_adapter
from megalite.weights.table import check_cuts


def check(
    loaded: Loaded[Any], problems: list[Problem], more: list[Problem] | None = None, *, read_headers: bool
) -> ModelConfig | None:
    """Hold the config against the rules and the model folder; gives the model, where it is on this disk.

    `problems`: found while the config was read; `more`: of its surroundings. `read_headers`: look at the headers of
    the weight files too. Raises ConfigError with all problems at once, CheckpointError if only the folder is wrong.
    """
    config = loaded.config
    model, damage = None, None
    try:
        model = read_model(config)
        loaded = as_sampled(loaded)
    except CheckpointError as error:
        damage = error
    except ConfigError as error:
        problems = [*problems, *error.problems]
    rules = [*validate(loaded.config, model, None), *(more or []), *_cut_problems(config, model)]
    if not any(one.key.startswith("train.lora") for one in [*problems, *rules]):
        rules += _adapter_problems(config, model)
    found = with_origins([*problems, *_unforeseen(rules, problems)], loaded.origins)
    if damage and found:
        found += [Problem(key="", rule=line) for line in str(damage).rstrip(".").splitlines()]
    if found:
        raise ConfigError(*found)
    if damage:
        raise damage
    if read_headers:
        _check_weights(config, model)
    return model


def _cut_problems(config: Config, model: ModelConfig | None) -> list[Problem]:
    """Where the format of the weights does not let tp ranks share them so."""
    if model is None or model.quantization is None:
        return []
    for key, parallel in parallel_sections(config).items():
        try:
            check_cuts(model, parallel.sizes[0])
        except ConfigError as error:
            return [replace(one, key=f"{key}.tp") for one in error.problems]
    return []


def _adapter_problems(config: Config, model: ModelConfig | None) -> list[Problem]:
    """Why adapters beside the model can't be trained as the config says."""
    if model is None or isinstance(config, GeneratingConfig):
        return []
    try:
        adapter_of(config, model)
    except ConfigError as error:
        return list(error.problems)
    except CheckpointError as error:
        return [Problem(key="train.lora.path", rule=f"can't be gone on from: {error}")]
    return []


def _unforeseen(rules: list[Problem], problems: list[Problem]) -> list[Problem]:
    """The problems of rules that do not merely follow from a value that could not be taken."""
    known = {problem.key for problem in problems}
    known |= {problem.fix.removeprefix("Did you mean ").removesuffix("?") for problem in problems}
    return [one for one in rules if not any(f"{key}.".startswith(f"{one.key}.") for key in known)]


def given(loaded: Loaded[Any]) -> Given:
    """What a rank says that it was given, for the others to compare."""
    config = loaded.config
    return Given(
        sha256=loaded.sha256,
        config_text=loaded.text,
        layouts=layouts_of(config),
        files=lambda: _digests_of_files(config),
    )


def layouts_of(config: Config) -> dict[str, Layout]:
    """The layouts of a config, by the keys of their sections."""
    return {
        key: Layout(*section.sizes, section.first_rank, section.interleave, section.stages)
        for key, section in parallel_sections(config).items()
    }


def _digests_of_files(config: Config) -> dict[str, str]:
    """Digests of what every rank reads, by its key; '': not on this disk yet. CheckpointError: it can't be read."""
    found: dict[str, str] = {}
    try:
        for key, path in _files_read(config).items():
            found[key] = file_digest(path) if Path(path).is_file() else ""
        if config.model.path is not None:
            revision = config.model.revision if isinstance(config, GeneratingConfig) else None
            folder = at_hand(config.model.path, revision)
            found["model.path"] = sampled_digest(folder) if folder is not None else ""
        for name, adapter in config.lora.items() if isinstance(config, GeneratingConfig) else ():
            found[f"lora.{name}"] = sampled_digest(Path(adapter))
        if not isinstance(config, GeneratingConfig) and config.train.lora.path is not None:
            found["train.lora.path"] = sampled_digest(Path(config.train.lora.path))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: can't be read: {error.strerror}") from error
    return found


def _files_read(config: Config) -> dict[str, str]:
    """Files with the work, read by every rank; training data is read by one."""
    if isinstance(config, InferConfig) and config.input.file not in (None, "-"):
        return {"input.file": str(config.input.file)}
    return {"data.source": str(config.data.source)} if isinstance(config, HybridConfig) else {}


def read_model(config: Config) -> ModelConfig | None:
    """The model that a config names, by its config.json; None if that is not on this disk (a hub id, a wrong path)."""
    if isinstance(config, GeneratingConfig):
        name = config.model.family_module
        if name is not None and all(part.isidentifier() for part in name.split(".")):
            import_family(name, "model.family_module")
    elif config.model.path is None and config.model.config is not None:
        return _new_model(config.model.config, config.tokenizer)
    path = config.model.path
    if path is None or model_location(path) != "folder" or not Path(path).is_dir():
        return None
    return families.read(path)


def read_shape(config: Config) -> ModelConfig | None:
    """As `read_model`; of a model of the hub config.json is downloaded, if need be. CheckpointError: that fails."""
    path = config.model.path
    if path is not None and model_location(path) == "hub":
        revision = config.model.revision if isinstance(config, GeneratingConfig) else None
        return families.read(resolve(path, revision, weights=False))
    return read_model(config)


def as_sampled(loaded: Loaded[Any]) -> Loaded[Any]:
    """The config with the sampling that the model's owner sets where it sets none; as it is if the model is not here.

    CheckpointError: what the folder says of it is damaged.
    """
    config = loaded.config
    if not isinstance(config, GeneratingConfig) or config.model.path is None:
        return loaded
    folder = at_hand(config.model.path, config.model.revision)
    if folder is None:
        return loaded
    return GenerationConfig.read(folder, read_json(folder / "config.json")).under(loaded)


def _new_model(values: dict[str, Any], tokenizer: TokenizerSection) -> ModelConfig | None:
    """The model that is to be trained anew; None if its size hangs on a tokenizer not read here."""
    if "vocab_size" not in values:
        if tokenizer.path is not None:
            return None
        values = {**values, "vocab_size": tokenizer.vocab_size}
    try:
        return families.from_values(Path("model.config"), values)
    except CheckpointError as error:  # the values stand in the config, not in a checkpoint
        raise ConfigError(str(error)) from error


def import_family(name: str, key: str) -> None:
    """Import the user's module `name`, which registers a model family; ConfigError naming `key` if that fails."""
    try:
        importlib.import_module(name)
    except MegaliteError:
        raise
    except Exception as error:  # the user's own module may raise anything
        rule = f"importing it failed: {type(error).__name__}: {error}".splitlines()[0]
        fix = "Install it or add its folder to PYTHONPATH; --debug shows the traceback."
        raise ConfigError(Problem(key=key, rule=rule, value=name, fix=fix)) from error


def _check_weights(config: Config, model: ModelConfig | None) -> None:
    """The headers of local weight files, so that one that is damaged or of another model shows before any rank is
    started."""
    dummy = isinstance(config, GeneratingConfig) and config.model.load_format == "dummy"
    if model is None or config.model.path is None or dummy:
        return
    if shards.is_sharded(config.model.path):  # the headers of rank files are checked by their ranks
        shards.open_manifest(config.model.path)
    else:
        read_weights(resolve(config.model.path), model)
    for folder in config.lora.values() if isinstance(config, GeneratingConfig) else ():
        read_adapter(folder, model)
