"""Writes a Hugging Face folder as a GGUF file in float32, the way llama.cpp's converter does, without a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

Values = dict[str, Any]
Named = Iterator[tuple[str, np.ndarray]]


def permuted(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head whose halves are rotated, as those whose neighbours are."""
    halves = data.reshape(heads, 2, -1, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def same(name: str, data: np.ndarray, values: Values) -> Named:
    yield name, data


def llama(name: str, data: np.ndarray, values: Values) -> Named:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((key for part, key in heads.items() if f".{part}." in name), None)
    yield name, data if key is None else permuted(data, values[key])


def raised_norms(name: str, data: np.ndarray, values: Values) -> Named:
    yield name, data + np.float32(1) if name.endswith("norm.weight") else data


def corrected(name: str, data: np.ndarray, values: Values) -> Named:
    yield name.replace("e_score_correction_bias", "e_score_correction.bias"), data.squeeze()


def squeezed(name: str, data: np.ndarray, values: Values) -> Named:
    yield name, data.squeeze()


def by_kind(name: str, data: np.ndarray, values: Values) -> Named:
    """GPT-NeoX: queries of all heads, then their keys, then their values."""
    if ".query_key_value." in name:
        apart = data.reshape(values["num_attention_heads"], 3, -1, *data.shape[1:])
        data = np.concatenate([apart[:, part].reshape(-1, *data.shape[1:]) for part in range(3)])
    yield name, data


def granite_moe(name: str, data: np.ndarray, values: Values) -> Named:
    layer = re.search(r"layers\.(\d+)", name)
    for end, kind in ((".block_sparse_moe.input_linear.weight", "exps"), (".shared_mlp.input_linear.weight", "shexp")):
        if layer is not None and name.endswith(end):
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=-2), strict=True):
                yield f"blk.{layer[1]}.ffn_{part}_{kind}.weight", half
            return
    yield from llama(name, data, values)


def granite_hybrid(name: str, data: np.ndarray, values: Values) -> Named:
    """The state space of Mamba-2, and the rest as of Granite; without experts the shared one is the MLP."""
    layer = re.search(r"layers\.(\d+)", name)
    dense = not values["num_local_experts"]
    if dense and name.endswith(".shared_mlp.input_linear.weight"):
        for part, half in zip(("gate", "up"), np.split(data, 2), strict=True):
            yield f"blk.{layer[1]}.ffn_{part}.weight", half
    elif dense and name.endswith(".shared_mlp.output_linear.weight"):
        yield f"blk.{layer[1]}.ffn_down.weight", data
    elif name.endswith(".A_log"):
        yield name, -np.exp(data)[:, None]
    elif name.endswith(".mamba.D"):
        yield name, data[:, None]
    elif name.endswith(".mamba.norm.weight"):
        yield name, data.reshape(values["mamba_n_groups"], -1)
    elif name.endswith(".conv1d.weight"):
        yield name, data.squeeze()
    else:
        yield from granite_moe(name.replace(".dt_bias", ".dt_proj.bias"), data, values)


def gpt_oss(name: str, data: np.ndarray, values: Values) -> Named:
    if ".experts.gate_up_proj" in name:
        end = "bias" if name.endswith("_bias") else "weight"
        data = data if end == "bias" else data.swapaxes(-1, -2)
        rows = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
        for part, at in zip(("gate", "up"), rows, strict=True):
            yield re.sub(r"gate_up_proj(_bias)?$", f"{part}_proj.{end}", name), data[at]
        return
    if ".experts.down_proj" in name:
        bias = name.endswith("_bias")
        yield name.removesuffix("_bias") + (".bias" if bias else ".weight"), data if bias else data.swapaxes(-1, -2)
        return
    yield name + ".weight" if name.endswith("sinks") else name, data


def llama4(name: str, data: np.ndarray, values: Values) -> Named:
    if name.endswith(".experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), np.split(data.swapaxes(-1, -2), 2, axis=-2), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
        return
    turned = name.endswith(".experts.down_proj")
    yield (name + ".weight", data.swapaxes(-1, -2)) if turned else (name, data)


def latent(name: str, data: np.ndarray, values: Values) -> Named:
    if not name.endswith("kv_b_proj.weight"):
        yield from corrected(name, data, values)
        return
    plain, heads = values["qk_nope_head_dim"], values["num_attention_heads"]
    by_head = data.reshape(heads, plain + values["v_head_dim"], -1)
    yield name.replace("kv_b_proj", "k_b_proj"), by_head[:, :plain].swapaxes(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), by_head[:, plain:]


@dataclass(frozen=True)
class Written:
    """How one architecture is written."""

    arch: str
    change: Callable[[str, np.ndarray, Values], Named] = same
    more: Callable[[gguf.GGUFWriter, Values], None] | None = None


def _partial(writer: gguf.GGUFWriter, values: Values) -> None:
    rope = values.get("rope_parameters") or {}
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))


