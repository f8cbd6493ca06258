"""Text to token ids and back: tokenizer.json with the special tokens and chat template beside it. Torch-free.

What it does is what transformers does with the same folder, with two exceptions: `clean_up_tokenization_spaces` is
never applied, because it removes spaces that the model wrote, and an added token always reads as it is written.
"""

from __future__ import annotations

import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import tokenizers

from megalite.errors import CheckpointError
from megalite.text.chat_template import ChatTemplate, TemplateError
from megalite.text.detokenizer import Detokenizer, TokenizerError, decoding_of, failing_alone
from megalite.text.plain_chats import MARK, PlainChats
from megalite.text.tokenizer_files import read_tokenizer

MAX_TEXT = 1 << 24
"""Longest text that is worth tokenising, characters."""
MAX_TOKEN = 1 << 10
"""Characters of text that one token may stand for, what a normalizer drops included; the longest tokens in use have a
quarter of that."""
_UNCONVERTED = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
"""Older forms of a tokenizer, from which tokenizer.json can be made."""
_BATCH_CHARACTERS = 1 << 20
_TEMPLATES_KEPT = 4
"""Enough for the usual one, one for tools, and some of the caller's own."""
_GOES_ON = "[the last message goes on here] "
"""Stands in a chat where an answer is to go on; the space tells whether the template cuts white space off."""


