"""Tiny checkpoints in quantized formats, written with numpy by the formats' documentation, and the same as numbers.

Codes, scales and zero points are drawn at random, so that every code occurs; the dense twin holds (code - zero) * scale
in float32. Intermediate widths are five groups, so that two tp ranks have unequal shares.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 64, 5 * GROUP, 2, 4, 2, 32
VOCAB = 96
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Column that each nibble of an int32 holds, from the lowest."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    config: dict[str, Any]
    """quantization_config."""
    make: Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]
    """(rng, rows, columns) -> stored tensors, dense weight float32."""
    head: bool = False
    """The output head is stored so too."""


def with_head(kind: Kind) -> Kind:
    """The same with a head in codes, as config.json says it of the kind."""
    config = {**kind.config}
    for key in config.keys() & {"ignore", "modules_to_not_convert"}:
        config[key] = [name for name in config[key] if name != "lm_head"]
    return Kind(config if "ignore" in config else {**config, "lm_head": True}, kind.make, head=True)


def grouped(rng, rows, columns, group, bits, *, symmetric, act_order=False):
    """codes [N, K], zeros [N, G], scales [N, G], g_idx [K], dense weight."""
    group = columns if group == -1 else group
    groups = columns // group
    codes = rng.integers(0, 1 << bits, (rows, columns))
    middle = 1 << (bits - 1)
    zeros = np.full((rows, groups), middle) if symmetric else rng.integers(0, 1 << bits, (rows, groups))
    scales = (rng.uniform(0.5, 1.5, (rows, groups)) * 2.5 / (1 << bits) / columns**0.5).astype(np.float16)
    index = np.arange(columns) // group
    if act_order:
        index = rng.permutation(index)
    dense = (codes - zeros[:, index]).astype(np.float32) * scales[:, index].astype(np.float32)
    return codes, zeros, scales, index, dense


def pack(values: np.ndarray, bits: int, axis: int, order=None) -> torch.Tensor:
    """Codes along an axis into int32, the first in the lowest bits; `order`: which of them each place holds."""
    per = 32 // bits
    values = np.moveaxis(values, axis, -1).astype(np.uint64)
    values = values.reshape(*values.shape[:-1], -1, per)[..., order or range(per)]
    words = (values << (np.arange(per, dtype=np.uint64) * bits)).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def gptq(bits=4, group=GROUP, *, symmetric=True, act_order=False, version=1, bias=False) -> Kind:
    """`version` 1: zero points are less by one, subtracted from the words. `bias`: of zeros, which old tools wrote."""

    def make(rng, rows, columns):
        codes, zeros, scales, index, dense = grouped(
            rng, rows, columns, group, bits, symmetric=symmetric, act_order=act_order
        )
        less = (version == 1) * {4: 0x11111111, 8: 0x01010101}[bits]
        return {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(zeros.T, bits, 1) - less,
            "scales": tensor(scales.T),
            "g_idx": tensor(index.astype(np.int32)),
            **({"bias": torch.zeros(rows, dtype=torch.float16)} if bias else {}),
        }, dense

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return Kind(config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), make)


def awq() -> Kind:
    def make(rng, rows, columns):
        codes, zeros, scales, _, dense = grouped(rng, rows, columns, GROUP, 4, symmetric=False)
        packed = {"qweight": pack(codes.T, 4, 1, AWQ_ORDER), "qzeros": pack(zeros.T, 4, 1, AWQ_ORDER)}
        return {**packed, "scales": tensor(scales.T)}, dense

    return Kind({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, make)


def compressed(format: str, weights: dict[str, Any], make, inputs: dict[str, Any] | None = None) -> Kind:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate$", "re:.*mlp.gate$"],
    }
    return Kind(config, make)


def packed(bits=4, group=GROUP, *, symmetric=True, act_order=False) -> Kind:
    def make(rng, rows, columns):
        codes, zeros, scales, index, dense = grouped(
            rng, rows, columns, group, bits, symmetric=symmetric, act_order=act_order
        )
        stored = {
            "weight_packed": pack(codes, bits, 1),
            "weight_scale": tensor(scales.astype(np.float32)),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            stored["weight_zero_point"] = pack(zeros, bits, 0)
        if act_order:
            stored["weight_g_idx"] = tensor(index.astype(np.int32))
        return stored, dense

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights |= {"actorder": "group"} if act_order else {}
    return compressed("pack-quantized", weights, make)


def element_codes(rng, rows, columns, dtype=torch.float8_e4m3fn):
    if dtype == torch.int8:
        return torch.from_numpy(rng.integers(-127, 128, (rows, columns)).astype(np.int8))
    return torch.from_numpy((rng.standard_normal((rows, columns)) * 60).astype(np.float32)).to(dtype)


def scale_of(rng, columns, shape, size=60):
    return (rng.uniform(0.5, 1.5, shape) / size / columns**0.5).astype(np.float32)


def by_row(dtype=torch.float8_e4m3fn) -> Kind:
    def make(rng, rows, columns):
        codes, scale = element_codes(rng, rows, columns, dtype), scale_of(rng, columns, (rows, 1))
        return {"weight": codes, "weight_scale": tensor(scale)}, codes.float().numpy() * scale

    number = "int" if dtype == torch.int8 else "float"
    weights = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token", "dynamic": True}
    return compressed(f"{number}-quantized", weights, make, inputs)


def by_matrix() -> Kind:
    def make(rng, rows, columns):
        codes, scale = element_codes(rng, rows, columns), scale_of(rng, columns, (1,))
        stored = {"weight": codes, "weight_scale": tensor(scale), "input_scale": torch.tensor([0.02])}
        return stored, codes.float().numpy() * scale

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return compressed("float-quantized", weights, make, inputs)


def by_scalar() -> Kind:
    """vLLM's fp8, whose scales have no dimension."""

    def make(rng, rows, columns):
        codes, scale = element_codes(rng, rows, columns), scale_of(rng, columns, ())
        return {"weight": codes, "weight_scale": torch.tensor(float(scale))}, codes.float().numpy() * scale

    return Kind({"quant_method": "fp8", "activation_scheme": "dynamic"}, make)


