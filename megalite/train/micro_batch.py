"""Micro batches: what the trainer computes in one pass. Sequences lie end to end, and every target has a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """T tokens of one or more sequences. Every rank of a replica holds the same."""

    ids: Tensor
    """int64 [T]."""
    targets: Tensor
    """The token after each: int64 [T]."""
    weights: Tensor
    """Weight of each target in the loss: float32 [T]; 0 for what is given (prompts, padding)."""
    lengths: tuple[int, ...]
    """Tokens of each sequence; they sum to T."""
    beyond: int = 0
    """Tokens that each sequence has besides, because they are targets only: LongRoPE goes by whole sequences."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a loss needs of each token (advantages, earlier log-probabilities): float32 [T] each."""
    padding: int = 0
    """Tokens at the end that stand for nothing."""
    temperature: float = 1.0
    """What logits are divided by: log-probabilities are those of the distribution that samples were drawn from."""

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def num_real(self) -> int:
        return self.num_tokens - self.padding

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`; the copy does not wait for a GPU."""
        if device.type == "cpu":
            return self
        return self._mapped(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def padded(self, multiple: int) -> MicroBatch:
        """With a further sequence of weight 0, so that T is a multiple: sequence parallel cuts T over tp."""
        padding = -self.num_tokens % multiple
        if not padding:
            return self
        return self._mapped(
            lambda tensor: torch.cat([tensor, tensor.new_zeros(padding)]),
            lengths=(*self.lengths, padding),
            padding=self.padding + padding,
        )

    def _mapped(self, function: Callable[[Tensor], Tensor], **changes: Any) -> MicroBatch:
        """With `function` applied to every tensor."""
        values = {name: function(value) for name, value in self.values.items()}
        ids, targets, weights = map(function, (self.ids, self.targets, self.weights))
        return replace(self, ids=ids, targets=targets, weights=weights, values=values, **changes)


def from_windows(windows: Tensor, counts: Sequence[bool] | None = None) -> MicroBatch:
    """Windows of running text, int64 [B, L + 1], as B sequences of L tokens; `counts`: whether each has weight."""
    batch, length = windows.shape[0], windows.shape[1] - 1
    weights = torch.ones(batch, length)
    if counts is not None:
        weights *= torch.tensor(counts, dtype=torch.float32)[:, None]
    return MicroBatch(
        ids=windows[:, :-1].flatten(),
        targets=windows[:, 1:].flatten(),
        weights=weights.flatten(),
        lengths=(length,) * batch,
    )


def from_sequences(
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    values: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> MicroBatch:
    """Whole sequences of at least two tokens; `weights` and `values` have an entry for each token after the first."""
    ids = torch.tensor([token for sequence in sequences for token in sequence[:-1]], dtype=torch.int64)

    def per_token(rows: Sequence[Sequence[float]]) -> Tensor:
        tensor = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
        assert tensor.shape == ids.shape, "a value for each token after the first"
        return tensor

    return MicroBatch(
        ids=ids,
        targets=torch.tensor([token for sequence in sequences for token in sequence[1:]], dtype=torch.int64),
        weights=per_token(weights),
        lengths=tuple(len(sequence) - 1 for sequence in sequences),
        beyond=1,
        values={name: per_token(rows) for name, rows in (values or {}).items()},
    )


def blank(tokens: int) -> MicroBatch:
    """A micro batch of padding: replicas that have run out of work compute one while the others have work."""
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return MicroBatch(ids=zeros, targets=zeros, weights=torch.zeros(tokens), lengths=(tokens,), padding=tokens)
