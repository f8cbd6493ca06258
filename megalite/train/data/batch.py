"""What one pass of one replica computes: sequences end to end, their targets, and how much each token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """How much each target counts in the loss: float32 [T]; 0 for what is given (prompts, padding)."""
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

        def send(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            ids=send(self.ids),
            targets=send(self.targets),
            weights=send(self.weights),
            values={name: send(value) for name, value in self.values.items()},
        )

    def padded(self, multiple: int) -> MicroBatch:
        """With a further sequence that does not count, so that T is a multiple: sequence parallel cuts T over tp."""
        padding = -self.num_tokens % multiple
        if not padding:
            return self

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(padding)])

        return replace(
            self,
            ids=pad(self.ids),
            targets=pad(self.targets),
            weights=pad(self.weights),
            lengths=(*self.lengths, padding),
            values={name: pad(value) for name, value in self.values.items()},
            padding=self.padding + padding,
        )


def from_windows(windows: Tensor, counts: Sequence[bool] | None = None) -> MicroBatch:
    """Windows of running text, int64 [B, L + 1], as B sequences of L tokens; `counts`: whether each counts."""
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
    flat = [token for sequence in sequences for token in sequence[:-1]]
    targets = [token for sequence in sequences for token in sequence[1:]]

    def per_token(rows: Sequence[Sequence[float]]) -> Tensor:
        tensor = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
        assert tensor.shape[0] == len(flat), "a value for each token after the first"
        return tensor

    return MicroBatch(
        ids=torch.tensor(flat, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=per_token(weights),
        lengths=tuple(len(sequence) - 1 for sequence in sequences),
        beyond=1,
        values={name: per_token(rows) for name, rows in (values or {}).items()},
    )


def blank(tokens: int) -> MicroBatch:
    """A batch that does not count: replicas that have run out of work compute one while the others have work."""
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return MicroBatch(ids=zeros, targets=zeros, weights=torch.zeros(tokens), lengths=(tokens,), padding=tokens)
