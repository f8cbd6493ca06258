"""A tokenizer for the tiny checkpoints: printable ASCII, one token a character, a few longer ones, and a chat template.

Random models write random characters, which is what tests of stop strings want.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tiny_models import VOCAB
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<s>", "</s>"]
"""Ids 0, 1 and 2, as in the tiny checkpoints' config.json."""
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ name or 'assistant' }}: {% endif %}"
)


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """A copy of a tiny checkpoint in `folder` with a tokenizer of its vocabulary and a chat template."""
    shutil.copytree(checkpoint, folder)
    characters = ["Ġ" if code == 32 else chr(code) for code in range(32, 127)] + ["Ċ"]  # byte-level BPE's spelling
    merges = [("Ġ", "a"), ("e", "r")]
    # the two bytes of "é" are no text by themselves
    tokens = [*SPECIAL, *characters, "Ã", "©", *("".join(pair) for pair in merges)]
    assert len(tokens) == VOCAB
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