def _neox(writer: gguf.GGUFWriter, values: Values) -> None:
    _partial(writer, values)
    writer.add_parallel_residual(values["use_parallel_residual"])


def _multipliers(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_attention_scale(values["attention_multiplier"])
    writer.add_embedding_scale(values["embedding_multiplier"])
    writer.add_residual_scale(values["residual_multiplier"])
    writer.add_logit_scale(values["logits_scaling"])
    if values.get("shared_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(values["shared_intermediate_size"])


def _hybrid(writer: gguf.GGUFWriter, values: Values) -> None:
    _multipliers(writer, values)
    writer.add_ssm_conv_kernel(values["mamba_d_conv"])
    writer.add_ssm_state_size(values["mamba_d_state"])
    writer.add_ssm_group_count(values["mamba_n_groups"])
    writer.add_ssm_inner_size(values["mamba_expand"] * values["hidden_size"])
    writer.add_ssm_time_step_rank(values["mamba_n_heads"])
    attends = [one in ("attention", "full_attention") for one in values["layer_types"]]
    writer.add_head_count_kv([values["num_key_value_heads"] if one else 0 for one in attends])
    writer.add_rope_scaling_finetuned(values["position_embedding_type"] == "rope")


def _windows(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_sliding_window(values["sliding_window"])
    writer.add_sliding_window_pattern([one == "sliding_attention" for one in values["layer_types"]])


def _cohere(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_logit_scale(values["logit_scale"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere2(writer: gguf.GGUFWriter, values: Values) -> None:
    _cohere(writer, values)
    _windows(writer, values)


def _experts(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_expert_feed_forward_length(values["moe_intermediate_size"])


def _qwen2_moe(writer: gguf.GGUFWriter, values: Values) -> None:
    _experts(writer, values)
    writer.add_expert_shared_feed_forward_length(values["shared_expert_intermediate_size"])


def _router(writer: gguf.GGUFWriter, values: Values) -> None:
    _experts(writer, values)
    writer.add_expert_count(values["n_routed_experts"])
    writer.add_expert_shared_count(values["n_shared_experts"])
    writer.add_leading_dense_block_count(values["first_k_dense_replace"])
    writer.add_expert_weights_scale(values["routed_scaling_factor"])
    if values["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)


def _glm4_moe(writer: gguf.GGUFWriter, values: Values) -> None:
    _router(writer, values)
    _partial(writer, values)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _latent(writer: gguf.GGUFWriter, values: Values) -> None:
    _router(writer, values)
    if values["q_lora_rank"]:
        writer.add_q_lora_rank(values["q_lora_rank"])
    turned, rank = values["qk_rope_head_dim"], values["kv_lora_rank"]
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(values["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(values["v_head_dim"])
    writer.add_rope_dimension_count(turned)
    sigmoid = values["model_type"] == "deepseek_v3"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(2 if sigmoid else 1))
    scale = values["rope_parameters"].get("mscale_all_dim")
    if scale is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)


def _ernie_moe(writer: gguf.GGUFWriter, values: Values) -> None:
    _experts(writer, values)
    writer.add_expert_count(values["moe_num_experts"])
    writer.add_expert_used_count(values["moe_k"])
    writer.add_expert_shared_count(values["moe_num_shared_experts"])
    writer.add_leading_dense_block_count(values["moe_layer_start_index"])
    writer.add_interleave_moe_layer_step(values["moe_layer_interval"])


def _hunyuan_moe(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_expert_used_count(values["moe_topk"])
    writer.add_expert_shared_feed_forward_length(values["intermediate_size"])


def _gpt_oss(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_sliding_window(values["sliding_window"])
    writer.add_expert_feed_forward_length(values["intermediate_size"])


def _llama4(writer: gguf.GGUFWriter, values: Values) -> None:
    writer.add_feed_forward_length(values["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(values["intermediate_size"])
    writer.add_interleave_moe_layer_step(values["interleave_moe_layer_step"])


ARCHITECTURES = {
    "qwen2_moe": Written("qwen2moe", squeezed, _qwen2_moe),
    "gpt_neox": Written("gptneox", by_kind, _neox),
    "phi": Written("phi2", same, _partial),
    "nemotron": Written("nemotron", raised_norms, _partial),
    "granitemoe": Written("granitemoe", granite_moe, _multipliers),
    "granitemoeshared": Written("granitemoe", granite_moe, _multipliers),
    "granitemoehybrid": Written("granitehybrid", granite_hybrid, _hybrid),
    "olmo2": Written("olmo2"),
    "olmo3": Written("olmo2", same, _windows),
    "olmoe": Written("olmoe"),
    "exaone4": Written("exaone4", same, _windows),
    "cohere": Written("command-r", same, _cohere),
    "cohere2": Written("cohere2", same, _cohere2),
    "glm4": Written("glm4", same, _partial),
    "glm4_moe": Written("glm4moe", corrected, _glm4_moe),
    "ernie4_5": Written("ernie4_5"),
    "ernie4_5_moe": Written("ernie4_5-moe", corrected, _ernie_moe),
    "hunyuan_v1_dense": Written("hunyuan-dense"),
    "hunyuan_v1_moe": Written("hunyuan-moe", same, _hunyuan_moe),
    "gpt_oss": Written("gpt-oss", gpt_oss, _gpt_oss),
    "llama4_text": Written("llama4", llama4, _llama4),
    "deepseek_v2": Written("deepseek2", latent, _latent),
    "deepseek_v3": Written("deepseek2", latent, _latent),
    "seed_oss": Written("seed_oss"),
    "smollm3": Written("smollm3", llama),
    "gemma3_text": Written("gemma3", raised_norms, _windows),
}
"""By `model_type`."""


def write(folder: Path, out: Path) -> None:
    """The model of a folder as a GGUF file."""
    values = json.loads((folder / "config.json").read_text())
    how = ARCHITECTURES[values["model_type"]]
    writer = gguf.GGUFWriter(out, how.arch)
    _usual(writer, values)
    if how.more is not None:
        how.more(writer, values)
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[how.arch]
    names = gguf.get_tensor_name_map(arch, values["num_hidden_layers"])
    for name, data in _stacked(load_file(folder / "model.safetensors")):
        if name == "lm_head.weight" and values["tie_word_embeddings"]:
            continue
        for changed, part in how.change(name, data, values):
            mapped = names.get_name(changed, try_suffixes=(".weight", ".bias"))
            assert mapped is not None, changed
            writer.add_tensor(mapped, np.ascontiguousarray(part, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _usual(writer: gguf.GGUFWriter, values: Values) -> None:
    """What the converter says of every model; see its `TextModel.set_gguf_parameters`."""
    rope = values.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    latent_model = "kv_lora_rank" in values
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_head_count(values["num_attention_heads"])
    kv_heads = 1 if latent_model else values.get("num_key_value_heads") or values["num_attention_heads"]
    if "mamba_n_heads" not in values and values["model_type"] != "gpt_neox":
        writer.add_head_count_kv(kv_heads)
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    theta = rope.get("rope_theta", 10000.0)
    if rope.get("alpha"):
        head = values["head_dim"]
        theta *= rope["alpha"] ** (head / (head - 2))
    writer.add_rope_freq_base(theta)
    local = (values.get("rope_parameters") or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    for keys, add in (
        (("intermediate_size",), writer.add_feed_forward_length),
        (("rms_norm_eps", "norm_eps"), writer.add_layer_norm_rms_eps),
        (("layer_norm_eps", "norm_eps"), writer.add_layer_norm_eps),
        (("num_local_experts", "num_experts"), writer.add_expert_count),
        (("num_experts_per_tok",), writer.add_expert_used_count),
        (("n_group",), writer.add_expert_group_count),
        (("topk_group",), writer.add_expert_group_used_count),
    ):
        found = next((values[key] for key in keys if values.get(key) is not None), None)
        if found is not None:
            add(found)
    if values.get("head_dim") is not None and not latent_model:
        writer.add_key_length(values["head_dim"])
        writer.add_value_length(values["head_dim"])


def _stacked(tensors: dict[str, np.ndarray]) -> Named:
    """Those of all experts together."""
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, data in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", name)
        if match is None:
            yield name, data
        else:
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = data
    for name, one in experts.items():
        yield name, np.stack([one[index] for index in range(len(one))])
