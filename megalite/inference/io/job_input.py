"""The prompts of a batch job: from the config, a JSON-lines file or standard input. Torch-free.

A prompt that can't run gets a result that names its line and says why; the others run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, BinaryIO

from megalite.config.chat import section_variables
from megalite.config.sampling import prompt_problem, sampling_from_mapping, sampling_problems
from megalite.config.schema import InputSection, SamplingParams
from megalite.errors import ConfigError, Problem
from megalite.inference.io.entries import Entry, given_id, read_entries
from megalite.inference.io.inputs import PromptLimits, RawRequest, make_requests
from megalite.inference.outputs import RequestOutput
from megalite.inference.request import Request

if TYPE_CHECKING:
    from megalite.inference.run import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class InputBatch:
    """All prompts of a run. Every id occurs once, in `requests` or in `failures`."""

    requests: tuple[Request, ...]
    """In input order."""
    failures: tuple[RequestOutput, ...]
    """Results of the prompts that can't run, in input order; each error names the prompt's line."""
    order: tuple[str, ...]
    """Every id, in input order."""
    digest: str
    """SHA-256 of what was read, and of what the section gives to chat templates."""

    def without(self, ids: Collection[str]) -> InputBatch:
        """The same input, of which `ids` need not run."""
        return replace(
            self,
            requests=tuple(request for request in self.requests if request.id not in ids),
            failures=tuple(failure for failure in self.failures if failure.request_id not in ids),
        )


def read_inputs(
    section: InputSection,
    defaults: SamplingParams,
    limits: PromptLimits,
    *,
    stdin: BinaryIO | None = None,
    ranks: Ranks | None = None,
) -> InputBatch:
    """Read every prompt that `section` names, sampled by `defaults` unless its line says otherwise.

    `stdin` stands in for standard input; `ranks`: see `make_requests`. ConfigError: the input as a whole can't be read,
    is empty, or is not the same on every rank.
    """
    read, digest = _read(section, defaults, limits.vocab_size, stdin)
    found: dict[str, Request | RequestOutput] = {}
    raw = [one for one in read.values() if isinstance(one, RawRequest)]
    made = iter(make_requests(raw, limits, ranks))
    for name, one in read.items():
        if isinstance(one, RawRequest):
            request = next(made)
            found[name] = _failure(name, one.prompt, request) if isinstance(request, ConfigError) else request
        else:
            found[name] = one
    if limits.tokenizer is not None:
        limits.tokenizer.close()
    if not found:
        key = "input.file" if section.file is not None else "input.prompts"
        raise ConfigError(Problem(key=key, rule="has no prompts"))
    return InputBatch(
        requests=tuple(one for one in found.values() if isinstance(one, Request)),
        failures=tuple(one for one in found.values() if isinstance(one, RequestOutput)),
        order=tuple(found),
        digest=digest,
    )


def input_problems(section: InputSection, defaults: SamplingParams, limits: PromptLimits | None) -> list[str]:
    """What is wrong with the prompts that `section` names; without `limits`, as far as it shows of no model."""
    if limits is not None:
        return [str(one.error) for one in read_inputs(section, defaults, limits).failures]
    read, _ = _read(section, defaults, 1 << 62, None)
    problems = [
        prompt_problem(one.prompt, key=one.where, vocab_size=None) if isinstance(one, RawRequest) else one.error
        for one in read.values()
    ]
    return [str(problem) for problem in problems if problem is not None]


def _read(
    section: InputSection, defaults: SamplingParams, vocab_size: int, stdin: BinaryIO | None
) -> tuple[dict[str, RawRequest | RequestOutput], str]:
    """The requests that the input asks for, by an id of their own in input order, and the digest of what was read.

    A line that asks for none has its result there, which says why.
    """
    variables = section_variables(section)
    digest = sha256(json.dumps(variables, default=repr).encode() if variables else b"")
    entries = []
    for line, entry in read_entries(section, stdin):
        digest.update(b"%d:" % len(line) + line)
        entries.append((entry, *given_id(entry)))
    named = {given for _, given, _ in entries if given is not None}
    found: dict[str, RawRequest | RequestOutput] = {}
    places: dict[str, str] = {}
    for index, (entry, given, wrong) in enumerate(entries):
        name, problem = given or str(index), entry.error or wrong
        if given in places:
            problem = problem or f"{entry.where}: the id {given!r} is used by {places[given]} already."
        if name in places or (given is None and name in named):
            name = entry.where
            while name in places or name in named:
                name += "'"
        places[name] = entry.where
        try:
            if problem is not None:
                raise ConfigError(problem)
            found[name] = RawRequest(
                prompt=entry.prompt,
                params=_params(entry, defaults, vocab_size),
                id=name,
                index=index,
                where=entry.where,
                chat_variables={**variables, **entry.variables},
                lora=entry.lora,
            )
        except ConfigError as error:
            found[name] = _failure(name, entry.prompt, error)
    return found, digest.hexdigest()


def _failure(name: str, prompt: Any, error: ConfigError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(request_id=name, prompt=text, prompt_token_ids=[], error=str(error))


def _params(entry: Entry, defaults: SamplingParams, vocab_size: int) -> SamplingParams:
    if entry.sampling is None:
        return defaults
    prefix = f"{entry.where}: sampling."
    params = sampling_from_mapping(defaults, entry.sampling, prefix=prefix)
    problems = sampling_problems(params, prefix=prefix, vocab_size=vocab_size)
    if problems:
        raise ConfigError(*problems)
    return params
