"""The YAML of config files: PyYAML's safe loader with the plain values of YAML 1.2, and the line of each key.

`yes`, `on`, `010`, `0x1F`, `1:30` and dates are text; keys may not repeat; aliases and tags are refused. What `write`
gives, `read` gives back exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml  # has no types of its own

from megalite.errors import ConfigError, Problem

_TAG = "tag:yaml.org,2002:"
_DIGITS = r"(?:0|[1-9][0-9]{0,39})"
_PLAIN_VALUES = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_DIGITS}",
    "float": rf"[-+]?(?:{_DIGITS}\.[0-9]*(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
}
"""What is no text; PyYAML reads these as YAML 1.2 does."""

Lines = dict[tuple[Any, ...], int]
"""The line, from 1, on which the value of each key begins; keys as paths of mappings that are not inside a list."""


class _Refused(yaml.MarkedYAMLError):  # type: ignore[misc]
    """YAML, but not of the kind that is read."""

    def __init__(self, complaint: str, mark: yaml.Mark):
        super().__init__(problem=complaint, problem_mark=mark)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("aliases (*name) are not read; write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_TAG, "!!")
            raise _Refused(f"the tag {tag!r} is not read; write the plain value", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused("a key must be one word or number, not a list or mapping", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise _Refused(f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return dict(super().construct_mapping(node, deep=True))

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        if re.search("[\ud800-\udfff]", node.value):
            raise _Refused("text holds half of a surrogate pair, which is not Unicode", node.start_mark)
        return str(node.value)

    def lines(self, node: yaml.Node, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
        if isinstance(node, yaml.MappingNode):
            for key_node, child in node.value:
                inner = (*path, self.construct_object(key_node))
                yield inner, child.start_mark.line + 1
                yield from self.lines(child, inner)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar(_TAG + "float", text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Only double quotes escape line breaks of every kind (PyYAML folds U+0085 and U+2028 into spaces elsewhere).
    return dumper.represent_scalar(_TAG + "str", value, style=None if value.isprintable() else '"')


for _name, _pattern in _PLAIN_VALUES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [None])
_Loader.add_constructor(_TAG + "str", _Loader.construct_yaml_str)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


def read(text: str, name: str) -> Any:
    """The one document of `text`; `name` is what messages call it.

    ConfigError names the line of anything that is not read.
    """
    return read_lines(text, name)[0]


def read_lines(text: str, name: str) -> tuple[Any, Lines]:
    """As `read`, with the lines of the keys. An empty document is an empty mapping."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return ({}, {}) if node is None else (loader.construct_document(node), dict(loader.lines(node)))
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, name)) from error
    except RecursionError as error:
        raise ConfigError(Problem(key=name, rule="the value is nested too deeply to be read")) from error


def write(value: object, *, inline: bool = False) -> str:
    """`value` (dicts, lists, text, numbers, booleans, null) as YAML; keys keep their order.

    `inline`: on one line, as it could be typed on the command line.
    """
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30, default_flow_style=inline
    )
    return text.removesuffix("\n").removesuffix("\n...") if inline else text


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    """The line and the parser's complaint; for a character that YAML forbids there is only a position."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(key=name, rule=f"not YAML: {str(error).splitlines()[0]}")
    mark = error.problem_mark or error.context_mark
    where = name if mark is None else f"{name}:{mark.line + 1}"
    complaint = error.problem or error.context or "it can't be parsed"
    if isinstance(error, _Refused):
        return Problem(key=where, rule=complaint)
    if complaint.startswith("but ") and error.context:
        complaint = f"{error.context}, {complaint}"
    fix = "Indent with spaces, not tabs." if r"'\t'" in complaint else ""
    if "mapping values are not allowed" in complaint or complaint.endswith("got ':'"):
        fix = "Put text that contains a colon in quotes."
    return Problem(key=where, rule=f"not YAML: {complaint}", fix=fix)
