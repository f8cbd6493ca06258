"""Serving: throughput through HTTP beside the offline engine's, and how long clients wait for tokens.

Starts a server and, beside it, ranks of the same layout that generate without one. They take turns at the same work:
all requests at once, token ids in, text out, greedy, end-of-sequence ignored, nothing in the prefix cache. Offline is
`LLM.generate`; through HTTP a client on the same machine asks for whole and for streamed answers. Then requests arrive
at random (Poisson) at shares of the rate that was reached, or at --rates. Ratios to offline are by the clock, and by
processor time of all processes but the client, which other work on the machine disturbs less; times between tokens are
those between events of a stream. With --url the server is one that runs already, of any make, with nothing beside it.
With --parts no model runs: see serve_parts.py.

example:
  python tools/bench.py serve
  python tools/bench.py serve --device cuda --shape qwen3-0.6B
  python tools/bench.py serve --url http://127.0.0.1:8000 --rates 1 4 16
  python tools/bench.py serve --parts
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

import megalite
from megalite.errors import ConfigError, MegaliteError, Problem
from megalite.files import write_json
from megalite.run.processes import descendants, die_with_parent
from megalite.tools.benchmarks.frame import head, row, write_figures
from megalite.tools.benchmarks.http_load import Answered, Server
from megalite.tools.benchmarks.offline_ranks import POLL, Task
from megalite.tools.toolkit import positive, say_time_left

START_WITHIN = 300.0
"""Seconds for a server, and for ranks, to be ready."""
ROUND_WITHIN = 600.0
END_WITHIN = 30.0
LOADS = (0.5, 0.8)
"""Shares of the requests a second that were reached, at which they then arrive."""
LOWEST_ID, HIGHEST_ID = 300, 4000
"""Prompts are drawn from these ids where nobody says otherwise: text, in the models that are measured here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder or hub id (default: checkpoints/demo)")
    which.add_argument("--shape", help="random weights of this shape, e.g. qwen3-0.6B")
    which.add_argument("--url", help="of a server that runs")
    parser.add_argument("--served-model", metavar="NAME", help="with --url: which of its models")
    parser.add_argument("--key", metavar="NAME", help="with --url: environment variable with the API key")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--tp", type=positive, default=1)
    parser.add_argument("--pp", type=positive, default=1)
    parser.add_argument("--dp", type=positive, default=1, help="replicas")
    parser.add_argument("--requests", type=positive, default=256, help="at once (default: %(default)s)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--new", type=positive, default=128, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="of each kind (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="*", help="requests a second, 0: all at once")
    parser.add_argument("--parts", action="store_true", help="only the processor time of both sides, without a model")
    parser.add_argument("--step-ms", type=float, default=25.0, help="with --parts: of a step (default: %(default)g)")
    parser.add_argument("--json", help="write the figures here")


@dataclass
class Load:
    """The work, drawn anew for each round."""

    requests: int
    prompt: int
    new: int
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def prompts(self) -> list[list[int]]:
        ids = range(LOWEST_ID, HIGHEST_ID)
        return [self.random.choices(ids, k=self.prompt) for _ in range(self.requests)]

    def arrivals(self, rate: float) -> list[float]:
        """Seconds after the beginning; `rate` a second, 0: all at once."""
        if rate <= 0:
            return [0.0] * self.requests
        return list(accumulate(self.random.expovariate(rate) for _ in range(self.requests)))


@dataclass
class Figures:
    """What came of one kind of round."""

    what: str
    rates: list[float] = field(default_factory=list)
    """Output tokens a second, of each round."""
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Seconds to first tokens and between tokens, of all rounds."""
    cpu: list[float] = field(default_factory=list)
    """Processor seconds an output token, of each round."""
    http: list[float] = field(default_factory=list)
    """Those of the HTTP process."""

    def add(self, answers: Sequence[Answered], cpu: tuple[float, float] | None = None) -> None:
        """`cpu`: processor seconds of the HTTP process and of the whole server."""
        tokens = sum(one.tokens for one in answers)
        self.rates.append(tokens / (max(one.ended for one in answers) - min(one.sent for one in answers)))
        if cpu is not None:
            self.http.append(cpu[0] / tokens)
            self.cpu.append(cpu[1] / tokens)
        self.firsts += [one.first for one in answers if one.times]
        self.gaps += [gap for one in answers for gap in one.gaps]

    def row(self, offline: Figures | None) -> dict[str, Any]:
        found: dict[str, Any] = {"what": self.what, "tokens_per_second": statistics.median(self.rates)}
        if offline is not None and offline.rates:
            pairs = zip(self.rates, offline.rates, strict=False)
            found["of_offline"] = statistics.median(mine / its for mine, its in pairs)
            cpu = zip(self.cpu, offline.cpu, strict=False)
            found["of_offline_cpu"] = statistics.median(its / mine for mine, its in cpu)
        for name, values in (("first_token", self.firsts), ("between_tokens", self.gaps)):
            if values:
                found |= {f"{name}_p{share}_ms": 1000 * percentile(values, share) for share in (50, 99)}
        if self.http:
            found["http_process_us"] = 1e6 * statistics.median(self.http)
        return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


COLUMNS = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "of_offline": ("of offline", "{:.3f}"),
    "of_offline_cpu": ("by processor time", "{:.3f}"),
    "first_token_p50_ms": ("first token, ms: p50", "{:.1f}"),
    "first_token_p99_ms": ("p99", "{:.1f}"),
    "between_tokens_p50_ms": ("between tokens, ms: p50", "{:.2f}"),
    "between_tokens_p99_ms": ("p99", "{:.2f}"),
    "http_process_us": ("HTTP process, us a token", "{:.0f}"),
}
HEADER = head("", *(name for name, _ in COLUMNS.values()))


def line(found: dict[str, Any]) -> str:
    cells = [form.format(found[key]) if key in found else "" for key, (_, form) in COLUMNS.items()]
    return row(found["what"], *cells)


def run(args: argparse.Namespace) -> int:
    if args.parts:
        from megalite.tools.benchmarks import serve_parts

        return serve_parts.run(args)
    load = Load(args.requests, args.prompt, args.new)
    rows: list[dict[str, Any]] = []

    def tell(found: dict[str, Any]) -> None:
        rows.append(found)
        print(line(found), flush=True)
        write_figures(rows, args.json)

    with ExitStack() as stack:
        if args.url:
            key = os.environ.get(args.key, "") if args.key else None
            bench = Bench(load, Server(args.url.rstrip("/"), args.served_model, key))
        else:
            bench = stack.enter_context(both(args, load))
        print(f"{args.requests} requests, {args.prompt} + {args.new} tokens\n\n{HEADER}", flush=True)
        reached = bench.at_once(args.rounds, tell)
        rates = args.rates if args.rates is not None else [share * reached for share in LOADS]
        for rate in rates:
            bench.arriving(rate, tell)
    return 0


class Bench:
    """The rounds, on a server and on what stands beside it."""

    def __init__(self, load: Load, server: Server, offline: Offline | None = None, pid: int = 0):
        """`pid`: of the server's HTTP process, the parent of all others of it; 0: unknown."""
        self.load, self.server, self.offline, self._pid = load, server, offline, pid
        small = Load(max(1, load.requests // 8), load.prompt, max(1, load.new // 8))
        for one in (small, load):
            self._ask(one, Figures("warm-up"))
        if offline is not None:
            offline.round(load.prompts(), Figures("warm-up"))

    def _ask(self, load: Load, figures: Figures, rate: float = 0.0, *, stream: bool = True) -> None:
        requests = [self.server.completion(one, load.new, stream=stream) for one in load.prompts()]
        delays = load.arrivals(rate)
        before = self._cpu()
        answers = self.server.ask(requests, delays)
        http, every = (after - earlier for after, earlier in zip(self._cpu(), before, strict=True))
        figures.add(answers, (http, every) if self._pid else None)

    def _cpu(self) -> tuple[float, float]:
        return (cpu_seconds(self._pid), tree_seconds(self._pid)) if self._pid else (0.0, 0.0)

    def at_once(self, rounds: int, tell: Callable[[dict[str, Any]], None]) -> float:
        """All requests at the same moment; the requests a second that were reached with streams."""
        offline, whole, streamed = Figures("offline"), Figures("HTTP"), Figures("HTTP, streamed")
        for number in range(rounds):
            began = time.monotonic()
            turns: list[Callable[[], None]] = [
                lambda: self._ask(self.load, whole, stream=False),
                lambda: self._ask(self.load, streamed),
            ]
            if (ranks := self.offline) is not None:
                turns.append(lambda ranks=ranks: ranks.round(self.load.prompts(), offline))  # type: ignore[misc]
            for place in range(len(turns)):
                turns[(place + number) % len(turns)]()
            say_time_left(time.monotonic() - began, rounds - number - 1)
        for figures in (offline, whole, streamed):
            if figures.rates:
                tell(figures.row(None if figures is offline else offline))
        return statistics.median(streamed.rates) / self.load.new

    def arriving(self, rate: float, tell: Callable[[dict[str, Any]], None]) -> None:
        what = f"{rate:.3g} requests/s" if rate > 0 else "all at once"
        figures = Figures(what)
        self._ask(self.load, figures, rate)
        tell(figures.row(None))


# ---- the server and the ranks


@contextmanager
def both(args: argparse.Namespace, load: Load) -> Iterator[Bench]:
    """A server and offline ranks of the same kind, ready."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megalite-bench-")))
        task = make_task(args, folder)
        offline = stack.enter_context(started([sys.executable, "-m", RANKS, task.to_json()], folder / "offline.log"))
        process = stack.enter_context(started(serve_command(task, folder), folder / "server.log"))
        stack.callback(lambda: (folder / "end").touch())
        url = ""
        until = time.monotonic() + START_WITHIN
        while not (folder / "ready").exists() or not is_ready(url):
            for one in (offline, process):
                one.check(until, "it is not ready")
            url = url or next(iter(re.findall(r"listening at (http://\S+)", process.said())), "")
            time.sleep(0.1)
        yield Bench(load, Server(url), Offline(folder, offline, args.new), process.pid)


RANKS = "megalite.tools.benchmarks.offline_ranks"


def make_task(args: argparse.Namespace, folder: Path) -> Task:
    model, load_format = args.model or str(Path(megalite.__file__).parent.parent / "checkpoints" / "demo"), "auto"
    if args.shape:
        from megalite.tools.benchmarks.shapes import SHAPES, save_config

        if args.shape not in SHAPES:
            known = ", ".join(SHAPES)
            raise ConfigError(Problem(key="--shape", rule=f"must be one of {known}", value=args.shape))
        model, load_format = save_config(args.shape, folder / "model"), "dummy"
    longest = args.prompt + args.new
    sequences = -(-args.requests // args.dp)
    engine = {
        "max_model_len": longest,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": 8192 if args.device == "cuda" else 2048,
        "num_kv_blocks": (sequences + 8) * (longest // 16 + 2),
    }
    layout = {"tp": args.tp, "pp": args.pp, "dp": args.dp}
    return Task(rounds=str(folder), folder=model, load_format=load_format, device=args.device, engine=engine, **layout)


def serve_command(task: Task, folder: Path) -> list[str]:
    """Starts the server of a task."""
    config = {
        "model": {
            "path": task.folder,
            "load_format": task.load_format,
            "dtype": task.dtype,
            "generation_config": "none",
        },
        "parallel": {"tp": task.tp, "pp": task.pp, "dp": task.dp},
        "engine": task.engine,
        "server": {"port": 0, "max_queued_requests": 4096, "model_names": ["bench"]},
        "distributed": {"device": task.device},
        "monitor": {"report": False},
    }
    write_json(folder / "serve.yaml", config)
    script = Path(megalite.__file__).parent.parent / "launch" / "serve.py"
    found = shutil.which("megalite", path=str(Path(sys.executable).parent))
    start = [str(script)] if script.exists() or found is None else [found, "serve"]
    return [sys.executable, *start, "--config", str(folder / "serve.yaml")]


class Started:
    """A process and what it says, which is shown if it fails."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self._process, self._log = process, log
        self.pid = process.pid

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def check(self, until: float, what: str) -> None:
        """MegaliteError: it has ended, or it is after `until`."""
        if self._process.poll() is not None or time.monotonic() > until:
            raise MegaliteError(f"{what}; it said:\n{self.said()[-4000:]}")


@contextmanager
def started(command: Sequence[str], log: Path, *, pass_fds: Sequence[int] = ()) -> Iterator[Started]:
    """Run a program; it is gone afterwards."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=die_with_parent,
            pass_fds=pass_fds,
        )
    try:
        yield Started(process, log)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_WITHIN)
        for one in descendants(process.pid):
            one.kill()
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    """A server there takes requests, and all its replicas are up."""
    if not url:
        return False
    status, body = Server(url).get("/stats")
    return status == 200 and all(one["state"] == "ready" for one in json.loads(body)["replicas"])


class Offline:
    """Lets the offline ranks do one round after another."""

    def __init__(self, folder: Path, process: Started, new: int):
        self._folder, self._process, self._new, self._number = folder, process, new, 0

    def round(self, prompts: list[list[int]], figures: Figures) -> None:
        done, until = self._folder / f"{self._number}.done", time.monotonic() + ROUND_WITHIN
        before = tree_seconds(self._process.pid)
        write_json(self._folder / f"{self._number}.go", {"prompts": prompts, "new": self._new})
        self._number += 1
        while not done.exists():
            self._process.check(until, "the offline ranks did not finish a round")
            time.sleep(POLL)
        found = json.loads(done.read_text())
        figures.rates.append(found["tokens"] / found["seconds"])
        figures.cpu.append((tree_seconds(self._process.pid) - before) / found["tokens"])


def cpu_seconds(pid: int) -> float:
    """That all threads of a process have taken so far; 0: it has ended."""
    with suppress(psutil.NoSuchProcess):
        taken = psutil.Process(pid).cpu_times()
        return float(taken.user + taken.system)
    return 0.0


def tree_seconds(pid: int) -> float:
    """That a process and all below it have taken so far."""
    return cpu_seconds(pid) + sum(cpu_seconds(one.pid) for one in descendants(pid))
