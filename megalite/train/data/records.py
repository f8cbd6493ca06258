"""What there is to train on: files found, JSON lines read and checked, each with its place for messages. Torch-free.

A file whose name ends in .jsonl holds JSON lines, any other is one text. A line is a text, `{"text": ...}`, or an
example: `{"prompt": ..., "response": ...}` or a chat, `{"messages": [{"role": ..., "content": ...}, ...]}`, see
config/chat.py. What else a line holds is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from megalite import json_text
from megalite.config.chat import VARIABLES, chat_problem
from megalite.config.schema import DataSection
from megalite.errors import ConfigError, Problem

JSON_LINES = ".jsonl"
MOST_PROBLEMS = 10
"""Bad lines that are reported at once; the rest of the data is not read then."""
TEXT, PAIR, CHAT = ("text",), ("prompt", "response"), ("messages",)
KINDS = (TEXT, PAIR, CHAT)
"""The keys that make a line what it is."""
NAMES_ELSEWHERE = {
    **dict.fromkeys(("completion", "output", "answer", "target"), "response"),
    **dict.fromkeys(("instruction", "question", "input"), "prompt"),
    **dict.fromkeys(("conversations", "conversation"), "messages"),
    "content": "text",
}
"""What other trainers call the keys of a line, and ours."""

Format = Literal["text", "examples"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str
    """Path relative to the source, with forward slashes."""
    path: Path

    @property
    def is_lines(self) -> bool:
        return self.name.endswith(JSON_LINES)


@dataclass(frozen=True, slots=True)
class Record:
    """One text or one example."""

    where: str
    """`file` or `file:line`, for messages."""
    held_out: bool
    """Kept for evaluation."""
    values: dict[str, Any]
    """The keys of its kind and their values; a chat may have `tools` and `chat_template_kwargs` besides."""


def find_files(section: DataSection) -> list[SourceFile]:
    """The files of `section`, sorted by name, less the excluded ones. ConfigError if there are none."""
    source, excluded = Path(section.source), list(section.exclude)
    if section.source == "stdlib":
        source = Path(sysconfig.get_paths()["stdlib"])
        excluded += ["site-packages/*", "dist-packages/*"]
    if source.is_dir():
        found = {path.relative_to(source).as_posix(): path for path in source.glob(section.pattern)}
    elif source.is_file():
        found = {source.name: source}
    else:
        root = Path(source.anchor)
        found = {path.as_posix(): path for path in root.glob(source.relative_to(root).as_posix())}
    kept = [
        SourceFile(name, path)
        for name, path in sorted(found.items())
        if path.is_file() and not any(fnmatchcase(name, pattern) for pattern in excluded)
    ]
    if not kept:
        fix = f"Give `stdlib`, a file, a folder with files that match data.pattern = {section.pattern!r}, or a glob."
        raise ConfigError(Problem(key="data.source", rule="must name some files", value=section.source, fix=fix))
    return kept


def is_held_out(name: str, share: float) -> bool:
    """Whether a file or line is kept for evaluation: a function of its name or content, true for `share` of all."""
    return hash_of(name) < share * 2.0**64


def hash_of(name: str) -> int:
    """A hash of a name, 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class Records:
    """The records of `files`, in their order; each iteration reads the files again.

    A text file that is not UTF-8 is passed over (the standard library has some on purpose). ConfigError, raised while
    iterating: lines that are not what they must be, up to MOST_PROBLEMS, and none is given after the first of them.
    """

    def __init__(self, files: list[SourceFile], section: DataSection):
        self.files = files
        self.section = section
        self.format: Format = self._format()
        """Format of all records."""
        self.passed_over: set[str] = set()
        """Files that are not UTF-8, of those that have been read."""

    def __iter__(self) -> Iterator[Record]:
        problems: list[Problem] = []
        for file in self.files:
            for item in self._lines(file) if file.is_lines else self._text(file):
                if isinstance(item, Problem):
                    problems.append(item)
                    if len(problems) == MOST_PROBLEMS:
                        raise ConfigError(*problems)
                elif not problems:
                    yield item
        if problems:
            raise ConfigError(*problems)

    def _format(self) -> Format:
        """As the config says, or as the first line of the first file of lines."""
        if self.section.format != "auto":
            return self.section.format
        for file in self.files:
            _, first = next(_objects(file), (0, None)) if file.is_lines else (0, None)
            if isinstance(first, dict):
                with suppress(ValueError):  # told when the line is read
                    return "text" if _kind(first) == TEXT else "examples"
        return "text"

    def _text(self, file: SourceFile) -> Iterator[Record | Problem]:
        if self.format == "examples":
            rule = f"{file.path}: a text, where all others are examples" if self.section.format == "auto" else ""
            rule = rule or f"{file.path}: must be JSON lines, because data.format is examples"
            fix = f"Examples are in files whose names end in {JSON_LINES}; narrow data.source or data.pattern to them."
            yield Problem(key="data.source", rule=rule, fix=fix)
            return
        try:
            text = file.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            log.info("%s: not UTF-8, passed over", file.path)
            self.passed_over.add(file.name)
            return
        if text:
            yield Record(str(file.path), is_held_out(file.name, self.section.held_out), {"text": text})

    def _lines(self, file: SourceFile) -> Iterator[Record | Problem]:
        first: tuple[str, ...] | None = None
        for number, values in _objects(file):
            where = f"{file.path}:{number}"
            try:
                kind, kept = _checked(values)
                self._check_kind(kind, first or kind)
            except ValueError as error:
                yield Problem(key="", rule=f"{where}: {error}")
                continue
            first = kind
            if kept != {"text": ""}:
                content = json.dumps(kept, sort_keys=True, ensure_ascii=False)
                yield Record(where, is_held_out(content, self.section.held_out), kept)

    def _check_kind(self, kind: tuple[str, ...], first: tuple[str, ...]) -> None:
        """ValueError: the line is not of the kind of its file's first, or of the data's format."""
        if kind != first:
            raise ValueError(f"holds {_words(kind)}, the lines before it {_words(first)}; a file holds one kind")
        if (kind == TEXT) != (self.format == "text"):
            wanted = "texts" if self.format == "text" else "examples"
            by = "data.format says" if self.section.format != "auto" else "the first file holds"
            raise ValueError(f"holds {_words(kind)}, and {by} {wanted}")


