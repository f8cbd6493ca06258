"""The module of a mixture of experts, with expert parallelism along the tp axis: whole experts on each rank.

Every tp rank has every token, routes it the same way and adds the output of its own experts; the sum over tp is the
one that a row-parallel layer makes anyway, so expert parallelism costs no further communication.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.collectives import enter_tp, leave_tp
from megalite.core.formats import WeightFormat
from megalite.core.functional import gated
from megalite.core.layers import Residual, replicated, sharded
from megalite.core.layout import share
from megalite.core.linear import DENSE, Coded, ColumnParallelLinear, Format, Quantized, RowParallelLinear, in_fp8
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.kinds.experts import ClampedGate, Experts, Router
from megalite.model.layers.base import LayerModule, Norms
from megalite.model.rope import Rotation

FEW_TOKENS = 256
"""Most tokens for which every expert runs on every token, on a GPU without grouped products: to pick experts the host
would have to wait, which a captured step must not do."""
CODED_ROWS = 256
"""Most rows (a token counts once for each of its experts) for which codes are multiplied as they are read; for more,
all numbers of the layer's experts are written out first."""


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
    """[T, dim] -> [T, dim]: a router weights the top_k experts of each token, which are gated MLPs.

    Parameters, with E experts on this rank, I wide: `router` [num_experts, dim]; `up` [E * 2 I, dim], of each expert
    its gate rows, then its up rows (alternating, if the gate is clamped); `down` [E * dim, I]. Each expert's matrix is
    transposed where the checkpoint has it so.
    """

    up: Tensor
    down: Tensor

    def __init__(
        self,
        kind: Experts,
        dim: int,
        state: ParallelState,
        formats: tuple[WeightFormat | None, WeightFormat | None] = (None, None),
        shared_formats: tuple[WeightFormat | None, WeightFormat | None] = (None, None),
    ):
        """`formats`: of the experts' `up` and `down`; `shared_formats`: of the shared expert's; None: numbers."""
        super().__init__()
        self.state = state
        self._formats: dict[str, Format] = {"up": DENSE, "down": DENSE}
        self.choice = kind.router
        self.activation = kind.activation
        self.clamped = kind.clamped
        self.turned = kind.turned
        self.routing: Routing | None = None
        """Statistics that training collects, if it does."""
        self.first, end = share(kind.num_experts, state.tp.size, state.tp.rank)
        self.num_local, self.num_experts = end - self.first, kind.num_experts
        self.router = replicated((kind.num_experts, dim), partial_gradient=True)
        self.router_bias = replicated((kind.num_experts,), partial_gradient=True) if kind.router.bias else None
        self.correction = None
        if kind.router.correction:
            self.correction = replicated((kind.num_experts,), partial_gradient=False)
            self.correction.data = self.correction.data.float()
        self.inner = inner = kind.intermediate_size
        if self.turned:
            self._hold("up", [dim] * self.num_local, 2 * inner, None)
            self._hold("down", [inner] * self.num_local, dim, None)
        else:
            self._hold("up", [inner] * 2 * self.num_local, dim, formats[0])
            self._hold("down", [dim] * self.num_local, inner, formats[1])
        self.up_bias = sharded((self.num_local, 2 * inner)) if kind.biases else None
        self.down_bias = sharded((self.num_local, dim)) if kind.biases else None
        self.shared_up = self.shared_down = self.shared_scale = None
        if kind.shared_size:
            up, down = shared_formats
            self.shared_up = ColumnParallelLinear(dim, (kind.shared_inner,) * 2, state, bias=False, format=up)
            self.shared_down = RowParallelLinear(kind.shared_inner, dim, state, bias=False, format=down)
        if kind.shared_gate:
            self.shared_scale = replicated((1, dim), partial_gradient=True)

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
        """Convert the loaded weights to the form in which they are applied."""
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

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of all experts' matrices, of each expert [E, ...], and the `order` of columns if there is one."""
        if self._formats[name] is DENSE:
            found = {"weight": self._parameters[name]}
        else:
            found = {part: self._parameters.get(f"{name}_{part}") for part in ("codes", "scales", "zeros", "order")}
        return {
            part: tensor if part == "order" else tensor.view(self.num_local, -1, tensor.shape[-1])
            for part, tensor in found.items()
            if tensor is not None
        }

    def _stored(self, name: str, local: int) -> dict[str, Tensor]:
        """The tensors of one expert's matrix."""
        return {part: tensor if part == "order" else tensor[local] for part, tensor in self._tensors(name).items()}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, top_k] and global expert ids [T, top_k] of each token; scores are float32."""
        choice, bias = self.choice, self.router_bias
        if choice.precise:
            logits = F.linear(x.float(), self.router.float(), None if bias is None else bias.float())
        else:
            logits = F.linear(x, self.router, bias).float()
        scores = logits.softmax(-1) if choice.score == "softmax" else logits.sigmoid()
        if self.correction is None and choice.groups == 1:
            weights, experts = scores.topk(choice.top_k, dim=-1)
        else:
            experts = _wanted(scores.detach(), self.correction, choice).topk(choice.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
        if self.routing is not None and torch.is_grad_enabled():
            self.routing.add(scores if choice.score == "softmax" else logits.softmax(-1), experts)
        if choice.normalize:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total.clamp(min=choice.least_sum) if choice.least_sum else total)
        if choice.scale != 1:
            weights = weights * choice.scale
        if self.correction is not None and torch.is_grad_enabled():
            weights = weights + 0 * self.correction.sum()  # optimizers want a gradient of every parameter
        return weights.to(x.dtype), experts

    def update(self, x: Residual, norms: Norms, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        x.add(self(x.normed(norms.before)), norms.after)

    def forward(self, x: Tensor) -> Tensor:
        whole = enter_tp(x, self.state)
        weights, experts = self.route(whole)
        if self._has_groups(whole):
            out = self._by_groups(whole, weights, experts)
        elif whole.is_cuda and whole.shape[0] <= FEW_TOKENS:
            out = self._everywhere(whole, weights, experts)
        else:
            out = self._one_by_one(whole, weights, experts)
        if self.shared_up is not None and self.shared_down is not None:
            shared = self.shared_down(self.shared_up(x, gate=self.activation), partial=True)
            if self.shared_scale is not None:
                shared = shared * F.linear(whole, self.shared_scale).sigmoid()
            out = out + shared
        return leave_tp(out, self.state)

    def _has_groups(self, x: Tensor) -> bool:
        """Whether torch has a product of tokens sorted by expert that asks the host nothing: bfloat16 on Hopper and
        data-centre Blackwell, in rows of 16 bytes."""
        if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm") or not self.num_local:
            return False
        if any("order" in self._tensors(name) for name in self._formats):
            return False
        aligned = self.inner % 8 == 0 and x.shape[1] % 8 == 0
        return aligned and torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))

    def _by_groups(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Each expert on its own tokens, in one product over all; nothing waits for the host."""
        top_k = experts.shape[1]
        local = (experts - self.first).flatten()
        if self.num_local < self.num_experts:  # assignments to other ranks' experts come last
            local = torch.where((local >= 0) & (local < self.num_local), local, self.num_local)
        order = local.argsort(stable=True)
        sorted_local = local[order]
        ends = torch.searchsorted(sorted_local, torch.arange(self.num_local, device=x.device), right=True)
        scales = weights.flatten()[order, None]
        rows = x[order // top_k]
        mine = (sorted_local < self.num_local)[:, None] if self.num_local < self.num_experts else None
        if self.choice.weighs_input:
            rows = rows * scales
        if mine is not None:  # rows of other ranks: their undefined gradients end here
            rows = torch.where(mine, rows, 0)
        hidden = self._gate(self._grouped("up", rows, ends, sorted_local, mine))
        out = self._grouped("down", hidden, ends, sorted_local, mine)
        if not self.choice.weighs_input:
            out = out * scales
        mixed: Tensor = out[order.argsort()].unflatten(0, (-1, top_k)).sum(1)
        return mixed

    def _everywhere(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every token."""
        out = torch.zeros_like(x)
        for local in range(self.num_local):
            chosen = experts == self.first + local
            made = self._weighted(local, x, (weights * chosen).sum(-1, keepdim=True))
            out = out + (torch.where(chosen.any(-1, keepdim=True), made, 0) if self.choice.weighs_input else made)
        return out

    def _one_by_one(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Each expert on its own tokens; the host waits to learn which these are."""
        out = torch.zeros_like(x)
        for local in range(self.num_local):
            token, slot = torch.where(experts == self.first + local)
            # In training also for no token: every rank's backward pass must reach the same parameters and sums.
            if token.numel() or torch.is_grad_enabled():
                out = out.index_add(0, token, self._weighted(local, x[token], weights[token, slot, None]))
        return out

    def _weighted(self, local: int, x: Tensor, scale: Tensor) -> Tensor:
        """One expert on x [N, dim], with the weights `scale` [N, 1] on its inputs or its outputs."""
        return self._expert(local, x * scale) if self.choice.weighs_input else self._expert(local, x) * scale

    def _grouped(self, name: str, x: Tensor, ends: Tensor, expert: Tensor, mine: Tensor | None) -> Tensor:
        """x [N, K] times the matrices [E, M, K] of `up` or `down` -> [N, M]; row n is expert[n]'s, those of e end at
        ends[e]. Rows that are not `mine` [N, 1] come after the last end, and are zero."""
        format, bias, tensors = self._formats[name], self._parameters.get(f"{name}_bias"), self._tensors(name)
        if isinstance(format, Coded) and not self.turned and x.shape[0] <= CODED_ROWS:
            return format.of_experts(x, tensors, bias, expert if mine is None else torch.where(mine[:, 0], expert, -1))
        matrix = format.matrix({part: tensor.flatten(0, 1) for part, tensor in tensors.items()})
        matrix = matrix.view(self.num_local, -1, matrix.shape[1])
        product: Tensor = torch._grouped_mm(x, matrix if self.turned else matrix.mT, offs=ends.to(torch.int32))
        if bias is not None:
            product = product + bias[expert.clamp(max=self.num_local - 1)]
        return product if mine is None else torch.where(mine, product, 0)

    def _expert(self, local: int, x: Tensor) -> Tensor:
        """The gated MLP of one of this rank's experts: [T, dim] -> [T, dim]."""
        if self.up_bias is None and self.clamped is None and not self.turned:
            hidden = self._formats["up"].product(x, self._stored("up", local), gate=self.activation)
            return self._formats["down"].product(hidden, self._stored("down", local))
        hidden = self._gate(self._linear("up", self.up_bias, local, x))
        return self._linear("down", self.down_bias, local, hidden)

    def _linear(self, name: str, bias: Tensor | None, local: int, x: Tensor) -> Tensor:
        format, stored = self._formats[name], self._stored(name, local)
        mine = None if bias is None else bias[local]
        return F.linear(x, format.matrix(stored).t(), mine) if self.turned else format.product(x, stored, mine)

    def _gate(self, hidden: Tensor) -> Tensor:
        """[T, 2 I] -> [T, I]."""
        return gated(hidden, self.activation) if self.clamped is None else _clamped(hidden, self.clamped)


def _wanted(scores: Tensor, correction: Tensor | None, choice: Router) -> Tensor:
    """Scores by which experts are chosen, [T, experts]: -inf outside the best groups."""
    wanted: Tensor = scores if correction is None else scores + correction.view(-1)
    if choice.groups == 1:
        return wanted
    grouped = wanted.unflatten(-1, (choice.groups, -1))
    by_group = grouped.amax(-1) if choice.group_score == "best" else grouped.topk(2, dim=-1).values.sum(-1)
    best = torch.zeros_like(by_group, dtype=torch.bool).scatter_(-1, by_group.topk(choice.top_groups).indices, True)
    wanted = grouped.masked_fill(~best[..., None], -torch.inf).flatten(-2)
    return wanted


def _clamped(hidden: Tensor, gate: ClampedGate) -> Tensor:
    passed, up = hidden[..., ::2].clamp(max=gate.limit), hidden[..., 1::2].clamp(-gate.limit, gate.limit)
    return (up + 1) * passed * torch.sigmoid(gate.alpha * passed)
