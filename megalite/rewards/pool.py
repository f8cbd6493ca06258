"""Rewards of many samples, computed in worker processes, so that a reward that hangs or crashes costs one sample.

    with RewardPool("megalite.rewards:parses_as_python", workers=4, time_limit=5, failure_reward=0) as pool:
        scored = pool.evaluate(samples)

A reward is `reward(prompt: str, completion: str, example: Mapping[str, Any]) -> float`, and the config names it as
`package.module:function`. A worker (worker.py) holds one sample at a time. When it takes too long or leaves
processes behind, it is killed with everything it started, and another takes its place. This is protection from
accidents: a reward is the user's own code and runs with the user's rights. What a model wrote is run by `sandbox` only.

Workers die with this process. What a reward started dies with its worker, unless the worker itself crashed and the
process had made itself the head of a session. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from megalite.errors import MegaliteError, Problem
from megalite.rewards.child import Child
from megalite.rewards.named import NamedFunction, how_it_ended
from megalite.run.processes import descendants

START_SECONDS = 120.0
"""Time for a worker to import the reward's module."""
_FAREWELL = 2.0
"""Seconds an idle worker has to leave by itself."""
_LOOK = 0.2
"""Seconds between looks at whether to stop."""
_KILL = 5.0
"""Seconds for killed processes to vanish."""

ARGUMENTS = ("prompt", "completion", "example")
"""What a reward is called with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion to score."""

    prompt: str
    completion: str
    example: Mapping[str, Any]
    """The record that the prompt comes from; JSON-like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The reward of one completion."""

    reward: float
    failure: str | None = None
    """Why the reward could not be computed and is the pool's `failure_reward`: `took longer than 2 s`."""


def check_reward(name: str) -> Problem | None:
    """What is wrong with the reward function that the config names, if anything; imports it in another process."""
    return NamedFunction(name=name, key="hybrid.reward", positional=ARGUMENTS).check()


class RewardPool:
    """Processes that compute one reward function, each served by a thread. Enter it once, evaluate any number of times.

    MegaliteError: a worker can't start.
    """

    def __init__(self, reward: str, *, workers: int, time_limit: float, failure_reward: float):
        """`reward`: as `check_reward` has found it good. `time_limit`: seconds for one sample."""
        if workers < 1 or not time_limit > 0 or not math.isfinite(failure_reward):
            raise ValueError("a pool needs at least one worker, a time limit above 0 and a finite failure reward")
        self.reward = reward
        self.time_limit = time_limit
        self.failure_reward = failure_reward
        self._count = workers
        self._threads: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._busy: set[_Worker] = set()

    def __enter__(self) -> RewardPool:
        """Start the workers; they import the reward while this process goes on."""
        # A worker dies with the thread that started it, so these threads last as long as the pool.
        self._threads = ThreadPoolExecutor(self._count)
        for _ in range(self._count):
            self._idle.put(_Worker(self.reward))
        return self

    def __exit__(self, *_: object) -> None:
        workers = [self._idle.get() for _ in range(self._idle.qsize())]  # all: `evaluate` leaves none at work
        for worker in workers:
            worker.child.no_more()
        for worker in workers:
            worker.end(patience=_FAREWELL)
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def evaluate(self, samples: Sequence[Sample], stop_requested: Callable[[], bool] = lambda: False) -> list[Scored]:
        """The rewards of `samples`, in their order; each worker computes one at a time.

        `stop_requested` is asked while they compute; once it is true, they are given up and the list is empty.
        """
        if self._threads is None:
            raise RuntimeError("the pool has not been entered")
        requests = [{name: getattr(sample, name) for name in ARGUMENTS} for sample in samples]
        lines = [json.dumps(request, default=dict).encode() + b"\n" for request in requests]
        futures = [self._threads.submit(self._score, line) for line in lines]
        try:
            while not stop_requested():
                done, left = wait(futures, _LOOK, FIRST_EXCEPTION)
                found = [future.result() for future in (futures if not left else done)]
                if not left:
                    return found
            return []
        finally:  # where it is broken off, the samples in work are given up
            for future in futures:
                future.cancel()
            for worker in list(self._busy):
                worker.child.process.kill()
            wait(futures)

    def _score(self, request: bytes) -> Scored:
        worker = self._idle.get()
        if worker.has_died():
            worker = self._replaced(worker)
        self._busy.add(worker)
        try:
            reward, failure = worker.compute(request, self.time_limit)
            return Scored(reward=self.failure_reward if reward is None else reward, failure=failure)
        finally:
            self._busy.remove(worker)
            self._idle.put(self._replaced(worker) if worker.is_spent else worker)

    def _replaced(self, worker: _Worker) -> _Worker:
        worker.end()
        return _Worker(self.reward)


class _Worker:
    """One process that computes one reward at a time."""

    def __init__(self, reward: str):
        self.reward = reward
        # What it prints goes to standard error, line by line.
        self.child = Child([sys.executable, "-u", "-P", "-m", "megalite.rewards.worker", reward], stdout=2)
        self.is_ready = False
        """It has imported the reward."""
        self.is_spent = False
        """It must be replaced."""

    def has_died(self) -> bool:
        """It was ready once and is gone, for a reason that no sample is to blame for."""
        return self.is_ready and self.child.process.poll() is not None

    def compute(self, request: bytes, time_limit: float) -> tuple[float | None, str | None]:
        """The reward, or None and why there is none."""
        self.is_spent = True  # unless it answers
        self._await_ready()
        deadline = time.monotonic() + time_limit
        try:
            self.child.say(request, deadline)
            line = self.child.hear(deadline)
        except TimeoutError:
            return None, f"took longer than {time_limit:g} s"
        if not line:
            return None, self._last_words()
        try:
            answer = json.loads(line)
            reward, failure, self.is_spent = answer["reward"], answer["failure"], answer["children"]
        except (ValueError, TypeError, LookupError):
            return None, "wrote into the pipe of its process"
        return reward, failure

    def _await_ready(self) -> None:
        """Wait for the worker's first line, which says that it is ready, or why it can't be: MegaliteError."""
        if self.is_ready:
            return
        try:
            line = self.child.hear(time.monotonic() + START_SECONDS)
            error = json.loads(line)["error"] if line else self._cannot(self._last_words())
        except TimeoutError:
            error = self._cannot(f"importing it took longer than {START_SECONDS:g} s")
        if error is not None:
            raise MegaliteError(error)
        self.is_ready = True

    def _cannot(self, why: str) -> str:
        return f"the reward {self.reward} can't be computed: {why}"

    def _last_words(self) -> str:
        try:
            return f"its process died ({how_it_ended(self.child.wait(time.monotonic() + _FAREWELL))})"
        except TimeoutError:
            return "closed the pipe of its process"

    def end(self, patience: float = 0.0) -> None:
        """After `patience` seconds kill it and all that it started, and collect it."""
        process = self.child.process
        with suppress(TimeoutError):
            self.child.wait(time.monotonic() + patience)
        with suppress(ProcessLookupError):
            if process.poll() is None:
                # Stopped, it starts nothing more, and the orphans below it still come to it and can be found.
                os.killpg(process.pid, signal.SIGSTOP)
                give_up = time.monotonic() + _KILL
                while (left := descendants(process.pid)) and time.monotonic() < give_up:
                    for one in left:
                        one.kill()
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.child.close()
