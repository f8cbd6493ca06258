"""What values must obey: bounds that a schema's fields carry, and the collector of what a config breaks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Protocol

from megalite.config.typecheck import hints, is_optional, problem, sections, shown
from megalite.errors import Problem

_COMPARE = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Bounds of a key: of its number, or of each number in its list or mapping. Null is always within."""

    limits: Mapping[str, float]
    """Limits, by the names of `_COMPARE`."""
    cap: int | None = None
    """Largest number, or most entries, that is accepted for the sake of memory."""
    unit: str = ""
    fix: str = ""
    """What to write instead."""
    needed: str = ""
    """Not empty: null is refused, and this is what to write."""

    def __str__(self) -> str:
        numbers = {name: "2^63 - 1" if limit == 2**63 - 1 else str(limit) for name, limit in self.limits.items()}
        if numbers.keys() == {"at_least", "at_most"}:
            words = f"between {numbers['at_least']} and {numbers['at_most']}"
        elif numbers.keys() == {"at_least"}:
            words = f">= {numbers['at_least']}"
        else:
            words = " and ".join(f"{name.replace('_', ' ')} {number}" for name, number in numbers.items())
        return f"{words} {self.unit}".strip()

    def problem(self, key: str, hint: Any, value: Any) -> Problem | None:
        """What is wrong with the value of `key`, whose type is `hint`."""
        if value is None:
            return Problem(key=key, rule="is needed", fix=self.needed) if self.needed else None
        parts: Iterable[tuple[str, Any]] = [("", value)]
        if isinstance(value, Mapping):
            parts = ((f".{name}", number) for name, number in value.items())
        elif isinstance(value, list | tuple):
            parts = ((f"[{i}]", number) for i, number in enumerate(value))
        size = len(value) if isinstance(value, Mapping | list | tuple) else None
        if self.cap is not None and size is not None and size > self.cap:
            return problem(key, f"must hold at most {self.cap} entries, and has {size}", value, self.fix)
        for part, number in parts if self.limits else ():
            if not all(_COMPARE[name](number, limit) for name, limit in self.limits.items()):
                or_null = ", or null" if is_optional(hint) and not part else ""
                return problem(f"{key}{part}", f"must be {self}{or_null}", number, self.fix)
        if self.cap is not None and size is None and value > self.cap:
            return problem(key, f"must be at most {self.cap}", value, self.fix)
        return None


NO_BOUNDS = Bounds(limits={})


def key(
    default: Any = None, *, cap: int | None = None, unit: str = "", fix: str = "", needed: str = "", **limits: float
) -> Any:
    """A field of the schema with bounds: `at_least`, `above`, `at_most`, `below`, and the fields of `Bounds`."""
    assert limits.keys() <= _COMPARE.keys()
    metadata = {"bounds": Bounds(limits=limits, cap=cap, unit=unit, fix=fix, needed=needed)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def bounds_problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Problems with values out of their bounds, in a section and the sections within."""
    known, inner = hints(type(section)), sections(type(section))
    for one in fields(section):
        value = getattr(section, one.name)
        if one.name in inner:
            yield from bounds_problems(value, f"{prefix}{one.name}.")
        elif value is not one.default or value is None:  # other defaults are within
            bounds = one.metadata.get("bounds", NO_BOUNDS)
            if found := bounds.problem(f"{prefix}{one.name}", known[one.name], value):
                yield found


class ModelFacts(Protocol):
    """What the rules need to know of a model; `ModelConfig` is one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def tie_embeddings(self) -> bool: ...

    @property
    def quantized_as(self) -> str | None: ...


class Rules:
    """Collects what is wrong with the values of a section, or of a config: their bounds first, then whatever rule
    between values is asked for. Of each key the first problem counts."""

    def __init__(self, section: Any, prefix: str = ""):
        self.section = section
        self.prefix = prefix
        self.problems = list(bounds_problems(section, prefix))

    def at(self, name: str) -> Rules:
        """The same collector for a section within this one, by its dotted name."""
        inner = copy(self)
        inner.section, inner.prefix = attrgetter(name)(self.section), f"{self.prefix}{name}."
        return inner

    def need(self, name: str, holds: bool, rule: str, fix: str = "") -> None:
        """Note a problem of the key `name` unless `holds`."""
        if not holds:
            self.note(name, problem(f"{self.prefix}{name}", rule, getattr(self.section, name), fix))

    def refuse(self, name: str, reason: str, fix: str = "") -> None:
        """Note that the value of `name`, whatever it is, can't be used here; `reason` follows the value."""
        value = shown(getattr(self.section, name))
        self.note(name, Problem(key=f"{self.prefix}{name}", rule=f"{value} {reason}", fix=fix))

    def note(self, name: str, *found: Problem | None) -> None:
        """Add what was found about the key `name`, or about parts of it, if it has no problem yet."""
        if self.sound(name):
            self.problems += [one for one in found if one is not None]

    def sound(self, *names: str) -> bool:
        """None of these keys has a problem yet."""
        keys = tuple(f"{self.prefix}{name}" for name in names)
        parts = tuple(f"{key}{mark}" for key in keys for mark in "[.")
        return not any(one.key in keys or one.key.startswith(parts) for one in self.problems)
