"""Prompts and sampling parameters as Python programs hold them, brought to the plain forms that `inputs` reads.

Arrays and tensors are known by their `tolist`, so neither numpy nor torch is needed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from megalite.config.schema import SamplingParams
from megalite.config.typecheck import problem
from megalite.errors import ConfigError, Problem

_KEYS = ("prompt", "prompt_token_ids")
_EMPTY_KEYS = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "cache_salt", "type")
"""Of vLLM's prompts; accepted where they say nothing."""


class GivenPrompt(NamedTuple):
    """One prompt in a plain form."""

    prompt: Any
    """Text, a list of token ids or a chat; or what is none of these, for `prompt_problem` to refuse."""
    text: str | None = None
    """The text that belongs to token ids, if it came with them."""


def as_prompts(prompts: Any) -> list[GivenPrompt]:
    """What `generate` was given: one prompt or several, each a text, token ids (any sequence or array of whole
    numbers), `{"prompt": ...}` or `{"prompt_token_ids": ...}`. ConfigError: a mapping that is neither.
    """
    prompts = plain(prompts)
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) or _are_ids(prompts):
        prompts = [prompts]
    return [_as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _are_ids(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int)


def _as_prompt(prompt: Any, where: str) -> GivenPrompt:
    prompt = plain(prompt)
    if not isinstance(prompt, Mapping):
        return GivenPrompt(prompt)
    for key, value in prompt.items():
        if key not in _KEYS and (key not in _EMPTY_KEYS or value):
            raise ConfigError(Problem(key=where, rule=f"unknown key {key!r}", fix=f"The keys are {', '.join(_KEYS)}."))
    text, ids = prompt.get("prompt"), plain(prompt.get("prompt_token_ids"))
    if ids is None and text is None:
        raise ConfigError(problem(where, "must have a prompt or prompt_token_ids", dict(prompt)))
    if ids is None:
        return GivenPrompt(plain(text))
    if text is not None and not isinstance(text, str):
        raise ConfigError(problem(f"{where}.prompt", "beside prompt_token_ids must be their text", text))
    return GivenPrompt(ids, text)


def plain(value: Any) -> Any:
    """Arrays, tensors and numbers of numpy's or torch's as Python's own; lists, also inside tuples and the like of
    other sequences of numbers. Anything else is left as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | range | set | frozenset):
        value = list(value)
    if isinstance(value, list) and any(hasattr(one, "tolist") for one in value):
        return [plain(one) for one in value]
    return value


def plain_params(params: SamplingParams) -> SamplingParams:
    """A copy of `params` in plain values, which later changes of the original do not reach."""
    copy = params.clone()
    for field in fields(copy):
        setattr(copy, field.name, plain(getattr(copy, field.name)))
    return copy
