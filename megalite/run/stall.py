"""A rank that lives but does not come: who keeps the others waiting, from what every rank says of itself. Pure.

Ranks wait inside collectives and messages, which all members of a group count alike (`core.progress`). Of whoever
waits, those members keep it waiting who have entered fewer. They may wait themselves, for others; the ranks at the end
of all such chains are to blame, or in a circle all of it. Imports no torch.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from megalite.core.progress import Progress, in_words
from megalite.run.referee import Peer
from megalite.run.wire import printable

_FRAMES = 12
"""The innermost ones of a stack are shown."""
_SHOWN = 8
"""Of more ranks only so many are told of."""
_SLACK = 1.5
"""Seconds by which two watches may differ on when they last saw something move."""


class Place(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A `Track` as its rank tells it."""

    name: str
    ranks: tuple[int, ...]
    flow: bool
    entered: int
    operation: str
    inside: bool


class Account(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a rank says of itself when one stands still."""

    still: float
    """Seconds since it last came further."""
    finished: bool
    """It has done its work, and waits for the others to say the same."""
    step: tuple[str, int | None]
    layer: int | None
    places: tuple[Place, ...]
    stack: tuple[str, ...]
    """The stack of its main thread, the innermost call last."""

    @property
    def where(self) -> str:
        return "it has finished" if self.finished else f"it is in {printable(in_words(self.step, self.layer))}"


def account(progress: Progress, still: float, finished: bool) -> str:
    """This process's own, as it travels."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
    places = tuple(
        Place(name=t.name, ranks=t.ranks, flow=t.flow, entered=t.entered, operation=t.operation, inside=t.inside)
        for t in progress.tracks()
    )
    stack = tuple(f"{call.filename}:{call.lineno} in {call.name}" for call in calls)
    told = Account(still=still, finished=finished, step=progress.step, layer=progress.layer, places=places, stack=stack)
    return msgspec.json.encode(told).decode()


def read_account(text: str) -> Account:
    """The inverse; ValueError for anything else."""
    return msgspec.json.decode(text, type=Account)


class _Wait(msgspec.Struct, frozen=True):
    """A rank waits in a place for those who have not come there."""

    rank: int
    place: Place
    absent: tuple[int, ...]


def blame(
    accounts: Mapping[int, Account | float], peers: Sequence[Peer], timeout: float
) -> tuple[list[int], str] | None:
    """Who keeps ranks waiting that have stood still for `timeout` seconds, and what the user is told; None: nobody.

    `accounts`: of all ranks; of one whose watch does not answer, because a native call keeps it from running, the
    seconds since it was heard last.
    """
    came = _counts(accounts)
    waits = {rank: wait for rank in accounts if (wait := _wait(rank, accounts, came, timeout))}
    if not waits:
        return None
    absent = {rank for wait in waits.values() for rank in wait.absent}
    outside = {rank for rank, wait in waits.items() if not wait.place.inside}
    late = sorted(absent - waits.keys()) or sorted(absent & outside) or sorted(absent)
    guilty = [rank for rank in late if _still(accounts[rank]) >= timeout - _SLACK]
    if late and not guilty:
        return None  # they are on their way
    if not guilty:  # all have come: what is between them does not deliver
        wait = min(waits.values(), key=lambda wait: wait.rank)
        where = _named(wait.place, wait.rank, wait.place.entered)
        line = f"error: all have entered {where}, and none has left it for {timeout:g} s. The run was stopped."
        return sorted(waits), line
    said, shown = [], guilty[:_SHOWN]
    for rank in shown:
        wait = next(wait for wait in waits.values() if rank in wait.absent)
        said.append(_told(peers[rank], accounts[rank], wait, accounts))
    more = f"; and {len(guilty) - len(shown)} more ranks" if len(guilty) > len(shown) else ""
    line = f"error: {'; '.join(said)}{more}. The run was stopped."
    return guilty, "\n".join([line, *(text for rank in shown for text in _stack(rank, accounts[rank]))])


def _still(one: Account | float) -> float:
    return one if isinstance(one, float) else one.still


_Counts = dict[tuple[str, tuple[int, ...]], dict[int, int]]
"""What each rank has entered in a place, by the place's name and ranks."""


def _counts(accounts: Mapping[int, Account | float]) -> _Counts:
    found: _Counts = {}
    for rank, account in accounts.items():
        for place in () if isinstance(account, float) else account.places:
            entered = found.setdefault((place.name, place.ranks), {})
            entered[rank] = max(entered.get(rank, 0), place.entered)
    return found


def _wait(rank: int, accounts: Mapping[int, Account | float], came: _Counts, timeout: float) -> _Wait | None:
    """What the rank waits in, if it has stood still for so long.

    Over NCCL the host does not wait inside; there a collective counts in which it is ahead of others.
    """
    mine = accounts[rank]
    if isinstance(mine, float) or mine.finished or mine.still < timeout:
        return None

    def wait(place: Place) -> _Wait:
        return _Wait(rank, place, tuple(other for other in _absent(place, rank, came) if other in accounts))

    inside = next((place for place in mine.places if place.inside), None)
    if inside is not None:
        return wait(inside)
    ahead = (wait(place) for place in mine.places if not place.flow)
    return next((one for one in ahead if one.absent), None)


def _absent(place: Place, rank: int, came: _Counts) -> Iterator[int]:
    """Members of the group that have not come as far; of who sends messages, if `rank` receives them."""
    entered = came[place.name, place.ranks]
    for other in place.ranks[:1] if place.flow and rank != place.ranks[0] else place.ranks:
        if other != rank and entered.get(other, 0) < place.entered:
            yield other


def _named(place: Place, rank: int, number: int) -> str:
    """An operation of a place, as `rank` has it to do."""
    name = printable(place.name)
    if place.flow:
        sender, *receivers = place.ranks
        ends = f"to {', '.join(map(str, receivers))}" if rank == sender else f"from {sender}"
        return f"message #{number} ({name}) {ends}"
    operation = printable(place.operation) if number == place.entered else "collective"
    ranks = list(place.ranks)
    group = (
        str(ranks) if len(ranks) <= 2 * _SHOWN else f"[{ranks[0]}, {ranks[1]}, ... {ranks[-1]}] of {len(ranks)} ranks"
    )
    return f"{operation} #{number} of {name} group {group}"


def _told(peer: Peer, account: Account | float, wait: _Wait, accounts: Mapping[int, Account | float]) -> str:
    waiting = accounts[wait.rank]
    assert isinstance(waiting, Account)
    since = f"for which rank {wait.rank} has waited {waiting.still:.0f} s"
    verb = "entered"
    if wait.place.flow:
        verb = "sent" if peer.rank == wait.place.ranks[0] else "received"
    if isinstance(account, float):
        where = _named(wait.place, peer.rank, wait.place.entered)
        held = f"its watch was last heard {account:.0f} s ago: a native call holds Python's lock"
        return f"{peer} has not {verb} {where}, {since}; {held}"
    came = next((p for p in account.places if (p.name, p.ranks) == (wait.place.name, wait.place.ranks)), None)
    where = _named(wait.place, peer.rank, (came.entered if came else 0) + 1)
    return f"{peer} has not {verb} {where}, {since}; {account.where}, for {account.still:.0f} s"


def _stack(rank: int, account: Account | float) -> list[str]:
    """Lines that show where its main thread is."""
    if isinstance(account, float):
        return []
    return [
        f"Python stack of rank {rank}, the innermost call last:",
        *(f"  {printable(call)}" for call in account.stack),
    ]
