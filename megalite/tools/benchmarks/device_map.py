"""Generation by transformers with `device_map="auto"`, for `megalite plan --compare-device-map`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megalite.planner.generation import Workload

MOST_SEQUENCES = 8
"""Of a batch on a CPU, where it would take long."""


def measure(folder: Path, load: Workload, *, cuda: bool) -> tuple[dict[str, int], float, int]:
    """Layers on each device, output tokens a second of a batch of random prompts, and how many they were."""
    from transformers import AutoModelForCausalLM

    load_model: Any = AutoModelForCausalLM.from_pretrained  # untyped
    model = load_model(folder, device_map="auto", dtype="auto" if cuda else torch.float32)
    placed = getattr(model, "hf_device_map", None) or {"": str(model.device)}
    layers: Counter[str] = Counter()
    for name, device in placed.items():
        whole = name == ""
        layers[str(device)] += model.config.num_hidden_layers if whole else int(".layers." in f".{name}")
    rows = load.concurrency if cuda else min(load.concurrency, MOST_SEQUENCES)
    length, tokens = int(load.input.mean), load.output.high
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return dict(layers), rows * tokens / (time.perf_counter() - began), rows
