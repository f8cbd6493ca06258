"""Embedding with its table cut over tp, norms, and the residual stream that they read. T tokens, D channels.

Parameters carry two marks that training reads: `tensor_model_parallel` (a slice; DeepSpeed then counts it on every tp
rank in the gradient norm) and `sum_gradient_over_tp` (whole on every tp rank, each of which computes a part of its
gradient).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core import fused
from megalite.core.collectives import fusable_sum, leave_tp
from megalite.core.functional import by_kernels, rms_norm
from megalite.core.layout import Even
from megalite.core.parallel_state import ParallelState
from megalite.kernels import norm as norm_kernels
from megalite.kernels.jit import launches_dependents
from megalite.kernels.symmetric import SymmetricSum


def replicated(shape: tuple[int, ...], *, partial_gradient: bool) -> nn.Parameter:
    """A parameter that every tp rank holds whole; `partial_gradient`: a rank's backward sees only part of its use."""
    return _marked(shape, tensor_model_parallel=False, sum_gradient_over_tp=partial_gradient)


def sharded(shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of which this tp rank holds a slice of this shape."""
    return _marked(shape, tensor_model_parallel=True, sum_gradient_over_tp=False)


def _marked(shape: tuple[int, ...], **marks: bool) -> nn.Parameter:
    param = nn.Parameter(torch.empty(shape))
    for name, value in marks.items():
        setattr(param, name, value)
    return param


class VocabParallelEmbedding(nn.Module):
    """Token ids int64 [T] -> [T, dim], under sequence parallelism [T/tp, dim]; the table's rows are cut over tp.

    A rank adds zeros for ids whose rows it does not hold.
    """

    def __init__(self, vocab_size: int, dim: int, state: ParallelState):
        super().__init__()
        self.state = state
        self.start, self.end = Even(vocab_size).range(state.tp.size, state.tp.rank)
        self.weight = sharded((self.end - self.start, dim))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.state.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        if self.start == self.end:  # more ranks than rows
            return leave_tp(self.weight.new_zeros(token_ids.shape[0], self.weight.shape[1]), self.state)
        mine = (token_ids >= self.start) & (token_ids < self.end)
        local = torch.where(mine, token_ids - self.start, 0)
        return leave_tp(F.embedding(local, self.weight) * mine.unsqueeze(-1), self.state)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), or * (1 + weight) when `zero_centred`."""

    def __init__(self, dim: int, eps: float, *, zero_centred: bool = False, partial_gradient: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centred = zero_centred
        self.weight = replicated((dim,), partial_gradient=partial_gradient)

    def forward(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        *,
        update: Tensor | None = None,
        sums: SymmetricSum | None = None,
    ) -> Tensor:
        """The norm of x [T, D], or of x + `update` (see `Residual`); `rows` int64 [R]: of these rows only -> [R, D]."""
        if update is not None and sums is not None:
            return sums.add_norm(update, x, self.weight, self.eps, zero_centred=self.zero_centred)
        if by_kernels(x) and x.ndim == 2:
            return norm_kernels.rms_norm(
                x,
                self.weight,
                self.eps,
                zero_centred=self.zero_centred,
                rows=rows,
                update=update,
                pdl=launches_dependents(x.device),
            )
        assert update is None
        x = x if rows is None else x[rows]
        if fused.learns_by_kernels(x) and x.ndim == 2:
            return self.learnt(x, None)[1]
        if self.zero_centred:
            # float32 throughout: 1 + weight loses the weight's low bits in bfloat16
            return rms_norm(x.float(), 1.0 + self.weight.float(), self.eps).type_as(x)
        return rms_norm(x, self.weight, self.eps)

    def learnt(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + update and its norm by kernels with gradients, [T, D] both."""
        return fused.add_norm(x, update, self.weight, self.eps, zero_centred=self.zero_centred)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension (arXiv 1607.06450), or * (1 + weight) when
    `zero_centred`."""

    def __init__(
        self, dim: int, eps: float, *, bias: bool = True, zero_centred: bool = False, partial_gradient: bool = False
    ):
        super().__init__()
        self.eps = eps
        self.zero_centred = zero_centred
        self.weight = replicated((dim,), partial_gradient=partial_gradient)
        self.bias = replicated((dim,), partial_gradient=partial_gradient) if bias else None

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`rows`, int64 [R]: only these of x [T, D] -> [R, D]."""
        x = x if rows is None else x[rows]
        weight = 1.0 + self.weight if self.zero_centred else self.weight
        return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)


def _adds_in_place(x: Tensor) -> bool:
    return by_kernels(x) or x.is_inference()


class Residual:
    """The residual stream of a forward pass, [T, D] ([T/tp, D] under sequence parallelism), and its latest update.

    The update waits for the norm that reads the stream next, whose kernel adds it. Where kernels run, and in
    inference, the sum is made in `x` itself.
    """

    def __init__(self, x: Tensor):
        self.x = x
        self.update: Tensor | None = None
        self.sums: SymmetricSum | None = None
        """Makes the sum over tp of which `update` is this rank's part; None: `update` is whole."""

    def add_partial(self, update: Tensor, state: ParallelState) -> None:
        """x += the sum over tp of partial outputs."""
        sums = fusable_sum(update, state)
        self.add(leave_tp(update, state) if sums is None else update)
        self.sums = sums

    def add(self, update: Tensor, post: Callable[[Tensor], Tensor] | None = None) -> None:
        """x += update, or `post` of it, such as a norm."""
        self.x = self.total()
        self.update = update if post is None else post(update)

    def settled(self) -> Tensor | None:
        """The stream; None if an update has not been added to it yet."""
        return self.x if self.update is None else None

    def total(self) -> Tensor:
        """The stream with its update."""
        if self.update is not None and self.sums is not None:
            self.update, self.sums = self.sums(self.update), None
        if self.update is not None:
            self.x = self.x.add_(self.update) if _adds_in_place(self.x) else self.x + self.update
            self.update = None
        return self.x

    def sum_in_place(self) -> Tensor:
        """The stream with its update, for a kernel that adds to it."""
        return self.total()

    def normed(self, norm: nn.Module | None) -> Tensor:
        """`norm` of the stream with its update; None: the stream itself."""
        if norm is None:
            return self.total()
        out: Tensor
        if self.update is not None and isinstance(norm, RMSNorm) and by_kernels(self.x):
            out = norm(self.x, update=self.update, sums=self.sums)
            self.update = self.sums = None
        elif isinstance(norm, RMSNorm) and self.sums is None and fused.learns_by_kernels(self.x, norm.weight):
            self.x, out = norm.learnt(self.x, self.update)
            self.update = None
        else:
            out = norm(self.total())
        return out


class Beside(Residual):
    """The stream as several sublayers read it before any of them has added to it."""

    def __init__(self, stream: Residual):
        x = stream.total()
        super().__init__(x.clone() if _adds_in_place(x) else x)
        self.stream = stream

    def add_partial(self, update: Tensor, state: ParallelState) -> None:
        self.stream.add_partial(update, state)

    def add(self, update: Tensor, post: Callable[[Tensor], Tensor] | None = None) -> None:
        self.stream.add(update, post)

    def sum_in_place(self) -> Tensor:
        return self.stream.sum_in_place()
