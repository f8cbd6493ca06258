"""Runs a command-line tool again and again in one folder, each run killed at a step that is asked for.

    python tests/killed_tool.py TOOL ARGUMENT...

Reads step numbers, one a line; answers each with the run's return code, as subprocess has it, and the bytes it wrote.
A run is a fork of this process, which has imported all that tools need: dozens of them take seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megalite.tools import convert, export, reshard, toolkit
from megalite.weights.shards import STEP

TOOLS = {"convert": convert, "export": export, "reshard": reshard}
"""Imported for the forks."""


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.environ["MEGALITE_FAULT"] = f"{STEP}#{int(line)}=kill"
            _run(sys.argv[1], sys.argv[2:])
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        written = _written(pid)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), written, flush=True)


def _run(tool: str, arguments: list[str]) -> None:
    """The tool as `megalite TOOL` runs it; does not return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    assert tool in TOOLS
    sys.argv = [tool, *arguments]
    os._exit(toolkit.tool(tool))


def _written(pid: int) -> int:
    """Bytes that a process which has ended, but was not waited for, gave to write calls."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise AssertionError("no wchar")


if __name__ == "__main__":
    main()
