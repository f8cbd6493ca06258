"""Random config.json of every family, with its switches drawn: sizes, windows, kinds of layers, norms, rope, routers.

No transformers, no torch. `draw` gives what a checkpoint's config.json would say, in the family's own spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from megalite.model import families

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model is drawn with."""

    layers: int
    kv_heads: int
    group: int
    """Query heads to each key/value head."""
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    experts: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def some_sizes(random: Random, *, vocab: int = 103) -> Sizes:
    """Of models whose computation is compared; widths as transformers can multiply those of experts."""
    return Sizes(
        layers=random.randint(2, 4),
        kv_heads=random.randint(1, 3),
        group=random.randint(1, 3),
        head_dim=random.choice([8, 12, 16]),
        hidden=random.choice([24, 36, 40, 48]),
        inner=random.choice([16, 20, 28, 36]),
        vocab=vocab,
        experts=random.randint(4, 8),
    )


def odd_sizes(random: Random) -> Sizes:
    """Of models whose bytes are moved."""
    return Sizes(
        layers=random.randint(1, 4),
        kv_heads=random.randint(1, 4),
        group=random.randint(1, 3),
        head_dim=random.choice([4, 8]),
        hidden=random.randint(3, 20),
        inner=random.randint(1, 23),
        vocab=random.randint(3, 41),
        experts=random.randint(2, 5),
    )


WITHOUT_HEAD_DIM = ("gpt2", "gpt_neox", "phi", "phi3", "stablelm", "cohere2")
"""Families whose head size follows from the hidden size, in transformers,"""
HEADS_AS_WIDE = (*WITHOUT_HEAD_DIM, "gemma3_text", "helium", "olmoe")
"""and whose heads together must be as wide as it."""
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
WITHOUT_GROUPS = ("gpt2", "gpt_neox", *LATENT)


def draw(random: Random, name: str, sizes: Sizes) -> Values:
    """config.json of a family's model; of a multimodal wrapper with the text model in `text_config`."""
    family = families.FAMILIES[name]
    text_type = family.text_model_type
    kind = name if text_type is None else text_type
    if kind in WITHOUT_GROUPS:
        sizes = replace(sizes, kv_heads=sizes.heads, group=1)
    if kind in HEADS_AS_WIDE:
        sizes = replace(sizes, hidden=sizes.heads * sizes.head_dim)
    values: Values = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.inner,
        "max_position_embeddings": 128,
        "tie_word_embeddings": _coin(random),
    }
    for key in ("head_dim",) if kind in (*WITHOUT_HEAD_DIM, *LATENT) else ():
        del values[key]
    for key in ("num_key_value_heads",) if kind in ("gpt2", "gpt_neox") else ():
        del values[key]
    values |= MORE.get(kind, _nothing)(random, sizes)
    spelled = {family.keys.get(key, (key,))[0]: value for key, value in values.items()}
    top = {"architectures": [family.architecture], "model_type": name, "dtype": "float32"}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if text_type is None:
        return {**top, **ids, **spelled}
    tied = spelled.pop("tie_word_embeddings")
    return {**top, "tie_word_embeddings": tied, "text_config": {"model_type": text_type, **ids, **spelled}}


def _coin(random: Random) -> bool:
    return random.random() < 0.5


def _nothing(random: Random, sizes: Sizes) -> Values:
    return {}


def _flags(*names: str) -> Callable[[Random, Sizes], Values]:
    return lambda random, sizes: {name: _coin(random) for name in names}


def _rope(random: Random, sizes: Sizes) -> Values:
    """One rotary embedding for all layers, scaled in one of the ways that there are."""
    return {"rope_parameters": _rope_parameters(random)}


def _rope_parameters(random: Random, *kinds: str, **more: Any) -> Values:
    kind = random.choice(kinds or ("default", "default", "linear", "dynamic", "llama3", "yarn"))
    values: Values = {"rope_type": kind, "rope_theta": random.choice([100.0, 1000.0, 10000.0]), **more}
    if kind != "default":
        values["factor"] = random.choice([2.0, 4.0])
    if kind == "llama3":
        low = random.choice([1.0, 2.0])
        values |= {"low_freq_factor": low, "high_freq_factor": low * random.choice([1.0, 2.0, 4.0])}
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = random.choice([8, 16, 32])
    if kind == "yarn":
        values |= random.choice([{}, {"attention_factor": 1.2}, {"beta_fast": 16.0, "beta_slow": 2.0}])
        values |= random.choice([{}, {"truncate": False}])
    return values


