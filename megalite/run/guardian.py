"""A rank's second pair of eyes: a process that its watchdog starts, with a socket as standard input.

It sees what a thread of the rank can't act on. A rank that has been stopped (SIGSTOP) for SECONDS is killed, and its
peers are told why, over copies of its connections that come through the socket. A rank whose connections have all
been closed, because the run has ended, and which does not leave, is killed too: one call may hold Python's lock. Ends
when the rank does. It is a process, not a kernel timer, so that a whole job which is suspended (Ctrl-Z, a paused
container) may wake up again: then this process has slept as well, sees it, and starts counting anew.
"""

import os
import select
import signal
import socket
import time
from contextlib import suppress

from megalite.run.processes import die_with_parent, is_stopped

_TICK = 0.5
"""Seconds between two looks."""
_LEAVE = 30.0
"""Seconds that a rank has to leave once all others have hung up."""


def main(rank: int, limit: float) -> None:
    """Watch the parent process, whose id is `rank`, until it ends or must be ended."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the rank, which may need time to drain
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()  # at once: the copies would keep the connections of a dead rank open
    control, peers = socket.socket(fileno=0), []
    control.send(b".")
    stopped = left = looked = time.monotonic()
    while os.getppid() == rank:
        if select.select([control], [], [], _TICK)[0]:
            try:
                word, files, _, _ = socket.recv_fds(control, 1, 1)
            except ConnectionResetError:
                return
            if not word:
                return
            peers += [socket.socket(fileno=file) for file in files]
        now = time.monotonic()
        suspended, looked = now - looked > 4 * _TICK, now
        if suspended or not is_stopped(rank):
            stopped = now
        if suspended or not peers or not all(map(_is_closed, peers)):
            left = now
        if now - stopped > limit or now - left > _LEAVE:
            for peer in peers:
                with suppress(OSError):  # it is gone
                    peer.send(b'{"kind": "stopped"}\n')
            os.kill(rank, signal.SIGKILL)
            return


def _is_closed(peer: socket.socket) -> bool:
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    return bool(poll.poll(0))
