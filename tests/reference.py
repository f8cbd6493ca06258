"""What transformers computes: the independent reference for parity tests, on CPU in float32.

Greedy decoding by whole forward passes, without a KV cache: slow, simple, and exact for sliding windows and rotary
scalings that change with the length.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Generated:
    """One prompt's greedy continuation."""

    prompt: list[int]
    tokens: list[int]
    """Generated, without the prompt; never stopped by an end-of-sequence token."""
    logprobs: torch.Tensor
    """float32 [len(prompt) + len(tokens), vocab]: log-softmax of the logits after each position, prompt included."""

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def margin(self) -> float:
        """Least distance in log-probability between a generated token and the next best one."""
        best = self.logprobs[len(self.prompt) - 1 : -1].topk(2).values
        return (best[:, 0] - best[:, 1]).min().item()


class References:
    """References to tiny checkpoints, computed once and kept beside them."""

    def __init__(self, tiny: Callable[[str], Path]):
        self.tiny = tiny

    def __call__(self, name: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generated]:
        folder = self.tiny(name)
        key = hashlib.sha256(json.dumps([prompts, max_tokens]).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
        file = folder.parent / f"{name}-{key}.npz"
        if not file.exists():
            _save(file, [greedy(folder, list(prompt), max_tokens) for prompt in prompts])
        with np.load(file) as stored:
            return [
                Generated(
                    prompt=list(prompt),
                    tokens=stored[f"tokens{i}"].tolist(),
                    logprobs=torch.from_numpy(stored[f"logprobs{i}"]),
                )
                for i, prompt in enumerate(prompts)
            ]


def _save(file: Path, generated: list[Generated]) -> None:
    arrays = {f"tokens{i}": np.array(g.tokens, dtype=np.int64) for i, g in enumerate(generated)}
    arrays |= {f"logprobs{i}": g.logprobs.numpy() for i, g in enumerate(generated)}
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        np.savez(part, **arrays)
    os.rename(part.name, file)


@lru_cache(maxsize=4)
def load(folder: Path):
    """The checkpoint as a transformers model. Eager attention: the only one that knows soft caps."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text_only = "text_config" not in json.loads((folder / "config.json").read_text())
    kind = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    text = getattr(model, "language_model", None)  # Llama 4's wrapper can't run without an image
    return (text if hasattr(text, "lm_head") else model).eval()


@torch.no_grad()
def score(folder: Path, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids), vocab]: log-softmax of the logits after each token."""
    return load(folder)(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def greedy(folder: Path, prompt: list[int], max_tokens: int) -> Generated:
    """The most likely next token, `max_tokens` times."""
    ids = list(prompt)
    logprobs = score(folder, ids)
    for _ in range(max_tokens):
        ids.append(int(logprobs[-1].argmax()))
        logprobs = score(folder, ids)
    return Generated(prompt=prompt, tokens=ids[len(prompt) :], logprobs=logprobs)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec, sinks=None) -> torch.Tensor:
    """Causal attention by an `AttentionSpec`, in float64: q [count, H, D], the last positions of k and v [length, K, D]
    -> [count, H, D]. `sinks` [H]: scores of a key whose value is zero."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key = torch.arange(k.shape[0], device=q.device)
    query = key[k.shape[0] - q.shape[0] :, None]
    seen = key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    if spec.chunk is not None:
        seen &= key >= query // spec.chunk * spec.chunk
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(key)], v)
