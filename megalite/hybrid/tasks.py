"""Sources of prompts: `data.source` names a JSON-lines file, or a function such as `megalite.hybrid.tasks:additions`.

A record is a mapping with `prompt` (text) or `messages` (a chat, see config/chat.py), perhaps with `response` (text,
for supervised steps), and whatever else its reward looks at. A function `task(*, split, seed, **options)` gives a
finite sequence of records; `data.options` of the config are its options. It is a pure function: what it gives depends
on its arguments alone, so that every rank, and a job that is resumed, makes the same list. No torch here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from megalite.config.chat import chat_problem, chat_variables
from megalite.config.schema import DataSection
from megalite.config.typecheck import nearest_path, shown
from megalite.errors import ConfigError, Problem
from megalite.rewards.functions import statements_of
from megalite.rewards.named import check_call, check_named, described, named_function
from megalite.train.data.records import SourceFile, find_files, is_held_out

log = logging.getLogger(__name__)

Split = Literal["train", "held_out"]
NOTHING: Mapping[str, Any] = MappingProxyType({})

GIVEN = ("split", "seed")
"""What a task function is called with beside its options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One record, checked."""

    where: str
    """Names it in messages: `tasks.jsonl:17`, `megalite.hybrid.tasks:additions[3]`."""
    prompt: str | None
    """None for a chat."""
    messages: Sequence[Mapping[str, Any]] | None
    """None for a text."""
    variables: Mapping[str, Any]
    """What a chat's template sees beside the messages, e.g. `tools`."""
    response: str | None
    record: Mapping[str, Any]
    """All of it, as rewards see it; JSON-like."""


def check_source(source: str, options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the config's `data.source` and `data.options`, without making or reading the examples."""
    if ":" in source:
        found = check_named(source, key="data.source", given=GIVEN, options=options, options_key="data.options")
        return [found] if found else []
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
    held_out: float = 0.0,
    variables: Mapping[str, Any] = NOTHING,
) -> list[Example]:
    """Every example of a split, in the source's order; at least one.

    `held_out`: for a file, the share of its records kept for evaluation, chosen by a hash of each record. `variables`:
    what the chat template sees beside the messages and what a record gives it. ConfigError names the file and line, or
    the function and the place in what it gave, of everything that is wrong there.
    """
    if ":" in source:
        function = named_function(source, key="data.source")
        names = {"given": GIVEN, "options": options, "options_key": "data.options"}
        check_call(function, source, key="data.source", **names)
        entries = _made(function, source, split, seed, options)
    else:
        problems = check_source(source, options)
        if problems:
            raise ConfigError(*problems)
        entries = _read(Path(source), lambda line: is_held_out(line, held_out) == (split == "held_out"))
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
        fix = "Raise data.held_out, or give more of them." if split == "held_out" and ":" not in source else ""
        raise ConfigError(Problem(key="data.source", rule=f"has no {split} examples", value=source, fix=fix))
    return examples


_SHOWN = 10
"""Problems listed of a source that has many."""


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


