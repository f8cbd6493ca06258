"""The paged KV cache's bookkeeping: who holds which block, what can be shared, what is given up first. Torch-free.

A block is a page of `block_size` tokens. It is in one of four states:

    held       at least one sequence's table names it
    blank      free, holds nothing worth keeping
    cached     free, but full and known by its content's key; a later sequence may share it, the least recently
               released goes first when blank blocks run out
    set aside  free (blank or cached content), and in the run that one sequence is expected to grow into

Runs exist because attention on CPU reads a sequence's keys as one slice when its block ids ascend by one. They are a
wish, not a right: when nothing else is free, the longest run is halved.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from zlib import crc32


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: 128 bits of BLAKE2 over the key of the block before it and its own tokens.

    So equal keys mean equal tokens from the first one on. The first block's parent is a salt: sequences with different
    salts never share.
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def _is_run(blocks: Sequence[int]) -> bool:
    """Whether a table that grew to one end may be neighbours, judged by its ends."""
    return not blocks or blocks[-1] - blocks[0] == len(blocks) - 1


@dataclass(slots=True)
class _Run:
    """Free blocks next..end-1, set aside for one owner."""

    next: int
    end: int


class BlockPool:
    """`num_blocks` reference-counted blocks with a prefix cache; every operation is deterministic.

    Tables are plain lists of block ids owned by the caller; an `owner` is any int that stands for one table. With
    `contiguous=False` no runs are set aside.
    """

    def __init__(self, num_blocks: int, block_size: int, *, contiguous: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        """Blocks that no table names, cached and set-aside ones included."""
        self._contiguous = contiguous
        self._holders = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently released first
        self._runs: dict[int, _Run] = {}
        # One byte a block, so that bytearray.find finds a run. 0 in _closed: blank or cached; 0 in _dirty: blank.
        self._closed = bytearray(num_blocks)
        self._dirty = bytearray(num_blocks)
        self._num_blank = num_blocks
        self._low = 0  # no blank block is below
        self._hopeless = num_blocks + 1  # no run of this length since a block was last opened

    # ---- sharing by content

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of `keys`; they are not held yet."""
        blocks = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` some table names already, so that sharing them costs no free block."""
        return sum(1 for block in blocks if self._holders[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Hold `blocks`, found by `match`, once more."""
        for block in blocks:
            if self._holders[block] == 0:
                self.num_free -= 1
                if self._closed[block]:
                    self._cut_run(block)
                else:
                    self._close(block)
            self._holders[block] += 1

    def register(self, block: int, key: bytes) -> None:
        """Make a held, full block known by its content; does nothing where that content is known already."""
        if key not in self._index and self._key[block] is None:
            self._index[key] = block
            self._key[block] = key

    def reset_cache(self) -> None:
        """Forget all content, e.g. because the weights changed; blocks that are held stay with their holders."""
        for block in self._index.values():
            self._key[block] = None
        self._index.clear()
        for block in self._cached:
            self._make_blank(block)
        self._cached.clear()

    # ---- taking and giving back

    def claim(self, owner: int, blocks: Sequence[int], count: int, expected: int) -> None:
        """Set aside a run for a table that holds `blocks`, needs `count` more now and `expected` in the end.

        The run continues `blocks`; it is shorter than wished, or none, where there is no such room. Blocks that are no
        run themselves are not worth one.
        """
        if not self._contiguous or not _is_run(blocks):
            return
        length = expected - len(blocks)
        if blocks:
            start = blocks[-1] + 1
            end = self._closed.find(1, start, start + length)
            end = min(start + length, self.num_blocks) if end < 0 else end
        else:
            start = self._find_run(length)
            while start < 0 and length > count:
                length = max(count, length // 2)
                start = self._find_run(length)
            end = start + length
        if 0 <= start < end:
            for block in range(start, end):
                self._close(block)
            self._runs[owner] = _Run(start, end)

    def extend(self, owner: int, blocks: list[int], count: int) -> None:
        """Append `count` blocks to the table; the caller has made sure that `num_free` is at least that."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        for _ in range(count):
            run = self._runs.get(owner)
            if run is None:
                block = self._pick(owner, blocks)
            else:
                block = run.next
                run.next += 1
                if run.next == run.end:
                    del self._runs[owner]
            self._forget(block)
            self._holders[block] = 1
            self.num_free -= 1
            blocks.append(block)

    def release(self, owner: int, blocks: Sequence[int]) -> None:
        """Give back a table and what was set aside for it; its known content can be found until a block is needed."""
        for block in reversed(blocks):  # the end of a sequence is worth less than its beginning: it goes first
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self.num_free += 1
                self._open(block)
        run = self._runs.pop(owner, None)
        if run is not None:
            self._open_run(run.next, run.end)

    # ---- inside

    def _find_run(self, length: int) -> int:
        """Start of `length` open neighbours, or -1: blank ones if there are, else near the oldest cached block."""
        if length >= self._hopeless:
            return -1
        pattern = bytes(length)
        start = -1
        if self._num_blank >= length:
            self._low = self._dirty.find(0, self._low)
            start = self._dirty.find(pattern, self._low)
        if start < 0:
            oldest = next(iter(self._cached), 0)
            start = self._closed.find(pattern, max(0, oldest - length + 1))
        if start < 0:
            start = self._closed.find(pattern)
        if start < 0:
            self._hopeless = length
        return start

    def _pick(self, owner: int, blocks: Sequence[int]) -> int:
        """Close a block for an owner without a run: the one that makes `blocks` a longer run, a blank one, the oldest
        cached one, or one of a run."""
        after = blocks[-1] + 1 if blocks else self.num_blocks
        if self._contiguous and after < self.num_blocks and not self._closed[after] and _is_run(blocks):
            block = after
        elif self._num_blank:
            block = self._low = self._dirty.find(0, self._low)
        elif self._cached:
            block = next(iter(self._cached))
        else:
            return self._halve_longest_run(owner)
        self._close(block)
        return block

    def _halve_longest_run(self, owner: int) -> int:
        """Move the second half of the longest run to `owner`, who takes its first block at once."""
        donor, run = max(self._runs.items(), key=lambda item: item[1].end - item[1].next)
        block, end = (run.next + run.end) // 2, run.end
        run.end = block
        if run.next == run.end:
            del self._runs[donor]
        if block + 1 < end:
            self._runs[owner] = _Run(block + 1, end)
        return block

    def _cut_run(self, block: int) -> None:
        """End the run that contains `block` before it; what comes after is open again."""
        owner, run = next(item for item in self._runs.items() if item[1].next <= block < item[1].end)
        end, run.end = run.end, block
        if run.next == run.end:
            del self._runs[owner]
        self._open_run(block + 1, end)

    def _open_run(self, start: int, end: int) -> None:
        for block in range(start, end):
            self._open(block)
            if self._key[block] is not None:  # it was near the oldest when the run was chosen
                self._cached.move_to_end(block, last=False)

    def _open(self, block: int) -> None:
        """A held or set-aside block becomes blank or cached."""
        self._closed[block] = 0
        self._hopeless = self.num_blocks + 1
        if self._key[block] is None:
            self._make_blank(block)
        else:
            self._cached[block] = None

    def _close(self, block: int) -> None:
        """A blank or cached block becomes held or set aside; its content, if any, stays known."""
        self._closed[block] = 1
        if self._dirty[block]:
            del self._cached[block]
        else:
            self._dirty[block] = 1
            self._num_blank -= 1

    def _make_blank(self, block: int) -> None:
        self._dirty[block] = 0
        self._num_blank += 1
        self._low = min(self._low, block)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            self._key[block] = None
            del self._index[key]

    # ---- looking at it

    def digest(self) -> int:
        """32 bits that differ, almost surely, where two pools have different blocks free."""
        return crc32(self._dirty, crc32(self._closed, self.num_free))

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the tables of all owners. For tests: it looks at every block."""
        held = Counter(block for table in tables for block in table)
        assert self._holders == [held[block] for block in range(self.num_blocks)], "reference counts"
        assert self.num_free == self._holders.count(0), "free count"
        aside = [block for run in self._runs.values() for block in range(run.next, run.end)]
        assert len(aside) == len(set(aside)), "a block is in two runs"
        assert all(run.next < run.end for run in self._runs.values()), "empty run"
        assert not any(held[block] for block in aside), "a held block is set aside"
        assert list(self._closed) == [int(held[b] > 0 or b in aside) for b in range(self.num_blocks)], "closed"
        is_open = [block for block in range(self.num_blocks) if not self._closed[block]]
        assert sorted(self._cached) == [block for block in is_open if self._key[block] is not None], "cached"
        blank = [block for block in is_open if self._key[block] is None]
        assert blank == [block for block in range(self.num_blocks) if not self._dirty[block]], "blank"
        assert len(blank) == self._num_blank and all(block >= self._low for block in blank), "blank count"
        assert self._index == {key: b for b, key in enumerate(self._key) if key is not None}, "index"
        assert bytes(self._hopeless) not in self._closed, "a run is there although none was found"
