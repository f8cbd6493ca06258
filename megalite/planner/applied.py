"""How a device applies weights in formats of their own, as arithmetic: what `core.linear` and experts do with them.

A GPU with float8 keeps codes, with scales and zero points as its kernels take them, and multiplies them as they are
read where rows are few. For more rows, fp8 with a scale a row, or a block of 128 x 128, is multiplied as fp8, and all
else by the numbers written out first. Other devices, and models in float32, make numbers of codes once, while weights
are loaded. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from megalite.core.formats import ALL, Awq, Elementwise, Gptq, Mxfp4, Packed, WeightFormat
from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.weights.table import Range, owned

Way = Literal["numbers", "codes", "fp8"]
"""How many rows are multiplied: by numbers that lie there, by numbers that codes are made into each time, or in fp8."""
CODED_ROWS = 64
"""Rows up to which codes are multiplied as they are read,"""
SCALED_ROWS = 16
"""in fp8, of which more rows are made fp8 too,"""
CODED_EXPERT_ROWS = 256
"""and of experts, a row being one token's of one expert, each of which reads that expert's codes."""
SCALED_BLOCK = 128
"""Rows and columns that share a scale where fp8 is multiplied by blocks."""
LEAST_BLOCK = 32
"""Channels that share a scale, at least, that kernels take; with fewer a device keeps numbers."""
ZERO_BYTES = 2
"""Of a zero point."""
ORDER_BYTES = 8
"""Of a column's place in the order of groups."""


class Rates(NamedTuple):
    """What a rank gets of a device."""

    read: float
    """Bytes a second."""
    matmul: float
    """Operations a second, of numbers,"""
    fp8: float
    """and of float8."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """Weights of a rank that are applied alike."""

    way: Way = "numbers"
    numbers: int = 0
    nbytes: int = 0
    """As the device holds and reads them, scales included."""
    inputs: int = 0
    """Channels that they are multiplied with, of all matrices together."""

    def __add__(self, other: Matrices) -> Matrices:
        assert self.way == other.way
        sums = (self.numbers + other.numbers, self.nbytes + other.nbytes, self.inputs + other.inputs)
        return Matrices(self.way, *sums)

    def seconds(self, rows: float, rates: Rates, itemsize: int) -> tuple[float, float]:
        """To read them for so many rows, and what their product takes beyond that."""
        if self.way == "numbers" or rows <= (SCALED_ROWS if self.way == "fp8" else CODED_ROWS):
            return _roofline(self.nbytes / rates.read, 2 * rows * self.numbers / rates.matmul)
        if self.way == "fp8":
            converted = rows * self.inputs * (2 * itemsize + 1)  # read for the scale, read again, written
            reading, beyond = _roofline(self.nbytes / rates.read, 2 * rows * self.numbers / rates.fp8)
            return reading, beyond + converted / rates.read
        return self._written_out(self.numbers, 2 * rows * self.numbers, rates, itemsize)

    def seconds_of_experts(
        self, tokens: float, chosen: int, experts: int, rates: Rates, itemsize: int
    ) -> tuple[float, float]:
        """As `seconds`, of a rank's experts, where each token takes `chosen` of all `experts` of the layer."""
        share = chosen / experts
        touched, work = 1 - (1 - share) ** tokens, 2 * tokens * share * self.numbers
        if self.way == "numbers":
            return _roofline(touched * self.nbytes / rates.read, work / rates.matmul)
        if tokens * chosen <= CODED_EXPERT_ROWS:
            return _roofline(tokens * share * self.nbytes / rates.read, work / rates.matmul)
        return self._written_out(touched * self.numbers, work, rates, itemsize)

    def _written_out(self, used: float, work: float, rates: Rates, itemsize: int) -> tuple[float, float]:
        """All codes are read and written as numbers, of which `used` are read again."""
        written = (self.nbytes + self.numbers * itemsize) / rates.read
        reading, beyond = _roofline(used * itemsize / rates.read, work / rates.matmul)
        return written + reading, beyond


