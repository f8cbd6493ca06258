"""Examples for supervised fine-tuning as tokens, and which of them are learnt: the responses. Torch-free.

Prompts are tokenised as inference tokenises them, and the text of a response goes on after the prompt's tokens, so a
model is trained on what it will see. The places of a chat's responses come from its template alone: a response is what
rendering with it adds to rendering up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalite.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence of tokens, at least two."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    """Of each token whether it is of a response and so counts in the loss."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Encoded:
        """Its first `length` tokens."""
        return Encoded(self.ids[:length], self.learnt[:length])

    @property
    def num_learnt(self) -> int:
        """Tokens that count; the first of a sequence is never predicted."""
        return sum(self.learnt[1:])


def encode_pair(tokenizer: Tokenizer, prompt: str, response: str, end: int) -> Encoded:
    """A prompt and its response, which `end`, the end-of-text token, ends. ValueError: fewer than two tokens."""
    given = tokenizer.encode(prompt)
    ids = given + _continuation(tokenizer, prompt, response, special=True)
    if ids[-1:] != [end]:
        ids = [*ids, end]
    return _encoded(ids, [False] * len(given) + [True] * (len(ids) - len(given)))


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, end: int, *, tools: Sequence[dict[str, Any]] | None = None
) -> list[Encoded]:
    """A chat as what its assistant's turns are learnt from, each up to and including its end-of-turn token.

    One sequence, where each rendering is the beginning of the next. Some templates show an earlier turn otherwise than
    the last one (without its reasoning): then there is one sequence for each turn, as it was generated. `end`, the
    end-of-text token, ends a sequence whose last turn the template leaves without a special token; messages after the
    last turn are left out. ValueError (TemplateError is one) if the template can't show these messages, or shows a turn
    otherwise than its prompt begins it.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    more = {} if tools is None else {"tools": list(tools)}
    before = [tokenizer.apply_chat_template(messages[:turn], **more) for turn in turns]
    after = [tokenizer.apply_chat_template(messages[: turn + 1], add_generation_prompt=False, **more) for turn in turns]
    for turn, asked, answered in zip(turns, before, after, strict=True):
        if not answered.startswith(asked):
            raise ValueError(
                f"the chat template shows message {turn + 1}, an assistant's, otherwise than the prompt for it begins: "
                f"the prompt ends with {asked[-40:]!r}, and there the message reads "
                f"{answered[max(0, len(asked) - 40) :][:60]!r}"
            )
    texts = [text for pair in zip(before, after, strict=True) for text in pair]
    if all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False)):
        return [_conversation(tokenizer, texts, end)]
    return [_conversation(tokenizer, pair, end) for pair in zip(before, after, strict=True)]


def _conversation(tokenizer: Tokenizer, texts: Sequence[str], end: int) -> Encoded:
    """`texts`: growing renderings, by turns up to a response and with it."""
    ids: list[int] = []
    learnt: list[bool] = []
    done = ""
    for place, text in enumerate(texts):
        new = _continuation(tokenizer, done, text[len(done) :], special=False)
        ended = _up_to_end(tokenizer, new)
        counted = (len(new) if ended is None else ended) if place % 2 else 0
        ids += new
        learnt += [True] * counted + [False] * (len(new) - counted)
        done = text
    if ended is None:
        ids, learnt = [*ids, end], [*learnt, True]
    return _encoded(ids, learnt)


def _up_to_end(tokenizer: Tokenizer, ids: Sequence[int]) -> int | None:
    """How many tokens of a turn there are up to its last special token, where a model stops; None if text follows it.

    Templates like to write a line end after it.
    """
    places = [place for place, token in enumerate(ids) if token in tokenizer.special_ids]
    if not places or tokenizer.decode(ids[places[-1] + 1 :]).strip():
        return None
    return places[-1] + 1


def _continuation(tokenizer: Tokenizer, text: str, more: str, *, special: bool) -> list[int]:
    """Tokens of `more` after those of `text`: of both together where they begin with those of `text` alone.

    Else, where a token would reach over the border, of `more` by itself. `special`: what the tokenizer adds at the
    start of a text is there.
    """
    if not text:
        return tokenizer.encode(more, add_special_tokens=False)
    given = tokenizer.encode(text, add_special_tokens=special)
    both = tokenizer.encode(text + more, add_special_tokens=special)
    if both[: len(given)] == given:
        return both[len(given) :]
    return tokenizer.encode(more, add_special_tokens=False)


def _encoded(ids: Sequence[int], learnt: Sequence[bool]) -> Encoded:
    if len(ids) < 2:
        raise ValueError("fewer than two tokens: there is nothing to predict")
    return Encoded(tuple(ids), tuple(learnt))
