"""From token ids to text, one token at a time: how the decoders of tokenizers are taken apart. Torch-free."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from os.path import commonprefix
from typing import Any, Protocol

import tokenizers

_PAIRS_CACHED = 1 << 16


class TokenizerError(ValueError):
    """The tokenizer failed at a text; it can be used for others."""


@contextmanager
def failing_alone(at: str = "this text") -> Iterator[None]:
    """The library's failures as TokenizerError.

    It raises plain Exception, and where Rust panics, as when a pattern backtracks for too long, pyo3's PanicException,
    which has no public name and is no Exception, so that it would end the run.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer fails at {at}: {error}") from None


def decoded(backend: tokenizers.Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of `ids` by the tokenizer's own decoder. TokenizerError: it fails at them."""
    with failing_alone("these tokens"):
        return backend.decode(ids, skip_special_tokens=skip_special_tokens)


class Detokenizer(Protocol):
    """Turns the output of one sequence into text, token by token.

    `feed` takes the next token id and returns the text that is certain by now; what later tokens could still change,
    such as half a character, is held back. `flush` ends the sequence and returns what is left.

    With `visible` the ids that are not skipped, and `head` the characters that the prompt's tokens complete, all pieces
    together are decode(visible prompt + visible output) without decode(head): a space that the decoder would drop at
    the start of a text is kept after a prompt, and a character begun by the prompt belongs to the output.

    TokenizerError: the decoder fails at these tokens; the detokenizer is of no use any more.
    """

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Decoding(Protocol):
    """How a tokenizer's decoder can be taken apart into tokens."""

    misread: frozenset[int]
    """Added tokens that the tokenizer's own decoder would not show as they are written."""

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer: ...

    def alone(self, token_id: int) -> str: ...

    def bytes_alone(self, token_id: int) -> bytes: ...


def decoding_of(backend: tokenizers.Tokenizer) -> Decoding:
    decoder: dict[str, Any] = {"type": "none"}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
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


BYTES = _byte_of_character()


class _Bytes:
    """Byte-level tokens: each is some bytes, the text is all of them as UTF-8, U+FFFD for what is not."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = {i: (backend.id_to_token(i) or "").encode() for i in backend.get_added_tokens_decoder()}
        self._known: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self.misread = frozenset(i for i, content in added.items() if self.bytes_of(i) != content)
        self._known |= added

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer:
        return _ByteDetokenizer(self, prompt_ids, skipped)

    def bytes_of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) or ""
            found = bytes(map(BYTES.__getitem__, token)) if BYTES.keys() >= set(token) else token.encode()
            self._known[token_id] = found
        return found

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token that is whole characters; None: it is not."""
        try:
            return self._texts[token_id]
        except KeyError:
            text: str | None = None
            with suppress(UnicodeDecodeError):
                text = self.bytes_of(token_id).decode()
            return self._texts.setdefault(token_id, text)

    def alone(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def bytes_alone(self, token_id: int) -> bytes:
        return self.bytes_of(token_id)


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
        self._is_between = not self._utf8.buffer
        """No character is begun."""

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if self._is_between and (text := self._table.whole_text(token_id)) is not None:
            return text
        text = self._utf8.decode(self._table.bytes_of(token_id))
        self._is_between = not self._utf8.buffer
        return text

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
        pieces = (i for token, i in vocabulary if token.isalnum() and i not in self.byte_ids)
        self.neutral = next(filter(self._decodes, pieces), None)
        """Some token that is a piece of a word."""
        added = {i: token for i, token in backend.get_added_tokens_decoder().items() if i not in self.byte_ids}
        if backend.normalizer is not None:  # a token that is normalized stands for its normal form
            added = {i: token for i, token in added.items() if not token.normalized}
        self._written = {i: token.content for i, token in added.items() if self._misreads(i, token.content)}
        self.misread = frozenset(self._written)
        self.after = lru_cache(_PAIRS_CACHED)(self._after)
        """`after_run` for one token, remembered: the same pairs come again and again."""

    def _decodes(self, token_id: int) -> bool:
        try:
            decoded(self._backend, [token_id])
            return True
        except TokenizerError:
            return False

    def _misreads(self, token_id: int, content: str) -> bool:
        try:
            inside, first = self.after_run(self.neutral, token_id), self.after_run(None, token_id)
        except TokenizerError:
            return True
        return inside not in (content, f" {content}") or first != content

    def _after(self, before: int | None, token_id: int) -> str:
        written = self._written.get(token_id)
        return self.after_run(before, token_id) if written is None else written

    def start(self, prompt_ids: Sequence[int], skipped: frozenset[int]) -> Detokenizer:
        return _PairDetokenizer(self, prompt_ids, skipped)

    def after_run(self, before: int | None, *token_ids: int) -> str:
        """The text of tokens that follow `before`; None: at the start of the text."""
        if before is None:
            return decoded(self._backend, token_ids)
        head = decoded(self._backend, [before])
        text = decoded(self._backend, [before, *token_ids])
        return text[len(commonprefix((head, text))) :]

    def alone(self, token_id: int) -> str:
        return self.after(self.neutral, token_id)

    def bytes_alone(self, token_id: int) -> bytes:
        byte = self.byte_ids.get(token_id)
        return self.alone(token_id).encode() if byte is None else bytes([byte])


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
