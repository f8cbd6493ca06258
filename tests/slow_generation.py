"""Generation as one would explain it: transformers, one whole forward pass a token, and a sampler in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from plain_sampler import next_token, ruled_out, uniform
from reference import load
from tiny_models import VOCAB

from megalite.config.schema import SamplingParams
from megalite.inference.io.inputs import derived_seed

EOS = 2


@dataclass(frozen=True)
class Ask:
    """A request, and the place in the input that its seed comes from when it has none."""

    place: int
    prompt: tuple[int, ...]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()
    """In tokens."""

    @property
    def seed(self) -> int:
        return derived_seed(0, self.place) if self.params.seed is None else self.params.seed


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]
    """Of the tokens, by the model's whole distribution."""
    reason: str


@dataclass(frozen=True)
class Expected:
    completions: list[Completion]
    prompt: list[float]
    """Log-probabilities of the prompt's tokens after the first."""


@torch.no_grad()
def logits_after(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """float32 [len(ids), vocab]."""
    return load(folder)(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


class Slow:
    """Gives what an `Ask` should get from the checkpoint in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, ask: Ask) -> Expected:
        params = ask.params
        made = [self._complete(ask, index) for index in range(params.best_of or params.n)]
        if params.best_of:
            made = sorted(made, key=lambda completion: -sum(completion.logprobs))[: params.n]
        logprobs = logits_after(self.folder, ask.prompt).log_softmax(-1)
        return Expected(made, [logprobs[i, token].item() for i, token in enumerate(ask.prompt[1:])])

    def _complete(self, ask: Ask, index: int) -> Completion:
        params, output, logprobs = ask.params, [], []
        stops = {*(params.stop_token_ids or ()), *([] if params.ignore_eos else [EOS])}
        while len(output) < params.max_tokens:
            raw = logits_after(self.folder, [*ask.prompt, *output])[-1]
            without = ruled_out(params, output, stops=stops, bad_words=ask.bad_words, vocab=VOCAB)
            number = uniform(ask.seed, index, len(output))
            token = next_token(raw.tolist(), params, ask.prompt, output, without, number)
            output.append(token)
            logprobs.append(raw.log_softmax(-1)[token].item())
            if token in stops:
                return Completion(output, logprobs, "stop")
        return Completion(output, logprobs, "length")
