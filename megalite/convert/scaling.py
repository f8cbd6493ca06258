"""Activation-aware weight quantization (AWQ; Lin et al., arXiv 2306.00978): channels of a layer's inputs that are large
are given more of the codes.

    y = Q(W diag(s)) (x / s),   s = mean|x|^alpha

The division is folded into what makes x, which must be linear in each channel: a norm's weight, the rows of `up` beside
a gate, or the values that attention mixes. Alpha is searched, for all matrices that read one x, by the error of their
outputs on given tokens (section 3.2, equations 4 and 5). Nothing is added to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megalite.convert.sample import read_prompts, tokenizer_of, whole_model, windows
from megalite.core.formats import WeightFormat
from megalite.errors import ConfigError, Problem
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.config import ModelConfig
from megalite.model.decoder import Block
from megalite.model.family_spec import WeightNames
from megalite.model.kinds.base import Sublayer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.manifest import digest_of
from megalite.weights.rounding import Elements
from megalite.weights.table import hf_shapes

STEPS = 20
"""Of the search, from alpha 0, which is rounding to nearest, to nearly 1."""
MOST_TOKENS = 16384
"""Of the prompts, in their order."""
Round = Callable[[Tensor], Tensor]
"""A matrix float32 [N, K] -> the numbers that its codes will stand for."""


@dataclass
class Scales:
    """What tensors of the checkpoint are multiplied by before they are rounded, by name: float32."""

    rows: dict[str, Elements] = field(default_factory=dict)
    columns: dict[str, Elements] = field(default_factory=dict)
    norms: dict[str, Elements] = field(default_factory=dict)
    """Of weights of norms; those that are zero-centred are multiplied after 1 was added."""
    zero_centred: bool = False

    def applied(self, name: str, values: Elements) -> Elements:
        """A tensor float32 as the scaled model has it."""
        if name in self.norms:
            by, one = self.norms[name], np.float32(self.zero_centred and name.endswith("weight"))
            return (values + one) * by - one
        if name in self.rows:
            by = self.rows[name]
            values = values * (by if values.ndim == 1 else by[:, None])
        return values * self.columns[name] if name in self.columns else values

    @property
    def digest(self) -> str:
        """Of all of them."""
        parts = [(self.rows, b"rows"), (self.columns, b"columns"), (self.norms, b"norms")]
        return digest_of(b"".join(word + name.encode() + by[name].tobytes() for by, word in parts for name in by))

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.columns or name in self.norms


@torch.no_grad()
def search(folder: Path, prompts: Path, round_trip: Round, formats: Mapping[tuple[int, str], WeightFormat]) -> Scales:
    """Scales of a model's matrices for the inputs that it has on prompts.

    `formats`: of those that are to be rounded, by layer and the family's name. ConfigError if there are no prompts.
    """
    decoder, tokenizer = whole_model(folder), tokenizer_of(folder)
    model, length = decoder.config, decoder.config.max_position_embeddings
    pieces = [piece for ids in read_prompts(prompts, tokenizer) for piece in windows(ids, length)]
    pieces = pieces[: next((i + 1 for i in range(len(pieces)) if sum(map(len, pieces[: i + 1])) >= MOST_TOKENS), None)]
    if not pieces:
        raise ConfigError(Problem(key="--calibrate", rule="holds no prompts", value=str(prompts)))
    found = Scales(zero_centred=model.zero_centred)
    contexts = [PackedAttention([len(ids)]) for ids in pieces]
    assert decoder.embed is not None
    streams = [decoder.embed(torch.tensor(ids), ctx.positions) for ids, ctx in zip(pieces, contexts, strict=True)]
    turns = [[one(ctx.positions, ctx.lengths, torch.float32) for one in decoder._rotaries] for ctx in contexts]
    for layer in range(model.num_layers):
        block = decoder.layers[str(layer)]
        assert isinstance(block, Block)
        inputs = _Inputs(block)
        streams = [block.whole(*one) for one in zip(streams, contexts, turns, strict=True)]
        inputs.remove()
        _Layer(model, layer, block, inputs, found, round_trip, formats).scale()
    return found


class _Inputs:
    """Collects of the inputs of each linear of a block their Gram matrix and the mean magnitude of each channel."""

    def __init__(self, block: nn.Module):
        self.gram: dict[nn.Module, Tensor] = {}
        self.sizes: dict[nn.Module, Tensor] = {}
        self.tokens: dict[nn.Module, int] = {}
        linears = [one for part in block.modules() for one in _linears(part)]
        self._hooks = [one.register_forward_pre_hook(self._see) for one in linears]

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        self.gram[module] = self.gram.get(module, 0) + x.T @ x
        self.sizes[module] = self.sizes.get(module, 0) + x.abs().sum(0)
        self.tokens[module] = self.tokens.get(module, 0) + len(x)

    def size(self, module: nn.Module) -> Tensor:
        """Mean magnitude of each channel, [K]."""
        return self.sizes[module] / self.tokens[module]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _linears(module: nn.Module) -> list[nn.Module]:
    return [one for name in ("qkv", "out", "up", "down") if isinstance(one := getattr(module, name, None), nn.Module)]


@dataclass
class _Layer:
    """The groups of one layer, one after the other."""

    model: ModelConfig
    layer: int
    block: Block
    inputs: _Inputs
    found: Scales
    round_trip: Round
    formats: Mapping[tuple[int, str], WeightFormat]

    @property
    def names(self) -> WeightNames:
        return families.weight_names(self.model)

    def scale(self) -> None:
        parts = self.model.layers[self.layer].sublayers
        for norm in dict.fromkeys(part.norm for part in parts if part.norm is not None):
            readers = [part for part in parts if part.norm == norm]
            if all(_reads_plainly(part) for part in readers) and all(self._rounds(part) for part in readers):
                self._behind_norm(norm, readers)
        for part in parts:
            if isinstance(part.kind, SoftmaxAttention) and _reads_plainly(part) and self._rounds(part):
                self._behind_values(part.name, part.kind)
            elif isinstance(part.kind, DenseMLP) and part.kind.gated and self._rounds(part):
                self._behind_up(part.name, part.kind)

    def _rounds(self, part: Sublayer) -> bool:
        rows = [row for row in part.kind.rows(self.model.hidden_size) if row.linear]
        return all((self.layer, row.weight) in self.formats for row in rows)

    def _module(self, part: str, name: str) -> nn.Module:
        return getattr(getattr(self.block, part), name)  # type: ignore[no-any-return]

    def _hf(self, weight: str) -> str:
        return self.names.tensors[weight].hf.format(layer=self.layer)

    def _behind_norm(self, norm: str, readers: Sequence[Sublayer]) -> None:
        """q, k and v, or gate and up, or all of them where they read one norm."""
        first = {part.name: "qkv" if isinstance(part.kind, SoftmaxAttention) else "up" for part in readers}
        modules = [self._module(*one) for one in first.items()]
        scales = self._search(modules, self.inputs.size(modules[0]))
        for part in readers:
            inside = ("q", "k", "v") if isinstance(part.kind, SoftmaxAttention) else ("gate", "up")
            for weight in inside:
                if weight in self.names.tensors:
                    self._columns(weight, scales)
        for weight in (norm, f"{norm}_bias"):
            if weight in self.names.tensors:
                self.found.norms[self._hf(weight)] = (1 / scales).numpy()

    def _behind_up(self, part: str, kind: DenseMLP) -> None:
        down = self._module(part, "down")
        scales = self._search([down], self.inputs.size(down))
        self._columns("down", scales)
        self._rows("up", 1 / scales, before=("gate",))

    def _behind_values(self, part: str, kind: SoftmaxAttention) -> None:
        """Query heads that share a KV head share its scales."""
        out = self._module(part, "out")
        shared = self.inputs.size(out).view(kind.kv_heads, -1, kind.head_dim).mean(1)
        group = kind.heads // kind.kv_heads
        wide = self._search([out], shared[:, None].expand(-1, group, -1).flatten())
        self._columns("attn_out", wide)
        self._rows("v", 1 / wide.view(kind.kv_heads, group, -1)[:, 0].flatten(), before=("q", "k"))

    def _columns(self, weight: str, scales: Tensor) -> None:
        self.found.columns[self._hf(weight)] = scales.numpy()

    def _rows(self, weight: str, scales: Tensor, before: Sequence[str]) -> None:
        """Of a weight, and its bias, that lies behind others where these are in the same tensor."""
        sizes = {row.weight: row.split.total for row in self.model.layer_rows(self.layer)}
        for suffix in ("", "_bias"):
            if f"{weight}{suffix}" not in self.names.tensors:
                continue
            name = self._hf(f"{weight}{suffix}")
            fused = sum(sizes[one] for one in before if self._hf(f"{one}{suffix}") == name)
            whole = np.ones(hf_shapes(self.model)[name][0], np.float32)
            whole[fused : fused + len(scales)] = scales.numpy()
            self.found.rows[name] = whole

    def _search(self, modules: Sequence[nn.Module], size: Tensor) -> Tensor:
        """The scales [K], of a grid over alpha, whose rounded matrices give the least error of outputs."""
        weights = [module.get_parameter("weight") for module in modules]
        gram = self.inputs.gram[modules[0]]
        size = size.clamp(min=1e-4)
        best, least = torch.ones_like(size), float("inf")
        for step in range(STEPS):
            scales = size ** (step / STEPS)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(min=1e-4)
            error = 0.0
            for weight in weights:
                wrong = self.round_trip(weight * scales) / scales - weight
                error += float(((wrong @ gram) * wrong).sum())
            if error < least:
                best, least = scales, error
        return best


def _reads_plainly(part: Sublayer) -> bool:
    """Its only matrices are known here, and each has its own rows of a tensor."""
    if isinstance(part.kind, SoftmaxAttention):
        return not part.kind.fused_by_head and not part.kind.gated
    return isinstance(part.kind, DenseMLP)
