"""One rank's part in noticing that a run stands still: when it says so, and what the hub makes of all. No torch.

A rank that comes no further for the time-out tells the hub, again and again. The hub asks every rank for its account
and judges them together (`stall.blame`). Nothing travels while all come on. Without threads, sockets or a clock: the
watch calls it. Now and then each says that its watch runs, so that of one that does not answer it is known since when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from megalite.core.progress import Progress
from megalite.run.referee import Peer
from megalite.run.stall import Account, account, blame, read_account

_AGAIN = 2.0
"""Seconds after which a rank that comes no further says so again."""
_ACCOUNTS = 2.0
"""Seconds for the ranks to say where they are; a watch that does not get its turn may be longer."""
_UNHEARD = 6.0
"""Seconds for the hub to ask after a rank has said that it comes no further."""


class Verdict(NamedTuple):
    """Who keeps the others waiting."""

    ranks: list[int]
    line: str
    """For the user."""
    silent: list[int]
    """The ranks whose watch does not answer."""


class Standstill:
    """Of one rank. The `say` that it is given sends a line to the hub, or from the hub to all."""

    def __init__(
        self,
        rank: int,
        peers: Sequence[Peer],
        progress: Progress,
        timeout: float,
        say: Callable[..., None],
        now: float,
    ):
        self._rank, self._peers, self._progress, self._timeout, self._say = rank, peers, progress, timeout, say
        self._mark: object = None
        self._moved = self._said = now
        """When this process last came further, and when it last said that it does not."""
        self._unheard: float | None = None
        """Since when the hub has not answered that."""
        self._asked: float | None = None
        """On the hub: when it asked for the accounts."""
        self._accounts: dict[int, Account] = {}
        self._heard = dict.fromkeys(range(len(peers)), now)
        """When each was last heard: on the hub all, elsewhere rank 0."""
        self._beaten = now

    def look(self, now: float, finished: bool) -> None:
        """Look for a standstill; call it a few times a second. `finished`: this rank waits for the end of the run."""
        mark = self._progress.mark(), finished
        if mark != self._mark:
            self._mark, self._moved, self._unheard = mark, now, None
        if now - self._beaten > self._timeout / 10:
            self._beaten = now
            self._say("here")
        if finished or now < max(self._moved + self._timeout, self._said + _AGAIN):
            return
        self._said = now
        if self._rank == 0:
            self.ask(now, finished)
        else:
            self._unheard = self._unheard or now
            self._say("still")

    def ask(self, now: float, finished: bool) -> None:
        """On the hub: a rank, perhaps itself, has said that it comes no further."""
        if self._asked is None:
            self._asked, self._accounts = now, {0: self._own(now, finished)}
            self._say("ask")

    def answer(self, now: float, finished: bool) -> None:
        """The hub has asked."""
        self._unheard = None
        self._say("account", account(self._progress, now - self._moved, finished))

    def heard(self, rank: int, now: float) -> None:
        """Something came from that rank."""
        self._heard[rank] = now

    def hear(self, rank: int, text: str) -> None:
        """On the hub: a rank's account."""
        if self._asked is not None:
            with suppress(ValueError):  # as if it had not answered
                self._accounts[rank] = read_account(text)

    def verdict(self, now: float) -> Verdict | None:
        """On the hub, once the accounts are there; on a rank once the hub has been silent for too long."""
        if self._rank:
            return self._of_silent_hub(now)
        if self._asked is None or (len(self._accounts) < len(self._peers) and now - self._asked < _ACCOUNTS):
            return None
        self._asked = None
        everyone: dict[int, Account | float] = {rank: now - heard for rank, heard in self._heard.items()}
        everyone |= self._accounts
        found = blame(everyone, self._peers, self._timeout)
        return Verdict(*found, [rank for rank in found[0] if rank not in self._accounts]) if found else None

    def _of_silent_hub(self, now: float) -> Verdict | None:
        silence = now - self._heard[0]
        if self._unheard is None or now - self._unheard < _UNHEARD or silence < self._timeout:
            return None
        mine = self._own(now, False)
        found = blame({0: silence, self._rank: mine}, self._peers, self._timeout)
        silent = f"error: {self._peers[0]} does not answer: one native call holds Python's lock. The run was stopped."
        return Verdict([0], found[1] if found and found[0] == [0] else silent, [0])

    def _own(self, now: float, finished: bool) -> Account:
        return read_account(account(self._progress, now - self._moved, finished))
