"""How few tokens a text can be, told from the tokenizer's description alone, so that a text that is far too long is
refused before it is tokenised. Torch-free.

Tokens cover a text: where nothing of it can vanish, no token stands for more characters than the longest entry of the
vocabulary has; `characters_per_token` is that length where it is certain. It is not where a step drops or swallows
characters (stripped white space, removed accents, one unknown token for a whole word): there MOST_CHARACTERS is a limit
of ours, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

MOST_CHARACTERS = 1024
"""Characters of text for each token that may be, with a tokenizer whose tokens have no longest."""
MAX_TEXT = 1 << 24
"""Longest text that is tokenised, characters."""

_COMPOSED = 4
"""Most code points that NFC and NFKC make one of: the longest canonical decomposition (Unicode's
NormalizationTest.txt)."""
_KEEPING_NORMALIZERS = ("NFC", "NFKC", "NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel")
_SPLITTERS = ("Split", "Punctuation")
"""Pre-tokenizers that drop what they split at when their behaviour is Removed."""
_KEEPING_SPLITTERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength", *_SPLITTERS)


def characters_per_token(
    description: Mapping[str, Any], normalized: Callable[[str], str], byte_letters: Collection[str]
) -> tuple[int, int]:
    """Most characters that one token stands for: in ASCII texts, and in any.

    `description`: tokenizer.json as read; `normalized`: what its normalizer makes of a text; `byte_letters`: how
    byte-level tokens spell the 256 bytes.
    """
    normalizers = list(_steps(description["normalizer"], "normalizers"))
    splitters = list(_steps(description["pre_tokenizer"], "pretokenizers"))
    added = description["added_tokens"]
    certain = all(map(_keeps, normalizers)) and all(map(_splits, splitters))
    certain = certain and not any(token["lstrip"] or token["rstrip"] for token in added)
    by_bytes = any(step["type"] == "ByteLevel" for step in (*normalizers, *splitters))
    certain = certain and _knows_everything(description["model"], byte_letters if by_bytes else ())
    if not certain:
        return MOST_CHARACTERS, MOST_CHARACTERS
    longest = max(map(len, _tokens(description["model"])), default=1)
    for token in added:
        longest = max(longest, len(token["content"]), len(normalized(token["content"])))
    return longest, longest * _COMPOSED ** sum(step["type"] in ("NFC", "NFKC") for step in normalizers)


def _steps(step: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the steps it is made of."""
    if step is not None and step["type"] == "Sequence":
        for part in step[parts]:
            yield from _steps(part, parts)
    elif step is not None:
        yield step


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer makes no text shorter, but for composing characters."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"]) >= len(pattern)
    return step["type"] in _KEEPING_NORMALIZERS


def _splits(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer drops nothing."""
    return step["type"] in _KEEPING_SPLITTERS and step.get("behavior") != "Removed"


def _knows_everything(model: Mapping[str, Any], byte_letters: Collection[str]) -> bool:
    """Whether the model drops no character and has no token for any number of unknown ones.

    `byte_letters`: all that it is given, or none if it is given text.
    """
    vocabulary = set(_tokens(model))
    if model.get("byte_fallback") and {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary:
        return True
    if model["type"] != "BPE":
        return False
    if model["unk_token"] is not None and not model["fuse_unk"]:
        return model["unk_token"] in vocabulary
    spelled_otherwise = model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    return bool(byte_letters) and not spelled_otherwise and vocabulary.issuperset(byte_letters)


def _tokens(model: Mapping[str, Any]) -> Iterator[str]:
    """The vocabulary; Unigram lists pairs, the others map."""
    vocabulary = model["vocab"]
    return iter(vocabulary) if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary)
