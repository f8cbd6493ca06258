"""Models that benchmarks make at random, so that none has to be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
}
"""What config.json says of each."""


def save_random(name: str, folder: Path) -> str:
    """Save a model of the shape in Hugging Face layout, with random float32 weights; gives the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config  # untyped
    make(AutoConfig.for_model(**SHAPES[name])).save_pretrained(folder)
    return str(folder)
