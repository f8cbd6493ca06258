"""How a layer attends: contexts that `Decoder.forward` is given. The model never asks whether it trains or generates.

`PackedAttention` runs whole sequences laid end to end (training, scoring a batch). Generation reads and writes a paged
KV cache: `HostAttention` in host memory, `DeviceAttention` on an accelerator. All take q [T, H, D], k and v [T, K, D]
with H a multiple of K, and give [T, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from megalite.model.config import AttentionSpec
from megalite.model.kernels import packed_attention


class AttentionContext(Protocol):
    """What a forward pass needs to know about the tokens it is given."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence: int64 [T]."""

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of layer `spec.layer`: [T, H, D], [T, K, D], [T, K, D] -> [T, H, D]."""


class PackedAttention:
    """Whole sequences end to end: token t of the pack belongs to one of `lengths`; nothing is kept afterwards."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.longest = max(lengths)
        self.cu_lengths = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.cu_lengths, self.longest, spec)
