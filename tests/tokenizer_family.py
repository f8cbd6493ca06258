"""Small tokenizers that put spaces, bytes and composed characters in every way that models' tokenizers do.

Their merges reach over spaces and punctuation, so that a token often stands on both sides of a border.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
MERGES = ["t h", "th e", "he l", "h e", "l l", "hel lo", "l o", "_ the", "_ hello", ": _", "_ _", "a b", "ab _", "_ a"]
"""With `_` for a space."""


def _vocabulary(first: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [tuple(part.replace("_", space) for part in merge.split()) for merge in MERGES]
    tokens = dict.fromkeys([*SPECIAL, *first, *(a + b for a, b in merges), space + "hello", "hello", "hel"])
    known = {token: index for index, token in enumerate(tokens)}
    return known, [(a, b) for a, b in merges if a in known and b in known]


def byte_level(*, prefix: bool = False, regex: bool = False, nfc: bool = False, trim: bool = False) -> Tokenizer:
    """As GPT-2's, Qwen2's (NFC)."""
    known, merges = _vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    made = Tokenizer(models.BPE(vocab=known, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    if nfc:
        made.normalizer = normalizers.NFC()
    if trim:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.add_special_tokens(SPECIAL)
    return made


def sentencepiece(*, prepend: bool = False, scheme: str | None = None, bos: bool = True) -> Tokenizer:
    """As Llama 2's: the space before a text is put by a normalizer, by Metaspace, or not at all (Gemma)."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABC:.,!\n"]
    known, merges = _vocabulary([f"<0x{byte:02X}>" for byte in range(256)] + letters, "▁")
    made = Tokenizer(models.BPE(vocab=known, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        steps = [normalizers.Prepend("▁")] if prepend else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prepend or scheme in ("first", "always") else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(SPECIAL)
    return made


FAMILY: dict[str, Callable[[], Tokenizer]] = {
    "prepend": lambda: sentencepiece(prepend=True),
    "metaspace first": lambda: sentencepiece(scheme="first"),
    "metaspace always": lambda: sentencepiece(scheme="always"),
    "metaspace never": lambda: sentencepiece(scheme="never", bos=False),
    "replace": lambda: sentencepiece(),
    "byte level": lambda: byte_level(),
    "byte level, words": lambda: byte_level(regex=True, trim=True),
    "byte level, prefix": lambda: byte_level(prefix=True, trim=True),
    "byte level, NFC": lambda: byte_level(nfc=True),
}


def token_a_byte(*, bos: bool = False) -> Tokenizer:
    """`<s>`, `</s>` and one token for each byte; `bos` puts `<s>` before every text."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(tokens[:2])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def panicking() -> Tokenizer:
    """Its decoder cuts a character off both ends of a token, of which token 1 has too few: the library panics."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1, "xlong tokenx": 2}, unk_token="<unk>"))
    made.decoder = decoders.Strip("x", 1, 1)
    return made


def bytes_of(made: Tokenizer, ids: list[int], text: str) -> list[bytes]:
    """What each token spells, in the end the text: the space that is put before it is of no token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    found = []
    for token in map(made.id_to_token, ids):
        if token in SPECIAL:
            found.append(token.encode())
        elif token.startswith("<0x") and len(token) == 6:
            found.append(bytes([int(token[3:5], 16)]))
        elif isinstance(made.pre_tokenizer, pre_tokenizers.ByteLevel):
            found.append(bytes(byte_of[one] for one in token))
        else:
            found.append(token.replace("▁", " ").encode())
    if len(b"".join(found)) == len(text.encode()) + 1:
        found[0] = found[0].removeprefix(b" ")
    return found
