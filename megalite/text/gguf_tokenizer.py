"""The tokenizer in a GGUF file as Hugging Face's files: tokenizer.json, tokenizer_config.json, chat templates.

Two kinds: `gpt2`, byte-level BPE whose merges are in the file and whose word pattern has a name there, and `llama`,
SentencePiece, whose merges follow from the scores of its pieces. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from megalite.errors import CheckpointError
from megalite.files import as_json
from megalite.text.tokenizer_files import QWEN2_WORDS

_UNKNOWN, _CONTROL, _OWN, _UNUSED = 2, 3, 4, 5
"""Types of tokens; those that a user defined are 4."""
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+TAIL|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*TAIL|"
    r"\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "default"), ""),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "dbrx": QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    **dict.fromkeys(("qwen2", "stablelm2", "hunyuan"), QWEN2_WORDS),
    "tekken": _CASED.replace("TAIL", "").replace("DIGITS", ""),
    "gpt-4o": _CASED.replace("TAIL", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}"),
}
"""Name of a word pattern -> the pattern that merges never cross; empty: GPT-2's own, `digits`: that and every digit."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
"""A word that is a token is never split, and a text begins with the token for that unless the file says otherwise."""


def tokenizer_files(metadata: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """The files by name. `path` is the GGUF file's, for messages.

    CheckpointError: it has no tokenizer, or one of a kind that is not known.
    """
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = given.get("model"), given.get("tokens")
    if kind is None or not isinstance(tokens, list):
        raise CheckpointError(f"{path}: has no tokenizer (tokenizer.ggml.model and .tokens)")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{path}: its tokenizer is of the kind {kind}; read are gpt2 and llama")
    types = given.get("token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    try:
        backend = (_byte_level if kind == "gpt2" else _pieces)(given, types, path)
        _add_tokens(backend, tokens, types)
        _surround(backend, given, tokens)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception, whatever is wrong
        raise CheckpointError(f"{path}: its tokenizer can't be used: {error}") from error
    files = {"tokenizer.json": backend.to_str(pretty=False).encode(), **_templates(metadata)}
    files["tokenizer_config.json"] = as_json(_config(given, tokens)).encode()
    return files


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Without the rows that only fill up the embedding."""
    filled = {index: text for index, text in enumerate(tokens) if types[index] == _UNUSED and text == f"[PAD{index}]"}
    return {text: index for index, text in enumerate(tokens) if index not in filled}


def _byte_level(given: Mapping[str, Any], types: Sequence[int], path: Path) -> tokenizers.Tokenizer:
    name = given.get("pre", "default")
    if name not in _WORDS:
        known = ", ".join(sorted(_WORDS))
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {name!r}, a word pattern that is not known ({known})")
    if "merges" not in given:
        raise CheckpointError(f"{path}: has no tokenizer.ggml.merges")
    merges: list[Any] = [tuple(one.split(" ", 1)) for one in given["merges"]]
    vocabulary = _vocabulary(given["tokens"], types)
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    words, prefix = _WORDS[name], bool(given.get("add_space_prefix", False))
    plain = words in ("", "digits")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=plain)
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if words == "digits" else []
    before += [] if plain else [pre_tokenizers.Split(Regex(words), behavior="isolated", invert=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, letters])
    backend.normalizer = normalizers.NFC() if name == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(given: Mapping[str, Any], types: Sequence[int], path: Path) -> tokenizers.Tokenizer:
    if "scores" not in given or len(given["scores"]) != len(types):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores must have one score for each token")
    vocabulary = _vocabulary(given["tokens"], types)
    unknown = next((given["tokens"][index] for index, kind in enumerate(types) if kind == _UNKNOWN), None)
    merges = _merges(vocabulary, given["scores"], types)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = bool(given.get("add_space_prefix", True))
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best pieces first: SentencePiece joins the pair of the best score."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, index in vocabulary.items():
        if types[index] not in (1, _OWN):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    added = [
        AddedToken(text, special=kind != _OWN, normalized=False)
        for text, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _OWN)
    ]
    backend.add_tokens(added)


def _surround(backend: tokenizers.Tokenizer, given: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """The tokens that every text begins and ends with."""
    by_default = given["model"] == "llama" or given.get("pre") in _WHOLE_WORDS
    wanted = {"bos": given.get("add_bos_token", by_default), "eos": given.get("add_eos_token", False)}
    ids: dict[str, int] = {}
    for name, is_wanted in wanted.items():
        if is_wanted and given.get(f"{name}_token_id") is not None:
            ids[name] = given[f"{name}_token_id"]
    if not ids:
        return
    named = {name: tokens[index] for name, index in ids.items()}
    begin, end = ([named[name]] if name in named else [] for name in ("bos", "eos"))
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{one}:1" for one in begin), "$B:1", *(f"{one}:1" for one in end)],
        special_tokens=[(named[name], ids[name]) for name in ids],
    )


def _config(given: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {short: given.get(f"{name}_token_id") for name, short in names.items()}
    named = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}


def _templates(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    start, files = "tokenizer.chat_template", {}
    for key, text in metadata.items():
        if key.startswith(start) and isinstance(text, str):
            name = key.removeprefix(start).removeprefix(".")
            files[f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"] = text.encode()
    return files
