"""How far this process has come in each of its groups: what the watch reports of a run that stands still. No torch.

The main thread counts, with one addition for a collective or message, and the thread of the watch reads. A group is
counted alike by all its members, whichever layout it belongs to; so of two counts the lower one says who has not come.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Track:
    """The collectives of one group, or the messages from one rank to others, that this process has entered."""

    __slots__ = ("_within", "entered", "flow", "inside", "name", "operation", "ranks")

    def __init__(self, name: str, ranks: tuple[int, ...], *, flow: bool = False):
        """`flow`: messages from the first of the ranks to the others, of which each counts its own side. A sender may
        be ahead."""
        self.name, self.ranks, self.flow = name, ranks, flow
        self.entered = 0
        self.operation = ""
        """Name of the last operation."""
        self.inside = False
        """This process is in that operation and waits for the others."""
        self._within = _NOTHING

    def entering(self, operation: str, within: AbstractContextManager[Any] = _NOTHING) -> Track:
        """`with track.entering("all_reduce"): ...`; `within` is entered and left with it. Not nested."""
        self.operation, self._within = operation, within
        self.entered += 1
        return self

    def waiting(self, operation: str) -> Track:
        """As `entering`, for an operation that `begun` or `entering` has counted already."""
        self.operation, self._within = operation, _NOTHING
        return self

    def begun(self, operation: str) -> None:
        """Count an operation that this process does not wait for."""
        self.operation = operation
        self.entered += 1

    def __enter__(self) -> None:
        self.inside = True
        self._within.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._within.__exit__(*error)
        self.inside = False


class Progress:
    """Where this process is: its step, its layer, and the tracks of its groups."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, tuple[int, ...]], Track] = {}
        self.step: tuple[str, int | None] = ("the start", None)
        """What kind of step, and which if they are numbered; written as it begins."""
        self.layer: int | None = None
        """The layer that is being computed."""

    @property
    def where(self) -> str:
        """For messages: `layer 5 of step 130`."""
        return in_words(self.step, self.layer)

    def track(self, name: str, ranks: tuple[int, ...], *, flow: bool = False) -> Track:
        """The one track of that name over these ranks."""
        key = name, ranks
        if key not in self._tracks:
            self._tracks[key] = Track(name, ranks, flow=flow)
        return self._tracks[key]

    def tracks(self) -> list[Track]:
        """The tracks that have been entered."""
        return [track for track in list(self._tracks.values()) if track.entered]

    def mark(self) -> object:
        """A value that changes whenever this process has made progress."""
        return sum(track.entered for track in list(self._tracks.values())), self.step, self.layer


def in_words(step: tuple[str, int | None], layer: int | None) -> str:
    """Where a process with this `Progress.step` and `Progress.layer` is."""
    kind, number = step
    words = kind if number is None else f"{kind} {number}"
    return words if layer is None else f"layer {layer} of {words}"


here = Progress()
"""Of this process, which has one watch."""
