"""How much arithmetic a training step is, and how much a device can do: what model FLOPs utilisation is made of.

PaLM (arXiv 2204.02311, appendix B): a token costs 6 N + 12 L H Q T floating-point operations, forward and backward,
with N the parameters that it is multiplied by, L layers of H heads of Q channels, and T the keys of its sequence,
whether the causal mask hides them or not. Recomputed activations are no part of the model and not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megalite.core.layout import Layout
from megalite.kernels.device import device_name, ranks_on_device
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import Layer
from megalite.planner.devices import peak_flops
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.table import local_elements


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


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Sizes of adapters beside frozen weights on which the arithmetic of training depends."""

    first_layer: int
    """The lowest layer that has any."""
    parameters: int

    @classmethod
    def of(cls, adapter: AdapterTable | None) -> AdapterSize | None:
        if adapter is None:
            return None
        layers = (one.stage for one in adapter.pieces() if isinstance(one.stage, int))
        return cls(min(layers), local_elements(adapter, Layout(), 0))


def training_flops(model: ModelConfig, lengths: Iterable[int], adapter: AdapterSize | None = None) -> float:
    """Operations of a training step over sequences of `lengths` tokens; a window bounds the keys of its layer.

    `adapter`: of adapters that train in place of the model's weights, which have no gradient then: a token is
    multiplied by them forward, and once backward from the first layer up that has an adapter.
    """
    lengths = list(lengths)
    tokens = sum(lengths)
    whole = _over_keys(model.layers, lengths)
    if adapter is None:
        return 6.0 * active_parameters(model) * tokens + 3.0 * whole
    upper = model.layers[adapter.first_layer :]
    passed = model.vocab_size * model.hidden_size + sum(one.active_parameters(model.hidden_size) for one in upper)
    products = 2.0 * active_parameters(model) + 2.0 * passed + 6.0 * adapter.parameters
    return products * tokens + whole + 2.0 * _over_keys(upper, lengths)


def _over_keys(layers: Sequence[Layer], lengths: Sequence[int]) -> float:
    """Operations of attention's products of queries, keys and values, forward."""
    return sum(
        count * layer.flops_over_keys(length) * length for layer, count in Counter(layers).items() for length in lengths
    )
