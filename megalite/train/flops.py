"""How much arithmetic a training step is, and how much a device can do: what model FLOPs utilisation is made of.

PaLM (arXiv 2204.02311, appendix B): a token costs 6 N + 12 L H Q T floating-point operations, forward and backward,
with N the parameters that it is multiplied by, L layers of H heads of Q channels, and T the keys of its sequence,
whether the causal mask hides them or not. Recomputed activations are no part of the model and not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from megalite.kernels.device import device_name, ranks_on_device
from megalite.model.config import ModelConfig
from megalite.planner.devices import peak_flops


def peak_of_run(device: torch.device, dtype: str, *, ranks: int, local_ranks: int) -> float | None:
    """What all devices of a run can do in a second; None where it is not known, or the numbers are float32.

    `ranks`: of the run; `local_ranks`: on this host, where several may share a device.
    """
    one = peak_flops(device_name(device))
    return one * ranks / ranks_on_device(local_ranks) if one is not None and dtype == "bfloat16" else None


def active_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied by: chosen experts and the head, but no table that is looked up in."""
    layers = sum(layer.active_parameters(model.hidden_size) for layer in model.layers)
    return layers + model.vocab_size * model.hidden_size


def training_flops(model: ModelConfig, lengths: Iterable[int]) -> float:
    """Operations of a training step over sequences of `lengths` tokens; a window bounds the keys of its layer."""
    lengths = list(lengths)
    over_keys = sum(
        count * layer.flops_over_keys(length) * length
        for layer, count in Counter(model.layers).items()
        for length in lengths
    )
    return 6.0 * active_parameters(model) * sum(lengths) + 3.0 * over_keys
