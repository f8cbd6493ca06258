"""Waiting for what a test is about. How long something takes is measured by tools/bench.py, not asserted."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds for anything that a machine without other work does at once: a busy one may need minutes."""


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], object], what: str, within: float = PATIENCE) -> None:
    """Return as soon as `true()` is true. AssertionError, which says `what` did not come, after `within` seconds."""
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, f"not within {within:g} s: {what}"
        time.sleep(0.02)
