"""Activation-aware weight quantization (AWQ; Lin et al., arXiv 2306.00978): channels of a layer's inputs that are large
are given more of the codes.

    y = Q(W diag(s)) (x / s),   s = mean|x|^alpha

The division is folded into what makes x, which must be linear in each channel: a norm's weight, the rows of `up` beside
a gate, or the values that attention mixes. Alpha is searched, for all matrices that read one x, by the error of their
outputs on given tokens (section 3.2, equations 4 and 5). Nothing is added to the checkpoint.

Experts, shared expert and router of a mixture read one norm and share its scales; inside, each expert has its own. What
an expert does counts by the tokens that are routed to it, times the weights that these give it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.convert.sample import read_prompts, tokenizer_of, whole_model, windows
from megalite.core.formats import Stage, WeightFormat
from megalite.core.functional import gated
from megalite.errors import ConfigError, Problem
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.config import ModelConfig
from megalite.model.decoder import Block
from megalite.model.family_names import WeightNames
from megalite.model.kinds.base import LayerKind, Sublayer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.latent import LatentAttention
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.model.layers.experts import MixtureOfExperts
from megalite.weights.manifest import digest_of
from megalite.weights.rounding import Elements
from megalite.weights.table import hf_shapes

STEPS = 20
"""Of the search, from alpha 0, which is rounding to nearest, to nearly 1."""
MOST_TOKENS = 16384
"""Of the prompts, in their order."""
LEAST_TOKENS = 16
"""Of an expert, for scales of what it computes inside."""
Round = Callable[[Tensor], Tensor]
"""A matrix float32 [N, K] -> the numbers that its codes will stand for."""


@dataclass
class Scales:
    """What tensors of the checkpoint are multiplied by before they are rounded, by name: float32."""

    rows: dict[str, Elements] = field(default_factory=dict)
    columns: dict[str, Elements] = field(default_factory=dict)
    norms: dict[str, Elements] = field(default_factory=dict)
    """Factors of norms' weights; zero-centred ones are multiplied after 1 was added."""
    zero_centred: bool = False
    left: Counter[str] = field(default_factory=Counter)
    """What has no scales, and how often it is so."""

    @property
    def notes(self) -> list[str]:
        """What the user should know of it."""
        listed = ", ".join(f"{what} ({count})" for what, count in sorted(self.left.items()))
        return [f"rounded without scales by activations: {listed}"] if listed else []

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
        """A digest of all factors."""
        parts = [(self.rows, b"rows"), (self.columns, b"columns"), (self.norms, b"norms")]
        return digest_of(b"".join(word + name.encode() + by[name].tobytes() for by, word in parts for name in by))

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.columns or name in self.norms


@torch.no_grad()
def search(folder: Path, prompts: Path, round_trip: Round, formats: Mapping[tuple[Stage, str], WeightFormat]) -> Scales:
    """Scales of a model's matrices for the inputs that it has on prompts.

    `formats`: of those that are to be rounded, by layer and the family's name. ConfigError if there are no prompts.
    """
    decoder, tokenizer = whole_model(folder), tokenizer_of(folder)
    model, length = decoder.config, decoder.config.max_position_embeddings
    pieces = [piece for ids in read_prompts(prompts, tokenizer) for piece in windows(ids, length)]
    pieces = pieces[: next((i + 1 for i in range(len(pieces)) if sum(map(len, pieces[: i + 1])) >= MOST_TOKENS), None)]
    if not pieces:
        raise ConfigError(Problem(key="--calibrate", rule="holds no prompts", value=str(prompts)))
    found, shapes = Scales(zero_centred=model.zero_centred), hf_shapes(model)
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
        _Layer(model, layer, block, inputs, found, round_trip, formats, shapes).scale()
    return found


