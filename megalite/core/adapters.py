"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linears of a model, several of them in one forward pass.

An adapter adds scale * B (A x) to a linear's output, with A [r, K] and B [N, r]. The ranks of all adapters of a linear
lie side by side, so that they cost two thin products together; a mask of the columns leaves each token its own:

    y = W x + B ((A x) * mask)        A [R, K], B [N, R], mask [T, R], scales are in B

Cut over tp as the weight is: a column-parallel linear has its rows of B and all of A, a row-parallel one its columns of
A, and its part of the product is a summand like that of W, so no communication is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.functional import gated
from megalite.core.linear import Format, Linear, Norm, Stored

NO_ADAPTER = -1


@dataclass(eq=False)
class Adapters:
    """All adapters of one decoder, by the order of their names, and which of them each token of a pass uses."""

    names: tuple[str, ...]
    tokens: Tensor | None = None
    """Of the pass that runs: index of each token's adapter, or NO_ADAPTER, int64 [T]; None: no token has any."""
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _owners: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def choose(self, tokens: Tensor | None) -> None:
        """For the passes from now on; waits for nothing, so it can be captured."""
        self.tokens = tokens
        self._masks.clear()

    def mask(self, owners: tuple[int, ...], x: Tensor) -> Tensor | None:
        """Which columns count for each token, 0 or 1, [T, R] in the type of `x`; `owners`: adapter of each column."""
        if self.tokens is None:
            return None
        if owners not in self._masks:
            if owners not in self._owners:
                self._owners[owners] = torch.tensor(owners, device=x.device)
            self._masks[owners] = (self.tokens[:, None] == self._owners[owners]).to(x.dtype)
        return self._masks[owners]


class Adapted(Format):
    """The format of a linear with adapters: what its weight is stored as, and the low-rank products added.

    Where tokens have adapters, neither norm nor sum are taken into the product's kernel.
    """

    def __init__(self, base: Format, adapters: Adapters, owners: tuple[int, ...], a: Tensor, b: Tensor):
        self.base = base
        self.adapters = adapters
        self.owners = owners
        self.a = a
        """[R, K]."""
        self.b = b
        """[N, R]."""

    def matrix(self, stored: Stored) -> Tensor:
        return self.base.matrix(stored)

    def takes_more(self, x: Tensor, stored: Stored) -> bool:
        return self.adapters.tokens is None and self.base.takes_more(x, stored)

    def adds(self, x: Tensor, stored: Stored, bias: Tensor | None) -> bool:
        return self.adapters.tokens is None and self.base.adds(x, stored, bias)

    def product(
        self,
        x: Tensor,
        stored: Stored,
        bias: Tensor | None = None,
        *,
        gate: str | None = None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        mask = self.adapters.mask(self.owners, x)
        if mask is None:
            return self.base.product(x, stored, bias, gate=gate, norm=norm, residual=residual)
        assert norm is None and residual is None
        low = F.linear(x, self.a) * mask
        y = torch.addmm(self.base.product(x, stored, bias), low, self.b.t())
        return y if gate is None else gated(y, gate)

    def suit_cpu(self, stored: Stored) -> None:
        self.base.suit_cpu(stored)


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapter's part in a linear of this rank: B's rows are outputs `start` and on; the scale is in B."""

    adapter: int
    a: Tensor
    """[r, K]."""
    b: Tensor
    """[rows, r]."""
    start: int = 0


def adapt(
    linear: Linear, adapters: Adapters, parts: list[LowRank], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put adapters beside a linear."""
    place: Any = {"device": device, "dtype": dtype}
    outputs = sum(getattr(linear, "widths", ())) or max(part.start + len(part.b) for part in parts)
    owners = tuple(part.adapter for part in parts for _ in range(len(part.a)))
    b = torch.zeros(outputs, len(owners), **place)
    column = 0
    for part in parts:
        rank = len(part.a)
        b[part.start : part.start + len(part.b), column : column + rank] = part.b
        column += rank
    a = torch.cat([part.a.to(**place) for part in parts])
    linear.format = Adapted(linear.format, adapters, owners, a, b)
