"""Plans of what is copied from which file to which: pure functions that make lists of `Move`s.

A part is one Hugging Face tensor, or one weight of a fused one, seen as a matrix in the orientation of the local
parameter (a vector is a matrix of one column). A `Block` is a rectangle of that matrix and where its bytes lie. The
Hugging Face file has one block of a part, each rank file has what the weight table gives that rank. A `Move` holds the
blocks that a part is read from and those it is written to; convert, reshard, export and verify are all lists of moves.
Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.weights.manifest import WEIGHT
from megalite.weights.shards import expected
from megalite.weights.table import Owned, Piece, pieces
from megalite.weights.tensor_file import DTYPE_BYTES, TensorInfo

Region = tuple[int, int, int, int]
"""Of a part's matrix: top, left, rows, columns."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Which weight: the Hugging Face tensor, where in it the weight begins, and weight or optimizer state."""

    hf: str
    start: int
    kind: str = WEIGHT


@dataclass(frozen=True, slots=True)
class Block:
    """Rows top..top+rows and columns left..left+cols of a part's matrix, and where they lie."""

    file: Path
    tensor: str
    """As it is called in the file."""
    dtype: str
    offset: int
    """Of the first element, in bytes from the start of the file."""
    stride: int
    """Bytes from one stored row to the next."""
    top: int
    left: int
    rows: int
    cols: int
    transposed: bool
    """Stored rows are columns of the part's matrix."""
    range: str
    """In words, for messages."""
    digest: str = ""
    """Of the bytes, row by row as stored; empty if it is not known."""

    @property
    def stored_shape(self) -> tuple[int, int]:
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    @property
    def stored_row_bytes(self) -> int:
        return self.stored_shape[1] * DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * DTYPE_BYTES[self.dtype]

    @property
    def region(self) -> Region:
        return self.top, self.left, self.rows, self.cols

    @property
    def is_contiguous(self) -> bool:
        return self.stride == self.stored_row_bytes


@dataclass(frozen=True, slots=True)
class Move:
    """One part on its way: `sources` cover its matrix without overlap."""

    part: Part
    rows: int
    cols: int
    sources: tuple[Block, ...]
    targets: tuple[Block, ...]

    @property
    def dtype(self) -> str:
        """What the sources hold."""
        return self.sources[0].dtype

    @property
    def nbytes(self) -> int:
        """Written by this move."""
        return sum(block.nbytes for block in self.targets)


Blocks = dict[Part, list[Block]]


def hf_blocks(config: ModelConfig, tensors: Mapping[str, TensorInfo], kind: str = WEIGHT) -> Blocks:
    """Where each part lies in Hugging Face files. A part that is used twice (a tied embedding) is there once."""
    found: Blocks = {}
    for piece in pieces(config):
        part = Part(piece.hf, piece.hf_start, kind)
        if part in found:
            continue
        info = tensors[piece.hf]
        item = DTYPE_BYTES[info.dtype]
        row = item * (info.shape[1] if len(info.shape) == 2 else 1)
        offset = info.offset + piece.hf_start * (row if piece.hf_dim == 0 else item)
        rows, cols = _matrix(piece, piece.split.total)
        text = _words(info.name, piece.hf_dim, piece.hf_start, piece.hf_start + piece.split.total)
        found[part] = [Block(info.file, info.name, info.dtype, offset, row, 0, 0, rows, cols, piece.transpose, text)]
    return found


def region_of(one: Owned) -> Region:
    """Where a rank's range lies in the matrix of its part."""
    at, size = one.lo - one.piece.hf_start, one.hi - one.lo
    return (at, 0, *_matrix(one.piece, size)) if one.piece.dim == 0 else (0, at, *_matrix(one.piece, size))


def stored_blocks(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    tensors: Mapping[str, TensorInfo],
    digests: Mapping[str, list[str]] | None = None,
) -> Iterator[tuple[str, Owned, Block]]:
    """(local parameter, range, where it lies) of all that the file of one rank holds, in the order of `expected`.

    `digests`: of each tensor's ranges, where they are known.
    """
    for name, (shape, parts) in expected(config, layout, rank).items():
        info = tensors[name]
        row = DTYPE_BYTES[info.dtype] * (shape[1] if len(shape) == 2 else 1)
        for index, one in enumerate(parts):
            piece = one.piece
            top, left, rows, cols = region_of(one)
            yield (
                name,
                one,
                Block(
                    info.file,
                    name,
                    info.dtype,
                    info.offset + (one.start * row if piece.dim == 0 else 0),
                    row,
                    top,
                    left,
                    rows,
                    cols,
                    False,
                    _words(piece.hf, piece.hf_dim, one.lo, one.hi),
                    digests[name][index] if digests else "",
                ),
            )


