"""The architectures of GGUF files that are read: their metadata keys, and how their tensors lie in them. Torch-free.

llama.cpp's converter splits, stacks and turns some tensors; a `Joined` says how one of Hugging Face's is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.weights.rounding import Elements

if TYPE_CHECKING:
    from megalite.convert.gguf_model import GgufModel

PATTERN = "attention.sliding_window_pattern"


def plain(value: Any) -> Any:
    """A number as JSON has it; float32 as the shortest decimal that means it."""
    if isinstance(value, float):
        short = float(np.format_float_positional(np.float32(value), unique=True))
        return int(short) if short.is_integer() and abs(short) > 1e6 else short
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A Hugging Face tensor that is made of several, or of one that lies otherwise."""

    parts: tuple[str, ...]
    """The GGUF tensors of its layer, without `blk.N.`."""
    make: Callable[[list[Elements]], Elements]
    by_expert: bool = False
    """Each expert's is made of its own of theirs, so one can be made after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp writes one Hugging Face architecture."""

    family: str
    """Key in families.FAMILIES."""
    permuted: bool = False
    """The rows of q and k of each head lie as neighbouring channels are rotated, where Hugging Face rotates halves."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata key, without the architecture -> key of config.json; besides the usual ones."""
    values: Mapping[str, object] = field(default_factory=dict)
    """Values of config.json for keys on which the file says nothing."""
    joined: Mapping[str, Joined] = field(default_factory=dict)
    """End of a Hugging Face tensor's name -> what it is made of."""
    by_layer: tuple[str, ...] = ()
    """Metadata keys that have a value for each layer, of which `more` makes something."""
    more: Callable[[GgufModel, dict[str, Any]], None] | None = None
    """Adds to the values of config.json what follows from others and from the tensors that there are."""
    by_heads: bool = False
    """Queries, keys and values of all heads lie one after the other, where Hugging Face has those of each head so."""


def _rows(parts: list[Elements]) -> Elements:
    return np.concatenate(parts, axis=-2)


def _turned(parts: list[Elements]) -> Elements:
    return np.ascontiguousarray(_rows(parts).swapaxes(-1, -2))


def _alternating(parts: list[Elements]) -> Elements:
    """Bias vectors [..., N], one number of each in turn."""
    return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _alternating_turned(parts: list[Elements]) -> Elements:
    """Matrices [..., N, K], one row of each in turn, turned."""
    joined = np.stack(parts, axis=-2).reshape(*parts[0].shape[:-2], -1, parts[0].shape[-1])
    return np.ascontiguousarray(joined.swapaxes(-1, -2))


def _latent(parts: list[Elements]) -> Elements:
    """Join the maps of each head to its key, turned [H, R, N], and to its value [H, V, R]."""
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])


