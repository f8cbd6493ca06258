"""The paged KV cache's bookkeeping: who holds which block, what can be shared, what is given up first. Torch-free.

A block is a page of some tokens. It is in one of four states:

    held       at least one sequence's table names it
    blank      free, holds nothing worth keeping
    cached     free, but full and known by its content's key; a later sequence may share it, the least recently
               released goes first when blank blocks run out
    set aside  free (blank or cached content), and in the run that one sequence is expected to grow into

Runs exist because attention on CPU reads a sequence's keys as one slice when its block ids ascend by one. They are a
preference only: when nothing else is free, all that is set aside is given up.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from zlib import crc32


def block_keys(parent: bytes, token_ids: Sequence[int], size: int) -> list[bytes]:
    """Keys of full blocks of `size` tokens: 128 bits of BLAKE2 over the key of the block before and the block's tokens.

    So equal keys mean equal tokens from the first one on. The first block's parent is a salt: sequences with different
    salts never share.
    """
    keys, tokens = [], array("q", token_ids).tobytes()
    for begin in range(0, len(tokens), size * 8):
        parent = blake2b(parent + tokens[begin : begin + size * 8], digest_size=16).digest()
        keys.append(parent)
    return keys


def _is_run(blocks: Sequence[int]) -> bool:
    """Whether the blocks of a table, which grows at its end only, may be neighbours, judged by first and last."""
    return not blocks or blocks[-1] - blocks[0] == len(blocks) - 1


class BlockPool:
    """`num_blocks` reference-counted blocks with a prefix cache; every operation is deterministic.

    Tables are plain lists of block ids owned by the caller; an `owner` is any int that stands for one table. With
    `contiguous=False` no runs are set aside.
    """

    def __init__(self, num_blocks: int, *, contiguous: bool = True):
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        """Blocks that no table names, cached and set-aside ones included."""
        self._contiguous = contiguous
        self._holders = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently released first
        self._runs: dict[int, range] = {}  # set aside, by owner
        # One byte a block, so that bytearray.find finds a run. 0 in _closed: blank or cached; 0 in _dirty: blank.
        self._closed = bytearray(num_blocks)
        self._dirty = bytearray(num_blocks)

    # ---- sharing by content

    def match(self, keys: Iterable[bytes]) -> list[int]:
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
                    self._end_run(next(owner for owner, run in self._runs.items() if block in run))
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
            self._dirty[block] = 0
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
            self._runs[owner] = range(start, end)
            for block in self._runs[owner]:
                self._close(block)

    def extend(self, owner: int, blocks: list[int], count: int) -> None:
        """Append `count` blocks to the table; the caller has made sure that `num_free` is at least that."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        for _ in range(count):
            run = self._runs.pop(owner, None)
            if run is None:
                block = self._pick(blocks)
                self._close(block)
            else:
                block = run[0]
                if len(run) > 1:
                    self._runs[owner] = run[1:]
            key, self._key[block] = self._key[block], None
            if key is not None:
                del self._index[key]
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
        if owner in self._runs:
            self._end_run(owner)

    # ---- inside

    def _find_run(self, length: int) -> int:
        """Start of `length` open neighbours, or -1: blank ones if there are, else near the oldest cached block."""
        pattern = bytes(length)
        start = self._dirty.find(pattern)
        if start < 0:
            oldest = next(iter(self._cached), 0)
            start = self._closed.find(pattern, max(0, oldest - length + 1))
        return start if start >= 0 else self._closed.find(pattern)

    def _pick(self, blocks: Sequence[int]) -> int:
        """An open block for a table without a run: one that continues its blocks, a blank one or the oldest cached one.

        Where none is open, all runs end.
        """
        after = blocks[-1] + 1 if blocks else self.num_blocks
        if self._contiguous and after < self.num_blocks and not self._closed[after] and _is_run(blocks):
            return after
        blank = self._dirty.find(0)
        if blank < 0 and not self._cached:
            for owner in list(self._runs):
                self._end_run(owner)
            blank = self._dirty.find(0)
        return blank if blank >= 0 else next(iter(self._cached))

    def _end_run(self, owner: int) -> None:
        """Open what is set aside for `owner`."""
        for block in self._runs.pop(owner):
            self._open(block)
            if self._key[block] is not None:  # it was near the oldest when the run was chosen
                self._cached.move_to_end(block, last=False)

    def _open(self, block: int) -> None:
        """A held or set-aside block becomes blank or cached."""
        self._closed[block] = 0
        if self._key[block] is None:
            self._dirty[block] = 0
        else:
            self._cached[block] = None

    def _close(self, block: int) -> None:
        """A blank or cached block becomes held or set aside; its content, if any, stays known."""
        self._closed[block] = self._dirty[block] = 1
        self._cached.pop(block, None)

    # ---- looking at it

    def digest(self) -> int:
        """32 bits that differ, almost surely, where two pools have different blocks free."""
        return crc32(self._dirty, crc32(self._closed, self.num_free))

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the tables of all owners. For tests: it looks at every block."""
        held = Counter(block for table in tables for block in table)
        assert self._holders == [held[block] for block in range(self.num_blocks)], "reference counts"
        assert self.num_free == self._holders.count(0), "free count"
        aside = [block for run in self._runs.values() for block in run]
        assert len(aside) == len(set(aside)) and all(self._runs.values()), "a block is in two runs, or a run is empty"
        assert not any(held[block] for block in aside), "a held block is set aside"
        assert list(self._closed) == [int(held[b] > 0 or b in aside) for b in range(self.num_blocks)], "closed"
        is_open = [block for block in range(self.num_blocks) if not self._closed[block]]
        assert sorted(self._cached) == [block for block in is_open if self._key[block] is not None], "cached"
        blank = [block for block in is_open if self._key[block] is None]
        assert blank == [block for block in range(self.num_blocks) if not self._dirty[block]], "blank"
        assert self._index == {key: b for b, key in enumerate(self._key) if key is not None}, "index"
