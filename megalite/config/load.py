"""From a config file and overrides to a frozen config, the origin of every value, and one canonical text of it all.

The file and each `section.key=value` become settings; settings are checked one by one, so that every problem is found
at once; OmegaConf builds the dataclasses. Nothing in a value is expanded: no `${...}`, no environment variable, no `~`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from megalite.config import yaml_lines
from megalite.config.sampling import token_key
from megalite.config.schema import Config, HybridConfig, InferConfig, TrainConfig
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

Kind = Literal["infer", "train", "hybrid"]
SCHEMAS: dict[str, type] = {"infer": InferConfig, "train": TrainConfig, "hybrid": HybridConfig}
COMMAND_LINE = "the command line"
DEFAULT = "default"
_KEY = re.compile(r"-*[a-z_]+\.[a-z_]|[^=]+=.")
"""Begins an override."""
MOST_BYTES = 1 << 20
"""Of a config file. Prompts that take more belong in a file of their own."""
LITERAL_KEYS = ("input.prompts", "sampling.stop", "train.sample_prompts")
"""Text for the model, in which `${...}` is ordinary text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A config as it will run."""

    config: Config
    origins: dict[str, str]
    """For every `section.key`: `FILE:LINE`, `the command line` or `default`."""
    text: str
    """Every value, as YAML; read again it gives an equal config."""
    given: str
    """The values that were set, as YAML; read again it gives an equal config with the same keys at their defaults."""
    sha256: str
    """Of `text`: equal configs have equal digests, however they were written."""


@dataclass(frozen=True, slots=True)
class _Setting:
    key: str
    """`section.key` in the schema."""
    inside: tuple[str | int, ...]
    """Path within the value, for a mapping set piece by piece; empty: the whole value."""
    value: Any
    origin: str


def load_config(kind: Kind, path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read the config file at `path` and apply `section.key=value` overrides.

    Raises ConfigError with every unknown key, wrong type and unreadable value found, not only the first. What values
    mean together is for `validate`.
    """
    loaded, problems = resolve(kind, path, overrides)
    if problems:
        raise ConfigError(*problems)
    return loaded


def resolve(kind: Kind, path: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded, list[Problem]]:
    """As `load_config`, but give the problems back and leave the values that have one at their defaults."""
    schema = SCHEMAS[kind]
    settings, problems = _from_file(schema, path)
    for setting in _from_command_line(schema, overrides):
        (problems if isinstance(setting, Problem) else settings).append(setting)
    good = []
    for setting in settings:
        wrong = _check(schema, setting)
        if wrong:
            problems.append(wrong)
        else:
            good.append(setting)
    values, origins = _merge(schema, good)
    return loaded_from(_build(schema, values), origins), problems


def loaded_from(config: Config, origins: dict[str, str] | None = None) -> Loaded:
    """A config object, e.g. one made in Python, with its canonical text and digest."""
    tree, given = asdict(config), {}
    origins = dict.fromkeys(hints(type(config)), DEFAULT) | (origins or {})
    for key, hint in hints(type(config)).items():
        *section, name = key.split(".")
        inner = reduce(getitem, section, tree)
        inner[name] = with_floats(hint, inner[name])
        if origins[key] != DEFAULT:
            reduce(lambda there, part: there.setdefault(part, {}), section, given)[name] = inner[name]
    text = yaml_lines.write(tree)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Loaded(config=config, origins=origins, text=text, given=yaml_lines.write(given), sha256=sha256)


def with_defaults(loaded: Loaded, section: str, values: dict[str, Any], origin: str) -> Loaded:
    """The same with other values, from `origin`, for those keys of a section that nobody has set."""
    taken = {key: value for key, value in values.items() if loaded.origins[f"{section}.{key}"] == DEFAULT}
    changed = replace(getattr(loaded.config, section), **taken)
    origins = loaded.origins | {f"{section}.{key}": origin for key in taken}
    return loaded_from(replace(loaded.config, **{section: changed}), origins)


def with_origins(problems: Iterable[Problem], origins: dict[str, str]) -> list[Problem]:
    """The problems, each with the origin of the value it is about, where it has a key and no origin yet."""
    found = []
    for one in problems:
        key = one.key.partition("[")[0]
        origin = next((origins[k] for k in (key, key.rpartition(".")[0]) if k in origins), "")
        if one.origin or (origin == DEFAULT and one.value is None):
            found.append(one)
        else:
            found.append(replace(one, origin=origin))
    return found


# ---- the file ----------------------------------------------------------------------------------------------------


def _from_file(schema: type, path: str | Path) -> tuple[list[_Setting], list[Problem]]:
    name = printable(path)
    root, lines = yaml_lines.read_lines(_read_text(Path(path)), name)
    if not isinstance(root, dict):
        raise ConfigError(Problem(key=str(path), rule=f"must hold sections, e.g. `{next(iter(sections(schema)))}:`"))
    settings: list[_Setting] = []
    problems: list[Problem] = []

    def collect(section: dict, path: tuple) -> None:
        for key, value in section.items():
            at = (*path, key)
            full, origin = ".".join(map(str, at)), f"{name}:{lines[at]}"
            if full in hints(schema):
                settings.append(_Setting(full, (), value, origin))
            elif full not in sections(schema):
                problems.append(unknown_key(full, schema, origin))
            elif isinstance(value, dict):
                collect(value, at)
            elif value is not None:
                example = _a_key_of(schema, full).removeprefix(f"{full}.")
                fix = f"Write `{full}: {{{example}: ...}}`."
                problems.append(problem(full, "is a section and must hold keys", value, fix, origin))

    collect(root, ())
    return settings, problems


