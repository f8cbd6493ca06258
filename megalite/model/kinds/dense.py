"""The dense MLP; importable without torch. Its module: `layers.dense`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalite.core.layout import Even, Groups, Split, Whole, width
from megalite.model.config import ActivationName
from megalite.model.kinds.base import LayerKind, Row, projection_back, stacked

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMLP(LayerKind):
    """down(act(gate) * up), or down(act(up)), with the intermediate width cut over tp.

    A gate's activation is one of `core.functional.ACTIVATIONS`. xielu (arXiv 2411.13010) has two learned numbers.
    """

    intermediate_size: int
    activation: ActivationName = "silu"
    gated: bool = True
    bias: bool = False
    unit: int = 1
    """The intermediate width is cut over tp at multiples of this, as the format of the weights demands."""

    @property
    def inner(self) -> Split:
        return Even(self.intermediate_size) if self.unit == 1 else Groups(self.intermediate_size, self.unit)

    def rows(self, hidden: int) -> list[Row]:
        parts = [(name, self.inner) for name in (("gate", "up") if self.gated else ("up",))]
        rows = stacked("up.weight", parts, "up.bias" if self.bias else None, other=(hidden,))
        rows += projection_back("down", "down", self.inner, hidden, bias=self.bias)
        if self.activation == "xielu":
            rows += [Row(weight=name, param=name, split=Whole(1)) for name in ("alpha_p", "alpha_n")]
        return rows

    def parameters(self, hidden: int) -> int:
        return (3 if self.gated else 2) * hidden * self.intermediate_size

    def widest(self, tp: int, tp_rank: int) -> int:
        copies = (2, 1) if self.gated else (1, 1)  # what the weight makes, and what the activation makes of that
        return width(self.inner, tp, tp_rank) * (sum(copies) + copies[0] * self.bias)  # codes add it to a copy

    def kept(self, tp: int, tp_rank: int) -> int:
        return (3 if self.gated else 2) * width(self.inner, tp, tp_rank)

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.dense import MLP

        return MLP(self, config, layer, state)
