"""Generation as one would explain it: transformers, one whole forward pass a token, and a sampler in plain Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from llguidance import LLMatcher, LLTokenizer, grammar_from
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


class Follower:
    """What may come next by a grammar, asked of llguidance for one sequence after each token."""

    def __init__(self, folder: Path, wanted: dict):
        [(kind, value)] = [item for item in wanted.items() if item[0] != "disable_any_whitespace"]
        if kind == "json_object":
            kind, value = "json", {"type": "object"}
        text = value if isinstance(value, str) else json.dumps(value)
        grammar = grammar_from(kind, text)
        if "disable_any_whitespace" in wanted:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        tokens = LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=EOS)
        self.matcher = LLMatcher(tokens, grammar, log_level=0)

    def allowed(self, stops: set[int]) -> set[int]:
        bits = self.matcher.compute_bitmask()
        allowed = {token for token in range(VOCAB) if bits[token // 8] >> token % 8 & 1} - {EOS}
        return allowed | (stops if self.matcher.is_accepting() else set())

    def ends(self, token: int) -> bool:
        assert self.matcher.consume_token(token), self.matcher.get_error()
        return self.matcher.is_stopped()


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
        follower = None
        if params.structured_outputs:
            follower = Follower(self.folder, params.structured_outputs)
        stops = {*(params.stop_token_ids or ()), *([] if params.ignore_eos else [EOS])}
        while len(output) < params.max_tokens:
            raw = logits_after(self.folder, [*ask.prompt, *output])[-1]
            without = ruled_out(params, output, stops=stops, bad_words=ask.bad_words, vocab=VOCAB)
            if follower is not None:
                without |= set(range(VOCAB)) - follower.allowed(stops)
            number = uniform(ask.seed, index, len(output))
            token = next_token(raw.tolist(), params, ask.prompt, output, without, number)
            output.append(token)
            logprobs.append(raw.log_softmax(-1)[token].item())
            if token in stops or (follower is not None and follower.ends(token)):
                return Completion(output, logprobs, "stop")
        return Completion(output, logprobs, "length")
