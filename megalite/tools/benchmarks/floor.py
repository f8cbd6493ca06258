"""What a device can do at best, measured, and the time below which generation can't come with that.

A decode step reads every weight and every cached key and value once; all work is matmuls of two operations a weight
and token, and four a query, key and channel. The larger of bytes over the read rate and operations over the matmul
rate is the floor. Work is taken to divide evenly over ranks, at no cost. Attention has no windows here, and a mixture
of experts is read as if all tokens chose the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.kernels.device import release_memory, synchronize
from megalite.kernels.jit import triton
from megalite.kernels.probe import read_all
from megalite.model.config import ModelConfig
from megalite.train.flops import active_parameters


@dataclass(frozen=True)
class Rates:
    """Of one device."""

    read: float
    """Bytes a second."""
    matmul: float
    """Operations a second, in bfloat16 on a GPU and float32 on a CPU."""


def measure_rates(device: torch.device) -> Rates:
    """Takes about 1.5 GB, and gives it back."""
    rates = Rates(read_rate(device), matmul_rate(device))
    release_memory(device)
    return rates


def read_rate(device: torch.device) -> float:
    """By the best of some kernels that read a buffer once."""
    numbers = torch.zeros((1 << 28) if device.type == "cuda" else (1 << 24), dtype=torch.float32, device=device)
    readers: list[Callable[[Tensor], object]] = [torch.sum, torch.amax]
    if device.type == "cuda" and triton is not None:
        readers.append(read_all)
    return max(numbers.nbytes / seconds_of(partial(reader, numbers), device) for reader in readers)


def matmul_rate(device: torch.device) -> float:
    """Of square matrices."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds_of(partial(torch.matmul, a, b), device)


def seconds_of(work: Callable[[], object], device: torch.device, *, least: float = 0.2) -> float:
    """Seconds of one call, in a row of calls that takes at least so long."""
    calls = 1
    while True:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        seconds = time.perf_counter() - began
        if seconds >= least:
            return seconds / calls
        calls *= 2 if seconds <= 0 else max(2, min(8, int(1.2 * least / seconds) + 1))


@dataclass(frozen=True)
class Floor:
    """Least seconds that work on a model can take."""

    model: ModelConfig
    layout: Layout
    rates: Rates
    itemsize: int
    """Bytes of a weight, and of a number of the cache."""

    @property
    def weights(self) -> int:
        """Numbers that a decode step reads."""
        return active_parameters(self.model)

    @property
    def kv_bytes(self) -> int:
        """Of one token, in all layers."""
        return sum(layer.cache(1, 0).token_elements for layer in self.model.layers) * self.itemsize

    @property
    def score_flops(self) -> float:
        """Of one query and one key, in all layers and heads."""
        return float(sum(layer.flops_over_keys(1) for layer in self.model.layers))

    def decode(self, contexts: Sequence[int]) -> float:
        """One token more for sequences of these lengths.

        With pipeline stages they are as many cohorts as there are stages, if there are enough sequences, and each has
        to pass through all.
        """
        mine = contexts[:: self.layout.dp]
        cohort = mine[:: self.layout.pp]
        bytes_ = self.weights * self.itemsize + self.kv_bytes * sum(cohort)
        flops = 2.0 * self.weights * len(cohort) + self.score_flops * sum(cohort)
        return self._seconds(bytes_ / self.layout.tp, flops / self.layout.tp)

    def prefill(self, lengths: Sequence[int]) -> float:
        """Prompts of these lengths, up to a first token of each."""
        head = self.model.vocab_size * self.model.hidden_size
        flops = 2.0 * (self.weights - head) * sum(lengths) + 2.0 * head * len(lengths)
        flops += self.score_flops * sum(length * length for length in lengths) / 2
        return self._seconds(self.weights * self.itemsize / self.layout.size, flops / self.layout.size)

    def requests(self, prompts: Sequence[int], outputs: Sequence[int]) -> float:
        """All prompts and then all outputs, all at once from the first step to each one's last."""
        seconds = self.prefill(prompts)
        for step in range(1, max(outputs)):
            seconds += self.decode([p + step for p, o in zip(prompts, outputs, strict=True) if o > step])
        return seconds

    def _seconds(self, bytes_: float, flops: float) -> float:
        return max(bytes_ / self.rates.read, flops / self.rates.matmul)
