"""The policy as it was before its first update, from which a loss may measure the distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megalite.core.adapters import learnt_formats, using
from megalite.model.decoder import Decoder
from megalite.train.micro_batch import MicroBatch
from megalite.train.model import Scorer
from megalite.train.trainer import Trainer
from megalite.weights.manifest import WEIGHT
from megalite.weights.transfer import load_folder, read_parameters


class OtherModel:
    """The reference as a second model with all its weights."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder.requires_grad_(False)
        self._scorer = Scorer(decoder)

    def load(self, state: Path) -> None:
        """Make it what a training state holds."""
        load_folder(self._decoder, state, whole=True)

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Scorer.logprobs`."""
        return self._scorer.logprobs(batches)


class OtherAdapters:
    """The trained model itself, beside whose frozen weights there are other adapters meanwhile, or none."""

    def __init__(self, trainer: Trainer, *, off: bool):
        """Remember the present adapters. `off`: they add nothing yet, so the bare weights serve as the reference."""
        self._trainer = trainer
        self._formats = learnt_formats(trainer.decoder)
        now = {name: one.update for name, one in self._formats.items()}
        self._updates = {name: None if off or one is None else one.copied() for name, one in now.items()}
        self._scorer = Scorer(trainer.decoder)

    def load(self, state: Path) -> None:
        """Make it what a training state holds."""
        table, place = self._trainer.table, self._trainer.state
        params = {
            f"{name}.lora.{inner}": param
            for name, one in self._updates.items()
            if one is not None
            for inner, param in one.named_parameters()
        }
        for name, value in read_parameters(state, table, place.layout, place.rank, WEIGHT):
            params[name].data.copy_(value)

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Scorer.logprobs`."""
        with using(self._formats, self._updates):
            return self._scorer.logprobs(batches)


Reference = OtherModel | OtherAdapters
