"""A model's chat template: jinja2 in a sandbox, in a process of its own that is stopped when it takes too long.

A template comes with the model, so it is as trusted as a web page. The sandbox keeps it from Python's internals, but a
template may still nest loops for a year or build a text larger than memory. So it runs in a small child process with
limits on processor time, memory and output, whatever the operation it is busy with. The child starts at the first chat,
needs neither torch nor tokenizers, and ends when this process closes its pipe or dies.

The child is this file, run as a script: everything below imports only the standard library, and jinja2 in the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 1 << 24
CPU_SECONDS = 5.0
"""For one chat: processor time, so that a busy machine fails no honest template."""
MAX_MEMORY = 1 << 30
"""Address space of the child, bytes."""
MAX_TIMEOUTS = 3
"""A template that ran out of time this often is not tried again."""


class TemplateError(ValueError):
    """The chat template can't make a prompt of these messages; the message says why."""


class ChatTemplate:
    """One template with the names it always sees, such as `bos_token`. Not for several threads at once."""

    def __init__(self, source: str, names: Mapping[str, str] | None = None, *, cpu_seconds: float = CPU_SECONDS):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        self.source = source
        self.names = dict(names or {})
        self.cpu_seconds = cpu_seconds
        self._timeouts = 0
        self._child: _Child | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt's text. `variables` and messages are JSON-like; TemplateError if the template refuses or fails."""
        if self._timeouts >= MAX_TIMEOUTS:
            raise TemplateError(f"the chat template ran out of time {self._timeouts} times and is not tried again")
        seen = {**self.names, "tools": None, "documents": None, **variables, "messages": _normalized(messages)}
        try:
            request = json.dumps({"source": self.source, "variables": seen, "cpu_seconds": self.cpu_seconds})
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"messages must be made of texts, numbers, lists and mappings: {error}") from None
        if self._child is None or not self._child.usable:
            self._child = _Child()
        answer = self._child.ask(request.encode())
        if answer is None:
            self._timeouts += 1
            raise TemplateError(f"the chat template took more than {self.cpu_seconds:g} s or {MAX_MEMORY >> 20} MiB")
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the child, if there is one; the next chat starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None


def _normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers shows them to templates: no null fields, reasoning under all the names it goes by."""
    shown = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in message]
        if names:
            message = {"thinking": message[names[0]], **message, "reasoning_content": message[names[0]]}
        shown.append(message)
    return shown


class _Child:
    """The process that renders; one request at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._owner = os.getpid()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.close = weakref.finalize(self, _end, self._process)
        """Ends the process; also called when this object goes."""

    @property
    def usable(self) -> bool:
        """False once it has ended, or in a fork of the process that started it."""
        return self._owner == os.getpid() and self.close.alive and self._process.poll() is None

    def ask(self, request: bytes) -> dict[str, str] | None:
        """The answer, or None if the child was stopped while it worked."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            found: dict[str, str] = json.loads(answer)
            return found
        status = self._process.wait()
        self.close()
        if status > 0:
            raise TemplateError(f"the chat template's process could not run (exit status {status})")
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes and wait for the child, which is idle or about to be stopped by its limit."""
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        try:
            pipe.close()
        except BrokenPipeError:
            pass  # what is left in the buffer was for a child that is gone
    process.wait()


# ---- the child


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer one JSON line with another until the requests end."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory()
    environment = _environment()  # before a clock runs: its imports are not the template's
    compiled: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        # Not caught: out of time, the system ends this process, also in the middle of a single long operation.
        signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
        try:
            if request["source"] not in compiled:
                compiled = {request["source"]: environment.from_string(request["source"])}
            answer = {"text": _render(compiled[request["source"]], request["variables"])}
        except TemplateError as error:
            answer = {"error": f"the chat template refuses: {error}"}
        except MemoryError:
            answer = {"error": f"the chat template took more than {MAX_MEMORY >> 20} MiB"}
        except Exception as error:  # whatever a template does is the parent's to report
            answer = {"error": f"the chat template failed: {type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _render(template: Any, variables: dict[str, Any]) -> str:
    parts, total = [], 0
    for part in template.generate(**variables):
        total += len(part)
        if total > MAX_RENDERED_CHARS:
            raise OverflowError(f"it wrote more than {MAX_RENDERED_CHARS} characters")
        parts.append(part)
    return "".join(parts)


def _environment() -> Any:
    """The names, filters and syntax that templates written for transformers rely on."""
    import datetime

    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only shows its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **names: Any) -> None:
            Namespace.__init__(*args, **names)
            for name in dict(*args[1:], **names):
                _refuse_private(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace can't hold {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals["namespace"] = PlainNamespace
    return environment


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
