"""Log-probabilities in OpenAI's two formats, also of tokens that are no text by themselves. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from megalite.inference.logprobs import FlatLogprobs, Logprob, Logprobs
from megalite.text.detokenizer import TokenizerError
from megalite.text.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0
"""Stands for the log-probability of an impossible token, since JSON has no infinity."""

Offsets = Iterable[int]


class TokenTexts:
    """The texts of a model's single tokens; without a tokenizer their ids stand for them."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self.of = lru_cache(1 << 16)(self._of)
        """Text of a token (half a character escaped: `\\xe2\\x82`), its bytes, and whether they are text."""

    def _of(self, token_id: int) -> tuple[str, list[int] | None, bool]:
        if self.tokenizer is None:
            return f"token_id:{token_id}", None, True
        try:
            found = self.tokenizer.token_bytes(token_id)
        except TokenizerError:
            return f"token_id:{token_id}", None, True
        try:
            return found.decode(), list(found), True
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in found), list(found), False

    def chat(self, positions: Sequence[Logprobs] | FlatLogprobs, most: int) -> dict[str, Any]:
        """The `logprobs` of a chat's choice; `most` tokens are listed at each position."""
        return {"content": [self._position(entries or {}, most) for entries in positions], "refusal": None}

    def _position(self, entries: Logprobs, most: int) -> dict[str, Any]:
        first = next(iter(entries))
        top = sorted((entry.rank or 0, token) for token, entry in entries.items() if (entry.rank or 0) <= most)
        listed = [self._entry(token, entries[token]) for _, token in top]
        return {**self._entry(first, entries[first]), "top_logprobs": listed}

    def _entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        text, found, _ = self.of(token_id)
        return {"token": text, "logprob": value(entry.logprob), "bytes": found}

    def completion(self, positions: Iterable[Logprobs | None], ids: Iterable[int], offsets: Offsets) -> dict[str, Any]:
        """The `logprobs` of a completion's choice, of tokens `ids`, which begin at `offsets`. Of a text's first token
        nothing is known: its position is None."""
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entries, token, offset in zip(positions, ids, offsets, strict=True):
            shown["tokens"].append(self._key(token))
            shown["token_logprobs"].append(None if entries is None else value(entries[token].logprob))
            shown["top_logprobs"].append(None if entries is None else self._tops(entries))
            shown["text_offset"].append(offset)
        return shown

    def _tops(self, entries: Logprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, entry in entries.items():
            name = self._key(token)
            found[name] = max(value(entry.logprob), found.get(name, IMPOSSIBLE))  # some tokens read alike
        return found

    def _key(self, token_id: int) -> str:
        text, _, is_text = self.of(token_id)
        return text if is_text else f"bytes:{text}"


def value(logprob: float) -> float:
    return logprob if logprob > IMPOSSIBLE else IMPOSSIBLE  # of NaN too


class OutputOffsets:
    """Where the tokens of an output begin in its text, as they come."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], *, skip: bool, start: int):
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(prompt_ids, skip_special_tokens=skip)
        self._length = start

    def feed(self, ids: Iterable[int]) -> list[int]:
        """The offset of each; tokens of one character begin together."""
        found = []
        for token in ids:
            found.append(self._length)
            if self._detokenizer is not None:
                try:
                    self._length += len(self._detokenizer.feed(token))
                except TokenizerError:
                    self._detokenizer = None
        return found


def prompt_parts(tokenizer: Tokenizer | None, text: str | None, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a prompt and where each of its tokens begins there. `text`: as it was given, None: token ids were."""
    if tokenizer is None:
        return "", [0] * len(ids)
    if text is not None:
        read, offsets = tokenizer.encode_with_offsets(text)
        if read == list(ids):
            return text, [start for start, _ in offsets]
    pieces = tokenizer.detokenizer(skip_special_tokens=False)
    found, starts, length = [], [], 0
    for token in ids:
        starts.append(length)
        found.append(pieces.feed(token))
        length += len(found[-1])
    found.append(pieces.flush())
    return text if text is not None else "".join(found), starts
