"""Linear attention with decay: one state of each head, into which every token writes and from which it reads.

A state M [S, P] maps keys to values. With a token's key k, query q, value v and log decay g:

    M = exp(g) M + k v^T                                    state space duality (Mamba-2, arXiv 2405.21060)
    M = exp(g) M + k (b (v - exp(g) M^T k))^T               gated delta rule (arXiv 2412.06464), with a rate b
    o = M^T q

`step` does so token by token. `Chunks` computes many tokens as matrix products: within a chunk all values that are
written follow from one triangular system (the WY form, arXiv 2406.06484), and a state goes from chunk to chunk.
Shapes: G groups, each with one key and one query, R heads in a group, S channels of a key, P of a value; all float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Signals:
    """What linear attention is given of tokens; the leading dimensions of all tensors are alike."""

    q: Tensor
    """[..., G, S]."""
    k: Tensor
    """[..., G, S]."""
    v: Tensor
    """[..., G, R, P]."""
    decay: Tensor
    """Logarithm of what a state is multiplied by before the token is written, [..., G, R]; at most 0."""
    rate: Tensor | None = None
    """Share of the state's value at the key that the new value replaces, [..., G, R]; None: the value is added."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Signals:
        """All tensors changed alike."""
        rate = None if self.rate is None else change(self.rate)
        return Signals(change(self.q), change(self.k), change(self.v), change(self.decay), rate)


def step(x: Signals, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences, state [B, G, R, S, P] -> outputs [B, G, R, P] and the new states, written over
    the old ones: states may be most of the memory that a step reads and writes."""
    k, q = x.k[:, :, None, None], x.q[:, :, None, None]  # [B, G, 1, 1, S]
    state = state.mul_(x.decay.exp()[..., None, None])
    written = x.v[..., None, :]
    if x.rate is not None:
        written = x.rate[..., None, None] * (written - k @ state)
    state = state.addcmul_(k.mT, written)
    return (q @ state).squeeze(-2), state


class Chunks:
    """N chunks of L tokens: all that can be computed before their states are known.

    Padding at the end of a chunk has zeros everywhere: it writes nothing and decays nothing.
    """

    def __init__(self, x: Signals):
        """`x`: of [N, L] tokens."""
        q, k = (each.transpose(1, 2)[:, :, None] for each in (x.q, x.k))  # [N, G, 1, L, S]
        decayed = x.decay.permute(0, 2, 3, 1).cumsum(-1)  # [N, G, R, L]: from the chunk's beginning
        length = decayed.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        between = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(later, -torch.inf).exp()
        begun = decayed.exp()[..., None]
        self.within = q @ k.mT * between
        """Weight by which a token (row) reads the value of a token of its chunk (column): [N, G, R, L, L]."""
        self.reads = q * begun
        self.writes = (k * (decayed[..., -1:] - decayed).exp()[..., None]).mT
        self.kept = begun[..., -1:, :]
        self.values = x.v.permute(0, 2, 3, 1, 4)  # [N, G, R, L, P]
        self.corrections: Tensor | None = None
        """Times the state before the chunk, what is subtracted from `values`: [N, G, R, L, S]; None: nothing."""
        if x.rate is not None:
            rate = x.rate.permute(0, 2, 3, 1)[..., None]
            targets = torch.cat([rate * self.values, rate * begun * k], -1)
            system = rate * between * (k @ k.mT)  # with ones on its diagonal, whatever stands there
            solved = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True)
            self.values, self.corrections = solved.split((x.v.shape[-1], k.shape[-1]), -1)

    def advance(self, some: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk of each of n sequences, state [n, G, R, S, P] -> outputs [n, G, R, L, P] and the states after."""
        values = self.values[some]
        if self.corrections is not None:
            values = values - self.corrections[some] @ state
        out = self.reads[some] @ state + self.within[some] @ values
        return out, self.kept[some] * state + self.writes[some] @ values
