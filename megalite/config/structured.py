"""Structured output: what `SamplingParams.structured_outputs` may say, in vLLM's spelling. Torch-free.

Here values are looked at, not compiled: see text/grammar.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from typing import Any

from megalite import json_text
from megalite.config.typecheck import problem
from megalite.errors import Problem

KINDS = ("json", "json_object", "regex", "choice", "grammar")
MAX_TEXT = 1 << 17
"""Characters of a schema, regular expression or grammar, or of all choices together."""
MAX_CHOICES = 1 << 12
MAX_DEPTH = 64
"""Lists and mappings of a schema within each other."""
_COMPACT = "disable_any_whitespace"


@dataclass(slots=True)
class StructuredOutputsParams:
    """The same from Python, as vLLM's class: exactly one of json, regex, choice, grammar and json_object."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as a mapping or as text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In Lark's or GBNF's syntax."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_fallback: bool = False
    """Of no effect: there is one way to do it."""
    disable_any_whitespace: bool = False
    """JSON without white space between its tokens."""

    def mapping(self) -> dict[str, Any]:
        """What is set, as `structured_outputs` has it."""
        return wanted({one.name: getattr(self, one.name) for one in fields(self) if one.name != "disable_fallback"})


def wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping sets: null and false ask for nothing."""
    return {name: value for name, value in given.items() if value is not None and value is not False}


def structured_problem(key: str, given: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the value of `structured_outputs`, a mapping, as far as it shows without compiling it."""
    unknown = next((name for name in given if name not in (*KINDS, _COMPACT)), None)
    if unknown is not None:
        rule = f"unknown key {str(unknown)[:100]!r}"
        return Problem(key=key, rule=rule, fix=f"The keys are {', '.join(KINDS)} and {_COMPACT}.")
    asked = wanted(given)
    kinds = [name for name in KINDS if name in asked]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none"
        return Problem(key=key, rule=f"must have exactly one of {', '.join(KINDS)}, and has {got}")
    [kind] = kinds
    found = _value_problem(f"{key}.{kind}", kind, asked[kind])
    if found is None and _COMPACT in asked:
        if asked[_COMPACT] is not True:
            found = problem(f"{key}.{_COMPACT}", "must be true or false", asked[_COMPACT])
        elif kind not in ("json", "json_object"):
            found = Problem(key=f"{key}.{_COMPACT}", rule=f"goes with json and json_object, not with {kind}")
    if found is None and not is_installed():
        rule = "needs the package llguidance, which is not installed"
        found = Problem(key=key, rule=rule, fix='Install it with `pip install "megalite[grammar]"`.')
    return found


@cache
def is_installed() -> bool:
    """Whether there is llguidance, the package of the extra `grammar`."""
    return find_spec("llguidance") is not None


def _value_problem(key: str, kind: str, value: Any) -> Problem | None:
    if kind == "json_object":
        return None if value is True else problem(key, "must be true or false", value)
    if kind == "choice":
        return _choice_problem(key, value)
    if kind == "json":
        return _schema_problem(key, value)
    if not isinstance(value, str) or not value.strip():
        return problem(key, "must be text, and not empty", value)
    return _text_problem(key, value)


def _choice_problem(key: str, value: Any) -> Problem | None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) and one for one in value):
        return problem(key, "must be a list of texts, at least one and none empty", value)
    if len(value) > MAX_CHOICES:
        return Problem(key=key, rule=f"has {len(value)} texts, and may have {MAX_CHOICES}")
    return _text_problem(key, "".join(value))


def _schema_problem(key: str, value: Any) -> Problem | None:
    if isinstance(value, str):
        found = _text_problem(key, value)
        if found is not None:
            return found
        try:
            value = json_text.parse(value)
        except json_text.JsonError as error:
            return Problem(key=key, rule=str(error))
    if not isinstance(value, dict):
        return problem(key, "must be a JSON schema: a mapping, or the text of one", value)
    if _is_deep(value):
        return Problem(key=key, rule=f"has more than {MAX_DEPTH} lists and mappings within each other")
    try:
        return _text_problem(key, json.dumps(value, allow_nan=False, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        return Problem(key=key, rule=f"is no JSON: {error}")


def _text_problem(key: str, text: str) -> Problem | None:
    if len(text) > MAX_TEXT:
        return Problem(key=key, rule=f"has {len(text)} characters, and may have {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Problem(key=key, rule=f"has half a surrogate pair at character {error.start}")
    return None


def _is_deep(value: Any) -> bool:
    """Lists and mappings lie within each other more than MAX_DEPTH times. Looks no deeper, so it takes no stack."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        if not inner:
            return False
        level = [one for part in inner for one in part]
    return True
