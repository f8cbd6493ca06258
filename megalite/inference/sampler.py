"""Chooses the next token of each sampled row, and reports log-probabilities.

What is done to a row of logits, in this order (vLLM's, vllm/v1/sample/sampler.py):

1. log-probabilities are taken from the raw logits, in float32 (or from those over the temperature, see `Sampler`);
2. ids outside allowed_token_ids, ids that would complete one of bad_words and, before min_tokens, ids that would end
   the output get -inf;
3. logit_bias is added;
4. repetition, then frequency, then presence penalty;
5. temperature 0 (below 1e-5): the largest logit wins, of equal ones the lowest id;
6. else temperature, min_p, top_k, top_p, and a draw from what is left (draws.py).

A token comes from its own row, seed, sample index and position, never from the batch. Equal probabilities rank by id,
lowest first: top_k keeps exactly k tokens, top_p the smallest set, and both end in the greedy choice.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference import draws
from megalite.inference.memory import SAMPLING_CHUNK
from megalite.inference.request import Row, Sequence

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: a division by them would overflow."""
CPU_CHUNK = 2**17
"""Logits worked on at once on a CPU: what stays in its cache. On an accelerator memory.SAMPLING_CHUNK."""

Rows = list[Row] | tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's place in the model's full distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest; of equals the lowest id comes first."""
    top: list[tuple[int, float]]
    """(id, logprob) of the k likeliest, best first; then the token itself if it is not among them."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was sampled, one entry a row."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the token, from the raw logits in float32: before penalties and bias, and before the temperature unless the
    sampler is `at_temperature`."""
    top_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """For rows whose params.logprobs is set."""


def policy_temperature(params: SamplingParams) -> float:
    """The temperature of the distribution that a token's log-probability is taken from; 1 where sampling is greedy."""
    return params.temperature if params.temperature >= GREEDY_BELOW else 1.0


