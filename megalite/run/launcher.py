"""The door: starts the ranks of a run on this host, watches them, and returns the run's true exit code. No torch.

The ranks watch each other (`run.watchdog`) and tell the door through a pipe when all have met and how the run
ended. Exit code 0 is given only if all ranks agreed on the end and then left with 0. What is still there when a rank
has failed is given time to end by itself, then killed, and so is all that the ranks have left: orphans come to the door
because it adopts them. A rank cannot outlive the door: the kernel ends it until its watch begins, then the watch does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from megalite.errors import EXIT_RANK_LOST
from megalite.run.launch_env import DOOR_VARIABLE
from megalite.run.meeting_folder import remove_run_folder, run_folder
from megalite.run.processes import Process, adopt_orphans, descendants, die_with_parent, is_stopped, this_process
from megalite.run.status import TOLD

_TICK = 0.05
"""Seconds between two looks at the ranks."""
_LEFTOVERS = 8.0
"""Seconds that the others have to end by themselves when a rank has failed, and one of them to say why."""
_FAREWELL = 1.5
"""Seconds that they have where a signal ended it before the run began, of which none of them knows."""
_AGAIN = 0.3
"""Seconds after which a signal counts as a second one; a terminal and a shell may both send the first."""
_KILL = 5.0
"""Seconds for killed processes to vanish."""
_SUSPENDED = 1.0
"""Seconds between two looks after which this process has been suspended itself, perhaps with its ranks."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_ranks(
    command: Sequence[str], num_ranks: int, *, stopped_timeout: float, files: Sequence[int] = (), stdin: bool = False
) -> int:
    """Run the Python `command` (a script and its arguments) as `num_ranks` ranks of this host; returns its exit code.

    The ranks write to this process's output and inherit the descriptors `files`; `stdin`: rank 0 also gets this
    process's standard input, the others have none. SIGINT, SIGTERM and SIGHUP are passed on to the ranks, which drain;
    a second one kills. A rank that is stopped (SIGSTOP) for `stopped_timeout` seconds counts as lost. When this
    returns, no process of the run is left. ResourceError: no room in TMPDIR. Main thread only.
    """
    run_folder(this_process())  # where the ranks will meet
    try:
        return _Door(num_ranks, stopped_timeout).run(command, files, stdin)
    finally:
        remove_run_folder(this_process())


def environment(outside: Mapping[str, str], rank: int, num_ranks: int, door: str) -> dict[str, str]:
    """The environment of a rank, made of the user's."""
    cores = len(os.sched_getaffinity(0))
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nothing listens there: on one host they meet in a file
    threads = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks))}
    return {**threads, **outside, **{name: str(n) for name, n in numbers.items()}, **address, DOOR_VARIABLE: door}


