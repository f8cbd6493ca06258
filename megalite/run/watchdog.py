"""Every rank watches its launcher and its peers, so that a run ends as a whole and the user is told why once.

One daemon thread a rank. Rank 0 is the hub: the others keep a TCP connection to it, whose ends the kernels probe, so
that no sign of life hangs on a thread that gets its turn. The thread, not the main thread, notices and acts, so a rank
that is stuck inside a collective still leaves. What ends a run:
- every rank reports `finish`: the agreed end, with code 0, or 130/143 when a signal asked for it;
- a rank reports `fail` (its exception): all leave with its exit code, and only that rank speaks;
- a connection closes without a word, or its host does not answer for `timeout` seconds: the rank is lost, code 70;
- a rank has been stopped (SIGSTOP) for as long, which the previous rank of its host sees: it is killed and lost;
- a process above a rank (its launcher, see `processes.launchers`) is gone: code 70;
- others have waited for a rank in a collective or message for `step_timeout` seconds (`standstill`): code 70;
- a second SIGINT or SIGTERM: code 130/143 at once.
The hub decides (`referee`), tells the user in one line and tells the ranks; they leave quietly. When the hub itself is
lost, the ranks of each host leave and the first of them tells the user.

A native call that holds Python's lock for long, and with it this thread, is no sign of death: the kernels go on
answering. Only when others have waited for that rank for `step_timeout` is it ended, and the user told that.

What is received is data (`wire`): lines of known kinds, from peers that proved to know the run's token (HMAC-SHA256
over a nonce); nothing in it is run, or opened as a file. It is not encrypted: as with gloo and NCCL themselves, a
network between hosts has to be trusted.
"""

from __future__ import annotations

import hmac
import math
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from megalite.core.progress import Progress
from megalite.run.processes import Process, is_stopped
from megalite.run.referee import LOST, End, Peer, Referee, lost_line
from megalite.run.standstill import Standstill
from megalite.run.wire import Connection, no_sign_of_life, proof

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TICK = 0.25
"""Seconds between two looks at processes and clocks."""
_SUSPENDED = 2.0
"""Seconds between two looks after which this process was suspended itself, and with it perhaps the whole job."""
_AGAIN = 1.0
"""Seconds after which the same signal counts as a second one: launchers and service managers repeat the first."""
ORPHAN_WAIT = 2.0
"""Seconds until a vanished launcher counts: a Ctrl-C ends launchers, and reaches ranks on other hosts later."""
_SIGNAL_EXCUSE = 40.0
"""Seconds after a signal in which launchers may vanish: the ranks are draining, and DeepSpeed kills them after 30."""
_HUB_WAIT = 1.5
"""Seconds a rank waits for the hub's answer before it ends by itself."""
_HANDSHAKE = 20.0
"""Seconds for a stranger to prove itself."""
_LINGER = 1.0
"""Seconds the hub stays after the end so that the others hear of it."""
_LAST_WORDS = 10.0
"""Seconds a rank has to print its error and leave by itself."""


