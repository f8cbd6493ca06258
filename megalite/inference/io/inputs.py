"""Prompts to requests for the scheduler: chats become texts, texts token ids, and all that would keep a prompt from
running is found. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any

from megalite.config.sampling import price_problem, prompt_problem
from megalite.config.schema import GeneratingConfig, SamplingParams
from megalite.config.structured import KINDS, wanted
from megalite.errors import ConfigError, Problem
from megalite.inference.constraints import leaves_nothing, spellings
from megalite.inference.io.packed import pack, unpack
from megalite.inference.request import Request
from megalite.text.chat_template import TemplateError
from megalite.text.detokenizer import TokenizerError
from megalite.text.grammar import GrammarError, grammar_text, grammars_of
from megalite.text.tokenizer import MAX_TEXT, MAX_TOKEN, Tokenizer
from megalite.weights.folder import ModelFolder

if TYPE_CHECKING:
    from megalite.inference.run import Ranks

Prompt = str | list[int] | tuple[int, ...] | list[dict[str, Any]]
"""Text, token ids, or a chat: a list of {role, content}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimits:
    """What a prompt must fit: the model's tokenizer and vocabulary, and the length it runs with."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: Iterable[int] = ()
    """End-of-sequence ids of the model's configuration; the tokenizer's own counts too."""
    seed: int = 0
    """engine.seed."""
    adapters: tuple[str, ...] = ()
    """Names of the LoRA adapters that are loaded."""

    @classmethod
    def of(cls, folder: ModelFolder, config: GeneratingConfig) -> PromptLimits:
        """The limits of a model that is not loaded: what it runs with may be shorter. CheckpointError: its tokenizer is
        damaged."""
        return cls(
            tokenizer=folder.tokenizer,
            vocab_size=folder.model.vocab_size,
            max_model_len=config.engine.max_model_len or folder.model.max_position_embeddings,
            eos_token_ids=folder.model.eos_token_ids,
            seed=config.engine.seed,
            adapters=tuple(config.lora),
        )

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end the output."""
        ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ids |= set(self.eos_token_ids)
            if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
                ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRequest:
    """A prompt with its sampling before it is checked and tokenised."""

    prompt: Any
    """A `Prompt`, or what is none and will be refused."""
    params: SamplingParams
    """Have passed `sampling_problems`, but for max_tokens 0, which only scores the prompt."""
    id: str
    index: int
    """Place in the input, which decides the seed where params have none."""
    where: str = "prompt"
    """Names the prompt in messages."""
    chat_variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    text: str | None = None
    """The text of a prompt of token ids, where it is known."""
    lora: str | None = None
    """Name of the adapter to run with; None or empty: none."""
    special_tokens: bool = True
    """Text in a chat's contents that spells a special token becomes that token."""

    @property
    def ids(self) -> list[int] | tuple[int, ...] | None:
        """The prompt, where it is token ids."""
        is_ids = isinstance(self.prompt, list | tuple) and self.prompt and not isinstance(self.prompt[0], dict)
        return self.prompt if is_ids else None


class TokenizerFailed(ConfigError):
    """The tokenizer fails at a prompt, which is no fault of the prompt's."""


class GrammarRefused(ConfigError):
    """The form of its output that a prompt's sampling asks for can't be followed; the rule begins with its kind."""


Encoded = tuple[list[int], str] | ConfigError
"""Token ids of a prompt and the text that they are of, or why there are none."""


