"""Runs scripts in forks of one process that has imported what the tools need: dozens of runs take seconds."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@dataclass(frozen=True)
class Run:
    """How a tool ended."""

    code: int
    """As subprocess has it: negative for a signal."""
    out: str
    err: str
    written: int
    """Bytes that it gave to write calls."""


class ForkedTools:
    """`run` is as `python tools/NAME.py ARGUMENT...`, or of another script by its path. Use as a context manager."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def run(self, name: str | Path, *arguments: object, **environment: str) -> Run:
        asked = {"name": str(name), "arguments": [str(one) for one in arguments], "environment": environment}
        self._process.stdin.write(json.dumps(asked) + "\n")
        return Run(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> ForkedTools:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def main() -> None:
    import megalite.tools.convert
    import megalite.tools.describe
    import megalite.tools.export
    import megalite.tools.reshard
    import megalite.tools.verify  # noqa: F401  for the forks

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            pid = os.fork()
            if pid == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _run(**json.loads(line))
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            counts = dict(entry.split(": ") for entry in Path(f"/proc/{pid}/io").read_text().splitlines())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            err.seek(0)
            run = {"code": code, "out": out.read(), "err": err.read(), "written": int(counts["wchar"])}
        print(json.dumps(run), flush=True)


def _run(name: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The tool; does not return."""
    os.environ.update(environment)
    path = Path(name) if name.endswith(".py") else TOOLS / f"{name}.py"
    sys.argv = [str(path), *arguments]
    sys.path[:0] = [str(TOOLS), environment.get("PYTHONPATH", "")]
    code = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
