"""Attention over a paged KV cache on an accelerator, through the kernels in kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.model import kernels
from megalite.model.config import AttentionSpec


class DeviceCache:
    """Keys and values of this rank's layers: for each global layer index [2, K, slots, D] on `device`."""

    def __init__(
        self,
        layers: Sequence[int],
        kv_heads: int,
        blocks: int,
        head_dim: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.block_size = block_size
        self.device = device
        self._shape = (2, kv_heads, blocks * block_size, head_dim)
        self._dtype = dtype
        self._places = tuple(layers)
        self.allocate()

    def allocate(self) -> None:
        """Take the memory; what the cache held is gone."""
        self.layers = {layer: torch.zeros(self._shape, dtype=self._dtype, device=self.device) for layer in self._places}

    def free(self) -> None:
        """Give the memory back, until `allocate`."""
        self.layers = {}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())


@dataclass(frozen=True, slots=True)
class DeviceAttention:
    """One step of B rows and T tokens: all keys and values are written first, then every row attends.

    The tensors may be static buffers of a captured graph: nothing here reads their values on the host.
    """

    cache: DeviceCache
    positions: Tensor
    """int64 [T]."""
    lengths: Tensor
    """int64 [T]; see `AttentionContext`."""
    slots: Tensor
    """Cache slot of each token, int64 [T]; -1: padding, not written."""
    query_start: Tensor
    """int32 [B + 1]."""
    context_len: Tensor
    """Keys of each row with this step's, int32 [B]; 0: padding."""
    block_table: Tensor
    """int32 [B, blocks]."""
    max_query_len: int

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.layers[spec.layer]
        kernels.store_kv(k, v, keys, values, self.slots)
        return kernels.paged_attention(
            q,
            keys,
            values,
            query_start=self.query_start,
            context_len=self.context_len,
            block_table=self.block_table,
            block_size=self.cache.block_size,
            spec=spec,
            max_query_len=self.max_query_len,
        )
