"""Prompts in: from the config, a JSON-lines file or standard input, to requests for the scheduler. Torch-free.

A prompt that can't run becomes a `Failure` that names its line; the others run.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import chain
from typing import Any, BinaryIO, Protocol

from megalite.config.chat import section_variables
from megalite.config.sampling import price_problem, prompt_problem, sampling_from_mapping, sampling_problems
from megalite.config.schema import InputSection, SamplingParams
from megalite.errors import ConfigError, Problem
from megalite.inference.constraints import leaves_nothing, spellings
from megalite.inference.io.entries import Entry, given_id, read_entries
from megalite.inference.outputs import RequestOutput
from megalite.inference.request import Request
from megalite.text.chat_template import TemplateError
from megalite.text.tokenizer import Tokenizer, TokenizerError

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or a chat: a list of {role, content}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimits:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A prompt and what is asked of it, not tokenised yet."""

    prompt: Prompt
    params: SamplingParams
    """Have passed `sampling_problems`, but for max_tokens 0, which only scores the prompt."""
    id: str
    index: int
    """Place in the input, which decides the seed where params have none."""
    where: str = "prompt"
    """Names the prompt in messages."""
    chat_variables: Mapping[str, Any] = field(default_factory=dict)
    """Reach the chat template."""


class TokenizerFailed(ConfigError):
    """The tokenizer fails at a prompt, which is no fault of the prompt's."""


Encoded = tuple[Sequence[int], str | None] | ConfigError
"""Token ids of a prompt, and its text where it is not ids itself; or why there are none."""