def _roofline(reading: float, computing: float) -> tuple[float, float]:
    """Seconds to read, and those of both together beyond that; see `cost`."""
    return reading, math.hypot(reading, computing) - reading


def applied(one: Range, itemsize: int, *, codes: bool) -> Matrices:
    """A range of the weight table as a device holds it; `codes`: its kernels multiply them, see `Device.fp8`.

    Scales and zero points are counted with the codes that they belong to.
    """
    piece = one.piece
    if piece.format is None or piece.part is None:
        first = piece.linear and not any(split.total for split in piece.before)
        columns = 0 if not first else one.count if piece.dim == 1 else piece.row
        return Matrices("numbers", one.elements, one.elements * piece.itemsize(itemsize), columns)
    if not piece.numbers:
        return Matrices()
    columns = (one.count if piece.dim == 1 else piece.row) * (piece.part.columns or 1)
    numbers = one.elements * piece.numbers
    cut = piece.dim == 1 and one.count < piece.split.total
    found = coded(piece.format, numbers // columns, columns, cut=cut) if codes and itemsize == 2 else None
    way: Way
    way, nbytes = ("numbers", numbers * itemsize) if found is None else found
    if found is not None and _ordered(piece.format) and not piece.before:
        nbytes += ORDER_BYTES * columns
    if way == "fp8" and piece.expert is not None:
        way = "codes"
    return Matrices(way, numbers, nbytes, 0 if piece.before else columns)


def coded(format: WeightFormat, rows: int, columns: int, *, cut: bool) -> tuple[Way, int] | None:
    """How kernels apply a matrix, and its bytes as they take it, as `core.quantized.coded` makes it of real weights;
    None: it becomes numbers. `cut`: only some of its columns are on the rank.

    Scales of groups are taken to be exact in 16 bits, as they are stored.
    """
    group = _group(format) or columns
    if columns % group or min(128, group & -group) < LEAST_BLOCK or (_ordered(format) and cut):
        return None
    is_fp8 = isinstance(format, Elementwise) and format.dtype == "F8_E4M3"
    scale = 4 if isinstance(format, Elementwise) else 2
    zero = 0 if is_fp8 or isinstance(format, Mxfp4) else ZERO_BYTES
    entries = rows * (columns // group)
    nbytes = rows * columns * format.bits // 8 + entries * (scale + zero)
    suits = is_fp8 and entries == rows and rows % 16 == columns % 16 == 0  # as cuBLAS takes it
    if isinstance(format, Elementwise) and format.block == (SCALED_BLOCK, SCALED_BLOCK) and rows % SCALED_BLOCK == 0:
        nbytes += 4 * (rows // SCALED_BLOCK) * (columns // SCALED_BLOCK)
        suits = is_fp8 and columns % (4 * SCALED_BLOCK) == 0
    return "fp8" if suits else "codes", nbytes


@lru_cache(maxsize=64)
def written_out(config: ModelConfig, layout: Layout, rank: int, itemsize: int) -> int:
    """Bytes of the largest of a rank's parameters that is written out as numbers for many rows, all of its experts
    together; the head is counted with logits. 0: none is."""
    found: Counter[str] = Counter()
    for one in owned(config, layout, rank) if config.quantization is not None else ():
        part = applied(one, itemsize, codes=True)
        if part.way == "codes" and one.piece.stage != "last":
            found[one.piece.param] += part.numbers * itemsize
    return max(found.values(), default=0)


def _ordered(format: WeightFormat) -> bool:
    """Columns are in groups by an order of their own."""
    return isinstance(format, Gptq | Packed) and format.act_order


def _group(format: WeightFormat) -> int:
    """Columns that share a scale; ALL: all of them."""
    match format:
        case Elementwise(block=block):
            return ALL if block is None else block[1]
        case Gptq(group=group) | Awq(group=group) | Packed(group=group):
            return group
    return 32  # of Mxfp4
