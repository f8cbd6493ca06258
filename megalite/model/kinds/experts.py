"""A mixture of experts in place of the MLP; importable without torch. Its module: `layers.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalite.core.layout import Even, Whole
from megalite.model.config import ActivationName
from megalite.model.kinds.base import LayerKind, Place, Row

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts(LayerKind):
    """Gated MLPs of which a router chooses a few for each token; each tp rank holds whole experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Hidden width of one expert."""
    activation: ActivationName = "silu"
    normalize_top_k: bool
    """Divide the chosen experts' probabilities by their sum."""

    def rows(self, hidden: int) -> list[Row]:
        inner = self.intermediate_size
        rows = [
            Row(weight="router", param="router", split=Whole(self.num_experts), other=(hidden,), linear=True),
        ]
        for index in range(self.num_experts):
            up = Place(Even(self.num_experts, 2 * inner), index, 2 * inner)
            down = Place(Even(self.num_experts, hidden), index, hidden)
            for name, before in (("expert_gate", ()), ("expert_up", (Whole(inner),))):
                rows.append(
                    Row(
                        weight=name,
                        param="up",
                        split=Whole(inner),
                        other=(hidden,),
                        before=before,
                        linear=True,
                        expert=index,
                        place=up,
                    )
                )
            rows.append(
                Row(
                    weight="expert_down",
                    param="down",
                    split=Whole(hidden),
                    other=(inner,),
                    linear=True,
                    expert=index,
                    place=down,
                )
            )
        return rows

    def _parameters(self, hidden: int, experts: int) -> int:
        return experts * 3 * hidden * self.intermediate_size + self.num_experts * hidden

    def parameters(self, hidden: int) -> int:
        return self._parameters(hidden, self.num_experts)

    def active_parameters(self, hidden: int) -> int:
        return self._parameters(hidden, self.top_k)

    def widest(self, tp: int, tp_rank: int) -> int:
        return 4 * self.intermediate_size

    def kept(self, tp: int, tp_rank: int) -> int:
        return 3 * self.top_k * self.intermediate_size

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.experts import MixtureOfExperts

        formats = config.format(layer, "expert_up"), config.format(layer, "expert_down")
        return MixtureOfExperts(self, config.hidden_size, state, formats)
