"""Chat with a model in the terminal, streamed: with that of a config, which is served for the time of the chat, or with
one of a server that speaks OpenAI's API. /help lists what can be typed besides.

example:
  megalite chat --config configs/infer/demo.yaml parallel.tp=2
  megalite chat --url http://127.0.0.1:8000 --max-tokens 500
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megalite.config.load import COMMAND_LINE, Loaded, loaded_from, resolve
from megalite.config.schema import ServeConfig
from megalite.errors import EXIT_SIGINT, ConfigError, MegaliteError, Problem
from megalite.files import read_whole
from megalite.preflight import check
from megalite.run.processes import die_with_parent
from megalite.run.start import nameless_file
from megalite.serve.console import Console, Remote, ServerError
from megalite.tools.toolkit import Parser

KEY = "MEGALITE_CHAT_KEY"
"""Environment variable with the key of the server that a chat starts."""
POLL = 0.25
"""Seconds between looks at a server that is starting."""
END_WITHIN = 20.0
"""Seconds for the server to end."""
_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


def add_arguments(parser: Parser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", metavar="FILE", help="of infer or serve; input and output are not used")
    where.add_argument("--url", help="of a server, e.g. http://127.0.0.1:8000")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --config: other values")
    parser.add_argument("--model", metavar="NAME", help="with --url: which of its models; default: the first")
    parser.add_argument("--api-key", metavar="WHERE", help="with --url: env:NAME or file:PATH")
    parser.add_argument("--system", metavar="TEXT", default="", help="the system message")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--seed", type=int, metavar="N")


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer, not the program
    with suppress(ImportError):
        import readline  # noqa: F401 (input() edits lines with it)
    params = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    try:
        failed = _chat(args, params)
    except KeyboardInterrupt:  # before the first question could be asked
        return EXIT_SIGINT
    return ServerError.exit_code if failed and not sys.stdin.isatty() else 0  # nobody has seen it fail


def _chat(args: argparse.Namespace, params: dict[str, Any]) -> bool:
    """Whether a question had no answer, or half of one."""
    with ExitStack() as stack:
        if args.url is not None:
            if args.overrides:
                rule = "goes with --config; --url has --temperature ..."
                raise ConfigError(Problem(key=args.overrides[0], rule=rule))
            remote = Remote(args.url, model=args.model, key=read_key(args.api_key), params=params)
        else:
            for name, value in (("--model", args.model), ("--api-key", args.api_key)):
                if value is not None:
                    fix = "Write model.path=FOLDER for another model." if name == "--model" else ""
                    raise ConfigError(Problem(key=name, rule="goes with --url", value=value, fix=fix))
            loaded = serve_config(args.config, args.overrides)
            remote = stack.enter_context(served(loaded, serve_command(sys.orig_argv), params))
        console = Console(remote, system=args.system)
        console.run()
        return console.failed


def read_key(place: str | None) -> str | None:
    """The API key at `env:NAME` or `file:PATH`. ConfigError: there is none; the message does not hold it."""
    if place is None:
        return None
    kind, _, name = place.partition(":")
    if kind not in ("env", "file") or not name:
        raise ConfigError(Problem(key="--api-key", rule="must say where the key is, as env:NAME or file:PATH"))
    try:
        key = os.environ.get(name, "") if kind == "env" else read_whole(name, 1 << 16).decode()
    except (OSError, ValueError) as error:
        rule = f"the file can't be read: {getattr(error, 'strerror', None) or 'it is no text'}"
        raise ConfigError(Problem(key="--api-key", rule=rule, value=place)) from None
    if not key.strip():
        raise ConfigError(Problem(key="--api-key", rule="no key is there", value=place))
    return key.strip()


def serve_config(path: str, overrides: Sequence[str]) -> Loaded[ServeConfig]:
    """The config of a server for this terminal alone, from that of a server or of an inference job.

    ConfigError with everything that is wrong with it.
    """
    is_servers = False
    with suppress(OSError, ValueError):  # which `resolve` tells
        is_servers = re.search(rb"(?m)^[\"']?server[\"']?\s*:", read_whole(path, 1 << 20)) is not None
    loaded, problems = resolve("serve" if is_servers else "infer", path, overrides)
    sections = {one.name: getattr(loaded.config, one.name, None) for one in fields(ServeConfig)}
    config = ServeConfig(**{name: section for name, section in sections.items() if section is not None})
    own: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "api_key": f"env:{KEY}"}
    config = replace(config, server=replace(config.server, **own))
    origins = {key: origin for key, origin in loaded.origins.items() if key.partition(".")[0] in sections}
    origins |= {f"server.{key}": COMMAND_LINE for key in own}
    made = loaded_from(config, origins)
    check(made, problems, [], read_headers=True)
    return made


def serve_command(started: Sequence[str]) -> list[str]:
    """What starts a server, given how this process was started: its own script's neighbour, or `megalite serve`."""
    words = iter(started[1:])
    script = Path(next((word for word in words if word.endswith(("chat.py", "megalite"))), "megalite"))
    if script.name == "chat.py":
        return [sys.executable, "-u", str(script.with_name("serve.py").absolute())]
    return [sys.executable, "-u", str(script.absolute()), "serve"]


@contextmanager
def served(loaded: Loaded[ServeConfig], command: Sequence[str], params: dict[str, Any]) -> Iterator[Remote]:
    """Start a server, wait until it is ready, and end it afterwards. MegaliteError: it ended by itself."""
    key = secrets.token_urlsafe(32)
    with ExitStack() as stack:
        file = nameless_file(loaded.given, stack)
        process = subprocess.Popen(
            [*command, "--config", file],
            env={**os.environ, KEY: key},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[int(os.path.basename(file))],
            start_new_session=True,  # Ctrl-C is this process's affair
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            text=True,
        )
        stack.callback(_end, process)
        told = _Told(process)
        remote: Remote | None = None
        while remote is None or not remote.is_ready():
            if process.poll() is not None:
                raise _Ended(process.returncode)
            if remote is None and told.url:
                remote = Remote(told.url, key=key, params=params)
            time.sleep(POLL)
        told.quiet = True
        yield remote


class _Ended(MegaliteError):
    """The server has ended before it was ready; it has said why."""

    def __init__(self, code: int):
        super().__init__(f"the server ended with exit code {code}")
        self.exit_code = code if code > 0 else 128 - code


class _Told:
    """Passes on what the server says on standard error."""

    def __init__(self, process: subprocess.Popen[str]):
        self.url = ""
        """Where it listens, once it has said so."""
        self.quiet = False
        """Pass on warnings, errors and what happens to replicas only; its log of requests is never passed on."""
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            match = re.search(r"listening at (https?://\S+)", line)
            if match:
                self.url = match[1]
            elif not re.match(r"\d{4}-\d\d-\d\d ", line) and (
                not self.quiet or re.match("error|warning|replica", line)
            ):
                sys.stderr.write(line)
                sys.stderr.flush()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(END_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