class Together(Protocol):
    """What the ranks of a run do together when they are given prompts; every rank calls every method alike."""

    def once(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives on one rank of the replica, on all of them."""

    def compare(self, digest: bytes) -> None:
        """ConfigError on every rank, naming those that differ, unless all pass the same 32 bytes."""


def make_requests(
    asked: Sequence[Asked], limits: PromptLimits, together: Together | None = None
) -> list[tuple[Request, str | None] | ConfigError]:
    """The request for each prompt, and the prompt as text if it is not token ids; or why this one can't run.

    `together`: of the ranks of a run, all of which call this. One of each replica renders and tokenises. ConfigError:
    they were not given the same, or do not make the same requests of it.
    """
    if together is not None:
        together.compare(_digest((one.id, one.prompt, dict(one.chat_variables), one.params) for one in asked))
    refused = [_refusal(one, limits) for one in asked]
    written = [one for one, error in zip(asked, refused, strict=True) if error is None and not _is_ids(one.prompt)]
    if together is None or not written:
        encoded = iter(_encode(written, limits))
    else:
        encoded = iter(_unpack(together.once(lambda: _pack(_encode(written, limits)))))
    made: list[tuple[Request, str | None] | ConfigError] = []
    for one, error in zip(asked, refused, strict=True):
        found = error or ((one.prompt, None) if _is_ids(one.prompt) else next(encoded))
        made.append(found if isinstance(found, ConfigError) else _request(one, limits, *found))
    if together is not None:
        requests = (one[0] for one in made if not isinstance(one, ConfigError))
        together.compare(_digest((one.id, one.prompt_token_ids, one.seed, one.max_tokens) for one in requests))
    return made


def _digest(values: Iterable[object]) -> bytes:
    digest = sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.digest()


def make_request(
    prompt: Prompt, params: SamplingParams, limits: PromptLimits, **asked: Any
) -> tuple[Request, str | None]:
    """As `make_requests`, for one prompt; `asked`: the other fields of `Asked`. ConfigError: it can't run."""
    [made] = make_requests([Asked(prompt=prompt, params=params, **asked)], limits)
    if isinstance(made, ConfigError):
        raise made
    return made


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not isinstance(prompt[0], dict)


def _refusal(one: Asked, limits: PromptLimits) -> ConfigError | None:
    """What is wrong with a prompt before anything is made of it."""
    if isinstance(one.prompt, list | tuple) and one.prompt and _is_ids(one.prompt):
        refused = _too_long(len(one.prompt), one, limits)  # before each of them is looked at
        if refused is not None:
            return refused
    problem = prompt_problem(one.prompt, key=one.where, vocab_size=limits.vocab_size)
    if problem is not None:
        return ConfigError(problem)
    if limits.tokenizer is None and one.params.stop:
        return _refused(one.where, "stop strings need a tokenizer, and the model has none", "Use stop_token_ids.")
    if limits.tokenizer is None and one.params.bad_words:
        return _refused(one.where, "bad_words need a tokenizer, and the model has none", "Use logit_bias.")
    if limits.tokenizer is None and not _is_ids(one.prompt):
        fix = "Give the prompt as token ids, or set model.tokenizer."
        return _refused(one.where, "the model has no tokenizer.json", fix)
    return None


def _request(
    one: Asked, limits: PromptLimits, ids: Sequence[int], text: str | None
) -> tuple[Request, str | None] | ConfigError:
    params = one.params
    room = limits.max_model_len - len(ids)
    refused = _too_long(len(ids), one, limits)
    if refused is not None:
        return refused
    max_tokens = room if params.max_tokens is None else max(0, min(params.max_tokens, room))
    price = price_problem(
        params, key=one.where, max_tokens=max_tokens, prompt_tokens=len(ids), vocab_size=limits.vocab_size
    )
    if price is not None:
        return ConfigError(price)
    stops, allowed = limits.stop_ids(params), params.allowed_token_ids
    try:
        bad_words = spellings(tuple(params.bad_words), limits.tokenizer) if params.bad_words else ()
    except ValueError as error:
        return _refused(one.where, str(error))
    if allowed is not None and leaves_nothing(allowed, bad_words, stops, params.min_tokens):
        rule = "allowed_token_ids, bad_words and min_tokens together can leave no token to choose"
        return _refused(one.where, rule, "Allow more ids.")
    request = Request(
        id=one.id,
        prompt_token_ids=tuple(ids),
        params=params,
        seed=params.seed if params.seed is not None else derived_seed(limits.seed, one.index),
        max_tokens=max_tokens,
        stop_token_ids=stops,
        bad_words=bad_words,
    )
    return request, text


def _too_long(count: int, one: Asked, limits: PromptLimits) -> ConfigError | None:
    """What is wrong with a prompt of `count` tokens."""
    room = limits.max_model_len - count
    if room >= (-1 if one.params.max_tokens == 0 else 1):  # of a text that is only scored the last token is no input
        return None
    rule = f"the prompt has {count} tokens, and with the output it must fit in {limits.max_model_len}"
    return _refused(one.where, rule, "Shorten it, or raise engine.max_model_len.")


def _far_too_long(text: str, where: str, limits: PromptLimits) -> ConfigError | None:
    """What is wrong with a text that is so long that it need not be tokenised, which takes time, to be refused."""
    if len(text) <= limits.max_model_len:
        return None
    most = limits.tokenizer.most_characters(limits.max_model_len, is_ascii=text.isascii())
    if len(text) <= most:
        return None
    rule = (
        f"the text has {len(text)} characters, and no text of more than {most} is taken where prompt and output must "
        f"fit in {limits.max_model_len} tokens"
    )
    return _refused(where, rule, "Shorten it, or raise engine.max_model_len.")


def derived_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` (its place in the input), a hash that is the same everywhere; 0 to 2^63 - 1."""
    digest = blake2b(b"%d %d" % (seed, index), digest_size=8, person=b"megalite.prompt").digest()
    return int.from_bytes(digest, "little") >> 1


def _refused(where: str, rule: str, fix: str = "") -> ConfigError:
    return ConfigError(Problem(key=where, rule=rule, fix=fix))


def _encode(written: Sequence[Asked], limits: PromptLimits) -> list[Encoded]:
    """Token ids of prompts that are texts or chats."""
    texts = [_text(one, limits) for one in written]
    encoded: list[Encoded] = list(texts)
    for is_chat in (False, True):  # a template writes the special tokens itself
        places = [
            i for i, one in enumerate(written) if isinstance(texts[i], str) and is_chat != isinstance(one.prompt, str)
        ]
        if places:
            together = limits.tokenizer.encode_batch([texts[i] for i in places], add_special_tokens=not is_chat)
            for i, ids in zip(places, together, strict=True):
                encoded[i] = _checked(ids, texts[i], written[i].where, limits)
    return encoded


def _text(one: Asked, limits: PromptLimits) -> str | ConfigError:
    """A prompt as text, its chat template applied."""
    text = one.prompt
    try:
        if not isinstance(text, str):
            text = limits.tokenizer.chat_text(list(text), **one.chat_variables)
    except TemplateError as error:
        return _refused(one.where, str(error))
    return _far_too_long(text, one.where, limits) or text


def _checked(ids: list[int] | ValueError, text: str, where: str, limits: PromptLimits) -> Encoded:
    if isinstance(ids, TokenizerError):
        return TokenizerFailed(Problem(key=where, rule=str(ids)))
    if isinstance(ids, ValueError):
        return _refused(where, str(ids))
    if not ids:
        return _refused(where, "an empty prompt: the tokenizer makes no token of it")
    beyond = next((token_id for token_id in ids if token_id >= limits.vocab_size), None)
    if beyond is not None:
        rule = f"the tokenizer makes token id {beyond} of it, and the model's are 0 to {limits.vocab_size - 1}"
        return _refused(where, rule, "The tokenizer is not this model's.")
    return ids, text


def _pack(encoded: Sequence[Encoded]) -> bytes:
    """Encoded prompts for the way to other ranks; `_unpack` is the inverse."""
    found = [one for one in encoded if not isinstance(one, ConfigError)]
    head = [
        [str(one), isinstance(one, TokenizerFailed)] if isinstance(one, ConfigError) else [len(one[0]), one[1]]
        for one in encoded
    ]
    return json.dumps(head).encode() + b"\n" + array("i", chain.from_iterable(ids for ids, _ in found)).tobytes()


def _unpack(data: bytes) -> list[Encoded]:
    head, _, tail = data.partition(b"\n")
    ids = array("i", tail)
    encoded: list[Encoded] = []
    start = 0
    for count, text in json.loads(head):
        if isinstance(count, str):
            encoded.append((TokenizerFailed if text else ConfigError)(count))
            continue
        encoded.append((ids[start : start + count], text))
        start += count
    return encoded


# ---- many prompts


class _Collector:
    """Turns entries into what is asked and failures, each with an id of its own."""

    def __init__(
        self, limits: PromptLimits, defaults: SamplingParams, variables: Mapping[str, Any], named: Collection[str]
    ):
        """`variables`: what chat templates see, where an entry does not say otherwise; `named`: the ids that entries
        give themselves, which none gets by its place.
        """
        self.limits = limits
        self.named = named
        self.defaults = defaults
        self.variables = variables
        self.asked: list[Asked] = []
        self.failures: dict[str, Failure] = {}
        self.places: dict[str, str] = {}
        """Where each id was used first, in input order."""

    def add(self, entry: Entry) -> None:
        index = len(self.places)
        given, wrong = given_id(entry)
        own_id, problem = str(index) if given is None else given, entry.error or wrong
        if given is not None and own_id in self.places:
            problem = problem or f"{entry.where}: the id {own_id!r} is used by {self.places[own_id]} already."
        if own_id in self.places or (given is None and own_id in self.named):
            own_id = entry.where
            while own_id in self.places or own_id in self.named:
                own_id += "'"
        self.places[own_id] = entry.where
        try:
            if problem is not None:
                raise ConfigError(problem)
            params = self._params(entry)
        except ConfigError as error:
            self.fail(own_id, entry.prompt, error)
            return
        self.asked.append(
            Asked(
                prompt=entry.prompt,
                params=params,
                id=own_id,
                index=index,
                where=entry.where,
                chat_variables={**self.variables, **entry.variables},
            )
        )

    def fail(self, id: str, prompt: Any, error: ConfigError) -> None:
        self.failures[id] = Failure(id=id, error=str(error), prompt=prompt if isinstance(prompt, str) else None)

    def _params(self, entry: Entry) -> SamplingParams:
        if entry.sampling is None:
            return self.defaults
        prefix = f"{entry.where}: sampling."
        params = sampling_from_mapping(self.defaults, entry.sampling, prefix=prefix)
        problems = sampling_problems(params, prefix=prefix, vocab_size=self.limits.vocab_size)
        if problems:
            raise ConfigError(*problems)
        return params

    def failed(self) -> tuple[Failure, ...]:
        """In input order."""
        return tuple(self.failures[id] for id in self.places if id in self.failures)

    def batch(self, digest: str, together: Together | None) -> InputBatch:
        requests: list[Request] = []
        texts: dict[str, str] = {}
        results = make_requests(self.asked, self.limits, together)
        for one, made in zip(self.asked, results, strict=True):
            if isinstance(made, ConfigError):
                self.fail(one.id, one.prompt, made)
                continue
            request, text = made
            requests.append(request)
            if text is not None:
                texts[one.id] = text
        return InputBatch(
            requests=tuple(requests),
            failures=self.failed(),
            texts=texts,
            order=tuple(self.places),
            digest=digest,
        )


def read_inputs(
    section: InputSection,
    defaults: SamplingParams,
    limits: PromptLimits,
    *,
    stdin: BinaryIO | None = None,
    together: Together | None = None,
) -> InputBatch:
    """Read every prompt that `section` names, sampled by `defaults` unless its line says otherwise.

    `stdin` stands in for standard input; `together`: see `make_requests`. ConfigError: the input as a whole can't be
    read, is empty, or is not the same on every rank.
    """
    collector, digest = _collect(section, defaults, limits, stdin)
    batch = collector.batch(digest, together)
    if limits.tokenizer is not None:
        limits.tokenizer.close()
    if not collector.places:
        key = "input.file" if section.file is not None else "input.prompts"
        raise ConfigError(Problem(key=key, rule="has no prompts"))
    return batch


def input_problems(section: InputSection, defaults: SamplingParams, vocab_size: int | None) -> list[str]:
    """What is wrong with the prompts that `section` names, as far as it shows before a model or tokenizer is read."""
    limits = PromptLimits(tokenizer=None, vocab_size=vocab_size or 1 << 62, max_model_len=1 << 62)
    collector, _ = _collect(section, defaults, limits, None)
    for one in collector.asked:
        problem = prompt_problem(one.prompt, key=one.where, vocab_size=vocab_size)
        if problem is not None:
            collector.fail(one.id, one.prompt, ConfigError(problem))
    return [failure.error for failure in collector.failed()]


def _collect(
    section: InputSection, defaults: SamplingParams, limits: PromptLimits, stdin: BinaryIO | None
) -> tuple[_Collector, str]:
    """All entries, and the digest of what was read."""
    variables = section_variables(section)
    digest = sha256(json.dumps(variables, default=repr).encode() if variables else b"")
    entries = []
    for raw, entry in read_entries(section, stdin):
        digest.update(b"%d:" % len(raw) + raw)
        entries.append(entry)
    named = {given for given, _ in map(given_id, entries) if given is not None}
    collector = _Collector(limits, defaults, variables, named)
    for entry in entries:
        collector.add(entry)
    return collector, digest.hexdigest()
