"""The plan of copying weights between files: which ranges are read, from where, to make which others. Torch-free.

A part is one Hugging Face tensor, or one weight of a fused one. It is cut along one dimension: a Hugging Face file has
all of it in one `Extent`, each rank file the range that the weight table gives that rank. A `Move` holds the extents
that a part is read from and those it is written to; convert, reshard, export and verify are lists of moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megalite.errors import CheckpointError
from megalite.weights.dtypes import DTYPE_BYTES
from megalite.weights.manifest import WEIGHT
from megalite.weights.table import Range, Weights, pieces
from megalite.weights.tensor_file import TensorInfo

Part = tuple[str, int, str]
"""Hugging Face tensor, its first index that belongs to the weight, and the kind: weights or optimizer state."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range and the tensor of a file that it lies in.

    Its bytes are rows of the stored matrix, if the range lies along dim 0, or a piece of each row. A vector counts as a
    matrix of one column; of more than two dimensions the first count as rows and the others as columns.
    """

    range: Range
    info: TensorInfo
    digest: str = ""
    """Digest of the bytes, row by row as stored; empty if it is not known."""
    kind: str = WEIGHT

    @property
    def part(self) -> Part:
        return self.range.piece.hf, self.range.piece.hf_start, self.kind

    @property
    def file(self) -> Path:
        return self.info.file

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the extent, as stored."""
        count, row = self.range.count, self.range.piece.row
        return (count, row) if self.range.dim == 0 else (row, count)

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * DTYPE_BYTES[self.info.dtype]

    @property
    def nbytes(self) -> int:
        return self.range.elements * DTYPE_BYTES[self.info.dtype]

    @property
    def stride(self) -> int:
        """Bytes from one stored row to the next."""
        columns = self.range.piece.row if self.range.dim == 0 else self.info.shape[-1]
        return columns * DTYPE_BYTES[self.info.dtype]

    @property
    def offset(self) -> int:
        """Position of the first element, in bytes from the start of the file."""
        step = self.stride if self.range.dim == 0 else DTYPE_BYTES[self.info.dtype]
        return self.info.offset + self.range.start * step

    def cut(self, lo: int, hi: int) -> Extent:
        """The part of it within lo..hi, without a digest unless that is all of it."""
        lo, hi = max(lo, self.range.lo), min(hi, self.range.hi)
        if (lo, hi) == (self.range.lo, self.range.hi):
            return self
        return replace(self, range=self.range.cut(lo, hi), digest="")


@dataclass(frozen=True, slots=True)
class Move:
    """Extents that together hold lo..hi of a part, in order, and the extents to be made of them."""

    sources: tuple[Extent, ...]
    targets: tuple[Extent, ...] = ()

    @property
    def part(self) -> Part:
        return self.sources[0].part

    @property
    def lo(self) -> int:
        return self.sources[0].range.lo

    @property
    def hi(self) -> int:
        return self.sources[-1].range.hi

    @property
    def dtype(self) -> str:
        """Dtype of the sources."""
        return self.sources[0].info.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that this move writes."""
        return sum(extent.nbytes for extent in self.targets)

    @property
    def place(self) -> tuple[str, int]:
        """Position at which reading begins; moves performed in this order read disks and caches fastest."""
        return str(self.sources[0].file), self.sources[0].offset


def hf_extents(config: Weights, tensors: dict[str, TensorInfo]) -> list[Extent]:
    """Where each part lies in Hugging Face files. A part that is used twice (a tied embedding) is there once."""
    found: dict[tuple[str, int], Extent] = {}
    for piece in pieces(config):
        found.setdefault((piece.hf, piece.hf_start), Extent(piece.as_stored(), tensors[piece.hf]))
    return list(found.values())


def by_part(extents: Iterable[Extent]) -> dict[Part, list[Extent]]:
    """The extents of each part, in their order."""
    found: dict[Part, list[Extent]] = {}
    for extent in extents:
        found.setdefault(extent.part, []).append(extent)
    return found


def plan(sources: Iterable[Extent], targets: Iterable[Extent]) -> list[Move]:
    """One move for each part of `targets`, in the order in which the sources lie in their files.

    Copies of a range are read once. CheckpointError if a part's sources differ in dtype.
    """
    there = by_part(sources)
    moves = [move_of(there[part], wanted) for part, wanted in by_part(targets).items()]
    return sorted(moves, key=lambda move: move.place)


def reading(sources: Iterable[Extent], wanted: Range, *, whole: bool) -> Move:
    """The move without targets that brings a range, out of extents of its part.

    Of the extents only what lies in the range is read, so the digest of an extent is checked where all of it is needed.
    `whole`: extents are read whole, and every digest is checked.
    """
    needed = [extent for extent in sources if extent.range.lo < wanted.hi and wanted.lo < extent.range.hi]
    move = move_of(needed if whole else [extent.cut(wanted.lo, wanted.hi) for extent in needed])
    assert move.lo <= wanted.lo and wanted.hi <= move.hi, f"no source holds all of {wanted}"
    return move


def move_of(sources: Iterable[Extent], targets: Sequence[Extent] = ()) -> Move:
    """The move from extents of one part, of which copies of a range are left out, to others."""
    distinct: dict[int, Extent] = {}
    for extent in sources:
        distinct.setdefault(extent.range.lo, extent)
    chosen = [distinct[lo] for lo in sorted(distinct)]
    move = Move(tuple(chosen), tuple(targets))
    assert all(a.range.hi == b.range.lo for a, b in pairwise(chosen)), f"{move.part}: the sources leave a gap"
    inside = all(move.lo <= extent.range.lo and extent.range.hi <= move.hi for extent in targets)
    assert inside, f"{move.part}: a target lies where no source is"
    odd = next((extent for extent in chosen if extent.info.dtype != move.dtype), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd.file}: {odd.range} is {odd.info.dtype}, other ranges of the tensor are {move.dtype}"
        )
    return move
