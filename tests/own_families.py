"""A model family of one's own, as a module that `model.family_module` names: layers of all kinds, and of its own one.

Importing it registers the family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalite.core.layout import Even
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.model import families
from megalite.model.config import Rope
from megalite.model.family_names import (
    DEEPSEEK_WEIGHTS,
    DELTA_WEIGHTS,
    LLAMA_WEIGHTS,
    MAMBA_WEIGHTS,
    QK_NORM_WEIGHTS,
    SHARED_GATE_WEIGHTS,
)
from megalite.model.family_spec import Family
from megalite.model.kinds.base import Layer, LayerKind, Row, transformer_layer
from megalite.model.kinds.delta import GatedDelta
from megalite.model.kinds.experts import Experts, Router
from megalite.model.kinds.latent import LatentAttention
from megalite.model.kinds.mamba import Mamba2
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.model.layers.base import LayerModule

HIDDEN = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Squared(LayerKind):
    """down(up(x) ** 2), with the width between cut over tp."""

    width: int

    def rows(self, hidden: int) -> list[Row]:
        inner = Even(self.width)
        return [
            Row(weight="square_up", param="up.weight", split=inner, other=(hidden,), linear=True),
            Row(weight="square_down", param="out.weight", split=inner, other=(hidden,), dim=1, linear=True),
        ]

    def parameters(self, hidden: int) -> int:
        return 2 * hidden * self.width

    def module(self, config: Any, layer: int, state: Any) -> LayerModule:
        return SquaredMLP(self, config, state)


class SquaredMLP(LayerModule):
    """The module of `Squared`."""

    def __init__(self, kind: Squared, config: Any, state: Any):
        super().__init__()
        self.up = ColumnParallelLinear(config.hidden_size, [Even(kind.width)], state, bias=False)
        self.out = RowParallelLinear(Even(kind.width), config.hidden_size, state, bias=False)

    def forward(self, x: Any, ctx: Any, rotations: Any) -> Any:
        return self.up(x).square()


def layers(family: Family, config: Any, switches: Any) -> tuple[Layer, ...]:
    """One layer of each kind of mixer, before MLPs of several kinds."""
    rope = Rope(rotary_dim=4, theta=100.0)
    router = Router(top_k=2, score="sigmoid", normalize=True, correction=True, scale=1.5)
    experts = Experts(num_experts=6, router=router, intermediate_size=20, shared_size=12, shared_gate=True)
    squared = Squared(width=30)
    delta = GatedDelta(key_heads=2, value_heads=4, key_dim=8, value_dim=6, taps=3, fused=False)
    latent = LatentAttention(
        heads=6, rank=20, query_rank=12, plain_dim=8, rope_dim=4, value_dim=10, scale=12**-0.5, rope=rope
    )
    mamba = Mamba2(heads=6, head_dim=16, groups=2, state_dim=8, taps=3, conv_bias=True, bias=False)
    softmax = SoftmaxAttention(
        heads=6, kv_heads=2, head_dim=8, scale=8**-0.5, window=7, rope=rope, qk_norm="width", sinks=True, gated=True
    )
    return (
        transformer_layer(delta, experts),
        transformer_layer(latent, squared),
        transformer_layer(mamba, squared),
        transformer_layer(softmax, experts, parallel="two_norms", scale=0.7),
    )


if "own" not in families.FAMILIES:
    families.register(
        "own",
        Family(
            architecture="OwnForCausalLM",
            weights={
                **LLAMA_WEIGHTS,
                **DEEPSEEK_WEIGHTS,
                **DELTA_WEIGHTS,
                **{f"delta_{part}": f"model.layers.{{layer}}.delta.{part}.weight" for part in "qkvzba"},
                **MAMBA_WEIGHTS,
                **QK_NORM_WEIGHTS,
                **SHARED_GATE_WEIGHTS,
                "sinks": "model.layers.{layer}.self_attn.sinks",
                **{name: f"model.layers.{{layer}}.self_attn.{name}_proj.weight" for name in "qkv"},
                "square_up": "model.layers.{layer}.mlp.up.weight",
                "square_down": "model.layers.{layer}.mlp.down.weight",
            },
            layers=layers,
        ),
    )

VALUES = {
    "architectures": ["OwnForCausalLM"],
    "model_type": "own",
    "vocab_size": 103,
    "hidden_size": HIDDEN,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
"""config.json of such a model."""
