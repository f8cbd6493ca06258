"""`status.json`: what a run's ranks last agreed on. Rank 0 writes it; whoever started the run reads the truth there."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.errors import EXIT_RANK_LOST, EXIT_SIGINT, EXIT_SIGTERM, MegaliteError
from megalite.files import write_json
from megalite.monitor.referee import End, Peer

STATUS_VARIABLE = "MEGALITE_STATUS"
"""Environment variable with the path of a status file that the run has to write."""


class StatusFile:
    """Writes the state of one run, whole at each change; the first end that is written stays.

    The watch's thread may know the end while the main thread still reports the beginning. The run goes on without the
    file when it can't be written.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        self._paths = list(dict.fromkeys(Path(path) for path in paths))
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
            for path in self._paths:
                try:
                    write_json(path, value)
                except MegaliteError as error:
                    sys.stderr.write(f"warning: the run's status was not written: {error}\n")


def read_status(path: Path) -> dict[str, Any]:
    """What the run last wrote; empty if it wrote nothing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
