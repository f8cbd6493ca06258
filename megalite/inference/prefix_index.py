"""Which replica has which beginnings of prompts in its prefix cache, as far as the outside knows. Torch-free.

A page is some blocks of a prompt, known by a hash of its content and everything before it. The pages of a replica are
kept in the order of their last use, as many as its cache can hold: what is older it has surely evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

LIMIT = 1 << 20
"""Most pages known, of all replicas together: what bounds the memory."""


def page_keys(token_ids: tuple[int, ...], size: int) -> list[int]:
    """Keys of the full pages of `size` tokens: 64 bits over the key of the page before and the page's tokens.

    The same in every process. Two contents with one key would only send a request to a replica that lacks its prefix.
    """
    keys, parent = [], 0
    for end in range(size, len(token_ids) + 1, size):
        parent = hash((parent, token_ids[end - size : end]))
        keys.append(parent)
    return keys


class PrefixIndex:
    """Pages by replica; replicas have small numbers, which are bits of masks."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._caches: dict[int, _Cache] = {}
        self._holders: dict[int, int] = {}
        """By key of a known page: the mask of the replicas that have it; never 0."""
        self._unnamed = 0

    def add(self, replica: int, pages: int) -> None:
        """A replica whose cache has room for so many pages, of which nothing is known."""
        self._caches[replica] = _Cache(pages)

    def remove(self, replica: int) -> None:
        """Forget a replica."""
        self._forget(replica, self._caches.pop(replica).pages)

    def use(self, replica: int, keys: Sequence[int], others: int = 0) -> None:
        """A replica computes, shares or gives back the pages of a prompt, and `others` that no prompt begins with.

        As in its cache, the last ones of a prompt are evicted first.
        """
        cache, holders, bit = self._caches[replica], self._holders, 1 << replica
        pages = cache.pages
        if others:
            self._unnamed -= 1
            pages[self._unnamed - (1 << 63)] = others  # below every hash
            cache.size += others
        for key in reversed(keys):
            if key in pages:
                pages.move_to_end(key)
            else:
                pages[key] = 1
                cache.size += 1
                holders[key] = holders.get(key, 0) | bit
        room = min(cache.room, self.limit // len(self._caches))
        while cache.size > room:
            key, size = pages.popitem(last=False)
            cache.size -= size
            self._forget(replica, (key,))

    def drop(self, replica: int, keys: Iterable[int]) -> None:
        """A replica will not compute these pages after all."""
        cache = self._caches[replica]
        dropped = [key for key in keys if cache.pages.pop(key, None)]
        cache.size -= len(dropped)
        self._forget(replica, dropped)

    def match(self, keys: Iterable[int]) -> tuple[int, int]:
        """The mask of the replicas that have the longest beginning of a prompt, and its pages; 0, 0: none has any."""
        mask, known = 0, 0
        for key in keys:
            both = self._holders.get(key, 0) & (mask if known else -1)
            if not both:
                break
            mask, known = both, known + 1
        return mask, known

    def known(self, replica: int, keys: Iterable[int]) -> int:
        """Leading pages of a prompt that a replica has."""
        pages, known = self._caches[replica].pages, 0
        for key in keys:
            if key not in pages:
                break
            known += 1
        return known

    def __len__(self) -> int:
        """Pages known, of all replicas together."""
        return sum(len(cache.pages) for cache in self._caches.values())

    def tables(self) -> tuple[list[OrderedDict[int, int]], dict[int, int]]:
        """What it is made of, to be measured: the pages of each replica, and the holders of each page."""
        return [cache.pages for cache in self._caches.values()], self._holders

    def _forget(self, replica: int, keys: Iterable[int]) -> None:
        """Take the replica from the holders of pages that it had."""
        holders, bit = self._holders, 1 << replica
        for key in keys:
            left = holders.get(key, 0) & ~bit
            if left:
                holders[key] = left
            else:
                holders.pop(key, None)


class _Cache:
    """What a replica's cache may hold."""

    __slots__ = ("pages", "room", "size")

    def __init__(self, room: int):
        self.room = room
        """Pages at most."""
        self.pages: OrderedDict[int, int] = OrderedDict()
        """Pages by key, the one used longest ago first; an entry may stand for many that nobody asks for."""
        self.size = 0
        """Pages in all."""
