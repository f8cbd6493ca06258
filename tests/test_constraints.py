"""Bad words in tokens over every kind of tokenizer, and settings that leave nothing to choose."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_family import FAMILY

from megalite.inference.constraints import leaves_nothing, spellings
from megalite.text.tokenizer import Tokenizer

WORDS = ("the", "hello", "ab a", "x")


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_found_wherever_it_stands(kind, word):
    """A text that the tokenizer writes with the word at its start, after a space or on a new line has a spelling."""
    tokenizer = Tokenizer(FAMILY[kind](), {}, {})
    found = spellings((word,), tokenizer)
    for text in (word, f" {word}", f"B {word}", f"B\n{word}"):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        assert any(ids[len(ids) - len(one) :] == one for one in found), (text, ids, found)
    for one in found:
        assert tokenizer.decode(one).strip() == word, "and no other text is ruled out"
    assert spellings((f"  {word}",), tokenizer) == found, "a space before the word says nothing"
    assert not any(a != b and a[len(a) - len(b) :] == b for a, b in product(found, found))


@pytest.mark.parametrize("kind", FAMILY)
def test_of_a_text_without_tokens_there_is_no_spelling(kind):
    with pytest.raises(ValueError, match="bad_words: the tokenizer makes no token of ''"):
        spellings(("  ",), Tokenizer(FAMILY[kind](), {}, {}))


tokens = st.integers(0, 2)


@given(
    st.frozensets(tokens, min_size=1),
    st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4),
    st.frozensets(tokens, max_size=2),
    st.integers(0, 3),
)
def test_leaves_nothing_is_found_by_trying_every_output(allowed, bad_words, ends, min_tokens):
    """Slow reference: walk all outputs of up to five tokens that the settings permit."""

    def choices(output: tuple[int, ...]) -> list[int]:
        return [
            token
            for token in sorted(allowed)
            if not (token in ends and len(output) < min_tokens)
            and not any((*output, token)[-len(word) :] == word for word in bad_words)
        ]

    reached, stuck = [()], False
    for _ in range(6):
        stuck = stuck or any(not choices(output) for output in reached)
        reached = [(*output, token) for output in reached for token in choices(output) if token not in ends]
    found = leaves_nothing(allowed, bad_words, ends, min_tokens)
    assert found or not stuck, "what can come to a standstill is refused"
    if not bad_words:
        assert found == stuck, "and nothing else is"
