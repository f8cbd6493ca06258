"""Tokenizer files that do not agree, against transformers' AutoTokenizer over a grid of folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_family import FAMILY
from tokenizers import AddedToken

from megalite.text.tokenizer import Tokenizer

TEXTS = [
    "hello the",
    "  a",
    "Answer: the</s> the <|user|>hello",
    "e\u0301 123 don't\n\nx",
    "<pad> x<|endoftext|>y <extra> z<new>q <img>",
    "<s>hello",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Ärger im Café — 東京は日本. мир 🙂🏳️‍🌈 don't stop. isn't it ? the end .",
    " leading and trailing\t\r\n 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ☃ \u200b \x00",
    "",
]
CLASSES = ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "GPTNeoXTokenizer", "Unknown"]
CLASSES += [f"{name}Fast" for name in ("GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer")] + [None]
FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "phi3", "gemma2", None]


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, **plain, **flags}


CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "GPT-2's prefix": ("byte level", {"config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}),
    "no prefix": ("byte level, prefix", {"config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "a prefix of no class": ("byte level", {"config": {"add_prefix_space": True}}),
    "Llama": ("prepend", {"config": {"tokenizer_class": "LlamaTokenizer", "legacy": False}}),
    "Llama, legacy": ("prepend", {"config": {"tokenizer_class": "LlamaTokenizer", "legacy": True}}),
    "Llama, no prefix": ("prepend", {"config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}}),
    "Llama of bytes": ("byte level", {"config": {"tokenizer_class": "LlamaTokenizer"}}),
    "Mistral": ("prepend", {"config": {"tokenizer_class": "LlamaTokenizer"}, "model": {"model_type": "mistral"}}),
    "Qwen2 always": (
        "byte level, words",
        {"config": {"tokenizer_class": "PreTrainedTokenizerFast"}, "model": {"model_type": "qwen2"}},
    ),
    "Qwen3": ("byte level", {"model": {"model_type": "qwen3"}}),
    "class in config.json": ("byte level", {"model": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}}),
    "Gemma": ("replace", {"config": {"unk_token": "<unk>"}, "model": {"model_type": "gemma2"}}),
    "the map goes first": ("prepend", {"config": {"eos_token": "</s>"}, "map": {"eos_token": "<|user|>"}}),
    "null in the map": ("prepend", {"config": {"eos_token": "</s>"}, "map": {"eos_token": None}}),
    "the map is not read": (
        "prepend",
        {"config": {"eos_token": "</s>", "added_tokens_decoder": {}}, "map": {"eos_token": "<|user|>"}},
    ),
    "null and a class's own": ("byte level", {"config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": None}}),
    "flags": ("byte level", {"config": {"added_tokens_decoder": {"3": added("<|user|>", lstrip=True, special=True)}}}),
    "flags in the map": ("prepend", {"map": {"eos_token": added("<|user|>", rstrip=True)}}),
    "another id": ("byte level", {"config": {"added_tokens_decoder": {"7": added("<s>", special=True)}}}),
    "added_tokens.json": (
        "byte level",
        {"config": {"eos_token": "<new>"}, "added": {"<new>": 275, "<pad>": 276}, "map": {"pad_token": "<pad>"}},
    ),
    "additional": ("byte level", {"config": {"additional_special_tokens": ["<extra>", "</s>"]}}),
    "named additional": (
        "byte level",
        {"config": {"extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": ["<extra>"]}},
    ),
    "a name of its own": ("byte level", {"config": {"image_token": "<img>"}}),
    "special tokens as text": ("byte level", {"config": {"split_special_tokens": True}}),
    "bos and eos by keys": (
        "byte level",
        {"config": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}},
    ),
    "bos by the template, no bos by the key": ("prepend", {"config": {"bos_token": "<s>", "add_bos_token": False}}),
    "spaces that are not cleaned up": ("byte level, words", {"config": {"clean_up_tokenization_spaces": True}}),
    "a token that takes the spaces around it": (
        "prepend",
        {"config": {"added_tokens_decoder": {"3": added("<|user|>", lstrip=True, rstrip=True, special=True)}}},
    ),
}


def write(folder: Path, kind: str, files: dict[str, dict[str, Any]]) -> Path:
    FAMILY[kind]().save(str(folder / "tokenizer.json"))
    names = {"config": "tokenizer_config", "map": "special_tokens_map", "added": "added_tokens", "model": "config"}
    for key, values in files.items():
        (folder / f"{names[key]}.json").write_text(json.dumps(values))
    return folder


def check(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = Tokenizer.load(folder)
    assert ours is not None
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.names, len(ours), ours.vocab_size) == (theirs.special_tokens_map, len(theirs), theirs.vocab_size)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize("name", CASES)
def test_files_that_disagree_are_read_as_transformers_reads_them(name, tmp_path):
    kind, files = CASES[name]
    check(write(tmp_path, kind, files))


@pytest.mark.parametrize("seed", range(24))
def test_random_folders(seed, tmp_path):
    draw = random.Random(seed)
    token = [draw.choice(["</s>", "<s>", "<|user|>", "<new>", "<|endoftext|>", None]) for _ in range(8)]
    config = {
        "tokenizer_class": CLASSES[seed % len(CLASSES)],
        "add_prefix_space": draw.choice([True, False]),
        "legacy": draw.choice([True, False, None]),
        "add_eos_token": True,
        "bos_token": token[0],
        "eos_token": {"__type": "AddedToken", **added("<|assistant|>", lstrip=True)} if seed % 5 == 0 else token[1],
        "pad_token": token[2],
        "extra_special_tokens": draw.choice([["<extra>"], {"image_token": "<img>"}, []]),
        "additional_special_tokens": ["<extra>", "</s>"],
        "added_tokens_decoder": {"2": added("</s>", special=draw.choice([True, False]), lstrip=True)},
    }
    files = {
        "config": {key: value for key, value in config.items() if draw.random() < 0.6},
        "map": {"eos_token": token[3], "pad_token": "<pad>", "bos_token": token[4]},
        "added": {"<new>": 275, "<pad>": 276},
        "model": {"model_type": draw.choice(FAMILIES)},
    }
    kept = {key: values for key, values in files.items() if key == "config" or draw.random() < 0.5}
    if kept.get("model", {}).get("model_type") is None:
        kept.pop("model", None)
    check(write(tmp_path, list(FAMILY)[seed % len(FAMILY)], kept))


@pytest.mark.parametrize("kind", ["byte level", "prepend", "metaspace always", "replace"])
def test_an_added_token_reads_as_it_is_written(kind, tmp_path):
    words = ["đem", "ilÖveyou", "Ġhello", "a▁b", "two words", " x", "<0x4>", "</s>"]
    made = FAMILY[kind]()
    made.add_tokens([AddedToken(word, normalized=False) for word in words[:-1]])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    for word in words:
        token_id = ours.backend.token_to_id(word)
        for ids in ([token_id], [*ours.encode("é hello", add_special_tokens=False), token_id], [token_id, token_id]):
            detokenizer = ours.detokenizer(skip_special_tokens=False)
            pieces = [*map(detokenizer.feed, ids), detokenizer.flush()]
            text = ours.decode(ids, skip_special_tokens=False)
            assert text == "".join(pieces)
            assert text.endswith(word if len(ids) != 2 or ids[0] != ids[1] else word + word)