class _Inputs:
    """Collects of the inputs of each linear of a block their Gram matrix and the mean magnitude of each channel; of
    mixtures the inputs themselves."""

    def __init__(self, block: nn.Module):
        self.gram: dict[nn.Module, Tensor] = {}
        self.given: dict[nn.Module, list[Tensor]] = {}
        self.sizes: dict[nn.Module, Tensor] = {}
        self.tokens: dict[nn.Module, int] = {}
        readers = [one for part in block.modules() for one in _readers(part)]
        self._hooks = [one.register_forward_pre_hook(self._see) for one in readers]

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(module, MixtureOfExperts):
            self.given.setdefault(module, []).append(x)
        else:
            self.gram[module] = self.gram.get(module, 0) + x.T @ x
        self.sizes[module] = self.sizes.get(module, 0) + x.abs().sum(0)
        self.tokens[module] = self.tokens.get(module, 0) + len(x)

    def size(self, module: nn.Module) -> Tensor:
        """Mean magnitude of each channel, [K]."""
        return self.sizes[module] / self.tokens[module]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _readers(module: nn.Module) -> list[nn.Module]:
    """A mixture, and the linears of a sublayer."""
    names = ("qkv", "q_down", "q_up", "kv_down", "kv_up", "out", "up", "down", "shared_up", "shared_down")
    linears = [one for name in names if isinstance(one := getattr(module, name, None), nn.Module)]
    return [module, *linears] if isinstance(module, MixtureOfExperts) else linears


