"""How a layer attends: contexts that `Decoder.forward` is given. The model never asks whether it trains or generates.

`PackedAttention` runs whole sequences laid end to end (training, scoring a batch). Generation reads and writes a paged
KV cache: `HostAttention` in host memory, `DeviceAttention` on an accelerator. All take q [T, H, D], k and v [T, K, D]
with H a multiple of K, and give [T, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate, groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite.model.config import AttentionSpec

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

_GROUPED = {"enable_gqa": True} if varlen_attn and "enable_gqa" in signature(varlen_attn).parameters else {}
"""Some versions of torch want to be told that query heads share key and value heads."""
CHUNK = 512
"""Queries whose scores exist at a time where no fused attention of torch can be used."""


class AttentionContext(Protocol):
    """What a forward pass needs to know about the tokens it is given."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence: int64 [T]."""

    @property
    def lengths(self) -> Tensor:
        """Longest length that each token's sequence is meant to get: int64 [T]. Of that its rotation may depend."""

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of layer `spec.layer`: [T, H, D], [T, K, D], [T, K, D] -> [T, H, D]."""


class PackedAttention:
    """Whole sequences end to end: token t of the pack belongs to one of `lengths`; nothing is kept afterwards.

    Nothing is padded. Neighbours of one length are attended to as a batch: sequences in the order of their lengths, as
    `packing.pack` puts them, need at most sqrt(2 T) batches for T tokens. A GPU attends to all of them in one kernel
    where torch has one: float16 or bfloat16, no softcap.

    `beyond`: further tokens of each sequence that are not in the pack, because they are targets only.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", *, beyond: int = 0):
        self.longest = max(lengths)
        self.runs = [(len(list(alike)), length) for length, alike in groupby(lengths)]
        """Number of neighbours alike, and their length."""
        self.cu_lengths = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.lengths = torch.cat([torch.full((length,), length + beyond, device=device) for length in lengths])

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """With gradients."""
        if q.shape[1] == 0:
            return torch.empty_like(q)
        ragged = len(self.runs) > 1 or (spec.window is not None and spec.window < self.longest)
        if ragged and _has_varlen(q, spec):
            left = -1 if spec.window is None else spec.window - 1
            place = (self.cu_lengths, self.cu_lengths, self.longest, self.longest)
            return varlen_attn(q, k, v, *place, scale=spec.scale, window_size=(left, 0), **_GROUPED)
        sizes = [count * length for count, length in self.runs]
        attended = []
        for run, *parts in zip(self.runs, *(x.split(sizes) for x in (q, k, v)), strict=True):
            out = _attend_batch(*(x.unflatten(0, run).transpose(1, 2) for x in parts), spec)  # [B, H, L, D]
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _has_varlen(q: Tensor, spec: AttentionSpec) -> bool:
    """Whether torch's variable-length attention, which is FlashAttention-2, can do it."""
    return (
        varlen_attn is not None
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and spec.softcap is None
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _attend_batch(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Sequences of one length, q [B, H, L, D], k and v [B, K, L, D] -> [B, H, L, D]. What runs:

    - no softcap, no window below L: torch's fused causal attention, FlashAttention but for float32 on CUDA, where it is
      the memory-efficient kernel;
    - a window: the memory-efficient kernel with a mask [L, L];
    - a softcap: the scores are written out, `CHUNK` queries at a time, and made again in the backward pass.
    """
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    window = spec.window if spec.window is not None and spec.window < length else None
    if spec.softcap is None and window is None and not (q.is_cuda and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=group > 1)
    if group > 1:  # only flash attention knows groups; without this the others would fall back to written-out scores
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if spec.softcap is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
    if spec.softcap is None:
        mask = _seen(0, length, 0, length, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    chunks = []
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        low = 0 if window is None else max(0, first - window + 1)
        mask = _seen(first, last, low, last, window, q.device)
        parts = q[:, :, first:last], k[:, :, low:last], v[:, :, low:last]
        chunks.append(checkpoint(_attend_capped, *parts, mask, spec, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(chunks, 2)


def _seen(first: int, last: int, low: int, high: int, window: int | None, device: torch.device) -> Tensor:
    """bool [last - first, high - low]: which keys low..high the queries first..last see."""
    query = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(low, high, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    scores = spec.softcap * torch.tanh(q.float() @ k.float().mT * (spec.scale / spec.softcap))
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).type_as(v) @ v
