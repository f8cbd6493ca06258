"""Which tokens a request may not sample: bad words in tokens, and settings that leave nothing to choose. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from megalite.text.tokenizer import Tokenizer

Spelling = tuple[int, ...]
"""A text in tokens."""


@lru_cache(maxsize=16)  # the prompts of a call mostly share their parameters
def spellings(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Spelling, ...]:
    """The ways in which the tokenizer writes each word: as a text, after a space, and after a line break.

    One that ends like another adds nothing and is left out. ValueError: it makes no token of a word.
    """
    found: dict[Spelling, None] = {}
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    for word in map(str.lstrip, words):
        alone = tokenizer.encode(word, add_special_tokens=False)
        if not alone:
            raise ValueError(f"bad_words: the tokenizer makes no token of {word!r}")
        spaced = tokenizer.encode(" " + word, add_special_tokens=False)
        on_a_new_line = tokenizer.encode("\n" + word, add_special_tokens=False)
        found |= dict.fromkeys([tuple(alone), tuple(spaced)])
        if on_a_new_line[: len(line_break)] == line_break and len(on_a_new_line) > len(line_break):
            found[tuple(on_a_new_line[len(line_break) :])] = None
    return tuple(one for one in found if not any(one[cut:] in found for cut in range(1, len(one))))


def leaves_nothing(
    allowed: Collection[int], bad_words: Collection[Spelling], ends: Collection[int], min_tokens: int
) -> bool:
    """Whether an output of `allowed` ids can reach a point at which every id is ruled out, since it completes one of
    `bad_words` or is among `ends`, which may not come before `min_tokens`."""
    for head in {(), *(word[:-1] for word in bad_words if set(word[:-1]) <= set(allowed))}:
        ruled_out = {word[-1] for word in bad_words if _ends_with(head, word[:-1])}
        if len(head) < min_tokens:
            ruled_out.update(ends)
        if ruled_out.issuperset(allowed):
            return True
    return False


def _ends_with(tokens: Spelling, end: Spelling) -> bool:
    return len(end) <= len(tokens) and tokens[len(tokens) - len(end) :] == end
