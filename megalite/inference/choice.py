"""What sampling gives: tokens and log-probabilities of a step's rows, on the device and then as Python's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -2
FAILURES = {
    -1: "the model's logits are not numbers (NaN); are its weights damaged?",
    NO_TOKEN: "every token is ruled out (logit -inf) by the model or the sampling settings",
}
"""Negative number in place of a token id -> why the row's logits give none."""


class TokenLogprobs(NamedTuple):
    """A token's place in the model's full distribution; a tuple, since that is fastest to make."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest; of equals the lowest id comes first."""
    top_ids: list[int]
    """The k likeliest, best first."""
    top_logprobs: list[float]

    @property
    def top(self) -> list[tuple[int, float]]:
        """(id, logprob) of the k likeliest, best first; then the token itself if it is not among them."""
        best = list(zip(self.top_ids, self.top_logprobs, strict=True))
        return best if self.rank <= len(best) else [*best, (self.token_id, self.logprob)]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was sampled, one entry a row."""

    token_ids: list[int] = field(default_factory=list)
    """One of FAILURES where the row's logits gave none."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of the token, from the raw logits in float32: before penalties and bias, and before the
    temperature unless the sampler is `at_temperature`."""
    top_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """For rows whose params.logprobs is set."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the rows of a step need beyond temperature, top_k, top_p, min_p and the token's log-probability."""

    edits: bool = False
    """Edits of logits, by bad_words, allowed_token_ids, logit_bias or min_tokens."""
    longest: int = 0
    """If a row has penalties: a length above every row's; else 0."""
    logprobs: tuple[int | None, ...] = ()
    """How many of the likeliest tokens are to be listed for each row, -1: all; empty: no row has a list."""

    def most(self, vocab_size: int) -> int:
        """The largest number of top tokens that a row wants listed."""
        listed = [k for k in self.logprobs if k is not None]
        return vocab_size if min(listed, default=0) < 0 else min(max(listed, default=0), vocab_size)


PLAIN = Needs()


@dataclass(frozen=True, slots=True)
class Details:
    """Places of tokens in the full distributions of n rows, and the k likeliest tokens of each."""

    logprobs: Tensor
    """float32 [n]"""
    ranks: Tensor
    """int64 [n], from 1."""
    top_ids: Tensor
    """int64 [n, k], best first."""
    top_logprobs: Tensor
    """float32 [n, k]"""

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its four tensors."""
        return self.logprobs, self.ranks, self.top_ids, self.top_logprobs

    def map(self, change: Callable[[Tensor], Tensor]) -> Details:
        """The same with each tensor changed."""
        return Details(*map(change, self.columns))

    def spread(self, rows: list[int], count: int) -> Details:
        """The same as rows `rows` of `count`; what the other rows hold is undefined."""
        if len(rows) == count:
            return self
        places = torch.tensor(rows, dtype=torch.int64, device=self.ranks.device)
        return self.map(lambda values: values.new_zeros(count, *values.shape[1:]).index_copy_(0, places, values))

    def listed(self, ids: list[int], counts: Iterable[int | None]) -> list[TokenLogprobs | None]:
        """The same of tensors on the host, for the rows' tokens; `counts`: how many of a row are listed, -1: all."""
        rows = (x.tolist() for x in self.columns)
        listed: list[TokenLogprobs | None] = []
        width = self.top_ids.shape[1]
        for token_id, count, logprob, rank, top_ids, top_logprobs in zip(ids, counts, *rows, strict=True):
            if count is None:
                listed.append(None)
            elif count in (-1, width):
                listed.append(TokenLogprobs(token_id, logprob, rank, top_ids, top_logprobs))
            else:
                listed.append(TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count]))
        return listed


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of n rows, on the device; `to_host` and then `listed` bring them to where they are read."""

    ids: Tensor
    """int64 [n]; one of FAILURES where the row's logits give none."""
    logprobs: Tensor
    """float32 [n]"""
    details: Details | None = None
    needs: Needs = PLAIN

    def __getitem__(self, rows: slice) -> Choice:
        """Some of the rows."""
        details = None if self.details is None else self.details.map(lambda values: values[rows])
        needs = replace(self.needs, logprobs=self.needs.logprobs[rows])
        return replace(self, ids=self.ids[rows], logprobs=self.logprobs[rows], details=details, needs=needs)

    def to_host(self) -> Choice:
        """Copies in page-locked memory; they are complete once the device's stream has come this far."""
        if not self.ids.is_cuda:
            return self
        details = () if self.details is None else self.details.columns
        ids, logprobs, *rest = copied_at_once([self.ids, self.logprobs, *details])
        return replace(self, ids=ids, logprobs=logprobs, details=Details(*rest) if rest else None)

    def listed(self) -> SampledRows:
        """What is on the host as Python's numbers."""
        ids = self.ids.tolist()
        details: list[TokenLogprobs | None] = [None] * len(ids)
        if self.details is not None:
            details = self.details.listed(ids, self.needs.logprobs)
        return SampledRows(ids, self.logprobs.tolist(), details)


def copied_at_once(tensors: list[Tensor]) -> list[Tensor]:
    """The same int64 and float32 tensors in page-locked memory, in one copy that nothing waits for."""
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so each begins at a multiple of it
    packed = [tensors[i].reshape(-1).view(torch.int32) for i in order]
    parts = torch.cat(packed).to("cpu", non_blocking=True).split([part.numel() for part in packed])
    found = dict(zip(order, parts, strict=True))
    return [found[i].view(values.dtype).view(values.shape) for i, values in enumerate(tensors)]
