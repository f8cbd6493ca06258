"""The YAML that config files are written in: values with line numbers in, exact text out.

A strict subset of YAML 1.2: `yes`, `on`, `010`, `0x1F`, `1:30` and dates are text, keys may not repeat, and aliases and
tags are refused. What `write` gives, `read` gives back exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from megalite.errors import ConfigError, Problem

_TAG = "tag:yaml.org,2002:"
_DIGITS = r"(?:0|[1-9][0-9]{0,39})"
_PATTERNS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(rf"^[-+]?{_DIGITS}$"),
    "float": re.compile(
        rf"^[-+]?(?:{_DIGITS}\.[0-9]*(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.inf|\.Inf|\.INF)$|^(?:\.nan|\.NaN|\.NAN)$"
    ),
}
_READERS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise _Refused(problem="aliases (*name) are not read; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}

    def ignore_aliases(self, data):
        return True

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)


for _name, _pattern in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _pattern, [None])


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar(_TAG + "float", text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Only double quotes escape line breaks of every kind (PyYAML folds U+0085 and U+2028 into spaces elsewhere).
    return dumper.represent_scalar(_TAG + "str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not of the kind that is read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a mapping and the line it begins on, from 1. `value` is a dict of entries for a mapping."""

    value: object
    line: int

    def plain(self) -> object:
        """The value without line numbers."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return self.value


def read(text: str, name: str) -> Entry:
    """The one document of `text`; mappings that are not inside a list keep the line of each key.

    `name` is what messages call the text. Raises ConfigError naming the line for anything that is not read.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return Entry({}, 1) if node is None else _entry(node)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, name)) from error
    except RecursionError as error:
        raise ConfigError(Problem(key=name, rule="the value is nested too deeply to be read")) from error


def write(value: object) -> str:
    """`value` (dicts, lists, text, numbers, booleans, null) as YAML; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30, default_flow_style=False)


def write_inline(value: object) -> str:
    """`value` on one line, as it could be typed on the command line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    """The line and the parser's complaint; for a character that YAML forbids there is only a position."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(key=name, rule=f"not YAML: {str(error).splitlines()[0]}")
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f":{mark.line + 1}"
    if isinstance(error, _Refused):
        return Problem(key=f"{name}{line}", rule=error.problem)
    complaint = error.problem or error.context or "it can't be parsed"
    if complaint.startswith("but ") and error.context:
        complaint = f"{error.context}, {complaint}"
    fix = "Indent with spaces, not tabs." if r"'\t'" in complaint else ""
    if "mapping values are not allowed" in complaint or complaint.endswith("got ':'"):
        fix = "Put text that contains a colon in quotes."
    return Problem(key=f"{name}{line}", rule=f"not YAML: {complaint}", fix=fix)


def _entry(node: yaml.Node) -> Entry:
    if not isinstance(node, yaml.MappingNode):
        return Entry(_plain(node), node.start_mark.line + 1)
    return Entry({key: _entry(child) for key, child in _items(node)}, node.start_mark.line + 1)


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        _known_tag(node, "map")
        return {key: _plain(child) for key, child in _items(node)}
    if isinstance(node, yaml.SequenceNode):
        _known_tag(node, "seq")
        return [_plain(child) for child in node.value]
    return _scalar(node)


def _items(node: yaml.MappingNode):
    _known_tag(node, "map")
    seen = set()
    for key_node, child in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _refuse("a key must be one word or number, not a list or mapping", key_node)
        key = _scalar(key_node)
        if key in seen:
            _refuse(f"the key {key!r} is given twice", key_node)
        seen.add(key)
        yield key, child


def _scalar(node: yaml.ScalarNode) -> object:
    kind = node.tag.removeprefix(_TAG)
    if kind in _PATTERNS and _PATTERNS[kind].match(node.value):
        return _READERS[kind](node.value)
    _known_tag(node, "str")
    if _SURROGATE.search(node.value):
        _refuse("text holds half of a surrogate pair, which is not Unicode", node)
    return node.value


def _known_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != _TAG + kind:
        _refuse(f"the tag {node.tag.replace(_TAG, '!!')!r} is not read; write the plain value", node)


def _refuse(complaint: str, node: yaml.Node) -> None:
    raise _Refused(problem=complaint, problem_mark=node.start_mark)
