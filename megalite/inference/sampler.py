"""Chooses the next token of each sampled row, and reports log-probabilities.

What is done to a row of logits, in this order (vLLM's, vllm/v1/sample/sampler.py):

1. log-probabilities are taken from the raw logits, in float32 (or from those over the temperature, see `Sampler`);
2. ids outside allowed_token_ids, ids that would complete one of bad_words and, before min_tokens, ids that would end
   the output get -inf;
3. logit_bias is added;
4. repetition, then frequency, then presence penalty;
5. temperature 0 (below 1e-5): the largest logit wins, of equal ones the lowest id;
6. else temperature, min_p, top_k, top_p, and a draw from what is left.

A token comes from its own row, seed, sample index and position, never from the batch. Probabilities become integers
(`_weights`), whose sums are exact in any order, so kernels that add in an order of their own choice can't change a
result. Equal probabilities rank by id, lowest first: top_k keeps exactly k tokens, top_p the smallest set, and both end
in the greedy choice. The uniform number of a draw is a hash (`uniform`), not the state of a generator.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference.memory import SAMPLING_CHUNK
from megalite.inference.request import Row, Sequence

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: a division by them would overflow."""

CPU_CHUNK = 2**17
"""Logits worked on at once on a CPU: what stays in its cache."""
DEVICE_CHUNK = SAMPLING_CHUNK
"""The same on an accelerator: what bounds temporary memory (about 25 bytes for each)."""

LONG_ROW = 2**14
"""Places of a row from which its running sum is slow on an accelerator."""
RUN = 256
"""Places that are summed up first in such a row."""