def line_problems(section: DataSection) -> list[Problem]:
    """What is wrong with the lines that `section` names, the first few of them; reads all files of JSON lines."""
    try:
        files = find_files(section)
        if section.format == "examples" or any(file.is_lines for file in files):
            for _ in Records(files, section):
                pass
    except ConfigError as error:
        return list(error.problems)
    return []


# ---- one line


def _objects(file: SourceFile) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Each line that is not blank, with its number from 1: its values, or what is wrong with it."""
    with file.path.open("rb") as lines:
        for line in json_text.lines(lines):
            no_object = 'must be a JSON object such as {"prompt": "...", "response": "..."}'
            is_object = isinstance(line.value, dict)
            yield line.number, line.value if is_object else line.problem or ValueError(no_object)


def _kind(values: dict[str, Any]) -> tuple[str, ...]:
    """The kind of a line. ValueError: it is of none, or of several."""
    whole = [kind for kind in KINDS if all(key in values for key in kind)]
    if len(whole) > 1:
        raise ValueError(f"holds {' and '.join(map(_words, whole))}, where a line is one of them")
    if whole:
        return whole[0]
    foreign = [(key, ours) for key, ours in NAMES_ELSEWHERE.items() if key in values and ours not in values]
    renamed = [f"{key!r} is called {ours!r} here" for key, ours in foreign]
    hint = f": {', '.join(renamed)}" if renamed else ""
    for kind in KINDS:
        for key in kind:
            if key in values:
                raise ValueError(f"has {key!r} but no {next(one for one in kind if one not in values)!r}{hint}")
    raise ValueError(f"needs {_words(TEXT)}, {_words(PAIR)} or {_words(CHAT)}; it has {list(values)}{hint}")


def _words(kind: tuple[str, ...]) -> str:
    return "/".join(map(repr, kind))


def _checked(values: dict[str, Any] | ValueError) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Kind of a line, and what is kept of its values. ValueError: a value is not what it must be."""
    if isinstance(values, ValueError):
        raise values
    kind = _kind(values)
    if kind == CHAT:
        wrong = chat_problem(values)
        if wrong is not None:
            raise ValueError(str(wrong).rstrip("."))
        if not any(message["role"] == "assistant" for message in values["messages"]):
            raise ValueError("no message has the role 'assistant': there is nothing to learn from")
        return kind, {key: values[key] for key in (*kind, *VARIABLES) if values.get(key) is not None}
    for key in kind:
        if not isinstance(values[key], str):
            raise ValueError(f"{key!r} must be a text, got {type(values[key]).__name__}")
        try:
            values[key].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key!r} has half a surrogate pair at character {error.start}") from None
    if kind == PAIR and not values["response"]:
        raise ValueError("'response' is empty: there is nothing to learn from")
    return kind, {key: values[key] for key in kind}
