"""Models that benchmarks make at random, so that none has to be downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megalite.convert.convert import NewFolder
from megalite.convert.output import SILENT
from megalite.files import as_json
from megalite.model import families
from megalite.text.detokenizer import BYTES
from megalite.weights.folder import CONFIG
from megalite.weights.rounding import Elements
from megalite.weights.side_files import SideFiles
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import TensorInfo


def decoder(kind: str, layers: int, hidden: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """What config.json says of a decoder: model type, layers, width of the stream, heads, width of the MLP."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {
        "model_type": kind,
        **sizes,
        **heads_,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-10M": decoder(  # checkpoints/demo
        *("qwen3", 8, 320, 8, 2, 768),
        head_dim=64,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    "llama-34M": decoder(
        *("llama", 8, 512, 8, 8, 1408),
        vocab_size=8192,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen3-0.6B": decoder("qwen3", 28, 1024, 16, 8, 3072, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "llama-8B": decoder(  # Llama 3.1
        "llama", 32, 4096, 32, 8, 14336, vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5
    ),
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
    space = next(letter for letter, byte in BYTES.items() if byte == ord(" "))
    words = [f"{space}{number}" for number in range(size - len(BYTES))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate([*BYTES, *words])}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return str(folder)


def save_weights(values: dict[str, Any], folder: Path) -> None:
    """Save a model of such a config.json with random bfloat16 weights, in files of at most 5 GB."""
    model = families.from_values(folder / CONFIG, values)
    random = np.random.default_rng(0)
    pool = random.integers(0, 1 << 16, 32 << 20, np.uint16) & 0x80FF | 0x3B00

    def make(name: str, info: TensorInfo) -> Iterator[Elements]:
        left = info.nbytes // 2
        while left:
            start = int(random.integers(0, 1 << 20))
            yield (part := pool[start : start + min(left, 30 << 20)])
            left -= len(part)

    beside: SideFiles = {CONFIG: as_json({**values, "dtype": "bfloat16"}).encode()}
    dtypes = dict.fromkeys(hf_shapes(model), "BF16")
    NewFolder(model, folder, dtypes, beside, ["random", values], overwrite=True).write(make, SILENT)


def save_random(name: str, folder: Path) -> str:
    """Save a model of the shape in Hugging Face layout, with random float32 weights; gives the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config  # untyped
    make(AutoConfig.for_model(**SHAPES[name])).save_pretrained(folder)
    return str(folder)