BUCKET_SHIFT = 18
"""Bits dropped of a float32 to find its bucket: its sign, exponent and 5 bits of mantissa stay."""
BUCKETS = (127 + 63) << (23 - BUCKET_SHIFT)
"""Buckets for weights below 2**63."""


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


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that draws token `position` (from 0) of sample `index` of a request.

    The first 53 bits of BLAKE2b (RFC 7693) over the three in decimal: equal on every machine and in every version.
    """
    digest = blake2b(b"%d %d %d" % (seed, index, position), digest_size=8, person=b"megalite.sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


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
        self._id_bits = vocab_size.bit_length()
        # A weight and an id fit into one int64 together, and so does the sum of vocab_size weights.
        self._one = 2 ** (62 - self._id_bits)
        self._seen: dict[Sequence, _Seen] = {}
        self._reversed: dict[torch.device, Tensor] = {}

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: SequenceOf[Row]) -> SampledRows:
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
        self, logits: Tensor, next_ids: SequenceOf[int], k: int, *, request_id: str = "?"
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow in a prompt.

        `logits` [T, V], `next_ids` [T] the token after each row; `k` likeliest tokens are listed beside it, -1: all. A
        token that the model rules out has -inf. Raises MegaliteError for NaN.
        """
        scores: list[TokenLogprobs] = []
        k = self._listed(k)
        step = self._chunk_rows(logits)
        for start in range(0, len(next_ids), step):
            ids = torch.tensor(next_ids[start : start + step], device=logits.device)
            raw = _sound(logits[start : start + step].float(), [request_id] * len(ids))
            scores += self._describe(raw, raw.log_softmax(-1), ids, [k] * len(ids))
        return scores

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that ended."""
        self._seen.pop(sequence, None)

    def _listed(self, k: int) -> int:
        """How many likeliest tokens `k` asks for."""
        return self.vocab_size if k < 0 else k

    def _chunk_rows(self, logits: Tensor) -> int:
        budget = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
        return max(1, budget // self.vocab_size)

    def _sample(self, raw: Tensor, rows: SequenceOf[Row], sampled: SampledRows) -> None:
        """Append to `sampled` what rows with float32 logits `raw` [R, V] get."""
        params = [row.sequence.request.params for row in rows]
        names = [row.sequence.request.id for row in rows]
        raw = _sound(raw, names)
        logits = self._edit(raw, rows)
        if logits is not raw:
            logits = _sound(logits, names)
        ids = self._choose(logits, rows, params)
        logprobs = raw.log_softmax(-1)
        sampled.token_ids.extend(ids.tolist())
        drawn_from = logprobs
        if self.at_temperature and any(p.temperature != 1 for p in params):
            divisors = torch.tensor([policy_temperature(p) for p in params], device=raw.device)
            drawn_from = (raw / divisors[:, None]).log_softmax(-1)
        sampled.logprobs.extend(drawn_from.gather(1, ids[:, None])[:, 0].tolist())
        details: list[TokenLogprobs | None] = [None] * len(rows)
        wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
        if wanted:
            ks = [self._listed(params[i].logprobs) for i in wanted]
            described = self._describe(_rows(raw, wanted), _rows(logprobs, wanted), _rows(ids, wanted), ks)
            for i, detail in zip(wanted, described, strict=True):
                details[i] = detail
        sampled.top_logprobs.extend(details)

    def _choose(self, logits: Tensor, rows: SequenceOf[Row], params: list[SamplingParams]) -> Tensor:
        """Token ids [R] of edited logits [R, V]."""
        drawn = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
        if not drawn:
            return _largest(logits)
        ids = self._draw(_rows(logits, drawn), [params[i] for i in drawn], [rows[i].sequence for i in drawn])
        if len(drawn) == len(rows):
            return ids
        mixed = _largest(logits)
        mixed[drawn] = ids
        return mixed

    # Edits: allowed_token_ids, bad_words, min_tokens, logit_bias, penalties

    def _edit(self, raw: Tensor, rows: SequenceOf[Row]) -> Tensor:
        """`raw`, or a changed copy where a row asks for it; float32 [R, V]."""
        narrowed: dict[int, list[int]] = {}
        masked: list[int] = []
        biased: list[int] = []
        biases: list[float] = []
        penalised: list[int] = []
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
                penalised.append(i)
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
            self._penalise(flat, {i: rows[i].sequence for i in penalised})
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

    # Draws: temperature, min_p, top_k, top_p, inverse CDF

    def _weights(self, logits: Tensor, params: list[SamplingParams]) -> Tensor:
        """Unnormalised probabilities as integers [R, V] after temperature and min_p; the likeliest token's is `_one`.

        The likeliest token is at 2**(62 - bits of the vocabulary size), e.g. 2**44 for 152k tokens; what is less likely
        than it by more than that factor is never drawn.
        """
        device = logits.device
        shifted = logits - logits.amax(-1, keepdim=True)
        temperatures = [p.temperature for p in params]
        if any(t != 1 for t in temperatures):
            shifted /= torch.tensor(temperatures, device=device)[:, None]
        weights = shifted.exp_().mul_(self._one).long()
        if any(p.min_p > 0 for p in params):
            least = torch.tensor([math.ceil(p.min_p * self._one) for p in params], device=device)
            weights.masked_fill_(weights < least[:, None], 0)
        return weights

    def _draw(self, logits: Tensor, params: list[SamplingParams], sequences: list[Sequence]) -> Tensor:
        """Ids [R] drawn from edited logits [R, V]."""
        weights = self._weights(logits, params)
        numbers = [uniform(s.request.seed, s.index, s.num_output) for s in sequences]
        numbers = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        few = [i for i, p in enumerate(params) if 0 < p.top_k < self.vocab_size]
        if len(few) == len(params):
            return self._draw_few(weights, params, numbers)
        nucleus = [i for i, p in enumerate(params) if p.top_p < 1 and not 0 < p.top_k < self.vocab_size]
        if nucleus:
            shares = torch.tensor([params[i].top_p for i in nucleus], dtype=torch.float64, device=logits.device)
            if len(nucleus) == len(params):
                weights = _nucleus(weights, shares)
            else:
                weights[nucleus] = _nucleus(weights[nucleus], shares)
        ids = _inverse_cdf(weights, numbers)
        if few:
            ids[few] = self._draw_few(weights[few], [params[i] for i in few], numbers[few])
        return ids

    def _draw_few(self, weights: Tensor, params: list[SamplingParams], numbers: Tensor) -> Tensor:
        """Ids [R] drawn from weights [R, V] of rows with top_k, after top_k and top_p."""
        device = weights.device
        limits = torch.tensor([p.top_k for p in params], device=device)
        shares = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        size = max(p.top_k for p in params)
        best = ((weights << self._id_bits) | self._reversed_ids(device)).topk(size).values
        candidates = self.vocab_size - 1 - (best & (2**self._id_bits - 1))
        likely = best >> self._id_bits
        likely.masked_fill_(torch.arange(size, device=device) >= limits[:, None], 0)
        reached = likely.cumsum(-1)
        likely.masked_fill_(reached - likely >= _share_of(reached[:, -1], shares)[:, None], 0)
        by_id = candidates.sort(-1)
        places = _inverse_cdf(likely.gather(1, by_id.indices), numbers)
        return by_id.values.gather(1, places[:, None])[:, 0]

    def _reversed_ids(self, device: torch.device) -> Tensor:
        """V - 1 ... 0: in a key's low bits, it puts the lower of two equal tokens first."""
        if device not in self._reversed:
            self._reversed[device] = torch.arange(self.vocab_size - 1, -1, -1, device=device)
        return self._reversed[device]

    def _describe(self, raw: Tensor, logprobs: Tensor, ids: Tensor, ks: list[int]) -> list[TokenLogprobs]:
        """Rank of `ids` [R] in float32 logits [R, V] without NaN, and each row's k likeliest."""
        reversed_ids = self._reversed_ids(raw.device)
        mine = raw.gather(1, ids[:, None])
        equal_before = (raw == mine) & (reversed_ids > self.vocab_size - 1 - ids[:, None])
        ranks = (1 + (raw > mine).sum(-1) + equal_before.sum(-1)).tolist()
        own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        top = self._ranking(raw, min(max(ks), self.vocab_size))
        described = []
        listing = zip(ids.tolist(), own, ranks, ks, top.tolist(), logprobs.gather(1, top).tolist(), strict=True)
        for token_id, logprob, rank, k, top_ids, top_logprobs in listing:
            best = list(zip(top_ids[:k], top_logprobs[:k], strict=True))
            if rank > k:
                best.append((token_id, logprob))
            described.append(TokenLogprobs(token_id, logprob, rank, best))
        return described

    def _ranking(self, raw: Tensor, k: int) -> Tensor:
        """Ids [R, k] of the largest float32 logits [R, V], best first, equals by id."""
        if k == 0:
            return torch.empty((len(raw), 0), dtype=torch.int64, device=raw.device)
        # Float bits, read as an integer, ascend with the value once negative ones are turned round; + 0.0 drops -0.0.
        bits = (raw + 0.0).view(torch.int32)
        keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | self._reversed_ids(raw.device)
        return self.vocab_size - 1 - (keys.topk(k).values & 0xFFFFFFFF)


