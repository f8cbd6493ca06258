"""A command that a test starts, and every process below it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from waiting import PATIENCE, wait_until

from megalite.run.processes import Process, descendants

ROOT = Path(__file__).resolve().parent.parent


class Started:
    """A command in a session of its own, and all processes it has below it."""

    def __init__(self, folder: Path, command: list[object], **env: str | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = [(folder / name).open("w") for name in ("stdout", "stderr")]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **env}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
            env={name: value for name, value in env.items() if value is not None},
        )
        self.process.stdin.close()
        self.all: list[Process] = []
        self.size = 0

    def ready(self, ranks: int, mark: str = "ready") -> Started:
        wait_until(lambda: self.marks(mark) == ranks or self.process.poll() is not None, mark)
        assert self.marks(mark) == ranks, self.err
        self.all = [Process.of(self.process.pid), *descendants(self.process.pid)]
        return self

    def marks(self, mark: str) -> int:
        """The ranks that have left it."""
        return len(list(self.folder.glob(f"{mark}-*")))

    def rank(self, rank: int) -> Process | None:
        """None once it has gone."""
        return Process.of(json.loads((self.folder / f"card-{rank}").read_text())["pid"])

    def ended(self) -> int:
        """Wait until every process is gone; the exit code."""
        code = self.process.wait(PATIENCE)
        wait_until(lambda: not any(process.alive() for process in self.all), "all are gone")
        return code

    @property
    def out(self) -> list[str]:
        return sorted((self.folder / "stdout").read_text().splitlines())

    @property
    def err(self) -> list[str]:
        return (self.folder / "stderr").read_text().splitlines()

    def kill(self) -> None:
        for process in [*descendants(self.process.pid), *self.all]:
            process.kill()
        self.process.kill()
        self.process.wait()
        for file in self._files:
            file.close()
