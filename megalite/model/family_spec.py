"""What a model family is made of (`Family`), and what follows from it; importable without torch.

`model_config` makes a `ModelConfig` of a family's config.json. The rules among which families choose are in
family_rules.py and family_experts.py, names of tensors in family_names.py, the families in family_entries.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megalite.model.config import ModelConfig, NormName, Rope
from megalite.model.family_experts import ACTIVATIONS, MoERule, dense
from megalite.model.family_names import LLAMA_WEIGHTS
from megalite.model.family_rules import (
    AttentionRule,
    GrowthRule,
    MixerRule,
    RopeRule,
    ScaleRule,
    WindowRule,
    as_it_is,
    attention_everywhere,
    no_growth,
    no_windows,
    same_rope,
    scale_by_head_dim,
)
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import REQUIRED, HFConfig, longest_sequence, read_rope, rope_values
from megalite.model.kinds.base import Layer, transformer_layer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.latent import LatentAttention
from megalite.model.kinds.softmax import QKNorm, SoftmaxAttention

PLAIN_ACTIVATIONS = {**ACTIVATIONS, "relu": "relu", "relu2": "relu2", "xielu": "xielu"}
"""Activations of MLPs without a gate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """What families choose between, by the names that `Family.fixed` and `Family.flags` use; a default is Llama's."""

    norm: NormName = "rms"
    pre_norms: bool = True
    """Normalise what attention and MLP read."""
    post_norms: bool = False
    """Normalise what attention and MLP add to the residual stream."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    qk_norm: QKNorm | None = None
    parallel: bool = False
    """Attention and MLP read the same stream."""
    parallel_norms: Literal["one_norm", "two_norms"] = "one_norm"
    """Where `parallel`: they read it through one norm, or each through its own."""
    learned_positions: bool = False
    head_bias: bool = False
    fused_by_head: bool = False
    """See `SoftmaxAttention`."""
    sinks: bool = False
    """See `SoftmaxAttention`."""
    gated_attention: bool = False
    """See `SoftmaxAttention`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Multipliers:
    """Keys of config.json with numbers that multiply; an absent key means 1."""

    embedding: str | None = None
    residual: str | None = None
    """Multiplies what attention and MLP add to the residual stream."""
    logits: str | None = None
    logits_divisor: str | None = None

    @staticmethod
    def read(config: HFConfig, key: str | None) -> float:
        return 1.0 if key is None else config.number(key, config.defaults.get(key, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The heads of a model's attention, as its config.json says."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: HFConfig) -> Heads:
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        kv_heads = config.optional_size("num_key_value_heads") or heads
        if heads % kv_heads:
            raise config.problem("num_key_value_heads", f"must divide num_attention_heads ({heads})", kv_heads)
        head_dim = config.optional_size("head_dim")
        if head_dim is None and hidden % heads:
            raise config.problem("hidden_size", f"must be a multiple of num_attention_heads ({heads})", hidden)
        return cls(heads=heads, kv_heads=kv_heads, head_dim=head_dim or hidden // heads)


LayerRule = Callable[["Family", HFConfig, Switches], tuple[Layer, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model architecture: its keys in config.json, its choices and its tensor names.

    A field's default is what Llama does.
    """

    architecture: str
    """The class name in config.json's `architectures`."""
    weights: Mapping[str, str] = field(default_factory=lambda: LLAMA_WEIGHTS)
    """Weight (as the kinds' rows call it) -> tensor name. A bias that is not listed is named as its weight, with
    `.bias`. Weights of one name are fused in one tensor, in the order of the rows. A weight that the model lacks is
    passed over."""
    prefix: str = "model."
    """See WeightNames."""
    constants: Mapping[str, float] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    """See WeightNames. Tensors of `constants` count as ignored."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """See WeightNames."""
    text_model_type: str | None = None
    """Of the text part of a multimodal checkpoint: the `model_type` of the `text_config` that describes it."""
    ignored: tuple[str, ...] = ()
    """See WeightNames; besides those that any family may have."""
    transposed: bool = False
    """Linear weights are stored [in, out]."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names in config.json, where they differ from Llama's."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What an absent key means, as in transformers."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """`Switches` that are the same in every checkpoint."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """`Switches` -> boolean key in config.json."""
    qk_norm_flag: str | None = None
    """Boolean key in config.json without which there is no q/k norm."""
    next_token_layers: bool = False
    """A checkpoint may have layers after the last, which predict further tokens and are left out."""
    scaled_embedding: bool = False
    """Multiply the embedding by sqrt(hidden_size)."""
    softcaps: bool = False
    """Reads `attn_logit_softcapping` and `final_logit_softcapping`."""
    wide_mlp_by_default: bool = False
    """An absent intermediate size means four times the hidden size."""
    multipliers: Multipliers = Multipliers()
    reads: tuple[str, ...] = ()
    """Keys that other families must not have."""
    refused: tuple[str, ...] = ()
    """Keys that must be false."""
    ropes: RopeRule = same_rope
    """Rotary embedding of each layer."""
    rope_only_on_windows: bool = False
    """See `rope_on_windows`."""
    interleaved_rope: bool = False
    """Neighbouring channels are rotated as a pair."""
    partial_rotary: bool = False
    """Reads `partial_rotary_factor`."""
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """The family's own names for rope scalings."""
    windows: WindowRule = no_windows
    moe: MoERule = dense
    mixers: MixerRule = attention_everywhere
    """Which layers have another kind of layer in place of softmax attention."""
    scale: ScaleRule = scale_by_head_dim
    query_growth: GrowthRule = no_growth
    attention: AttentionRule = as_it_is
    """The last changes to a layer's attention."""
    layers: LayerRule = field(default_factory=lambda: transformer_layers)
    """Builds the layers."""

    def rope(self, config: HFConfig, head_dim: int, given: Mapping[str, Any] | None = None) -> Rope:
        """The rotary embedding of config.json, or of `given` in place of its `rope_parameters`."""
        return read_rope(
            config,
            head_dim,
            partial=self.partial_rotary,
            kinds=self.rope_kinds,
            interleaved=self.interleaved_rope,
            given=given,
        )


COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMMON_KEYS = {"norm_eps": ("rms_norm_eps",)}


def hf_config(family: Family, path: Path, values: Mapping[str, object]) -> HFConfig:
    """The values of a config.json under this family's names and defaults."""
    return HFConfig(path, values, {**COMMON_KEYS, **family.keys}, {**COMMON_DEFAULTS, **family.defaults})


OF_WRAPPER = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "compression_config")
"""Keys of a multimodal config.json that override those of its text part."""


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config.json's text part, or all where it has none; token ids may stand on either level."""
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return values
    given = {key: values[key] for key in (*OF_WRAPPER, *TOKEN_IDS) if values.get(key) is not None}
    ids = {key: inner[key] for key in TOKEN_IDS if inner.get(key) is not None}
    return {**inner, **given, **ids}


def model_config(name: str, family: Family, config: HFConfig, generation: GenerationConfig) -> ModelConfig:
    """The model of a config.json; CheckpointError if it contradicts itself or asks for what is not supported.

    End-of-sequence ids beyond the vocabulary are left out: they can't be generated.
    """
    next_layers = ("num_nextn_predict_layers",) if family.next_token_layers else ()
    config.refuse_unsupported((*family.reads, *next_layers), family.refused)
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    switches = Switches(**{**family.fixed, **{name: config.flag(key) for name, key in family.flags.items()}})
    if family.qk_norm_flag is not None and not config.flag(family.qk_norm_flag):
        switches = replace(switches, qk_norm=None)
    layers = family.layers(family, config, switches)
    multipliers = family.multipliers
    embedding_scale = Multipliers.read(config, multipliers.embedding)
    logit_scale = Multipliers.read(config, multipliers.logits) / Multipliers.read(config, multipliers.logits_divisor)
    ropes = {kind.rope for layer in layers for kind in layer.kinds}
    begin = config.token_ids("bos_token_id") or generation.token_ids("bos_token_id") or ()
    aux_loss = config.optional_number("router_aux_loss_coef", or_zero=True) if family.moe is not dense else None
    return ModelConfig(
        family=name,
        vocab_size=vocab,
        hidden_size=hidden,
        max_position_embeddings=longest_sequence(ropes, config.size("max_position_embeddings")),
        layers=layers,
        tie_embeddings=config.flag("tie_word_embeddings"),
        norm=switches.norm,
        norm_eps=config.number("norm_eps"),
        learned_positions=switches.learned_positions,
        embedding_scale=hidden**0.5 if family.scaled_embedding else embedding_scale if embedding_scale != 1 else None,
        head_bias=switches.head_bias,
        logit_scale=logit_scale,
        final_softcap=config.optional_number("final_logit_softcapping") if family.softcaps else None,
        router_aux_loss_coef=aux_loss or 0.0,
        dtype=config.dtype(),
        bos_token_id=next((token for token in begin if token < vocab), None),
        eos_token_ids=tuple(token for token in generation.eos_token_ids if token < vocab),
    )


def transformer_layers(family: Family, config: HFConfig, switches: Switches) -> tuple[Layer, ...]:
    """Attention, of softmax if the family has no other, and an MLP or a mixture of experts in every layer."""
    heads, count = Heads.of(config), config.size("num_hidden_layers")
    windows, experts = _windows(family, config, count), family.moe(config, count)
    mixers = family.mixers(config, count)
    ropes = family.ropes(family, config, heads.head_dim, windows)
    default = 4 * config.size("hidden_size") if family.wide_mlp_by_default else REQUIRED
    mlp = DenseMLP(
        intermediate_size=config.size("intermediate_size", default),
        activation=config.choice("hidden_act", ACTIVATIONS if switches.gated_mlp else PLAIN_ACTIVATIONS),
        gated=switches.gated_mlp,
        bias=switches.mlp_bias,
    )
    softcap = config.optional_number("attn_logit_softcapping") if family.softcaps else None

    def attention(layer: int) -> SoftmaxAttention:
        usual = SoftmaxAttention(
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            scale=family.scale(config, heads.head_dim, layer),
            window=windows[layer],
            softcap=softcap,
            rope=ropes[layer],
            fused_by_head=switches.fused_by_head,
            query_growth=family.query_growth(config),
            qkv_bias=switches.qkv_bias,
            out_bias=switches.attention_out_bias,
            qk_norm=switches.qk_norm,
            sinks=switches.sinks,
            gated=switches.gated_attention,
        )
        made = family.attention(config, usual)
        _check_layer_type(config, made, layer)
        return made

    return tuple(
        transformer_layer(
            mixers[layer] or attention(layer),
            experts[layer] or mlp,
            pre_norms=switches.pre_norms,
            post_norms=switches.post_norms,
            parallel=switches.parallel_norms if switches.parallel else None,
            scale=Multipliers.read(config, family.multipliers.residual),
        )
        for layer in range(count)
    )


def _windows(family: Family, config: HFConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer; CheckpointError if `layer_types` is no list of one entry a layer."""
    kinds = config.raw("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise config.problem("layer_types", f"must be a list of {layers} entries, one a layer", kinds)
    return family.windows(config, layers)


def _check_layer_type(config: HFConfig, attention: SoftmaxAttention, layer: int) -> None:
    kinds = config.raw("layer_types")
    if kinds is None:
        return
    usual = "full_attention" if attention.chunk is None else "chunked_attention"
    said = "full_attention" if kinds[layer] == "attention" else kinds[layer]
    if said != (usual if attention.window is None else "sliding_attention"):
        at = f"{layer} must say how this family attends there, with window {attention.window}"
        raise config.problem("layer_types", f"of layer {at}", kinds[layer])


def latent_layers(family: Family, config: HFConfig, switches: Switches) -> tuple[Layer, ...]:
    """Latent attention and an MLP or a mixture of experts in every layer (DeepSeek V2 and V3)."""
    count, experts = config.size("num_hidden_layers"), None
    if config.raw("moe_layer_freq") not in (None, 1):
        raise config.problem("moe_layer_freq", "must be 1", config.raw("moe_layer_freq"))
    experts = family.moe(config, count)
    mlp = DenseMLP(
        intermediate_size=config.size("intermediate_size"),
        activation=config.choice("hidden_act", ACTIVATIONS),
        bias=switches.mlp_bias,
    )
    plain, turned = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    rope = family.rope(config, turned)
    if not config.flag("rope_interleave", True):
        rope = replace(rope, interleaved=False)
    attention = LatentAttention(
        heads=config.size("num_attention_heads"),
        rank=config.size("kv_lora_rank"),
        query_rank=config.optional_size("q_lora_rank"),
        plain_dim=plain,
        rope_dim=turned,
        value_dim=config.size("v_head_dim"),
        scale=(plain + turned) ** -0.5 * _yarn_scale(config),
        rope=rope,
        bias=switches.qkv_bias,
    )
    return tuple(transformer_layer(attention, experts[layer] or mlp) for layer in range(count))


def _yarn_scale(config: HFConfig) -> float:
    """What YaRN's `mscale_all_dim` multiplies scores by."""
    _, given = rope_values(config)
    inner = HFConfig(config.path, given if isinstance(given, dict) else {})
    if not inner.raw("mscale_all_dim") or inner.raw("rope_type") == "default":
        return 1.0
    factor = inner.number("factor")
    return (0.1 * inner.number("mscale_all_dim") * math.log(factor) + 1) ** 2 if factor > 1 else 1.0
