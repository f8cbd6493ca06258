"""The files that go along with a model's weights: configuration, tokenizer, licence, and all else but code.

Torch-free.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megalite.errors import CheckpointError, maybe_fault
from megalite.files import DurableFile, as_json, left_behind, write_durably
from megalite.weights import manifest as manifests
from megalite.weights.folder import CONFIG
from megalite.weights.hf import CODE, INDEX, TEMPLATES, is_weights
from megalite.weights.identity import file_digest
from megalite.weights.manifest import digest_of
from megalite.weights.shards import JOURNAL, STEP
from megalite.weights.tensor_file import is_plain_name

TOKENIZER = (
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
)
"""The files of a tokenizer in all its forms, and the folder of further chat templates."""
MODEL = (CONFIG, "generation_config.json", *TOKENIZER, "LICENSE*", "README.md")
"""Files of one model that must not stay beside the weights of another."""
_NOT_ALONG = {manifests.NAME, INDEX, JOURNAL}
"""Files that describe weight files: whoever writes those writes them anew."""

SideFiles = dict[str, Path | bytes]
"""By name, `folder/file` in subfolders: the file to copy, or its new content."""


def beside(folder: Path) -> dict[str, Path]:
    """The files of a model folder that go along with its weights, by name, those in subfolders too.

    Left out are weights in any format, code, hidden files, names that are not plain, and subfolders that are models or
    training runs of their own. A file may be a link to where the weights or config.json really are. CheckpointError if
    it leads anywhere else.
    """
    homes = {folder.resolve()}
    homes |= {path.resolve().parent for path in folder.iterdir() if is_weights(path.name) or path.name == CONFIG}
    found = {}
    for name in _names(folder, "", set()):
        real = (folder / name).resolve()
        if not any(real.is_relative_to(home) for home in homes):
            raise CheckpointError(
                f"{folder / name}: links to {real}, which is outside the model folder and not beside its weights. "
                "Put the file itself there."
            )
        if real.is_file():
            found[name] = folder / name
    return found


def of_tokenizer(folder: Path) -> SideFiles:
    """The files of a folder that make up its tokenizer."""
    return {name: folder / name for name in _names(folder, "", set()) if is_of_tokenizer(name)}


def is_of_tokenizer(name: str) -> bool:
    templates = name.startswith(f"{TEMPLATES}/")
    return templates or ("/" not in name and any(fnmatchcase(name, one) for one in TOKENIZER))


def _names(folder: Path, prefix: str, seen: set[Path]) -> Iterator[str]:
    """Names of the files in a folder and below; each real folder once, so that links can't go round in circles."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    litter = {path.name for path in left_behind(folder)}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or not is_plain_name(name) or name in _NOT_ALONG | litter:
            continue
        if path.is_dir():
            if not _is_apart(path):
                yield from _names(path, f"{prefix}{name}/", seen)
        elif not is_weights(name) and not any(fnmatchcase(name, one) for one in CODE):
            yield prefix + name


def _is_apart(folder: Path) -> bool:
    """Whether a subfolder is a model of its own, such as a trainer's checkpoint-500, or what a training run keeps."""
    names = {path.name for path in folder.iterdir()}
    return (CONFIG in names and any(map(is_weights, names))) or (folder.name == "training" and "log.jsonl" in names)


def of_model(folder: Path) -> list[Path]:
    """The files that must not stay in a folder beside the weights of another model."""
    mine = {path.name for path in folder.iterdir() if any(fnmatchcase(path.name, one) for one in MODEL)}
    mine |= {path.relative_to(folder).as_posix() for path in folder.glob(f"{TEMPLATES}/*")}
    with suppress(CheckpointError):
        mine |= manifests.read(folder).copies.keys()
    return [folder / name for name in sorted(mine) if (folder / name).is_file() or (folder / name).is_symlink()]


def with_dtype(values: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json's values for weights of another dtype; None leaves them."""
    if dtype is None:
        return dict(values)
    key = "torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"
    inner = values.get("text_config")
    text = {"text_config": with_dtype(inner, dtype)} if isinstance(inner, dict) else {}
    return {**values, **text, key: dtype}


def chosen(folder: Path, values: Mapping[str, Any], dtype: str | None) -> SideFiles:
    """The files to put beside converted weights, unchanged but for config.json where the dtype changes."""
    files: SideFiles = dict(beside(folder))
    if dtype is not None:
        files[CONFIG] = as_json(with_dtype(values, dtype)).encode()
    return files


def nbytes(files: SideFiles) -> int:
    return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in files.values())


def write(files: SideFiles, out: Path) -> dict[str, str]:
    """Write files into a folder; gives their digests."""
    digests = {}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_durably(out / name, content)
        else:
            with open(content, "rb") as source, DurableFile(out / name) as target:
                shutil.copyfileobj(source, target)
        digests[name] = file_digest(out / name)
        maybe_fault(STEP)
    return digests


def are_in(files: SideFiles, out: Path) -> bool:
    """Whether a folder holds all of them, as they are now."""
    return all(
        (out / name).is_file()
        and file_digest(out / name) == (digest_of(one) if isinstance(one, bytes) else file_digest(one))
        for name, one in files.items()
    )
