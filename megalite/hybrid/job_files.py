"""What a hybrid job is made from and what it leaves in its folder: examples, tokenizer, shape, checkpoints, the model.

outputs/run/config.json model.safetensors tokenizer.json ...   the model, at the end
            training/data/                                     the tokenizer, where the job has trained it
            training/log.jsonl                                 rewards, losses, agreement and times
            training/rollouts/iteration-000012.jsonl           every sample with its reward and log-probabilities
            training/reference/step-00000009/                  what was trained in supervised steps, where KL needs it
            training/state/step-00000120/                      what a killed job goes on from
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megalite.config.chat import section_variables
from megalite.config.schema import HybridConfig
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.files import remove_left_behind
from megalite.hybrid.tasks import Example, load_examples
from megalite.text.detokenizer import TokenizerError
from megalite.text.tokenizer import Tokenizer
from megalite.train.checkpoint import claim, load_state, newest_state, remove_unfinished, state_to_resume
from megalite.train.data import bpe
from megalite.train.data import examples as supervised
from megalite.train.data.prepared import end_of_text
from megalite.train.new_model import config_of, starting_point
from megalite.train.trained import trained_of
from megalite.train.trainer import Trainer
from megalite.weights.folder import ModelFolder

log = logging.getLogger(__name__)


@dataclass
class HybridProgress:
    """How far a job has come; saved with the weights."""

    supervised_steps: int = 0
    iterations: int = 0
    weight_version: int = 0
    """Version of the weights that were sampled with last."""


class JobFiles:
    """The files of a hybrid job. Every rank constructs it alike; one writes."""

    def __init__(self, config: HybridConfig, *, is_writer: bool, wait: Callable[[], None]):
        """`wait` returns when every rank has called it. ConfigError names what can't be used."""
        self.config = config
        self.is_writer = is_writer
        data = config.data
        assert config.output.folder is not None and data.source is not None, "checked by config.validate"
        self.folder = Path(config.output.folder)
        self.states = self.folder / "training" / "state"
        self.references = self.folder / "training" / "reference"
        self.claim = claim(self.folder, patience=config.distributed.peer_timeout) if is_writer else None
        wait()  # before any rank looks for a state, which another run could still replace
        self.found = state_to_resume(self.states, resume=config.output.resume)
        variables = section_variables(data)
        self.examples = load_examples(data.source, data.options, split="train", seed=data.seed, variables=variables)
        wait()  # until all have looked for a state: what is unfinished goes now
        if is_writer:
            remove_unfinished(self.states)
            remove_unfinished(self.references)
            training = self.folder / "training"
            remove_left_behind(self.folder, training, training / "rollouts")
        self.tokenizer_folder, self.tokenizer = self._open_tokenizer(wait)
        named = ModelFolder.open(config.model.path).generation.eos_token_ids if config.model.path else ()
        self.end = end_of_text(self.tokenizer, named)
        self.responses = self._responses()
        self.tokenizer.close()
        endings = {*self.tokenizer.special_ids, self.end}
        self.base = starting_point(
            config.model,
            tokenizer=self.tokenizer_folder,
            vocab_size=len(self.tokenizer),
            end=self.end,
            taught=sorted(set().union(*(response.ends(endings) for response in self.responses))),
        )
        self.model = self.base.model
        self.trained = trained_of(config.train.lora, self.base)

    def _open_tokenizer(self, wait: Callable[[], None]) -> tuple[Path, Tokenizer]:
        """The one named, the model's own, or one trained on the task's texts."""
        config = self.config
        named = config.tokenizer.path or config.model.path
        folder = Path(named or self.folder / "training" / "data")
        if named is None and self.is_writer and self.found is None:
            bpe.save(bpe.train(map(_text, self.examples), config.tokenizer.vocab_size), folder)
        wait()
        tokenizer = Tokenizer.load(folder, model=config_of(config.model))
        if tokenizer is None:
            raise ConfigError(Problem(key="tokenizer.path", rule=f"{folder} has no tokenizer.json", fix="Name one."))
        return folder, tokenizer

    def _responses(self) -> list[supervised.Encoded]:
        """The examples' responses, for supervised steps."""
        if self.config.supervised.steps == 0:
            return []
        without = next((example for example in self.examples if example.response is None), None)
        if without is not None:
            rule = f"needs a response in every example, and {without.where} has none"
            raise ConfigError(Problem(key="supervised.steps", rule=rule, value=self.config.supervised.steps))
        found = []
        for example in self.examples:
            try:
                found.append(self._response(example, example.response or ""))
            except TokenizerError as error:  # no fault of the example's
                log.warning("%s is left out: %s", example.where, error)
        if not found:
            raise ConfigError(Problem(key="tokenizer.path", rule="the tokenizer fails at every example"))
        return found

    def _response(self, example: Example, response: str) -> supervised.Encoded:
        if example.messages is None:
            return supervised.encode_pair(self.tokenizer, example.prompt or "", response, self.end)
        return supervised.encode_answer(self.tokenizer, example.messages, response, self.end, **example.variables)

    def close(self) -> None:
        """Let other runs write the folder."""
        if self.claim is not None:
            self.claim.close()

    # ---- checkpoints and the model

    def save_state(self, trainer: Trainer, progress: HybridProgress) -> None:
        """Save model, optimizer and progress. Collective over the training layout."""
        self.trained.save(trainer, self.states, {"progress": asdict(progress)})

    def load_state(self, trainer: Trainer | None) -> HybridProgress | None:
        """Go on from the newest state, if there is one: its progress. Collective; `trainer` where there is one."""
        if self.found is None:
            return None
        path, manifest = self.found
        self.trained.check(manifest)
        progress = manifest.training.get("progress")
        if not isinstance(progress, dict) or progress.keys() != {field.name for field in fields(HybridProgress)}:
            raise CheckpointError(f"{path}: not the state of a hybrid job; to start from it, set model.path to it")
        if trainer is not None:
            load_state(trainer, path, manifest)
        return HybridProgress(**progress)

    def save_reference(self, trainer: Trainer) -> None:
        """Keep the model as it is now for `load_reference`. Collective over the training layout."""
        self.trained.save(trainer, self.references, {})

    def reference_state(self) -> Path:
        """The folder of what `save_reference` kept. ConfigError if it kept nothing."""
        found = newest_state(self.references)
        if found is None:
            rule = "needs the model as it was after the supervised steps, which this run has not kept"
            fix = "Set it to 0 as before, or choose another output.folder."
            value = self.config.hybrid.kl_coefficient
            raise ConfigError(Problem(key="hybrid.kl_coefficient", rule=rule, value=value, fix=fix))
        return found[0]

    def export(self, trainer: Trainer) -> None:
        """Make the folder hold the present model. Collective over the training layout."""
        self.trained.export(trainer.decoder, self.folder, self.config.model.dtype)


def _text(example: Example) -> str:
    """What a tokenizer should know of an example; one that is trained here has no template for chats."""
    return (example.prompt or "") + (example.response or "")