class _Door:
    """One start of the ranks."""

    def __init__(self, num_ranks: int, stopped_timeout: float):
        self._size, self._stopped_timeout = num_ranks, stopped_timeout
        self._pipe, self._their_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._name = f"{os.getpid()}:{self._their_end}"
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._heard = b""
        """What the ranks have said."""
        self._signals: list[tuple[int, float]] = []
        """What this process was sent, and when."""
        self._failed: tuple[float, int] | None = None
        """When the first rank left with another code than 0, and which."""
        self._moving = [0.0] * num_ranks
        """When each rank was last seen in another state than stopped."""

    def run(self, command: Sequence[str], files: Sequence[int], stdin: bool) -> int:
        """Start, wait, clean up; the exit code."""
        adopt_orphans()
        ignored = [signum for signum in _SIGNALS if signal.getsignal(signum) is signal.SIG_IGN]  # nohup
        previous = {n: signal.signal(n, self._on_signal) for n in _SIGNALS if n not in ignored}
        try:
            for rank in range(self._size):
                self._ranks.append(self._start(rank, command, files, stdin and rank == 0))
            return self._until_end()
        finally:
            self._kill_all()
            adopt_orphans(False)
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            for end in (self._pipe, self._their_end):
                os.close(end)

    def _start(self, rank: int, command: Sequence[str], files: Sequence[int], stdin: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-u", *command],
            env=environment(os.environ, rank, self._size, self._name),
            stdin=None if stdin else subprocess.DEVNULL,
            pass_fds=[self._their_end, *files],
            start_new_session=True,  # so that a Ctrl-C at the terminal reaches the ranks through the door alone
            preexec_fn=die_with_parent,
        )

    def _on_signal(self, signum: int, frame: object) -> None:
        self._signals.append((signum, time.monotonic()))

    def _until_end(self) -> int:
        passed_on, looked = False, time.monotonic()
        self._moving = [looked] * self._size
        while self._living():
            now, signalled = time.monotonic(), bool(self._signals)
            self._listen()  # after that look: who sends a signal because the run began is told so
            if signalled and not passed_on:
                passed_on = True
                if not self._heard:
                    return self._stopped("before the run began")
                for process in self._living():
                    process.send_signal(signal.SIGINT if self._signals[0][0] == signal.SIGINT else signal.SIGTERM)
            if self._again():
                return self._stopped("at once; unfinished work is given up")
            if self._failed is not None:
                at, failed = self._failed
                killed = not self._heard and not 0 <= (self._ranks[failed].returncode or 0) <= 128
                if now - at > (_FAREWELL if killed else _LEFTOVERS):
                    break
            elif (rank := self._standing(now, looked)) is not None:
                self._say(f"error: {self._name_of(rank)} was lost: stopped for {self._stopped_timeout:g} s")
                return EXIT_RANK_LOST
            looked = now
            time.sleep(_TICK)
        self._listen()
        return self._truth()

    def _living(self) -> list[subprocess.Popen[bytes]]:
        """The ranks that have not ended; notes the first that failed."""
        living = [rank for rank in self._ranks if rank.poll() is None]
        if self._failed is None:
            bad = next((n for n, rank in enumerate(self._ranks) if rank.returncode), None)
            self._failed = None if bad is None else (time.monotonic(), bad)
        return living

    def _listen(self) -> None:
        with suppress(BlockingIOError):
            self._heard += os.read(self._pipe, 1 << 16)

    def _end(self) -> int | None:
        """The exit code that the ranks agreed on, once they have."""
        return next((int(code) for code in TOLD.findall(self._heard) if code), None)

    def _name_of(self, rank: int) -> str:
        return f"rank {rank} (pid {self._ranks[rank].pid})"

    def _standing(self, now: float, looked: float) -> int | None:
        """A rank that has been stopped for too long. The rank beside it is quicker, unless that is stopped too."""
        for rank, process in enumerate(self._ranks):
            if now - looked > _SUSPENDED or not is_stopped(process.pid):
                self._moving[rank] = now
            elif now - self._moving[rank] > self._stopped_timeout:
                return rank
        return None

    def _again(self) -> bool:
        """A second signal has come."""
        return any(at - self._signals[0][1] >= _AGAIN for _, at in self._signals)

    def _stopped(self, how: str) -> int:
        signum = self._signals[0][0]
        self._say(f"stopped by {signal.Signals(signum).name} {how}")
        return 128 + signum

    def _truth(self) -> int:
        """The run's exit code, from what its ranks said and the codes with which they left."""
        end = self._end()
        if end or self._failed is None:
            if end is None:
                self._say("error: the ranks left without a word")
            return EXIT_RANK_LOST if end is None else end
        rank = self._failed[1]
        code = self._ranks[rank].returncode
        began = self._heard
        signum = code - 128 if code > 128 else -code
        if signum in _SIGNALS and not began:
            self._signals.append((signum, time.monotonic()))
            return self._stopped("before the run began")
        if code > 0 and (end == 0 or not began):
            return code  # it failed before the run began or after it ended, and has said why
        before = "while the ranks were at work" if began else "before the run began"
        when = "after the run ended" if end == 0 else before
        how = f"left with code {code}" if code > 0 else f"was killed by signal {-code}"
        self._say(f"error: {self._name_of(rank)} {how} {when}")
        return EXIT_RANK_LOST

    def _say(self, line: str) -> None:
        with suppress(OSError):  # nobody reads any more
            sys.stderr.write(f"{line}.\n")
            sys.stderr.flush()

    def _left(self) -> list[Process]:
        """The processes of the run that live."""
        mark = f"{DOOR_VARIABLE}={self._name}".encode()
        return [process for process in descendants(os.getpid()) if mark in process.environment()]

    def _kill_all(self) -> None:
        ranks = {rank.pid for rank in self._ranks}
        end = time.monotonic() + _KILL
        while (left := self._left()) and time.monotonic() < end:
            for signum in (signal.SIGSTOP, signal.SIGKILL):  # none shall see another die and complain
                for process in left:
                    process.kill(signum)
            time.sleep(_TICK)
            for orphan in {process.pid for process in left} - ranks:
                with suppress(ChildProcessError):  # its parent lived longer
                    os.waitpid(orphan, os.WNOHANG)
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                rank.wait(_TICK)