class Encoding(dict[str, Any]):
    """Texts in ids, by key and by attribute, as programs written for transformers read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Tokenizer:
    """A model's tokenizer; made by `load`."""

    def __init__(self, backend: tokenizers.Tokenizer, names: dict[str, str], templates: dict[str, str]):
        self.backend = backend
        self.names = names
        """The special tokens that have a name, e.g. `bos_token`, as text."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=False)
        """Without added tokens, as transformers counts; `len` counts them too."""
        self._length = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self._head, self._tail = _added_around(backend)
        backend.post_processor = None  # what it adds is known, and some of them trim the offsets of tokens
        self._templates = templates
        self._compiled: OrderedDict[str, ChatTemplate] = OrderedDict()
        """The templates that were used last, by name or text; each may hold a process."""
        self._rendering = Lock()
        self._plain_chats = PlainChats(backend)
        self._decoding = decoding_of(backend)

    @classmethod
    def load(cls, folder: str | Path, *, model: Mapping[str, Any] | None = None) -> Tokenizer | None:
        """The tokenizer in `folder`, or None if there is none. CheckpointError: it is damaged or of an older form.

        `model`: config.json of the model that it is for, if that is not in the folder; see text/tokenizer_files.py.
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
        _refuse_surrogates(text)
        with failing_alone():  # a batch of one, since the library's `encode` keeps all other threads waiting
            return self._whole(self.backend.encode_batch_fast([text])[0], add_special_tokens)

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
        _refuse_surrogates(text)
        with failing_alone():
            [encoding] = self.backend.encode_batch([text])
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

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int] | ValueError]:
        """What `encode` gives or raises for each text, on all cores."""
        encoded: list[list[int] | ValueError] = []
        for batch in _batches(texts):
            try:
                with failing_alone():
                    together = self.backend.encode_batch_fast(batch)
                encoded += [self._whole(encoding, add_special_tokens) for encoding in together]
            except TokenizerError:  # one text spoils its batch; find out which
                encoded += [self._encode_alone(text, add_special_tokens) for text in batch]
        return encoded

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int] | ValueError:
        try:
            return self.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            return error

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """The text of ids, of an array of them or of one id; of several lists of ids, their texts.

        TokenizerError: the decoder fails at them.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and not isinstance(ids[0], int) and isinstance(ids[0], Iterable):
            return [self.decode(one, skip_special_tokens=skip_special_tokens) for one in ids]
        if self._decoding.misread.isdisjoint(ids):
            with failing_alone("these tokens"):  # a batch, as in `encode`
                text: str = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
            return text
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.feed, ids), detokenizer.flush()])

    def token_text(self, token_id: int) -> str:
        """One token by itself, as it reads inside a text; ids without a token are empty."""
        return self._decoding.alone(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, also where they are half a character."""
        return self._decoding.bytes_alone(token_id)

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

    def chat_text(
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
        shown = _marked(messages) if continue_final_message else messages
        with self._rendering:
            template = self._template(chat_template, tools=variables.get("tools") is not None)
            text = template.render(shown, add_generation_prompt=add_generation_prompt, **variables)
        return _up_to_mark(text) if continue_final_message else text

    def plain_chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """As `chat_text`, of a chat whose texts must not become special tokens, whatever they spell; tools and other
        variables count as its texts. Encode it with `encode_plain`, and show it with `unmarked`."""
        return self.chat_text(self._plain_chats.marked(messages), **self._plain_chats.marked(variables))

    unmarked = staticmethod(PlainChats.unmarked)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text by `plain_chat_text`. ValueError as from `encode`."""
        if MARK not in text:
            return self.encode(text, add_special_tokens=False)
        _refuse_surrogates(text)
        with self._rendering:  # one of several threads makes what it needs
            return self._plain_chats.encode(text)

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
        self._compiled.move_to_end(name)
        if len(self._compiled) > _TEMPLATES_KEPT:
            _, oldest = self._compiled.popitem(last=False)
            oldest.close()
        return self._compiled[name]

    # ---- what programs call besides, under transformers' names

    def __len__(self) -> int:
        return self._length

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> Encoding:
        """`input_ids` and `attention_mask` of a text, or lists of them. ValueError as from `encode`."""
        found = []
        for ids in self.encode_batch([text] if isinstance(text, str) else text, add_special_tokens=add_special_tokens):
            if isinstance(ids, ValueError):
                raise ids
            found.append(ids)
        masks = [[1] * len(ids) for ids in found]
        if isinstance(text, str):
            return Encoding(input_ids=found[0], attention_mask=masks[0])
        return Encoding(input_ids=found, attention_mask=masks)

    def batch_decode(self, sequences: Iterable[Any], *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(one, skip_special_tokens=skip_special_tokens) for one in sequences]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        """The prompt for a chat, or a list of them for several: as text, ids, or (`return_dict`) an Encoding.

        The defaults are those of a prompt for `generate`, not transformers'. `variables`, and TemplateError, as of
        `chat_text`.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        variables |= {"add_generation_prompt": add_generation_prompt} | ({} if tools is None else {"tools": tools})
        texts = [self.chat_text(chat, **variables) for chat in (conversation if several else [conversation])]
        if not tokenize:
            return texts if several else texts[0]
        encoding = self(texts if several else texts[0], add_special_tokens=False)
        return encoding if return_dict else encoding.input_ids

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or of each of several; unk's, or None, for what is no token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self._named_id("unk_token") if found is None else found

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Any:
        return self.backend.id_to_token(ids) if isinstance(ids, int) else [self.backend.id_to_token(one) for one in ids]

    @property
    def bos_token(self) -> str | None:
        return self.names.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.names.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.names.get("pad_token")

    def close(self) -> None:
        """End the processes that render chats; a later chat starts them again."""
        for template in self._compiled.values():
            template.close()

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.names[name]) if name in self.names else None


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a surrogate pair at character {error.start}") from None


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts, not too many at once: encodings take many times the memory of their text until their ids are taken."""
    start = length = 0
    for end, text in enumerate(texts, 1):
        length += len(text) + 1
        if length >= _BATCH_CHARACTERS or end == len(texts):
            yield texts[start:end]
            start, length = end, 0


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


def _texts(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Short texts, one of which a tokenizer knows; the first mostly is enough, and a vocabulary takes long to list."""
    yield "a"
    yield from backend.get_vocab()


def _added_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, e.g. bos."""
    for text in _texts(backend):
        with suppress(TokenizerError), failing_alone():
            encoding = backend.encode(text)
            added = encoding.special_tokens_mask
            if 0 in added:
                first, end = added.index(0), len(added) - added[::-1].index(0)
                return encoding.ids[:first], encoding.ids[end:]
    return backend.encode("").ids, []


def _composes(character: str) -> bool:
    """Whether a normalizer may make one character of this one and the one before it: marks and parts of Hangul."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
