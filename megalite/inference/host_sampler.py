"""Sampling on a CPU: logits a few rows at a time, each row's token by the cheapest way that its parameters allow.

Python's lists describe the few rows of a step: making tensors of their parameters for each call costs least that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megalite.inference import draws
from megalite.inference.choice import NO_TOKEN, Choice, Details, Needs
from megalite.inference.edits import Edits, Penalties, Send
from megalite.inference.matchers import Masks
from megalite.inference.vocabulary import Largest, Vocabulary
from megalite.planner.memory import CPU_CHUNK, SAMPLING_CHUNK

FEW = 12
"""Rows up to which penalties cost less one after the other than at once."""
LARGEST = 2.0**100
"""Far from float32's largest, so that no penalty makes it infinity."""
NUMBERS = 64
"""Uniform numbers that are made at once for a row."""


@dataclass(slots=True, kw_only=True)
class RowParams:
    """The sampling parameters of a row."""

    seed: int = 0
    """Below 2**64."""
    index: int = 0
    """Sample number within the request."""
    prompt_len: int = 0
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    least: int = 0
    """The least weight that min_p keeps."""
    strengths: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Repetition, frequency and presence penalty."""
    logprobs: int | None = None
    uniform: tuple[int, list[float]] = (-1, [])
    """(position, numbers): uniform numbers for its output tokens from that position on."""

    @property
    def penalised(self) -> bool:
        return self.strengths != (1, 0, 0)


@dataclass(frozen=True, slots=True)
class Peaked:
    """Float32 logits [n, V], each at most LARGEST, with the largest of each row; a row that failed holds zeros."""

    logits: Tensor
    best: Tensor
    """int64 [n]: id of the largest logit of each row, the lowest of equals."""
    peaks: Tensor
    """float32 [n, 1]: its logit."""
    failed: list[int] | None = None
    """One of FAILURES, else 0, for each row; None: no row failed."""


Way = Callable[[Tensor, list[RowParams], Tensor], Tensor]
"""Ids [n] from weights [n, V] by uniform numbers [n]."""


class HostSampler:
    """Samples rows of `params`, which are known by their numbers."""

    def __init__(self, tokens: Tensor, vocab_size: int, send: Send, params: list[RowParams], at_temperature: bool):
        """`tokens`: see `Sampler`; `params`: kept up by the caller."""
        self.vocab_size = vocab_size
        self.params = params
        self.at_temperature = at_temperature
        self._prompt_len = torch.zeros(len(tokens), dtype=torch.int64)
        self.edits = Edits(vocab_size, tokens, self._prompt_len, send)
        self.penalties = Penalties(tokens, self._prompt_len, send)

    def admit(self, rows: list[int], params: list[RowParams]) -> None:
        """These rows have new parameters."""
        self._prompt_len[rows] = torch.tensor([one.prompt_len for one in params])

    def sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, needs: Needs, masks: Masks | None = None
    ) -> Choice:
        """See `Sampler.sample`."""
        allowed = {} if masks is None else dict(zip(masks.places, masks.wait(), strict=True))
        numbers, places = rows.tolist(), positions.tolist()
        parts = []
        most = needs.most(self.vocab_size)
        step = chunk_rows(logits)
        for start in range(0, len(rows) or 1, step):
            part = slice(start, start + step)
            raw = edited = peaked(logits[part].float())
            if needs.edits or needs.longest or allowed:
                words = [allowed.get(i) for i in range(len(rows))[part]]
                edited = self._edit(raw, numbers[part], places[part], words)
            parts.append(self._sample(raw, edited, numbers[part], places[part], needs.logprobs[part], most))
        ids = _joined([choice.ids for choice in parts])
        if needs.longest:
            self._count(numbers, places, ids)
        scores = _joined([choice.logprobs for choice in parts])
        found = None
        if needs.logprobs:
            every = [choice.details for choice in parts if choice.details is not None]
            columns = zip(*((x.logprobs, x.ranks, x.top_ids, x.top_logprobs) for x in every), strict=True)
            found = Details(*(_joined(list(column)) for column in columns))
        return Choice(ids, scores, found, needs)

    def sample_columns(self, logits: Tensor, rows: Tensor, positions: Tensor, vocabulary: Vocabulary) -> Choice | None:
        """See `Sampler.sample_columns`."""
        if any(self.params[row].temperature > 0 for row in rows.tolist()):
            return None
        found = vocabulary.largest(largest(logits))
        failed = found.peaks.isnan(), found.peaks == -math.inf
        ids = torch.where(failed[0], -1, torch.where(failed[1], NO_TOKEN, found.ids))
        return Choice(ids, -found.sums.log())

    def _sample(
        self,
        raw: Peaked,
        edited: Peaked,
        rows: list[int],
        positions: list[int],
        counts: tuple[int | None, ...],
        most: int,
    ) -> Choice:
        """Tokens of a few rows, chosen from their edited logits; `counts` as Needs.logprobs, `most` of all rows'."""
        params = [self.params[row] for row in rows]
        ids = self._choose(edited, params, positions)
        logprobs = scores = raw.logits.log_softmax(-1)
        if self.at_temperature and any(one.temperature not in (0, 1) for one in params):
            divisors = torch.tensor([one.temperature or 1.0 for one in params])
            scores = (raw.logits / divisors[:, None]).log_softmax(-1)
        found = None
        if counts:
            wanted = [i for i, count in enumerate(counts) if count is not None]
            some = [_rows(values, wanted) for values in (raw.logits, logprobs, ids)]
            found = details(some[0], some[1], some[2], most).spread(wanted, len(ids))
        chosen = scores.gather(1, ids[:, None])[:, 0]
        for failed in (edited.failed, raw.failed):
            if failed is not None:
                codes = torch.tensor(failed)
                ids = torch.where(codes < 0, codes, ids)
        return Choice(ids, chosen, found)

    # Edits

    def _edit(self, raw: Peaked, rows: list[int], positions: list[int], words: list[np.ndarray | None]) -> Peaked:
        """A changed copy of logits [n, V]; they themselves where no row asks for changes. `words`: as of `Masks`."""
        masked = [(i, one) for i, one in enumerate(words) if one is not None]
        edited = [i for i, row in enumerate(rows) if row in self.edits.rows]
        penalised = [i for i, row in enumerate(rows) if self.params[row].penalised]
        if not (edited or penalised or masked):
            return raw
        logits = raw.logits.clone(memory_format=torch.contiguous_format)
        values = logits.numpy()
        for i, mask in masked:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=self.vocab_size)
            np.putmask(values[i], bits == 0, -math.inf)
        for i in edited:
            self.edits.apply_to(values[i], rows[i], positions[i])
        if len(penalised) > FEW:
            some, of, at = _rows(logits, penalised), torch.tensor(rows)[penalised], torch.tensor(positions)[penalised]
            strengths = torch.tensor([self.params[rows[i]].strengths for i in penalised])
            self.penalties.apply(some, of, at, strengths, max(positions) + 1)
            if some is not logits:
                logits[penalised] = some
        else:
            for i in penalised:
                self.penalties.apply_to(values[i], rows[i], positions[i], self.params[rows[i]].strengths)
        return peaked(logits)

    def _count(self, rows: list[int], positions: list[int], ids: Tensor) -> None:
        """Tell the penalties of the rows' new tokens."""
        penalised = [i for i, row in enumerate(rows) if self.params[row].penalised]
        if len(penalised) > FEW:
            of, at = torch.tensor(rows)[penalised], torch.tensor(positions)[penalised]
            self.penalties.count(of, at, ids[penalised], max(positions) + 1)
            return
        for i, token_id in zip(penalised, ids[penalised].tolist(), strict=True):
            self.penalties.add(rows[i], positions[i], token_id)

    # Choices

    def _choose(self, edited: Peaked, params: list[RowParams], positions: list[int]) -> Tensor:
        """Token ids [n], each by the cheapest way that its row's parameters allow."""
        ways: dict[Way, list[int]] = {}
        for i, one in enumerate(params):
            if one.temperature > 0:
                ways.setdefault(_of_best if one.top_k else _of_nucleus if one.top_p < 1 else _of_all, []).append(i)
        ids = edited.best
        for way, places in ways.items():
            of = [params[i] for i in places]
            uniform = [_uniform(params[i], positions[i]) for i in places]
            weights = self._weights(_rows(edited.logits, places), _rows(edited.peaks, places), of)
            drawn = way(weights, of, torch.tensor(uniform, dtype=torch.float64))
            if len(drawn) == len(params):
                return drawn
            if ids is edited.best:
                ids = ids.clone()
            ids[places] = drawn
        return ids

    def _weights(self, logits: Tensor, peaks: Tensor, params: list[RowParams]) -> Tensor:
        """Probabilities [n, V] as integers, after temperature and min_p."""
        divisors = None
        if any(one.temperature != 1 for one in params):
            divisors = torch.tensor([one.temperature for one in params])
        weights = draws.integer_weights(logits, peaks, divisors)
        if any(one.least for one in params):
            least = torch.tensor([one.least for one in params])
            weights.masked_fill_(weights < least[:, None], 0)
        return weights