def _partial(random: Random, sizes: Sizes) -> Values:
    factor = random.choice([one for one in (0.25, 0.5, 1.0) if int(sizes.head_dim * one) % 2 == 0])
    rope = _rope_parameters(random, "default", "linear", "yarn", partial_rotary_factor=factor)
    return {"rope_parameters": rope}


def _window(random: Random, sizes: Sizes) -> Values:
    return {"sliding_window": random.choice([None, random.randint(3, 12)])}


def _types(*kinds: str, window: bool = True) -> Callable[[Random, Sizes], Values]:
    """What each layer is, drawn one by one; both kinds are there where there are as many layers."""

    def draw_types(random: Random, sizes: Sizes) -> Values:
        types = [*kinds, *random.choices(kinds, k=sizes.layers)][: sizes.layers]
        random.shuffle(types)
        return {"layer_types": types, **({"sliding_window": random.randint(3, 12)} if window else {})}

    return draw_types


_windows = _types("sliding_attention", "full_attention")


def _used_window(random: Random, sizes: Sizes) -> Values:
    used = {"use_sliding_window": True, "sliding_window": random.randint(3, 12)}
    return random.choice([{}, {**used, "max_window_layers": random.randint(0, sizes.layers)}])


def _multipliers(random: Random, sizes: Sizes) -> Values:
    return {
        "embedding_multiplier": random.choice([1.0, 2.0]),
        "logits_scaling": random.choice([1.0, 2.0]),
        "residual_multiplier": random.choice([1.0, 0.5]),
        "attention_multiplier": random.choice([0.2, 0.4]),
    }


def _experts(random: Random, sizes: Sizes) -> Values:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": random.randint(1, sizes.experts - 1),
        "moe_intermediate_size": sizes.inner,
    }


def _stepped(random: Random, sizes: Sizes) -> Values:
    return {
        "norm_topk_prob": _coin(random),
        "decoder_sparse_step": random.choice([1, 1, 2]),
        "mlp_only_layers": random.sample(range(sizes.layers), random.choice([0, 1])),
    }


def _shared_expert(random: Random, sizes: Sizes) -> Values:
    return {"shared_expert_intermediate_size": random.randint(2, 30)}


def _grouped(random: Random, sizes: Sizes) -> Values:
    """A router that chooses groups of experts first."""
    groups = random.randint(1, 3)
    each = random.randint(2, 3)
    top = random.randint(1, groups)
    return {
        "num_experts": groups * each,
        "num_experts_per_tok": random.randint(1, top * each),
        "moe_intermediate_size": sizes.inner,
        "n_group": groups,
        "topk_group": top,
        "norm_topk_prob": _coin(random),
        "routed_scaling_factor": random.choice([1.0, 1.5]),
        "n_shared_experts": random.randint(1, 2),
        "first_k_dense_replace": random.randint(0, sizes.layers),
    }


def _latent(random: Random, sizes: Sizes) -> Values:
    return {
        "q_lora_rank": random.choice([None, random.randint(6, 20)]),
        "kv_lora_rank": random.choice([6, 14, 24]),
        "qk_nope_head_dim": sizes.head_dim,
        "qk_rope_head_dim": random.choice([4, 6]),
        "v_head_dim": random.randint(4, 12),
        "attention_bias": _coin(random),
    }


def _latent_rope(random: Random, sizes: Sizes) -> Values:
    rope = _rope_parameters(random, "default", "yarn")
    if rope["rope_type"] == "yarn":
        rope |= random.choice([{}, {"mscale": 1.0, "mscale_all_dim": 0.7}])
    return {"rope_parameters": rope, "rope_interleave": _coin(random)}


def _deepseek_v2(random: Random, sizes: Sizes) -> Values:
    values = _grouped(random, sizes) | {"norm_topk_prob": False, "mlp_bias": _coin(random)}
    rope = {"rope_parameters": _rope_parameters(random, "default", "yarn")}
    return values | rope | {"topk_method": random.choice(["greedy", "group_limited_greedy"])}


def _dense_and_sparse(random: Random, sizes: Sizes) -> Values:
    return {"mlp_layer_types": random.choices(["dense", "sparse"], k=sizes.layers)}


def _delta(random: Random, sizes: Sizes) -> Values:
    keys = random.randint(1, 3)
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * random.randint(1, 2),
        "linear_key_head_dim": random.choice([4, 8]),
        "linear_value_head_dim": random.choice([6, 12]),
        "linear_conv_kernel_dim": random.randint(2, 5),
    }


_delta_types = _types("linear_attention", "full_attention", window=False)