def make_requests(
    raw: list[RawRequest], limits: PromptLimits, ranks: Ranks | None = None
) -> list[Request | ConfigError]:
    """The request for each prompt, or why it can't run.

    `ranks`: those of a run, all of which call this; one of each replica renders and tokenises. ConfigError: they were
    not given the same, or do not make the same requests of it.
    """
    if ranks is not None:
        ranks.compare(_digest((one.id, one.prompt, dict(one.chat_variables), one.params, one.lora) for one in raw))
    refused = [_refusal(one, limits) for one in raw]
    written = [one for one, error in zip(raw, refused, strict=True) if error is None and one.ids is None]
    if ranks is None or not written:
        encoded = iter(_encode(written, limits))
    else:
        encoded = iter(_unpack(ranks.once(lambda: _pack(_encode(written, limits)))))
    made: list[Request | ConfigError] = []
    for one, error in zip(raw, refused, strict=True):
        found = error or (next(encoded) if one.ids is None else (one.ids, one.text))
        made.append(found if isinstance(found, ConfigError) else _request(one, limits, *found))
    if ranks is not None:
        requests = (one for one in made if isinstance(one, Request))
        ranks.compare(_digest((one.id, one.prompt_token_ids, one.seed, one.max_tokens) for one in requests))
    return made


def _digest(values: Iterable[object]) -> bytes:
    digest = sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.digest()


def _refusal(one: RawRequest, limits: PromptLimits) -> ConfigError | None:
    """Why a prompt is refused before it is tokenised; None: it is not."""
    if one.ids is not None:
        refused = _too_long(len(one.ids), one, limits)  # before each of them is looked at
        if refused is not None:
            return refused
    problem = prompt_problem(one.prompt, key=one.where, vocab_size=limits.vocab_size)
    if problem is not None:
        return ConfigError(problem)
    if one.lora and one.lora not in limits.adapters:
        fix = f"There are: {', '.join(limits.adapters)}." if limits.adapters else "Name it in the section lora."
        return _refused(one.where, f"there is no LoRA adapter {one.lora[:80]!r}", fix)
    if limits.tokenizer is not None:
        return None
    if one.params.stop:
        return _refused(one.where, "stop strings need a tokenizer, and the model has none", "Use stop_token_ids.")
    if one.params.structured_outputs:
        return _refused(one.where, "structured_outputs need a tokenizer, and the model has none")
    if one.params.bad_words:
        return _refused(one.where, "bad_words need a tokenizer, and the model has none", "Use logit_bias.")
    if one.ids is None:
        fix = "Give the prompt as token ids, or set model.tokenizer."
        return _refused(one.where, "the model has no tokenizer.json", fix)
    return None


def _request(one: RawRequest, limits: PromptLimits, ids: Iterable[int], text: str | None) -> Request | ConfigError:
    params, ids = one.params, tuple(ids)
    refused = _too_long(len(ids), one, limits)
    if refused is not None:
        return refused
    room = limits.max_model_len - len(ids)
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
    grammar = _grammar(one, limits) if params.structured_outputs and max_tokens else ""
    if isinstance(grammar, ConfigError):
        return grammar
    return Request(
        id=one.id,
        prompt=text,
        prompt_token_ids=ids,
        params=params,
        seed=params.seed if params.seed is not None else derived_seed(limits.seed, one.index),
        max_tokens=max_tokens,
        stop_token_ids=stops,
        bad_words=bad_words,
        grammar=grammar,
        lora=one.lora or "",
    )


def _grammar(one: RawRequest, limits: PromptLimits) -> str | ConfigError:
    """The grammar that the output must follow; compiled here once, to find its errors."""
    assert limits.tokenizer is not None and one.params.structured_outputs is not None, "refused before"
    try:
        text = grammar_text(one.params.structured_outputs)
        grammars_of(limits.tokenizer, limits.vocab_size).matcher(text)
        return text
    except GrammarError as error:
        kind = next(name for name in KINDS if name in wanted(one.params.structured_outputs))
        return GrammarRefused(Problem(key=one.where, rule=f"structured_outputs.{kind}: {error}"))


def _too_long(count: int, one: RawRequest, limits: PromptLimits) -> ConfigError | None:
    """What is wrong with a prompt of `count` tokens."""
    room = limits.max_model_len - count
    if room >= (-1 if one.params.max_tokens == 0 else 1):  # of a text that is only scored the last token is no input
        return None
    rule = f"the prompt has {count} tokens, and with the output it must fit in {limits.max_model_len}"
    return _refused(one.where, rule, "Shorten it, or raise engine.max_model_len.")


