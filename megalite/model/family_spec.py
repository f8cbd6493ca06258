"""What a model family is made of (`Family`), and what follows from it; importable without torch.

`model_config` makes a `ModelConfig` of a family's config.json, `names_of` the names of its tensors in a checkpoint. The
families themselves are in families.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.model.config import AttentionSpec, ModelConfig, MoESpec
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import REQUIRED, HFConfig, longest_sequence, read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
MAX_EXPERTS = 1 << 18
"""Most experts of all layers together: each has tensors of its own, which are listed before any is looked for."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a weight lies in a checkpoint."""

    hf: str
    """Tensor name with `{layer}` and `{expert}` to be filled in."""
    start: int = 0
    """First element along the output dimension that belongs to this weight; not 0 only in fused tensors."""
    transpose: bool = False
    """Stored [in, out] instead of [out, in]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """The names of a model's tensors in a checkpoint."""

    prefix: str
    """What every name but the head's begins with; checkpoints of the bare model leave it out."""
    ignored: tuple[str, ...]
    """Anchored patterns of tensors that may be in a checkpoint and are not weights of the model."""
    tied_head: str | None
    """What the head would be called, where it is the embedding."""
    tensors: Mapping[str, TensorRef | None]
    """Every weight of `_weights_of` -> its tensor; None: this model has none such. Linear weights are [out, in]."""

    @property
    def embedding(self) -> str:
        """Tensor name of the embedding."""
        ref = self.tensors["embed"]
        assert ref is not None
        return ref.hf


WindowRule = Callable[[HFConfig, int], tuple[int | None, ...]]
MoERule = Callable[[HFConfig, int], tuple[MoESpec | None, ...]]
ScaleRule = Callable[[HFConfig, int, int], float]


