"""Rewards of many samples, computed in worker processes, so that a reward that hangs or crashes costs one sample.

    with RewardPool("megalite.rewards:parses_as_python", workers=4, time_limit=5, failure_reward=0) as pool:
        scored = pool.evaluate(samples)

A reward is `reward(prompt: str, completion: str, example: Mapping[str, Any]) -> float`, and the config names it as
`package.module:function`. A worker (`reward_worker`) holds one sample at a time. When it takes too long or leaves
processes behind, it is killed with everything it started, and another takes its place. This is protection from
accidents: a reward is the user's own code and runs with the user's rights. What a model wrote is run by `sandbox` only.

Workers die with the thread that started them, so a pool is entered and used in one thread. What a reward started dies
with its worker, unless the worker itself crashed and the process had made itself the head of a session. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megalite.errors import MegaliteError, Problem
from megalite.rewards.named import NamedFunction, how_it_ended
from megalite.run.processes import descendants

START_SECONDS = 120.0
"""Time for a worker to import the reward's module."""
_FAREWELL = 2.0
"""Seconds an idle worker has to leave by itself."""
_KILL = 5.0
"""Seconds for killed processes to vanish."""
_PIECE = 1 << 16
"""Bytes read at a time."""

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


def check_reward(name: str, *, key: str = "hybrid.reward") -> Problem | None:
    """What is wrong with the reward function that the config names, if anything; imports it in another process."""
    return NamedFunction(name=name, key=key, positional=ARGUMENTS).check()


class RewardPool:
    """Processes that compute one reward function. Enter it once, evaluate any number of times.

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
        self._workers: list[_Worker] = []

    def __enter__(self) -> RewardPool:
        """Start the workers; they import the reward while this process goes on."""
        self._workers = [_Worker(self.reward, self.time_limit) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.end(patience=_FAREWELL)

    def evaluate(self, samples: Sequence[Sample]) -> list[Scored]:
        """The rewards of `samples`, in their order; each worker computes one at a time."""
        if not self._workers:
            raise RuntimeError("the pool has not been entered")
        scored: dict[int, Scored] = {}
        waiting = deque(range(len(samples)))
        try:
            while len(scored) < len(samples):
                for place, worker in enumerate(self._workers):
                    if worker.sample is None and waiting:
                        if worker.has_died():
                            worker = self._replace(place)
                        number = waiting.popleft()
                        worker.give(number, samples[number])
                self._wait()
                for place, worker in enumerate(self._workers):
                    number, answer = worker.sample, worker.turn()
                    if number is not None and answer is not None:
                        scored[number] = Scored(reward=self._reward_of(answer), failure=answer.failure)
                        if answer.spent:
                            self._replace(place)
        finally:
            for place, worker in enumerate(self._workers):
                if worker.sample is not None:  # broken off here; its answer must not meet the next samples
                    self._replace(place)
        return [scored[number] for number in range(len(samples))]

    def _reward_of(self, answer: _Answer) -> float:
        return self.failure_reward if answer.reward is None else answer.reward

    def _replace(self, place: int) -> _Worker:
        self._workers[place].end()
        self._workers[place] = _Worker(self.reward, self.time_limit)
        return self._workers[place]

    def _wait(self) -> None:
        """Until a worker with a sample has said something, takes more of what it is sent, or is out of time."""
        busy = [worker for worker in self._workers if worker.sample is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
                selector.register(worker.line, wanted)
            selector.select(max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What came of a sample."""

    reward: float | None = None
    failure: str | None = None
    spent: bool = False
    """The worker must be replaced."""


class _Worker:
    """One process, and the sample it works on."""

    def __init__(self, reward: str, time_limit: float):
        self._process, self.line = _start(reward)
        self._reward, self._time_limit = reward, time_limit
        self._ready = False
        """It has imported the reward."""
        self._heard = b""
        self.unsent = b""
        self.sample: int | None = None
        """Number of its sample; None when it has nothing to do."""
        self.deadline = time.monotonic() + START_SECONDS
        """When its time is over: that to import the reward, then that for its sample."""

    def has_died(self) -> bool:
        """It was ready once and is gone, for a reason that no sample is to blame for."""
        return self._ready and self._process.poll() is not None

    def give(self, number: int, sample: Sample) -> None:
        """Let it work on a sample; it has none."""
        request = {"prompt": sample.prompt, "completion": sample.completion, "example": dict(sample.example)}
        self.unsent = json.dumps(request).encode() + b"\n"
        self.sample = number
        if self._ready:
            self.deadline = time.monotonic() + self._time_limit

    def turn(self) -> _Answer | None:
        """Send and hear what is possible without waiting; what came of its sample once that is known."""
        if self.sample is None:
            return None
        self._send()
        open_still = self._hear()
        if not self._ready and b"\n" in self._heard:
            self._greet(self._line())
        if self._ready and b"\n" in self._heard:
            answer = _read_answer(self._line())
        elif not open_still:
            answer = _Answer(failure=self._last_words(), spent=True)
        elif time.monotonic() < self.deadline:
            return None
        else:
            answer = _Answer(failure=f"took longer than {self._time_limit:g} s", spent=True)
        if not self._ready:
            what = answer.failure if not open_still else f"importing it took longer than {START_SECONDS:g} s"
            raise MegaliteError(f"the reward {self._reward} can't be computed: {what}")
        self.sample = None
        return answer

    def _send(self) -> None:
        with suppress(BlockingIOError):
            try:
                while self.unsent:
                    self.unsent = self.unsent[self.line.send(self.unsent) :]
            except (BrokenPipeError, ConnectionResetError):  # it has ended, which shows when it is heard
                self.unsent = b""

    def _hear(self) -> bool:
        """Take in what it has said; False once it can say no more."""
        try:
            while piece := self.line.recv(_PIECE):
                self._heard += piece
        except BlockingIOError:
            return True
        except ConnectionResetError:  # it ended before it had read all
            pass
        return False

    def _line(self) -> bytes:
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _greet(self, line: bytes) -> None:
        """Its first words: that it is ready, or why it can't be."""
        message = json.loads(line)
        if "error" in message:
            raise MegaliteError(message["error"])
        self._ready = True
        self.deadline = time.monotonic() + self._time_limit

    def _last_words(self) -> str:
        try:
            return f"its process died ({how_it_ended(self._process.wait(_FAREWELL))})"
        except subprocess.TimeoutExpired:
            return "closed the pipe of its process"

    def dismiss(self) -> None:
        """Ask it to leave: it does when it has nothing to do."""
        with suppress(OSError):  # it may have ended
            self.line.shutdown(socket.SHUT_WR)

    def end(self, patience: float = 0.0) -> None:
        """Kill what is left of it after `patience` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        _end(self._process)
        self.line.close()


def _read_answer(line: bytes) -> _Answer:
    try:
        message = json.loads(line)
    except ValueError:
        return _Answer(failure="wrote into the pipe of its process", spent=True)
    return _Answer(reward=message.get("reward"), failure=message.get("failure"), spent=message["children"])


def _start(reward: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A worker process, in a session of its own so that it can be killed as a group, and our end of the line to it.

    A socket, not pipes: those can be opened by every process of the user through /proc.
    """
    command = [sys.executable, "-P", "-m", "megalite.rewards.worker", reward]
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True)
    ours.setblocking(False)
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all that it started, and collect it."""
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
