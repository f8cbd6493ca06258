"""`bench serve --parts`: what the two sides of the server's socket cost, each alone, without a model.

The HTTP process is the real one, with a replica that speaks the protocol and computes nothing, and a client in a third
process. The control rank is a real engine and worker over a device that takes no time; offline is the engine alone.
Processor time is told apart by two lengths of answers: what grows with them is a token's, the rest a request's. Least
of --rounds, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megalite.config.schema import SamplingParams
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.inference.channel import News
from megalite.inference.choice import SampledRows
from megalite.inference.engine import Engine
from megalite.inference.matchers import Matchers
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.request import Request, StepPlan
from megalite.inference.scheduler import Scheduler
from megalite.monitor.collector import Meter
from megalite.serve.frames import frame
from megalite.serve.link import Link
from megalite.serve.messages import Submit
from megalite.serve.worker import Worker
from megalite.text.tokenizer import Tokenizer
from megalite.tools.benchmarks.frame import head, row, write_figures
from megalite.tools.benchmarks.http_load import Server
from megalite.tools.benchmarks.serve import (
    HIGHEST_ID,
    LOWEST_ID,
    START_WITHIN,
    Load,
    cpu_seconds,
    is_ready,
    make_task,
    serve_command,
    started,
)
from megalite.weights.folder import ModelFolder

SHORT = 4
"""Tokens of the shorter answers."""


def run(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    print(head("", "us a request", "us a token", "tokens an event", "us an event"), flush=True)

    def tell(found: dict[str, Any]) -> None:
        rows.append(found)
        cells = [
            f"{found[key]:.2f}" if key in found else ""
            for key in ("request_us", "token_us", "tokens_per_event", "event_us")
        ]
        print(row(found["what"], *cells), flush=True)
        write_figures(rows, args.json)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ModelFolder.open(Path(make_task(args, Path(folder)).folder)).tokenizer
    for kind in ("offline", "whole", "streamed"):
        tell(measure_control(args, kind, tokenizer))
    with http_process(args) as (server, pid):
        for stream in (False, True):
            tell(measure_http(args, server, pid, stream=stream))
    return 0


@contextmanager
def http_process(args: argparse.Namespace) -> Iterator[tuple[Server, int]]:
    """A server's HTTP process over a replica that computes nothing: where it listens, and its id."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megalite-bench-")))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(folder / "replicas"))
        unix.listen()
        command = [*serve_command(make_task(args, folder), folder), "--external", str(unix.fileno())]
        process = stack.enter_context(started(command, folder / "http.log", pass_fds=(unix.fileno(),)))
        fake = [sys.executable, "-m", "megalite.tools.benchmarks.fake_replica", str(folder / "replicas")]
        replica = stack.enter_context(started([*fake, str(args.step_ms)], folder / "replica.log"))
        until, url = time.monotonic() + START_WITHIN, ""
        while not is_ready(url):
            for one in (process, replica):
                one.check(until, "it is not ready")
            url = url or next(iter(re.findall(r"listening at (http://\S+)", process.said())), "")
            time.sleep(0.05)
        yield Server(url), process.pid


def measure_http(args: argparse.Namespace, server: Server, pid: int, *, stream: bool) -> dict[str, Any]:
    """Microseconds of the HTTP process a request and a token."""
    costs: dict[int, list[tuple[float, int]]] = {SHORT: [], args.new: []}
    for _ in range(1 + args.rounds):
        for new, found in costs.items():
            load = Load(args.requests, args.prompt, new)
            requests = [server.completion(one, new, stream=stream) for one in load.prompts()]
            before = cpu_seconds(pid)
            answers = server.ask(requests, load.arrivals(0.0))
            found.append((cpu_seconds(pid) - before, sum(len(one.times) for one in answers)))
    (short, few), (long, many) = (min(found[1:]) for found in costs.values())
    per_token = (long - short) / args.requests / (args.new - SHORT)
    figures = {
        "what": f"HTTP process, {'streamed' if stream else 'whole'}",
        "request_us": 1e6 * (short / args.requests - per_token * SHORT),
        "token_us": 1e6 * per_token,
    }
    if stream:
        figures["tokens_per_event"] = args.requests * (args.new - SHORT) / (many - few)
        figures["event_us"] = 1e6 * (long - short) / (many - few)
    return figures