def listen(address: str) -> socket.socket:
    """The hub's socket, on one address only and a port of the system's choice."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


class Watchdog:
    """The watch of one rank. `start`, wait until `together`, and at last `finish` or `fail`; main thread only."""

    def __init__(
        self,
        *,
        rank: int,
        peers: Sequence[Peer],
        token: bytes,
        hub: socket.socket | Sequence[Any] | None,
        timeout: float,
        launchers: Sequence[Process],
        orphan_wait: float = ORPHAN_WAIT,
        handle_signals: bool,
        on_end: Callable[[End], None],
        claim: Callable[[], bool],
        visible: Sequence[int] = (),
        progress: Progress | None = None,
        step_timeout: float = math.inf,
    ):
        """`peers`: all ranks in order. `hub`: on rank 0 the socket of `listen`, elsewhere its [address, port], or None.
        `on_end`: called in the thread by the rank that decides the end, before anyone leaves; must not raise.
        `claim`: True for one rank of this host, the first that asks; that one tells the user.
        `visible`: the ranks whose processes this one sees, itself included, in order.
        `progress`: of this process; the run ends when a rank has kept others waiting for `step_timeout` seconds."""
        self._rank, self._peers, self._token, self._timeout = rank, tuple(peers), token, timeout
        self._launchers = [(process, str(process)) for process in launchers]
        self._orphan_wait = orphan_wait
        self._handle_signals, self._on_end, self._claim = handle_signals, on_end, claim
        self._progress = progress
        self._hub = hub
        self._is_hub = rank == 0
        self._alone = len(self._peers) == 1 and not launchers
        """Nobody else depends on how this process ends."""
        self._next: tuple[int, Process | None] | None = None
        """The rank that this one sees being stopped, and its process."""
        if len(visible) > 1:
            number = visible[(visible.index(rank) + 1) % len(visible)]
            self._next = number, Process.of(self._peers[number].pid)
        self._moving = self._looked = time.monotonic()
        """When that rank was last seen in another state than stopped, and when this one last looked."""
        self._visible, self._standstill = tuple(visible), None
        if progress is not None and len(self._peers) > 1:
            self._standstill = Standstill(rank, self._peers, progress, step_timeout, self._say, time.monotonic())
        self._referee = Referee(self._peers)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._commands: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        """The connection to rank 0; on rank 0 those from the others and from strangers (`rank` is None)."""
        self._ranks = {rank}
        """On the hub: those that have come."""
        self._signals: dict[int, float] = {}
        """When each signal first came to this process."""
        self._excused = 0.0
        """Until when launchers may vanish."""
        self._last_resort: tuple[float, End] | None = None
        """What this rank does by itself, and when, if the hub stays silent."""
        self._orphaned: float | None = None
        self._main_waits = self._has_finished = False
        """The main thread waits for the end of the run; since its work is done, and not because it failed."""
        self._over = threading.Event()
        self._restore: Callable[[], None] = lambda: None
        self.signal_received: int | None = None
        """The first SIGINT or SIGTERM that any rank of the run got; None so far."""
        self.together = threading.Event()
        """Set once every rank has come."""
        self.end: End | None = None
        """How the run ends; set once."""

    # ---- what the main thread calls

    def start(self, seconds: float) -> None:
        """Begin the watch; other ranks connect to the hub within `seconds` (OSError if it does not answer)."""
        if isinstance(self._hub, socket.socket):
            self._selector.register(self._hub, selectors.EVENT_READ, self._on_arrival)
        elif self._hub is not None:
            address, port = self._hub
            sock = socket.create_connection((address, port), timeout=seconds)
            self._add(Connection(sock, now=time.monotonic(), timeout=self._timeout, rank=0))
        if len(self._peers) == 1:
            self.together.set()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_wake)
        if self._handle_signals:
            self._take_signals()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def missing(self) -> list[int]:
        """On the hub: the ranks that have not come."""
        return [peer.rank for peer in self._peers if peer.rank not in self._ranks]

    def finish(self, code: int = 0) -> End:
        """This rank's work is done (`code`: 0, or 128 + the signal it drained for). Waits until all ranks say so.

        Returns the end: leave with its code within ten seconds, and if `end.speaker` is this rank, say why. Does not
        return when the run ends because something was lost: the process is gone then. Without peers and launcher the
        process may go on after any end."""
        return self._report(partial(self._referee.finished, self._rank, code), "finish", code)

    def fail(self, code: int, *, crash: bool) -> End:
        """This rank has an exception that ends the run with `code`; `crash`: nobody meant it, another may be its cause.

        Returns as `finish` does; `end.speaker` may be another rank, which then has shown its own exception."""
        return self._report(partial(self._referee.failed, self._rank, code, crash, ""), "fail", code, crash, "")

    def _report(self, decide: Callable[[float], None], kind: str, *values: object) -> End:
        self._main_waits, self._has_finished = True, kind == "finish"
        self._commands.put(decide if self._is_hub else lambda now: self._say(kind, *values))
        self._wake.send(b"\0")
        self._over.wait()
        assert self.end is not None, "over without an end"
        return self.end

    def _take_signals(self) -> None:
        # the handlers do nothing: the number goes through the wake-up descriptor to the thread, whatever main is doing
        previous = {signum: signal.signal(signum, lambda *_: None) for signum in _STOP_SIGNALS}
        previous_wake = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(previous_wake)
            for signum, handler in previous.items():
                signal.signal(signum, handler)

        self._restore = restore

    def close(self) -> None:
        """After the end of a run whose process goes on: give all back."""
        self._restore()
        self._selector.close()
        for sock in (self._wake, self._woken, self._hub):
            if isinstance(sock, socket.socket):
                sock.close()

    # ---- the thread

    def _run(self) -> None:
        try:
            self._watch()
            self._leave()
        except Exception:
            traceback.print_exc()  # a rank without its watch must not go on
            os._exit(1)

    def _watch(self) -> None:
        while self.end is None:
            for key, _ in self._selector.select(None if self._alone and not self._main_waits else _TICK):
                key.data()
            now = time.monotonic()
            self._look_up(now)
            self._look_beside(now)
            self._look_inside(now)
            self._drop_broken(now)
            if self.end is None and self._is_hub:
                self.end = self._referee.verdict(now)
            if self.end is None and self._last_resort is not None and now >= self._last_resort[0]:
                self._decide_alone(self._last_resort[1])

    def _on_wake(self) -> None:
        now = time.monotonic()
        for signum in self._woken.recv(4096):
            if signum in _STOP_SIGNALS:  # Python writes down every signal that has a handler
                self._on_signal(signum, now)
        while not self._commands.empty():
            self._commands.get()(now)

    def _on_signal(self, signum: int, now: float) -> None:
        first = self._signals.setdefault(signum, now)
        if self.signal_received is None:
            self._drain_for(signum, now)
            self._say("signal", signum)
        elif now - first >= _AGAIN:
            name = signal.Signals(signum).name
            self._end_run(128 + signum, f"stopped at once by a second {name}; unfinished work is given up", now)

    def _drain_for(self, signum: int, now: float) -> None:
        self.signal_received = self.signal_received or signum
        self._excused = now + _SIGNAL_EXCUSE

    def _end_run(self, code: int, line: str, now: float) -> None:
        """Through the hub; if it does not answer, this rank ends by itself."""
        if self._is_hub:
            self._referee.failed(self._rank, code, False, line, now)
        else:
            self._say("fail", code, False, line[:500])
            self._last_resort = self._last_resort or (now + _HUB_WAIT, End(code=code, line=line))

    def _say(self, kind: str, *values: object) -> None:
        """Send a message to rank 0, or from rank 0 to all."""
        for connection in self._connections:
            if connection.rank is not None:
                connection.send(kind, *values)

    def _look_up(self, now: float) -> None:
        gone = next((name for process, name in self._launchers if not process.alive()), None)
        if gone is None or now < self._excused:
            return
        self._orphaned = self._orphaned or now
        if now - self._orphaned >= self._orphan_wait and self._last_resort is None:
            host = self._peers[self._rank].host
            ranks = ", ".join(str(peer.rank) for peer in self._peers if peer.host == host)
            line = f"error: {gone} on {host}, which started its ranks ({ranks}), is gone. The run was stopped."
            self._end_run(LOST, line, now)

    def _look_beside(self, now: float) -> None:
        """End the next rank of this host if it has been stopped for too long: its own thread can't act then."""
        suspended, self._looked = now - self._looked > _SUSPENDED, now
        if self._next is None:
            return
        rank, process = self._next
        if suspended or process is None or not is_stopped(process.pid):
            self._moving = now
        elif now - self._moving > self._timeout:
            self._next = None
            why = no_sign_of_life(self._timeout)
            if self._is_hub:
                self._referee.stopped(rank, why, now, self._whereabouts())
            elif rank == 0:
                self._lose_hub(why)
            else:
                self._say("stopped", rank)
            process.kill()

    def _look_inside(self, now: float) -> None:
        """End the run if a rank does not come where others wait for it."""
        if self._standstill is None or not self.together.is_set():
            return
        self._standstill.look(now, self._main_waits)
        if self.end is None and (found := self._standstill.verdict(now)):
            if self._is_hub:
                self._referee.standing(found.ranks, found.line)
            else:
                self._decide_alone(End(code=LOST, line=found.line, lost=tuple(found.ranks)))
            for rank in found.silent:  # its own thread can't end it
                self._kill(rank)
                if self._is_hub:
                    self._say("kill", rank)

    def _kill(self, rank: int) -> None:
        """End the process of a rank, if this one sees it."""
        if rank in self._visible and (process := Process.of(self._peers[rank].pid)):
            process.kill()

    def _drop_broken(self, now: float) -> None:
        for connection in list(self._connections):
            if connection.broken or (connection.rank is None and now - connection.since > _HANDSHAKE):
                self._drop(connection, now)

    # ---- connections

    def _add(self, connection: Connection) -> None:
        self._connections.append(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, partial(self._on_readable, connection))

    def _drop(self, connection: Connection, now: float) -> None:
        self._selector.unregister(connection.socket)
        self._connections.remove(connection)
        connection.close()
        if self.end is not None or connection.rank is None:
            return
        if self._is_hub:
            self._referee.lost(connection.rank, connection.broken, now, self._whereabouts())
        else:
            self._lose_hub(connection.broken)

    def _on_arrival(self) -> None:
        assert isinstance(self._hub, socket.socket)
        with suppress(BlockingIOError, ConnectionAbortedError):  # it went away again
            sock, _ = self._hub.accept()
            connection = Connection(sock, now=time.monotonic(), timeout=self._timeout)
            connection.nonce = secrets.token_hex(16)
            connection.send("nonce", connection.nonce)
            self._add(connection)

    def _on_readable(self, connection: Connection) -> None:
        now = time.monotonic()
        for kind, values in connection.receive():
            if self._standstill is not None and connection.rank is not None:
                self._standstill.heard(connection.rank, now)
            if self.end is None:
                (self._hear_rank if self._is_hub else self._hear_hub)(connection, kind, values, now)

    def _hear_hub(self, connection: Connection, kind: str, values: list[Any], now: float) -> None:
        if kind == "nonce":
            connection.send("hello", self._rank, proof(self._token, values[0], self._rank))
        elif kind == "together":
            self.together.set()
        elif kind == "signal" and values[0] in _STOP_SIGNALS:
            self._drain_for(values[0], now)
        elif kind == "ask" and self._standstill is not None:
            self._standstill.answer(now, self._main_waits)
        elif kind == "kill" and values[0] != self._rank:
            self._kill(values[0])
        elif kind == "end":
            self.end = End(code=values[0], speaker=values[1])

    def _hear_rank(self, connection: Connection, kind: str, values: list[Any], now: float) -> None:
        rank = connection.rank
        if rank is None:  # a stranger
            self._welcome(connection, kind, values)
        elif kind == "signal" and values[0] in _STOP_SIGNALS:
            self._drain_for(values[0], now)
            self._say("signal", values[0])
        elif kind == "finish":
            self._referee.finished(rank, values[0], now)
        elif kind == "fail":
            code, crash, line = values
            self._referee.failed(rank, code, crash, line, now)
        elif kind == "still" and self._standstill is not None:
            self._standstill.ask(now, self._main_waits)
        elif kind == "account" and self._standstill is not None:
            self._standstill.hear(rank, values[0])
        elif kind == "stopped" and values[0] < len(self._peers):
            self._referee.stopped(values[0], no_sign_of_life(self._timeout), now, self._whereabouts())

    def _welcome(self, connection: Connection, kind: str, values: list[Any]) -> None:
        known = kind == "hello" and 0 < values[0] < len(self._peers) and values[0] not in self._ranks
        if known and hmac.compare_digest(values[1], proof(self._token, connection.nonce, values[0])):
            connection.rank = values[0]
            self._ranks.add(values[0])
            if len(self._ranks) == len(self._peers):
                self._say("together")
                self.together.set()
        else:
            connection.broken = "it does not know the run's token"

    # ---- the end

    def _lose_hub(self, why: str) -> None:
        self._decide_alone(End(code=LOST, line=lost_line({0: why}, self._peers, self._whereabouts()), lost=(0,)))

    def _whereabouts(self) -> str:
        """Where this rank is, from which the place of one that was lost follows."""
        if self._progress is None:
            return ""
        return f"rank {self._rank} {'had finished' if self._has_finished else f'was in {self._progress.where}'}"

    def _decide_alone(self, end: End) -> None:
        """End this rank without the hub."""
        if self.end is None:
            self.end = end
            if self._tell(end.line):
                self._on_end(end)

    def _tell(self, line: str) -> bool:
        """Say the line to the user, unless another rank of this host has said one; True if this one did."""
        if not self._claim():
            return False
        with suppress(OSError):  # nobody reads any more
            os.write(2, f"\n{line}\n".encode() if os.isatty(2) else f"{line}\n".encode())
        return True

    def _leave(self) -> None:
        end = self.end
        assert end is not None, "left without an end"
        if self._is_hub:
            if end.line:
                self._tell(end.line)
            self._say("end", end.code, end.speaker)
            self._on_end(end)
            self._linger()
        for connection in self._connections:
            connection.close()
        if end.code == 0 or (self._alone and self._main_waits):
            self._over.set()
            return
        if self._main_waits and end.speaker is not None:
            self._over.set()
            time.sleep(_LAST_WORDS)
        _flush()
        os._exit(end.code)

    def _linger(self) -> None:
        """Stay until the others have read the end and closed: leaving earlier would reset their connections."""
        deadline = time.monotonic() + _LINGER
        while any(c.rank is not None for c in self._connections) and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.05):
                if key.data not in (self._on_wake, self._on_arrival):
                    key.data()
            self._drop_broken(time.monotonic())


def _flush() -> None:
    """Write out what was printed, for at most a moment: the main thread may be stuck holding a stream."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads any more
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(0.3)
