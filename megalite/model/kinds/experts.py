"""A mixture of experts in place of the MLP; importable without torch. Its module: `layers.experts`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalite.core.layout import Even, Groups, Split, Whole, width
from megalite.model.config import ActivationName
from megalite.model.kinds.base import LayerKind, Place, Row, projection_back, stacked

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """How experts are chosen for a token, and what their outputs are multiplied by.

    Scores are those of a linear map of the token. The experts with the highest are chosen, and their scores are their
    weights.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool
    """Divide the weights by their sum."""
    least_sum: float = 0.0
    """The least number that `normalize` divides by."""
    scale: float = 1.0
    """Multiplies the weights."""
    bias: bool = False
    """The linear map has a bias."""
    correction: bool = False
    """Experts are chosen by their scores and a vector added to them, which balances their load (arXiv 2408.15664)."""
    groups: int = 1
    """Experts are divided into this many groups of neighbours (arXiv 2405.04434)."""
    top_groups: int = 1
    """Experts are chosen in this many groups, those with the highest scores."""
    group_score: Literal["best", "two_best"] = "best"
    """A group's score is that of its best expert, or the sum of its two best."""
    weighs_input: bool = False
    """The weights multiply the inputs of experts, not their outputs (Llama 4)."""
    precise: bool = False
    """The linear map is computed in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedGate:
    """(up + 1) * gate * sigmoid(alpha * gate) of clamped gate and up, whose rows alternate (gpt-oss)."""

    alpha: float
    limit: float
    """gate is at most this, up at most this far from zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts(LayerKind):
    """Gated MLPs of which a router chooses a few for each token; each tp rank holds whole experts.

    A shared expert is a gated MLP that every token goes through, cut over tp along its width.
    """

    num_experts: int
    router: Router
    intermediate_size: int
    """Hidden width of one expert."""
    activation: ActivationName = "silu"
    clamped: ClampedGate | None = None
    """Used in place of the activation and its gate."""
    stored: Literal["apart", "stacked", "stacked_turned"] = "apart"
    """In a checkpoint: each expert's matrices are tensors, or all experts' are one, [experts, out, in] or turned."""
    biases: bool = False
    """Experts' matrices have biases."""
    shared_size: int = 0
    """Hidden width of the shared expert; 0: there is none."""
    shared_unit: int = 1
    """See `DenseMLP.unit`; of the shared expert."""
    shared_gate: bool = False
    """Its output is multiplied by the sigmoid of a linear map of the token."""
    correction_is_row: bool = False
    """The router's correction is a matrix of one row in a checkpoint."""

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def turned(self) -> bool:
        """Experts' matrices are [in, out]."""
        return self.stored == "stacked_turned"

    @property
    def shared_inner(self) -> Split:
        return Even(self.shared_size) if self.shared_unit == 1 else Groups(self.shared_size, self.shared_unit)

    def rows(self, hidden: int) -> list[Row]:
        experts = Whole(self.num_experts)
        rows = [Row(weight="router", param="router", split=experts, other=(hidden,), linear=True)]
        if self.router.bias:
            rows.append(Row(weight="router_bias", param="router_bias", split=experts))
        if self.router.correction:
            stored = (1, self.num_experts) if self.correction_is_row else ()
            rows.append(Row(weight="router_correction", param="correction", split=experts, stored=stored))
        rows += self._apart(hidden) if self.stored == "apart" else self._stacked(hidden)
        if self.biases:
            for name, size in (("experts_up", 2 * self.intermediate_size), ("experts_down", hidden)):
                param = f"{name.removeprefix('experts_')}_bias"
                rows.append(Row(weight=f"{name}_bias", param=param, split=Even(self.num_experts), other=(size,)))
        return rows + list(self._shared(hidden))

    def _apart(self, hidden: int) -> Iterator[Row]:
        inner = self.intermediate_size
        for index in range(self.num_experts):
            up = Place(Even(self.num_experts, 2 * inner), index, 2 * inner)
            down = Place(Even(self.num_experts, hidden), index, hidden)
            parts = ("expert_gate", Whole(inner)), ("expert_up", Whole(inner))
            yield from stacked("up", parts, other=(hidden,), expert=index, place=up)
            yield from stacked("down", [("expert_down", Whole(hidden))], other=(inner,), expert=index, place=down)

    def _stacked(self, hidden: int) -> Iterator[Row]:
        """The rows of every expert's matrices as stored; `up` holds gate and up."""
        for name, rows, columns in (
            ("up", 2 * self.intermediate_size, hidden),
            ("down", hidden, self.intermediate_size),
        ):
            rows, columns = (columns, rows) if self.turned else (rows, columns)
            for index in range(self.num_experts):
                yield Row(
                    weight=f"experts_{name}",
                    param=name,
                    split=Whole(rows),
                    other=(columns,),
                    stored=(self.num_experts, rows, columns),
                    expert=index,
                    place=Place(Even(self.num_experts, rows), index, rows),
                )

    def _shared(self, hidden: int) -> Iterator[Row]:
        inner = self.shared_inner
        if not self.shared_size:
            return
        yield from stacked("shared_up.weight", (("shared_gate", inner), ("shared_up", inner)), other=(hidden,))
        yield from projection_back("shared_down", "shared_down", inner, hidden)
        if self.shared_gate:
            yield Row(weight="shared_scale", param="shared_scale", split=Whole(1), other=(hidden,))

    def _parameters(self, hidden: int, experts: int) -> int:
        inner = experts * self.intermediate_size + self.shared_size
        return 3 * inner * hidden + (self.num_experts + self.shared_gate) * hidden

    def parameters(self, hidden: int) -> int:
        return self._parameters(hidden, self.num_experts)

    def active_parameters(self, hidden: int) -> int:
        return self._parameters(hidden, self.top_k)

    def widest(self, tp: int, tp_rank: int) -> int:
        return 4 * (self.intermediate_size + width(self.shared_inner, tp, tp_rank))

    def kept(self, tp: int, tp_rank: int) -> int:
        return 3 * (self.top_k * self.intermediate_size + width(self.shared_inner, tp, tp_rank))

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.experts import MixtureOfExperts

        one = "expert" if self.stored == "apart" else "experts"
        formats = config.format(layer, f"{one}_up"), config.format(layer, f"{one}_down")
        shared = config.format(layer, "shared_up"), config.format(layer, "shared_down")
        return MixtureOfExperts(self, config.hidden_size, state, formats, shared)
