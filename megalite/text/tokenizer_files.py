"""What the files of a tokenizer say together, with the precedence that transformers (5) gives them. Torch-free.

Where they agree, tokenizer.json is the tokenizer. Where they do not:

- Named and additional special tokens: special_tokens_map.json goes before tokenizer_config.json and counts together
  with added_tokens.json, both only where tokenizer_config.json has no `added_tokens_decoder`. Named tokens that are
  missing altogether are those of the tokenizer's class; null is none.
- Flags of added tokens: `added_tokens_decoder` before tokenizer.json. Ids are always the vocabulary's.
- Spaces: classes in `_CLASSES` take vocabulary, merges and post-processor from tokenizer.json and make the rest anew,
  from tokenizer_config.json (`add_prefix_space`, `legacy`). Every other class leaves tokenizer.json as it is.
- What is put before and after a text is the post-processor's alone; add_bos_token and add_eos_token are not obeyed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megalite.errors import CheckpointError
from megalite.files import read_whole

MAX_BYTES = 128 << 20
"""Of a file."""
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _ADDITIONAL, _OWN = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"
"""Keys of special tokens beside the usual ones: their present and older name, and that of those with names."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces that Qwen2's merges never cross."""


@dataclass(frozen=True, kw_only=True)
class _Class:
    """How one of transformers' tokenizer classes makes a tokenizer from a vocabulary and merges."""

    make: Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None]
    """Sets normalizer, pre-tokenizer and decoder, by the values of tokenizer_config.json."""
    model: Callable[[Mapping[str, str]], dict[str, Any]] = lambda named: {}
    """Options of the BPE model, by the named tokens."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Named tokens where the files name none."""
    all_special: bool = False
    """Named and additional tokens are special whatever the files say."""


