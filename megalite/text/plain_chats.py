"""Chats whose contents stay text: what they spell like a special token does not become one. Torch-free.

A template writes special tokens as text, often put together from parts (`<|` + role + `|>`), so which ones are its own
shows only once it has run. So the contents are marked before: in each spelling of a special token, and in each
beginning of one at the end of a text (its other half may follow in the next), stands a mark that no text holds. The
template handles all else as it is. What it wrote without a mark is its own; the marks go, and the text is tokenised
with special tokens read only there.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import tokenizers

from megalite.text.detokenizer import failing_alone

MARK = "\U0010fffe"
"""A noncharacter; where a text holds it nevertheless, OWN stands for it."""
_BREAK, _OWN = f"{MARK}1", f"{MARK}0"
_CODES = re.compile(rf"{MARK}[01]|\\udbff\\udffe[01]")
"""Also as JSON in ASCII writes them."""


class PlainChats:
    """Renders and tokenises plain chats for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._special = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        spellings = sorted({token.content for token in self._special.values() if len(token.content) > 1}, key=len)
        self._spelling = re.compile("|".join(map(re.escape, reversed(spellings))) if spellings else "(?!)")
        self._begun = tuple({one[:end] for one in spellings for end in range(1, len(one))})
        self._longest = max(map(len, spellings), default=1)
        nonce = secrets.token_hex(8)  # so that no text holds a stand-in
        self._stand_ins = {token.content: f"{MARK}2{nonce}:{i};" for i, token in self._special.items()}
        unknown = getattr(backend.model, "unk_token", None)
        unknown_id = getattr(backend.model, "unk_id", None) if unknown is None else backend.token_to_id(unknown)
        self._foreign = frozenset(self._special) - {unknown_id}
        """What no content may become."""

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, dict[int | None, int]]:
        """The tokenizer with stand-ins, which are read, for its special tokens, which are not; and what these mean."""
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True  # as text
        for token in self._special.values():
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            plain.add_tokens([tokenizers.AddedToken(self._stand_ins[token.content], special=False, **flags)])
        meant = {plain.token_to_id(self._stand_ins[token.content]): i for i, token in self._special.items()}
        return plain, meant

    def marked(self, value: Any) -> Any:
        """A JSON-like value with the marks in its texts."""
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(one) for key, one in value.items()}
        return [self.marked(one) for one in value] if isinstance(value, list | tuple) else value

    def _marked_text(self, text: str) -> str:
        text = text.replace(MARK, _OWN)
        text = self._spelling.sub(lambda found: f"{found[0][0]}{_BREAK}{found[0][1:]}", text)
        end = len(text.rstrip())  # templates like to strip
        if not text.endswith(self._begun, 0, end):
            return text
        starts = range(max(0, end - self._longest), end)
        start = next(start for start in starts if text[start:end] in self._begun)
        return f"{text[: start + 1]}{_BREAK}{text[start + 1 :]}"

    @staticmethod
    def unmarked(text: str) -> str:
        """A rendered text as it reads without the marks."""
        if MARK not in text and "\\udbff" not in text:
            return text
        return _CODES.sub(lambda found: MARK if found[0] == _OWN else "", text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text with marks. ValueError: the tokenizer fails at it."""
        own = self._spelling.sub(lambda found: self._stand_ins[found[0]], text)
        ids = self._encode(self.unmarked(own))
        if not self._foreign.isdisjoint(ids):
            # A tokenizer without merges finds special tokens in its vocabulary like any word: a space takes them apart.
            ids = [one for one in self._encode(self.unmarked(own.replace(_BREAK, " "))) if one not in self._foreign]
        _, meant = self._plain
        return [meant.get(one, one) for one in ids]

    def _encode(self, text: str) -> list[int]:
        plain, _ = self._plain
        with failing_alone():
            return plain.encode_batch_fast([text])[0].ids  # see Tokenizer.encode
