"""Stop strings in a text that grows, also those that span tokens. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.config.schema import SamplingParams


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """`params.stop` as a tuple."""
    if params.stop is None:
        return ()
    return (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string in a text."""

    stop: str
    start: int
    """Characters before it."""

    @property
    def end(self) -> int:
        return self.start + len(self.stop)


class StopChecker:
    """Finds the first of some stop strings, none empty, in a text that comes in pieces.

    The first is the one that is completed first, of several completed by the same character the longest; so it does
    not matter how the text was cut into pieces. Work is proportional to the new text, not to all of it.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self._keep = max(map(len, stops), default=1) - 1
        self._firsts = frozenset(stop[0] for stop in stops)
        self._tail = ""
        """The last characters, in which a stop string may have begun."""
        self._length = 0

    def feed(self, text: str) -> StopMatch | None:
        """Add text; the first stop string that it completes. It must not be called again after a match."""
        window, offset = self._tail + text, self._length - len(self._tail)
        found = []
        for stop in self.stops:
            start = window.find(stop, max(0, len(self._tail) - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        self.skip(text)
        if not found:
            return None
        _, start, stop = min(found)
        return StopMatch(stop, offset + start)

    def skip(self, text: str) -> None:
        """Add text in which no stop string counts; one that begins in it and is completed later does."""
        window = self._tail + text
        self._length += len(text)
        self._tail = window[max(0, len(window) - self._keep) :]

    @property
    def held_back(self) -> int:
        """Characters at the end that may become a stop string; whoever shows text as it comes waits with them."""
        for start, character in enumerate(self._tail):
            if character in self._firsts:
                begun = self._tail[start:]
                if any(stop.startswith(begun) and len(stop) > len(begun) for stop in self.stops):
                    return len(begun)
        return 0
