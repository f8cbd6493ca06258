"""`--help` and `--print-config`: every key of the schema in words, and every value of a config with its origin."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import Field, fields
from functools import cache, reduce
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megalite.config import schema, yaml_lines
from megalite.config.load import SCHEMAS, Kind, Loaded
from megalite.config.rules import NO_BOUNDS
from megalite.config.typecheck import hints, sections

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null", Any: "any"}
_WIDTH = 110


def explain(kind: Kind) -> str:
    """The sections and keys of a config: type, default and meaning, as the schema's docstrings say."""
    return "\n\n".join(_explain_fields(SCHEMAS[kind]))


def _explain_fields(owner: type) -> list[str]:
    """A block of text for each key and section of a config class."""
    classes, known, notes = sections(owner), hints(owner), meanings()
    blocks = []
    for field in fields(owner):
        section = classes.get(field.name)
        if section is None:
            blocks.append(_explain_key(field, field.name, known[field.name], notes[owner.__name__].get(field.name, "")))
            continue
        title = textwrap.fill(notes[section.__name__][""], _WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
        keys = [textwrap.indent(block, "  ") for block in _explain_fields(section)]
        blocks.append("\n".join([f"{field.name}:", *([title] if title.strip() else []), *keys]))
    return blocks


def _explain_key(field: Field[Any], name: str, hint: Any, note: str) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    bounds = field.metadata.get("bounds", NO_BOUNDS)
    kind = ", ".join(filter(None, (_words(hint), str(bounds), f"at most {bounds.cap}" if bounds.cap else "")))
    needed = "required" if bounds.needed else f"default {yaml_lines.write(default, inline=True)}"
    head = f"{name}  ({kind}; {needed})"
    return "\n".join([head, *textwrap.wrap(note, _WIDTH, initial_indent="    ", subsequent_indent="    ")])


def _words(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(map(str, inner))
    if get_origin(hint) is list:
        return "list" if inner[0] is Any else f"list of {_words(inner[0])}s"
    if get_origin(hint) is dict:
        return "mapping"
    return " or ".join(_words(one) for one in inner)


@cache
def meanings() -> dict[str, dict[str, str]]:
    """For each class of the schema the strings under its fields; its own docstring under an empty name."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            own = found[node.name] = {"": inspect.cleandoc(ast.get_docstring(node) or "")}
            for before, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                    own[ast.unparse(before.target)] = inspect.cleandoc(ast.literal_eval(after.value)).replace("\n", " ")
    return found


def table(loaded: Loaded[Any]) -> str:
    """Every value and where it came from, one line a key."""
    rows = []
    for key in hints(type(loaded.config)):
        value = reduce(getattr, key.split("."), loaded.config)
        rows.append((key, yaml_lines.write(value, inline=True), loaded.origins[key]))
    keys = max(len(key) for key, _, _ in rows)
    values = max(len(text) for _, text, _ in rows if len(text) <= 40)
    return "\n".join(f"{key:{keys}}  {text:{values}}  {origin}" for key, text, origin in rows)
