"""Generation as one would explain it: transformers, one whole forward pass a token, and a sampler in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from reference import load
from tiny_models import VOCAB

from megalite.config.schema import SamplingParams
from megalite.inference.io.inputs import derived_seed

EOS = 2
NEAR_TIE = 1e-4


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
            withheld = set(stops) if len(output) < params.min_tokens else set()
            withheld |= {word[-1] for word in ask.bad_words if ends_with([*output, word[-1]], word)}
            if params.allowed_token_ids is not None:
                withheld |= set(range(VOCAB)) - set(params.allowed_token_ids)
            token = choose(raw.tolist(), ask, output, withheld, random_number(ask.seed, index, len(output)))
            output.append(token)
            logprobs.append(raw.log_softmax(-1)[token].item())
            if token in stops:
                return Completion(output, logprobs, "stop")
        return Completion(output, logprobs, "length")


def ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return list(tokens[-len(end) :]) == list(end)


def random_number(seed: int, index: int, position: int) -> float:
    """What draws a token. A seed means the same on every machine, so this is part of the contract."""
    text = f"{seed} {index} {position}".encode()
    return (int.from_bytes(blake2b(text, digest_size=8, person=b"megalite.sample").digest(), "little") >> 11) / 2**53


def choose(logits: list[float], ask: Ask, output: list[int], withheld: set[int], number: float) -> int:
    params = ask.params
    for token in withheld:
        logits[token] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*ask.prompt, *output}:
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    best_first = sorted(range(VOCAB), key=lambda token: -logits[token])
    if params.temperature == 0:
        assert logits[best_first[0]] - logits[best_first[1]] > NEAR_TIE, "a near tie: choose another prompt"
        return best_first[0]
    weights = [math.exp((logit - logits[best_first[0]]) / params.temperature) for logit in logits]
    kept = [token for token in best_first if weights[token] >= params.min_p]
    kept = kept[: params.top_k] if params.top_k else kept
    whole, reached, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if reached < params.top_p * whole:
            nucleus.append(token)
            reached += weights[token]
    goal, upto = number * reached, 0.0
    for token in sorted(nucleus):
        upto += weights[token]
        if goal < upto:
            return token
    raise AssertionError("rounding")
