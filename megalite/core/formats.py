"""How a weight [N, K] is stored: which tensors make it, how many of its elements share an entry of each, and which
numbers they hold. Importable without torch; how a format is computed with is `core.quantized`.

    fp8         codes of 8 bits (float8 e4m3, or int8) and scales: of the matrix, of each row, or of blocks
    gptq        codes of 4 or 8 bits in int32 along K, of each group of inputs a scale and a zero point
    awq         codes of 4 bits in int32 along N, in an order of their own, of each group a scale and a zero point
    packed      compressed-tensors' pack-quantized: codes of 4 or 8 bits in int32 along K, scales, perhaps zero points
    mxfp4       codes of 4 bits (float e2m1), of each 32 inputs an exponent

A weight is cut over tp only where an entry of all its tensors ends (`units`), so that its parts are rows or columns of
the stored tensors, bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ALL = 0
"""One entry for all rows, or all columns."""
FLOATS = ("F32", "F16", "BF16")
INTS = ("I32", "I64")
Stage = int | Literal["first", "last"]
"""Global layer index, or the part of the model before its layers (first) or after them (last)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that make a weight: [rows, columns], or a vector."""

    name: str
    """In place of `weight` in the tensor's name, and in the parameter's."""
    rows: int | None = 1
    """Rows of the weight that share one row of this tensor, or ALL; None: it is a vector along the columns."""
    columns: int | None = 1
    """Columns of the weight that share one column of this tensor, or ALL; None: it has no columns."""
    dtypes: tuple[str, ...] = FLOATS
    """Dtypes that it may be stored in, by safetensors' names."""
    turned: bool = False
    """The checkpoint has it as [columns, rows]."""
    whole: bool = False
    """Its columns are not cut over tp."""
    entries: int = 1
    """Its length, where `rows` is ALL and `columns` is None."""
    folded: int = 0
    """Size of the second of the two dimensions that its columns are in the checkpoint; 0: they are one."""

    def height(self, rows: int) -> int:
        """Number of its rows, or entries, for a weight of `rows` rows."""
        return self.entries if self.rows == ALL else -(-rows // (self.rows or 1))

    def width(self, columns: int) -> int:
        """Number of its columns for a weight of `columns` columns."""
        return 1 if self.columns == ALL else -(-columns // (self.columns or 1))

    @property
    def is_float(self) -> bool:
        """It holds floats, which are float32 in memory; else codes, which stay as they are stored."""
        return self.dtypes == FLOATS


class WeightFormat(ABC):
    """How the weights of linear maps are stored. Subclasses are frozen dataclasses, compared by value."""

    bits: int

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Its tensors; the first holds the codes."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The format in words, for people."""

    @property
    def units(self) -> tuple[int, int]:
        """(rows, columns): a weight is cut only at multiples of these."""
        rows = math.lcm(*(part.rows for part in self.parts if part.rows))
        columns = math.lcm(*(part.columns for part in self.parts if part.columns and not part.whole))
        return rows, columns

    def shapes(self, segments: Sequence[int], columns: int, all_columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors of stacked matrices.

        `segments`: rows of each matrix; `columns`: on this rank; `all_columns`: before the cut over tp.
        """
        found: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            if part.rows is None:
                found[part.name] = (len(segments) * part.width(columns),)
                continue
            height, width = sum(map(part.height, segments)), part.width(all_columns if part.whole else columns)
            found[part.name] = (height,) if part.columns is None else (height, width)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Elementwise(WeightFormat):
    """Each element a code of 8 bits: weight = code * scale (Micikevicius et al., arXiv 2209.05433, for e4m3)."""

    dtype: str = "F8_E4M3"
    """Dtype of the codes: F8_E4M3 or I8."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale, ALL for all; None: one scale for the matrix."""
    scale_name: str = "weight_scale"
    input_scale: str | None = None
    """Name of the one scale of all activations, where there is one."""
    bits: int = 8

    @property
    def parts(self) -> tuple[Part, ...]:
        scale = Part(self.scale_name, ALL, None) if self.block is None else Part(self.scale_name, *self.block)
        inputs = (Part(self.input_scale, ALL, None),) if self.input_scale else ()
        return (Part("weight", dtypes=(self.dtype,)), scale, *inputs)

    @property
    def words(self) -> str:
        kind = "fp8 e4m3" if self.dtype == "F8_E4M3" else "int8"
        if self.block is None:
            return f"{kind}, a scale a matrix"
        return (
            f"{kind}, a scale a row" if self.block == (1, ALL) else f"{kind}, blocks of {self.block[0]}x{self.block[1]}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq(WeightFormat):
    """GPTQ (arXiv 2210.17323): weight = (code - zero) * scale of the group that `g_idx` says of each column."""

    bits: int = 4
    group: int
    """Columns; ALL: one group."""
    act_order: bool = False
    """Columns are in groups by their importance, not by their place."""
    zero_offset: int = 1
    """Stored zero points are lower by this (v1: 1, v2: 0). It is subtracted from the int32 that packs several, so one
    that is 0 borrows from the next."""

    @property
    def parts(self) -> tuple[Part, ...]:
        per = 32 // self.bits
        ints = ("I32",)
        return (
            Part("qweight", 1, per, ints, turned=True),
            Part("qzeros", per, self.group, ints, turned=True, whole=self.act_order),
            Part("scales", 1, self.group, turned=True, whole=self.act_order),
            Part("g_idx", None, 1, INTS),
        )

    @property
    def words(self) -> str:
        return f"gptq int{self.bits}, {_group_words(self.group)}{', act-order' if self.act_order else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(WeightFormat):
    """AWQ's gemm layout (arXiv 2306.00978): weight = (code - zero) * scale."""

    group: int
    bits: int = 4

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("qweight", 8, 1, ("I32",), turned=True),
            Part("qzeros", 8, self.group, ("I32",), turned=True),
            Part("scales", 1, self.group, turned=True),
        )

    @property
    def words(self) -> str:
        return f"awq int4, {_group_words(self.group)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed(WeightFormat):
    """compressed-tensors' pack-quantized: weight = (code - zero) * scale; without zero points the middle code is 0."""

    bits: int = 4
    group: int
    """Columns; ALL: one group."""
    symmetric: bool = True
    act_order: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        per = 32 // self.bits
        found = [
            Part("weight_packed", 1, per, ("I32",)),
            Part("weight_scale", 1, self.group, whole=self.act_order),
            Part("weight_shape", ALL, None, INTS, entries=2),
        ]
        if not self.symmetric:
            found.append(Part("weight_zero_point", per, self.group, ("I32",), whole=self.act_order))
        if self.act_order:
            found.append(Part("weight_g_idx", None, 1, INTS))
        return tuple(found)

    @property
    def words(self) -> str:
        kind = f"int{self.bits}{'' if self.symmetric else ' with zero points'}"
        return f"packed {kind}, {_group_words(self.group)}{', act-order' if self.act_order else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4(WeightFormat):
    """Microscaling floats (OCP MX 1.0, section 5) as gpt-oss has them: weight = code * 2^(exponent - 127), codes e2m1,
    an exponent for 32 columns."""

    bits: int = 4

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("blocks", 1, 2, ("U8",), folded=16), Part("scales", 1, 32, ("U8",))

    @property
    def words(self) -> str:
        return "mxfp4, groups of 32"


def _group_words(group: int) -> str:
    return "one group a row" if group == ALL else f"groups of {group}"


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which matrices of a model are stored in which format; the others are plain numbers."""

    formats: tuple[tuple[Stage, str, WeightFormat], ...]
    """(stage, key in the family's table of tensor names, format) of each matrix."""
    method: str
    """As config.json and `model.quantization` call it."""

    @property
    def words(self) -> str:
        """The formats there are, for people."""
        return "; ".join(sorted({format.words for _, _, format in self.formats}))
