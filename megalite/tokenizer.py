"""Text to token ids and back: tokenizer.json with the special tokens and chat template beside it. Torch-free.

What it does is what transformers does with the same folder, with two exceptions: `clean_up_tokenization_spaces` is
never applied, because it removes spaces that the model wrote, and an added token always reads as it is written.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from megalite.chat_template import ChatTemplate, TemplateError
from megalite.errors import CheckpointError
from megalite.text_limit import MAX_TEXT, characters_per_token
from megalite.tokenizer_files import read_tokenizer

_UNCONVERTED = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
"""Older forms of a tokenizer, from which tokenizer.json can be made."""
_PAIRS_CACHED = 1 << 16
_BATCH_CHARACTERS = 1 << 20
_GOES_ON = "[the last message goes on here] "
"""Stands in a chat where an answer is to go on; the space tells whether the template cuts white space off."""


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer is in a model folder, the first always, the others where it has them."""


class TokenizerError(ValueError):
    """The tokenizer failed at a text; it can be used for others."""


class Detokenizer(Protocol):
    """Turns the output of one sequence into text, token by token.

    `feed` takes the next token id and returns the text that is certain by now; what later tokens could still change,
    such as half a character, is held back. `flush` ends the sequence and returns what is left.

    With `visible` the ids that are not skipped, and `head` the characters that the prompt's tokens complete, all pieces
    together are decode(visible prompt + visible output) without decode(head): a space that the decoder would drop at
    the start of a text is kept after a prompt, and a character begun by the prompt belongs to the output.
    """

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer:
    """A model's tokenizer; made by `load`."""

    def __init__(self, backend: tokenizers.Tokenizer, names: dict[str, str], templates: dict[str, str]):
        self.backend = backend
        self.names = names
        """The special tokens that have a name, e.g. `bos_token`, as text."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self._head, self._tail = _added_around(backend)
        backend.post_processor = None  # what it adds is known, and some of them trim the offsets of tokens
        self._templates = templates
        self._compiled: dict[str, ChatTemplate] = {}
        self._decoding = _decoding(backend)

    @classmethod
    def load(cls, folder: str | Path, *, model: Mapping[str, Any] | None = None) -> Tokenizer | None:
        """The tokenizer in `folder`, or None if there is none. CheckpointError: it is damaged or of an older form.

        `model`: config.json of the model that it is for, if that is not in the folder; see tokenizer_files.py.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            found = [name for name in _UNCONVERTED if (folder / name).is_file()]
            if not found:
                return None
            convert = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
            raise CheckpointError(
                f"{folder}: has {found[0]} but no tokenizer.json. Where transformers is installed, this makes one:\n"
                f'python -c "from transformers import AutoTokenizer; {convert}"'
            )
        return cls(*read_tokenizer(folder, model))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written in the text count as such.

        ValueError: it is not valid Unicode, or (TokenizerError) the tokenizer fails at it.
        """
        return self._whole(self._encoding(text), add_special_tokens)

    def _whole(self, encoding: tokenizers.Encoding, add_special_tokens: bool) -> list[int]:
        return [*self._head, *encoding.ids, *self._tail] if add_special_tokens else encoding.ids

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, as `encode` gives them, and of each where the characters it stands for begin and end in `text`.

        Tokens that share a character (its bytes) each have all of it. A mark that the tokenizer composes with the
        letter before it belongs to the letter's token; what the tokenizer drops, such as white space, to none. What is
        added before a text is at 0, what is added after it at its end. ValueError as for `encode`.
        """
        encoding = self._encoding(text)
        ids, offsets = encoding.ids, []
        following = after = len(text)
        for start, end in reversed(encoding.offsets):
            if start != following:
                after, following = following, start
            while end < after and _composes(text[end]):
                end += 1
            offsets.append((start, end))
        offsets.reverse()
        if add_special_tokens:
            ids = [*self._head, *ids, *self._tail]
            offsets = [(0, 0)] * len(self._head) + offsets + [(len(text), len(text))] * len(self._tail)
        return ids, offsets

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has half a surrogate pair at character {error.start}") from None
        with _failing_alone():
            return self.backend.encode(text)

    def most_characters(self, num_tokens: int, *, is_ascii: bool) -> int:
        """Length beyond which no text need be tokenised: it has more than `num_tokens` tokens, or is beyond a limit.

        The limits are MAX_TEXT and, where the length of a text says nothing of its tokens, MOST_CHARACTERS for each.
        """
        return min(MAX_TEXT, num_tokens * self._characters_per_token[0 if is_ascii else 1])

    @cached_property
    def _characters_per_token(self) -> tuple[int, int]:
        normalizer = self.backend.normalizer
        normalized = normalizer.normalize_str if normalizer is not None else str
        return characters_per_token(json.loads(self.backend.to_str()), normalized, _Bytes.BYTES)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int] | ValueError]:
        """What `encode` gives or raises for each text, on all cores."""
        encoded: list[list[int] | ValueError] = []
        start = 0
        for end in _batches(texts):
            encoded += self._encode_together(texts[start:end], add_special_tokens)
            start = end
        return encoded

    def _encode_together(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int] | ValueError]:
        try:
            with _failing_alone():
                together = self.backend.encode_batch_fast(texts)
            return [self._whole(encoding, add_special_tokens) for encoding in together]
        except TokenizerError:  # one text spoils its batch; find out which
            return [self._encode_alone(text, add_special_tokens) for text in texts]

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int] | ValueError:
        try:
            return self.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            return error

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        ids = list(token_ids)
        if self._decoding.misread.isdisjoint(ids):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.feed, ids), detokenizer.flush()])

    def token_text(self, token_id: int) -> str:
        """One token by itself, as it reads inside a text; ids without a token are empty."""
        return self._decoding.alone(token_id)

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer for what follows `prompt_ids`."""
        return self._decoding.start(prompt_ids, self.special_ids if skip_special_tokens else frozenset())

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def chat_templates(self) -> dict[str, str]:
        """Jinja texts by name; the usual one is `default`."""
        return dict(self._templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text for a chat; encode it with `add_special_tokens=False`, the template writes them.

        `chat_template`: Jinja text, or the name of one of the model's templates; None: the model's. `variables` reach
        the template, e.g. `tools` (JSON schemas) or `enable_thinking`. `continue_final_message`: the text ends with the
        last message's content. TemplateError: there is no template, or it can't make a prompt of these messages.
        """
        if continue_final_message and add_generation_prompt:
            raise TemplateError("continue_final_message goes with add_generation_prompt=False")
        template = self._template(chat_template, tools=variables.get("tools") is not None)
        shown = _marked(messages) if continue_final_message else messages
        text = template.render(shown, add_generation_prompt=add_generation_prompt, **variables)
        return _up_to_mark(text) if continue_final_message else text

    def _template(self, wanted: str | None, *, tools: bool) -> ChatTemplate:
        """The template of this name, or of this text; None: the one for chats with or without `tools`."""
        if wanted is not None and wanted not in self._templates:
            name, source = wanted, wanted
        elif not self._templates:
            raise TemplateError("the model has no chat template; give a prompt instead of messages")
        else:
            name = wanted or ("tool_use" if tools and "tool_use" in self._templates else "default")
            if name not in self._templates:
                raise TemplateError(f"the model has chat templates {sorted(self._templates)} and none named default")
            source = self._templates[name]
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(source, self.names)
        return self._compiled[name]

    def close(self) -> None:
        """End the processes that render chats; a later chat starts them again."""
        for template in self._compiled.values():
            template.close()

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.names[name]) if name in self.names else None


