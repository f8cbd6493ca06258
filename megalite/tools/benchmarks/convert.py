"""Checkpoint tools: convert, reshard, export and verify beside `cp`, and beside transformers' load and save.

Every command is a process of its own, timed from start to end, with its peak resident memory; all work in the same
folders on the same disk, and all results are synced to the disk, as our tools do it of themselves. Copies of the model
by `cp` are made before, between and after them, and the rate of each command is set against the copies just before and
just after it: disks of virtual machines change their speed from minute to minute. Before every command all files are
taken out of the page cache, so that all begin equally cold (--warm leaves them in it). Medians of some rounds are
printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megalite.monitor.words import format_bytes
from megalite.tools.benchmarks.frame import head, row, write_figures
from megalite.tools.benchmarks.shapes import SHAPES, save_weights
from megalite.tools.toolkit import say_time_left
from megalite.weights.tensor_file import read_header

TELL_PEAK = """
import atexit, re, sys
target = sys.argv.pop(1)
def tell():
    with open(target, "w") as file:
        file.write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
atexit.register(tell)
"""
"""Goes before a program, which then writes its peak resident memory to the file that its first argument names."""

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""


@dataclass
class Sample:
    """One run of a command."""

    name: str
    seconds: float
    nbytes: int
    """Written; for verify, read."""
    peak: int | None = None
    """Bytes of memory."""

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


@dataclass
class Figure:
    """One command's medians over the rounds."""

    name: str
    seconds: float
    rate: float
    """Bytes a second."""
    ratio: float
    """Rate over that of the copies around it."""
    peak: int | None
    """Bytes of memory, the largest."""


COPY = "cp, synced"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder in Hugging Face layout; default: random weights of --size")
    parser.add_argument("--size", type=float, default=8.2, help="GB of random weights (default: %(default)s)")
    parser.add_argument("--folder", help="where to work, with four times the model's size free (default: a new one)")
    parser.add_argument("--layout", default="tp=4,pp=2", help="what to convert to (default: %(default)s)")
    parser.add_argument("--reshard", default="tp=2,pp=3", help="what to reshard to (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times each command runs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="for our tools (default: theirs)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--skip-transformers", action="store_true", help="leave the usual way out")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    parent = Path(tempfile.mkdtemp(prefix="megalite-bench-", dir=args.folder))
    try:
        bench = Bench(args, parent)
        figures = bench.run()
        size, largest = total_size(bench.model), largest_tensor(bench.model)
    finally:
        shutil.rmtree(parent)
    print(f"{format_bytes(size)} of weights, largest tensor {format_bytes(largest)}, medians of {args.rounds} rounds\n")
    print(head("command", "seconds", "a second", "rate / cp's", "peak memory"))
    for one in figures:
        peak = format_bytes(one.peak) if one.peak else ""
        print(row(one.name, f"{one.seconds:.1f}", format_bytes(int(one.rate)), f"{one.ratio:.2f}", peak))
    write_figures([asdict(figure) for figure in figures], args.json)
    return 0


class Bench:
    """The commands and their folders."""

    def __init__(self, args: argparse.Namespace, parent: Path):
        self.args = args
        self.parent = parent
        self.model = Path(args.model) if args.model else generate(parent / "model", args.size)
        self.samples: list[Sample] = []
        """In the order they were taken."""

    def run(self) -> list[Figure]:
        for number in range(self.args.rounds):
            began = time.monotonic()
            self._round()
            say_time_left(time.monotonic() - began, self.args.rounds - number - 1)
        names = dict.fromkeys(sample.name for sample in self.samples)
        return [self._figure(name) for name in names]

    def _figure(self, name: str) -> Figure:
        mine = [index for index, sample in enumerate(self.samples) if sample.name == name]
        samples = [self.samples[index] for index in mine]
        return Figure(
            name,
            statistics.median(sample.seconds for sample in samples),
            statistics.median(sample.rate for sample in samples),
            statistics.median(self.samples[index].rate / self._copying(index) for index in mine),
            max((sample.peak for sample in samples if sample.peak is not None), default=None),
        )

    def _copying(self, index: int) -> float:
        """Bytes a second of the copies nearest to a sample, before and after it; of a copy, its own."""
        rates = {at: sample.rate for at, sample in enumerate(self.samples) if sample.name == COPY}
        before = max(at for at in rates if at <= index)
        after = min(at for at in rates if at >= index)
        return statistics.harmonic_mean([rates[before], rates[after]])

    def _round(self) -> None:
        parent, model = self.parent, self.model
        cut, other, back = (parent / name for name in ("cut", "other", "back"))
        self._copy()
        self._tool("convert", cut, "--model", model, "--layout", self.args.layout, "--out", cut)
        self._copy()
        self._tool("verify", cut, cut)
        self._copy()
        self._tool("reshard", other, "--from", cut, "--layout", self.args.reshard, "--out", other)
        shutil.rmtree(cut)
        self._copy()
        self._tool("export", back, "--from", other, "--out", back)
        shutil.rmtree(other)
        self._copy()
        self._tool("verify --against", back, back, "--against", model)
        shutil.rmtree(back)
        if not self.args.skip_transformers:
            self._program("transformers load + save", back, TRANSFORMERS, [model, back], lambda: sync(back))
            shutil.rmtree(back)
        self._copy()

    def _copy(self) -> None:
        copy = self.parent / "copy"

        def work() -> None:
            subprocess.run(["cp", "-r", str(self.model), str(copy)], check=True)
            sync(copy)

        self._time(COPY, work, copy)
        shutil.rmtree(copy)

    def _tool(self, name: str, out: Path, *arguments: str | Path) -> None:
        jobs = ["--jobs", str(self.args.jobs)] if self.args.jobs else []
        program = f"from megalite.tools.toolkit import tool; sys.exit(tool({name.split()[0]!r}))"
        self._program(name, out, program, [*arguments, *jobs])

    def _program(
        self,
        name: str,
        out: Path,
        program: str,
        arguments: Sequence[str | Path],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        told = self.parent / "peak"
        whole = [sys.executable, "-c", TELL_PEAK + program, str(told), *map(str, arguments)]

        def work() -> None:
            quiet = {**os.environ, "TQDM_DISABLE": "1"}
            subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, env=quiet)
            after()

        self._time(name, work, out, told)

    def _time(self, name: str, work: Callable[[], object], out: Path, told: Path | None = None) -> None:
        if not self.args.warm:
            for folder in (self.model, *self.parent.iterdir()):
                if folder.is_dir():
                    evict(folder)
        began = time.monotonic()
        work()
        seconds = time.monotonic() - began
        peak = int(told.read_text()) * 1024 if told else None
        sample = Sample(name, seconds, total_size(out), peak)
        self.samples.append(sample)
        print(f"{name}: {seconds:.1f} s, {format_bytes(int(sample.rate))}/s", file=sys.stderr, flush=True)


def total_size(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a model folder."""
    return max(info.nbytes for path in folder.glob("*.safetensors") for info in read_header(path).values())


def sync(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def evict(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def generate(folder: Path, gigabytes: float) -> Path:
    """A Llama of about that size with random bfloat16 weights; hidden 4096, as an 8B model has."""
    hidden, vocab = 4096, 32000
    layer = 2 * hidden * (2 * hidden + 2 * 1024 + 3 * SHAPES["llama-8B"]["intermediate_size"])
    layers = max(3, round((gigabytes * 1e9 - 4 * vocab * hidden) / layer))
    save_weights({**SHAPES["llama-8B"], "num_hidden_layers": layers, "vocab_size": vocab}, folder)
    return folder