class Sampler:
    """Samples rows of logits; keeps what penalties need to know of a sequence until `forget`.

    It works wherever the logits are. Nothing depends on which rows are sampled together.
    """

    def __init__(self, vocab_size: int, *, at_temperature: bool = False):
        """`at_temperature`: a sampled token's log-probability is that of the distribution at its request's temperature,
        which importance weights need; greedy requests stay at temperature 1."""
        self.vocab_size = vocab_size
        self.at_temperature = at_temperature
        self._seen: dict[Sequence, _Seen] = {}

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Rows) -> SampledRows:
        """Sample each row; `logits` [R, V] of any float dtype are the rows', in order, and are left as they are.

        Raises MegaliteError that names the request when its logits are NaN or leave no token to choose.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        sampled = SampledRows()
        step = self._chunk_rows(logits)
        for start in range(0, len(rows), step):
            self._sample(logits[start : start + step].float(), rows[start : start + step], sampled)
        return sampled

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, next_ids: list[int] | tuple[int, ...], k: int, *, request_id: str = "?"
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow in a prompt.

        `logits` [T, V], `next_ids` [T] the token after each row; `k` likeliest tokens are listed beside it, -1: all. A
        token that the model rules out has -inf. Raises MegaliteError for NaN.
        """
        scores: list[TokenLogprobs] = []
        step = self._chunk_rows(logits)
        for start in range(0, len(next_ids), step):
            ids = torch.tensor(next_ids[start : start + step], device=logits.device)
            raw = _sound(logits[start : start + step].float(), [request_id] * len(ids))
            scores += self._describe(raw, raw.log_softmax(-1), ids, [k] * len(ids))
        return scores

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that ended."""
        self._seen.pop(sequence, None)

    def _chunk_rows(self, logits: Tensor) -> int:
        budget = CPU_CHUNK if logits.device.type == "cpu" else SAMPLING_CHUNK
        return max(1, budget // self.vocab_size)

    def _sample(self, raw: Tensor, rows: Rows, sampled: SampledRows) -> None:
        """Append to `sampled` what rows with float32 logits `raw` [R, V] get."""
        params = [row.sequence.request.params for row in rows]
        names = [row.sequence.request.id for row in rows]
        raw = _sound(raw, names)
        logits = self._edit(raw, rows)
        if logits is not raw:
            logits = _sound(logits, names)
        ids = self._choose(logits, rows)
        drawn_from = logprobs = raw.log_softmax(-1)
        if self.at_temperature and any(p.temperature != 1 for p in params):
            divisors = torch.tensor([policy_temperature(p) for p in params], device=raw.device)
            drawn_from = (raw / divisors[:, None]).log_softmax(-1)
        details: list[TokenLogprobs | None] = [None] * len(rows)
        wanted = {i: p.logprobs for i, p in enumerate(params) if p.logprobs is not None}
        if wanted:
            places = list(wanted)
            rows_of = partial(_rows, rows=places)
            described = self._describe(rows_of(raw), rows_of(logprobs), rows_of(ids), list(wanted.values()))
            for i, detail in zip(places, described, strict=True):
                details[i] = detail
        sampled.token_ids.extend(ids.tolist())
        sampled.logprobs.extend(drawn_from.gather(1, ids[:, None])[:, 0].tolist())
        sampled.top_logprobs.extend(details)

    # Edits: allowed_token_ids, bad_words, min_tokens, logit_bias, penalties

    def _edit(self, raw: Tensor, rows: Rows) -> Tensor:
        """`raw`, or a changed copy where a row asks for it; float32 [R, V]."""
        narrowed: dict[int, list[int]] = {}
        masked: list[int] = []
        biased: list[int] = []
        biases: list[float] = []
        penalised: dict[int, Sequence] = {}
        for i, row in enumerate(rows):
            params = row.sequence.request.params
            if params.allowed_token_ids is not None:
                narrowed[i] = params.allowed_token_ids
            # A stop token beyond the vocabulary can never be sampled, so there is nothing to withhold.
            masked += (i * self.vocab_size + id for id in _withheld(row.sequence) if 0 <= id < self.vocab_size)
            for id, bias in (params.logit_bias or {}).items():
                if not 0 <= id < self.vocab_size:
                    raise MegaliteError(
                        f"request {row.sequence.request.id}: logit_bias: token id must be in "
                        f"0..{self.vocab_size - 1}, got {id}"
                    )
                biased.append(i * self.vocab_size + id)
                biases.append(bias)
            if params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty:
                penalised[i] = row.sequence
        if not (narrowed or masked or biased or penalised):
            return raw
        logits = raw.clone(memory_format=torch.contiguous_format)
        flat = logits.view(-1)
        for i, allowed in narrowed.items():
            ids = torch.tensor(allowed, device=flat.device)
            logits[i].fill_(-math.inf)[ids] = raw[i, ids]
        if masked:
            flat[torch.tensor(masked, device=flat.device)] = -math.inf
        if biased:
            flat[torch.tensor(biased, device=flat.device)] += torch.tensor(biases, device=flat.device)
        if penalised:
            self._penalise(flat, penalised)
        return logits

    def _penalise(self, flat: Tensor, sequences: dict[int, Sequence]) -> None:
        """Penalise tokens seen by these rows of `flat`, [R * V] float32, in place (vLLM's and CTRL's formulas)."""
        ids, counts = array("q"), array("q")
        lengths: list[int] = []
        for sequence in sequences.values():
            seen = self._seen.get(sequence)
            if seen is None:
                for ended in [other for other in self._seen if other.finish_reason is not None]:
                    self.forget(ended)
                seen = self._seen[sequence] = _Seen(sequence)
            seen.update(sequence)
            ids += seen.ids
            counts += seen.counts
            lengths.append(len(seen.ids))
        if not ids:
            return
        repeats = torch.tensor(lengths)
        options = [sequence.request.params for sequence in sequences.values()]
        per_row = torch.tensor(
            [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in options], dtype=torch.float32
        )
        repetition, frequency, presence = per_row.repeat_interleave(repeats, 0).to(flat.device).unbind(1)
        where = torch.tensor([i * self.vocab_size for i in sequences]).repeat_interleave(repeats)
        where = (where + torch.frombuffer(ids, dtype=torch.int64)).to(flat.device)
        times = torch.frombuffer(counts, dtype=torch.int64).to(flat.device)
        values = flat[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[where] = values - frequency * times - presence * (times > 0)

    # Choices

    def _choose(self, logits: Tensor, rows: Rows) -> Tensor:
        """Token ids [R] of edited logits [R, V], each row's by the cheapest way that its parameters allow."""
        ways: dict[Callable[[Tensor, Rows], Tensor], list[int]] = {}
        for i, row in enumerate(rows):
            ways.setdefault(self._way(row.sequence.request.params), []).append(i)
        ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for way, places in ways.items():
            chosen = way(_rows(logits, places), [rows[i] for i in places])
            if len(ways) == 1:
                return chosen
            ids[places] = chosen
        return ids

    def _way(self, params: SamplingParams) -> Callable[[Tensor, Rows], Tensor]:
        if params.temperature < GREEDY_BELOW:
            return _largest
        if 0 < params.top_k < self.vocab_size:
            return self._draw_of_best
        return self._draw_of_nucleus if params.top_p < 1 else self._draw_of_all

    def _draw_of_best(self, logits: Tensor, rows: Rows) -> Tensor:
        top_k = [row.sequence.request.params.top_k for row in rows]
        return draws.draw_of_best(self._weights(logits, rows), top_k, _top_p(logits, rows), _numbers(logits, rows))

    def _draw_of_nucleus(self, logits: Tensor, rows: Rows) -> Tensor:
        return draws.draw(draws.nucleus(self._weights(logits, rows), _top_p(logits, rows)), _numbers(logits, rows))

    def _draw_of_all(self, logits: Tensor, rows: Rows) -> Tensor:
        return draws.draw(self._weights(logits, rows), _numbers(logits, rows))

    def _weights(self, logits: Tensor, rows: Rows) -> Tensor:
        """Probabilities [R, V] as integers, after temperature and min_p."""
        params, one = [row.sequence.request.params for row in rows], draws.largest_weight(self.vocab_size)
        weights = draws.integer_weights(logits, [p.temperature for p in params])
        if any(p.min_p > 0 for p in params):
            least = torch.tensor([math.ceil(p.min_p * one) for p in params], device=logits.device)
            weights.masked_fill_(weights < least[:, None], 0)
        return weights

    # Log-probabilities

    def _describe(self, raw: Tensor, logprobs: Tensor, ids: Tensor, ks: list[int]) -> list[TokenLogprobs]:
        """Rank of `ids` [R] in float32 logits [R, V] without NaN, and each row's k likeliest; -1: all."""
        ks = [k if k >= 0 else self.vocab_size for k in ks]
        descending_ids = draws.descending_ids(self.vocab_size, raw.device)
        mine = raw.gather(1, ids[:, None])
        equal_before = (raw == mine) & (descending_ids > self.vocab_size - 1 - ids[:, None])
        ranks = (1 + (raw > mine).sum(-1) + equal_before.sum(-1)).tolist()
        own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        top = draws.best_ids(raw, min(max(ks), self.vocab_size))
        described = []
        listing = zip(ids.tolist(), own, ranks, ks, top.tolist(), logprobs.gather(1, top).tolist(), strict=True)
        for token_id, logprob, rank, k, top_ids, top_logprobs in listing:
            best = list(zip(top_ids[:k], top_logprobs[:k], strict=True))
            if rank > k:
                best.append((token_id, logprob))
            described.append(TokenLogprobs(token_id, logprob, rank, best))
        return described