def derived_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` (its place in the input), a hash that is the same everywhere; 0 to 2^63 - 1."""
    digest = blake2b(b"%d %d" % (seed, index), digest_size=8, person=b"megalite.prompt").digest()
    return int.from_bytes(digest, "little") >> 1


def _refused(where: str, rule: str, fix: str = "") -> ConfigError:
    return ConfigError(Problem(key=where, rule=rule, fix=fix))


# ---- texts and chats to token ids


def _encode(written: list[RawRequest], limits: PromptLimits) -> list[Encoded]:
    """The tokens of prompts that are texts or chats."""
    if not written:
        return []
    assert limits.tokenizer is not None, "refused before"
    encoded: dict[int, Encoded] = {}
    texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
    plain: dict[int, str] = {}
    for place, one in enumerate(written):
        text = _text(one, limits.tokenizer, limits.max_model_len)
        if isinstance(text, ConfigError):
            encoded[place] = text
        elif isinstance(one.prompt, str) or one.special_tokens:
            texts[isinstance(one.prompt, str)][place] = text
        else:
            plain[place] = text
    for is_text, found in texts.items():  # a template writes the special tokens itself
        batch = limits.tokenizer.encode_batch(list(found.values()), add_special_tokens=is_text)
        for (place, text), ids in zip(found.items(), batch, strict=True):
            encoded[place] = _checked(ids, text, written[place].where, limits.vocab_size)
    for place, text in plain.items():
        ids = _plainly(text, limits.tokenizer)
        encoded[place] = _checked(ids, limits.tokenizer.unmarked(text), written[place].where, limits.vocab_size)
    return [encoded[place] for place in range(len(written))]


def _text(one: RawRequest, tokenizer: Tokenizer, max_model_len: int) -> str | ConfigError:
    """A prompt as text, its chat template applied; refused here if it is too long to be worth tokenising."""
    try:
        render = tokenizer.chat_text if one.special_tokens else tokenizer.plain_chat_text
        text: str = one.prompt if isinstance(one.prompt, str) else render(one.prompt, **one.chat_variables)
    except TemplateError as error:
        return _refused(one.where, str(error))
    most = min(MAX_TEXT, max_model_len * MAX_TOKEN)
    if len(text) <= most:
        return text
    rule = (
        f"the text has {len(text)} characters, and no text of more than {most} is taken where prompt and output must "
        f"fit in {max_model_len} tokens"
    )
    return _refused(one.where, rule, "Shorten it, or raise engine.max_model_len.")


def _plainly(text: str, tokenizer: Tokenizer) -> list[int] | ValueError:
    try:
        return tokenizer.encode_plain(text)
    except ValueError as error:
        return error


def _checked(ids: list[int] | ValueError, text: str, where: str, vocab_size: int) -> Encoded:
    if isinstance(ids, TokenizerError):
        return TokenizerFailed(Problem(key=where, rule=str(ids)))
    if isinstance(ids, ValueError):
        return _refused(where, str(ids))
    if not ids:
        return _refused(where, "an empty prompt: the tokenizer makes no token of it")
    if max(ids) >= vocab_size:
        beyond = next(token_id for token_id in ids if token_id >= vocab_size)
        rule = f"the tokenizer makes token id {beyond} of it, and the model's are 0 to {vocab_size - 1}"
        return _refused(where, rule, "The tokenizer is not this model's.")
    return ids, text


def _pack(encoded: list[Encoded]) -> bytes:
    """As bytes, for other ranks; `_unpack` is the inverse."""
    head = [
        [str(one), isinstance(one, TokenizerFailed)] if isinstance(one, ConfigError) else [one[1]] for one in encoded
    ]
    return pack(json.dumps(head).encode(), [[] if isinstance(one, ConfigError) else one[0] for one in encoded], [])


def _unpack(data: bytes) -> list[Encoded]:
    head, rows, _ = unpack(data)
    return [
        (TokenizerFailed if failed[0] else ConfigError)(text) if failed else (ids, text)
        for (text, *failed), ids in zip(json.loads(head), rows, strict=True)
    ]
