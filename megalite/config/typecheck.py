"""What a value of one config field may look like, in types and in words; stricter than Python and than OmegaConf.

No value is converted, except a whole number where a number is wanted: `"2"`, `2.0` and `true` are not 2.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megalite.errors import Problem

NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "tensor_parallel_size": ("parallel.tp",),
    "pipeline_parallel_size": ("parallel.pp",),
    "data_parallel_size": ("parallel.dp",),
    "tensor_model_parallel_size": ("parallel.tp",),
    "pipeline_model_parallel_size": ("parallel.pp",),
    "model": ("model.path",),
    "model_name_or_path": ("model.path",),
    "max_new_tokens": ("sampling.max_tokens",),
    "served_model_name": ("server.model_names",),
    "lora_modules": ("lora",),
    "lr": ("optimizer.learning_rate",),
    "min_lr": ("optimizer.min_learning_rate",),
    "lr_warmup_iters": ("optimizer.warmup_steps",),
    "warmup_ratio": ("optimizer.warmup_steps",),
    "wd": ("optimizer.weight_decay",),
    "max_grad_norm": ("optimizer.gradient_clipping",),
    "clip_grad": ("optimizer.gradient_clipping",),
    "adam_epsilon": ("optimizer.eps",),
    "adam_beta1": ("optimizer.betas",),
    "adam_beta2": ("optimizer.betas",),
    "bf16": ("model.dtype",),
    "fp16": ("model.dtype",),
    "torch_dtype": ("model.dtype",),
    "max_steps": ("train.steps", "hybrid.steps"),
    "train_iters": ("train.steps", "hybrid.steps"),
    "epochs": ("train.steps", "hybrid.steps"),
    "num_train_epochs": ("train.steps", "hybrid.steps"),
    "batch_size": ("train.micro_batch_size", "hybrid.prompts_per_step"),
    "per_device_train_batch_size": ("train.micro_batch_size", "train.micro_batch_tokens"),
    "train_micro_batch_size_per_gpu": ("train.micro_batch_size", "train.micro_batch_tokens"),
    "global_batch_size": ("train.gradient_accumulation_steps", "hybrid.prompts_per_step"),
    "gradient_checkpointing": ("train.recompute",),
    "activation_checkpointing": ("train.recompute",),
    "logging_steps": ("train.log_every", "hybrid.log_every"),
    "save_steps": ("train.save_every", "hybrid.save_every"),
    "eval_steps": ("train.eval_every",),
    "save_interval": ("train.save_every", "hybrid.save_every"),
    "output_dir": ("output.folder",),
    "resume_from_checkpoint": ("output.resume",),
    "max_seq_length": ("data.sequence_length",),
    "max_length": ("data.sequence_length", "sampling.max_tokens"),
    "seq_length": ("data.sequence_length",),
    "lora_r": ("train.lora.r",),
    "num_generations": ("hybrid.samples_per_prompt",),
    "beta": ("hybrid.kl_coefficient",),
    "epsilon": ("hybrid.clip_low",),
    "reward_funcs": ("hybrid.reward",),
}
"""Names that users know from elsewhere, and ours, of which a config has the first that its schema has."""

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
def _names(schema: type) -> dict[str, Any]:
    """Type of each key and section of a config class by its dotted name, in the order of the schema."""
    known = get_type_hints(schema)
    found: dict[str, Any] = {}
    for field in fields(schema):
        hint = found[field.name] = known[field.name]
        if _is_section(hint):
            found |= {f"{field.name}.{name}": inner for name, inner in _names(hint).items()}
    return found


def _is_section(hint: Any) -> bool:
    return is_dataclass(hint)


def hints(schema: type) -> dict[str, Any]:
    """Type of each key of a config class by its dotted name: `section.key`, plain names in a section."""
    return _keys_and_sections(schema)[0]


def sections(schema: type) -> dict[str, type]:
    """The section class behind each dotted name that is a section; a section may hold further ones."""
    return _keys_and_sections(schema)[1]


@cache
def _keys_and_sections(schema: type) -> tuple[dict[str, Any], dict[str, type]]:
    parts: tuple[dict[str, Any], dict[str, type]] = {}, {}
    for name, hint in _names(schema).items():
        parts[_is_section(hint)][name] = hint
    return parts


def unknown_key(key: str, schema: type, origin: str = "") -> Problem:
    """The problem of a key that `schema` doesn't have, with the nearest one that it has."""
    known = list(_names(schema))
    section, _, name = key.rpartition(".")
    last = {other: other.rpartition(".")[2] for other in known}
    here = [other for other in known if other.rpartition(".")[0] == section]
    near = [found] if (found := key_of(name, schema)) else []
    for some in (here, known) if not (section and here) else (here,):  # in a section that there is, a key of it
        alike = difflib.get_close_matches(name, [last[other] for other in some], n=1)
        near = near or [other for other in some if [last[other]] == alike]
    fix = f"Did you mean {near[0]}?" if near else "--help lists all keys."
    return Problem(key=printable(key), rule="unknown key", fix=fix, origin=origin)


