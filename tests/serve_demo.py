"""The demo model behind `launch/serve.py`, for scripts that prove something of a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.run.processes import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
START_WITHIN = 300.0


class Demo:
    """A server that runs, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.process, self._log, self.url = process, log, ""

    @property
    def said(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> Any:
        """The JSON value at `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def replicas(self) -> Any:
        return self.get("/stats")["replicas"]

    def wait_ready(self) -> None:
        until = time.monotonic() + START_WITHIN
        while not self._are_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server is not ready:\n{self.said}")
            self.url = self.url or next(iter(re.findall(r"listening at (\S+)", self.said)), "")
            time.sleep(0.1)

    def _are_ready(self) -> bool:
        try:
            return bool(self.url) and all(one["state"] == "ready" for one in self.replicas())
        except OSError:  # it has ended
            return False

    def end(self) -> int:
        """Its exit code, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def demo(folder: Path, *overrides: str) -> Iterator[Demo]:
    """Start it with these keys and wait until all replicas are ready; its log is in `folder`."""
    log = folder / "server.log"
    command = [sys.executable, "-u", ROOT / "launch" / "serve.py", "--config", ROOT / "configs/serve/demo.yaml"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "server.port=0", "monitor.report=false", *overrides],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=out,
            preexec_fn=die_with_parent,
            text=True,
        )
    served = Demo(process, log)
    try:
        served.wait_ready()
        yield served
    finally:
        process.kill()
        process.wait()
