"""From a config file and overrides to a frozen config, the origin of every value, and one canonical text of it all.

The file and each `section.key=value` become settings; settings are checked one by one, so that every problem is found
at once; OmegaConf builds the dataclasses. Nothing in a value is expanded: no `${...}`, no environment variable, no `~`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from megalite.config import yaml_lines
from megalite.config.sampling import token_key
from megalite.config.schema import Config, HybridConfig, InferConfig, ServeConfig, TrainConfig
from megalite.config.typecheck import (
    hints,
    is_mapping,
    is_text,
    mentions,
    misfit,
    nearest_path,
    printable,
    problem,
    sections,
    unknown_key,
    with_floats,
)
from megalite.errors import ConfigError, Problem
from megalite.files import read_whole

Kind = Literal["infer", "train", "hybrid", "serve"]
SCHEMAS: dict[str, type] = {
    "infer": InferConfig,
    "train": TrainConfig,
    "hybrid": HybridConfig,
    "serve": ServeConfig,
}
COMMAND_LINE = "the command line"
DEFAULT = "default"
_OVERRIDE = re.compile(r"-*[a-z_]+\.[a-z_]|[^=]+=.")
"""Begins an override."""
MOST_BYTES = 1 << 20
"""Of a config file. Prompts that take more belong in a file of their own."""
LITERAL_KEYS = ("input.prompts", "sampling.stop", "train.sample_prompts")
"""Text for the model, in which `${...}` is ordinary text."""
SECRET_KEYS = ("server.api_key",)
"""Their values say where a secret is. What might be the secret itself is neither taken nor shown."""
_PLACE_OF_SECRET = re.compile(r"(env|file):\S.*")


C = TypeVar("C", bound=Config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[C]):
    """A config as it will run."""

    config: C
    origins: dict[str, str]
    """For every `section.key`: `FILE:LINE`, `the command line` or `default`."""
    text: str
    """Every value, as YAML; read again it gives an equal config."""
    sha256: str
    """Digest of `text`: equal configs have equal digests, however they were written."""

    @property
    def given(self) -> str:
        """The values that were set, as YAML; read again it gives an equal config with the same keys at their
        defaults."""
        return _written(self.config, [key for key, origin in self.origins.items() if origin != DEFAULT])


def load_config(kind: Kind, path: str | Path, overrides: Sequence[str] = ()) -> Loaded[Any]:
    """Read the config file at `path` and apply `section.key=value` overrides.

    Raises ConfigError with every unknown key, wrong type and unreadable value found, not only the first. What values
    mean together is for `validate`.
    """
    loaded, problems = resolve(kind, path, overrides)
    if problems:
        raise ConfigError(*problems)
    return loaded


def resolve(kind: Kind, path: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded[Any], list[Problem]]:
    """As `load_config`, but give the problems back and leave the values that have one at their defaults."""
    reader = _Reader(SCHEMAS[kind])
    reader.read_file(path)
    reader.read_overrides(overrides)
    return loaded_from(_build(SCHEMAS[kind], reader.values), reader.origins), reader.problems


def loaded_from(config: C, origins: dict[str, str] | None = None) -> Loaded[C]:
    """A config object, e.g. one made in Python, with its canonical text and digest."""
    keys = hints(type(config))
    text = _written(config, keys)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Loaded(config=config, origins=dict.fromkeys(keys, DEFAULT) | (origins or {}), text=text, sha256=sha256)


def _written(config: Config, keys: Iterable[str]) -> str:
    """The values of `keys`, in their order, as YAML."""
    tree: dict[str, Any] = {}
    for key in keys:
        path = key.split(".")
        tree = _put(tree, path, with_floats(hints(type(config))[key], reduce(getattr, path, config)))
    return yaml_lines.write(tree)


def with_defaults(loaded: Loaded[C], section: str, values: dict[str, Any], origin: str) -> Loaded[C]:
    """The config with `values`, from `origin`, for those keys of a section that nobody has set."""
    taken = {key: value for key, value in values.items() if loaded.origins[f"{section}.{key}"] == DEFAULT}
    changed = replace(getattr(loaded.config, section), **taken)
    origins = loaded.origins | {f"{section}.{key}": origin for key in taken}
    return loaded_from(replace(loaded.config, **{section: changed}), origins)


def with_origins(problems: Iterable[Problem], origins: dict[str, str]) -> list[Problem]:
    """The problems, each with the origin of the value it is about, where it has a key and no origin yet."""
    found = []
    for one in problems:
        key = one.key.partition("[")[0]
        origin = origins.get(key) or origins.get(key.rpartition(".")[0], "")
        done = one.origin or (origin == DEFAULT and one.value is None)
        found.append(one if done else replace(one, origin=origin))
    return found


class _Reader:
    """Collects the values of a schema's keys, where each came from, and every problem of reading them."""

    def __init__(self, schema: type):
        self.values: dict[str, Any] = {}
        """Values by dotted key; each has passed the checks of single values."""
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []
        self._schema, self._hints, self._sections = schema, hints(schema), sections(schema)

    def read_file(self, path: str | Path) -> None:
        name = printable(path)
        root, lines = yaml_lines.read_lines(_read_text(Path(path)), name)
        if not isinstance(root, dict):
            rule = f"must hold sections, e.g. `{next(iter(self._sections))}:`"
            raise ConfigError(Problem(key=name, rule=rule))
        self._read_section(root, (), name, lines)

    def _read_section(self, section: dict[Any, Any], path: tuple[Any, ...], file: str, lines: yaml_lines.Lines) -> None:
        for name, value in section.items():
            at = (*path, name)
            key, origin = ".".join(map(str, at)), f"{file}:{lines[at]}"
            if key in self._hints:
                self._set(key, (), value, origin)
            elif key not in self._sections:
                self.problems.append(unknown_key(key, self._schema, origin))
            elif isinstance(value, dict):
                self._read_section(value, at, file, lines)
            elif value is not None:
                fix = f"Write `{key}: {{{self._a_key_of(key).removeprefix(f'{key}.')}: ...}}`."
                self.problems.append(problem(key, "is a section and must hold keys", value, fix, origin))

    def read_overrides(self, overrides: Sequence[str]) -> None:
        rest = list(overrides)
        seen: dict[tuple[Any, ...], str] = {}
        while rest:
            word = rest.pop(0).removeprefix("--")
            key, _, text = word.partition("=")
            if not (key and text and key == key.strip() and text == text.strip()):
                while rest and not _OVERRIDE.match(rest[0]):  # the shell cuts `a = b` into several words
                    word = f"{word} {rest.pop(0)}"
                key, *values = re.split(r"\s*=\s*|\s+", word.strip(), maxsplit=1)
                meant = f"{key or 'section.key'}={''.join(values) or 'VALUE'}"
                rule = "an override is written section.key=value, without spaces round its `=`"
                self._refuse(key, rule, f"Write {printable(meant)}.")
                continue
            path = tuple(key.split("."))
            twin = next((seen[other] for other in seen if other[: len(path)] == path[: len(other)]), None)
            if twin:
                self._refuse(key, "is set twice", f"Keep one of {twin} and {word}.")
            else:
                self._read_override(key, text)
            seen.setdefault(path, word)

    def _read_override(self, typed: str, text: str) -> None:
        if typed in self._sections:
            return self._refuse(typed, "is a section", f"Set one of its keys, e.g. {self._a_key_of(typed)}=VALUE.")
        parts = typed.split(".")
        key = next((key for key in accumulate(parts, "{}.{}".format) if key in self._hints), None)
        if key is None:
            self.problems.append(unknown_key(typed, self._schema, COMMAND_LINE))
            return None
        hint, inside = self._hints[key], parts[key.count(".") + 1 :]
        if inside and not (is_mapping(hint) and all(inside)):
            return self._refuse(typed, f"unknown key: {key} has no keys of its own", f"Did you mean {key}?")
        value: Any = text
        literal = not inside and (is_text(hint) or (hint is Any and text[0] not in "[{"))
        if not literal or text in ("null", "~") or text[0] in "\"'":  # else a colon or a number needs no quotes
            try:
                value = yaml_lines.read(text, typed)
            except ConfigError as error:
                wrong = replace(error.problems[0], key=printable(typed), origin=COMMAND_LINE)
                if text[0] in "[{" and (hint is Any or inside):
                    quoted = printable(f"{typed}={json.dumps(text, ensure_ascii=False)}")
                    wrong = replace(wrong, fix=f"A text that begins so goes in quotes: '{quoted}'.")
                self.problems.append(wrong)
                return None
        if key == "sampling.logit_bias":
            inside = [token_key(part) for part in inside]
        return self._set(key, inside, value, COMMAND_LINE)

    def _refuse(self, typed: str, rule: str, fix: str) -> None:
        self.problems.append(Problem(key=printable(typed), rule=rule, fix=fix, origin=COMMAND_LINE))

    def _a_key_of(self, section: str) -> str:
        """For examples in messages."""
        return next(key for key in self._hints if key.startswith(f"{section}."))

    def _set(self, key: str, inside: Sequence[Any], value: Any, origin: str) -> None:
        """Take a key's value; `inside`: path within it, of a mapping that is set piece by piece."""
        wrong = _value_problem(key, self._hints[key], _put(None, inside, value), origin)
        if wrong:
            self.problems.append(wrong)
            return
        self.values[key] = _put(self.values.get(key), inside, value)
        before = self.origins.get(key, origin) if inside else origin
        self.origins[key] = before if before.endswith(origin) else f"{before} and {origin}"


