"""Sources of prompts: `data.source` names a JSON-lines file, or a function `package.module:function`.

A record is a mapping with `prompt` (text) or `messages` (a chat, see config/chat.py), perhaps with `response` (text,
for supervised steps), and whatever else its reward looks at. A function `task(*, split, seed, **options)` gives a
finite sequence of records; `data.options` of the config are its options. It is a pure function: what it gives depends
on its arguments alone, so that every rank, and a job that is resumed, makes the same list. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megalite import json_text
from megalite.config.chat import chat_problem, chat_variables
from megalite.config.typecheck import nearest_path, shown
from megalite.errors import ConfigError, Problem
from megalite.rewards.named import NamedFunction, described

Split = Literal["train", "held_out"]
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One record, checked."""

    where: str
    """Names it in messages: `tasks.jsonl:17`, `my_tasks:sums[3]`."""
    prompt: str | None
    """None for a chat."""
    messages: list[dict[str, Any]] | None
    """None for a text."""
    variables: Mapping[str, Any]
    """What a chat's template sees beside the messages, e.g. `tools`."""
    response: str | None
    record: Mapping[str, Any]
    """The whole record, as rewards see it; JSON-like."""


def check_source(source: str, options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the config's `data.source` and `data.options`, without making or reading the examples."""
    if ":" in source:
        wrong = _function(source, options).check()
        return [wrong] if wrong else []
    found = []
    if not Path(source).is_file():
        rule = "no such file" if source.endswith((".jsonl", ".json")) else "must be a JSON-lines file or a function"
        fix = nearest_path(source) or "Functions are written package.module:function."
        found.append(Problem(key="data.source", rule=rule, value=source, fix=fix))
    if options:
        rule = "are for a function, and data.source is a file"
        found.append(Problem(key="data.options", rule=rule, value=dict(options), fix="Leave them out."))
    return found


def load_examples(
    source: str,
    options: Mapping[str, Any],
    *,
    split: Split,
    seed: int = 0,
    variables: Mapping[str, Any] = NOTHING,
) -> list[Example]:
    """Every example of a split, in the source's order; at least one.

    All records of a file are for training. `variables`: what the chat template sees beside the messages and what a
    record gives it. ConfigError names the file and line, or the function and the place in what it gave, of everything
    that is wrong there.
    """
    if ":" in source:
        entries = _made(_function(source, options).load(), source, split, seed, options)
    else:
        problems = check_source(source, options)
        if problems:
            raise ConfigError(*problems)
        entries = _read(Path(source))
    problems, examples = [], []
    for where, record in entries:
        try:
            if isinstance(record, ValueError):
                raise record
            examples.append(_example(where, record, variables))
        except ValueError as error:
            problems.append(Problem(key=where, rule=str(error)))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more like these"] if len(problems) > _SHOWN else []
        raise ConfigError(*problems[:_SHOWN], *more)
    if not examples:
        raise ConfigError(Problem(key="data.source", rule=f"has no {split} examples", value=source))
    return examples


_SHOWN = 10
"""Problems listed of a source that has many."""


def _function(source: str, options: Mapping[str, Any]) -> NamedFunction:
    return NamedFunction(
        name=source, key="data.source", keywords=("split", "seed"), options=[*options], options_key="data.options"
    )


def _made(
    function: Callable[..., Any], source: str, split: Split, seed: int, options: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """What a task function gives, each record with its place."""
    try:
        records = list(function(split=split, seed=seed, **options))
    except ConfigError:
        raise
    except Exception as error:  # a task of the user's may raise anything
        raise ConfigError(Problem(key="data.source", rule=f"it raised {described(error)}", value=source)) from error
    for place, record in enumerate(records):
        yield f"{source}[{place}]", record


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file of JSON lines; a ValueError for one that can't be read."""
    try:
        with path.open("rb") as file:
            for line in json_text.lines(file):
                yield f"{path.name}:{line.number}", line.value if line.problem is None else line.problem
    except OSError as error:
        raise ConfigError(Problem(key="data.source", rule=f"{error.strerror}", value=str(path))) from error


def _example(where: str, record: Any, variables: Mapping[str, Any]) -> Example:
    """ValueError: the record is not what an example must be."""
    if not isinstance(record, Mapping):
        raise ValueError(f'must be a mapping such as {{"prompt": "..."}}, got {shown(record)}')
    if ("prompt" in record) == ("messages" in record):
        close = [key for key in record if get_close_matches(str(key), ("prompt", "messages"), n=1)]
        hint = f"; it has {close[0]!r}" if close and "prompt" not in record else ""
        raise ValueError(f"needs either a prompt or messages{hint}")
    prompt, messages, response = record.get("prompt"), record.get("messages"), record.get("response")
    if "prompt" in record and not (isinstance(prompt, str) and prompt):
        raise ValueError(f"prompt must be a text that is not empty, got {shown(prompt)}")
    wrong = chat_problem(record) if "messages" in record else None
    if wrong is not None:
        raise ValueError(str(wrong).rstrip("."))
    if "response" in record and not isinstance(response, str):
        raise ValueError(f"response must be text, got {shown(response)}")
    try:
        json.dumps(dict(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be made of texts, numbers, lists and mappings: {error}") from None
    seen = {**variables, **chat_variables(record)} if messages is not None else NOTHING
    return Example(where=where, prompt=prompt, messages=messages, variables=seen, response=response, record=record)