@dataclass
class _Layer:
    """The groups of one layer, one after the other."""

    model: ModelConfig
    layer: int
    block: Block
    inputs: _Inputs
    found: Scales
    round_trip: Round
    formats: Mapping[tuple[Stage, str], WeightFormat]
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the checkpoint's tensors."""

    @cached_property
    def names(self) -> WeightNames:
        return families.weight_names(self.model)

    @cached_property
    def heights(self) -> dict[str, int]:
        """Rows of each weight."""
        return {row.weight: row.split.total for row in self.model.layer_rows(self.layer)}

    def scale(self) -> None:
        parts = self.model.layers[self.layer].sublayers
        known = [part for part in parts if _is_known(part) and self._rounds(part)]
        self.found.left.update(type(part.kind).__name__ for part in parts if part not in known)
        self.found.left.update(
            f"inputs of {type(part.kind).__name__}, without a norm" for part in known if not part.norm
        )
        for norm in dict.fromkeys(part.norm for part in parts if part.norm is not None):
            readers = [part for part in parts if part.norm == norm]
            if all(part in known for part in readers):
                self._behind_norm(norm, readers)
            else:
                mine = (type(part.kind).__name__ for part in readers if part in known)
                self.found.left.update(f"inputs of {kind}, whose norm others read too" for kind in mine)
        for part in known:
            if isinstance(part.kind, SoftmaxAttention):
                self._behind_values(part.name, part.kind)
            elif isinstance(part.kind, LatentAttention):
                self._behind_latents(part.name, part.kind)
            elif isinstance(part.kind, Experts):
                self._behind_ups_of_experts(part.name, part.kind)
            elif isinstance(part.kind, DenseMLP) and part.kind.gated:
                self._behind_up(self._module(part.name, "down"))
            else:
                self.found.left["down of an MLP without a gate"] += 1

    def _rounds(self, part: Sublayer) -> bool:
        rows = [row for row in part.kind.rows(self.model.hidden_size) if row.linear and row.weight != "router"]
        return all((self.layer, row.weight) in self.formats for row in rows)

    def _module(self, part: str, name: str) -> nn.Module:
        return getattr(getattr(self.block, part), name)  # type: ignore[no-any-return]

    def _mixture(self, part: str) -> MixtureOfExperts:
        found = getattr(self.block, part)
        assert isinstance(found, MixtureOfExperts)
        return found

    def _hf(self, weight: str, expert: int | None = None) -> str:
        return self.names.tensors[weight].hf.format(layer=self.layer, expert=expert)

    def _behind_norm(self, norm: str, readers: Sequence[Sublayer]) -> None:
        """All matrices that read a norm."""
        size = self.inputs.size(self._linears(readers[0])[0])
        scales = self._search(chain.from_iterable(map(self._terms, readers)), size)
        for part in readers:
            if isinstance(part.kind, Experts):
                for expert in range(part.kind.num_experts):
                    self._columns(("expert_gate", "expert_up"), scales, expert)
            self._columns(_reading(part.kind), scales)
        self._norm(norm, scales)

    def _norm(self, norm: str, scales: Tensor) -> None:
        """Divide what a norm gives."""
        for weight in (norm, f"{norm}_bias"):
            if weight in self.heights:
                self.found.norms[self._hf(weight)] = (1 / scales).numpy()

    def _linears(self, part: Sublayer) -> list[nn.Module]:
        """What reads the norm of a sublayer."""
        if isinstance(part.kind, Experts):
            mixture = self._mixture(part.name)
            return [mixture, *([mixture.shared_up] if mixture.shared_up is not None else [])]
        if isinstance(part.kind, LatentAttention):
            queries = "q_up" if part.kind.query_rank is None else "q_down"
            return [self._module(part.name, queries), self._module(part.name, "kv_down")]
        return [self._module(part.name, "qkv" if isinstance(part.kind, SoftmaxAttention) else "up")]

    def _terms(self, part: Sublayer) -> Iterator[tuple[Tensor, Tensor]]:
        """The matrices that read a sublayer's norm, each with the Gram matrix of its inputs."""
        for reader in self._linears(part):
            if not isinstance(reader, MixtureOfExperts):
                yield self._term(reader)
                continue
            for expert, (x, weights) in enumerate(self._routed(reader)):
                yield _matrix(reader, "up", expert), _gram(x * weights)

    def _term(self, linear: nn.Module) -> tuple[Tensor, Tensor]:
        return linear.get_parameter("weight"), self.inputs.gram[linear]

    def _routed(self, mixture: MixtureOfExperts) -> Iterator[tuple[Tensor, Tensor]]:
        """For each expert the tokens that it is given, [T, K], and their weights, [T, 1]."""
        x = torch.cat(self.inputs.given[mixture])
        weights, experts = mixture.route(x)
        for expert in range(mixture.num_experts):
            token, slot = torch.where(experts == expert)
            yield x[token], weights[token, slot, None]

    def _behind_ups_of_experts(self, part: str, kind: Experts) -> None:
        """Each expert's hidden channels, and those of the shared one."""
        mixture = self._mixture(part)
        for expert, (x, weights) in enumerate(self._routed(mixture)):
            if len(x) < LEAST_TOKENS:
                self.found.left[f"down of experts with fewer than {LEAST_TOKENS} tokens"] += 1
                continue
            up, down = _matrix(mixture, "up", expert), _matrix(mixture, "down", expert)
            x, weights = (x * weights, torch.ones_like(weights)) if kind.router.weighs_input else (x, weights)
            hidden = gated(F.linear(x, up), kind.activation)
            scales = self._search([(down, _gram(hidden * weights))], hidden.abs().mean(0))
            self._columns(("expert_down",), scales, expert)
            self._rows("expert_up", 1 / scales, before=("expert_gate",), expert=expert)
        if mixture.shared_down is not None:
            self._behind_up(mixture.shared_down, "shared_")

    def _behind_up(self, down: nn.Module, begin: str = "") -> None:
        """A gated MLP's hidden channels; its weights' names begin so."""
        scales = self._search([self._term(down)], self.inputs.size(down))
        self._columns((f"{begin}down",), scales)
        self._rows(f"{begin}up", 1 / scales, before=(f"{begin}gate",))

    def _behind_values(self, part: str, kind: SoftmaxAttention) -> None:
        """Query heads that share a KV head share its scales."""
        out = self._module(part, "out")
        shared = self.inputs.size(out).view(kind.kv_heads, -1, kind.head_dim).mean(1)
        group = kind.heads // kind.kv_heads
        wide = self._search([self._term(out)], shared[:, None].expand(-1, group, -1).flatten())
        self._columns(("attn_out",), wide)
        self._rows("v", 1 / wide.view(kind.kv_heads, group, -1)[:, 0].flatten(), before=("q", "k"))

    def _behind_latents(self, part: str, kind: LatentAttention) -> None:
        """Latent vectors have norms of their own; values are rows of what is made of them, behind each head's keys."""
        if kind.query_rank is not None:
            self._behind_own_norm("q_down_norm", self._module(part, "q_up"), kind.queries_name)
        self._behind_own_norm("kv_down_norm", self._module(part, "kv_up"), "kv_up")
        out = self._module(part, "out")
        scales = self._search([self._term(out)], self.inputs.size(out))
        self._columns(("attn_out",), scales)
        by_head = 1 / scales.view(kind.heads, kind.value_dim)
        self._rows("kv_up", F.pad(by_head, (kind.plain_dim, 0), value=1.0).flatten(), before=())

    def _behind_own_norm(self, norm: str, linear: nn.Module, weight: str) -> None:
        scales = self._search([self._term(linear)], self.inputs.size(linear))
        self._columns((weight,), scales)
        self._norm(norm, scales)

    def _columns(self, weights: Iterable[str], scales: Tensor, expert: int | None = None) -> None:
        """Scale the columns of those weights that there are."""
        for weight in weights:
            if weight in self.heights:
                self.found.columns[self._hf(weight, expert)] = scales.numpy()

    def _rows(self, weight: str, scales: Tensor, before: Sequence[str], expert: int | None = None) -> None:
        """Scale the rows of a weight and its bias; it lies behind the weights `before` that are in the same tensor."""
        for suffix in ("", "_bias"):
            if f"{weight}{suffix}" not in self.heights:
                continue
            name = self._hf(f"{weight}{suffix}", expert)
            fused = sum(self.heights[one] for one in before if self._hf(f"{one}{suffix}", expert) == name)
            whole = np.ones(self.shapes[name][0], np.float32)
            whole[fused : fused + len(scales)] = scales.numpy()
            self.found.rows[name] = whole

    def _search(self, terms: Iterable[tuple[Tensor, Tensor]], size: Tensor) -> Tensor:
        """The scales [K], of a grid over alpha, whose rounded matrices give the least error of outputs.

        `terms`: matrices [N, K] and the Gram matrices [K, K] of their inputs; `size` [K]: mean magnitude of the inputs.
        """
        size, grid = size.clamp(min=1e-4), []
        for step in range(STEPS):
            scales = size ** (step / STEPS)
            grid.append((scales / (scales.max() * scales.min()).sqrt()).clamp(min=1e-4))
        errors = [0.0] * STEPS
        for weight, gram in terms:
            for step, scales in enumerate(grid):
                wrong = self.round_trip(weight * scales) / scales - weight
                errors[step] += float(((wrong @ gram) * wrong).sum())
        return grid[min(range(STEPS), key=errors.__getitem__)]


def _reading(kind: LayerKind) -> tuple[str, ...]:
    """The weights of a kind that read its norm, but for experts'."""
    if isinstance(kind, Experts):
        return "router", "shared_gate", "shared_up", "shared_scale"
    if isinstance(kind, LatentAttention):
        return kind.queries_name if kind.query_rank is None else "q_down", "kv_down"
    return ("q", "k", "v") if isinstance(kind, SoftmaxAttention) else ("gate", "up")


def _matrix(mixture: MixtureOfExperts, name: str, expert: int) -> Tensor:
    """[gate and up, K], or down."""
    stacked = mixture.get_parameter(name)
    return stacked.view(mixture.num_experts, -1, stacked.shape[1])[expert]


def _gram(x: Tensor) -> Tensor:
    return x.T @ x


def _is_known(part: Sublayer) -> bool:
    """Whether all matrices of a sublayer are known here, each with its own rows of a tensor."""
    if isinstance(part.kind, SoftmaxAttention):
        return not part.kind.fused_by_head
    if isinstance(part.kind, Experts):
        return part.kind.stored == "apart" and part.kind.clamped is None and not part.kind.biases
    return isinstance(part.kind, DenseMLP | LatentAttention)
