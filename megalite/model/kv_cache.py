"""The paged KV cache's memory: keys and values by slot, where slot = block * block_size + offset in the block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megalite.model.kinds.base import CacheSpec


class KVCache:
    """Keys and values of this rank's layers, zeroed: `layers[global layer index]` is (keys, values), each
    [KV heads, slots, head_dim], of the layer's own heads and widths."""

    def __init__(
        self,
        layers: Mapping[int, CacheSpec],
        blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        """`layers`: what each layer keeps of a token. `device`: None: the CPU."""
        self.block_size = block_size
        self.device = device or torch.device("cpu")
        self.num_slots = blocks * block_size
        self._specs = dict(layers)
        self._dtype = dtype
        self.allocate()

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self.device)

    def allocate(self) -> None:
        """Take the memory; what the cache held is gone."""
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.stacks: dict[int, list[Tensor]] = {}
        """The same memory, the tensors of a layer that are of one shape together: [tensors, heads, slots, width]."""
        for layer, spec in self._specs.items():
            alike = [(len(list(same)), *size) for size, same in groupby(spec.token)]
            self.stacks[layer] = [self._zeros((n, heads, self.num_slots, width)) for n, heads, width in alike]
            self.layers[layer] = tuple(tensor for stack in self.stacks[layer] for tensor in stack)

    def free(self) -> None:
        """Give the memory back, until `allocate`."""
        self.layers, self.stacks = {}, {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer)


class DeviceCache(KVCache):
    """On an accelerator, for `DeviceAttention`."""


class HostCache(KVCache):
    """In host memory, for `HostAttention`. A page takes real memory only once it is written."""

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        nbytes = math.prod(shape) * self._dtype.itemsize
        return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(self._dtype).view(shape)