def _mamba(random: Random, sizes: Sizes) -> Values:
    groups = random.randint(1, 2)
    heads = groups * random.choice([one for one in (1, 2, 4) if 2 * sizes.hidden % (groups * one) == 0] or [1])
    heads = heads if 2 * sizes.hidden % heads == 0 else groups
    return {
        "num_experts": random.choice([0, sizes.experts]),
        "num_experts_per_tok": random.randint(1, sizes.experts - 1),
        "moe_intermediate_size": sizes.inner,
        "mamba_n_heads": heads,
        "mamba_n_groups": groups if heads % groups == 0 else 1,
        "mamba_d_head": "auto",
        "mamba_d_state": random.randint(4, 10),
        "mamba_d_conv": random.randint(2, 4),
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
        "mamba_conv_bias": _coin(random),
        "mamba_proj_bias": _coin(random),
        "position_embedding_type": random.choice([None, "nope", "rope"]),
        "norm_eps": 1e-2,
    }


def _chunks(random: Random, sizes: Sizes) -> Values:
    """Llama 4: layers with rope attend in chunks."""
    ropes = [random.choice([0, 1]) for _ in range(sizes.layers)]
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": random.randint(1, sizes.experts - 1),
        "moe_intermediate_size": random.choice([4, 12, 20]),
        "no_rope_layers": ropes if any(ropes) else [1] * sizes.layers,
        "attention_chunk_size": random.randint(4, 12),
        "interleave_moe_layer_step": random.choice([1, 2]),
        "use_qk_norm": _coin(random),
        "attn_temperature_tuning": _coin(random),
        "floor_scale": random.randint(2, 8),
        "attn_scale": 0.2,
        "rope_parameters": _rope_parameters(random, "default", "llama3"),
    }


def _two_ropes(random: Random, sizes: Sizes) -> Values:
    full = _rope_parameters(random, "default", "linear", "yarn")
    return {"rope_parameters": {"full_attention": full, "sliding_attention": _rope_parameters(random, "default")}}


def _ernie_moe(random: Random, sizes: Sizes) -> Values:
    first = random.randint(0, sizes.layers - 1)
    return {
        "moe_num_shared_experts": random.randint(1, 2),
        "moe_layer_start_index": first,
        "moe_layer_end_index": random.choice([-1, random.randint(first, sizes.layers - 1)]),
        "moe_layer_interval": random.choice([1, 1, 2]),
    }


def _gpt2(random: Random, sizes: Sizes) -> Values:
    return {
        "intermediate_size": random.choice([None, sizes.inner]),
        "hidden_act": random.choice(["gelu_new", "gelu", "relu"]),
        **_flags("scale_attn_by_inverse_layer_idx", "scale_attn_weights")(random, sizes),
    }


def _phi3(random: Random, sizes: Sizes) -> Values:
    if _coin(random):
        return {"rope_parameters": _rope_parameters(random, "default", partial_rotary_factor=0.5)}
    pairs = sizes.head_dim // 2
    rope = _rope_parameters(random, "longrope", partial_rotary_factor=1.0, original_max_position_embeddings=16)
    del rope["factor"]
    divisors = {f"{name}_factor": [1.0 + random.random() for _ in range(pairs)] for name in ("short", "long")}
    return {"rope_parameters": rope | divisors, "original_max_position_embeddings": 16}


def _softcaps(random: Random, sizes: Sizes) -> Values:
    return {
        "query_pre_attn_scalar": random.choice([8, 24]),
        "attn_logit_softcapping": random.choice([None, 4.0]),
        "final_logit_softcapping": random.choice([None, 6.0]),
    }


def _no_attention_softcap(random: Random, sizes: Sizes) -> Values:
    return {"attn_logit_softcapping": None}


def _hunyuan_rope(random: Random, sizes: Sizes) -> Values:
    alpha = {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0}
    return {"rope_parameters": random.choice([alpha, _rope_parameters(random)])}


def _growth(random: Random, sizes: Sizes) -> Values:
    return {"rope_parameters": _rope_parameters(random, "yarn") | {"llama_4_scaling_beta": random.choice([0.1, 0.4])}}


def _no_ropes(random: Random, sizes: Sizes) -> Values:
    listed = {"no_rope_layers": [random.choice([0, 1]) for _ in range(sizes.layers)]}
    return random.choice([{"no_rope_layer_interval": 2}, listed if any(listed["no_rope_layers"]) else {}])


def _top_k_by_layer(random: Random, sizes: Sizes) -> Values:
    return {"num_experts_per_tok": [random.randint(1, sizes.experts - 1) for _ in range(sizes.layers)]}


