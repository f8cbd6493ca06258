"""The cache's memory: keys and values of tokens by slot, where slot = block * block_size + offset in the block, and
states of sequences by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megalite.model.kinds.base import CacheSpec

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of float8 e4m3."""


def as_kept(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Keys or values as a cache of a dtype keeps them: as they are or, in fp8, divided by their scale."""
    if dtype != FP8:
        return x
    return (x.float() * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(FP8)


class KVCache:
    """What this rank's layers keep, zeroed: `layers[global layer index]` is (keys, values), each
    [KV heads, slots, head_dim], of the layer's own heads and widths; `states` is as in `recurrence`, float32."""

    def __init__(
        self,
        layers: Mapping[int, CacheSpec],
        blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        rows: int = 0,
        fp8: bool = False,
    ):
        """`layers`: what each layer keeps. `device`: None: the CPU. `rows`: number of rows that have states; padding
        uses one more. `fp8`: keys and values are float8 e4m3, whatever the model's dtype."""
        self.block_size = block_size
        self.device = device or torch.device("cpu")
        self.num_slots = blocks * block_size
        self._specs = dict(layers)
        self._rows = rows
        self._dtype = FP8 if fp8 else dtype
        self.allocate()

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def allocate(self) -> None:
        """Take the memory; what the cache held is gone."""
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.stacks: dict[int, list[Tensor]] = {}
        """The same memory, with the tensors of a layer that have one shape stacked: [tensors, heads, slots, width]."""
        self.states: dict[int, tuple[Tensor, ...]] = {}
        for layer, spec in self._specs.items():
            if self._rows and spec.sequence:
                shapes = [(self._rows + 1, *shape) for shape in spec.sequence]
                self.states[layer] = tuple(self._zeros(shape, torch.float32) for shape in shapes)
            alike = [(len(list(same)), *size) for size, same in groupby(spec.token)]
            self.stacks[layer] = [
                self._zeros((n, heads, self.num_slots, width), self._dtype) for n, heads, width in alike
            ]
            self.layers[layer] = tuple(tensor for stack in self.stacks[layer] for tensor in stack)

    def free(self) -> None:
        """Give the memory back, until `allocate`."""
        self.layers, self.stacks, self.states = {}, {}, {}

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for held in (self.layers, self.states) for layer in held.values() for one in layer)


class DeviceCache(KVCache):
    """On an accelerator, for `DeviceAttention`."""


class HostCache(KVCache):
    """In host memory, for `HostAttention`. A page takes real memory only once it is written."""

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return super()._zeros(shape, dtype)
        return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(shape)
