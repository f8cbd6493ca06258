"""How far a run is, on one line of a terminal; nothing where standard error is not one."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from megalite.monitor.words import format_rate

WINDOW = 5.0
"""Seconds over which the shown speed is measured."""


class ProgressBar:
    """Prompts done and generated tokens a second. A context manager; the line stays when it ends.

    Args:
        total: prompts of the run.
        done: of these, finished before this run began.
        enabled: false shows nothing, as does a `stream` that is not a terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        stream = stream or sys.stderr
        self._clock = clock
        self._tokens = 0
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="prompt",
            file=stream,
            disable=not (enabled and stream.isatty()),
            miniters=0,
            mininterval=0.2,
            dynamic_ncols=True,
            bar_format="{desc}{n_fmt}/{total_fmt} prompts |{bar}| {elapsed}{postfix}",
        )

    @property
    def tokens_per_second(self) -> float:
        """Over the last `WINDOW` seconds."""
        now = self._clock()
        while len(self._marks) > 1 and self._marks[1][0] <= now - WINDOW:
            self._marks.popleft()
        start, tokens = self._marks[0]
        return (self._tokens - tokens) / (now - start) if now > start else 0.0

    def advance(self, *, prompts: int = 0, tokens: int = 0) -> None:
        """Some prompts finished, some tokens were generated; cheap enough to be called every step."""
        if self._bar.disable:
            return
        self._tokens += tokens
        if prompts or self._clock() - self._marks[-1][0] >= self._bar.mininterval:
            self._bar.set_postfix_str(f"{format_rate(self.tokens_per_second, 1)} tokens/s", refresh=False)
            self._marks.append((self._clock(), self._tokens))
            self._bar.update(prompts)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the line off the terminal while something else is written there."""
        if self._bar.disable:
            yield
        else:
            self._bar.clear()
            yield
            self._bar.refresh()

    def close(self) -> None:
        """Leave the line as it is; idempotent."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
