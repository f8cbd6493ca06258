"""The files that go along with a model's weights: configuration, tokenizer, licence. Importable without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from megalite.errors import maybe_fault
from megalite.files import DurableFile, write_durably
from megalite.weights.folder import CONFIG
from megalite.weights.hf import inside
from megalite.weights.manifest import digest_of
from megalite.weights.shards import STEP

BESIDE = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "LICENSE*",
    "README.md",
)
"""Files that go along with the weights; code never does."""

Companions = dict[str, Path | bytes]
"""By name: the file to copy, or its new content."""


def beside(folder: Path) -> list[Path]:
    """The files of a model folder that go along with its weights; CheckpointError if one links out of the folder."""
    names = sorted(path.name for path in folder.iterdir() if any(fnmatchcase(path.name, one) for one in BESIDE))
    paths = [inside(folder, name) for name in names]
    return [path for path in paths if path.is_file()]


def with_dtype(values: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json's values for weights of another dtype; None leaves them."""
    if dtype is None:
        return dict(values)
    key = "torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"
    return {**values, key: dtype}


def chosen(folder: Path, values: Mapping[str, Any], dtype: str | None) -> Companions:
    """What is to be put beside the weights: byte for byte, but for config.json where the dtype changes."""
    companions: Companions = {path.name: path for path in beside(folder)}
    if dtype is not None:
        text = json.dumps(with_dtype(values, dtype), indent=2, ensure_ascii=False)
        companions[CONFIG] = (text + "\n").encode()
    return companions


def nbytes(companions: Companions) -> int:
    return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in companions.values())


def write(companions: Companions, out: Path) -> dict[str, str]:
    """Put them in place; gives their digests."""
    digests = {}
    for name, content in companions.items():
        if isinstance(content, bytes):
            write_durably(out / name, content)
        else:
            with open(content, "rb") as source, DurableFile(out / name) as target:
                shutil.copyfileobj(source, target)
        digests[name] = digest_of_file(out / name)
        maybe_fault(STEP)
    return digests


def are_in(companions: Companions, out: Path) -> bool:
    """Whether a folder holds all of them, as they are now."""
    return all(
        (out / name).is_file()
        and digest_of_file(out / name) == (digest_of(one) if isinstance(one, bytes) else digest_of_file(one))
        for name, one in companions.items()
    )


def digest_of_file(path: Path) -> str:
    """The digest of a whole file."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