def _read(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """The records of a file's wanted lines that are not blank; a ValueError for one that can't be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(Problem(key="data.source", rule=f"{error.strerror}", value=str(path))) from error
    for number, raw in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        try:
            line = raw.decode("utf-8-sig").strip()
            if line and wanted(line):
                yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield where, ValueError(f"is not valid JSON at column {error.colno}: {error.msg}")
        except (UnicodeDecodeError, RecursionError) as error:
            yield where, ValueError(f"can't be read: {error}")


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


# ---- additions

ADDITIONS_HELD_OUT = 0.1
"""Share of all pairs of numbers that are kept for evaluation."""
_ENUMERATED = 10**6


def additions(*, split: Split, seed: int = 0, digits: int = 2, count: int = 2000) -> list[dict[str, Any]]:
    """Sums of two numbers below 10**digits: `12+34=`, answer `46`, response `46` and a line end; none twice.

    Which pairs are held out depends on the pair alone, so no seed trains on what another evaluates. Fewer than `count`
    if there are no more.
    """
    if not 1 <= digits <= 9:
        raise ConfigError(Problem(key="data.options.digits", rule="must be between 1 and 9", value=digits))
    if count < 1:
        raise ConfigError(Problem(key="data.options.count", rule="must be >= 1", value=count))
    below = 10**digits
    random = np.random.Philox(key=[seed, digits])
    if below**2 <= _ENUMERATED:
        drawn = np.argsort(random.random_raw(below**2), kind="stable")
    else:  # a repetition is rare among so many, and a fifth more than can be held out is drawn
        drawn = random.random_raw(12 * count + 1000) % below**2
    records: dict[str, dict[str, Any]] = {}
    for pair in drawn.tolist():
        left, right = divmod(pair, below)
        prompt, answer = f"{left}+{right}=", str(left + right)
        if is_held_out(prompt, ADDITIONS_HELD_OUT) == (split == "held_out"):
            records[prompt] = {"prompt": prompt, "answer": answer, "response": f"{answer}\n"}
        if len(records) == count:
            break
    return list(records.values())


# ---- functions of a library

NOT_CODE = (
    "encodings/*",
    "pydoc_data/topics.py",
    "*/encoded_modules/*",
    "*/test_lib2to3/data/*",
    "lib2to3/tests/data/*",
)
"""Files of the standard library that configs/train/demo.yaml leaves out: tables rather than code."""
EVALUATION = 0.2
"""Share of the functions in the held-out files on which a hybrid job evaluates and does not train."""


def library_functions(
    *,
    split: Split,
    seed: int = 0,
    source: str = "stdlib",
    pattern: str = "**/*.py",
    exclude: Sequence[str] = NOT_CODE,
    held_out: float = 0.03,
    max_head: int = 8,
    max_body: int = 20,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """Heads of functions in files that a model was not trained on: decorators, `def` line, docstring; dedented.

    `source`, `pattern`, `exclude`, `held_out`: those of the model's data section when it was trained, which decide
    together which files that are; by default the demo model's. `max_head`, `max_body`: lines of a head and of a body
    beyond which a function is left out, as are functions whose body computes nothing. `count`: at most so many.
    For the reward `complete_function`: `statements`; for supervised steps: `response`, the original body.
    """
    files = find_files(DataSection(source=source, pattern=pattern, exclude=list(exclude)))
    records: dict[str, dict[str, Any]] = {}
    for file in files:
        if is_held_out(file.name, held_out):
            for record in _functions(file, max_head, max_body):
                records.setdefault(record["prompt"], record)
    kept = [one for one in records.values() if is_held_out(one["prompt"], EVALUATION) == (split == "held_out")]
    # Neighbours in a file should not be neighbours here.
    kept.sort(key=lambda one: hashlib.blake2b(f"{seed} {one['prompt']}".encode(), digest_size=8).digest())
    return kept[:count]


def _functions(file: SourceFile, max_head: int, max_body: int) -> Iterator[dict[str, Any]]:
    """The functions of a file that are fit to be completed, in its order."""
    try:
        text = file.path.read_bytes().decode("utf-8")
        tree = ast.parse(text)
    except (ValueError, SyntaxError) as error:
        log.info("%s: passed over: %s", file.path, error)
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if documented else node.body
            statements = len(set(statements_of(body)))
            start = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            middle = node.body[0].end_lineno if documented else _first_line(node.body[0]) - 1
            end = node.end_lineno
            assert middle is not None and end is not None
            fits = node.lineno <= middle <= start + max_head and middle < end <= middle + max_body
            head, response = (_dedented(part, node.col_offset) for part in (lines[start:middle], lines[middle:end]))
            if statements and fits and head and response and _is_function(head + response):
                yield {
                    "prompt": head,
                    "response": response,
                    "statements": statements,
                    "origin": f"{file.name}:{node.lineno} {node.name}",
                }


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])


def _dedented(lines: list[str], column: int) -> str | None:
    """The lines moved left by `column`; None if one of them doesn't begin so far right."""
    if any(line[:column].strip() for line in lines):
        return None
    return "".join(f"{line[column:]}\n" for line in lines)


def _is_function(text: str) -> bool:
    """Whether the text is one function still, now that it stands by itself."""
    try:
        return len(ast.parse(text).body) == 1
    except SyntaxError:
        return False
