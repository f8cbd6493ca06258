"""The model families: one entry each; importable without torch.

`read` makes a `ModelConfig` of a model folder; `weight_names` gives the tensor names from which the weight table is
built. A family of one's own is one `register("mine", Family(...))` away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.family_spec import (
    Family,
    TensorRef,
    WeightNames,
    experts_by_step,
    experts_everywhere,
    gpt2_scale,
    hf_config,
    model_config,
    names_of,
    scale_by_scalar,
    window_by_layer_types,
    window_everywhere,
    window_if_used,
    window_on_upper_layers,
)
from megalite.model.generation import GenerationConfig
from megalite.model.hf_config import HFConfig, read_json

__all__ = ["FAMILIES", "Family", "TensorRef", "WeightNames", "from_values", "read", "register", "weight_names"]

LLAMA_WEIGHTS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "attn_out": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}
QK_NORM_WEIGHTS = {
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
}
QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "attention_out_bias": "attention_bias"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        weights=LLAMA_WEIGHTS,
        defaults={"max_position_embeddings": 2048},
        flags={**ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        weights=LLAMA_WEIGHTS,
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
        windows=window_everywhere,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        weights=LLAMA_WEIGHTS,
        defaults=QWEN_DEFAULTS,
        fixed={"qkv_bias": True},
        windows=window_on_upper_layers,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        weights={**LLAMA_WEIGHTS, **QK_NORM_WEIGHTS},
        defaults={**QWEN_DEFAULTS, "head_dim": 128},
        fixed={"qk_norm": "head"},
        flags=ATTENTION_BIAS,
        windows=window_on_upper_layers,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        weights={
            **LLAMA_WEIGHTS,
            "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
            "expert_gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "expert_up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            "expert_down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        },
        keys={"num_experts": ("num_local_experts", "num_experts")},
        defaults={
            "max_position_embeddings": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        windows=window_everywhere,
        moe=experts_everywhere,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        weights={
            **LLAMA_WEIGHTS,
            **QK_NORM_WEIGHTS,
            "router": "model.layers.{layer}.mlp.gate.weight",
            "expert_gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "expert_up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
            "expert_down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        },
        keys={"num_experts": ("num_experts", "num_local_experts")},
        defaults={
            **QWEN_DEFAULTS,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.001,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        fixed={"qk_norm": "head"},
        flags=ATTENTION_BIAS,
        windows=window_if_used,
        moe=experts_by_step,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        weights={
            **LLAMA_WEIGHTS,
            "post_attn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
            "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
            "post_mlp_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
        },
        keys={"hidden_act": ("hidden_activation",)},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed={"norm": "rms_zero_centred", "post_norms": True},
        flags=ATTENTION_BIAS,
        scaled_embedding=True,
        softcaps=True,
        windows=window_by_layer_types,
        scale=scale_by_scalar,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        weights={
            **LLAMA_WEIGHTS,
            **dict.fromkeys(("q", "k", "v"), "model.layers.{layer}.self_attn.qkv_proj.weight"),
            **dict.fromkeys(("gate", "up"), "model.layers.{layer}.mlp.gate_up_proj.weight"),
        },
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "norm_eps": 1e-5,
        },
        partial_rotary=True,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
        windows=window_everywhere,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        weights={
            "embed": "transformer.wte.weight",
            "positions": "transformer.wpe.weight",
            "final_norm": "transformer.ln_f.weight",
            "lm_head": "lm_head.weight",
            "attn_norm": "transformer.h.{layer}.ln_1.weight",
            **dict.fromkeys(("q", "k", "v"), "transformer.h.{layer}.attn.c_attn.weight"),
            "attn_out": "transformer.h.{layer}.attn.c_proj.weight",
            "mlp_norm": "transformer.h.{layer}.ln_2.weight",
            "up": "transformer.h.{layer}.mlp.c_fc.weight",
            "down": "transformer.h.{layer}.mlp.c_proj.weight",
        },
        prefix="transformer.",
        ignored=(r"^transformer\.h\.\d+\.attn\.(bias|masked_bias)$",),
        transposed=True,
        keys={
            "hidden_size": ("n_embd",),
            "num_attention_heads": ("n_head",),
            "num_hidden_layers": ("n_layer",),
            "max_position_embeddings": ("n_positions",),
            "intermediate_size": ("n_inner",),
            "hidden_act": ("activation_function",),
            "norm_eps": ("layer_norm_epsilon",),
        },
        defaults={
            "hidden_act": "gelu_new",
            "norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        fixed={
            "norm": "layer",
            "qkv_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "learned_positions": True,
        },
        wide_mlp_by_default=True,
        rotary=False,
        scale=gpt2_scale,
    ),
}


def register(name: str, family: Family) -> None:
    """Add a family of one's own; ConfigError if the name or the architecture is taken."""
    taken = [key for key, other in FAMILIES.items() if key == name or other.architecture == family.architecture]
    if taken:
        raise ConfigError(Problem(key=f"family {name}", rule=f"is already registered, as {taken[0]}"))
    FAMILIES[name] = family


def read(folder: str | Path) -> ModelConfig:
    """The model described by a folder's config.json (and generation_config.json, for the end-of-sequence tokens).

    CheckpointError if a file is missing, damaged or contradicts itself; ConfigError for an unknown architecture.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    return from_values(path, values, GenerationConfig.read(folder, values))


def from_values(path: Path, values: Mapping[str, object], generation: GenerationConfig | None = None) -> ModelConfig:
    """As `read`, of files already parsed; `path` is config.json's, for messages. None: it is all there is."""
    name = _family_of(path, values)
    family = FAMILIES[name]
    aside = generation or GenerationConfig.of_config(path, values)
    return model_config(name, family, hf_config(family, path, values), aside)


def weight_names(config: ModelConfig) -> WeightNames:
    """The checkpoint tensors of a model."""
    return names_of(config.family, FAMILIES[config.family], config)


def _family_of(path: Path, values: Mapping[str, object]) -> str:
    """By `architectures`; by `model_type` where there are none."""
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise HFConfig(path, values).problem("architectures", "must be a list of names", architectures)
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    found = [by_architecture[name] for name in architectures if name in by_architecture]
    if found:
        return found[0]
    model_type = values.get("model_type")
    if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    if not architectures and model_type is None:
        raise HFConfig(path, values).problem("architectures", "is missing")
    unknown = architectures[0] if architectures else model_type
    raise ConfigError(
        Problem(
            key="model.path",
            rule=f"architecture {unknown} is not supported",
            fix=f"Supported: {', '.join(sorted(by_architecture))}; one of your own can be registered from "
            "a module named in model.family_module.",
            origin=str(path),
        )
    )
