"""Mixture of experts in place of a dense MLP, with whole experts dealt out over tp.

Every tp rank sees every token, routes it the same way and adds what its own experts contribute; the sum over tp is the
one that a row-parallel layer makes anyway, so expert parallelism costs no further communication.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.collectives import enter_tp, leave_tp
from megalite.core.layers import replicated, sharded
from megalite.core.layout import share
from megalite.core.parallel_state import ParallelState

FEW_TOKENS = 256
"""Up to here every expert runs on every token on a GPU: reading the weights costs more than the products."""


class Routing:
    """What the routers did on the way through some layers, summed over those of their tokens that count."""

    def __init__(self) -> None:
        self.rows = 0
        self.listens = False
        self.counts: Tensor | None = None
        """How many assignments each expert got: float32 [experts], no gradient; None before the first layer."""
        self.probabilities: Tensor | None = None
        """Sums of each expert's probability: float32 [experts], with gradient."""

    def begin(self, rows: int) -> None:
        """Forget what was; from now on the first `rows` tokens count."""
        self.rows, self.listens, self.counts, self.probabilities = rows, True, None, None

    def end(self) -> None:
        """A layer that is run again for its backward pass adds nothing."""
        self.listens = False

    def add(self, probabilities: Tensor, experts: Tensor) -> None:
        """Of one layer: [T, experts] and [T, top_k]."""
        chosen = experts[: self.rows].flatten()
        counts = torch.zeros_like(probabilities[0]).scatter_add_(
            0, chosen, torch.ones_like(chosen, dtype=torch.float32)
        )
        sums = probabilities[: self.rows].sum(0)
        if self.listens:
            self.counts = counts if self.counts is None else self.counts + counts
            self.probabilities = sums if self.probabilities is None else self.probabilities + sums


class MixtureOfExperts(nn.Module):
    """[T, dim] -> [T, dim]: softmax router, the top_k experts of each token, gated MLPs as experts.

    `up` holds for each local expert its gate rows, then its up rows: [experts * 2 * intermediate, dim];
    `down`: [experts * dim, intermediate].
    """

    def __init__(
        self,
        dim: int,
        intermediate: int,
        *,
        num_experts: int,
        top_k: int,
        normalize_top_k: bool,
        activation: Callable[[Tensor], Tensor],
        state: ParallelState,
    ):
        super().__init__()
        self.state = state
        self.top_k = top_k
        self.normalize_top_k = normalize_top_k
        self.activation = activation
        self.routing: Routing | None = None
        """Who wants to know, in training."""
        self.first, end = share(num_experts, state.tp.size, state.tp.rank)
        self.num_local = end - self.first
        self.router = replicated((num_experts, dim), partial_gradient=True)
        self.up = sharded((self.num_local * 2 * intermediate, dim))
        self.down = sharded((self.num_local * dim, intermediate))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top_k] and global expert ids [T, top_k] of each token; float32 softmax over all experts."""
        probabilities = F.linear(x, self.router).float().softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.routing is not None and torch.is_grad_enabled():
            self.routing.add(probabilities, experts)
        if self.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts

    def forward(self, x: Tensor) -> Tensor:
        x = enter_tp(x, self.state)
        weights, experts = self.route(x)
        out = torch.zeros_like(x)
        # Choosing an expert's tokens synchronises with the host, which a captured decode step must not do.
        everywhere = x.is_cuda and x.shape[0] <= FEW_TOKENS
        for local in range(self.num_local):
            chosen = experts == self.first + local  # [T, top_k]
            if everywhere:
                out = out + self._expert(local, x) * (weights * chosen).sum(-1, keepdim=True)
                continue
            token, slot = torch.where(chosen)
            # In training also for no token: every rank's backward pass must reach the same parameters and sums.
            if token.numel() or torch.is_grad_enabled():
                out = out.index_add(0, token, self._expert(local, x[token]) * weights[token, slot, None])
        return leave_tp(out, self.state)

    def _expert(self, local: int, x: Tensor) -> Tensor:
        """The gated MLP of one of this rank's experts: [T, dim] -> [T, dim]."""
        up = self.up.view(self.num_local, -1, x.shape[-1])[local]  # [2F, D]
        down = self.down.view(self.num_local, x.shape[-1], -1)[local]  # [D, F]
        gate, value = F.linear(x, up).chunk(2, -1)
        return F.linear(self.activation(gate) * value, down)
