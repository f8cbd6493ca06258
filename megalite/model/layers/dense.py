"""The module of the dense MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.functional import PLAIN_ACTIVATIONS
from megalite.core.layers import Residual, replicated
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import XIELU_BETA, XIELU_EPS, ModelConfig
from megalite.model.kinds.dense import DenseMLP
from megalite.model.layers.base import LayerModule, Norms
from megalite.model.rope import Rotation


class MLP(LayerModule):
    """down(act(gate) * up), or down(act(up)), with the intermediate width cut over tp."""

    def __init__(self, kind: DenseMLP, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.gated = kind.gated
        self.activation = kind.activation
        splits = (kind.inner, kind.inner) if self.gated else (kind.inner,)
        up, down = config.format(layer, "up"), config.format(layer, "down")
        self.up = ColumnParallelLinear(config.hidden_size, splits, state, bias=kind.bias, format=up)
        self.down = RowParallelLinear(kind.inner, config.hidden_size, state, bias=kind.bias, format=down)
        self.plain: Callable[[Tensor], Tensor]
        """The activation of an MLP without a gate."""
        if kind.activation == "xielu":
            self.alpha_p = replicated((1,), partial_gradient=state.tp.size > 1)
            self.alpha_n = replicated((1,), partial_gradient=state.tp.size > 1)
            self.plain = self._xielu
        elif not self.gated:
            self.plain = PLAIN_ACTIVATIONS[kind.activation]

    def update(self, x: Residual, norms: Norms, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        if self.gated:
            hidden = self.up.read(x, norms.before, gate=self.activation)
        else:
            hidden = self.plain(self.up.read(x, norms.before))
        self.down.write(x, hidden, norms.after)

    def _xielu(self, x: Tensor) -> Tensor:
        """An integral of ELU with a learned slope on either side of zero (arXiv 2411.13010)."""
        positive, negative = F.softplus(self.alpha_p), XIELU_BETA + F.softplus(self.alpha_n)
        below = negative * (torch.expm1(x.clamp(max=XIELU_EPS)) - x)
        return torch.where(x > 0, positive * x * x, below) + XIELU_BETA * x
