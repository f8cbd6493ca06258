"""What a value of one config field may look like, in types and in words; stricter than Python and than OmegaConf.

No value is converted, except a whole number where a number is wanted: `"2"`, `2.0` and `true` are not 2.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shlex
import types
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megalite.errors import Problem

VLLM_NAMES = {
    "tensor_parallel_size": "parallel.tp",
    "pipeline_parallel_size": "parallel.pp",
    "data_parallel_size": "parallel.dp",
    "model": "model.path",
    "max_new_tokens": "sampling.max_tokens",
}
"""Names that users know from elsewhere, and ours."""

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "booleans", str: "texts", Any: "values"}


class _Shown(str):
    """A value as it would be typed, for messages."""

    def __repr__(self) -> str:
        return str(self)


def shown(value: object, limit: int = 80) -> str:
    """`value` for a message: as YAML spells it, on one line, shortened."""
    if value is None or isinstance(value, bool):
        return _Shown({None: "null", True: "true", False: "false"}[value])
    text = repr(value)
    return _Shown(text if len(text) <= limit else f"{text[: limit - 20]} ... {text[-15:]}")


def problem(key: str, rule: str, value: object, fix: str = "", origin: str = "") -> Problem:
    """A `Problem` whose value is shown even when it is null, and never takes more than a line."""
    return Problem(key=key, rule=rule, value=shown(value), fix=fix, origin=origin)


@cache
def hints(schema: type) -> dict[str, Any]:
    """Type of each key of a config class by its dotted name: `section.key`, plain names in a section."""
    types_of = get_type_hints(schema)
    found: dict[str, Any] = {}
    for field in fields(schema):
        hint = types_of[field.name]
        if is_dataclass(hint):
            found |= {f"{field.name}.{key}": inner for key, inner in hints(hint).items()}
        else:
            found[field.name] = hint
    return found


@cache
def sections(schema: type) -> dict[str, type]:
    """The section class behind each dotted name that is a section; a section may hold further ones."""
    types_of = get_type_hints(schema)
    found: dict[str, type] = {}
    for field in fields(schema):
        hint = types_of[field.name]
        if is_dataclass(hint):
            found[field.name] = hint
            found |= {f"{field.name}.{name}": inner for name, inner in sections(hint).items()}
    return found


def unknown_key(key: str, schema: type, origin: str = "") -> Problem:
    """The problem of a key that `schema` doesn't have, with the nearest one that it has."""
    near = nearest_key(key, schema)
    fix = f"Did you mean {near}?" if near else "--help lists all keys."
    return Problem(key=printable(key), rule="unknown key", fix=fix, origin=origin)


def nearest_key(key: str, schema: type) -> str:
    """The known key that was probably meant, or an empty string."""
    known = [*hints(schema), *sections(schema)]
    *section, name = key.split(".")
    if VLLM_NAMES.get(name) in known and key not in known:
        return VLLM_NAMES[name]
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    here = [other for other in known if other.split(".")[:-1] == section]
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.6) or difflib.get_close_matches(key, known, n=1)
    return close[0] if close else ""