def key_of(name: str, schema: type) -> str | None:
    """The key that a name without its section means, here or elsewhere; None: it means none."""
    known = _names(schema)
    ours = (key for key in NAMES_ELSEWHERE.get(name, ()) if key in known)
    return next(ours, None) or next((key for key in known if key.rpartition(".")[2] == name), None)


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
    """What to do with a GGUF file, which no job reads as it is: `folder` is where it lies, a hub id too."""
    file = Path(folder) / name
    command = f"megalite convert --model {shlex.quote(str(file))} --dtype bfloat16 --out NEW_FOLDER"
    if not file.exists():
        download = f"hf download {shlex.quote(str(folder))} {shlex.quote(name)} --local-dir ."
        command = f"{download} && {command.replace(shlex.quote(str(file)), shlex.quote(name))}"
    return (
        "GGUF is not read as it is. Give the folder or hub id of the model that it was made from, or make one of it:"
        f"\n  {command}"
    )


def printable(text: object) -> str:
    """`text` as it is if a terminal can show it on one line, else escaped."""
    text = str(text)
    return text if text.isprintable() and len(text) <= 120 else shown(text)


def is_text(hint: Any) -> bool:
    """The field holds text (or null)."""
    return hint is str or is_optional(hint) and get_args(hint)[0] is str


def is_mapping(hint: Any) -> bool:
    """The field holds a mapping (or null)."""
    return get_origin(get_args(hint)[0] if is_optional(hint) else hint) is dict


def is_optional(hint: Any) -> bool:
    """The field may be null."""
    return types.NoneType in get_args(hint)


def mentions(hint: Any, *some: Any) -> bool:
    """One of these types is in the field's type, however deep."""
    return hint in some or any(mentions(inner, *some) for inner in get_args(hint))


def with_floats(hint: Any, value: Any) -> Any:
    """`value`, which fits `hint`, with its whole numbers as floats where the hint says float."""
    if is_optional(hint):
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
    found = _misfit(key, hint, value)
    return None if found is None else replace(found, origin=origin)


def _misfit(key: str, hint: Any, value: object) -> Problem | None:
    or_null = ""
    if is_optional(hint):
        if value is None:
            return None
        hint, or_null = get_args(hint)[0], " or null"
    if hint is Any:
        return _any_misfit(key, value)
    kind, inner = get_origin(hint), get_args(hint)
    if kind is list:
        if not isinstance(value, list | tuple):
            fix = "" if isinstance(value, dict) or value is None else f"For one, write [{_inline(value)}]."
            return problem(key, f"must be a list of {_PLURALS[inner[0]]}{or_null}", value, fix)
        parts: Iterable[tuple[str, object]] = ((f"{key}[{i}]", one) for i, one in enumerate(value))
    elif kind is dict:
        if not isinstance(value, dict):
            return problem(key, f"must be a mapping {{key: value}}{or_null}", value)
        odd = [name for name in value if type(name) is not inner[0]]
        if odd:
            return problem(key, f"its keys must be {_PLURALS[inner[0]]}", odd[0], _type_fix(inner[0], odd[0]))
        parts = ((f"{key}.{printable(name)}", one) for name, one in value.items())
    else:
        return _scalar_misfit(key, hint, value, or_null)
    return next(filter(None, (_misfit(part, inner[-1], one) for part, one in parts)), None)


def _any_misfit(key: str, value: object) -> Problem | None:
    """Anything goes, however deep, but the keys of mappings are text."""
    left = [(key, value)]
    while left:
        place, one = left.pop()
        if isinstance(one, dict):
            odd = [name for name in one if type(name) is not str]
            if odd:
                return problem(place, f"its keys must be {_PLURALS[str]}", odd[0], _type_fix(str, odd[0]))
            left += reversed([(f"{place}.{printable(name)}", inner) for name, inner in one.items()])
        elif isinstance(one, list | tuple):
            left += reversed([(f"{place}[{i}]", inner) for i, inner in enumerate(one)])
    return None


def _scalar_misfit(key: str, hint: Any, value: object, or_null: str) -> Problem | None:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return None
        close = difflib.get_close_matches(str(value).lower(), map(str, choices), n=1, cutoff=0.5)
        fix = f"Did you mean {close[0]}?" if close else ""
        return problem(key, f"must be one of {', '.join(map(str, choices))}{or_null}", value, fix)
    if type(value) is hint or (hint is float and type(value) is int):
        finite = not isinstance(value, float) or math.isfinite(value)
        return None if finite else problem(key, "must be a finite number", value)
    return problem(key, f"must be {_WORDS[hint]}{or_null}", value, _type_fix(hint, value))


def _type_fix(hint: type, value: object) -> str:
    """How to write `value` so that it has type `hint`; empty where that is unknown."""
    text = str(value)
    if hint is str and not isinstance(value, list | dict) and value is not None:
        return f'Put it in quotes: "{_inline(value)}".'
    if hint is bool:
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        word = meant.get(text.lower(), text.lower())
        return f"Write {word}." if word in ("true", "false") else ""
    if hint in (int, float) and re.fullmatch(r"[-+]?\d{1,20}" + (r"(\.\d+)?" if hint is float else ""), text):
        without = "a leading zero" if re.match(r"[-+]?0\d", text) else "quotes"
        return f"Write {hint(text)}, without {without}."
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    return ""


def _inline(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 40 else shown(value)
