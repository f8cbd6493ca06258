"""`ModelConfig`: sizes and choices of a decoder-only transformer; importable without torch.

`families.py` reads a Hugging Face config.json into a `ModelConfig`; `decoder.py` builds the model from it and
`weights/table.py` the weight table. A field is named for what it decides, never for the family that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megalite.core.formats import Quantization, Stage, WeightFormat
from megalite.core.layout import Even, Groups, LayerCosts, Split, Whole
from megalite.model.kinds.base import Kind, Layer, Row

ActivationName = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2", "xielu"]
XIELU_BETA, XIELU_EPS = 0.5, -1e-6
"""Numbers of xielu that are not learned."""
NormName = Literal["rms", "rms_zero_centred", "layer", "layer_zero_centred", "layer_without_bias"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """RoPE scaling: changed rotary frequencies for contexts longer than those of pre-training."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_max_position: int
    """Longest sequence without the scaling, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / this are kept."""
    beta_fast: float = 32.0
    """yarn (arXiv 2309.00071): rotations above which a frequency is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is divided by `factor`."""
    truncate: bool = True
    """yarn: the borders between kept and divided frequencies are whole channels."""
    attention_factor: float = 1.0
    """yarn, longrope: multiplies cos and sin."""
    short_factor: tuple[float, ...] = ()
    """longrope (arXiv 2402.13753): divisor of each frequency for sequences up to original_max_position."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same for longer sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864)."""

    theta: float = 10000.0
    rotary_dim: int
    """Number of leading channels of a head that are rotated."""
    scaling: RopeScaling | None = None
    interleaved: bool = False
    """Neighbouring channels are a pair; else channels c and c + rotary_dim / 2."""

    def variant(self, length: int) -> int:
        """Which frequencies a sequence of at most `length` tokens has; 0 where they do not depend on it."""
        if self.scaling is None or length <= self.scaling.original_max_position:
            return 0
        return {"longrope": 1, "dynamic": length}.get(self.scaling.kind, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Parameters of one layer's attention: what an attention context needs besides q, k and v."""

    layer: int
    """Global layer index."""
    scale: float
    """Multiplies q k^T."""
    window: int | None = None
    """Sliding window: number of keys a query sees, its own included; None: all earlier ones."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap); None: they stay."""
    chunk: int | None = None
    """A query sees only keys of its own chunk of so many positions; None: all earlier ones."""
    values: int | None = None
    """The leading channels of a key that are its value; None: values are tensors of their own."""
    key_scale: float = 1.0
    """An fp8 cache holds keys divided by this."""
    value_scale: float = 1.0
    """An fp8 cache holds values divided by this."""

    def first_key(self, position: int) -> int:
        """The first position that the query at `position` sees."""
        low = 0 if self.window is None else max(0, position - self.window + 1)
        return low if self.chunk is None else max(low, position // self.chunk * self.chunk)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    family: str
    """Key in families.FAMILIES."""
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    """Longest sequence in tokens, RoPE scaling included; number of learned positions."""
    layers: tuple[Layer, ...]
    """What each layer is made of."""
    tie_embeddings: bool
    norm: NormName = "rms"
    """zero_centred: the weight is stored as its difference from one."""
    norm_eps: float = 1e-6
    learned_positions: bool = False
    """Add a learned vector for each position to the embedding; max_position_embeddings of them."""
    embedding_scale: float | None = None
    """Multiplies the embedding, after rounding to the model's dtype; None: nothing does."""
    head_bias: bool = False
    logit_scale: float = 1.0
    """Multiplies the logits, before any softcap."""
    final_softcap: float | None = None
    """Logits become softcap * tanh(logit / softcap)."""
    router_aux_loss_coef: float = 0.0
    """Weight of the experts' load-balancing loss in training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the checkpoint by its config.json."""
    quantization: Quantization | None = None
    """Which matrices are stored in which quantized format; None: none."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def zero_centred(self) -> bool:
        """Norms' weights are stored as their difference from one."""
        return self.norm.endswith("zero_centred")

    @property
    def num_heads(self) -> int:
        """Attention heads of the layer that has fewest: up to so many tp ranks have heads in every layer."""
        return min((kind.query_heads for layer in self.layers for kind in layer.kinds if kind.query_heads), default=0)

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a state of each sequence; without that state a cached prefix is of no use."""
        return any(layer.has_state for layer in self.layers)

    def format(self, stage: Stage, weight: str) -> WeightFormat | None:
        """Format of a matrix, by its stage and its key in the family's table; None: plain numbers."""
        return None if self.quantization is None else _formats(self.quantization).get((stage, weight))

    @property
    def quantized_as(self) -> str | None:
        """The checkpoint's `quant_method`; None: it is not quantized."""
        return None if self.quantization is None else self.quantization.method

    def first_rows(self) -> list[Row]:
        """Rows of the weight table before the first layer."""
        rows = [Row(weight="embed", param="embed.tokens.weight", split=self.vocab, other=(self.hidden_size,))]
        if self.learned_positions:
            count = Whole(self.max_position_embeddings)
            rows.append(Row(weight="positions", param="embed.positions", split=count, other=(self.hidden_size,)))
        return rows

    def layer_rows(self, layer: int) -> list[Row]:
        """Rows of one layer: its norms, then its sublayers; parameters are named within the layer."""
        rows = [row for name in self.layers[layer].norms for row in self._norm_rows(name, name)]
        for part in self.layers[layer].sublayers:
            rows += [replace(row, param=f"{part.name}.{row.param}") for row in part.kind.rows(self.hidden_size)]
        return rows

    def last_rows(self) -> list[Row]:
        """Rows after the last layer."""
        head = "embed" if self.tie_embeddings else "lm_head"
        split = self.head_vocab
        matrix = Row(weight=head, param="head.weight", split=split, other=(self.hidden_size,), linear=True)
        bias = [Row(weight="lm_head_bias", param="head.bias", split=split)] if self.head_bias else []
        return [*self._norm_rows("final_norm", "norm"), matrix, *bias]

    def _norm_rows(self, weight: str, param: str) -> list[Row]:
        width = Whole(self.hidden_size)
        has_bias = self.norm in ("layer", "layer_zero_centred")
        bias = [Row(weight=f"{weight}_bias", param=f"{param}.bias", split=width)] if has_bias else []
        return [Row(weight=weight, param=f"{param}.weight", split=width), *bias]

    @property
    def vocab(self) -> Even:
        """How the embedding's vocabulary is cut over tp."""
        return Even(self.vocab_size)

    @property
    def head_vocab(self) -> Split:
        """How the vocabulary of head and logits is cut over tp: only where the head's format can be cut."""
        format = self.format("last", "lm_head")
        return self.vocab if format is None or format.units[0] == 1 else Groups(self.vocab_size, format.units[0])

    def of(self, kind: type[Kind]) -> list[Kind]:
        """All sublayers of one kind, in the order of the layers."""
        return [one for layer in self.layers for one in layer.of(kind)]

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of its layers."""
        found = (kind.rope for layer in self.layers for kind in layer.kinds)
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    def key_variant(self, length: int) -> int:
        """Which rotary frequencies a sequence of at most `length` tokens has: it shares keys with those of equal value.

        0 except for longrope and dynamic, whose frequencies depend on the length; see model/rope.py.
        """
        return sum(rope.variant(length) for rope in self.ropes)  # none falls as the length grows

    def layer_costs(self) -> LayerCosts:
        """Number of parameters of each layer and of both ends: what a decode step reads and what a rank holds."""
        vocab = self.vocab_size * self.hidden_size
        positions = self.max_position_embeddings * self.hidden_size if self.learned_positions else 0
        layers = tuple(layer.parameters(self.hidden_size) for layer in self.layers)
        return LayerCosts(layers=layers, first=vocab + positions, last=vocab)


@lru_cache(maxsize=8)
def _formats(quantization: Quantization) -> dict[tuple[Stage, str], WeightFormat]:
    return {(stage, weight): format for stage, weight, format in quantization.formats}
