"""Samples of an iteration, from the engine to every rank of the job and to the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from megalite.files import write_durably
from megalite.inference.io.packed import pack, unpack


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sample of a prompt, as the sampler gave it."""

    example: int
    """Place of the prompt among the task's examples."""
    sample: int
    """Place in its group."""
    prompt: str
    """The prompt as text, the chat template applied."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """All sampled tokens, the one that ended it included."""
    text: str
    """The sampled text, without what ended it."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token, by the sampler's full distribution at the sampling temperature."""
    finish_reason: str | None
    weight_version: int
    """Version of the weights that it was sampled with."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt_token_ids + self.token_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """Reward and other results of a rollout; kept with it."""

    reward: float
    failure: str | None
    """Why there is no reward of its own."""
    advantage: float
    """Advantage in its group; for rejection sampling 1 if it was learnt from, else 0."""
    trainer_logprobs: tuple[float, ...]
    """Log-probabilities of the sampled tokens, by the trainer before the update."""


_NUMBERS = ("prompt_token_ids", "token_ids", "logprobs")
"""Fields that travel as arrays."""


def pack_groups(groups: Mapping[int, Sequence[Rollout]]) -> bytes:
    """Groups of samples by number, for the way from rank to rank; `unpack_groups` is the inverse."""
    rollouts = [rollout for group in groups.values() for rollout in group]
    words = [{name: value for name, value in _values(rollout).items() if name not in _NUMBERS} for rollout in rollouts]
    sizes = {number: len(group) for number, group in groups.items()}
    lines = "\n".join(json.dumps(one) for one in [sizes, *words]).encode()
    ids = [row for rollout in rollouts for row in (rollout.prompt_token_ids, rollout.token_ids)]
    return pack(lines, ids, [rollout.logprobs for rollout in rollouts])


def unpack_groups(data: bytes) -> dict[int, list[Rollout]]:
    lines, ids, logprobs = unpack(data)
    sizes, *words = map(json.loads, lines.split(b"\n"))
    rows = zip(words, ids[::2], ids[1::2], logprobs, strict=True)
    rollouts = (
        Rollout(prompt_token_ids=tuple(prompt), token_ids=tuple(sampled), logprobs=tuple(scores), **rest)
        for rest, prompt, sampled, scores in rows
    )
    return {int(number): list(islice(rollouts, size)) for number, size in sizes.items()}


def rollout_file(folder: Path, iteration: int) -> Path:
    """Where the samples of an iteration are kept."""
    return folder / f"iteration-{iteration:06d}.jsonl"


def write_rollouts(path: Path, iteration: int, rollouts: Iterable[Rollout], scored: Iterable[ScoredRollout]) -> None:
    """Write a JSON line for each sample; the file is there whole or not at all."""
    lines = []
    for rollout, score in zip(rollouts, scored, strict=True):
        values: dict[str, Any] = {"iteration": iteration, **_values(rollout), **_values(score)}
        values["sampler_logprobs"] = values.pop("logprobs")
        lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False))
    write_durably(path, "".join(f"{line}\n" for line in lines))


def _values(record: Rollout | ScoredRollout) -> dict[str, Any]:
    """Fields by name. Not `asdict`, which copies every number of every tuple."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
