"""What the system says of this process: memory, and threads that wait for a core."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Most bytes of memory this process held, file pages included, since it began or `reset_peak_memory`."""
    status = _status()
    if "VmHWM" in status:
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> int:
    """Begin a new peak; return what `peak_memory` starts from, so that the difference is what was taken since.

    Where the system can't forget the old peak (proc(5), clear_refs), that is the old peak, and the difference a lower
    bound.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return peak_memory()
    return _status()["VmRSS"]


def run_delays() -> dict[str, float]:
    """Seconds that each thread of this process has been ready to run without a core; empty where nobody counts them."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError, ValueError, IndexError):  # it has just ended
            found[thread.name] = int((thread / "schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return found


def _status() -> dict[str, int]:
    """The memory lines of /proc/self/status in bytes; empty on a system without it."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file if line.startswith("Vm")]
    except FileNotFoundError:
        return {}
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in lines}
