"""LoRA adapters as parameters of a decoder: made beside its linears, each rank its part, and filled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megalite.core.adapters import LearntPart, LowRankUpdate, learn, learnt_formats
from megalite.core.dropout import Dropout
from megalite.core.layers import replicated, sharded
from megalite.core.layout import Layout, Whole
from megalite.core.linear import Linear
from megalite.model.decoder import Decoder
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.lora import WEIGHTS
from megalite.weights.moves import hf_extents
from megalite.weights.table import Piece, Range, expected, owned
from megalite.weights.tensor_file import read_header
from megalite.weights.transfer import Filled, fill, uniform_matrix


def attach(decoder: Decoder, table: AdapterTable, dropout: Dropout | None = None) -> None:
    """Freeze a decoder, and put adapters beside its linears: parameters that train, uninitialised.

    Follow with `initialise` or `load`. The decoder's own weights are settled by now: see `core.linear.settle`.
    `dropout`: of what the adapters read.
    """
    decoder.requires_grad_(False)
    state = decoder.state
    held = expected(table, state.layout, state.rank)
    like = next(param for param in decoder.parameters() if hasattr(param, "tensor_model_parallel"))

    def parameter(name: str) -> nn.Parameter:
        shape, ranges = held[name]
        # Every rank uses what it holds whole for its own outputs or inputs only.
        param = replicated(shape, partial_gradient=True) if isinstance(ranges[0].piece.split, Whole) else sharded(shape)
        param.data = param.data.to(like.device, like.dtype)
        return param

    for name, modules in table.starts(state.tp.size, state.tp.rank).items():
        if f"{name}.lora.a" in held:
            b = {one.short: f"{name}.lora.b.{one.short}" for one, _ in modules}
            update = LowRankUpdate(
                [LearntPart(one.short, one.rank, start, one.scale) for one, start in modules],
                parameter(f"{name}.lora.a"),
                {short: parameter(param) for short, param in b.items() if param in held},
                dropout=dropout,
                channels=None
                if dropout is None
                else dropout.channels(name, _inputs_held(*held[f"{name}.lora.a"]).to(like.device)),
            )
            linear = decoder.get_submodule(name)
            assert isinstance(linear, Linear)
            learn(linear, update)


def _inputs_held(shape: Sequence[int], ranges: Sequence[Range]) -> Tensor:
    """The inputs of a linear that a rank has, by their indices among those of all ranks: int32 [K]."""
    found = torch.arange(shape[1], dtype=torch.int32)
    for one in ranges:
        if one.dim == 1:
            found[one.start : one.start + one.count] = torch.arange(one.lo, one.hi, dtype=torch.int32)
    return found


def parameters(decoder: Decoder) -> dict[str, Tensor]:
    """The parameters of a decoder's adapters, by their names in the decoder."""
    formats = learnt_formats(decoder)
    found: dict[str, Tensor] = {}
    for name, one in formats.items():
        assert one.update is not None
        found |= {f"{name}.lora.{inner}": param for inner, param in one.update.named_parameters()}
    return found


@torch.no_grad()
def initialise(params: Mapping[str, Tensor], table: AdapterTable, layout: Layout, rank: int, seed: int) -> None:
    """Begin the adapters of a rank, see `parameters`: the same whole ones in every layout.

    A is uniform as PyTorch begins a linear (kaiming, a = sqrt 5: up to 1 / sqrt(inputs)), B zero; so PEFT begins too.
    """
    filled = Filled(params)
    for one in owned(table, layout, rank):
        view = filled.view(one)
        if one.piece.hf.endswith("lora_B.weight"):
            view.zero_()
            continue
        values = uniform_matrix(one.piece, seed, view.device, bound=1 / math.sqrt(_inputs(one.piece)))
        view.copy_(values.narrow(one.dim, one.lo, one.count))
    filled.check()


def _inputs(a: Piece) -> int:
    return a.split.total if a.dim == 1 else a.other[0]


def load(decoder: Decoder, table: AdapterTable, folder: str | Path) -> None:
    """Fill the adapters from a PEFT folder, which `read_adapter` has found to be the model's."""
    state = decoder.state
    extents = hf_extents(table, read_header(Path(folder) / WEIGHTS))
    fill(parameters(decoder), owned(table, state.layout, state.rank), extents, whole=False)
