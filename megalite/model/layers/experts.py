"""The module of a mixture of experts, with expert parallelism along the tp axis: whole experts on each rank.

Every tp rank has every token, routes it the same way and adds the output of its own experts; the sum over tp is the
one that a row-parallel layer makes anyway, so expert parallelism costs no further communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.collectives import enter_tp, leave_tp
from megalite.core.formats import WeightFormat
from megalite.core.layers import Residual, replicated, sharded
from megalite.core.layout import share
from megalite.core.linear import DENSE, Format, Quantized, in_fp8
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.kinds.experts import Experts
from megalite.model.layers.base import LayerModule
from megalite.model.rope import Rotation

FEW_TOKENS = 256
"""Up to here every expert runs on every token on a GPU: reading the weights costs more than the products."""


class Routing:
    """Router statistics for the load-balancing loss, summed over the tokens and layers of a forward pass."""

    def __init__(self) -> None:
        self.rows = 0
        self.listens = False
        self.counts: Tensor | None = None
        """Tokens assigned to each expert: float32 [experts], no gradient; None before the first layer."""
        self.probabilities: Tensor | None = None
        """Sum of each expert's probability: float32 [experts], with gradient."""

    def begin(self, rows: int) -> None:
        """Start from zero; only the first `rows` tokens are counted (the others are padding)."""
        self.rows, self.listens, self.counts, self.probabilities = rows, True, None, None

    def end(self) -> None:
        """Stop counting: a layer that is recomputed in the backward pass must not be counted twice."""
        self.listens = False

    def add(self, probabilities: Tensor, experts: Tensor) -> None:
        """Count one layer: its probabilities [T, experts] and chosen experts [T, top_k]."""
        chosen = experts[: self.rows].flatten()
        counts = torch.zeros_like(probabilities[0]).scatter_add_(
            0, chosen, torch.ones_like(chosen, dtype=torch.float32)
        )
        sums = probabilities[: self.rows].sum(0)
        if self.listens:
            self.counts = counts if self.counts is None else self.counts + counts
            self.probabilities = sums if self.probabilities is None else self.probabilities + sums


class MixtureOfExperts(LayerModule):
    """[T, dim] -> [T, dim]: a softmax router weights the top_k experts of each token, which are gated MLPs.

    Parameters, with E experts on this rank: `router` [num_experts, dim]; `up` [E * 2 * intermediate, dim], of each
    expert its gate rows, then its up rows; `down` [E * dim, intermediate].
    """

    def __init__(
        self,
        kind: Experts,
        dim: int,
        state: ParallelState,
        formats: tuple[WeightFormat | None, WeightFormat | None] = (None, None),
    ):
        """`formats`: of `up` and `down`; None: as numbers."""
        super().__init__()
        self.state = state
        self._formats: dict[str, Format] = {"up": DENSE, "down": DENSE}
        self.top_k = kind.top_k
        self.normalize_top_k = kind.normalize_top_k
        self.activation = kind.activation
        self.routing: Routing | None = None
        """Statistics that training collects, if it does."""
        self.first, end = share(kind.num_experts, state.tp.size, state.tp.rank)
        self.num_local = end - self.first
        self.router = replicated((kind.num_experts, dim), partial_gradient=True)
        inner = kind.intermediate_size
        self._hold("up", [inner] * 2 * self.num_local, dim, formats[0])
        self._hold("down", [dim] * self.num_local, inner, formats[1])

    def _hold(self, name: str, segments: list[int], columns: int, format: WeightFormat | None) -> None:
        """The parameter or, in a format of its own, the parameters of all of this rank's experts."""
        if format is None:
            self.register_parameter(name, sharded((sum(segments), columns)))
            return
        made = Quantized(format, segments, columns, torch.get_default_dtype(), all_columns=columns)
        self._formats[name] = made
        for part, tensor in made.parameters().items():
            self.register_parameter(f"{name}_{part}", tensor)

    @torch.no_grad()
    def settle(self, quantization: str | None) -> None:
        """Once the weights are loaded: keep them in the form in which they are applied."""
        for name, format in list(self._formats.items()):
            if isinstance(format, Quantized):
                stored = {part.name: self._parameters.pop(f"{name}_{part.name}") for part in format.format.parts}
                self._formats[name], tensors = format.applied(stored)
            elif quantization == "fp8":
                weight = self._parameters.pop(name)
                assert weight is not None
                self._formats[name], tensors = in_fp8(weight.detach())
            else:
                continue
            for part, tensor in tensors.items():
                held = name if part == "weight" else f"{name}_{part}"
                self.register_parameter(held, nn.Parameter(tensor, requires_grad=False))

    def _stored(self, name: str, local: int) -> dict[str, Tensor | None]:
        """The tensors of one expert's matrix."""
        if self._formats[name] is DENSE:
            weight = self._parameters[name]
            assert weight is not None
            return {"weight": weight.view(self.num_local, -1, weight.shape[-1])[local]}
        found: dict[str, Tensor | None] = {"order": self._parameters.get(f"{name}_order")}
        for part in ("codes", "scales", "zeros"):
            tensor = self._parameters.get(f"{name}_{part}")
            found[part] = None if tensor is None else tensor.view(self.num_local, -1, tensor.shape[-1])[local]
        return found

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top_k] and global expert ids [T, top_k] of each token; float32 softmax over all experts."""
        probabilities = F.linear(x, self.router).float().softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.routing is not None and torch.is_grad_enabled():
            self.routing.add(probabilities, experts)
        if self.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts

    def update(
        self,
        x: Residual,
        norm: nn.Module | None,
        post: Callable[[Tensor], Tensor] | None,
        ctx: AttentionContext,
        rotations: Sequence[Rotation],
    ) -> None:
        x.add(self(x.normed(norm)), post)

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
        hidden = self._formats["up"].product(x, self._stored("up", local), gate=self.activation)
        return self._formats["down"].product(hidden, self._stored("down", local))
