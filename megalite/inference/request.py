"""Requests and the sequences sampled for them, as the scheduler sees them; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megalite.config.schema import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt with its sampling; every field is known before it reaches the scheduler."""

    id: str
    prompt: str | None = None
    """As text; None: it was given as token ids."""
    prompt_token_ids: tuple[int, ...]
    """At least one."""
    params: SamplingParams
    seed: int
    """Resolved: params.seed, or derived from engine.seed and the request's place in the input."""
    max_tokens: int
    """Resolved: params.max_tokens, at most max_model_len - len(prompt); 0 only scores the prompt, which may then have
    one token more than max_model_len."""
    stop_token_ids: frozenset[int] = frozenset()
    """Resolved: params.stop_token_ids, and the model's end-of-sequence ids unless ignore_eos."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Resolved: the spellings of params.bad_words in tokens; the last token of one never follows its others."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and output together at most; LongRoPE and dynamic NTK rotate all of them by it."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def num_samples(self) -> int:
        """Sequences to sample: best_of, else n."""
        return self.params.best_of or self.params.n


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion being sampled for a request. The scheduler mutates it; others read."""

    request: Request
    index: int
    """Sample number within the request, from 0; part of the seed, so that samples are never clones."""
    token_ids: list[int]
    """Prompt and output so far; without the last one, where the prompt is only scored."""
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache once the plans handed out so far have run."""
    blocks: list[int] = field(default_factory=list)
    """KV block ids, in order."""
    contiguous: bool = True
    """Block ids ascend by one, so keys and values are one run in the cache."""
    finish_reason: FinishReason | None = None

    # Kept by the scheduler, for itself.
    arrival: int = 0
    """Place among all sequences ever added: the order in which they are served."""
    limit: int = 0
    """Tokens it computes at most, and one more where it is sampled: it ends there at the latest."""
    cohort: int | None = None
    """The cohort it runs in; None: it waits or has ended."""
    chain: list[bytes] = field(default_factory=list)
    """A salt, then the content key of each full block so far, each made from the one before."""
    host_blocks: list[int] = field(default_factory=list)
    """Where its computed blocks are while it is swapped out, in order."""
    score_from: int = 0
    """First prompt position whose logits are wanted and not planned yet."""
    score_end: int = 0
    """End of the prompt positions whose logits are wanted."""
    aborted: bool = False
    """To be ended when the plan in flight comes back."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return max(0, len(self.token_ids) - len(self.request.prompt_token_ids))


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one sequence in one step: token_ids[start : start + count] are computed."""

    sequence: Sequence
    start: int
    """Position of the first token; everything before it is in the cache already."""
    count: int
    sample: bool
    """The last token's logits are sampled: the chunk reaches the end of what is known."""
    prompt_logits: tuple[int, int] = (0, 0)
    """Half-open range of positions whose next-token log-probabilities of the prompt are wanted (prompt_logprobs)."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Move one block's keys and values, in all layers, before the step's forward pass."""

    kind: Literal["out", "in"]
    """out: device to host (preemption by swap); in: host to device."""
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Every rank of a replica makes the same plan from the same history.

    The copies run first, in order; a plan without rows has none.
    """

    step: int
    cohort: int
    rows: tuple[Row, ...]
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def sampled(self) -> tuple[Row, ...]:
        """Rows that get a token, in order."""
        return tuple(row for row in self.rows if row.sample)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came back for one sampled row."""

    token_id: int
    stopped: bool = False
    """A stop string was completed by this token."""