# ---- the control rank


class _NoResults:
    """Results of a step that computes nothing: tokens by a rule."""

    def __init__(self, plan: StepPlan):
        self._count, self._step = len(plan.sampled), plan.step

    def wait(self) -> SampledRows:
        ids = [LOWEST_ID + (self._step * 131 + place * 17) % (HIGHEST_ID - LOWEST_ID) for place in range(self._count)]
        return SampledRows(ids, [-0.5] * self._count, [None] * self._count)


class _NoRunner:
    """Stands for a `Runner` whose device takes no time."""

    def __init__(self) -> None:
        self.sampler = SimpleNamespace(matchers=Matchers(None, HIGHEST_ID))

    def execute(self, plan: StepPlan, on_prompt: object) -> _NoResults | None:
        return _NoResults(plan) if plan.rows else None


class _ControlRank:
    """An engine without a device, its worker, and a thread that reads what the worker sends."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer | None):
        longest = args.prompt + args.new
        scheduler = Scheduler(
            num_blocks=(args.requests + 8) * (longest // 16 + 2),
            block_size=16,
            max_num_seqs=args.requests,
            max_num_batched_tokens=8192,
            max_model_len=longest,
            contiguous=False,
        )
        state, runner = ParallelState(Layout(tp=1, pp=1, dp=1)), _NoRunner()
        self._engine = Engine(state, runner, scheduler, OutputProcessor(tokenizer), Meter(), overlap=True)  # type: ignore[arg-type]
        near, self._far = socket.socketpair()
        self._worker = Worker(self._engine, Link(near, patience=60.0))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with self._far:
            while self._far.recv(1 << 20):
                pass

    def close(self) -> None:
        self._worker.link.close()
        self._reader.join()

    def seconds(self, requests: Sequence[Request], *, serve: bool) -> float:
        """Processor seconds of this thread for these requests, from their arrival to their results; not `serve`: as a
        batch job has them, without worker and socket."""
        given = [News(requests=tuple(requests))]
        if serve:
            threading.Thread(target=self._far.sendall, args=(frame([Submit(one) for one in requests]),)).start()
        before, left = time.thread_time(), len(requests)
        while left:
            if serve:
                self._worker.wait()
                events = self._engine.step(self._worker.news)
                self._worker.tell(events)
            else:
                events = self._engine.step(lambda room: given.pop() if given else News())
            left -= len(events.outputs)
        return time.thread_time() - before


def measure_control(args: argparse.Namespace, kind: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Microseconds of a control rank's thread a request and a token; `kind`: offline, whole, streamed."""
    costs: dict[int, list[float]] = {SHORT: [], args.new: []}
    with closing(_ControlRank(args, tokenizer)) as rank:
        for turn in range(1 + args.rounds):
            for new, found in costs.items():
                prompts = Load(args.requests, args.prompt, new, random.Random(1000 * turn + new)).prompts()
                name = f"cmpl-{turn:032}-{new}"
                requests = [_request(f"{name}-{place}", one, new, kind) for place, one in enumerate(prompts)]
                found.append(rank.seconds(requests, serve=kind != "offline") / args.requests)
    short, long = (min(found[1:]) for found in costs.values())
    per_token = (long - short) / (args.new - SHORT)
    request_us = 1e6 * (short - SHORT * per_token)
    return {"what": f"control rank, {kind}", "request_us": request_us, "token_us": 1e6 * per_token}


def _request(name: str, prompt: list[int], new: int, kind: str) -> Request:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    ids, stream = tuple(prompt), kind == "streamed"
    return Request(id=name, prompt_token_ids=ids, params=params, seed=0, max_tokens=new, stream=stream)
