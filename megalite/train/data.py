"""Text files to packed training sequences: found, tokenised once, then read in an order that a step number decides.

    files --tokenizer--> document <eos> document <eos> ... (train.npy, held_out.npy) --windows--> [B, L + 1] token ids

The prepared folder holds everything a run reads. It is made once and not looked at again, so that a run which is
resumed after the files have changed goes on with the text it began with.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megalite.config.schema import DataSection, TokenizerSection
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.files import DurableFile, write_json
from megalite.model.hf_config import read_json
from megalite.train import bpe

MANIFEST = "data.json"
SPLITS = ("train", "held_out")
NOT_STANDARD_LIBRARY = ("site-packages/", "dist-packages/")
FILES_AT_ONCE = 256
READING = ("sequence_length", "seed")
"""Keys of the data section that decide how the prepared text is read, not what it holds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str
    """Path relative to the source, with forward slashes."""
    path: Path


def find_files(section: DataSection) -> list[SourceFile]:
    """The files of `section`, sorted by name, less the excluded ones. ConfigError if there are none."""
    if section.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [SourceFile(path.relative_to(root).as_posix(), path) for path in root.glob(section.pattern)]
        found = [file for file in found if not file.name.startswith(NOT_STANDARD_LIBRARY)]
    elif Path(section.source).is_dir():
        root = Path(section.source)
        found = [SourceFile(path.relative_to(root).as_posix(), path) for path in root.glob(section.pattern)]
    else:
        pattern = Path(section.source)
        root = Path(pattern.anchor)
        matches = root.glob(pattern.relative_to(root).as_posix()) if section.source else ()
        found = [SourceFile(path.as_posix(), path) for path in matches]
    kept = [
        file
        for file in found
        if file.path.is_file() and not any(fnmatchcase(file.name, pattern) for pattern in section.exclude)
    ]
    if not kept:
        fix = "Give `stdlib`, a folder with files that match data.pattern, or a glob."
        raise ConfigError(Problem(key="data.source", rule="must name some text files", value=section.source, fix=fix))
    return sorted(kept, key=lambda file: file.name)


def is_held_out(name: str, share: float) -> bool:
    """Whether a file is kept for evaluation: a function of its name alone, true for `share` of all names."""
    return _hash(name) < share * 2.0**64


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _texts(files: list[SourceFile]) -> Iterator[str]:
    """What the files hold; one that is not UTF-8 is passed over (the standard library has some on purpose)."""
    for file in files:
        try:
            text = file.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            log.info("%s: not UTF-8, passed over", file.path)
            continue
        if text:
            yield text


def prepare(data: DataSection, tokenizer: TokenizerSection, folder: Path, *, in_use: bool = False) -> None:
    """Make `folder` hold the tokenizer and both splits, unless it does so already for the same settings.

    For one process; the others wait. `in_use`: a training run has begun with what the folder holds, so it is not made
    anew for other settings. ConfigError for those, or if a split would be empty.
    """
    wanted = {f"data.{key}": value for key, value in asdict(data).items() if key not in READING}
    wanted |= {f"tokenizer.{key}": value for key, value in asdict(tokenizer).items()}
    manifest = folder / MANIFEST
    made_with = read_json(manifest).get("settings", {}) if manifest.exists() else None
    if made_with == wanted:
        return
    if in_use and made_with is not None:
        fix = f"Set it back to {{}}, or choose another output.folder than the one with {folder}."
        raise ConfigError(
            *(
                Problem(key=key, rule="is not what the run began with", value=value, fix=fix.format(made_with.get(key)))
                for key, value in wanted.items()
                if value != made_with.get(key)
            )
        )
    manifest.unlink(missing_ok=True)
    files = find_files(data)
    # Neighbours in a training sequence should not be neighbours in a folder: order by hash.
    files.sort(key=lambda file: _hash(file.name[::-1]))
    split = {
        "train": [file for file in files if not is_held_out(file.name, data.held_out)],
        "held_out": [file for file in files if is_held_out(file.name, data.held_out)],
    }
    bpe_model = _tokenizer(tokenizer, split["train"], folder)
    contents = {name: _write_split(name, split[name], bpe_model, folder) for name in SPLITS}
    write_json(
        manifest,
        {
            "settings": wanted,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "vocab_size": bpe_model.get_vocab_size(),
            "eos_token_id": _end_of_text(bpe_model),
            "splits": contents,
        },
    )