def _batches(texts: Sequence[str]) -> Iterator[int]:
    """Where each batch of texts ends: encodings take many times the memory of their text until their ids are taken."""
    length = 0
    for place, text in enumerate(texts, 1):
        length += len(text) + 1
        if length >= _BATCH_CHARACTERS or place == len(texts):
            yield place
            length = 0


@contextmanager
def _failing_alone() -> Iterator[None]:
    """The library's failures as TokenizerError.

    It raises plain Exception, and where Rust panics, as when a pattern backtracks for too long, pyo3's PanicException,
    which has no public name and is no Exception, so that it would end the run.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer fails at this text: {error}") from None


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with _GOES_ON at the end of the last one's text. TemplateError: it has none."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, list):
        texts = [i for i, part in enumerate(content) if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if texts:
            place = texts[-1]
            part = {**content[place], "text": content[place]["text"] + _GOES_ON}
            return [*before, {**last, "content": [*content[:place], part, *content[place + 1 :]]}]
    elif isinstance(content, str):
        return [*before, {**last, "content": content + _GOES_ON}]
    raise TemplateError("continue_final_message: the last message has no text that could go on")


def _up_to_mark(text: str) -> str:
    """A chat's text up to where the last message's content ends; white space there stays if the template keeps it."""
    place = text.rfind(_GOES_ON.strip())
    if place < 0:
        raise TemplateError("continue_final_message: the chat template does not show the last message's content")
    return text[:place] if text.startswith(_GOES_ON, place) else text[:place].rstrip()


def _added_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, e.g. bos."""
    for text in ("a", *backend.get_vocab()):
        with suppress(TokenizerError), _failing_alone():
            encoding = backend.encode(text)
            added = encoding.special_tokens_mask
            if 0 in added:
                first, end = added.index(0), len(added) - added[::-1].index(0)
                return encoding.ids[:first], encoding.ids[end:]
    return backend.encode("").ids, []


def _composes(character: str) -> bool:
    """Whether a normalizer may make one character of this one and the one before it: marks and parts of Hangul."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


# ---- from tokens to text


class _Decoding(Protocol):
    """How a tokenizer's decoder can be taken apart into tokens."""

    misread: frozenset[int]
    """Added tokens that the tokenizer's own decoder would not show as they are written."""

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer: ...

    def alone(self, token_id: int) -> str: ...


