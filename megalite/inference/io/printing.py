"""Results on the terminal, in input order, for a person to read. Torch-free."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import TextIO

from megalite import terminal
from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request
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


class StreamPrinter:
    """Prints the only completion of a run to standard output as it grows."""

    def __init__(self, request: Request):
        self.reader_has_left = False
        """Nobody reads standard output any more."""
        self._request = request
        self._began = False
        self._length = 0
        """Characters of the text that were printed."""

    def stream(self, delta: TokenDelta) -> None:
        """ResourceError if standard output can't be written."""
        self._begin()
        self._length += len(delta.text)
        self._print(shown(delta.text))

    def write(self, output: RequestOutput) -> None:
        """The end of it, or all of it where another replica ran it. ResourceError as `stream`."""
        self._begin()
        parts = [f"--- error: {output.error}"] if output.error is not None else []
        for completion in output.outputs:
            self._print(
                shown(completion.text[self._length :]) if completion.text else f"token ids {completion.token_ids}"
            )
            parts.append(f"--- {_size(completion)}")
        self._print("\n" + shown("\n".join(parts)) + "\n\n")

    def close(self) -> None:
        """Nothing waits."""

    def _begin(self) -> None:
        if not self._began:
            self._began = True
            head = _head(self._request.id, self._request.prompt, self._request.prompt_token_ids)
            self._print(shown("\n".join([*head, "--- completion"])) + "\n")

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        terminal.require_stdout()
        self.reader_has_left = terminal.reader_has_left()


def print_output(output: RequestOutput, stream: TextIO) -> None:
    """Show a prompt and its completions; control characters, which a terminal would obey, are escaped."""
    parts = _head(output.request_id, output.prompt, output.prompt_token_ids)
    if output.error is not None:
        parts.append(f"--- error: {output.error}")
    for completion in output.outputs:
        place = f" {completion.index + 1} of {len(output.outputs)}" if len(output.outputs) > 1 else ""
        parts.append(f"--- completion{place} ({_size(completion)})")
        parts.append(completion.text or f"token ids {completion.token_ids}")
    stream.write(shown("\n".join(parts)) + "\n\n")
    stream.flush()


def _head(name: str, prompt: str | None, prompt_token_ids: Iterable[int]) -> list[str]:
    ids = list(prompt_token_ids)
    said = [prompt] if prompt is not None else [f"token ids {ids}"] if ids else []
    return [f"=== {name} ===", *said]


def _size(completion: CompletionOutput) -> str:
    return f"{format_count(len(completion.token_ids), 'token')}, {completion.finish_reason or 'unfinished'}"


def shown(text: str) -> str:
    """`text` with its control characters escaped, which a terminal would obey."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)