def nearest_path(path: str | Path, *, folders: bool = False) -> str:
    """For a path that leads nowhere: what is there instead, as advice; empty if nothing is alike."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_advice(path.parent, path.name)
    if path.parts[:1] and path.parts[0].startswith("~"):
        return f"`~` is not expanded here; write {printable(os.path.expanduser(path))}."
    if not path.parent.is_dir():
        return f"There is no folder {printable(path.parent)} either."
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or not folders]
    except PermissionError:
        return f"The folder {printable(path.parent)} may not be read."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {printable(path.parent / close[0])}?" if close else ""


def gguf_advice(folder: str | Path, name: str) -> str:
    """What to do with a GGUF file, which is not read: `folder` is where it lies, a hub id too."""
    source, file = json.dumps(str(folder)), json.dumps(name)
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"m = M.from_pretrained({source}, gguf_file={file}); m.hf_quantizer = None; "
        f'm.config.__dict__.pop("quantization_config", None); m.save_pretrained("NEW_FOLDER"); '
        f'T.from_pretrained({source}, gguf_file={file}).save_pretrained("NEW_FOLDER")'
    )
    return (
        "GGUF is not read. Give the folder or hub id of the model that it was made from; or, with transformers, gguf "
        f"and accelerate installed, make one of it:\n  python -c {shlex.quote(code)}"
    )


def printable(text: object) -> str:
    """`text` as it is if a terminal can show it on one line, else escaped."""
    text = str(text)
    return text if text.isprintable() and len(text) <= 120 else shown(text)


def is_text(hint: Any) -> bool:
    """The field holds text (or null)."""
    return str in (get_args(hint) if _is_union(hint) else (hint,))


def holds_text(hint: Any) -> bool:
    """The field holds text somewhere, other than one of a few words."""
    return hint in (str, Any) or (get_origin(hint) is not Literal and any(map(holds_text, get_args(hint))))


def is_mapping(hint: Any) -> bool:
    """The field holds a mapping (or null)."""
    return any(get_origin(one) is dict for one in (get_args(hint) if _is_union(hint) else (hint,)))


def is_free(hint: Any) -> bool:
    """The field holds values whose types are not settled by the schema."""
    return hint is Any or any(is_free(inner) for inner in get_args(hint))


def is_optional(hint: Any) -> bool:
    """The field may be null."""
    return types.NoneType in get_args(hint)


def with_floats(hint: Any, value: Any) -> Any:
    """`value`, which fits `hint`, with its whole numbers as floats where the hint says float."""
    if _is_union(hint):
        return None if value is None else with_floats(get_args(hint)[0], value)
    if hint is float:
        return float(value)
    if get_origin(hint) is list:
        return [with_floats(get_args(hint)[0], one) for one in value]
    if get_origin(hint) is dict:
        return {key: with_floats(get_args(hint)[1], one) for key, one in value.items()}
    return value


def misfit(key: str, hint: Any, value: object, origin: str = "") -> Problem | None:
    """The problem if `value` is not of type `hint`; for a list or mapping that of its first wrong element."""
    if _is_union(hint):
        inner = [one for one in get_args(hint) if one is not types.NoneType]
        return None if value is None else _misfit(key, inner[0], value, origin, " or null")
    return _misfit(key, hint, value, origin, "")


def _misfit(key: str, hint: Any, value: object, origin: str, or_null: str) -> Problem | None:
    if hint is Any:
        return _free_misfit(key, value, origin)
    kind = get_origin(hint)
    if kind is Literal:
        return _choice_misfit(key, get_args(hint), value, origin, or_null)
    if kind is list:
        if not isinstance(value, list | tuple):
            (element,) = get_args(hint)
            fix = "" if isinstance(value, dict) or value is None else f"For one, write [{_inline(value)}]."
            return problem(key, f"must be a list of {_PLURALS[element]}{or_null}", value, fix, origin)
        found = (misfit(f"{key}[{i}]", get_args(hint)[0], one, origin) for i, one in enumerate(value))
        return next(filter(None, found), None)
    if kind is dict:
        return _mapping_misfit(key, hint, value, origin, or_null)
    fits = type(value) is hint or (hint is float and type(value) is int)
    if isinstance(value, float) and hint is float:
        return None if math.isfinite(value) else problem(key, "must be a finite number", value, "", origin)
    return None if fits else problem(key, f"must be {_WORDS[hint]}{or_null}", value, _type_fix(hint, value), origin)


def _choice_misfit(key: str, choices: tuple, value: object, origin: str, or_null: str) -> Problem | None:
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return None
    close = difflib.get_close_matches(str(value).lower(), [str(choice) for choice in choices], n=1, cutoff=0.5)
    fix = f"Did you mean {close[0]}?" if close else ""
    return problem(key, f"must be one of {', '.join(map(str, choices))}{or_null}", value, fix, origin)


def _mapping_misfit(key: str, hint: Any, value: object, origin: str, or_null: str) -> Problem | None:
    key_type, value_type = get_args(hint)
    if not isinstance(value, dict):
        return problem(key, f"must be a mapping {{key: value}}{or_null}", value, "", origin)
    for name, inner in value.items():
        if type(name) is not key_type:
            return problem(key, f"its keys must be {_PLURALS[key_type]}", name, _type_fix(key_type, name), origin)
        found = misfit(f"{key}.{printable(name)}", value_type, inner, origin)
        if found:
            return found
    return None


def _free_misfit(key: str, value: object, origin: str) -> Problem | None:
    """Anything goes, but the keys of mappings are text."""
    if isinstance(value, list | tuple):
        return next(filter(None, (_free_misfit(f"{key}[{i}]", one, origin) for i, one in enumerate(value))), None)
    if isinstance(value, dict):
        return _mapping_misfit(key, dict[str, Any], value, origin, "")
    return None


def _type_fix(hint: type, value: object) -> str:
    """How to write `value` so that it has type `hint`, where that can be told."""
    if hint is str and not isinstance(value, list | dict) and value is not None:
        return f'Put it in quotes: "{_inline(value)}".'
    if hint in (int, float) and isinstance(value, str):
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            return ""
        without = "a leading zero" if value.lstrip("+-")[:1] == "0" else "quotes"
        return f"Write {number}, without {without}." if math.isfinite(number) else ""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if hint is bool:
        word = str(value).lower()
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}.get(word)
        return f"Write {meant or word}." if meant or word in ("true", "false") else ""
    return ""


def _inline(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 40 else shown(value)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)
