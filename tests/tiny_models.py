"""Tiny random Hugging Face checkpoints, one for each way in which a family's checkpoints differ.

Sizes are chosen to be awkward: 2 KV heads for tp=4, vocabulary and widths that nothing divides, 4 layers for 3 stages.
Weights are drawn so that every one of them matters and greedy choices are not near ties: norms and biases are random
too, and matrices keep the scale of what they are given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

VOCAB = 103
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [1.3, 4.0],
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
GRANITE_MOE = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
MAMBA = {
    "rms_norm_eps": 1e-2,
    "shared_intermediate_size": 28,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_head": 12,
    "mamba_d_state": 10,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 4,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One checkpoint."""

    model: str
    """Config class of transformers, without `Config`."""
    changes: dict = field(default_factory=dict)
    """Over BASE."""
    max_shard_size: str = "1GB"
    vision: dict | None = None
    """A multimodal checkpoint with this vision tower; `changes` are of its text part."""
    seed: int = 0
    """Chosen so that greedy choices have a margin."""


VARIANTS: dict[str, Variant] = {
    "llama2": Variant(model="Llama", changes={"num_key_value_heads": 6}),
    "llama3": Variant(model="Llama", changes={"rope_parameters": LLAMA3_ROPE}),
    "llama_tied": Variant(model="Llama", changes={"tie_word_embeddings": True}),
    "llama_one_kv_head": Variant(model="Llama", changes={"num_key_value_heads": 1}),
    "llama_bias": Variant(model="Llama", changes={"attention_bias": True, "mlp_bias": True}),
    "llama_linear": Variant(
        model="Llama", changes={"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    ),
    "llama_sharded": Variant(model="Llama", max_shard_size="40KB"),
    "mistral": Variant(model="Mistral", changes={"sliding_window": 8, "head_dim": 12}),
    "qwen2": Variant(model="Qwen2", changes={"num_attention_heads": 4, "tie_word_embeddings": True}),
    "qwen2_window": Variant(
        model="Qwen2", changes={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    ),
    "qwen3": Variant(model="Qwen3", changes={"head_dim": 16}),
    "qwen3_yarn": Variant(model="Qwen3", changes={"head_dim": 8, "attention_bias": True, "rope_parameters": YARN}),
    "mixtral": Variant(model="Mixtral", changes={"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": Variant(
        model="Qwen3Moe",
        changes={
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_step": Variant(
        model="Qwen3Moe",
        changes={
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
    ),
    "gemma2": Variant(
        model="Gemma2",
        changes={
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        seed=3,
    ),
    "phi3": Variant(
        model="Phi3",
        changes={
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        seed=1,
    ),
    "phi3_longrope": Variant(
        model="Phi3", changes={"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    ),
    "gpt2": Variant(
        model="GPT2",
        changes={
            "n_embd": 48,
            "n_layer": 4,
            "n_head": 6,
            "n_positions": 128,
            "n_inner": 92,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gemma": Variant(model="Gemma", changes={"head_dim": 16}),
    "gemma3": Variant(
        model="Gemma3Text",
        changes={
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "seed_oss": Variant(model="SeedOss", changes={"head_dim": 12, "attention_out_bias": True}),
    "starcoder2": Variant(model="Starcoder2", changes={"sliding_window": 9}),
    "stablelm": Variant(model="StableLm", changes={"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm_parallel": Variant(
        model="StableLm", changes={"use_parallel_residual": True, "partial_rotary_factor": 0.5}
    ),
    "smollm3": Variant(model="SmolLM3", changes={"no_rope_layers": [1, 0, 1, 0]}),
    "granite": Variant(
        model="Granite",
        changes={
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "olmo2": Variant(model="Olmo2"),
    "olmo3": Variant(
        model="Olmo3", changes={"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ),
    "exaone4": Variant(
        model="Exaone4", changes={"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ),
    "ernie4_5": Variant(model="Ernie4_5", changes={"head_dim": 12, "use_bias": True}),
    "helium": Variant(model="Helium", changes={"head_dim": 8}),
    "glm4": Variant(model="Glm4", changes={"head_dim": 16}),
    "hunyuan_v1_dense": Variant(
        model="HunYuanDenseV1",
        changes={
            "head_dim": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "ministral3": Variant(
        model="Ministral3",
        changes={
            "head_dim": 8,
            "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16},
        },
    ),
    "arcee": Variant(model="Arcee"),
    "nemotron": Variant(model="Nemotron", changes={"partial_rotary_factor": 0.5}),
    "cohere": Variant(model="Cohere", changes={"logit_scale": 0.5}),
    "cohere2": Variant(
        model="Cohere2",
        changes={
            "logit_scale": 0.5,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi": Variant(model="Phi", changes={"num_key_value_heads": 6, "partial_rotary_factor": 0.5}, seed=1),
    "gpt_neox": Variant(model="GPTNeoX", changes={"rotary_pct": 0.5}),
    "apertus": Variant(model="Apertus"),
    "qwen2_moe": Variant(
        model="Qwen2Moe",
        changes={**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
    ),
    "olmoe": Variant(model="Olmoe", changes={"num_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe": Variant(model="GraniteMoe", changes={**GRANITE_MOE, "attention_bias": True}),
    "granitemoeshared": Variant(model="GraniteMoeShared", changes={**GRANITE_MOE, "shared_intermediate_size": 28}),
    "glm4_moe": Variant(
        model="Glm4Moe",
        changes={
            **EXPERTS,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "head_dim": 16,
            "use_qk_norm": True,
        },
    ),
    "ernie4_5_moe": Variant(
        model="Ernie4_5_Moe",
        changes={"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 20, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_moe": Variant(model="HunYuanMoEV1", changes={"num_experts": 6, "moe_topk": 2, "head_dim": 12}),
    "gpt_oss": Variant(
        model="GptOss",
        changes={
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 6,
            "swiglu_limit": 1.0,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "llama4_text": Variant(
        model="Llama4Text",
        changes={
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "intermediate_size_mlp": 36,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 1],
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
    ),
    "deepseek_v2": Variant(
        model="DeepseekV2",
        changes={
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek_v3": Variant(
        model="DeepseekV3",
        changes={
            **LATENT,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "gemma3_vision": Variant(
        model="Gemma3",
        changes={
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision=VISION,
    ),
    "mistral3": Variant(
        model="Mistral3",
        changes={"model_type": "mistral", "head_dim": 12, "sliding_window": 8},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "mistral3_ministral3": Variant(
        model="Mistral3",
        changes={"model_type": "ministral3", "head_dim": 8, "tie_word_embeddings": False},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "qwen3_next": Variant(
        model="Qwen3Next",
        changes={
            **EXPERTS,
            **DELTA,
            "num_experts": 6,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [2],
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        },
        seed=3,
    ),
    "granitemoehybrid": Variant(
        model="GraniteMoeHybrid",
        changes={
            **GRANITE_MOE,
            **MAMBA,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        },
    ),
    "granitemoehybrid_dense": Variant(
        model="GraniteMoeHybrid",
        changes={
            **GRANITE_MOE,
            **MAMBA,
            "num_local_experts": 0,
            "mamba_n_groups": 1,
            "mamba_proj_bias": True,
            "position_embedding_type": "rope",
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "qwen3_5": Variant(model="Qwen3_5", changes=DELTA, vision=QWEN_VISION),
    "qwen3_5_moe": Variant(
        model="Qwen3_5Moe",
        changes={**DELTA, **EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 28},
        vision=QWEN_VISION,
    ),
    "qwen3_5_text": Variant(model="Qwen3_5Text", changes={**DELTA, "tie_word_embeddings": True}),
    "glm": Variant(model="Glm", changes={"head_dim": 16}),
    "cohere_norms": Variant(model="Cohere", changes={"logit_scale": 0.5, "use_qk_norm": True}),
    "glm4_moe_lite": Variant(
        model="Glm4MoeLite",
        changes={**LATENT, "n_routed_experts": 6, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
    ),
    "llama4": Variant(
        model="Llama4",
        changes={
            "num_local_experts": 6,
            "head_dim": 8,
            "intermediate_size_mlp": 36,
            "no_rope_layers": [1, 0, 1, 1],
            "attention_chunk_size": 8,
            "tie_word_embeddings": False,
            "rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0},
        },
        vision={**VISION, "projector_input_dim": 8, "projector_output_dim": 8, "vision_output_dim": 8},
    ),
}

NOT_IN_GPT2 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class TinyModels:
    """Makes checkpoints when first asked for, in a folder that later runs reuse; safe between processes."""

    def __init__(self, cache: Path):
        made_by = Path(__file__).read_bytes() + version("transformers").encode() + version("torch").encode()
        self.folder = cache / hashlib.sha256(made_by).hexdigest()[:16]
        self.folder.mkdir(exist_ok=True)

    def __call__(self, name: str, layers: int = 0) -> Path:
        """The folder of a variant; `gpt2_bare` is gpt2 as the hub has it, without `transformer.` in the names.

        `layers`: so many instead of its own, for tests that need no more.
        """
        folder = self.folder / (f"{name}-{layers}" if layers else name)
        if not folder.exists():
            part = Path(tempfile.mkdtemp(dir=self.folder))
            if name == "gpt2_bare":
                _write_bare(self("gpt2"), part)
            else:
                own = {"num_hidden_layers": layers} if layers else {}
                _write(replace(VARIANTS[name], changes={**VARIANTS[name].changes, **own}), part)
            try:
                os.rename(part, folder)
            except OSError:  # another process was faster
                shutil.rmtree(part)
        return folder


def _write(variant: Variant, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    values = {**BASE, **variant.changes}
    if variant.model == "GPT2":
        values = {key: value for key, value in values.items() if key not in NOT_IN_GPT2}
    if variant.vision is not None:
        tied = {"tie_word_embeddings": values.pop("tie_word_embeddings", True)}
        values = {"text_config": values, "vision_config": variant.vision, **tied}
    config = getattr(transformers, f"{variant.model}Config")(**values)
    kind = transformers.AutoModelForCausalLM if variant.vision is None else transformers.AutoModelForImageTextToText
    model = kind.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(variant.seed)
    corrections = [(name, values) for name, values in model.named_buffers() if "correction_bias" in name]
    for name, param in (*model.named_parameters(), *corrections):
        _randomise(name, param.data, variant.model, generator)
    model.save_pretrained(folder, max_shard_size=variant.max_shard_size)


def _randomise(name: str, values, model: str, generator) -> None:
    """Matrices keep the scale of their input; logits come out with a standard deviation of about 3."""
    if "correction_bias" in name:
        values.normal_(0.0, 0.2, generator=generator)
        return
    if values.dim() == 1:
        zero_centred = model.startswith(("Qwen3Next", "Qwen3_5")) and "linear_attn" not in name
        values.normal_(1.0 if name.endswith("weight") and not zero_centred else 0.0, 0.3, generator=generator)
        return
    if "embed_tokens" in name or "wte" in name or "wpe" in name:
        values.normal_(0.0, 0.15 if model.startswith("Gemma") else 0.4, generator=generator)  # Gemma scales them up
        return
    turned = ".c_" in name or (model in ("GptOss", "Llama4Text") and values.dim() == 3)  # stored [in, out]
    fan_in = values.shape[-2] if turned else values.shape[-1]
    gain = 3.0 if "lm_head" in name else 1.3
    if "linear_attn.out_proj" in name:  # behind a norm of what may be almost nothing, with most of it rounding
        gain = 0.25
    values.normal_(0.0, gain * fan_in**-0.5, generator=generator)


def _write_bare(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    tensors["h.0.attn.bias"] = tensors["wpe.weight"].new_ones(1, 1, 8, 8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((source / name).read_text())


def edit_config(folder: Path, **changes) -> None:
    """Change keys of a copy's config.json; None removes a key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