def _of_best(weights: Tensor, params: list[RowParams], uniform: Tensor) -> Tensor:
    top_k = torch.tensor([one.top_k for one in params])
    return draws.draw_of_best(weights, top_k, _top_p(weights, params), uniform)


def _of_nucleus(weights: Tensor, params: list[RowParams], uniform: Tensor) -> Tensor:
    return draws.draw(draws.nucleus(weights, _top_p(weights, params)), uniform)


def _of_all(weights: Tensor, params: list[RowParams], uniform: Tensor) -> Tensor:
    return draws.draw(weights, uniform)


def _top_p(weights: Tensor, params: list[RowParams]) -> Tensor:
    return torch.tensor([one.top_p for one in params], dtype=torch.float64)


def _uniform(params: RowParams, position: int) -> float:
    """The number that draws a row's token at this place in the row; those of the next few places are made along."""
    output = position - params.prompt_len
    first, numbers = params.uniform
    if not 0 <= output - first < len(numbers):
        places = np.arange(output, output + NUMBERS)
        seed, index = np.array(params.seed, np.uint64), np.array(params.index)
        first, numbers = params.uniform = output, draws.uniform(seed, index, places).tolist()
    return numbers[output - first]


def chunk_rows(logits: Tensor) -> int:
    """How many rows of these logits are worked on at once."""
    budget = SAMPLING_CHUNK if logits.is_cuda else CPU_CHUNK
    return max(1, budget // logits.shape[1])


def peaked(logits: Tensor) -> Peaked:
    """Float32 logits [n, V] with the largest of each row; rows with NaN, or nothing but -inf, have failed."""
    best, peaks = _peaks(logits)
    values = peaks[:, 0].tolist()
    if all(-LARGEST <= value <= LARGEST for value in values):
        return Peaked(logits, best, peaks)
    failed = [-1 if math.isnan(value) else -2 if value == -math.inf else 0 for value in values]
    if not any(failed) and max(values) <= LARGEST:
        return Peaked(logits, best, peaks)
    ended = torch.tensor(failed, device=logits.device) < 0
    logits = logits.clamp(max=LARGEST).masked_fill_(ended[:, None], 0)
    return replace(peaked(logits), failed=failed if any(failed) else None)


def _peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Id [n] and value [n, 1] of the largest of each row; the first NaN counts as that."""
    # numpy's argmax uses vector instructions: measured 20 times as fast as torch's.
    best = logits.argmax(-1) if logits.is_cuda else torch.from_numpy(logits.numpy().argmax(-1))
    return best, logits.gather(1, best[:, None])


def largest(logits: Tensor) -> Largest:
    """Of each row of logits [n, V], V perhaps 0, what its largest is; none counts as more than LARGEST."""
    n = len(logits)
    if logits.shape[1] == 0:
        return Largest(torch.full((n,), -1), torch.full((n,), -math.inf), torch.zeros(n))
    step, parts = chunk_rows(logits), []
    for start in range(0, n, step):
        values = logits[start : start + step].float()
        ids, peaks = _peaks(values)
        if not bool((peaks <= LARGEST).all()):
            values = values.clamp(max=LARGEST)
            ids, peaks = _peaks(values)
        sums = (values - torch.where(peaks == -math.inf, 0.0, peaks)).exp_().sum(-1)
        parts.append((ids, peaks[:, 0], sums))
    return Largest(*map(_joined, map(list, zip(*parts, strict=True))))


def details(raw: Tensor, logprobs: Tensor, ids: Tensor, k: int) -> Details:
    """Places of `ids` [n] in float32 logits [n, V] without NaN, and the k likeliest of each row; -1: all."""
    vocab_size = raw.shape[1]
    descending_ids = draws.descending_ids(vocab_size, raw.device)
    mine = raw.gather(1, ids[:, None])
    equal_before = (raw == mine) & (descending_ids > vocab_size - 1 - ids[:, None])
    ranks = 1 + (raw > mine).sum(-1) + equal_before.sum(-1)
    top = draws.best_ids(raw, min(k, vocab_size) if k >= 0 else vocab_size)
    return Details(logprobs.gather(1, ids[:, None])[:, 0], ranks, top, logprobs.gather(1, top))


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """The given rows, in ascending order; the tensor itself if that is all of them."""
    return values if len(rows) == len(values) else values[rows]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
