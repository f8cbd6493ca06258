"""Rotary position embeddings (RoPE, arXiv 2104.09864) with linear, dynamic NTK, Llama 3, YaRN and LongRoPE scaling."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from megalite.core.functional import has_kernels, rotate, rotate_by_table
from megalite.model.config import Rope, RopeScaling

MAX_TABLE_BYTES = 1 << 26
"""Largest table of all positions' angles that is kept on an accelerator: 131,072 positions of 128 channels."""


class Rotary:
    """A model's rotary frequencies; called once in every forward pass, it returns the `Rotation` of its tokens.

    The angle of channel pair c of a token is its position times frequency c. The frequencies of LongRoPE and dynamic
    NTK depend on the longest length that the token's sequence may get, see `AttentionContext.lengths`.
    """

    def __init__(self, rope: Rope, num_positions: int = 0):
        """`num_positions`: of the longest sequence; 0: not known, so no table of angles is kept."""
        self.scaling = rope.scaling
        with torch.device("cpu"):
            exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
            plain = 1.0 / rope.theta**exponent
            self._frequencies = (
                plain[None] if rope.scaling is None else _TABLES[rope.scaling.kind](plain, rope, rope.scaling)
            )
        self.factor = rope.scaling.attention_factor if rope.scaling is not None else 1.0
        """Multiplies cos and sin."""
        keeps = len(self._frequencies) == 1 and num_positions * rope.rotary_dim * 4 <= MAX_TABLE_BYTES
        self._num_positions = num_positions if keeps else 0
        self._table: Tensor | None = None

    def __call__(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rotation:
        """For tokens at `positions` of sequences of at most `lengths` tokens: int64 [T] each; `dtype`: of q and k."""
        return Rotation(self, positions, lengths, dtype)

    def angles(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of tokens at `positions` of sequences of at most `lengths`: float32 [T, rotary_dim / 2] each."""
        angles = positions[:, None].float() * self.frequencies(lengths)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def table(self, device: torch.device) -> Tensor | None:
        """cos, then sin of every position, float32 [positions, rotary_dim]; None: too large, or it depends on more."""
        if not self._num_positions:
            return None
        if self._table is None or self._table.device != device:
            positions = torch.arange(self._num_positions, device=device)
            self._table = torch.cat(self.angles(positions, positions), -1)
        return self._table

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Angle per position of each rotated channel pair: float32 [T, rotary_dim / 2], or [1, ...] for all tokens."""
        if self._frequencies.device != lengths.device:
            self._frequencies = self._frequencies.to(lengths.device)
        scaling, known, lengths = self.scaling, self._frequencies, lengths[:, None]
        if scaling is None or len(known) == 1:
            return known
        if scaling.kind == "longrope":
            return torch.where(lengths > scaling.original_max_position, known[1], known[0])
        stretch = (lengths / scaling.original_max_position).clamp(min=1)
        return known[0] * (scaling.factor * stretch - (scaling.factor - 1)) ** known[1]


class Rotation:
    """The rotation of one forward pass's tokens; their angles are computed when something asks for them."""

    def __init__(self, rotary: Rotary, positions: Tensor, lengths: Tensor, dtype: torch.dtype):
        self.rotary = rotary
        self.positions = positions
        self.lengths = lengths
        self.dtype = dtype

    @cached_property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """In the dtype of q and k: [T, 1, rotary_dim / 2] each."""
        cos, sin = self.rotary.angles(self.positions, self.lengths)
        return cos.to(self.dtype)[:, None], sin.to(self.dtype)[:, None]

    @cached_property
    def table(self) -> tuple[Tensor, Tensor | None]:
        """cos, then sin, float32 [P, rotary_dim], and the row of each token, int64 [T]; None: row t is token t's."""
        table = self.rotary.table(self.positions.device)
        if table is not None:
            return table, self.positions
        return torch.cat(self.rotary.angles(self.positions, self.lengths), -1), None

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate query or key heads [T, H, D] -> [T, H, D]; channels beyond rotary_dim pass through."""
        return rotate_by_table(x, *self.table) if has_kernels(x) else rotate(x, *self.cos_sin)


def _linear(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    return (plain / scaling.factor)[None]


def _dynamic(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """Dynamic NTK: theta grows with the sequence. Rows: the frequencies of short sequences, and the exponent with which
    each falls as theta grows."""
    pairs = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32)
    return torch.stack([plain, -pairs / (rope.rotary_dim - 2)])


def _llama3(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are scaled, short ones kept, those between interpolated (Llama 3.1 model card)."""
    turns = scaling.original_max_position * plain / (2 * math.pi)  # rotations over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (plain * (kept + (1 - kept) / scaling.factor))[None]


def _yarn(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN, arXiv 2309.00071: a ramp over channels between kept and scaled frequencies."""

    def channel(rotations: float) -> float:
        wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 1e-3  # below zero where the original context is shorter than a rotation, as in transformers
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width
    kept = 1 - ramp.clamp(0, 1)
    return (plain * (kept + (1 - kept) / scaling.factor))[None]


def _longrope(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """LongRoPE, arXiv 2402.13753: divisors for sequences up to the original length, and for longer ones."""
    return plain / torch.tensor([scaling.short_factor, scaling.long_factor], dtype=torch.float32)


_TABLES = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
"""Makers of the rows [1 or 2, rotary_dim / 2] from which `Rotary.frequencies` follow; one row: for every length."""
