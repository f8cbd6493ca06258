"""Log-probabilities of tokens as results show them: vLLM's dict for each position, or a few long lists. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload


@dataclass(slots=True)  # frozen, each of millions would take five times as long to make
class Logprob:
    """A token's log-probability at one position, by the model's full distribution."""

    logprob: float
    rank: int | None = None
    """1 for the likeliest token of the position."""
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]
"""By token id; the token that is there comes first, then the likeliest ones."""


class TokenLogprob(NamedTuple):
    """How likely a token of a text is after those before it, by the model's full distribution."""

    token_id: int
    logprob: float
    is_greedy: bool
    """No other token is likelier (of equals, the lowest id counts as the likeliest)."""


@dataclass(eq=False, slots=True)
class FlatLogprobs(Sequence[Logprobs | None]):
    """The same as a list of `Logprobs`, kept in few objects: position i has the entries from starts[i] to ends[i]."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    @classmethod
    def of(cls, positions: Iterable[Logprobs | None]) -> FlatLogprobs:
        flat = cls()
        for entries in positions:
            flat.append(entries)
        return flat

    def append(self, entries: Logprobs | None) -> None:
        """Add a position; None is one without entries."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (entries or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, place: int) -> Logprobs | None: ...

    @overload
    def __getitem__(self, place: slice) -> FlatLogprobs: ...

    def __getitem__(self, place: int | slice) -> Logprobs | None | FlatLogprobs:
        if isinstance(place, slice):
            return FlatLogprobs.of(self[index] for index in range(*place.indices(len(self))))
        entries = range(self.start_indices[place], self.end_indices[place])
        made = {self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i]) for i in entries}
        return made or None

    def __iter__(self) -> Iterator[Logprobs | None]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


# ---- in lines of JSON


def to_json(logprobs: Logprobs | None) -> dict[str, Any] | None:
    """One position for a line of JSON."""
    if logprobs is None:
        return None
    return {
        str(token_id): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token_id, entry in logprobs.items()
    }


def from_json(value: dict[str, Any] | None) -> Logprobs | None:
    """The inverse of `to_json`."""
    if value is None:
        return None
    return {
        int(token_id): Logprob(number(entry["logprob"]), entry["rank"], entry["decoded_token"])
        for token_id, entry in value.items()
    }


def finite(value: float) -> float | None:
    """JSON has no infinity: an impossible token's log-probability becomes null."""
    return value if math.isfinite(value) else None


def number(value: float | None) -> float:
    """The inverse of `finite`."""
    return -math.inf if value is None else value
