"""`bench serve --parts`: what the two sides of the server's socket cost, each alone, without a model.

The HTTP process is the real one, with a replica that speaks the protocol and computes nothing, and a client in a third
process. Processor time is told apart by two lengths of answers: what grows with them is a token's, the rest a
request's.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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

    for kind in ("offline", "whole", "streamed"):
        tell(measure_control(args, kind))
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
        self._count = len(plan.sampled)
        self._step = plan.step

    def wait(self) -> SampledRows:
        ids = [LOWEST_ID + (self._step * 131 + place * 17) % (HIGHEST_ID - LOWEST_ID) for place in range(self._count)]
        return SampledRows(ids, [-0.5] * self._count, [None] * self._count)


class _NoRunner:
    """Stands for a `Runner` whose device takes no time."""

    def __init__(self) -> None:
        self.sampler = SimpleNamespace(matchers=Matchers(None, HIGHEST_ID))

    def execute(self, plan: StepPlan, on_prompt: object) -> _NoResults | None:
        return _NoResults(plan) if plan.rows else None

    def close(self) -> None:
        pass


def control_rank(args: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[Engine, Worker, socket.socket]:
    """An engine without a device, its worker, and the other end of the worker's connection."""
    longest = args.prompt + args.new
    blocks = (args.requests + 8) * (longest // 16 + 2)
    scheduler = Scheduler(
        num_blocks=blocks,
        block_size=16,
        max_num_seqs=args.requests,
        max_num_batched_tokens=8192,
        max_model_len=longest,
        contiguous=False,
    )
    state = ParallelState(Layout(tp=1, pp=1, dp=1))
    engine = Engine(state, _NoRunner(), scheduler, OutputProcessor(tokenizer), Meter(), overlap=True)  # type: ignore[arg-type]
    near, far = socket.socketpair()
    return engine, Worker(engine, Link(near, patience=60.0)), far


def measure_control(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Microseconds of a control rank's thread a request and a token; `kind`: offline, whole, streamed."""
    tokenizer = ModelFolder.open(
        Path(
            make_task(
                args,
                Path("."),
            ).folder
        )
    ).tokenizer
    params = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True)
    costs: list[tuple[float, float]] = []
    for turn in range(1 + args.rounds):
        engine, worker, far = control_rank(args, tokenizer)
        read = threading.Thread(target=_read_all, args=(far,))
        read.start()
        spent = {}
        for new in (SHORT, args.new):
            prompts = Load(args.requests, args.prompt, new, random.Random(turn * 7 + new)).prompts()
            requests = [
                Request(
                    id=f"cmpl-{new}-{place:032}",
                    prompt_token_ids=tuple(one),
                    params=params,
                    seed=0,
                    max_tokens=new,
                    stream=kind == "streamed",
                )
                for place, one in enumerate(prompts)
            ]
            if kind == "offline":
                news = partial(_once, [News(requests=tuple(requests))])
            else:
                threading.Thread(target=far.sendall, args=(frame([Submit(one) for one in requests]),)).start()
                news = worker.news
            before, left = time.thread_time(), len(requests)
            while left:
                if kind != "offline":
                    worker.wait()
                events = engine.step(news)
                left -= len(events.outputs)
                if kind != "offline":
                    worker.tell(events)
            spent[new] = (time.thread_time() - before) / args.requests
        while worker.link._unsent:
            worker.link.wait(1.0)
            worker.link.send()
        worker.link.close()
        read.join()
        far.close()
        costs.append((spent[SHORT], spent[args.new]))
    short, long = (min(one) for one in zip(*costs[1:], strict=True))
    per_token = (long - short) / (args.new - SHORT)
    return {
        "what": f"control rank, {kind}",
        "request_us": 1e6 * (short - SHORT * per_token),
        "token_us": 1e6 * per_token,
    }


def _once(given: list[News], room: int) -> News:
    return given.pop() if given else News()


def _read_all(far: socket.socket) -> None:
    with suppress(OSError):
        while far.recv(1 << 20):
            pass
