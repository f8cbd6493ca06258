"""The paged KV cache's memory: keys and values by slot, where slot = block * block_size + offset in the block."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Keys and values of this rank's layers: `layers[global layer index]` is [2, KV heads, slots, head_dim], zeroed."""

    def __init__(
        self,
        layers: Iterable[int],
        kv_heads: int,
        blocks: int,
        head_dim: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        """`device`: None: the CPU."""
        self.block_size = block_size
        self.device = device or torch.device("cpu")
        self._indices = tuple(layers)
        self._shape = (2, kv_heads, blocks * block_size, head_dim)
        self._dtype = dtype
        self.allocate()

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape, dtype=self._dtype, device=self.device)

    def allocate(self) -> None:
        """Take the memory; what the cache held is gone."""
        self.layers = {layer: self._zeros() for layer in self._indices}

    def free(self) -> None:
        """Give the memory back, until `allocate`."""
        self.layers = {}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())


class DeviceCache(KVCache):
    """On an accelerator, for `DeviceAttention`."""


class HostCache(KVCache):
    """In host memory, for `HostAttention`. A page takes real memory only once it is written."""

    def _zeros(self) -> Tensor:
        nbytes = math.prod(self._shape) * self._dtype.itemsize
        return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(self._dtype).view(self._shape)