def rank_blocks(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    tensors: Mapping[str, TensorInfo],
    digests: Mapping[str, list[str]] | None = None,
    kind: str = WEIGHT,
) -> Blocks:
    """As `stored_blocks`, by part."""
    found: Blocks = {}
    for _, one, block in stored_blocks(config, layout, rank, tensors, digests):
        found.setdefault(Part(one.piece.hf, one.piece.hf_start, kind), []).append(block)
    return found


def merged(many: Iterable[Blocks]) -> Blocks:
    """The blocks of several files together."""
    found: Blocks = {}
    for blocks in many:
        for part, mine in blocks.items():
            found.setdefault(part, []).extend(mine)
    return found


def plan(sources: Blocks, targets: Blocks) -> list[Move]:
    """One move for each part of `targets`, in the order in which the sources lie in their files.

    Copies of a range are read once. CheckpointError if a part's sources differ in dtype.
    """
    moves = [_move(part, sources[part], wanted) for part, wanted in targets.items()]
    return sorted(moves, key=lambda move: (str(move.sources[0].file), move.sources[0].offset))


def reading(part: Part, sources: list[Block], region: Region, *, whole: bool) -> tuple[Move, int, int]:
    """The move without targets that brings a region of a part; and the row and column of its matrix where that begins.

    Of the sources only what lies in the region is read, so the digest of a block is checked where all of it is needed.
    `whole`: blocks are read whole, and every digest is checked.
    """
    needed = [block for block in sources if _overlap(block.region, region)]
    if not whole:
        needed = [_clipped(block, region) for block in needed]
    top, left = min(block.top for block in needed), min(block.left for block in needed)
    move = _move(part, [replace(block, top=block.top - top, left=block.left - left) for block in needed], [])
    row, column = region[0] - top, region[1] - left
    inside = row >= 0 and column >= 0 and row + region[2] <= move.rows and column + region[3] <= move.cols
    assert inside, f"{part}: no source holds all of {region}"
    return move, row, column


def _clipped(block: Block, region: Region) -> Block:
    """What of a block lies in a region that it overlaps."""
    top, left = max(block.top, region[0]), max(block.left, region[1])
    rows = min(block.top + block.rows, region[0] + region[2]) - top
    cols = min(block.left + block.cols, region[1] + region[3]) - left
    if (top, left, rows, cols) == block.region:
        return block
    across, down = (top - block.top, left - block.left) if block.transposed else (left - block.left, top - block.top)
    offset = block.offset + down * block.stride + across * DTYPE_BYTES[block.dtype]
    return replace(block, top=top, left=left, rows=rows, cols=cols, offset=offset, digest="")


def _move(part: Part, sources: list[Block], targets: list[Block]) -> Move:
    distinct = {block.region: block for block in reversed(sources)}
    chosen = sorted(distinct.values(), key=lambda block: (block.top, block.left))
    rows = max(block.top + block.rows for block in chosen)
    cols = max(block.left + block.cols for block in chosen)
    area = sum(block.rows * block.cols for block in chosen)
    assert area == rows * cols, f"{part}: the sources leave a gap"
    for one in targets:
        inside = one.top >= 0 and one.left >= 0 and one.top + one.rows <= rows and one.left + one.cols <= cols
        assert inside, f"{part}: a target lies where no source is"
    odd = next((block for block in chosen if block.dtype != chosen[0].dtype), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd.file}: {odd.range} is {odd.dtype}, other ranges of the tensor are {chosen[0].dtype}"
        )
    return Move(part, rows, cols, tuple(chosen), tuple(targets))


def _overlap(one: Region, other: Region) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def _matrix(piece: Piece, size: int) -> tuple[int, int]:
    """Rows and columns of `size` elements of a piece along its dim."""
    other = piece.other[0] if piece.other else 1
    return (size, other) if piece.dim == 0 else (other, size)


def _words(hf: str, hf_dim: int, lo: int, hi: int) -> str:
    return f"{hf} {'columns' if hf_dim else 'rows'} {lo}..{hi}"
