"""A dead man's switch for one rank, run as a script by its watchdog: `python guardian.py PID SECONDS`, a pipe as stdin.

The rank's watchdog thread writes a byte now and then. When none has come for SECONDS, the rank is stopped (SIGSTOP) or
stuck in a way that no thread of its own could end, and is killed. Ends when the rank does. It is a process, not a
kernel timer, so that a whole job which is suspended (Ctrl-Z, a paused container) may wake up again: then this process
has slept as well, sees it, and starts counting anew. Imports nothing but the standard library, to be small and quick.
"""

import os
import select
import signal
import sys
import time

_TICK = 0.5
"""Seconds between two looks."""


def main(rank: int, limit: float) -> None:
    """Watch the parent process, whose id is `rank`, until it ends or must be ended."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the rank, which may need time to drain
        signal.signal(signum, signal.SIG_IGN)
    heard = looked = time.monotonic()
    while os.getppid() == rank:
        ready, _, _ = select.select([0], [], [], _TICK)
        now = time.monotonic()
        if now - looked > 4 * _TICK:
            heard = now
        looked = now
        if ready:
            if not os.read(0, 4096):
                return
            heard = now
        elif now - heard > limit and os.getppid() == rank:
            os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
