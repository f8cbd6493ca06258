"""The module of the dense MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from megalite.core.functional import ACTIVATIONS
from megalite.core.layers import Residual
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig
from megalite.model.kinds.dense import DenseMLP
from megalite.model.layers.base import LayerModule
from megalite.model.rope import Rotation


class MLP(LayerModule):
    """down(act(gate) * up), or down(act(up)), with the intermediate width cut over tp."""

    def __init__(self, kind: DenseMLP, config: ModelConfig, state: ParallelState):
        super().__init__()
        self.gated = kind.gated
        self.activation = kind.activation
        splits = (kind.inner, kind.inner) if self.gated else (kind.inner,)
        self.up = ColumnParallelLinear(config.hidden_size, splits, state, bias=kind.bias)
        self.down = RowParallelLinear(kind.inner, config.hidden_size, state, bias=kind.bias)

    def update(
        self,
        x: Residual,
        norm: nn.Module | None,
        post: Callable[[Tensor], Tensor] | None,
        ctx: AttentionContext,
        rotations: Sequence[Rotation],
    ) -> None:
        if self.gated:
            hidden = self.up.read(x, norm, gate=self.activation)
        else:
            hidden = ACTIVATIONS[self.activation](self.up.read(x, norm))
        self.down.write(x, hidden, post)
