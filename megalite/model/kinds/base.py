"""What a layer is made of: sublayers, each of a kind that declares itself as data; importable without torch.

A `LayerKind` says in one place what the rest of the project must know of it: the rows of the weight table, what a
token or a sequence leaves in the cache, how many parameters and operations it is, and which module computes it. A kind
of one's own is a subclass, named by the `Sublayer`s of a family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from megalite.core.layout import Split, Whole

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig, Rope
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, slots=True)
class Place:
    """Which unit of a split a row belongs to (an expert, a head); a rank holds the row if it holds that unit."""

    split: Split
    """How all units are cut over tp, in rows of the local parameter."""
    index: int
    unit: int
    """Rows of the local parameter that one unit takes."""

    def start(self, tp: int, tp_rank: int) -> int | None:
        """First row of this unit in the local parameter; None if it is on another rank."""
        lo, hi = self.split.range(tp, tp_rank)
        return self.index * self.unit - lo if lo <= self.index * self.unit < hi else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A weight, or a part of one, and its place in a parameter of the module; see `weights.table.Piece`."""

    weight: str
    """Key in the family's table of tensor names; `{name}_bias` for the bias of a matrix."""
    param: str
    """Parameter of the module."""
    split: Split
    """How the dimension along which ranges are counted is cut over tp."""
    other: tuple[int, ...] = ()
    """Sizes of the remaining dimensions: () for a vector, (columns,) or (rows,) for a matrix."""
    dim: int = 0
    """Dimension of the parameter along which ranges are counted."""
    before: tuple[Split, ...] = ()
    """The splits of what precedes it in a stacked parameter."""
    linear: bool = False
    """The matrix of a linear map, [out, in]: stored in the format that linears have."""
    expert: int | None = None
    """Index of the expert whose weight it is; fills in `{expert}` in the tensor's name."""
    place: Place | None = None
    """The unit it belongs to: only the rank that has this unit holds the row."""
    stored: tuple[int, ...] = ()
    """Shape of its tensor in a checkpoint where that has more dimensions than here: the first are then the rows and the
    others the columns, or all of them a vector; (): it has as many."""
    spread: tuple[float, float] | None = None
    """A vector's first and last number in a new model, evenly spread between; None: zeros, of norms ones."""
    std: float | None = None
    """Standard deviation of a matrix in a new model; None: that of the model."""
    exact: bool = False
    """It is float32 in memory, and stays in the dtype that it is stored in."""


def stacked(
    param: str, parts: Iterable[tuple[str, Split]], biases: str | None = None, *, linear: bool = True, **of_each: Any
) -> list[Row]:
    """Rows of the weights `parts` (name, split) stacked in one parameter; `of_each`: further fields of every row.

    `biases`: parameter of their biases, stacked in the same order; None: they have none.
    """
    rows: list[Row] = []
    before: tuple[Split, ...] = ()
    for name, split in parts:
        place: dict[str, Any] = {"split": split, "before": before}
        rows.append(Row(weight=name, param=param, linear=linear, **place, **of_each))
        if biases is not None:
            rows.append(Row(weight=f"{name}_bias", param=biases, **place))
        before = (*before, split)
    return rows


def projection_back(weight: str, module: str, split: Split, hidden: int, *, bias: bool = False) -> list[Row]:
    """Rows of a row-parallel linear map of `hidden` outputs, whose inputs are cut by `split`."""
    row = Row(weight=weight, param=f"{module}.weight", split=split, other=(hidden,), dim=1, linear=True)
    return [row, *([Row(weight=f"{weight}_bias", param=f"{module}.bias", split=Whole(hidden))] if bias else [])]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What one sublayer keeps on one rank while it generates."""

    token: tuple[tuple[int, int], ...] = ()
    """Of each token, in pages: (heads, width) of each cached tensor, such as the keys, in the model's dtype."""
    sequence: tuple[tuple[int, ...], ...] = ()
    """The states of each running sequence, outside of pages: the shape of each, float32; see `recurrence.States`."""

    @classmethod
    def state(cls, taps: int, channels: int, heads: int, keys: int, values: int) -> CacheSpec:
        """States of linear attention: the convolution's last inputs, and a matrix [keys, values] of each head."""
        return cls(sequence=((taps - 1, channels), (heads, keys, values)))

    @classmethod
    def keys_and_values(cls, heads: int, width: int) -> CacheSpec:
        """A key and a value of each head, both `width` wide."""
        return cls(token=((heads, width),) * 2)

    @property
    def token_elements(self) -> int:
        return sum(heads * width for heads, width in self.token)

    @property
    def sequence_bytes(self) -> int:
        return 4 * sum(math.prod(shape) for shape in self.sequence)