def no_windows(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def window_everywhere(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    return (config.optional_size("sliding_window"),) * layers


def window_if_used(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    return window_everywhere(config, layers) if config.flag("use_sliding_window") else no_windows(config, layers)


def window_by_layer_types(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    """By `layer_types`; without them alternating, the first layer windowed."""
    window = config.optional_size("sliding_window")
    kinds = config.raw("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def window_on_upper_layers(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    """By `layer_types`; without them on the layers from `max_window_layers` up."""
    if not config.flag("use_sliding_window"):
        return no_windows(config, layers)
    if config.raw("layer_types"):
        return window_by_layer_types(config, layers)
    window, first = config.optional_size("sliding_window"), config.size("max_window_layers", low=0)
    return tuple(window if layer >= first else None for layer in range(layers))


def dense(config: HFConfig, layers: int) -> tuple[MoESpec | None, ...]:
    return (None,) * layers


def experts_everywhere(config: HFConfig, layers: int) -> tuple[MoESpec | None, ...]:
    return (_experts(config, layers, "intermediate_size", normalize=True),) * layers


def experts_by_step(config: HFConfig, layers: int) -> tuple[MoESpec | None, ...]:
    """Every `decoder_sparse_step`-th layer, `mlp_only_layers` excepted."""
    if config.size("num_experts", low=0) == 0:
        return dense(config, layers)
    spec = _experts(config, layers, "moe_intermediate_size", normalize=config.flag("norm_topk_prob"))
    step, dense_layers = config.size("decoder_sparse_step"), config.indices("mlp_only_layers", layers)
    return tuple(spec if (i + 1) % step == 0 and i not in dense_layers else None for i in range(layers))


def _experts(config: HFConfig, layers: int, width: str, *, normalize: bool) -> MoESpec:
    experts, top_k = config.size("num_experts"), config.size("num_experts_per_tok")
    if top_k > experts:
        raise config.problem("num_experts_per_tok", f"must be at most the number of experts ({experts})", top_k)
    if experts * layers > MAX_EXPERTS:
        raise config.problem("num_experts", f"of {layers} layers must be at most {MAX_EXPERTS} together", experts)
    return MoESpec(num_experts=experts, top_k=top_k, intermediate_size=config.size(width), normalize_top_k=normalize)


def scale_by_head_dim(config: HFConfig, head_dim: int, layer: int) -> float:
    return float(head_dim**-0.5)


def scale_by_scalar(config: HFConfig, head_dim: int, layer: int) -> float:
    return float(config.number("query_pre_attn_scalar") ** -0.5)


def gpt2_scale(config: HFConfig, head_dim: int, layer: int) -> float:
    scale = scale_by_head_dim(config, head_dim, layer) if config.flag("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.flag("scale_attn_by_inverse_layer_idx") else scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model architecture: its keys in config.json, its choices and its tensor names.

    A field's default is what Llama does.
    """

    architecture: str
    """The class name in config.json's `architectures`."""
    weights: Mapping[str, str]
    """Weight (see `_weights_of`) -> tensor name. Biases are not listed: they are named as the weight, with `.bias`.
    Where q, k, v (or gate, up) have one name, the tensor is fused in that order."""
    prefix: str = "model."
    """See WeightNames."""
    ignored: tuple[str, ...] = ()
    """See WeightNames; besides those that any family may have."""
    transposed: bool = False
    """Linear weights are stored [in, out]."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names in config.json, where they differ from Llama's."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What an absent key means, as in transformers."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """`ModelConfig` fields that are the same in every checkpoint."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """`ModelConfig` field -> boolean key in config.json."""
    scaled_embedding: bool = False
    """Multiply the embedding by sqrt(hidden_size)."""
    softcaps: bool = False
    """Reads `attn_logit_softcapping` and `final_logit_softcapping`."""
    wide_mlp_by_default: bool = False
    """An absent intermediate size means four times the hidden size."""
    rotary: bool = True
    """Has rotary embeddings."""
    partial_rotary: bool = False
    """Reads `partial_rotary_factor`."""
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """The family's own names for rope scalings."""
    windows: WindowRule = no_windows
    moe: MoERule = dense
    scale: ScaleRule = scale_by_head_dim


COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
COMMON_KEYS = {"norm_eps": ("rms_norm_eps",)}
COMMON_IGNORED = (r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", r"^model\.rotary_emb\.inv_freq$")
"""Tables that older transformers saved along with the weights."""

LINEAR = ("q", "k", "v", "attn_out", "gate", "up", "down", "router", "expert_gate", "expert_up", "expert_down")
FUSED = (("q", "k", "v"), ("gate", "up"), ("expert_gate", "expert_up"))
"""Weights that a checkpoint may hold in one tensor, in this order."""


def hf_config(family: Family, path: Path, values: Mapping[str, object]) -> HFConfig:
    """The values of a config.json under this family's names and defaults."""
    return HFConfig(path, values, {**COMMON_KEYS, **family.keys}, {**COMMON_DEFAULTS, **family.defaults})


def model_config(name: str, family: Family, config: HFConfig, generation: GenerationConfig) -> ModelConfig:
    """The model of a config.json; CheckpointError if it contradicts itself or asks for what is not supported.

    End-of-sequence ids beyond the vocabulary are left out: they can't be generated.
    """
    config.refuse_unsupported()
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers, vocab = config.size("num_hidden_layers"), config.size("vocab_size")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.problem("num_key_value_heads", f"must divide num_attention_heads ({heads})", kv_heads)
    head_dim = config.optional_size("head_dim")
    if head_dim is None and hidden % heads:
        raise config.problem("hidden_size", f"must be a multiple of num_attention_heads ({heads})", hidden)
    head_dim = head_dim or hidden // heads
    rope = None
    if family.rotary:
        rope = read_rope(config, head_dim, partial=family.partial_rotary, kinds=family.rope_kinds)
    begin = config.token_ids("bos_token_id") or generation.token_ids("bos_token_id") or ()
    aux_loss = config.optional_number("router_aux_loss_coef", or_zero=True) if family.moe is not dense else None
    choices = {**family.fixed, **{name: config.flag(key) for name, key in family.flags.items()}}
    return ModelConfig(
        family=name,
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("intermediate_size", 4 * hidden if family.wide_mlp_by_default else REQUIRED),
        max_position_embeddings=longest_sequence(rope, config.size("max_position_embeddings")),
        attention=_attention(family, config, head_dim, layers),
        moe=family.moe(config, layers),
        tie_embeddings=config.flag("tie_word_embeddings"),
        norm_eps=config.number("norm_eps"),
        activation=config.choice("hidden_act", ACTIVATIONS),
        rope=rope,
        embedding_scale=hidden**0.5 if family.scaled_embedding else None,
        final_softcap=config.optional_number("final_logit_softcapping") if family.softcaps else None,
        router_aux_loss_coef=aux_loss or 0.0,
        dtype=config.dtype(),
        bos_token_id=next((token for token in begin if token < vocab), None),
        eos_token_ids=tuple(token for token in generation.eos_token_ids if token < vocab),
        **choices,
    )


def _attention(family: Family, config: HFConfig, head_dim: int, layers: int) -> tuple[AttentionSpec, ...]:
    kinds = config.raw("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise config.problem("layer_types", f"must be a list of {layers} entries, one a layer", kinds)
    windows = family.windows(config, layers)
    for layer, kind in enumerate(kinds or ()):
        if kind != ("full_attention" if windows[layer] is None else "sliding_attention"):
            at = f"{layer} must say how this family attends there, with window {windows[layer]}"
            raise config.problem("layer_types", f"of layer {at}", kind)
    softcap = config.optional_number("attn_logit_softcapping") if family.softcaps else None
    return tuple(
        AttentionSpec(layer=layer, scale=family.scale(config, head_dim, layer), window=windows[layer], softcap=softcap)
        for layer in range(layers)
    )


def names_of(name: str, family: Family, config: ModelConfig) -> WeightNames:
    """The tensors that a checkpoint of this model must hold. ConfigError if the family does not name one of them."""
    tensors = {weight: _tensor(name, family, config, weight) if has else None for weight, has in _weights_of(config)}
    head = family.weights["lm_head"] if config.tie_embeddings else None
    tied = (f"^{re.escape(head)}$",) if head else ()
    ignored = (*COMMON_IGNORED, *family.ignored, *tied)
    return WeightNames(prefix=family.prefix, ignored=ignored, tied_head=head, tensors=tensors)


def _tensor(name: str, family: Family, config: ModelConfig, weight: str) -> TensorRef:
    base = weight.removesuffix("_bias")
    hf = family.weights.get(base)
    if hf is None:
        raise ConfigError(Problem(key=f"family {name}", rule=f"has no tensor name for {base!r}"))
    start = _start(family, config, base)
    if weight != base:
        return TensorRef(hf.removesuffix(".weight") + ".bias", start)
    return TensorRef(hf, start, transpose=family.transposed and base in LINEAR)


def _weights_of(config: ModelConfig) -> list[tuple[str, bool]]:
    """Every weight that a decoder may have, and whether this one has it.

    Dense layers have `gate`, `up` and `down`, those with experts `router` and `expert_*`.
    """
    has_dense, has_experts = None in config.moe, any(config.moe)
    biased_mlp = config.mlp_bias and has_dense
    groups = {
        ("embed", "final_norm", "attn_norm", "q", "k", "v", "attn_out", "mlp_norm"): True,
        ("lm_head",): not config.tie_embeddings,
        ("positions",): config.learned_positions,
        ("final_norm_bias", "attn_norm_bias", "mlp_norm_bias"): config.norm == "layer",
        ("q_bias", "k_bias", "v_bias"): config.qkv_bias,
        ("attn_out_bias",): config.attention_out_bias,
        ("q_norm", "k_norm"): config.qk_norm,
        ("post_attn_norm", "post_mlp_norm"): config.post_norms,
        ("up", "down"): has_dense,
        ("gate",): has_dense and config.gated_mlp,
        ("up_bias", "down_bias"): biased_mlp,
        ("gate_bias",): biased_mlp and config.gated_mlp,
        ("router", "expert_gate", "expert_up", "expert_down"): has_experts,
    }
    return [(weight, present) for group, present in groups.items() for weight in group]


def _start(family: Family, config: ModelConfig, weight: str) -> int:
    """First output of a weight in its tensor: the outputs of those fused before it."""
    expert_width = max((moe.intermediate_size for moe in config.moe if moe is not None), default=0)
    outputs = {
        "q": config.num_heads * config.head_dim,
        "k": config.num_kv_heads * config.head_dim,
        "gate": config.intermediate_size,
        "expert_gate": expert_width,
    }
    group = next((group for group in FUSED if weight in group), (weight,))
    before = group[: group.index(weight)]
    return sum(outputs[other] for other in before if family.weights.get(other) == family.weights[weight])