def by_block(width=GROUP) -> Kind:
    def make(rng, rows, columns):
        codes = element_codes(rng, rows, columns)
        scale = scale_of(rng, columns, (-(-rows // GROUP), -(-columns // width)))
        wide = scale.repeat(GROUP, 0)[:rows].repeat(width, 1)[:, :columns]
        return {"weight": codes, "weight_scale_inv": tensor(scale)}, codes.float().numpy() * wide

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, width]}
    return Kind({**config, "modules_to_not_convert": ["lm_head", "gate"]}, make)


KINDS: dict[str, Kind] = {
    "gptq": gptq(),
    "gptq_8_bits_v2": gptq(8, version=2, symmetric=False),
    "gptq_one_group": gptq(group=-1, symmetric=False, bias=True),
    "gptq_act_order": with_head(gptq(act_order=True, symmetric=False)),
    "awq": with_head(awq()),
    "packed_4": with_head(packed()),
    "packed_4_zeros": with_head(packed(symmetric=False)),
    "packed_act_order": packed(symmetric=False, act_order=True),
    "packed_8_rows": packed(8, -1),
    "fp8_rows": by_row(),
    "fp8_static": by_matrix(),
    "fp8_scalar": by_scalar(),
    "fp8_blocks": by_block(),
    "fp8_uneven": with_head(by_block(2 * GROUP)),
    "int8_rows": by_row(torch.int8),
}


def write(kind: str, quantized: Path, dense: Path, *, family: str = "llama", dtype: str = "float32") -> None:
    """Both folders of a model: with codes, and as numbers."""
    rng = np.random.default_rng(7)
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mixtral":
        values |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        values |= {"num_local_experts": 3, "num_experts_per_tok": 2, "rope_parameters": {"rope_theta": 1e6}}
    stored: Tensors = {}
    numbers: Tensors = {}

    def plain(name: str, made: np.ndarray) -> None:
        stored[name] = numbers[name] = tensor(made.astype(np.float32)).to(getattr(torch, dtype))

    def matrix(name: str, rows: int, columns: int) -> None:
        made, weight = KINDS[kind].make(rng, rows, columns)
        stored.update({f"{name}.{part}": values for part, values in made.items()})
        numbers[f"{name}.weight"] = tensor(weight).to(getattr(torch, dtype))

    plain("model.embed_tokens.weight", rng.standard_normal((VOCAB, HIDDEN)) * 0.4)
    if KINDS[kind].head:
        matrix("lm_head", VOCAB, HIDDEN)
    else:
        plain("lm_head.weight", rng.standard_normal((VOCAB, HIDDEN)) * 3 / HIDDEN**0.5)
    plain("model.norm.weight", rng.normal(1, 0.3, HIDDEN))
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{at}.{norm}.weight", rng.normal(1, 0.3, HIDDEN))
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            matrix(f"{at}.self_attn.{name}", heads * HEAD, HIDDEN)
        matrix(f"{at}.self_attn.o_proj", HIDDEN, HEADS * HEAD)
        if family == "mixtral":
            plain(f"{at}.block_sparse_moe.gate.weight", rng.standard_normal((3, HIDDEN)) / HIDDEN**0.5)
            for expert in range(3):
                matrix(f"{at}.block_sparse_moe.experts.{expert}.w1", INNER, HIDDEN)
                matrix(f"{at}.block_sparse_moe.experts.{expert}.w3", INNER, HIDDEN)
                matrix(f"{at}.block_sparse_moe.experts.{expert}.w2", HIDDEN, INNER)
        else:
            matrix(f"{at}.mlp.gate_proj", INNER, HIDDEN)
            matrix(f"{at}.mlp.up_proj", INNER, HIDDEN)
            matrix(f"{at}.mlp.down_proj", HIDDEN, INNER)
    _save(quantized, stored, {**values, "quantization_config": KINDS[kind].config})
    _save(dense, numbers, values)


def _save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


CACHE_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
CACHE_SCALES = 0.013, 0.0071
"""Of the first layer's keys and values; of the second twice as much."""


def with_cache_scales(folder: Path, out: Path, names=("k_scale", "v_scale"), scheme: Any = CACHE_SCHEME) -> None:
    """A copy of a model with scales of keys and values of each layer, and one of queries, which is not used."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        for index, name in enumerate((*names, "q_scale")):
            scale = torch.tensor((*CACHE_SCALES, 1.0)[index]) * (layer + 1)
            tensors[f"model.layers.{layer}.self_attn.{name}"] = scale.view(1) if index else scale
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["kv_cache_scheme"] = scheme
    _save(out, tensors, values)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
EXPERTS, WIDTH = 3, 3 * GROUP


def microscaled(rng, rows, columns):
    """Of all experts: blocks, exponents, and the weight [E, columns, rows], as it is stored as numbers."""
    codes = rng.integers(0, 16, (EXPERTS, rows, columns // 32, 32))
    exponents = rng.integers(122, 126, codes.shape[:3])
    weight = E2M1[codes] * 2.0 ** (exponents[..., None] - 127)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    dense = weight.reshape(EXPERTS, rows, columns).transpose(0, 2, 1)
    return tensor(blocks), tensor(exponents.astype(np.uint8)), tensor(dense.astype(np.float32))


def write_mxfp4(quantized: Path, dense: Path) -> None:
    """Both folders of a model as gpt-oss is stored, with codes of its experts and as numbers."""
    rng = np.random.default_rng(11)
    values: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "dtype": "float32",
        "eos_token_id": 2,
    }
    tensors: Tensors = {}

    def plain(name: str, *shape: int, mean: float = 0.0, std: float = 0.3) -> None:
        tensors[name] = tensor(rng.normal(mean, std, shape).astype(np.float32))

    def linear(name: str, rows: int, columns: int) -> None:
        plain(f"{name}.weight", rows, columns, std=columns**-0.5)
        plain(f"{name}.bias", rows)

    plain("model.embed_tokens.weight", VOCAB, HIDDEN, std=0.4)
    plain("lm_head.weight", VOCAB, HIDDEN, std=3 / HIDDEN**0.5)
    plain("model.norm.weight", HIDDEN, mean=1)
    codes: Tensors = {}
    numbers: Tensors = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{at}.{norm}.weight", HIDDEN, mean=1)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            linear(f"{at}.self_attn.{name}", heads * HEAD, HIDDEN)
        linear(f"{at}.self_attn.o_proj", HIDDEN, HEADS * HEAD)
        plain(f"{at}.self_attn.sinks", HEADS)
        linear(f"{at}.mlp.router", EXPERTS, HIDDEN)
        for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            param = f"{at}.mlp.experts.{name}"
            plain(f"{param}_bias", EXPERTS, rows)
            codes[f"{param}_blocks"], codes[f"{param}_scales"], numbers[param] = microscaled(rng, rows, columns)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    _save(quantized, {**tensors, **codes}, {**values, "quantization_config": config})
    _save(dense, {**tensors, **numbers}, values)
