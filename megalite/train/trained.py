"""What a training run makes: a whole model, or LoRA adapters beside one that stays as it is.

Both are saved, checked when a run goes on, exported and read back; jobs need not know which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megalite.config.schema import LoraSection
from megalite.core.dropout import Dropout
from megalite.core.linear import settle
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.files import as_json
from megalite.model.decoder import Decoder
from megalite.train.checkpoint import check_same_model, save_state
from megalite.train.export import export_folder, export_model, files_beside
from megalite.train.trainer import Trainer
from megalite.weights import identity, lora_training, side_files, transfer
from megalite.weights.adapter_table import AdapterTable, exported_config, table_of
from megalite.weights.checkpoint import BASE
from megalite.weights.dtypes import torch_dtype
from megalite.weights.folder import ModelFolder
from megalite.weights.lora import CONFIG, WEIGHTS
from megalite.weights.manifest import Manifest
from megalite.weights.side_files import SideFiles


class WholeModel:
    """A model that trains with all its weights."""

    noun = "model"
    adapter: AdapterTable | None = None

    def __init__(self, base: ModelFolder):
        self.base = base
        self.beside: SideFiles = files_beside(base)

    def check(self, manifest: Manifest) -> None:
        """ConfigError if a state is of another model."""
        if BASE in manifest.training:
            raise _other_kind("trained adapters, and train.lora.r is null")
        check_same_model(manifest, self.base)

    def begin(self, decoder: Decoder, seed: int) -> None:
        """Make a decoder that is filled with the base's weights ready to train."""

    def save(self, trainer: Trainer, folder: Path, training: Mapping[str, Any]) -> None:
        """See `save_state`. Collective."""
        save_state(trainer, folder, training, self.base, self.beside)

    def export(self, decoder: Decoder, folder: Path, dtype: str) -> None:
        """See `export_folder`. Collective."""
        export_folder(decoder, folder, self.base, self.beside, dtype)

    def receiver(self, state: ParallelState, dtype: str, device: torch.device) -> Decoder:
        """A decoder with all weights but those that train, which are to be brought to it."""
        return transfer.build(self.base.model, state, dtype=torch_dtype(dtype), device=device)

    def read_back(self, folder: Path, state: ParallelState, dtype: str, device: torch.device) -> Decoder:
        """The model that was exported to a folder."""
        decoder = self.receiver(state, dtype, device)
        transfer.load_folder(decoder, folder)
        return decoder


class AdaptersBeside:
    """LoRA adapters beside the model of a folder, which they refer to by its path and a digest."""

    noun = "adapter"

    def __init__(self, base: ModelFolder, section: LoraSection):
        """ConfigError, CheckpointError: the section does not fit the model; see `table_of`."""
        self.base = base
        self.section = section
        self.adapter = table_of(section, base.model)
        self.config = exported_config(section, self.adapter, str(base.path))
        self.beside: SideFiles = {
            name: file.read_bytes() if isinstance(file, Path) else file
            for name, file in side_files.of_tokenizer(base.tokenizer_path).items()
        }
        self.reference = {"path": str(base.path), "digest": identity.sampled_digest(base.path, identity.WEIGHTS)}
        self.noted = {BASE: self.reference, "lora": _noted(section)}

    def check(self, manifest: Manifest) -> None:
        """ConfigError if a state is not of these adapters, or they were beside other weights."""
        noted = manifest.training
        if BASE not in noted:
            raise _other_kind("trained the whole model, and train.lora asks for adapters")
        check_same_model(manifest, self.base)
        if noted[BASE].get("digest") != self.reference["digest"]:
            rule = "does not hold the weights beside which the run began"
            fix = f"They were in {noted[BASE].get('path')}. Set it back, or choose another output.folder."
            raise ConfigError(Problem(key="model.path", rule=rule, value=str(self.base.path), fix=fix))
        mine, theirs = self.noted["lora"], noted.get("lora") or {}
        changed = [name for name, value in mine.items() if theirs.get(name) != value]
        if changed:
            rule = f"is not what the run began with: {', '.join(changed)}"
            raise ConfigError(Problem(key="train.lora", rule=rule, fix="Set it back, or choose another output.folder."))

    def begin(self, decoder: Decoder, seed: int) -> None:
        """Freeze a decoder that is filled with the base's weights, and begin the adapters beside it."""
        settle(decoder)
        rate = self.section.lora_dropout
        lora_training.attach(decoder, self.adapter, Dropout(rate, seed) if rate else None)
        if self.section.path is None:
            state, params = decoder.state, lora_training.parameters(decoder)
            lora_training.initialise(params, self.adapter, state.layout, state.rank, seed)
        else:
            lora_training.load(decoder, self.adapter, self.section.path)

    def save(self, trainer: Trainer, folder: Path, training: Mapping[str, Any]) -> None:
        """A state of the adapters and their optimizer alone. Collective."""
        beside = {**self.beside, CONFIG: as_json(self.config).encode()}
        save_state(trainer, folder, {**training, **self.noted}, self.base, beside)

    def export(self, decoder: Decoder, folder: Path, dtype: str) -> None:
        """Make `folder` a PEFT folder of the present adapters, with the tokenizer. Collective."""
        if decoder.state.rank == decoder.state.layout.first_rank:
            side_files.write({**self.beside, CONFIG: as_json(self.config).encode()}, folder)
        export_model(decoder, folder / WEIGHTS, torch_dtype(dtype), self.adapter)

    def receiver(self, state: ParallelState, dtype: str, device: torch.device) -> Decoder:
        """A decoder with the base's weights, beside which there is room for the adapters."""
        decoder = transfer.build(self.base.model, state, dtype=torch_dtype(dtype), device=device)
        transfer.load_folder(decoder, self.base.path)
        settle(decoder)
        lora_training.attach(decoder, self.adapter)
        return decoder

    def read_back(self, folder: Path, state: ParallelState, dtype: str, device: torch.device) -> Decoder:
        """The base with the adapters that were exported to a folder."""
        decoder = self.receiver(state, dtype, device)
        lora_training.load(decoder, self.adapter, folder)
        return decoder


Trained = WholeModel | AdaptersBeside


def trained_of(section: LoraSection, base: ModelFolder) -> Trained:
    """What a run that begins with `base` trains."""
    return AdaptersBeside(base, section) if section.is_asked else WholeModel(base)


def _noted(section: LoraSection) -> dict[str, Any]:
    """What may not change while a run lasts; where an adapter began does not matter any more."""
    found = asdict(section)
    del found["path"]
    return found


def _other_kind(what: str) -> ConfigError:
    fix = "Set it back, or choose another output.folder."
    return ConfigError(Problem(key="train.lora", rule=f"the run in output.folder {what}", fix=fix))