def _value_problem(key: str, hint: Any, value: Any, origin: str) -> Problem | None:
    if key in SECRET_KEYS and value is not None and not _PLACE_OF_SECRET.fullmatch(str(value)):
        rule = "must say where the key is, as env:NAME or file:PATH; the key itself belongs in no config"
        return Problem(key=key, rule=rule, origin=origin)
    if key not in LITERAL_KEYS and re.search(r'\$\{|"\\*\?\?\?"', json.dumps(value)):
        fix = "Write the value itself; `${...}` and `???` are not expanded."
        return problem(key, "must be a plain value", value, fix, origin)
    if is_text(hint) and isinstance(value, str):
        if not value.strip():
            return problem(key, "must not be empty", value, "Leave it out, or write null.", origin)
        if not value.isprintable():
            return problem(key, "must be printable text on one line", value, "", origin)
    return misfit(key, hint, value, origin)


def _put(tree: Any, path: Sequence[Any], value: Any) -> Any:
    """A copy of the mapping `tree` with another value at a path; the value itself where the path is empty."""
    if not path:
        return value
    inner = tree if isinstance(tree, dict) else {}
    return inner | {path[0]: _put(inner.get(path[0]), path[1:], value)}


def _read_text(path: Path) -> str:
    name = printable(path)
    try:
        return read_whole(path, MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(Problem(key=name, rule="no such file", fix=nearest_path(path))) from error
    except IsADirectoryError as error:
        raise ConfigError(Problem(key=name, rule="is a folder, not a config file")) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(Problem(key=f"{name}:{line}", rule="is not UTF-8 text")) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(Problem(key=name, rule=f"can't be read: {reason}")) from error


def _build(schema: type, values: dict[str, Any]) -> Any:
    """The frozen config; `values` have been checked. Free text goes around OmegaConf, which would expand it.

    Merged through OmegaConf, so that every class of the schema is one that its users can take as a structured config;
    by section, since that takes its time for each key, and most sections are left as they are.
    """
    free = [key for key in values if "." not in key or mentions(hints(schema)[key], Any) or key in LITERAL_KEYS]
    settled: dict[str, Any] = {}
    for key in values.keys() - set(free):
        settled = _put(settled, key.split("."), values[key])
    config = replace(schema(), **{name: _merged(sections(schema)[name], settled[name]) for name in settled})
    for key in free:
        config = _with(config, key.split("."), values[key])
    return config


def _merged(section: type, values: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf  # slow to import, and a config made in Python needs none of it

    return OmegaConf.to_object(OmegaConf.merge(_structured(section), values))


@cache
def _structured(section: type) -> Any:
    """A section at its defaults, as OmegaConf has it; merging copies it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(section)


def _with(config: Any, path: list[str], value: Any) -> Any:
    """`config` with another value at a path of fields."""
    name, *rest = path
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