_GATED = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_GRANITE_MOE = {
    ".block_sparse_moe.input_linear.weight": Joined(parts=_GATED, make=_rows, by_expert=True),
    ".shared_mlp.input_linear.weight": Joined(parts=("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), make=_rows),
}
_GPT_OSS = {
    ".experts.gate_up_proj": Joined(parts=_GATED, make=_alternating_turned, by_expert=True),
    ".experts.gate_up_proj_bias": Joined(parts=("ffn_gate_exps.bias", "ffn_up_exps.bias"), make=_alternating),
    ".experts.down_proj": Joined(parts=("ffn_down_exps.weight",), make=_turned, by_expert=True),
    ".experts.down_proj_bias": Joined(parts=("ffn_down_exps.bias",), make=_alternating),
}
_LLAMA4 = {
    ".experts.gate_up_proj": Joined(parts=_GATED, make=_turned, by_expert=True),
    ".experts.down_proj": Joined(parts=("ffn_down_exps.weight",), make=_turned, by_expert=True),
}
_DEEPSEEK = {".kv_b_proj.weight": Joined(parts=("attn_k_b.weight", "attn_v_b.weight"), make=_latent)}

_GRANITE_DENSE = {
    ".shared_mlp.input_linear.weight": Joined(parts=("ffn_gate.weight", "ffn_up.weight"), make=_rows),
    ".shared_mlp.output_linear.weight": Joined(parts=("ffn_down.weight",), make=_rows),
}


def _gemma2(file: GgufModel, values: dict[str, Any]) -> None:
    _query_scale(file, values, large=46)


def _gemma3(file: GgufModel, values: dict[str, Any]) -> None:
    _query_scale(file, values, large=62)
    values["rope_local_base_freq"] = plain(file.of("rope.freq_base_swa") or 10000.0)
    if "layer_types" not in values:
        values["sliding_window_pattern"] = int(file.of(PATTERN) or 6)


def _query_scale(file: GgufModel, values: dict[str, Any], *, large: int) -> None:
    """What Gemma's files leave to whoever runs them. `large`: layers of the 27B, whose scale is of hidden / heads."""
    heads, is_large = file.of("attention.head_count"), file.of("block_count") == large
    values["query_pre_attn_scalar"] = values["hidden_size"] / heads if is_large else values["head_dim"]


def _qk_norm_if_there(file: GgufModel, values: dict[str, Any]) -> None:
    values["use_qk_norm"] = file.has("blk.0.attn_q_norm.weight")


def _llama4(file: GgufModel, values: dict[str, Any]) -> None:
    """Maverick, which has 128 experts, has no q/k norm; files don't say so."""
    values["use_qk_norm"] = values["num_local_experts"] != 128


def _latent_heads(file: GgufModel, values: dict[str, Any]) -> None:
    keys = file.of("attention.key_length_mla") or file.of("attention.key_length")
    values["qk_nope_head_dim"] = keys - values["qk_rope_head_dim"]
    values["num_key_value_heads"] = values["num_attention_heads"]
    values.pop("head_dim", None)
    values["topk_method"] = "group_limited_greedy" if values["n_group"] > 1 else "greedy"


def _hybrid(file: GgufModel, values: dict[str, Any]) -> None:
    """Layers without KV heads are Mamba-2."""
    heads = file.listed("attention.head_count_kv") or [file.of("attention.head_count_kv")]
    values["num_key_value_heads"] = max(max(heads), 1)
    values["layer_types"] = ["attention" if one else "mamba" for one in heads]
    values["mamba_expand"] = file.of("ssm.inner_size") // values["hidden_size"]
    first = heads.index(0) if 0 in heads else 0
    values["mamba_conv_bias"] = file.has(f"blk.{first}.ssm_conv1d.bias")
    values["mamba_proj_bias"] = file.has(f"blk.{first}.ssm_in.bias")
    values["position_embedding_type"] = "rope" if file.of("rope.scaling.finetuned") else "nope"


_WINDOW = {"attention.sliding_window": "sliding_window"}
_TOP_K = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_MOE = {**_TOP_K, "expert_feed_forward_length": "moe_intermediate_size"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_PARTIAL = {"rope.dimension_count": "partial_rotary_factor"}
_ROUTER = {
    **_MOE,
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_LATENT = {
    **_ROUTER,
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "attention.value_length": "v_head_dim",
    "attention.value_length_mla": "v_head_dim",
}
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None}

_MAMBA = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
    "expert_shared_feed_forward_length": "intermediate_size",
    "feed_forward_length": "moe_intermediate_size",
}

ARCHITECTURES = {
    "llama": Architecture(family="llama", permuted=True),
    "llama with experts": Architecture(family="mixtral", permuted=True, keys=_TOP_K, values={"sliding_window": None}),
    "qwen2": Architecture(family="qwen2"),
    "qwen3": Architecture(family="qwen3"),
    "qwen2moe": Architecture(
        family="qwen2_moe",
        keys={**_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        values={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(family="qwen3_moe", keys=_MOE, values={"norm_topk_prob": True}),
    "gemma": Architecture(family="gemma"),
    "gemma2": Architecture(family="gemma2", keys={**_WINDOW, **_CAPS}, more=_gemma2),
    "gemma3": Architecture(family="gemma3_text", keys={**_WINDOW, **_CAPS}, values=_NO_CAPS, more=_gemma3),
    "phi2": Architecture(family="phi", keys=_PARTIAL),
    "phi3": Architecture(family="phi3", keys={**_WINDOW, **_PARTIAL}),
    "gpt2": Architecture(family="gpt2"),
    "gptneox": Architecture(
        family="gpt_neox", keys={**_PARTIAL, "use_parallel_residual": "use_parallel_residual"}, by_heads=True
    ),
    "starcoder2": Architecture(family="starcoder2", values={"use_bias": True}),
    "stablelm": Architecture(family="stablelm", keys={**_PARTIAL, "use_parallel_residual": "use_parallel_residual"}),
    "granite": Architecture(family="granite", permuted=True, keys=_GRANITE),
    "granitemoe": Architecture(family="granitemoe", permuted=True, keys={**_GRANITE, **_TOP_K}, joined=_GRANITE_MOE),
    "granitemoe with a shared expert": Architecture(
        family="granitemoeshared",
        permuted=True,
        keys={**_GRANITE, **_TOP_K, "expert_shared_feed_forward_length": "shared_intermediate_size"},
        joined=_GRANITE_MOE,
    ),
    "granitehybrid": Architecture(
        family="granitemoehybrid",
        permuted=True,
        keys={**_GRANITE, **_TOP_K, **_MAMBA},
        joined=_GRANITE_MOE,
        by_layer=("attention.head_count_kv",),
        more=_hybrid,
    ),
    "granitehybrid without experts": Architecture(
        family="granitemoehybrid",
        permuted=True,
        keys={**_GRANITE, **_MAMBA},
        values={"num_local_experts": 0},
        joined=_GRANITE_DENSE,
        by_layer=("attention.head_count_kv",),
        more=_hybrid,
    ),
    "smollm3": Architecture(family="smollm3", permuted=True),
    "arcee": Architecture(family="arcee", permuted=True),
    "olmo2": Architecture(family="olmo2"),
    "olmo2 with windows": Architecture(family="olmo3", keys=_WINDOW),
    "olmoe": Architecture(family="olmoe", keys=_TOP_K, values={"norm_topk_prob": False}),
    "exaone4": Architecture(family="exaone4", keys=_WINDOW, values={"sliding_window": None}),
    "command-r": Architecture(family="cohere", keys={"logit_scale": "logit_scale"}, more=_qk_norm_if_there),
    "cohere2": Architecture(family="cohere2", keys={**_WINDOW, "logit_scale": "logit_scale"}),
    "nemotron": Architecture(family="nemotron", keys=_PARTIAL),
    "glm4": Architecture(family="glm4", keys=_PARTIAL, values={"attention_bias": False}),
    "glm4moe": Architecture(
        family="glm4_moe",
        keys={**_ROUTER, **_PARTIAL, "nextn_predict_layers": "num_nextn_predict_layers"},
        values=_NO_GROUPS,
        more=_qk_norm_if_there,
    ),
    "ernie4_5": Architecture(family="ernie4_5"),
    "ernie4_5-moe": Architecture(
        family="ernie4_5_moe",
        keys={
            **_MOE,
            "expert_shared_count": "moe_num_shared_experts",
            "leading_dense_block_count": "moe_layer_start_index",
            "interleave_moe_layer_step": "moe_layer_interval",
        },
    ),
    "hunyuan-dense": Architecture(family="hunyuan_v1_dense"),
    "hunyuan-moe": Architecture(family="hunyuan_v1_moe", keys=_TOP_K),
    "gpt-oss": Architecture(family="gpt_oss", keys={**_WINDOW, **_TOP_K}, joined=_GPT_OSS),
    "llama4": Architecture(
        family="llama4_text",
        keys={**_MOE, "interleave_moe_layer_step": "interleave_moe_layer_step"},
        joined=_LLAMA4,
        more=_llama4,
    ),
    "deepseek2": Architecture(
        family="deepseek_v2",
        keys=_LATENT,
        values={**_NO_GROUPS, "routed_scaling_factor": 1.0, "mlp_bias": False},
        joined=_DEEPSEEK,
        more=_latent_heads,
    ),
    "deepseek2 with sigmoid scores": Architecture(
        family="deepseek_v3",
        keys=_LATENT,
        values={**_NO_GROUPS, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0},
        joined=_DEEPSEEK,
        more=_latent_heads,
    ),
    "seed_oss": Architecture(family="seed_oss"),
}
