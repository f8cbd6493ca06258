"""How fast requests end and replicas compute, measured from what passes by. Torch-free."""

from __future__ import annotations

from collections import deque

from megalite.serve.messages import Step

WINDOW = 30
"""Seconds over which ends of requests are counted."""
LONGEST_RETRY = 60.0
SPEED_WINDOW = 2.0
"""Seconds at full load that make one measurement of speed."""


class Turnover:
    """Requests and tokens that leave the queue a second, from which follows when there is room again."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW)
        """Second, requests that ended in it, and their prices."""

    def add(self, tokens: int, *, now: float) -> None:
        """A request with this price has ended."""
        second = int(now)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += tokens

    def seconds_for(self, requests: int, tokens: int, *, now: float) -> float | None:
        """Seconds until so many requests and tokens will have left, 1 to 60; None: nothing has left lately."""
        while self._seconds and self._seconds[0][0] < now - WINDOW:
            self._seconds.popleft()
        if not self._seconds:
            return None
        passed = max(1.0, now - self._seconds[0][0])
        rates = [sum(second[place] for second in self._seconds) / passed for place in (1, 2)]
        return min(LONGEST_RETRY, max(1.0, requests / rates[0], tokens / rates[1]))


class Speed:
    """Tokens that a replica computes a second while it has as much work as it can take at once."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        """Time and tokens when it was last seen at full load."""
        self._seconds = 0.0
        self._tokens = 0
        self._mean: float | None = None

    def measured(self, step: Step, max_num_seqs: int, now: float) -> float | None:
        """Take a message into account; gives the speed, a moving mean, whenever it has changed, else None."""
        full = step.waiting > 0 or step.running >= max_num_seqs
        done = step.prompt_tokens - step.prefix_hits + step.output_tokens
        if full and self._last is not None:
            self._seconds += now - self._last[0]
            self._tokens += done - self._last[1]
        self._last = (now, done) if full else None
        if self._seconds < SPEED_WINDOW or self._tokens <= 0:
            return None
        new = self._tokens / self._seconds
        self._mean = new if self._mean is None else self._mean + (new - self._mean) / 4
        self._seconds, self._tokens = 0.0, 0
        return self._mean
