"""`status.json`: what a run's ranks last agreed on, for whoever looks, and the same in a word for the door."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite.errors import EXIT_RANK_LOST, EXIT_SIGINT, EXIT_SIGTERM, MegaliteError
from megalite.files import write_json
from megalite.run.referee import End, Peer

TOLD = re.compile(rb"megalite: (?:running|ended (\d+))\n")
"""What the door is told: that all ranks are there, and the exit code of the run."""


class StatusFile:
    """Writes the state of one run, whole at each change; the first end that is written stays.

    The watch's thread may know the end while the main thread still reports the beginning. The run goes on without the
    file when it can't be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, door: int | None = None):
        """`door`: descriptor through which the door is told of beginning and end too, in lines like `TOLD`."""
        self._path = None if path is None else Path(path)
        self._door = door
        self._started = time.time()
        self._lock = threading.Lock()
        self._over = False
        self.peers: Sequence[Peer] = ()

    def running(self) -> None:
        """All ranks are there."""
        self._write("running", None, "", [])

    def ended(self, end: End) -> None:
        """All ranks know the end; raises nothing."""
        states = {0: "done", EXIT_SIGINT: "stopped", EXIT_SIGTERM: "stopped", EXIT_RANK_LOST: "lost"}
        guilty = [rank for rank in (*end.lost, end.speaker) if rank is not None and end.code]
        self._write(states.get(end.code, "failed"), end.code, end.line, guilty)

    def failed(self, code: int, reason: str) -> None:
        """The run ended before it began."""
        self._write("failed", code, reason, [])

    def _write(self, state: str, code: int | None, reason: str, guilty: list[int]) -> None:
        value: dict[str, Any] = {
            "state": state,
            "exit_code": code,
            "reason": reason,
            "guilty": guilty,
            "ranks": [{"rank": peer.rank, "host": peer.host, "pid": peer.pid} for peer in self.peers],
            "started": self._started,
            "updated": time.time(),
        }
        with self._lock:
            if self._over:
                return
            self._over = code is not None
            if self._door is not None:
                with suppress(OSError):  # the door is gone, and this rank soon too
                    os.write(
                        self._door, b"megalite: running\n" if code is None else f"megalite: ended {code}\n".encode()
                    )
            if self._path is not None:
                try:
                    write_json(self._path, value)
                except MegaliteError as error:
                    sys.stderr.write(f"warning: the run's status was not written: {error}\n")
