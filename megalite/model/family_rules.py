"""Windows, rotary embeddings, scales and mixers of layers by a config.json: the rules among which families choose.

Importable without torch. Those of experts are in family_experts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from megalite.model.config import Rope
from megalite.model.family_experts import ACTIVATIONS
from megalite.model.hf_config import HFConfig, rope_parameters, rope_values
from megalite.model.kinds.base import LayerKind
from megalite.model.kinds.delta import GatedDelta
from megalite.model.kinds.mamba import Mamba2
from megalite.model.kinds.softmax import QKNorm, SoftmaxAttention

if TYPE_CHECKING:
    from megalite.model.family_spec import Family

Windows = tuple[int | None, ...]
"""Of each layer, the number of positions that it attends; None: all."""
Ropes = tuple[Rope | None, ...]
"""Of each layer, its rotary embedding, if any."""
Mixers = tuple[LayerKind | None, ...]
"""Of each layer, what it has in place of softmax attention, if anything."""
RopeRule = Callable[["Family", HFConfig, int, Windows], Ropes]
WindowRule = Callable[[HFConfig, int], Windows]
ScaleRule = Callable[[HFConfig, int, int], float]
MixerRule = Callable[[HFConfig, int], Mixers]
GrowthRule = Callable[[HFConfig], tuple[float, int, int] | None]
AttentionRule = Callable[[HFConfig, SoftmaxAttention], SoftmaxAttention]
LINEAR_LAYERS = ("linear_attention", "mamba")
"""Names in `layer_types` of layers with something else in place of softmax attention."""


def no_windows(config: HFConfig, layers: int) -> Windows:
    return (None,) * layers


def window_everywhere(config: HFConfig, layers: int) -> Windows:
    return (config.optional_size("sliding_window"),) * layers


def window_if_used(config: HFConfig, layers: int) -> Windows:
    return window_everywhere(config, layers) if config.flag("use_sliding_window") else no_windows(config, layers)


def window_by_layer_types(config: HFConfig, layers: int) -> Windows:
    """By `layer_types`; without them alternating, the first layer windowed."""
    window = config.optional_size("sliding_window")
    kinds = config.raw("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def window_by_pattern(config: HFConfig, layers: int) -> Windows:
    """By `layer_types`; without them on all layers but every `sliding_window_pattern`-th."""
    window = config.optional_size("sliding_window")
    if window is None or config.raw("layer_types"):
        return no_windows(config, layers) if window is None else window_by_layer_types(config, layers)
    step = config.size("sliding_window_pattern")
    return tuple(window if (layer + 1) % step else None for layer in range(layers))


def window_on_lower_layers(config: HFConfig, layers: int) -> Windows:
    """By `layer_types`; without them on every other layer below `max_window_layers`, the first included."""

    def lower() -> list[bool]:
        first = config.size("max_window_layers", low=0)
        return [layer < first and layer % 2 == 0 for layer in range(layers)]

    return _if_used_by_types_or(config, layers, lower)


def window_without_rope(config: HFConfig, layers: int) -> Windows:
    """By `layer_types`; without them on the layers that have no rotary embedding (SmolLM3)."""
    return _if_used_by_types_or(config, layers, lambda: [not has for has in _has_rope(config, layers)])


def window_on_upper_layers(config: HFConfig, layers: int) -> Windows:
    """By `layer_types`; without them on the layers from `max_window_layers` up."""

    def upper() -> list[bool]:
        first = config.size("max_window_layers", low=0)
        return [layer >= first for layer in range(layers)]

    return _if_used_by_types_or(config, layers, upper)


def _if_used_by_types_or(config: HFConfig, layers: int, windowed: Callable[[], list[bool]]) -> Windows:
    """Where `use_sliding_window` says so: by `layer_types`, without them on the layers that are `windowed`."""
    if not config.flag("use_sliding_window"):
        return no_windows(config, layers)
    if config.raw("layer_types"):
        return window_by_layer_types(config, layers)
    window = config.optional_size("sliding_window")
    return tuple(window if one else None for one in windowed())


def attention_everywhere(config: HFConfig, layers: int) -> Mixers:
    return (None,) * layers


def delta_fused(config: HFConfig, layers: int) -> Mixers:
    """Gated delta nets by `layer_types`; without it on all layers but every `full_attention_interval`-th."""
    return _delta(config, layers, fused=True)


def delta_apart(config: HFConfig, layers: int) -> Mixers:
    """As `delta_fused`, with projections that are tensors of their own."""
    return _delta(config, layers, fused=False)


def mamba_by_layer_types(config: HFConfig, layers: int) -> Mixers:
    """Mamba-2 on all layers that `layer_types` does not call attention; without it everywhere."""
    heads, inner = config.size("mamba_n_heads"), config.size("mamba_expand") * config.size("hidden_size")
    head_dim = config.raw("mamba_d_head")
    if head_dim not in (None, "auto", inner // heads) or inner % heads:
        raise config.problem("mamba_n_heads", f"times mamba_d_head must be {inner}, the width of the layer", heads)
    groups = config.size("mamba_n_groups")
    if heads % groups:
        raise config.problem("mamba_n_groups", f"must divide the number of heads ({heads})", groups)
    spec = Mamba2(
        heads=heads,
        head_dim=inner // heads,
        groups=groups,
        state_dim=config.size("mamba_d_state"),
        taps=config.size("mamba_d_conv", low=2),
        conv_bias=config.flag("mamba_conv_bias"),
        bias=config.flag("mamba_proj_bias"),
        step_limit=_step_limit(config),
    )
    if config.choice("hidden_act", ACTIVATIONS) != "silu":
        raise config.problem("hidden_act", "must be silu for this family", config.raw("hidden_act"))
    types = config.raw("layer_types") or ["mamba"] * layers
    return tuple(spec if kind in LINEAR_LAYERS else None for kind in types)


def _step_limit(config: HFConfig) -> tuple[float, float]:
    given = config.raw("time_step_limit")
    if given is None:
        return 0.0, math.inf
    limits = [math.inf if one == {"__float__": "Infinity"} else one for one in given] if isinstance(given, list) else []
    if len(limits) != 2 or not all(type(one) in (int, float) for one in limits) or not 0 <= limits[0] < limits[1]:
        raise config.problem(
            "time_step_limit", "must be two numbers, the first at least 0 and the second above it", given
        )
    return float(limits[0]), float(limits[1])


def _delta(config: HFConfig, layers: int, *, fused: bool) -> Mixers:
    key_heads, value_heads = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    if value_heads % key_heads:
        raise config.problem(
            "linear_num_value_heads", f"must be a multiple of the key heads ({key_heads})", value_heads
        )
    if config.choice("hidden_act", ACTIVATIONS) != "silu":
        raise config.problem("hidden_act", "must be silu for this family", config.raw("hidden_act"))
    spec = GatedDelta(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=config.size("linear_key_head_dim"),
        value_dim=config.size("linear_value_head_dim"),
        taps=config.size("linear_conv_kernel_dim", low=2),
        fused=fused,
    )
    step = config.size("full_attention_interval")
    types = config.raw("layer_types") or ["linear_attention" if (i + 1) % step else "" for i in range(layers)]
    return tuple(spec if kind in LINEAR_LAYERS else None for kind in types)


def same_rope(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    return (family.rope(config, head_dim),) * len(windows)


def no_rope(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    return (None,) * len(windows)


def rope_by_layer_kind(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    """Windows have a rotary embedding of their own."""
    full = family.rope(config, head_dim, rope_parameters(config, "full_attention"))
    sliding = family.rope(config, head_dim, rope_parameters(config, "sliding_attention"))
    return tuple(full if window is None else sliding for window in windows)


def rope_on_windows(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    """Full attention has none, unless all layers have full attention."""
    rope = family.rope(config, head_dim)
    without = any(window is not None for window in windows) or family.rope_only_on_windows
    return tuple(None if window is None and without else rope for window in windows)


def rope_by_list(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    """`no_rope_layers` has 0 for a layer without; absent, every `no_rope_layer_interval`-th has none."""
    rope = family.rope(config, head_dim)
    return tuple(rope if has else None for has in _has_rope(config, len(windows)))


def _has_rope(config: HFConfig, layers: int) -> list[int]:
    listed = config.raw("no_rope_layers")
    if not listed:
        step = config.size("no_rope_layer_interval")
        return [int((layer + 1) % step != 0) for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers or any(one not in (0, 1) for one in listed):
        raise config.problem("no_rope_layers", f"must be a list of {layers} entries, 0 or 1", listed)
    return listed


def rope_if_stated(family: Family, config: HFConfig, head_dim: int, windows: Windows) -> Ropes:
    """Where `position_embedding_type` is rope."""
    kind = config.raw("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        raise config.problem("position_embedding_type", "must be rope, nope or null", kind)
    return (same_rope if kind == "rope" else no_rope)(family, config, head_dim, windows)


def scale_by_head_dim(config: HFConfig, head_dim: int, layer: int) -> float:
    return float(head_dim**-0.5)


def scale_by_scalar(config: HFConfig, head_dim: int, layer: int) -> float:
    return float(config.number("query_pre_attn_scalar") ** -0.5)


def scale_by_multiplier(config: HFConfig, head_dim: int, layer: int) -> float:
    return config.number("attention_multiplier")


def gpt2_scale(config: HFConfig, head_dim: int, layer: int) -> float:
    scale = scale_by_head_dim(config, head_dim, layer) if config.flag("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.flag("scale_attn_by_inverse_layer_idx") else scale


def no_growth(config: HFConfig) -> tuple[float, int, int] | None:
    return None


def growth_by_rope(config: HFConfig) -> tuple[float, int, int] | None:
    """`llama_4_scaling_beta` and the original length, both beside the rotary embedding's."""
    _, given = rope_values(config)
    inner = HFConfig(config.path, given if isinstance(given, dict) else {})
    if inner.raw("llama_4_scaling_beta") is None:
        return None
    return inner.number("llama_4_scaling_beta"), inner.size("original_max_position_embeddings"), 0


def as_it_is(config: HFConfig, attention: SoftmaxAttention) -> SoftmaxAttention:
    return attention


def chunked_with_rope(config: HFConfig, attention: SoftmaxAttention) -> SoftmaxAttention:
    """Layers with a rotary embedding attend in chunks, the others have growing queries (Llama 4)."""
    if attention.rope is not None:
        norm: QKNorm | None = "length_after_rope" if config.flag("use_qk_norm") else None
        return replace(attention, chunk=config.optional_size("attention_chunk_size"), qk_norm=norm)
    if not config.raw("attn_temperature_tuning"):  # true, or in older files a number
        return attention
    return replace(attention, query_growth=(config.number("attn_scale"), config.size("floor_scale"), 1))