class _Seen:
    """Which tokens of a sequence penalties apply to, and how often its output has each."""

    def __init__(self, sequence: Sequence):
        self.ids = array("q")
        self.counts = array("q")
        """Times in the output; 0: only in the prompt."""
        self._places: dict[int, int] = {}
        # Only the repetition penalty looks at the prompt.
        self._known = 0 if sequence.request.params.repetition_penalty != 1 else sequence.num_prompt

    def update(self, sequence: Sequence) -> None:
        """Count the tokens that are new since the last call; a sequence only grows."""
        for position in range(self._known, len(sequence.token_ids)):
            token_id = sequence.token_ids[position]
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += position >= sequence.num_prompt
        self._known = len(sequence.token_ids)


def _withheld(sequence: Sequence) -> set[int]:
    """Ids that may not come now: before min_tokens those that end the output (stop_token_ids includes end-of-sequence
    unless ignore_eos), and those that would complete a bad word whose other tokens the output ends with."""
    request, output = sequence.request, sequence.num_output
    ids = set(request.stop_token_ids) if output < request.params.min_tokens else set()
    for *head, last in request.bad_words:
        if len(head) <= output and sequence.token_ids[len(sequence.token_ids) - len(head) :] == head:
            ids.add(last)
    return ids


def _numbers(logits: Tensor, rows: Rows) -> Tensor:
    """The uniform numbers [R], float64, that draw these rows' tokens."""
    sequences = [row.sequence for row in rows]
    numbers = [draws.uniform(seq.request.seed, seq.index, seq.num_output) for seq in sequences]
    return torch.tensor(numbers, dtype=torch.float64, device=logits.device)


def _top_p(logits: Tensor, rows: Rows) -> Tensor:
    shares = [row.sequence.request.params.top_p for row in rows]
    return torch.tensor(shares, dtype=torch.float64, device=logits.device)


def _largest(logits: Tensor, rows: Rows) -> Tensor:
    """Ids [R] of the largest of logits [R, V] without NaN, of equals the lowest.

    On the CPU by numpy, whose argmax uses vector instructions: measured 20 times as fast as torch's.
    """
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """The given rows, in ascending order; the tensor itself if that is all of them."""
    return values if len(rows) == len(values) else values[rows]


def _sound(logits: Tensor, request_ids: list[str]) -> Tensor:
    """Float32 logits [R, V] with +inf made a number beyond all others.

    Raises MegaliteError, naming the request, for a row that holds NaN or nothing but -inf.
    """
    peaks = logits.amax(-1).tolist()
    for request_id, peak in zip(request_ids, peaks, strict=True):
        if math.isnan(peak):
            raise MegaliteError(
                f"request {request_id}: the model's logits are not numbers (NaN); are its weights damaged?"
            )
        if peak == -math.inf:
            raise MegaliteError(
                f"request {request_id}: every token is ruled out (logit -inf) by the model or the sampling settings"
            )
    # Far from float32's largest, so that no penalty turns it into infinity again.
    return logits.clamp(max=1e30) if math.inf in peaks else logits