def _tokenizer(section: TokenizerSection, files: list[SourceFile], folder: Path) -> Tokenizer:
    if section.path is None:
        tokenizer = bpe.train(_texts(files), section.vocab_size)
        bpe.save(tokenizer, folder)
        return tokenizer
    source = Path(section.path) / "tokenizer.json"
    if not source.is_file():
        raise ConfigError(Problem(key="tokenizer.path", rule=f"must hold {source.name}", value=section.path))
    for path in (source, source.with_name("tokenizer_config.json")):
        if path.is_file():
            with DurableFile(folder / path.name) as file:
                file.write(path.read_bytes())
    return Tokenizer.from_file(str(source))


def _end_of_text(tokenizer: Tokenizer) -> int:
    for name in (bpe.END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"):
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise ConfigError(Problem(key="tokenizer.path", rule=f"has no end-of-text token such as {bpe.END_OF_TEXT}"))


def _write_split(name: str, files: list[SourceFile], tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Tokenise into `folder/name.npy`; what the manifest says of it."""
    end = _end_of_text(tokenizer)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    parts = [np.array([end], dtype)]  # the first document, too, begins after an end
    documents = size = 0
    for texts in _chunks(_texts(files), FILES_AT_ONCE):
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            parts += [np.array(encoding.ids, dtype), np.array([end], dtype)]
            documents += 1
            size += len(text.encode())
    tokens = np.concatenate(parts)
    if not documents:
        fix = "Give more files, or another data.held_out."
        raise ConfigError(Problem(key="data.source", rule=f"leaves no text for the {name} split", fix=fix))
    with DurableFile(folder / f"{name}.npy") as file:
        np.save(file, tokens)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"documents": documents, "bytes": size, "tokens": len(tokens), "sha256": digest}


def _chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared folder, opened: token ids as memory maps and what is known of them."""

    folder: Path
    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    eos_token_id: int
    facts: dict[str, Any]
    """The manifest."""

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """CheckpointError if the folder is incomplete."""
        facts = read_json(folder / MANIFEST)
        try:
            train, held_out = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in SPLITS)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{folder}: the prepared text is damaged: {error}. Remove the folder.") from error
        for name, tokens in zip(SPLITS, (train, held_out), strict=True):
            if len(tokens) != facts["splits"][name]["tokens"]:
                raise CheckpointError(f"{folder / name}.npy: {len(tokens)} tokens, {MANIFEST} says otherwise")
        return cls(
            folder=folder,
            train=train,
            held_out=held_out,
            vocab_size=facts["vocab_size"],
            eos_token_id=facts["eos_token_id"],
            facts=facts,
        )

    @property
    def digest(self) -> str:
        """Changes with any token of the training split."""
        return self.facts["splits"]["train"]["sha256"]

    @property
    def held_out_tokens_per_byte(self) -> float:
        split = self.facts["splits"]["held_out"]
        return split["tokens"] / split["bytes"]


class TrainingOrder:
    """Which window of the text is the nth training sequence: a pure function of the seed and n.

    Each epoch cuts the text into windows of `length` at another offset and goes through them in another order.
    """

    def __init__(self, num_tokens: int, length: int, seed: int):
        self.length = length
        self.windows = (num_tokens - length) // length  # one length is left for the offset and the last target
        """Sequences in an epoch."""
        if self.windows < 1:
            rule = f"must be shorter: the training text has {num_tokens} tokens"
            raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
        # Random bits by counter and a stable sort: the same on every platform and numpy version.
        self._bits: Callable[[int], np.random.Philox] = lambda epoch: np.random.Philox(key=[seed, epoch])
        self._epoch = lru_cache(maxsize=2)(self._starts_of_epoch)

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        bits = self._bits(epoch).random_raw(self.windows + 1)
        offset = int(bits[-1] % self.length)
        return np.argsort(bits[:-1], kind="stable") * self.length + offset

    def starts(self, first: int, count: int) -> np.ndarray:
        """First token of the sequences `first`..`first + count - 1`, counted over all epochs: int64 [count]."""
        numbers = np.arange(first, first + count)
        epochs, places = numbers // self.windows, numbers % self.windows
        return np.array([self._epoch(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)


def held_out_windows(num_tokens: int, length: int) -> np.ndarray:
    """First token of each window of the held-out text, end to end: int64 [windows], at least one."""
    windows = (num_tokens - 1) // length
    if windows < 1:
        rule = f"must be shorter: the held-out text has {num_tokens} tokens"
        raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
    return np.arange(windows, dtype=np.int64) * length


def read_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The inputs and, one further, the targets of each window: int64 [len(starts), length + 1]."""
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
