"""Results on the terminal, in input order, for a person to read. Torch-free."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import TextIO

from megalite import terminal
from megalite.inference.outputs import RequestOutput
from megalite.monitor.progress import ProgressBar
from megalite.monitor.words import format_count


class Printer:
    """Prints results to standard output, each when those before it are there."""

    finished: frozenset[str] = frozenset()
    """Nothing is kept of earlier runs."""

    def __init__(self, order: Iterable[str], progress: ProgressBar):
        """`order`: every id of the run; `progress`: the bar that makes room."""
        self.reader_has_left = False
        """Nobody reads standard output any more."""
        self._unprinted = deque(order)
        self._early: dict[str, RequestOutput] = {}
        """Results that wait for those before them."""
        self._progress = progress

    def write(self, output: RequestOutput) -> None:
        """ResourceError if standard output can't be written."""
        self._early[output.request_id] = output
        ready = []
        while self._unprinted and self._unprinted[0] in self._early:
            ready.append(self._early.pop(self._unprinted.popleft()))
        self._print(ready)

    def close(self) -> None:
        """Print what waits for results that will not come any more."""
        self._print([self._early.pop(name) for name in self._unprinted if name in self._early])

    def _print(self, outputs: list[RequestOutput]) -> None:
        with self._progress.aside():
            for output in outputs:
                print_output(output, sys.stdout)
        terminal.require_stdout()
        self.reader_has_left = terminal.reader_has_left()


def print_output(output: RequestOutput, stream: TextIO) -> None:
    """Show a prompt and its completions; control characters, which a terminal would obey, are escaped."""
    parts = [f"=== {output.request_id} ==="]
    if output.prompt is not None:
        parts.append(output.prompt)
    elif output.prompt_token_ids:
        parts.append(f"token ids {output.prompt_token_ids}")
    if output.error is not None:
        parts.append(f"--- error: {output.error}")
    for completion in output.outputs:
        place = f" {completion.index + 1} of {len(output.outputs)}" if len(output.outputs) > 1 else ""
        why = completion.finish_reason or "unfinished"
        parts.append(f"--- completion{place} ({format_count(len(completion.token_ids), 'token')}, {why})")
        parts.append(completion.text or f"token ids {completion.token_ids}")
    text = "\n".join(parts)
    shown = (one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)
    stream.write("".join(shown) + "\n\n")
    stream.flush()
