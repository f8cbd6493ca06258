"""What an input file's lines, or prompts in a config, say: each an `Entry`, one that is wrong as well. Torch-free.

Whatever a line holds, it costs itself only, and it keeps the id that it gives itself, as far as that can be read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from megalite import json_text
from megalite.config.chat import CHAT_KEYS, VARIABLES, chat_variables, variables_problem
from megalite.config.sampling import MAX_KEY
from megalite.config.schema import InputSection
from megalite.config.typecheck import shown
from megalite.errors import ConfigError, Problem
from megalite.files import open_regular
from megalite.json_text import JsonLine

_KEYS = ("prompt", *CHAT_KEYS, "id", "sampling", "lora")
_NO_OBJECT = 'must be a JSON object such as {"prompt": "..."}'
_LEADING_ID = re.compile(r'\s*\{\s*"id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"|[0-9]{1,18})\s*[,}]')
"""The id of a line that breaks off later."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt as it was given, or why it could not be read."""

    where: str
    prompt: Any = None
    id: Any = None
    sampling: Any = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template sees beside the messages."""
    lora: str | None = None
    """Name of its LoRA adapter."""
    error: str | None = None


def given_id(entry: Entry) -> tuple[str | None, str | None]:
    """The id that an entry gives itself, and what is wrong with it; by default it is the place in the input, from 0."""
    given = entry.id
    if given is None:
        return None, None
    if type(given) is int:
        return str(given), None
    if not isinstance(given, str) or not given:
        return None, f"{entry.where}: id: must be a text that is not empty, or a whole number, got {shown(given)}."
    try:
        given.encode()
    except UnicodeEncodeError:
        return None, f"{entry.where}: id: has half a surrogate pair, got {shown(given)}."
    return given, None


def read_entries(section: InputSection, stdin: BinaryIO | None) -> Iterator[tuple[bytes, Entry]]:
    """Every entry of the input, with the bytes that it was made of; `stdin` stands in for standard input.

    ConfigError: the input as a whole can't be read.
    """
    if section.file is None:
        for index, prompt in enumerate(section.prompts or []):
            yield repr(prompt).encode(errors="surrogatepass"), Entry(f"input.prompts[{index}]", prompt)
        return
    try:
        file = (stdin or sys.stdin.buffer) if section.file == "-" else open_regular(section.file)
    except OSError as error:
        raise ConfigError(Problem(key="input.file", value=section.file, rule=f"{error.strerror}")) from error
    name = "stdin" if section.file == "-" else Path(section.file).name
    with nullcontext(file) if section.file == "-" else file:
        for line in json_text.lines(file):
            yield line.raw, _entry(line, f"{name}:{line.number}")


def _entry(line: JsonLine, where: str) -> Entry:
    """What one line says. One that is wrong keeps the id that it gives itself, as far as that can be read."""
    value, problem = line.value, line.problem and str(line.problem)
    if line.problem:
        begun = _LEADING_ID.match(line.raw.decode(errors="replace"))
        value = line.problem.readable or (begun and {"id": json.loads(begun[1])})
    if not isinstance(value, dict):
        return Entry(where, error=f"{where}: {problem or _NO_OBJECT}.")
    own_id = value.get("id")
    if problem and "\ufffd" in str(own_id):  # no id that the line gives
        own_id = None
    problem = problem or _shape_problem(value)
    if problem:
        return Entry(where, id=own_id, error=f"{where}: {problem}.")
    prompt = value.get("prompt", value.get("messages"))
    return Entry(where, prompt, own_id, value.get("sampling"), chat_variables(value), value.get("lora"))


def _shape_problem(value: dict[str, Any]) -> str | None:
    """What is wrong with the keys of a line."""
    for key in value:
        if key not in _KEYS:
            close = get_close_matches(key[:MAX_KEY], _KEYS, n=1)
            hint = f"perhaps {close[0]!r} is meant" if close else f"the keys are {', '.join(_KEYS)}"
            return f"unknown key {shown(key)}; {hint}"
    if ("prompt" in value) == ("messages" in value):
        return "needs either a prompt or messages"
    prompt = value.get("prompt", value.get("messages"))
    if "messages" in value and not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
        return "messages must be a list of {role, content}, at least one"
    if not isinstance(value.get("lora"), str | None):
        return f"lora must be the name of an adapter, got {shown(value['lora'])}"
    wrong = variables_problem(value)
    if wrong is not None:
        return str(wrong).rstrip(".")
    is_chat = "messages" in value or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict))
    if chat_variables(value) and not is_chat:
        return f"{' and '.join(VARIABLES)} are for chats, and the prompt is none"
    return None
