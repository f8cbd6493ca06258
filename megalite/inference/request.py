"""Requests and the sequences sampled for them, as the scheduler sees them; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from megalite.config.schema import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt with its sampling; every field is known before it reaches the scheduler."""

    id: str
    prompt: str | None = None
    """The prompt as text; None: it was given as token ids."""
    prompt_token_ids: tuple[int, ...]
    """At least one token."""
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
    grammar: str = ""
    """Resolved: what params.structured_outputs ask for, as text/grammar.py compiles it; empty: nothing."""
    lora: str = ""
    """Name of the adapter that it runs with; empty: none."""
    stream: bool = False
    """What it gains is given out step by step (`engine.Events.deltas`), not only its result."""
    given: tuple[tuple[int, ...], ...] = ()
    """Replay: the output tokens that each sample had, in order, when its replica was lost; () or one entry a sample.
    They count as sampled, but are not given out again: the request goes on as it would have undisturbed."""
    ended: frozenset[int] = frozenset()
    """Replay: indices of samples that had ended; they go on for no token, whatever `given` says."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and output together at most; LongRoPE and dynamic NTK rotate all of them by it."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def num_samples(self) -> int:
        """Sequences to sample: best_of, else n."""
        return self.params.best_of or self.params.n

    def given_to(self, index: int) -> tuple[int, ...]:
        """Output tokens that a sample has from the beginning."""
        return self.given[index] if self.given else ()

    def end_at(self, token_id: int, num_output: int) -> FinishReason | None:
        """Why a sample ends with its `num_output`-th token; None: it goes on, unless a stop string ends it."""
        if token_id in self.stop_token_ids and num_output >= self.params.min_tokens:
            return "stop"
        return "length" if num_output >= self.max_tokens else None


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion being sampled for a request. The scheduler mutates it; others read."""

    request: Request
    index: int
    """Sample number within the request, from 0; part of the seed, so that samples are never clones."""
    token_ids: list[int]
    """Prompt and output as far as they are known; without the last one, where the prompt is only scored."""
    planned: int = 0
    """Tokens of prompt and output, those included that plans in flight will sample."""
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache once the plans handed out so far have run."""
    row: int = -1
    """Row number while it runs: where the device keeps its tokens, block table and parameters; -1: it does not run."""
    blocks: list[int] = field(default_factory=list)
    """KV block ids, in order."""
    contiguous: bool = True
    """Block ids ascend by one, so keys and values are one run in the cache."""
    finish_reason: FinishReason | None = None

    # Kept by the scheduler, for itself.
    arrival: int = 0
    """Place among all sequences ever added: the order in which they are served."""
    limit: int = 0
    """Most tokens of prompt and output: it ends there at the latest."""
    num_inputs: int = 0
    """Most tokens that it computes: the last sampled one is never an input."""
    cohort: int | None = None
    """The cohort it runs in; None: it waits or has ended."""
    chain: list[bytes] = field(default_factory=list)
    """A salt, then the content key of each full block so far, each made from the one before."""
    registered: int = 0
    """Leading blocks that have been offered to the prefix cache."""
    host_blocks: list[int] = field(default_factory=list)
    """Where its computed blocks are while it is swapped out, in order."""
    score_from: int = 0
    """First prompt position whose logits are wanted and not planned yet."""
    score_end: int = 0
    """End of the prompt positions whose logits are wanted."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Output tokens that are known."""
        return max(0, len(self.token_ids) - len(self.request.prompt_token_ids))


@dataclass(slots=True)
class Row:
    """The tokens start..start + count of one sequence in one step."""

    sequence: Sequence
    row: int
    """The sequence's row number when the plan was made."""
    start: int
    """Position of the first token; everything before it is in the cache already."""
    count: int
    sample: bool
    """A token is sampled from the last one's logits: the chunk reaches the end of what is planned."""
    token: int = -1
    """The token at `start` if the plan has one token and its value is known to the host; else the device knows it."""
    block: int = -1
    """The block at `start`, if the sequence got it for this step."""
    prompt_logits: tuple[int, int] = (0, 0)
    """Half-open range of positions whose next-token log-probabilities of the prompt are wanted (prompt_logprobs)."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Move one block's keys and values, in all layers, before the step's forward pass."""

    kind: Literal["out", "in"]
    """out: device to host (preemption by swap); in: host to device."""
    source: int
    target: int


@dataclass(frozen=True)
class StepPlan:
    """What one step computes. Every rank of a replica makes the same plan from the same history.

    The copies run first, in order; a plan without rows has none.
    """

    step: int
    cohort: int
    rows: tuple[Row, ...]
    admitted: tuple[Sequence, ...] = ()
    """Sequences that begin or go on in a new row: the device has none of their tokens, blocks and parameters there."""
    copies: tuple[BlockCopy, ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @cached_property
    def sampled(self) -> tuple[Row, ...]:
        """Rows that get a token, in order."""
        return tuple(row for row in self.rows if row.sample)

    @cached_property
    def decodes(self) -> bool:
        """Every row computes one token and samples the next."""
        return len(self.sampled) == self.num_tokens and not any(row.prompt_logits[1] for row in self.rows)


class Sampled(NamedTuple):
    """The result of one sampled row; a tuple, as there is one for each token."""

    token_id: int
    """Below 0: the row's logits gave none, see `sampler.FAILURES`."""
    stopped: bool = False
    """A stop string was completed by this token."""