def _a_key_of(schema: type, section: str) -> str:
    """For examples in messages."""
    return next(key for key in hints(schema) if key.startswith(f"{section}."))


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


# ---- the command line --------------------------------------------------------------------------------------------


def _from_command_line(schema: type, overrides: Sequence[str]) -> list[_Setting | Problem]:
    found: list[_Setting | Problem] = []
    seen: dict[tuple, str] = {}
    for token in _split(overrides):
        setting = token if isinstance(token, Problem) else _override(schema, *token)
        if isinstance(setting, _Setting):
            path = (setting.key, *setting.inside)
            typed = "=".join(token)
            twin = next((seen[p] for p in seen if p[: len(path)] == path[: len(p)]), None)
            if twin:
                setting = _line(".".join(map(str, path)), "is set twice", f"Keep one of {twin} and {typed}.")
            seen.setdefault(path, typed)
        found.append(setting)
    return found


def _split(overrides: Sequence[str]) -> Iterable[tuple[str, str] | Problem]:
    """Each override as (key, text of the value). Spaces round the `=`, where the shell cuts it, are told to go."""
    rest = list(overrides)
    while rest:
        token = rest.pop(0).removeprefix("--")
        key, _, value = token.partition("=")
        if key and value and key == key.strip() and value == value.strip():
            yield key, value
            continue
        while rest and not _KEY.match(rest[0]):
            token = f"{token} {rest.pop(0)}"
        key, *values = re.split(r"\s*=\s*|\s+", token.strip(), maxsplit=1)
        meant = f"{key or 'section.key'}={''.join(values) or 'VALUE'}"
        rule = "an override is written section.key=value, without spaces round its `=`"
        yield _line(printable(key), rule, f"Write {printable(meant)}.")


def _override(schema: type, typed: str, text: str) -> _Setting | Problem:
    known = hints(schema)
    if typed in sections(schema):
        return _line(typed, "is a section", f"Set one of its keys, e.g. {_a_key_of(schema, typed)}=VALUE.")
    parts = typed.split(".")
    key = next((key for key in accumulate(parts, "{}.{}".format) if key in known), None)
    if key is None:
        return unknown_key(typed, schema, COMMAND_LINE)
    inside: tuple[str | int, ...] = tuple(parts[key.count(".") + 1 :])
    if inside and not (is_mapping(known[key]) and all(inside)):
        return _line(printable(typed), f"unknown key: {key} has no keys of its own", f"Did you mean {key}?")
    value: Any = text
    literal = not inside and (is_text(known[key]) or (known[key] is Any and text[0] not in "[{"))
    if not literal or text in ("null", "~") or text[0] in "\"'":  # else a colon or a number needs no quotes
        try:
            value = yaml_lines.read(text, typed)
        except ConfigError as error:
            return replace(error.problems[0], key=printable(typed), origin=COMMAND_LINE)
    if inside and key == "sampling.logit_bias":
        inside = tuple(token_key(part) for part in inside)
    return _Setting(key, inside, value, COMMAND_LINE)


def _line(key: str, rule: str, fix: str = "") -> Problem:
    return Problem(key=key, rule=rule, fix=fix, origin=COMMAND_LINE)


# ---- settings to a config ----------------------------------------------------------------------------------------


def _check(schema: type, setting: _Setting) -> Problem | None:
    key, hint = setting.key, hints(schema)[setting.key]
    value: Any = setting.value
    for part in reversed(setting.inside):
        value = {part: value}
    if key not in LITERAL_KEYS:
        if re.search(r'\$\{|"\\*\?\?\?"', json.dumps(value)):
            fix = "Write the value itself; `${...}` and `???` are not expanded."
            return problem(key, "must be a plain value", setting.value, fix, setting.origin)
    if is_text(hint) and isinstance(value, str):
        if not value.strip():
            return problem(key, "must not be empty", value, "Leave it out, or write null.", setting.origin)
        if not value.isprintable():
            return problem(key, "must be printable text on one line", value, "", setting.origin)
    return misfit(key, hint, value, setting.origin)


def _merge(schema: type, settings: list[_Setting]) -> tuple[dict[str, Any], dict[str, str]]:
    """The last value of each key and where it came from; pieces of a mapping are put into the mapping so far."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in settings:
        if not setting.inside:
            values[setting.key], origins[setting.key] = setting.value, setting.origin
            continue
        target = values[setting.key] = dict(values.get(setting.key) or {})
        for part in setting.inside[:-1]:
            inner = target.get(part)
            target[part] = dict(inner) if isinstance(inner, dict) else {}
            target = target[part]
        target[setting.inside[-1]] = setting.value
        before = origins.get(setting.key, setting.origin)
        origins[setting.key] = before if before.endswith(setting.origin) else f"{before} and {setting.origin}"
    return values, origins


def _build(schema: type, values: dict[str, Any]) -> Any:
    """The frozen config; `values` have been checked. Free text goes around OmegaConf, which would expand it."""
    free = [key for key in values if mentions(hints(schema)[key], Any) or key in LITERAL_KEYS]
    settled = OmegaConf.create()
    for key in values.keys() - set(free):
        OmegaConf.update(settled, key, values[key], merge=False)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), settled))
    for key in free:
        config = _with(config, key.split("."), values[key])
    return config


def _with(config: Any, path: list[str], value: Any) -> Any:
    """`config` with another value at a path of fields."""
    name, *rest = path
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
