"""What is done to logits before a token is chosen: ids ruled out, logit_bias, penalties.

Rows have numbers, and what a row asks for is known by its number from its admission on. On a device (`apply`, `count`)
all rows of a step are edited at once, and what changes from step to step (which rows are sampled, at which position,
which tokens they have) is read there, so nothing waits for it. In host memory (`apply_to`, `add`) one row after the
other is: a few of numpy's operations cost less than torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megalite.errors import MegaliteError
from megalite.inference.request import Sequence

Send = Callable[[np.ndarray], Tensor]
"""An array to the device, without waiting for it."""


@dataclass(slots=True)
class _Wishes:
    """What one row asks for."""

    allowed: list[int] | None = None
    bias: dict[int, float] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    """Stop ids, which are withheld before `min_tokens`."""
    min_tokens: int = 0
    words: list[tuple[int, ...]] = field(default_factory=list)


class Edits:
    """allowed_token_ids, bad_words, min_tokens and logit_bias of all rows, as flat lists of (row, id).

    In every step all lists are gone through, those of rows that are not sampled to no effect.
    """

    def __init__(self, vocab_size: int, tokens: Tensor, prompt_len: Tensor, send: Send):
        """`tokens` int32 [rows, max_len]: prompt and output of each row; `prompt_len` int64 [rows]."""
        self.vocab_size = vocab_size
        self.tokens = tokens
        self.prompt_len = prompt_len
        self.send = send
        self.rows: dict[int, _Wishes] = {}
        """Wishes of the rows that have any."""
        self._stale = True

    def admit(self, row: int, sequence: Sequence) -> bool:
        """Take over the wishes of a sequence that begins in this row; returns whether it has any.

        MegaliteError: a biased id doesn't exist.
        """
        request, vocab = sequence.request, self.vocab_size
        params = request.params
        for id in params.logit_bias or {}:
            if not 0 <= id < vocab:
                raise MegaliteError(f"request {request.id}: logit_bias: token id must be in 0..{vocab - 1}, got {id}")
        # A stop token beyond the vocabulary can never be sampled, so there is nothing to withhold.
        stops = sorted(id for id in request.stop_token_ids if 0 <= id < vocab) if params.min_tokens else []
        words = [word for word in request.bad_words if 0 <= word[-1] < vocab]
        allowed = params.allowed_token_ids
        if allowed is not None:
            allowed = sorted({id for id in allowed if 0 <= id < vocab})
        known = self.rows.pop(row, None)
        if allowed is not None or params.logit_bias or stops or words:
            self.rows[row] = _Wishes(allowed, params.logit_bias or {}, stops, params.min_tokens, words)
        self._stale |= known is not None or row in self.rows
        return row in self.rows

    def wanted(self, row: int, num_output: int) -> bool:
        """Whether the logits of a row with this many output tokens, or more, are changed."""
        wishes = self.rows.get(row)
        if wishes is None:
            return False
        always = wishes.allowed is not None or wishes.bias or wishes.words
        return bool(always or num_output < wishes.min_tokens)

    def apply_to(self, logits: np.ndarray, row: int, position: int) -> None:
        """Edit the logits [V] of one row in host memory, whose new token will stand at `position`."""
        wishes, first = self.rows[row], self.prompt_len[row].item()
        if wishes.allowed is not None:
            kept = logits[wishes.allowed]
            logits.fill(-math.inf)
            logits[wishes.allowed] = kept
        if position - first < wishes.min_tokens:
            logits[wishes.stops] = -math.inf
        if wishes.words:
            said = self.tokens[row, first:position].tolist()
            logits[[last for *head, last in wishes.words if said[max(0, len(said) - len(head)) :] == head]] = -math.inf
        if wishes.bias:
            logits[list(wishes.bias)] += np.array(list(wishes.bias.values()), np.float32)

    def apply(self, buffer: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Edit logits in place. `buffer`: float32 [n * V + 1], the logits of `rows` (int64 [n]) and one element that
        takes the edits of other rows. `positions` int64 [n]: where each row's new token will stand."""
        if self._stale:
            self._upload()
        count, vocab = len(rows), self.vocab_size
        place = rows.new_full((len(self.tokens),), -1)
        place[rows] = torch.arange(count, device=rows.device)
        at = torch.zeros_like(place)
        at[rows] = positions

        def where(of: Tensor, ids: Tensor) -> Tensor:
            """Places in the buffer of `ids` in rows `of`."""
            index = place[of]
            return torch.where(index >= 0, index * vocab + ids, count * vocab)

        if self._allowed.numel():
            of, ids = self._allowed
            index = where(of, ids)
            kept = buffer.index_select(0, index)
            narrow = self._narrowed.index_select(0, rows).bool()
            buffer[:-1].view(count, vocab).masked_fill_(narrow[:, None], -math.inf)
            buffer.index_copy_(0, index, kept)
        outputs = at - self.prompt_len
        if self._stops.numel():
            of, ids, least = self._stops
            index = torch.where(outputs[of] < least, where(of, ids), count * vocab)
            buffer.index_fill_(0, index, -math.inf)
        if self._words.numel():
            of, last, length = self._words
            word, distance, token = self._heads
            there = self.tokens[of[word], (at[of[word]] - distance).clamp(min=0)]
            misses = length.new_zeros(len(length)).index_add_(0, word, (there != token).to(length.dtype))
            said = (misses == 0) & (outputs[of] >= length)
            buffer.index_fill_(0, torch.where(said, where(of, last), count * vocab), -math.inf)
        if self._bias.numel():
            of, ids, values = self._bias
            buffer.index_add_(0, where(of, ids), values.view(torch.float64).to(buffer.dtype))

    def _upload(self) -> None:
        """Send the lists of all rows to the device, in one copy."""
        wishes = self.rows.items()
        narrowed = np.zeros((1, len(self.tokens)), np.int64)
        narrowed[0, [row for row, one in wishes if one.allowed is not None]] = 1
        allowed = _table(2, ((row, id) for row, one in wishes for id in one.allowed or ()))
        stops = _table(3, ((row, id, one.min_tokens) for row, one in wishes for id in one.stops))
        words = [(row, word) for row, one in wishes for word in one.words]
        lasts = _table(3, ((row, word[-1], len(word) - 1) for row, word in words))
        heads = _table(
            3,
            (
                (number, len(word) - 1 - place, token)
                for number, (_, word) in enumerate(words)
                for place, token in enumerate(word[:-1])
            ),
        )
        biased = [(row, id, value) for row, one in wishes for id, value in one.bias.items()]
        bias = np.vstack(
            [_table(2, ((row, id) for row, id, _ in biased)), np.array([v for *_, v in biased]).view(np.int64)[None]]
        )
        parts = [narrowed, allowed, stops, lasts, heads, bias]
        sent = self.send(np.concatenate([part.ravel() for part in parts])).split([part.size for part in parts])
        tables = [flat.view(part.shape) for flat, part in zip(sent, parts, strict=True)]
        self._narrowed = tables[0][0]
        self._allowed, self._stops, self._words, self._heads, self._bias = tables[1:]
        self._stale = False


