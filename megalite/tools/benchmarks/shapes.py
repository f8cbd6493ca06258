"""Models that benchmarks make at random, so that none has to be downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megalite.tools.benchmarks.convert import GENERATE

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-10M": {  # checkpoints/demo
        "model_type": "qwen3",
        "hidden_size": 320,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "llama-34M": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-8B": {  # Llama 3.1
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
"""What config.json says of each."""


def _compressed(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
for _name, _config in {
    "int4": _compressed("pack-quantized", _INT4),
    "fp8": _compressed("float-quantized", _FP8),
    "fp8-blocks": _BLOCKS,
}.items():
    SHAPES[f"llama-8B-{_name}"] = {**SHAPES["llama-8B"], "quantization_config": _config}


def save_config(name: str, folder: Path) -> str:
    """Save a shape without weights, for `load_format="dummy"`, and a tokenizer of its size; gives the folder.

    The tokenizer has 256 bytes, and then words that are numbers; it has no merges.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPES[name], "dtype": "bfloat16"}))
    size = SHAPES[name]["vocab_size"]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as they are
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    words = [f"{chr(288)}{number}" for number in range(size - len(letters))]  # 288 stands for a space
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(letters + words)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return str(folder)


def save_weights(name: str, folder: Path) -> None:
    """Save random bfloat16 weights of a shape, in files of at most 5 GB."""
    values = json.dumps({**SHAPES[name], "dtype": "bfloat16"})
    subprocess.run([sys.executable, "-c", GENERATE, str(folder), values], check=True)


def save_random(name: str, folder: Path) -> str:
    """Save a model of the shape in Hugging Face layout, with random float32 weights; gives the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config  # untyped
    make(AutoConfig.for_model(**SHAPES[name])).save_pretrained(folder)
    return str(folder)