class LayerKind(ABC):
    """A kind of sublayer, with its sizes and choices. Subclasses are frozen dataclasses, compared by value.

    `hidden` is the width of the residual stream throughout.
    """

    @abstractmethod
    def rows(self, hidden: int) -> list[Row]:
        """Its rows of the weight table, in order."""

    @abstractmethod
    def parameters(self, hidden: int) -> int:
        """Number of parameters of its matrices; norms and biases are not counted."""

    @abstractmethod
    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        """The module that computes it.

        Its parameters are named as the rows, and sized by the same splits.
        """

    def active_parameters(self, hidden: int) -> int:
        """Number of parameters of the matrices that a token is multiplied by."""
        return self.parameters(hidden)

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        """What it caches of tokens and sequences on one tp rank."""
        return CacheSpec()

    def attended(self, length: int) -> int:
        """Keys that the last token of a sequence of `length` tokens is compared with; a state counts as one key."""
        return 0

    @property
    def flops_per_key(self) -> int:
        """Operations for each key that a token attends to, forward."""
        return 0

    def widest(self, tp: int, tp_rank: int) -> int:
        """Most activations of a token at one time, in numbers, besides those as wide as the residual stream."""
        return 0

    def kept(self, tp: int, tp_rank: int) -> int:
        """Activations of a token kept for backward, in numbers, besides those as wide as the residual stream."""
        return 0

    @property
    def query_heads(self) -> int:
        """Attention heads, which are cut over tp; 0: it has none."""
        return 0

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding that it uses; None: none."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sublayer:
    """One kind of a layer and how it sits on the residual stream: x + scale * post_norm(kind(norm(x)))."""

    name: str
    """Name of the module; its parameters' names begin with it."""
    kind: LayerKind
    norm: str | None
    """Name of the norm of what it reads, its own or one that it shares; None: it reads the stream as it is."""
    post_norm: str | None = None
    """Name of the norm of what it adds; None: none."""
    beside: bool = False
    """It reads the same stream as the sublayer before it, without that one's output."""
    scale: float = 1.0
    """Multiplies what it adds."""


Kind = TypeVar("Kind", bound=LayerKind)


@dataclass(frozen=True, slots=True)
class Layer:
    """The sublayers of one layer, in order."""

    sublayers: tuple[Sublayer, ...]

    @property
    def kinds(self) -> Iterator[LayerKind]:
        return (part.kind for part in self.sublayers)

    @property
    def norms(self) -> list[str]:
        """Names of the norms of its sublayers, each once."""
        names = (name for part in self.sublayers for name in (part.norm, part.post_norm) if name is not None)
        return list(dict.fromkeys(names))

    def of(self, kind: type[Kind]) -> Iterator[Kind]:
        """Its sublayers of one kind."""
        return (one for one in self.kinds if isinstance(one, kind))

    def parameters(self, hidden: int) -> int:
        """Number of parameters of its matrices."""
        return sum(kind.parameters(hidden) for kind in self.kinds)

    def active_parameters(self, hidden: int) -> int:
        """Number of parameters of the matrices that a token is multiplied by."""
        return sum(kind.active_parameters(hidden) for kind in self.kinds)

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        """What its sublayers cache, all together."""
        specs = [kind.cache(tp, tp_rank) for kind in self.kinds]
        return CacheSpec(
            token=tuple(size for spec in specs for size in spec.token),
            sequence=tuple(shape for spec in specs for shape in spec.sequence),
        )

    @property
    def has_state(self) -> bool:
        """Whether a sublayer keeps a state of each sequence."""
        return bool(self.cache(1, 0).sequence)

    def flops_over_keys(self, length: int) -> int:
        """Operations of attention for the last token of a sequence of `length` tokens, forward."""
        return sum(kind.flops_per_key * kind.attended(length) for kind in self.kinds)


def transformer_layer(
    attention: LayerKind,
    mlp: LayerKind,
    *,
    pre_norms: bool = True,
    post_norms: bool = False,
    parallel: Literal["one_norm", "two_norms"] | None = None,
    scale: float = 1.0,
) -> Layer:
    """Attention, then an MLP.

    `pre_norms`: of what each reads; `post_norms`: of what each adds; `parallel`: both read the same stream, through one
    norm or each through its own; `scale` multiplies what each adds.
    """

    def sublayer(name: str, kind: LayerKind, norm: str, *, beside: bool = False) -> Sublayer:
        return Sublayer(
            name=name,
            kind=kind,
            norm=norm if pre_norms else None,
            post_norm=f"post_{name}_norm" if post_norms else None,
            beside=beside,
            scale=scale,
        )

    norm = "attn_norm" if parallel == "one_norm" else "mlp_norm"
    return Layer((sublayer("attn", attention, "attn_norm"), sublayer("mlp", mlp, norm, beside=parallel is not None)))
