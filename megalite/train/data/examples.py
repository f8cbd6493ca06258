"""Examples for supervised fine-tuning as tokens with a loss mask: the tokens of responses count. Torch-free.

The text of an example, prompt and response, is tokenised as a whole, so its tokens read as it is written. Which of them
are the response's follows from where their characters stand; a token that stands for characters of both sides of the
border counts as the response's. Inference tokenises a prompt alone: where a token would reach over the border, the
prompt's last tokens there are others than those here. The places of a chat's responses come from its template alone: a
response is what rendering with it adds to rendering up to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from megalite.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
_QUESTION = ({"role": "user", "content": "?"},)
"""A chat that every template can show."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens, at least two."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """Whether each token is part of a response, and so counts in the loss."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Encoded:
        """Its first `length` tokens."""
        return Encoded(self.ids[:length], self.loss_mask[:length])

    def ends(self, end_tokens: Collection[int]) -> set[int]:
        """Those of `end_tokens` that end a response; a model that is trained on this stops with them."""
        following = (*self.loss_mask[1:], False)
        counted = zip(self.ids, self.loss_mask, following, strict=True)
        return {token for token, counts, more in counted if counts and not more and token in end_tokens}

    @property
    def num_targets(self) -> int:
        """Targets that count; the first token of a sequence is never a target."""
        return sum(self.loss_mask[1:])


def encode_pair(tokenizer: Tokenizer, prompt: str, response: str, end: int) -> Encoded:
    """A prompt and its response, which `end`, the end-of-text token, ends. ValueError: fewer than two tokens."""
    ids, offsets = tokenizer.encode_with_offsets(prompt + response)
    return _encoded(ids, [stop > len(prompt) for _, stop in offsets], end)


def encode_chat(tokenizer: Tokenizer, messages: Messages, end: int, **variables: Any) -> list[Encoded]:
    """A chat as examples in which the assistant's turns count, each up to and including its end-of-turn token.

    One example, where each rendering is the beginning of the next. Some templates show an earlier turn otherwise than
    the last one (without its reasoning): then there is one example for each turn, as it was generated. `end`, the
    end-of-text token, ends an example whose last turn the template leaves without a special token; messages after the
    last turn are left out. `variables` reach the template, e.g. `tools`. ValueError (TemplateError is one) if the
    template can't show these messages, or shows a turn otherwise than its prompt begins it.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    rendered = [_rendered_turn(tokenizer, messages, turn, variables) for turn in turns]
    spans = [(len(asked), len(answered)) for asked, answered in rendered]
    texts = [text for pair in rendered for text in pair]
    if all(later.startswith(earlier) for earlier, later in pairwise(texts)):
        return [_conversation(tokenizer, texts[-1], spans, end)]
    return [_conversation(tokenizer, text, [span], end) for (_, text), span in zip(rendered, spans, strict=True)]


def encode_answer(tokenizer: Tokenizer, messages: Messages, response: str, end: int, **variables: Any) -> Encoded:
    """As `encode_chat`, of the one turn in which the assistant answers `messages` with `response`."""
    answered = [*messages, {"role": "assistant", "content": response}]
    asked, text = _rendered_turn(tokenizer, answered, len(messages), variables)
    return _conversation(tokenizer, text, [(len(asked), len(text))], end)


def _rendered_turn(
    tokenizer: Tokenizer, messages: Messages, turn: int, variables: Mapping[str, Any]
) -> tuple[str, str]:
    """The texts of a chat up to where message `turn` begins, and with it. ValueError as for `encode_chat`."""

    def rendered(some: Messages, *, prompt: bool) -> str:
        return tokenizer.chat_text(some, add_generation_prompt=prompt, **variables)

    answered = rendered(messages[: turn + 1], prompt=False)
    if turn > 0:
        asked = rendered(messages[:turn], prompt=True)
    else:  # no chat before it could be rendered: it begins after a generation prompt, or what all chats begin with
        question = rendered(_QUESTION, prompt=False)
        opening = rendered(_QUESTION, prompt=True).removeprefix(question)
        asked = answered[: answered.find(opening)] + opening if opening else commonprefix((answered, question))
    if not answered.startswith(asked):
        raise ValueError(
            f"the chat template shows message {turn + 1}, an assistant's, otherwise than the prompt for it begins: "
            f"the prompt ends with {asked[-40:]!r}, and there the message reads "
            f"{answered[max(0, len(asked) - 40) :][:60]!r}"
        )
    return asked, answered


def _conversation(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], end: int) -> Encoded:
    """A rendering whose responses are at `spans`, in characters.

    A response counts up to its last special token, where a model stops, if only white space follows it there: templates
    like to write a line end after it.
    """
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    loss_mask = [False] * len(ids)
    ended = False
    for start, stop in spans:
        places = [i for i, (begins, stops) in enumerate(offsets) if begins < stop and stops > start]
        special = [i for i in places if ids[i] in tokenizer.special_ids]
        ended = bool(special) and not text[offsets[special[-1]][1] : stop].strip()
        for place in places:
            loss_mask[place] = not ended or place <= special[-1]
    return _encoded(ids, loss_mask, None if ended else end)


def _encoded(ids: Sequence[int], loss_mask: Sequence[bool], end: int | None) -> Encoded:
    """The example with `end` as its last token, unless that is there already or None."""
    if end is not None and ids[-1:] != [end]:
        ids, loss_mask = [*ids, end], [*loss_mask, True]
    if len(ids) < 2:
        raise ValueError("fewer than two tokens: there is nothing to predict")
    return Encoded(tuple(ids), tuple(loss_mask))