def _table(columns: int, entries: Iterable[tuple[int, ...]]) -> np.ndarray:
    """Entries as the columns of an int64 array [columns, entries]."""
    return np.fromiter(chain.from_iterable(entries), np.int64).reshape(-1, columns).T


class Penalties:
    """Repetition, frequency and presence penalties (vLLM's and CTRL's formulas).

    The ids whose logits change are the tokens of the row itself. Beside each token `times` counts its occurrences in
    the output so far; a new token adds one to all of its own occurrences.
    """

    def __init__(self, tokens: Tensor, prompt_len: Tensor, send: Send):
        """`tokens` int32 [rows, max_len]: prompt and output of each row; `prompt_len` int64 [rows]."""
        self.tokens = tokens
        self.prompt_len = prompt_len
        self.send = send
        self._times: Tensor | None = None
        """int32 [rows, max_len]: how often this token is in its row's output; only rows with penalties are kept up."""
        self._arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
        """Tokens, times and prompt lengths in host memory."""

    @property
    def times(self) -> Tensor:
        """See `_times`."""
        assert self._times is not None
        return self._times

    def begin(self) -> None:
        """Make `times`, where that has not been done: at the latest when the first row with penalties is admitted."""
        if self._times is not None:
            return
        if self.tokens.is_cuda:
            self._times = torch.zeros_like(self.tokens)
        else:  # untouched pages of host memory cost nothing
            self._times = torch.from_numpy(np.zeros(self.tokens.shape, np.int32))
            self._arrays = self.tokens.numpy(), self._times.numpy(), self.prompt_len.numpy()

    def admit(self, sequences: Iterable[tuple[int, Sequence]]) -> None:
        """Count the outputs of sequences that begin, or go on, in the given rows."""
        self.begin()
        places, counts = [], []
        for row, sequence in sequences:
            ids = np.array(sequence.token_ids, np.int64)
            said, times = np.unique(ids[sequence.num_prompt :], return_counts=True)
            at = np.searchsorted(said, ids).clip(max=len(said) - 1)
            counts.append(np.where(said[at] == ids, times[at], 0) if len(said) else np.zeros_like(ids))
            places.append(row * self.tokens.shape[1] + np.arange(len(ids)))
        place, count = self.send(np.concatenate(places + counts)).view(2, -1)
        self.times.view(-1).index_copy_(0, place, count.int())

    def apply_to(self, logits: np.ndarray, row: int, position: int, strengths: tuple[float, float, float]) -> None:
        """Penalise the logits [V] of one row in host memory, whose new token will stand at `position`.

        `strengths`: repetition, frequency and presence.
        """
        tokens, times, prompt_len = self._arrays
        repetition, frequency, presence = (np.float32(strength) for strength in strengths)
        first = 0 if repetition != 1 else prompt_len[row]  # only the repetition penalty looks at the prompt
        ids, said = tokens[row, first:position], times[row, first:position].astype(np.float32)
        values = logits[ids]
        if repetition != 1:
            values = np.where(values > 0, values / repetition, values * repetition)
        logits[ids] = values - frequency * said - presence * (said > 0)

    def add(self, row: int, position: int, token_id: int) -> None:
        """Note one row's new token in host memory."""
        tokens, times, prompt_len = self._arrays
        equal = tokens[row, :position] == token_id
        times[row, :position] += equal
        times[row, position] = 1 + np.count_nonzero(equal[prompt_len[row] :])

    def apply(self, logits: Tensor, rows: Tensor, positions: Tensor, strengths: Tensor, longest: int) -> None:
        """Penalise logits float32 [n, V] of `rows` (int64 [n]) in place.

        `strengths` float32 [n, 3]: repetition, frequency and presence; 1, 0 and 0 change nothing. `positions`, below
        `longest`: where each row's new token will stand.
        """
        ids, times, known = self._known(rows, positions, longest)
        # A place that holds no token yet stands for the first one again: it gets the same value twice.
        ids, times = (torch.where(known, values, values[:, :1]) for values in (ids.long(), times))
        repetition, frequency, presence = strengths.T[..., None]
        values = logits.gather(1, ids)
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits.scatter_(1, ids, values - frequency * times - presence * (times > 0))

    def count(self, rows: Tensor, positions: Tensor, ids: Tensor, longest: int) -> None:
        """Note that `rows` get the tokens `ids` [n] at `positions` [n], below `longest`."""
        tokens, times, known = self._known(rows, positions, longest)
        equal = known & (tokens == ids[:, None])
        place = torch.arange(longest, device=rows.device)
        total = 1 + (equal & (place >= self.prompt_len[rows, None])).sum(-1, dtype=torch.int32)
        times = torch.where(place == positions[:, None], total[:, None], times + equal)
        self.times[:, :longest].index_copy_(0, rows, times)

    def _known(self, rows: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the rows, how often each is in the output, and which of them are there: [n, longest] each."""
        tokens, times = (table[:, :longest].index_select(0, rows) for table in (self.tokens, self.times))
        return tokens, times, torch.arange(longest, device=rows.device) < positions[:, None]
