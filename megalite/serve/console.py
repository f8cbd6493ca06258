"""A chat in the terminal with any server that speaks OpenAI's API. The standard library only; imports no torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TextIO
from urllib.parse import urlsplit

from megalite import terminal
from megalite.errors import ConfigError, MegaliteError, Problem
from megalite.inference.io.printing import shown

CONNECT = 10.0
"""Seconds for a connection."""
HELP = """\
/reset        forget the conversation
/system TEXT  the system message from here on; without TEXT: none
/save FILE    write the conversation to a new file, as a line that launch/infer.py reads
/quit         end; so does Ctrl-D. Ctrl-C stops an answer."""


class ServerError(MegaliteError):
    """The server can't be reached, or refuses."""


class Remote:
    """A server's answers as text, piece by piece."""

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, params: Mapping[str, Any] | None = None
    ):
        """`model`: None: the first that it has. `params`: fields of every request besides. ConfigError: no such URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        rule = "must be like http://127.0.0.1:8000"
        try:
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError
            self._port = parts.port
        except ValueError:
            raise ConfigError(Problem(key="--url", rule=rule, value=url)) from None
        self.url = url
        self._secure, self._host = parts.scheme == "https", parts.hostname
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self._params = key, dict(params or {})
        self._model = model

    @property
    def model(self) -> str:
        """The model's name; ServerError: it can't be found out."""
        if self._model is None:
            with closing(self._open("GET", "/v1/models")) as answer:
                found = _json(answer.read()).get("data") or []
            if not found:
                raise ServerError(f"{self.url} has no model")
            self._model = str(found[0]["id"])
        return self._model

    def chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The assistant's answer; closing the iterator stops it. ServerError: there is none, or not all of it."""
        for choice in self._choices("/v1/chat/completions", {"messages": messages}):
            yield (choice.get("delta") or {}).get("content") or ""

    def complete(self, prompt: str) -> Iterator[str]:
        """The continuation of a text; else as `chat`."""
        for choice in self._choices("/v1/completions", {"prompt": prompt}):
            yield choice.get("text") or ""

    def is_ready(self) -> bool:
        """Whether our own server would answer now."""
        with suppress(ServerError), closing(self._open("GET", "/ready")):
            return True
        return False

    def _choices(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        body = {"model": self.model, "stream": True, **self._params, **body}
        with closing(self._open("POST", path, body)) as answer:
            try:
                for event in _events(answer):
                    if event.get("error"):
                        raise ServerError(_message(event))
                    yield from event.get("choices") or ()
            except (OSError, HTTPException) as error:
                raise ServerError(f"{self.url}: the connection broke ({error})") from None

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        """The server's answer, if its status is 200; the caller closes it."""
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host or "", self._port, timeout=CONNECT)
        headers = {"Connection": "close"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.connect()
            connection.sock.settimeout(None)  # a long prompt takes its time, and Ctrl-C ends the wait
            connection.request(method, self._path + path, data, headers | {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200:
                return answer
            with closing(answer):
                said = _message(_json(answer.read()))
        except (OSError, HTTPException) as error:
            raise ServerError(f"{self.url} can't be reached ({error})") from None
        raise ServerError(f"{self.url} answers {answer.status}: {said}" if said else f"{self.url}: {answer.status}")


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events up to `[DONE]`."""
    for line in answer:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _json(data)


def _json(data: bytes) -> dict[str, Any]:
    """An object; {} for anything else."""
    with suppress(ValueError):
        value = json.loads(data)
        if isinstance(value, dict):
            return value
    return {}


def _message(value: dict[str, Any]) -> str:
    error = value.get("error")
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")


class Console:
    """A conversation at a terminal."""

    def __init__(self, remote: Remote, *, system: str = "", out: TextIO | None = None):
        self._remote = remote
        self._system = system
        self._out = out or sys.stdout
        self._messages: list[dict[str, str]] = []
        self._chats = True
        """False: the model has no chat template, so texts are completed."""
        self.failed = False
        """The server refused a text, or broke off."""

    def run(self, read: Callable[[str], str] = input) -> None:
        """Answer what `read` gives, until it raises EOFError. Ctrl-C stops the answer, or empties the line.

        ServerError: the server can't be reached at the beginning. Later errors are shown.
        """
        model = self._remote.model
        self._say(f"{model}; /help lists the commands.\n")
        prompt = "> " if sys.stdin.isatty() else ""
        while not terminal.reader_has_left():
            try:
                line = read(prompt).strip()
            except KeyboardInterrupt:
                self._say("\n")
                continue
            except EOFError:
                self._say("\n" if prompt else "")
                return
            if line == "/quit":
                return
            if re.match(r"/[a-z]", line):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._answer(line)

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self._messages.clear()
        elif name == "/system":
            self._system = rest.strip()
        elif name == "/save":
            self._save(rest.strip())
        else:
            self._say(f"{HELP}\n")

    def _conversation(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _save(self, name: str) -> None:
        try:
            with open(os.path.expanduser(name), "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._conversation()}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"error: {name or 'the name of a file'}: {error.strerror}\n")

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        said = ""
        pieces = self._remote.chat(self._conversation()) if self._chats else self._remote.complete(text)
        try:
            with closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    said += piece
                    self._say(shown(piece))
            self._say("\n")
        except KeyboardInterrupt:
            self._say(" [stopped]\n")
        except ServerError as error:
            if self._chats and not said and re.search("chat.template", str(error), re.IGNORECASE):
                self._chats = False
                self._messages.pop()
                self._say("hint: this model has no chat template, so it goes on with your texts.\n")
                self._answer(text)
                return
            self._say(f"{chr(10) if said else ''}error: {shown(str(error))}\n")
            self.failed = True
        if said:
            self._messages.append({"role": "assistant", "content": said})
        else:
            self._messages.pop()  # what was not answered is no part of the conversation

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