def _decoding(backend: tokenizers.Tokenizer) -> _Decoding:
    decoder = json.loads(backend.to_str())["decoder"] or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        return _Bytes(backend)
    return _Pairs(backend, byte_fallback="ByteFallback" in kinds)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019): itself, or the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _Bytes:
    """Byte-level tokens: each is some bytes, the text is all of them as UTF-8, U+FFFD for what is not."""

    BYTES = _byte_of_character()

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = {i: (backend.id_to_token(i) or "").encode() for i in backend.get_added_tokens_decoder()}
        self._known: dict[int, bytes] = {}
        self.misread = frozenset(i for i, content in added.items() if self.bytes_of(i) != content)
        self._known |= added

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer:
        return _ByteDetokenizer(self, prompt_ids, skipped)

    def bytes_of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) or ""
            spelled = [self.BYTES.get(character) for character in token]
            found = token.encode() if None in spelled else bytes(spelled)
            self._known[token_id] = found
        return found

    def alone(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")


class _ByteDetokenizer:
    def __init__(self, table: _Bytes, prompt_ids: Sequence[int], skipped: frozenset[int]):
        self._table = table
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in skipped:
                tail = table.bytes_of(token_id) + tail
            if len(tail) >= 4:  # longer than any unfinished character
                break
        self._utf8.decode(tail)

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._table.bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pairs:
    """Decoders in which a token's text depends on whether and which token stands before it, and not on later ones.

    The exception is byte fallback: a run of tokens such as <0xE2> is UTF-8 as a whole or all U+FFFD, so it is certain
    only when it ends.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, byte_fallback: bool):
        self._backend = backend
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        self.known = frozenset(token_id for token, token_id in vocabulary if token)
        self.byte_ids = {i: byte for token, i in vocabulary if (byte := _fallback_byte(token)) is not None}
        if not byte_fallback:
            self.byte_ids = {}
        self.neutral = next((i for token, i in vocabulary if token.isalnum() and i not in self.byte_ids), None)
        """Some token that is a piece of a word."""
        added = {i: token for i, token in backend.get_added_tokens_decoder().items() if i not in self.byte_ids}
        if backend.normalizer is not None:  # a token that is normalized stands for its normal form
            added = {i: token for i, token in added.items() if not token.normalized}
        self._written = {i: token.content for i, token in added.items() if self._misreads(i, token.content)}
        self.misread = frozenset(self._written)
        self.after = lru_cache(_PAIRS_CACHED)(self._after)
        """`after_run` for one token, remembered: the same pairs come again and again."""

    def _misreads(self, token_id: int, content: str) -> bool:
        inside = self.after_run(self.neutral, token_id)
        return inside not in (content, f" {content}") or self.after_run(None, token_id) != content

    def _after(self, before: int | None, token_id: int) -> str:
        written = self._written.get(token_id)
        return self.after_run(before, token_id) if written is None else written

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer:
        return _PairDetokenizer(self, prompt_ids, skipped)

    def after_run(self, before: int | None, *token_ids: int) -> str:
        """The text of tokens that follow `before`; None: at the start of the text."""
        if before is None:
            return self._backend.decode(token_ids, skip_special_tokens=False)
        head = self._backend.decode([before], skip_special_tokens=False)
        text = self._backend.decode([before, *token_ids], skip_special_tokens=False)
        return text[len(commonprefix((head, text))) :]

    def alone(self, token_id: int) -> str:
        return self.after(self.neutral, token_id)


def _fallback_byte(token: str) -> int | None:
    """0xE2 for `<0xE2>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


class _PairDetokenizer:
    def __init__(self, pairs: _Pairs, prompt_ids: Sequence[int], skipped: frozenset[int]):
        self._pairs = pairs
        self._skipped = skipped
        self._run: list[int] = []
        """Byte tokens that no other token has followed yet."""
        self._before: int | None = None
        """The last token before the run that is no byte."""
        seen = [i for i in reversed(prompt_ids) if i in pairs.known and i not in skipped]  # backwards
        after = next((place for place, i in enumerate(seen) if i not in pairs.byte_ids), len(seen))
        self._run = self._unfinished(seen[:after][::-1])
        if seen:
            self._before = seen[after] if after < len(seen) else pairs.neutral

    def _unfinished(self, run: list[int]) -> list[int]:
        """The last tokens of a run that begin a character and do not end it."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(self._pairs.byte_ids[token_id] for token_id in run))
        pending, _ = utf8.getstate()
        return run[len(run) - len(pending) :]

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped or token_id not in self._pairs.known:
            return ""
        if token_id in self._pairs.byte_ids:
            self._run.append(token_id)
            return ""
        if self._run and token_id in self._pairs.misread:
            text = self.flush() + self._pairs.after(self._before, token_id)
        elif self._run:
            text = self._pairs.after_run(self._before, *self._run, token_id)
            self._run.clear()
        else:
            text = self._pairs.after(self._before, token_id)
        self._before = token_id
        return text

    def flush(self) -> str:
        text = self._pairs.after_run(self._before, *self._run) if self._run else ""
        self._run.clear()
        return text
