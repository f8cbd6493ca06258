"""What Python programs pass to `LLM`, in the plain forms that the rest works on: a config, prompts, parameters, a bar.

Arrays and tensors are known by their `tolist`, so neither numpy nor torch is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from megalite.config import vllm
from megalite.config.sampling import sampling_problems
from megalite.config.schema import EngineSection, InferConfig, SamplingParams
from megalite.config.structured import StructuredOutputsParams
from megalite.config.typecheck import hints, misfit, problem, sections
from megalite.config.validate import engine_problems, num_ranks, world_size_problem
from megalite.errors import ConfigError, Problem
from megalite.monitor.progress import ProgressBar
from megalite.preflight import read_model

_ENGINE_NAMES = {"num_gpu_blocks_override": "num_kv_blocks"}
"""vLLM's names of the engine's keys."""
_KEYS = ("prompt", "prompt_token_ids")
_EMPTY_KEYS = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "cache_salt", "type")
"""Keys of vLLM's prompts, accepted where their value is empty."""


# ---- the config


def engine_section(given: Mapping[str, Any], others: Iterable[str]) -> EngineSection:
    """The engine's keys among arguments of `LLM`, of which None leaves the default.

    ConfigError: there are arguments that are neither the engine's nor vLLM's; `others`: those that may have been meant.
    """
    known = EngineSection.__dataclass_fields__
    given = {_ENGINE_NAMES.get(name, name): value for name, value in given.items()}
    for name in vllm.LLM.sort_out({name: value for name, value in given.items() if name not in known}):
        close = get_close_matches(name, [*known, *others], n=1)
        fix = f"Did you mean {close[0]}?" if close else f"The engine's are {', '.join(known)}."
        raise ConfigError(Problem(key="LLM", rule="unknown argument", value=name, fix=fix))
    return EngineSection(**{name: value for name, value in given.items() if name in known and value is not None})


def check_config(config: InferConfig, world_size: int) -> None:
    """ConfigError with every wrong type or broken rule of a config that was made in Python."""
    misfits = [
        misfit(f"{name}.{key}", hint, getattr(getattr(config, name), key))
        for name, schema in sections(InferConfig).items()
        for key, hint in hints(schema).items()
    ]
    problems = [one for one in misfits if one is not None]
    if not problems:
        command = f"deepspeed --num_gpus {num_ranks(config)} SCRIPT"
        problems = engine_problems(config, read_model(config))
        problems += filter(None, [world_size_problem(config, world_size, command=command)])
    if problems:
        raise ConfigError(*problems)


# ---- prompts and sampling parameters


def as_prompts(prompts: Any) -> list[tuple[Any, str | None]]:
    """One prompt or several in plain forms, each with the text that came with token ids.

    A prompt is a text, token ids (any sequence or array of whole numbers), `{"prompt": ...}` or `{"prompt_token_ids":
    ...}`; what is none of these is left for `prompt_problem` to refuse. ConfigError: a mapping of other keys.
    """
    prompts = plain(prompts)
    is_ids = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int)
    if is_ids or isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        prompts = [prompts]
    return [_as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _as_prompt(prompt: Any, where: str) -> tuple[Any, str | None]:
    prompt = plain(prompt)
    if not isinstance(prompt, Mapping):
        return prompt, None
    for key, value in prompt.items():
        if key not in _KEYS and (key not in _EMPTY_KEYS or value):
            raise ConfigError(Problem(key=where, rule=f"unknown key {key!r}", fix=f"The keys are {', '.join(_KEYS)}."))
    text, ids = prompt.get("prompt"), plain(prompt.get("prompt_token_ids"))
    if ids is None and text is None:
        raise ConfigError(problem(where, "must have a prompt or prompt_token_ids", dict(prompt)))
    if ids is None:
        return plain(text), None
    if text is not None and not isinstance(text, str):
        raise ConfigError(problem(f"{where}.prompt", "beside prompt_token_ids must be their text", text))
    return ids, text


def plain(value: Any) -> Any:
    """`value` with arrays, tensors and numbers of numpy's or torch's as lists and numbers of Python's, also inside
    lists, tuples, ranges and sets, which become lists. Anything else is left as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, StructuredOutputsParams):
        return value.mapping()
    if isinstance(value, tuple | range | set | frozenset):
        value = list(value)
    if isinstance(value, list) and any(hasattr(kind, "tolist") for kind in set(map(type, value))):
        return [plain(one) for one in value]
    return value


def plain_params(params: SamplingParams) -> SamplingParams:
    """A copy of `params` in plain values, which later changes of the original do not reach."""
    try:
        copy = params.clone()
    except RecursionError:
        raise ConfigError("sampling params: a value is nested too deeply") from None
    for field in fields(copy):
        setattr(copy, field.name, plain(getattr(copy, field.name)))
    return copy


def params_of_each(params: Any, count: int) -> list[SamplingParams]:
    """A copy of the parameters for each of `count` prompts, given once or one for each. ConfigError: other things."""
    each = list(params) if isinstance(params, list | tuple) else [params] * count
    if len(each) != count:
        raise ConfigError(f"generate: {count} prompts but {len(each)} sampling params")
    copies: dict[int, SamplingParams] = {}
    for one in each:
        if not isinstance(one, SamplingParams):
            raise ConfigError(f"generate: sampling params must be SamplingParams, got {one!r:.80}")
        if id(one) not in copies:
            copies[id(one)] = plain_params(one)
    return [copies[id(one)] for one in each]


def check_params(each: Iterable[SamplingParams], vocab_size: int) -> None:
    """ConfigError with everything that is wrong with any of them."""
    distinct = {id(one): one for one in each}.values()
    problems = [found for one in distinct for found in sampling_problems(one, prefix="", vocab_size=vocab_size)]
    if problems:
        raise ConfigError(*problems)


# ---- the progress bar


class _CallersBar(ProgressBar):
    """A bar that the caller makes, as tqdm is made."""

    def __init__(self, make: Callable[..., Any], total: int):
        super().__init__(total, enabled=False)
        self.bar = make(total=total, desc="prompts", dynamic_ncols=True)

    def advance(self, *, prompts: int = 0, tokens: int = 0) -> None:
        if prompts:
            self.bar.update(prompts)

    def close(self) -> None:
        self.bar.close()


def progress_bar(use_tqdm: bool | Callable[..., Any], total: int, *, shown: bool) -> ProgressBar:
    """`use_tqdm` as of `LLM.generate`; `shown`: this rank is the one that shows it."""
    if callable(use_tqdm) and shown:
        return _CallersBar(use_tqdm, total)
    return ProgressBar(total, enabled=bool(use_tqdm) and shown)
