"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linears of a model, several of them in one forward pass.

An adapter adds scale * B (A x) to a linear's output, with A [r, K] and B [N, r]. The matrices of all adapters of a
linear are stacked, A's by rows and B's by columns, so all adapters together cost two thin products. A mask [T, R] keeps
of these R columns those of each token's own adapter:

    y = W x + B ((A x) * mask)        A [R, K], B [N, R], mask [T, R], scales are in B

Cut over tp as the weight is: a column-parallel linear has its rows of B and all of A, a row-parallel one its columns of
A, and its part of the product is a summand like that of W, so no communication is added. What is whole on every tp
rank, A of the one and B of the other, gets a part of its gradient on each.

`Adapted` serves many adapters as they are, `Learnt` one whose A and B train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.dropout import Dropout
from megalite.core.functional import gated
from megalite.core.linear import Format, Linear, Norm, Stored

NO_ADAPTER = -1


@dataclass(eq=False)
class Adapters:
    """All adapters of one decoder, in the order of `names`, and which one each token of a forward pass uses."""

    names: tuple[str, ...]
    tokens: Tensor | None = None
    """Index of each token's adapter in this pass, or NO_ADAPTER: int64 [T]; None: no token has an adapter."""
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _owners: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def choose(self, tokens: Tensor | None) -> None:
        """Set `tokens` for the passes from now on; does not wait for the device, so it can be captured in a graph."""
        self.tokens = tokens
        self._masks.clear()

    def mask(self, owners: tuple[int, ...], x: Tensor) -> Tensor:
        """Which columns count for each token, 0 or 1, [T, R] in the type of `x`; `owners`: adapter of each column."""
        assert self.tokens is not None
        if owners not in self._masks:
            if owners not in self._owners:
                self._owners[owners] = torch.tensor(owners, device=x.device)
            self._masks[owners] = (self.tokens[:, None] == self._owners[owners]).to(x.dtype)
        return self._masks[owners]


class _Beside(Format):
    """A linear's format that adds low-rank products to the weight's product; `base` stores the weight.

    Where there is something to add, norm and residual sum are not fused into the kernel of the weight's product.
    """

    def __init__(self, base: Format):
        self.base = base

    @property
    def idle(self) -> bool:
        """Whether there is nothing to add."""
        raise NotImplementedError

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y + the low-rank products of x [T, K]; y [T, N] is the weight's product with x."""
        raise NotImplementedError

    def matrix(self, stored: Stored) -> Tensor:
        return self.base.matrix(stored)

    def takes_more(self, x: Tensor, stored: Stored) -> bool:
        return self.idle and self.base.takes_more(x, stored)

    def adds(self, x: Tensor, stored: Stored, bias: Tensor | None) -> bool:
        return self.idle and self.base.adds(x, stored, bias)

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
        if self.idle:
            return self.base.product(x, stored, bias, gate=gate, norm=norm, residual=residual)
        assert norm is None and residual is None
        y = self.added(x, self.base.product(x, stored, bias))
        return y if gate is None else gated(y, gate)

    def suit_cpu(self, stored: Stored) -> None:
        self.base.suit_cpu(stored)


class Adapted(_Beside):
    """The format of a linear beside which several adapters are served, each token with its own or none."""

    def __init__(self, base: Format, adapters: Adapters, owners: tuple[int, ...], a: Tensor, b: Tensor):
        super().__init__(base)
        self.adapters = adapters
        self.owners = owners
        self.a = a
        """[R, K]."""
        self.b = b
        """[N, R]."""

    @property
    def idle(self) -> bool:
        return self.adapters.tokens is None

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        update = F.linear(x, self.a) * self.adapters.mask(self.owners, x)
        return y.addmm_(update, self.b.t()) if y.is_inference() else torch.addmm(y, update, self.b.t())


@dataclass(frozen=True, slots=True)
class LearntPart:
    """One module's place in a `LowRankUpdate`."""

    name: str
    rank: int
    start: int
    """Index of the module's first output among the linear's outputs."""
    scale: float


class LowRankUpdate(nn.Module):
    """Trainable scale * B (A x) for the modules whose weights are stacked in one linear of this rank.

    `a` [R, K] stacks the A of all modules; each module has its own `b` [rows, r], so no zeros are stored.
    """

    def __init__(
        self,
        parts: Sequence[LearntPart],
        a: nn.Parameter,
        b: Mapping[str, nn.Parameter],
        *,
        dropout: Dropout | None = None,
        channels: Tensor | None = None,
    ):
        """`b`: by name of the part, for parts that have outputs on this rank. `dropout`: of the input, whose channels
        have the keys `channels`, int32 [K]."""
        super().__init__()
        self.parts = tuple(parts)
        self.a = a
        self.b = nn.ParameterDict(b)
        self.dropout = dropout
        self.channels = channels

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y [T, N] + scale * B (A x) of x [T, K]; both may be partial sums over tp."""
        if self.dropout is not None and self.channels is not None:
            x = self.dropout(x, self.channels)
        return torch.addmm(y, F.linear(x, self.a), self._matrix(y.shape[1]).t())

    def _matrix(self, outputs: int) -> Tensor:
        """scale * B of all parts as one block-diagonal matrix [outputs, R]."""
        blocks, end = [], 0
        for part in self.parts:
            if part.name not in self.b:
                blocks.append(self.a.new_zeros(0, part.rank))
                continue
            b = self.b[part.name]
            if part.start > end:
                blocks.append(b.new_zeros(part.start - end, 0))
            blocks.append(b * part.scale)
            end = part.start + len(b)
        if end < outputs:
            blocks.append(self.a.new_zeros(outputs - end, 0))
        return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)

    def copied(self) -> LowRankUpdate:
        """A frozen copy."""
        a, b = (nn.Parameter(self.a.detach().clone(), requires_grad=False), dict(self.b.items()))
        held = {name: nn.Parameter(one.detach().clone(), requires_grad=False) for name, one in b.items()}
        return LowRankUpdate(self.parts, a, held)


class Learnt(_Beside):
    """The format of a linear beside which an adapter is trained: every token uses it."""

    def __init__(self, base: Format, update: LowRankUpdate):
        super().__init__(base)
        self.update: LowRankUpdate | None = update
        """None: nothing is added."""

    @property
    def idle(self) -> bool:
        return self.update is None

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.update is not None
        return self.update.added(x, y)


def learn(linear: Linear, update: LowRankUpdate) -> None:
    """Put an adapter that trains beside a linear, as its module `lora`."""
    linear.add_module("lora", update)
    linear.format = Learnt(linear.format, update)


def learnt_formats(module: nn.Module) -> dict[str, Learnt]:
    """The formats of a module's linears beside which adapters train, by the linears' names."""
    parts = ((name, part) for name, part in module.named_modules() if isinstance(part, Linear))
    return {name: part.format for name, part in parts if isinstance(part.format, Learnt)}


def dropout_of(module: nn.Module) -> Dropout | None:
    """The dropout that the adapters in a module share, if there is one."""
    updates = (one.update for one in learnt_formats(module).values())
    return next((one.dropout for one in updates if one is not None), None)


@contextmanager
def using(formats: Mapping[str, Learnt], updates: Mapping[str, LowRankUpdate | None]) -> Iterator[None]:
    """Context in which linears use `updates`, by the linears' names, in place of their own; None: no update."""
    before = {name: one.update for name, one in formats.items()}
    try:
        for name, one in formats.items():
            one.update = updates[name]
        yield
    finally:
        for name, one in formats.items():
            one.update = before[name]


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapter's A and B for a linear of this rank; B's rows are outputs from `start` on, the scale is in B."""

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
