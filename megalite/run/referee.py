"""Decides how a run ends, from what is known of its ranks: pure, the clock is an argument. Only rank 0 runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOST = 70
"""Exit code when a rank or a launcher is lost."""

_GATHER = 0.3
"""Seconds after a rank is lost in which others may turn out to be lost with it: one dead host is one line."""
_CRASH_WAIT = 1.0
"""Seconds an unexpected exception waits for its cause: when a peer dies, collectives fail here before it is missed."""
_DRAIN = 120.0
"""Seconds from the first rank that stopped for a signal to the last: one may still write what others have written."""


@dataclass(frozen=True)
class Peer:
    """A rank as messages name it."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True, kw_only=True)
class End:
    """How the run ends, the same on every rank."""

    code: int
    """Exit code of every rank."""
    speaker: int | None = None
    """The rank whose own exception the user is shown."""
    line: str = ""
    """What the user is told when there is none."""
    lost: tuple[int, ...] = ()
    """The ranks that were lost."""


def lost_line(why: Mapping[int, str], peers: Sequence[Peer], meanwhile: str = "") -> str:
    """The line that names lost ranks; `why` gives each rank's reason, `meanwhile` says where another rank was."""
    ranks = sorted(why)
    hosts = sorted({peers[rank].host for rank in ranks})
    if len(ranks) == 1:
        who = f"{peers[ranks[0]]} was lost"
    else:
        who = f"ranks {', '.join(map(str, ranks))} on {', '.join(hosts)} were lost"
    reasons = "; ".join(dict.fromkeys(why[rank] for rank in ranks))
    when = f", when {meanwhile}" if meanwhile else ""
    return f"error: {who}: {reasons}{when}. The other ranks were stopped."


class Referee:
    """Collects reports; `verdict` is the end once one is certain."""

    def __init__(self, peers: Sequence[Peer]):
        self._peers = peers
        self._finished: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._lost_at, self._meanwhile = 0.0, ""
        self._failure: tuple[float, End] | None = None
        self._stopped_at: float | None = None
        self._final: End | None = None

    def finished(self, rank: int, code: int, now: float) -> None:
        """The rank is done with its work; `code` is 0, or 128 + a signal that it drained for."""
        self._finished[rank] = code
        if code and self._stopped_at is None:
            self._stopped_at = now

    def failed(self, rank: int, code: int, crash: bool, line: str, now: float) -> None:
        """The rank ends the run with `code`, for a reason that `line` says, or if it is empty an exception of its own.

        `crash`: an exception that nobody meant, so it may have a cause elsewhere.
        """
        if self._failure is None or (not crash and now < self._failure[0]):
            wait = _CRASH_WAIT if crash and len(self._peers) > 1 else 0
            self._failure = (now + wait, End(code=code, speaker=None if line else rank, line=line))

    def lost(self, rank: int, why: str, now: float, meanwhile: str = "") -> None:
        """The rank is gone, or gives no sign of life. `meanwhile`: where the rank was that noticed it first."""
        if not self._lost:
            self._lost_at, self._meanwhile = now, meanwhile
        self._lost.setdefault(rank, why)

    def stopped(self, rank: int, why: str, now: float, meanwhile: str = "") -> None:
        """Note that a rank is lost: it is killed as it was stopped, whatever its connection says of its end."""
        self.lost(rank, why, now, meanwhile)
        self._lost[rank] = why

    def standing(self, ranks: Sequence[int], line: str) -> None:
        """These ranks live, and keep the others waiting for ever. That they are killed for it is no news."""
        if not self._lost:
            self._final = self._final or End(code=LOST, line=line, lost=tuple(ranks))

    def verdict(self, now: float) -> End | None:
        if self._final is None:
            self._final = self._decide(now)
        return self._final

    def _decide(self, now: float) -> End | None:
        if self._lost:  # also when a failure is known: it is the consequence
            if now < self._lost_at + _GATHER:
                return None
            line = lost_line(self._lost, self._peers, self._meanwhile)
            return End(code=LOST, line=line, lost=tuple(sorted(self._lost)))
        if self._failure is not None:
            return self._failure[1] if now >= self._failure[0] else None
        if len(self._finished) == len(self._peers):
            speaker = min((rank for rank, code in self._finished.items() if code), default=None)
            return End(code=0 if speaker is None else self._finished[speaker], speaker=speaker)
        if self._stopped_at is not None and now >= self._stopped_at + _DRAIN:
            rest = [peer for peer in self._peers if peer.rank not in self._finished]
            names = ", ".join(map(str, rest))
            line = (
                f"error: still at work {_DRAIN:g} s after the first rank stopped for a signal: {names}. It was ended."
            )
            return End(code=LOST, line=line, lost=tuple(peer.rank for peer in rest))
        return None