def _all(*parts: Callable[[Random, Sizes], Values]) -> Callable[[Random, Sizes], Values]:
    def draw_all(random: Random, sizes: Sizes) -> Values:
        values: Values = {}
        for part in parts:
            values |= part(random, sizes)
        return values

    return draw_all


_BIASES = _flags("attention_bias", "mlp_bias")
_ATTENTION_BIAS = _flags("attention_bias")
_QWEN3_5 = _all(_delta, _delta_types, _ATTENTION_BIAS, _partial)
MORE: dict[str, Callable[[Random, Sizes], Values]] = {
    "llama": _all(_BIASES, _rope),
    "mistral": _all(_window, _rope),
    "qwen2": _all(_used_window, _rope),
    "qwen3": _all(_used_window, _ATTENTION_BIAS, _rope),
    "mixtral": _all(_experts, _window, _rope),
    "qwen3_moe": _all(_experts, _stepped, _ATTENTION_BIAS, _rope),
    "gemma": _ATTENTION_BIAS,
    "gemma2": _all(_windows, _softcaps, _ATTENTION_BIAS),
    "gemma3_text": _all(_windows, _softcaps, _two_ropes, _ATTENTION_BIAS, _no_attention_softcap),
    "phi3": _all(_window, _phi3),
    "gpt2": _gpt2,
    "seed_oss": _all(_BIASES, _flags("attention_out_bias"), _rope),
    "starcoder2": _all(_flags("use_bias"), _window, _rope),
    "stablelm": _all(_flags("use_qkv_bias", "use_parallel_residual"), _partial),
    "smollm3": _all(_BIASES, _no_ropes, _rope),
    "granite": _all(_multipliers, _BIASES, _rope),
    "olmo2": _all(_ATTENTION_BIAS, _rope),
    "olmo3": _all(_windows, _ATTENTION_BIAS),
    "exaone4": _all(_windows, _rope),
    "ernie4_5": _all(_flags("use_bias"), _rope),
    "helium": _BIASES,
    "glm": _all(_ATTENTION_BIAS, _partial),
    "glm4": _all(_ATTENTION_BIAS, _partial),
    "hunyuan_v1_dense": _all(_ATTENTION_BIAS, _hunyuan_rope),
    "ministral3": _all(_window, _growth),
    "arcee": _all(_BIASES, _rope),
    "nemotron": _all(_BIASES, _partial),
    "cohere": _all(
        _flags("attention_bias", "use_qk_norm"), lambda random, sizes: {"logit_scale": random.choice([0.5, 1.0])}, _rope
    ),
    "cohere2": _all(_ATTENTION_BIAS, _windows, lambda random, sizes: {"logit_scale": random.choice([0.5, 1.0])}),
    "phi": _partial,
    "gpt_neox": _all(_ATTENTION_BIAS, _flags("use_parallel_residual"), _partial),
    "apertus": _all(_ATTENTION_BIAS, _rope),
    "qwen2_moe": _all(_experts, _stepped, _shared_expert, _flags("qkv_bias"), _rope),
    "olmoe": _all(_experts, _flags("norm_topk_prob", "attention_bias"), _rope),
    "granitemoe": _all(_experts, _multipliers, _ATTENTION_BIAS, _rope),
    "granitemoeshared": _all(
        _experts, _multipliers, lambda random, sizes: {"shared_intermediate_size": random.choice([0, 10])}
    ),
    "granitemoehybrid": _all(
        _mamba, _multipliers, _types("linear_attention", "full_attention", window=False), _ATTENTION_BIAS
    ),
    "glm4_moe": _all(_grouped, _flags("attention_bias", "use_qk_norm"), _partial),
    "glm4_moe_lite": _all(_grouped, _latent, _dense_and_sparse, _latent_rope),
    "ernie4_5_moe": _all(_experts, _ernie_moe, _rope),
    "hunyuan_v1_moe": _all(_experts, _top_k_by_layer, _hunyuan_rope),
    "gpt_oss": _all(_experts, _windows, lambda random, sizes: {"swiglu_limit": random.choice([1.0, 7.0])}, _rope),
    "llama4_text": _chunks,
    "deepseek_v2": _all(_latent, _deepseek_v2),
    "deepseek_v3": _all(_grouped, _latent, _latent_rope),
    "qwen3_next": _all(_experts, _stepped, _shared_expert, _QWEN3_5),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _all(_experts, _shared_expert, _QWEN3_5),
}
"""What a family's config.json says beside its sizes; the later counts."""
