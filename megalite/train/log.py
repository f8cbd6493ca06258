"""What a training run tells: lines on the terminal, JSON lines in a file, TensorBoard; and how fast it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalite.files import LineFile


class RunLog:
    """The log of one run, in `folder`; a run that goes on adds to it. One rank has it."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool | None):
        """`step`: after which the run goes on. `tensorboard`: null means when it is installed."""
        self._lines = LineFile(folder / "log.jsonl")
        self._lines.cut_torn_line()  # of a run that was killed
        self._board = None
        if tensorboard or (tensorboard is None and find_spec("tensorboard") is not None):
            from torch.utils.tensorboard import SummaryWriter  # slow, and not always there

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._began = time.monotonic()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` of `step`: a JSON line with the seconds since the log was opened, and curves of the numbers."""
        seconds = round(time.monotonic() - self._began, 3)
        self._lines.append(json.dumps({"step": step, "seconds": seconds, **values}))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


class Speed:
    """Measures work a second, less the time of what is not training."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = 0
        self._flops = 0.0
        self._since = clock()

    def count(self, tokens: int, flops: float) -> None:
        """Work done by a step."""
        self._tokens += tokens
        self._flops += flops

    def read(self) -> tuple[float, float]:
        """Tokens and floating-point operations a second since the last reading, on all ranks together."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        found = self._tokens / seconds, self._flops / seconds
        self._tokens, self._flops, self._since = 0, 0.0, now
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = self._clock()
        yield
        self._since += self._clock() - began