class _Seen:
    """Distinct tokens of a sequence that penalties look at, counted as they come."""

    def __init__(self, sequence: Sequence):
        self.ids = array("q")
        self.counts = array("q")
        """How often each is in the output; 0: only in the prompt."""
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


def _share_of(total: Tensor, shares: Tensor) -> Tensor:
    """The least integer [R] that is `shares` [R] of `total` [R]; at least 1, so that one token stays."""
    goal = (shares * total.double()).ceil().long().clamp(min=1)
    return torch.where(shares < 1, goal, total).minimum(total)


def _nucleus(weights: Tensor, shares: Tensor) -> Tensor:
    """Weights [R, V], those outside the smallest set that holds `shares` [R] of the total made 0 (top_p).

    Nothing is sorted but the few tokens near the border: the total of each bucket of similar weights says in which
    bucket the border is, and that bucket's members are then taken best first.
    """
    num_rows = len(weights)
    buckets = weights.float().view(torch.int32) >> BUCKET_SHIFT  # [R, V]
    filled = weights.new_zeros(num_rows, BUCKETS).scatter_add_(1, buckets.long(), weights)
    upto = filled.cumsum(-1)
    total = upto[:, -1:]
    left_out = total - _share_of(total[:, 0], shares)[:, None]
    border = torch.searchsorted(upto, left_out, right=True)  # the first bucket that isn't left out whole
    wanted = upto.gather(1, border) - left_out  # of the border bucket, best first
    border = border.int()  # the type of buckets, or comparing would widen them
    row, token = (buckets == border).nonzero(as_tuple=True)
    near = weights[row, token]
    order = near.argsort(descending=True, stable=True)  # equals stay in the order of their ids
    order = order[row[order].argsort(stable=True)]
    row, token, near = row[order], token[order], near[order]
    before = near.cumsum(0) - near  # may wrap over many rows; the difference below is right all the same
    sizes = row.bincount(minlength=num_rows)
    outside = before - before[sizes.cumsum(0) - sizes][row] >= wanted[row, 0]
    kept = weights.masked_fill(buckets < border, 0)
    kept[row[outside], token[outside]] = 0
    return kept


def _inverse_cdf(weights: Tensor, numbers: Tensor) -> Tensor:
    """Places [R] at which the running sum of integer weights [R, K] first exceeds `numbers` [R] of their total.

    The sums are exact and `numbers` at most 1 - 2**-53, which rounding leaves below the total: a place of weight 0
    never comes out.
    """
    if weights.is_cuda and weights.shape[1] >= LONG_ROW:
        return _inverse_cdf_by_runs(weights, numbers)
    reached = weights.cumsum(-1)
    goal = (numbers * reached[:, -1].double()).long()
    return torch.searchsorted(reached, goal[:, None], right=True)[:, 0]


def _inverse_cdf_by_runs(weights: Tensor, numbers: Tensor) -> Tensor:
    """The same, with running sums over the sums of runs of places, and then within one run."""
    length = weights.shape[1]
    whole = length // RUN * RUN
    runs = weights[:, :whole].unflatten(1, (-1, RUN)).sum(-1)
    reached = torch.cat([runs, weights[:, whole:].sum(-1, keepdim=True)], 1).cumsum_(-1)
    goal = (numbers * reached[:, -1].double()).long()[:, None]
    run = torch.searchsorted(reached, goal, right=True)
    goal -= torch.where(run > 0, reached.gather(1, (run - 1).clamp_(min=0)), 0)
    places = run * RUN + torch.arange(RUN, device=weights.device)
    within = weights.gather(1, places.clamp_(max=length - 1)).cumsum_(-1)
    return (run * RUN + torch.searchsorted(within, goal, right=True))[:, 0]


def _largest(logits: Tensor) -> Tensor:
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
