"""`ModelConfig`: sizes and choices of a decoder-only transformer; importable without torch.

`families.py` reads a Hugging Face config.json into a `ModelConfig`; `decoder.py` builds the model from it and
`weights/table.py` the weight table. A field is named for what it decides, never for the family that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalite.core.layout import LayerCosts


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
    attention_factor: float = 1.0
    """yarn, longrope: multiplies cos and sin."""
    short_factor: tuple[float, ...] = ()
    """longrope (arXiv 2402.13753): divisor of each frequency for sequences up to original_max_position."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same for longer sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), half-split as in Llama's Hugging Face form."""

    theta: float = 10000.0
    rotary_dim: int
    """Number of leading channels of a head that are rotated."""
    scaling: RopeScaling | None = None


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


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """A mixture of experts in place of the MLP; each tp rank holds whole experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Hidden width of one expert."""
    normalize_top_k: bool
    """Divide the chosen experts' probabilities by their sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    family: str
    """Key in families.FAMILIES."""
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """Longest sequence in tokens, RoPE scaling included; number of learned positions."""
    attention: tuple[AttentionSpec, ...]
    """Of each layer."""
    moe: tuple[MoESpec | None, ...]
    """Of each layer; None: a dense MLP."""
    tie_embeddings: bool
    norm: Literal["rms", "rms_zero_centred", "layer"] = "rms"
    """rms_zero_centred: the weight is stored as its difference from one."""
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Normalise each head's query and key before the rotation."""
    post_norms: bool = False
    """Also normalise the output of attention and of the MLP, before each is added back."""
    gated_mlp: bool = True
    """down(act(gate) * up), else down(act(up))."""
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    rope: Rope | None = None
    learned_positions: bool = False
    """Add a learned vector for each position to the embedding; max_position_embeddings of them."""
    embedding_scale: float | None = None
    """Multiplies the embedding, after rounding to the model's dtype; None: nothing does."""
    final_softcap: float | None = None
    """Logits become softcap * tanh(logit / softcap)."""
    router_aux_loss_coef: float = 0.0
    """Weight of the experts' load-balancing loss in training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the checkpoint by its config.json."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    def key_variant(self, length: int) -> int:
        """Which rotary frequencies a sequence of at most `length` tokens has: it shares keys with those of equal value.

        0 except for longrope and dynamic, whose frequencies depend on the length; see model/rope.py.
        """
        scaling = self.rope.scaling if self.rope is not None else None
        if scaling is None or length <= scaling.original_max_position:
            return 0
        return {"longrope": 1, "dynamic": length}.get(scaling.kind, 0)

    def layer_parameters(self, layer: int) -> int:
        """Number of parameters of one layer without norms and biases."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        matrices = 3 if self.gated_mlp else 2
        moe = self.moe[layer]
        if moe is None:
            return heads + matrices * self.hidden_size * self.intermediate_size
        experts = moe.num_experts * (matrices * self.hidden_size * moe.intermediate_size + self.hidden_size)
        return heads + experts

    def layer_costs(self) -> LayerCosts:
        """Number of parameters of each layer and of both ends: what a decode step reads and what a rank holds."""
        vocab = self.vocab_size * self.hidden_size
        positions = self.max_position_embeddings * self.hidden_size if self.learned_positions else 0
        layers = tuple(self.layer_parameters(layer) for layer in range(self.num_layers))
        return LayerCosts(layers=layers, first=vocab + positions, last=vocab)