def _byte_level(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(values.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()


def _composed_byte_level(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    _byte_level(backend, values)
    backend.normalizer = normalizers.NFC()
    backend.post_processor = None


def _qwen2(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated", invert=False)
    prefix = bool(values.get("add_prefix_space"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()


def _llama(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    prefix = values.get("add_prefix_space") in (None, True)
    scheme = ("always" if values.get("legacy") else "first") if prefix else "never"
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([*_SPACED, *strip])


def _gemma(backend: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence(_SPACED)


_SPACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_END = "<|endoftext|>"
_GPT2 = {"unk_token": _END, "bos_token": _END, "eos_token": _END}
_CLASSES = {
    "GPT2Tokenizer": _Class(make=_byte_level, named=_GPT2),
    "GPTNeoXTokenizer": _Class(make=_composed_byte_level, named={**_GPT2, "pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": _Class(
        make=_qwen2, named={"unk_token": _END, "eos_token": _END, "pad_token": _END}, all_special=True
    ),
    "LlamaTokenizer": _Class(
        make=_llama,
        model=lambda named: {"fuse_unk": True, "byte_fallback": True},
        named={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "GemmaTokenizer": _Class(
        make=_gemma,
        model=lambda named: {"fuse_unk": True, "byte_fallback": True, "unk_token": named["unk_token"]},
        named={f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
    ),
}
_CLASS_OF_FAMILY = {
    "gpt2": "GPT2Tokenizer",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "phi3"), "TokenizersBackend"),
}
"""By config.json's model_type."""
_OF_FAMILY_ALONE = ("qwen2",)
"""Families whose class counts whatever tokenizer_config.json says."""
_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast")


def read_tokenizer(
    folder: Path, model: Mapping[str, Any] | None = None
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    """The tokenizer of a folder with a tokenizer.json, its named tokens, and its chat templates by name.

    `model`: what config.json says, None: the folder's. CheckpointError: a file is damaged.
    """
    path = folder / "tokenizer.json"
    content = _content(path)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception, whatever is wrong
        is_pointer = content.startswith(b"version https://git-lfs.github.com/")
        hint = " It is a Git LFS pointer; fetch the file itself with `git lfs pull`." if is_pointer else ""
        raise CheckpointError(f"{path}: is not a tokenizer that can be read: {error}.{hint}") from error
    try:
        values, tokens = _read_values(folder)
        kind = _class(values, _read_json(folder / "config.json") if model is None else model, path)
        named = _named_tokens(values, kind)
        backend = _made_anew(backend, path, kind, values, named) if kind is not None else backend
        _add_tokens(backend, tokens, named, _additional(values), kind)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(values.get("split_special_tokens"))
        return backend, named, _templates(folder, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/tokenizer_config.json: can't be used: {error}") from error


def _content(path: Path) -> bytes:
    """Content of one of the files, empty if there is none. CheckpointError: no file, or too large for what it is."""
    try:
        return read_whole(path, MAX_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_content(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def _read_values(folder: Path) -> tuple[dict[str, Any], dict[int, Any]]:
    """tokenizer_config.json with what special_tokens_map.json changes, and the added tokens of all files by id."""
    values = _read_json(folder / "tokenizer_config.json")
    if not values.get(_EXTRA) and _ADDITIONAL in values:
        values[_EXTRA] = values.pop(_ADDITIONAL)
    _take_named(values)
    tokens: dict[int, Any] = {}
    if "added_tokens_decoder" in values:
        tokens |= {int(token_id): entry for token_id, entry in values["added_tokens_decoder"].items()}
    else:
        for key, token in _read_json(folder / "special_tokens_map.json").items():
            if key == _EXTRA and isinstance(token, list):
                known = values.get(key) or []
                token = [*known, *(one for one in token if one not in known)]
            values[key] = token
        _take_named(values)
    values.setdefault(_EXTRA, values.get(_ADDITIONAL))
    if "added_tokens_decoder" not in values:
        special = {_token_text(values.get(name)) for name in _NAMED} | set(_additional(values))
        for text, token_id in _read_json(folder / "added_tokens.json").items():
            tokens[token_id] = {"content": text, "special": text in special, "normalized": text not in special}
        tokens |= {entry["id"]: entry for entry in _read_json(folder / "tokenizer.json").get("added_tokens", [])}
    return values, tokens


def _take_named(values: dict[str, Any]) -> None:
    """Put additional special tokens that have names apart from those that have none."""
    if isinstance(values.get(_EXTRA), dict):
        values[_OWN] = {**values.get(_OWN, {}), **values.pop(_EXTRA)}


def _class(values: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> _Class | None:
    """The class that makes the tokenizer anew, by tokenizer_config.json and config.json; None: it is as it is."""
    family = config.get("model_type")
    given = values.get("tokenizer_class") or config.get("tokenizer_class")
    given = given.removesuffix("Fast") if given else None
    of_family = _CLASS_OF_FAMILY.get(family) if isinstance(family, str) else None
    if given == "LlamaTokenizer" and family not in _OF_FAMILY_ALONE and '"ByteLevel"' in path.read_text("utf-8"):
        return None  # as Llama 3's, whose files still name the class of Llama 2
    if given is None:
        chosen = of_family
    elif of_family is None or of_family == given:
        chosen = given
    else:
        chosen = of_family if family in _OF_FAMILY_ALONE else given
        chosen = None if of_family in _AS_IT_IS else chosen
    return _CLASSES.get(chosen) if chosen is not None else None


def _made_anew(
    backend: tokenizers.Tokenizer, path: Path, kind: _Class, values: Mapping[str, Any], named: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """The tokenizer that a class makes of the vocabulary and merges of tokenizer.json."""
    model = _read_json(path)["model"]
    if not isinstance(model.get("vocab"), dict) or "merges" not in model:
        return backend  # no BPE
    merges: list[Any] = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, **kind.model(named)))
    made.post_processor = backend.post_processor
    kind.make(made, values)
    return made


# ---- tokens


def _token_text(token: Any) -> str:
    """The text of a token that a file gives as a string or as a mapping; empty for null."""
    if token is None:
        return ""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{token!r} is not a token")
    return text


def _named_tokens(values: Mapping[str, Any], kind: _Class | None) -> dict[str, str]:
    """Special tokens by name: the usual ones, and those of a class of the model's own such as `image_token`."""
    given = {**(kind.named if kind else {}), **values}
    own = {name: token for name, token in values.items() if name.endswith("_token") and name not in _NAMED}
    found = {name: given.get(name) for name in _NAMED}
    found |= {name: token for name, token in own.items() if isinstance(token, str) or _is_token(token)}
    found |= values.get(_OWN, {})
    return {name: text for name, token in found.items() if (text := _token_text(token))}


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type") == "AddedToken"


def _additional(values: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name."""
    return [_token_text(token) for token in values.get(_EXTRA) or []]


def _added_token(entry: Any, *, special: bool) -> AddedToken:
    return AddedToken(_token_text(entry), special=special, **{flag: entry[flag] for flag in _FLAGS if flag in entry})


def _add_tokens(
    backend: tokenizers.Tokenizer,
    tokens: Mapping[int, Any],
    named: Mapping[str, str],
    additional: Iterable[str],
    kind: _Class | None,
) -> None:
    """Give the tokenizer the added tokens of all files, where it does not have them with these flags."""
    known = {repr(token): token.content for token in backend.get_added_tokens_decoder().values()}
    entries = [entry for _, entry in sorted(tokens.items())]
    listed = [_added_token(entry, special=bool(entry.get("special", False))) for entry in entries]
    news = [token for token in listed if repr(token) not in known]
    contents = {*known.values(), *(token.content for token in news)}
    for token in news:
        token.special = token.special or token.content in named.values()
    special = list(dict.fromkeys([*named.values(), *additional]))
    news += [AddedToken(text, special=True) for text in special if text and text not in contents]
    if kind is not None and kind.all_special:
        news += [AddedToken(text, special=True) for text in special if text]
    backend.add_tokens(news)


# ---- chat templates


def _templates(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: from files if there are any, else from tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _content(path).decode("utf-8") for name, path in files.items() if path.exists()}
    given = values.get("chat_template")
    if found or given is None:
        return found
    named = {"default": given} if isinstance(given, str) else given
    if isinstance(named, list):
        named = {entry["name"]: entry["template"] for entry in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ValueError("chat_template must be a text or a list of {name, template}")
    return named
