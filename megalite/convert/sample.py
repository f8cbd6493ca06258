"""A model run on given texts, whole and in float32, on the CPU of this process: for calibration and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.core.linear import settle
from megalite.core.parallel_state import ParallelState
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.json_text import lines
from megalite.model.attention import PackedAttention
from megalite.model.decoder import Decoder
from megalite.text.tokenizer import Tokenizer
from megalite.weights.folder import ModelFolder
from megalite.weights.transfer import build, load_folder

WINDOW = 1024
"""Tokens that see each other."""


def whole_model(folder: Path) -> Decoder:
    """The model of a folder in Hugging Face layout or of rank shards, weights as the numbers they stand for."""
    state = ParallelState(Layout())
    decoder = build(ModelFolder.open(folder).model, state, dtype=torch.float32, device=torch.device("cpu"))
    load_folder(decoder, folder)
    settle(decoder)
    return decoder.requires_grad_(False)


def tokenizer_of(folder: Path) -> Tokenizer:
    """CheckpointError if the model has none."""
    found = ModelFolder.open(folder).tokenizer
    if found is None:
        raise CheckpointError(f"{folder}: has no tokenizer, so it can't read text")
    return found


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the lines of a JSON lines file, each an object with a string `text` or `prompt`, or a string."""
    found = []
    with open(path, "rb") as file:
        for line in lines(file):
            value = line.value if not isinstance(line.value, dict) else line.value.get("text", line.value.get("prompt"))
            if line.problem is not None or not isinstance(value, str):
                rule = f"line {line.number} of {path} {line.problem or 'has no text or prompt'}"
                raise ConfigError(Problem(key="--calibrate", rule=rule, fix='Write lines like {"text": "..."}.'))
            found.append(tokenizer.encode(value))
    return [ids for ids in found if ids]


def windows(ids: Sequence[int], model_length: int) -> Iterator[list[int]]:
    """Token ids in pieces as long as may be."""
    step = min(WINDOW, model_length)
    for first in range(0, len(ids), step):
        yield list(ids[first : first + step])


@torch.no_grad()
def perplexity(folder: Path, text: str) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of the tokens of a text, each given those before it in its window
    of WINDOW tokens; and the number of those tokens."""
    decoder, tokenizer = whole_model(folder), tokenizer_of(folder)
    total, count = 0.0, 0
    for ids in windows(tokenizer.encode(text), decoder.config.max_position_embeddings):
        if len(ids) < 2:
            continue
        hidden = decoder(torch.tensor(ids), PackedAttention([len(ids)]))
        logprobs: Tensor = decoder.logits(hidden).float().log_softmax(-1)[:-1]
        total -= float(logprobs.gather(1, torch.tensor(ids)[1:, None]).double().sum())
        count += len(ids) - 1
    if count == 0:
        raise ConfigError(Problem(key="--text", rule="must hold two tokens at least"))
    return math.exp(total / count), count
