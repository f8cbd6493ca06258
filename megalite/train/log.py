"""The log of a training run, as JSON lines and TensorBoard curves; its speed, and the report of all ranks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalite.core.collectives import gather_reports
from megalite.files import LineFile, write_durably
from megalite.model.decoder import Decoder
from megalite.monitor.collector import Meter
from megalite.monitor.report import format_report


def continued(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> LineFile:
    """The JSON lines of a run that goes on, less torn ones, and those of work that is to be done again.

    `keep` says of the values of a line whether they stay.
    """

    def stays(line: str) -> bool:
        try:
            return line.endswith("\n") and keep(json.loads(line))
        except ValueError:
            return False

    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = list(filter(stays, lines))
        if kept != lines:
            write_durably(path, "".join(kept))
    return LineFile(path)


class Board:
    """Curves for TensorBoard in `folder/tensorboard`, or nothing where they are not wanted."""

    def __init__(self, folder: Path, *, step: int, wanted: bool | None):
        """`step`: after which the curves go on. `wanted`: null means when TensorBoard is installed."""
        self._writer = None
        if wanted or (wanted is None and find_spec("tensorboard") is not None):
            from torch.utils.tensorboard import SummaryWriter  # slow, and not always there

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A point on the curve of each value that is a number."""
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class RunLog:
    """The log of one run, in `folder`; a run that goes on continues it. One rank has it."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool | None):
        """`step`: after which the run goes on. `tensorboard`: null means when it is installed."""
        self._lines = continued(folder / "log.jsonl", lambda values: values["step"] <= step)
        self._board = Board(folder, step=step, wanted=tensorboard)
        self._began = time.monotonic()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` of `step`: a JSON line with the seconds since the log was opened, and curves of the numbers."""
        seconds = round(time.monotonic() - self._began, 3)
        self._lines.append(json.dumps({"step": step, "seconds": seconds, **values}))
        self._board.write(step, values)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def print_report(decoder: Decoder, rank: int, *, steps: int, tokens: int, writes: bool) -> None:
    """Print memory, speed and times of all ranks since the start of `decoder`'s meter. Collective over the run.

    `steps`: of the run, over `tokens` on all ranks together; `writes`: this rank prints. What DeepSpeed sends by itself
    counts as computing.
    """
    state, layers = decoder.state, decoder.layer_range
    measured = state.meter.report(
        steps=steps,
        rank=rank,
        tp=state.coord.tp,
        pp=state.coord.pp,
        dp=state.coord.dp,
        layers=(min(layers), max(layers) + 1) if layers else (0, 0),
        weight_bytes=sum(param.nbytes for param in decoder.parameters()),
        learnt_tokens=tokens,
    )
    reports = gather_reports(measured)
    if writes:
        print(format_report(reports), file=sys.stderr, flush=True)


class Speed:
    """Measures work a second, less the time of the parts of the job that are not training (`Meter.part`)."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._tokens, self._flops, self._since = 0, 0.0, meter.clock()
        meter.take_parts()

    def count(self, tokens: int, flops: float) -> None:
        """Work done by a step."""
        self._tokens += tokens
        self._flops += flops

    def read(self) -> tuple[float, float]:
        """Tokens and floating-point operations a second since the last reading, on all ranks together."""
        now = self._meter.clock()
        seconds = max(now - self._since - sum(self._meter.take_parts().values()), 1e-9)
        found = self._tokens / seconds, self._flops / seconds
        self._tokens, self._flops, self._since = 0, 0.0, now
        return found
