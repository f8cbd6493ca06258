"""What the command-line tools share: arguments, messages, exit codes and the progress bar. Imports no torch."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

from megalite import terminal
from megalite.convert.convert import JOBS
from megalite.convert.output import ByteProgress, Written
from megalite.errors import EXIT_CRASH, CheckpointError, ConfigError, MegaliteError, Problem, resource_error
from megalite.model.hf_config import DTYPES as CONFIG_DTYPES
from megalite.monitor.words import format_bytes, format_count, format_duration
from megalite.preflight import import_family


class Parser(argparse.ArgumentParser):
    """Arguments whose mistakes are ConfigErrors. Every tool has --debug and --family-module."""

    def __init__(self, description: str, epilog: str = ""):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)
        self._writes = False
        text = "module that registers a model family of your own"
        self.add_argument("--family-module", metavar="MODULE", help=text)
        self.add_argument("--debug", action="store_true", help="show tracebacks for errors of all kinds")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(key="", rule=message, fix="--help lists all options."))

    def stop(self, signum: int, frame: object) -> NoReturn:
        """End at once on a signal. What is written can be killed at any moment, so there is nothing to wait for."""
        kept = "; the same command keeps the files that are finished" if self._writes else ""
        os.write(2, f"stopped by {signal.Signals(signum).name}{kept}\n".encode())
        os._exit(128 + signum)

    def add_writing(self, what: str) -> None:
        """The options of every tool that writes a folder."""
        self._writes = True
        self.add_argument("--out", required=True, metavar="DIR", help=what)
        self.add_argument("--dtype", choices=CONFIG_DTYPES, help="convert the weights; default: keep every bit")
        self.add_argument("--overwrite", action="store_true", help="DIR may hold something else, which is replaced")
        self.add_jobs()

    def add_shard_size(self) -> None:
        text = "largest size of one weight file, e.g. 500MB or 2GiB (default: %(default)s)"
        self.add_argument("--max-shard-size", type=size, default="5GB", metavar="SIZE", help=text)

    def add_jobs(self) -> None:
        text = "tensors at work at once; each takes a few MiB of memory (default: %(default)s)"
        self.add_argument("--jobs", type=positive, default=JOBS, metavar="N", help=text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1024, got {text!r}")
    return int(text)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(text: str) -> int:
    """Bytes, written as `5GB`, `500MB` or `2GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) * _UNITS[match[2] or ""] < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


class Bar(ByteProgress):
    """Bytes done, rate and time left on one line of a terminal; nothing where standard error is not one."""

    def __init__(self, title: str):
        self._bar = tqdm(
            total=0,
            desc=title,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None,
            mininterval=0.2,
            bar_format="{desc} |{bar}| {n_fmt}iB of {total_fmt}iB, {rate_noinv_fmt}, {remaining} left",
        )
        self.began = time.monotonic()

    def begin(self, total: int) -> None:
        """More to come."""
        self._bar.total += total
        self._bar.refresh()

    def advance(self, count: int) -> None:
        self._bar.update(count)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextmanager
def writing(title: str, args: argparse.Namespace) -> Iterator[tuple[Bar, dict[str, Any]]]:
    """A progress bar, and the options of `Parser.add_writing` with it as the keywords of what writes the folder."""
    with Bar(title) as bar:
        options = {name: getattr(args, name) for name in ("dtype", "jobs", "overwrite")}
        yield bar, {**options, "progress": bar}


def say_time_left(seconds: float, rounds: int, what: str = "") -> None:
    """How long `rounds` more like one that took `seconds` will take, on standard error; nothing where none is left."""
    if rounds > 0:
        print(f"{what and f'{what}: '}about {format_duration(seconds * rounds)} left", file=sys.stderr, flush=True)


def report(written: Written, seconds: float, last: str) -> None:
    """What was written, in one line, and what the user should know."""
    for note in written.notes:
        print(f"note: {note}")
    if written.was_done:
        print(f"{written.folder}: already whole, nothing to do")
        return
    reused = f", {format_bytes(written.reused)} of an interrupted run kept" if written.reused else ""
    rate = format_bytes(int(written.nbytes / max(seconds, 1e-3)))
    print(
        f"{written.folder}: {format_count(written.files, 'weight file')}, "
        f"{format_bytes(written.nbytes)} written in {seconds:.1f} s ({rate}/s){reused}; {last}"
    )


def tool(name: str) -> int:
    """Run the tool `megalite.tools.NAME` with the arguments of the command line; gives its exit code.

    Its module's text is its `--help`, up to the examples, which come last; `add_arguments(parser)` says what it takes
    and `run(args)` does its work.
    """
    module = importlib.import_module(f"{__package__}.{name}")
    about, _, examples = (module.__doc__ or "").strip().partition("\n\nexample:")
    parser = Parser(about, examples and f"example:{examples}")
    module.add_arguments(parser)
    return main(parser, module.run)


def main(parser: Parser, run: Callable[[argparse.Namespace], int]) -> int:
    """The whole of a tool; gives its exit code."""
    terminal.guard()
    debug = "--debug" in sys.argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, parser.stop)
    try:
        return _run(parser, run)
    except Exception as error:
        told = _told(error)
        if debug or told is None:
            traceback.print_exc()
        if told is None:
            return EXIT_CRASH
        sys.stderr.write("".join(f"{line}\n" for line in told.lines()))
        return told.exit_code


def _told(error: Exception) -> MegaliteError | None:
    """What the user is told of an error; None: it is a crash."""
    if isinstance(error, MegaliteError):
        return error
    found = resource_error(error)
    if found is None and isinstance(error, OSError) and error.filename is not None:
        return CheckpointError(f"{error.filename}: {error.strerror}.")
    return found


def _run(parser: Parser, run: Callable[[argparse.Namespace], int]) -> int:
    """The work; whether what it prints arrives counts where nothing else comes of it."""
    try:
        args = parser.parse_args()
    except SystemExit as end:  # after --help
        terminal.require_stdout()
        return int(end.code or 0)
    if args.family_module:
        sys.path.insert(0, os.getcwd())
        import_family(args.family_module, "--family-module")
    code = run(args)
    if hasattr(args, "out"):
        terminal.warn_of_loss()
    elif code == 0:
        terminal.require_stdout()
    return code
