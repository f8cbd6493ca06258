"""Prompts in: from the config, a JSON-lines file or standard input, to requests for the scheduler. Torch-free.

A prompt that can't run becomes a `Failure` that names its line; the others run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO

from megalite.chat_template import TemplateError
from megalite.config.chat import CHAT_KEYS, VARIABLES, chat_variables, section_variables, variables_problem
from megalite.config.sampling import prompt_problem, sampling_from_mapping, sampling_problems
from megalite.config.schema import InputSection, SamplingParams
from megalite.errors import ConfigError, Problem
from megalite.inference.outputs import RequestOutput
from megalite.inference.request import Request
from megalite.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or a chat: a list of {role, content}."""

MAX_LINE = 1 << 26
"""Longest line read from an input file, bytes."""
_KEYS = ("prompt", *CHAT_KEYS, "id", "sampling")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model that prompts are made for, and the limits it runs with."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: Iterable[int] = ()
    """Of the model's configuration; the tokenizer's own counts too."""
    seed: int = 0
    """engine.seed."""

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end the output."""
        ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ids |= set(self.eos_token_ids)
            if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
                ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A prompt that can't run."""

    id: str
    error: str
    """Starts with where the prompt stands, e.g. `prompts.jsonl:17`."""
    prompt: str | None = None

    def output(self) -> RequestOutput:
        """What takes the place of its result."""
        return RequestOutput(request_id=self.id, prompt=self.prompt, prompt_token_ids=[], error=self.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputBatch:
    """All prompts of a run. Every id occurs once, in `requests` or in `failures`."""

    requests: tuple[Request, ...]
    """In input order."""
    failures: tuple[Failure, ...]
    """In input order."""
    texts: Mapping[str, str]
    """The prompt as text by id, where there is one."""
    order: tuple[str, ...]
    """Every id, in input order."""
    digest: str
    """SHA-256 of what was read, and of what the section gives to chat templates."""

    def without(self, ids: Iterable[str]) -> InputBatch:
        """The same input, of which `ids` need not run."""
        left_out = frozenset(ids)
        requests = tuple(request for request in self.requests if request.id not in left_out)
        failures = tuple(failure for failure in self.failures if failure.id not in left_out)
        return replace(self, requests=requests, failures=failures)


def make_request(
    prompt: Prompt,
    params: SamplingParams,
    served: Served,
    *,
    id: str,
    index: int,
    where: str = "prompt",
    chat_variables: Mapping[str, Any] | None = None,
) -> tuple[Request, str | None]:
    """The request for a prompt, and the prompt as text if it is not token ids.

    `params` have passed `sampling_problems`, but for max_tokens 0, which only scores the prompt. `index`: place in the
    input, which decides the seed where params have none; `where` names the prompt in messages. `chat_variables` reach
    the chat template. ConfigError: this prompt can't run.
    """
    problem = prompt_problem(prompt, key=where, vocab_size=served.vocab_size)
    if problem is not None:
        raise ConfigError(problem)
    if params.stop and served.tokenizer is None:
        raise _refused(where, "stop strings need a tokenizer, and the model has none", "Use stop_token_ids.")
    ids, text = _token_ids(prompt, served, where, chat_variables or {})
    room = served.max_model_len - len(ids)
    if room < (0 if params.max_tokens == 0 else 1):
        rule = f"the prompt has {len(ids)} tokens, and with the output it must fit in {served.max_model_len}"
        raise _refused(where, rule, "Shorten it, or raise engine.max_model_len.")
    seed = params.seed if params.seed is not None else derived_seed(served.seed, index)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    stops = served.stop_ids(params)
    request = Request(
        id=id, prompt_token_ids=tuple(ids), params=params, seed=seed, max_tokens=max_tokens, stop_token_ids=stops
    )
    return request, text


def derived_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` (its place in the input), a hash that is the same everywhere; 0 to 2^63 - 1."""
    digest = blake2b(b"%d %d" % (seed, index), digest_size=8, person=b"megalite.prompt").digest()
    return int.from_bytes(digest, "little") >> 1


def _refused(where: str, rule: str, fix: str = "") -> ConfigError:
    return ConfigError(Problem(key=where, rule=rule, fix=fix))


def _token_ids(
    prompt: Prompt, served: Served, where: str, variables: Mapping[str, Any]
) -> tuple[Sequence[int], str | None]:
    """Token ids of a prompt of the right shape, and its text."""
    is_chat = not isinstance(prompt, str) and isinstance(prompt[0], dict)
    if not (is_chat or isinstance(prompt, str)):
        return prompt, None
    if served.tokenizer is None:
        raise _refused(
            where, "the model has no tokenizer.json", "Give the prompt as token ids, or set model.tokenizer."
        )
    try:
        text = served.tokenizer.apply_chat_template(list(prompt), **variables) if is_chat else prompt
        ids = served.tokenizer.encode(text, add_special_tokens=not is_chat)  # a template writes them itself
    except (TemplateError, ValueError) as error:
        raise _refused(where, str(error)) from None
    if not ids:
        raise _refused(where, "an empty prompt: the tokenizer makes no token of it")
    beyond = next((token_id for token_id in ids if token_id >= served.vocab_size), None)
    if beyond is not None:
        rule = f"the tokenizer makes token id {beyond} of it, and the model's are 0 to {served.vocab_size - 1}"
        raise _refused(where, rule, "The tokenizer is not this model's.")
    return ids, text


# ---- many prompts


@dataclass(frozen=True, slots=True)
class _Entry:
    """One prompt as it was given, or why it could not be read."""

    where: str
    prompt: Any = None
    id: Any = None
    sampling: Any = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template sees beside the messages."""
    error: str | None = None


class _Collector:
    """Turns entries into requests and failures, each with an id of its own."""

    def __init__(self, served: Served, defaults: SamplingParams, variables: Mapping[str, Any]):
        """`variables`: what chat templates see, where an entry does not say otherwise."""
        self.served = served
        self.defaults = defaults
        self.variables = variables
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.texts: dict[str, str] = {}
        self.places: dict[str, str] = {}
        """Where each id was used first, in input order."""

    def add(self, entry: _Entry) -> None:
        index = len(self.places)
        own_id, problem = _chosen_id(entry, index)
        if own_id in self.places:
            problem = problem or f"{entry.where}: the id {own_id!r} is used by {self.places[own_id]} already."
            own_id = entry.where
            while own_id in self.places:
                own_id += "'"
        self.places[own_id] = entry.where
        try:
            if problem is not None:
                raise ConfigError(problem)
            params = self._params(entry)
            request, text = make_request(
                entry.prompt,
                params,
                self.served,
                id=own_id,
                index=index,
                where=entry.where,
                chat_variables={**self.variables, **entry.variables},
            )
        except ConfigError as error:
            prompt = entry.prompt if isinstance(entry.prompt, str) else None
            self.failures.append(Failure(id=own_id, error=str(error), prompt=prompt))
            return
        self.requests.append(request)
        if text is not None:
            self.texts[own_id] = text

    def _params(self, entry: _Entry) -> SamplingParams:
        if entry.sampling is None:
            return self.defaults
        prefix = f"{entry.where}: sampling."
        params = sampling_from_mapping(self.defaults, entry.sampling, prefix=prefix)
        problems = sampling_problems(params, prefix=prefix, vocab_size=self.served.vocab_size)
        if problems:
            raise ConfigError(*problems)
        return params

    def batch(self, digest: str) -> InputBatch:
        return InputBatch(
            requests=tuple(self.requests),
            failures=tuple(self.failures),
            texts=self.texts,
            order=tuple(self.places),
            digest=digest,
        )


def _chosen_id(entry: _Entry, index: int) -> tuple[str, str | None]:
    """The id of an entry (by default its place in the input, from 0), and what is wrong with the entry already."""
    given = entry.id
    if entry.error is not None or given is None:
        return str(index), entry.error
    if type(given) is int:
        return str(given), None
    if not isinstance(given, str) or not given:
        return str(index), f"{entry.where}: id: must be a text that is not empty, or a whole number, got {given!r}."
    try:
        given.encode()
    except UnicodeEncodeError:
        return str(index), f"{entry.where}: id: has half a surrogate pair, got {given!r}."
    return given, None


def read_inputs(
    section: InputSection, defaults: SamplingParams, served: Served, *, stdin: BinaryIO | None = None
) -> InputBatch:
    """Read every prompt that `section` names, sampled by `defaults` unless its line says otherwise.

    `stdin` stands in for standard input. ConfigError: the input as a whole can't be read, or is empty.
    """
    variables = section_variables(section)
    collector = _Collector(served, defaults, variables)
    digest = sha256(json.dumps(variables, default=repr).encode() if variables else b"")
    with _opened(section, stdin) as lines:
        entries = _inline(section.prompts or []) if lines is None else _parsed(lines, _name(section))
        for raw, entry in entries:
            digest.update(b"%d:" % len(raw) + raw)
            collector.add(entry)
    if served.tokenizer is not None:
        served.tokenizer.close()
    if not collector.places:
        key = "input.file" if section.file is not None else "input.prompts"
        raise ConfigError(Problem(key=key, rule="has no prompts"))
    return collector.batch(digest.hexdigest())


def _name(section: InputSection) -> str:
    return "stdin" if section.file == "-" else Path(str(section.file)).name


@contextmanager
def _opened(section: InputSection, stdin: BinaryIO | None) -> Iterator[BinaryIO | None]:
    """The lines to read, or None for inline prompts."""
    if section.file is None:
        yield None
    elif section.file == "-":
        yield stdin or sys.stdin.buffer
    else:
        try:
            file = open(section.file, "rb")
        except OSError as error:
            raise ConfigError(Problem(key="input.file", value=section.file, rule=f"{error.strerror}")) from error
        with file:
            yield file


def _inline(prompts: list[Any]) -> Iterator[tuple[bytes, _Entry]]:
    for index, prompt in enumerate(prompts):
        yield repr(prompt).encode(errors="surrogatepass"), _Entry(f"input.prompts[{index}]", prompt)


def _parsed(lines: BinaryIO, name: str) -> Iterator[tuple[bytes, _Entry]]:
    """Each line that is not blank, with what it says."""
    number = 0
    while raw := lines.readline(MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(MAX_LINE)
            yield raw, _Entry(where, error=f"{where}: the line is longer than {MAX_LINE >> 20} MiB.")
        elif raw.strip():
            try:
                entry = _entry(raw, where)
            except ValueError as error:
                entry = _Entry(where, error=f"{where}: {error}.")
            yield raw.strip(), entry


def _entry(raw: bytes, where: str) -> _Entry:
    """What one line says. ValueError: it is not what a line must be."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}") from None
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError('must be a JSON object such as {"prompt": "..."}')
    for key in value:
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            hint = f"perhaps {close[0]!r} is meant" if close else f"the keys are {', '.join(_KEYS)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
    if ("prompt" in value) == ("messages" in value):
        raise ValueError("needs either a prompt or messages")
    prompt = value.get("prompt", value.get("messages"))
    if "messages" in value and not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
        raise ValueError("messages must be a list of {role, content}, at least one")
    wrong = variables_problem(value)
    if wrong is not None:
        raise ValueError(str(wrong).rstrip("."))
    variables = chat_variables(value)
    if variables and not ("messages" in value or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict))):
        raise ValueError(f"{' and '.join(VARIABLES)} are for chats, and the prompt is none")
    return _Entry(where, prompt, value.get("id"), value.get("sampling"), variables)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
