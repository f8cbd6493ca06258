"""Puts LoRA adapters beside a decoder's linears, each rank its part; see core/adapters.py and lora.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megalite.core.adapters import Adapted, Adapters, LowRank, adapt
from megalite.core.linear import Linear
from megalite.model.decoder import Decoder
from megalite.weights.dtypes import torch_dtype
from megalite.weights.lora import LowRankInfo, is_adaptable, module_of, read_adapter, unquantized
from megalite.weights.table import owned
from megalite.weights.tensor_file import TensorInfo, stored_bytes


def load_adapters(decoder: Decoder, folders: Mapping[str, str]) -> Adapters:
    """Read adapters from PEFT folders, by name; they replace those that the decoder has.

    CheckpointError: one is damaged, of another model or not supported.
    """
    adapters, state = Adapters(tuple(folders)), decoder.state
    for module in decoder.modules():
        if isinstance(module, Linear) and isinstance(module.format, Adapted):
            module.format = module.format.base
    parts: dict[str, list[LowRank]] = {}
    for index, folder in enumerate(folders.values()):
        modules = read_adapter(folder, decoder.config).modules
        for one in owned(unquantized(decoder.config), state.layout, state.rank):
            info = modules.get(module_of(one.piece)) if is_adaptable(one.piece) else None
            if info is None:
                continue
            a, b = low_rank(info)
            lo, hi = one.lo, one.hi
            part = LowRank(index, a, b[lo:hi], one.start) if one.piece.dim == 0 else LowRank(index, a[:, lo:hi], b)
            parts.setdefault(one.piece.param.rpartition(".")[0], []).append(part)
    weight = decoder.some_weight
    for name, mine in parts.items():
        linear = decoder.get_submodule(name)
        assert isinstance(linear, Linear)
        adapt(linear, adapters, mine, dtype=weight.dtype, device=weight.device)
    return adapters


def low_rank(info: LowRankInfo) -> tuple[Tensor, Tensor]:
    """A [r, in] and scale * B [out, r], in float32."""
    return read_tensor(info.a), info.scale * read_tensor(info.b)


def read_tensor(info: TensorInfo) -> Tensor:
    """A stored tensor in float32."""
    return torch.frombuffer(stored_bytes(info), dtype=torch_dtype(info.dtype)).view(info.shape).float()
