"""Files to token ids, once: a prepared folder with a tokenizer and two splits, which a run reads from then on.

    texts     train.npy          document <eos> document <eos> ...
    examples  train.npy          the tokens of all examples, end to end
              train_learnt.npy   of each token whether it counts: those of responses do
              train_lengths.npy  tokens of each example
    both      the same of held_out, the tokenizer's files, and data.json, written last

The folder is made once and not looked at again, so that a run which is resumed after the files have changed goes on
with the text it began with.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config.chat import chat_variables, section_variables
from megalite.config.schema import DataSection, TokenizerSection, TrainConfig
from megalite.config.train_rules import data_problems
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.files import DurableFile, write_json
from megalite.model.hf_config import read_json
from megalite.text.tokenizer import Tokenizer, TokenizerError
from megalite.train.data import bpe
from megalite.train.data.examples import Encoded, encode_chat, encode_pair
from megalite.train.data.records import MOST_PROBLEMS, Record, Records, find_files, hash_of, line_problems
from megalite.weights import side_files as companions

PREPARED = Path("training/data")
"""The prepared folder of a run, in its output folder."""
MANIFEST = "data.json"
SPLITS = ("train", "held_out")
"""Files of a tokenizer, of which the first is always there."""
TEXTS_AT_ONCE = 256
VERSION = 2
"""Of how text becomes tokens: a folder that an earlier version made holds other tokens, and is not used."""
READING = ("sequence_length", "seed")
"""Keys of the data section that decide how prepared text is read, not what it holds."""
READING_EXAMPLES = ("seed",)
ONLY_EXAMPLES = ("too_long", "tools", "chat_template_kwargs")

log = logging.getLogger(__name__)


def check(config: TrainConfig) -> list[Problem]:
    """What is wrong with the lines that a run is to read, the first few; none if it has begun with them already.

    For the process that the user starts, before there are ranks: it reads all files of JSON lines.
    """
    began = config.output.folder is not None and (Path(config.output.folder) / PREPARED / MANIFEST).exists()
    return [] if began or data_problems(config.data) else line_problems(config.data)


def prepare(
    data: DataSection,
    tokenizer: TokenizerSection,
    folder: Path,
    *,
    in_use: bool = False,
    ends: Sequence[int] = (),
    model: Mapping[str, Any] | None = None,
) -> None:
    """Make `folder` hold the tokenizer and both splits, unless it does so already for the same settings.

    For one process; the others wait. `in_use`: a training run has begun with what the folder holds, so it is not made
    anew for other settings or by another VERSION. ConfigError for those, for lines that can't be used, or if a split
    would be empty. `ends`: the model's end tokens, of which the first ends texts where the tokenizer has none; `model`:
    its config.json, which decides with the tokenizer's files how they are read, here as in the exported model.
    """
    manifest = folder / MANIFEST
    made = read_json(manifest) if manifest.exists() else {}
    current = made.get("version") == VERSION
    if current and _settings(data, tokenizer, made.get("format", "text")) == made.get("settings"):
        return
    if in_use and made and not current:
        rule = f"{folder} was prepared by a version of megalite that made other tokens of the same text"
        raise ConfigError(Problem(key="output.folder", rule=rule, fix="Choose another, or go on with that version."))
    if in_use and made:
        raise ConfigError(*_changes(_settings(data, tokenizer, made["format"]), made["settings"], folder))
    manifest.unlink(missing_ok=True)
    files = find_files(data)
    # Neighbours in a training sequence should not be neighbours in a folder: order by hash.
    files.sort(key=lambda file: hash_of(file.name[::-1]))
    records = Records(files, data)
    bring_tokenizer(tokenizer, records, folder)
    known = Tokenizer.load(folder, model=model)
    assert known is not None, "it was just brought"
    end = end_of_text(known, ends)
    if records.format == "text":
        contents = _write_texts(records, known, folder, end)
    else:
        contents = _write_examples(records, known, folder, end)
        known.close()
    write_json(
        manifest,
        {
            "format": records.format,
            "version": VERSION,
            "settings": _settings(data, tokenizer, records.format),
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "vocab_size": len(known),
            "eos_token_id": end,
            "splits": contents,
        },
    )


def _settings(data: DataSection, tokenizer: TokenizerSection, form: str) -> dict[str, Any]:
    """The values that decide what the folder holds."""
    aside = (*READING, *ONLY_EXAMPLES) if form == "text" else READING_EXAMPLES
    values = {f"data.{key}": value for key, value in asdict(data).items() if key not in aside}
    return values | {f"tokenizer.{key}": value for key, value in asdict(tokenizer).items()}


def _changes(wanted: dict[str, Any], made_with: dict[str, Any], folder: Path) -> list[Problem]:
    fix = f"Set it back to {{}}, or choose another output.folder than the one with {folder}."
    return [
        Problem(key=key, rule="is not what the run began with", value=value, fix=fix.format(made_with.get(key)))
        for key, value in wanted.items()
        if value != made_with.get(key)
    ]


# ---- the tokenizer


def bring_tokenizer(section: TokenizerSection, records: Iterable[Record], folder: Path) -> None:
    """Put a tokenizer's files into `folder`: those of `section.path`, or of one trained on `records` to be learnt."""
    if section.path is None:
        texts = (_words_of(record) for record in records if not record.held_out)
        bpe.save(bpe.train(texts, section.vocab_size), folder)
        return
    source = Path(section.path)
    if not (source / "tokenizer.json").is_file():
        rule = "must hold tokenizer.json"
        raise ConfigError(Problem(key="tokenizer.path", rule=rule, value=section.path))
    companions.write(companions.of_tokenizer(source), folder)


def _words_of(record: Record) -> str:
    if "messages" in record.values:
        fix = "Set tokenizer.path, or model.path to a model whose tokenizer has one."
        rule = f"a new tokenizer has no chat template, and {record.where} is a chat"
        raise ConfigError(Problem(key="tokenizer.path", rule=rule, fix=fix))
    return "".join(record.values.values())


def end_of_text(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> int:
    """The token that ends a text: the tokenizer's own, else the first of the model's `ends`, else one so called.

    ConfigError if there is none.
    """
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    known = [token for token in ends if token < len(tokenizer)]
    if known:
        return known[0]
    for name in (bpe.END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"):
        token = tokenizer.backend.token_to_id(name)
        if token is not None:
            return token
    raise ConfigError(Problem(key="tokenizer.path", rule=f"has no end-of-text token such as {bpe.END_OF_TEXT}"))


# ---- texts


@dataclass
class _Texts:
    """One split of text while it is put together."""

    parts: list[np.ndarray]
    documents: int = 0
    size: int = 0


def _write_texts(records: Records, tokenizer: Tokenizer, folder: Path, end: int) -> dict[str, Any]:
    """Tokenise into `train.npy` and `held_out.npy`; what the manifest says of them."""
    tokenizer.backend.encode_special_tokens = True  # text that spells a special token is text
    dtype = _dtype(len(tokenizer))
    stop = np.array([end], dtype)
    splits = {name: _Texts([stop]) for name in SPLITS}  # the first document, too, begins after an end
    for batch in _chunks(records, TEXTS_AT_ONCE):
        texts = [record.values["text"] for record in batch]
        for record, ids in zip(batch, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if isinstance(ids, ValueError):
                log.warning("%s is left out: %s", record.where, ids)
                continue
            split = splits[SPLITS[record.held_out]]
            split.parts += [np.array(ids, dtype), stop]
            split.documents += 1
            split.size += len(record.values["text"].encode())
    contents = {}
    for name, split in splits.items():
        _require(split.documents, "text", name)
        tokens = np.concatenate(split.parts)
        _write_array(folder / f"{name}.npy", tokens)
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        counts = {"documents": split.documents, "bytes": split.size, "tokens": len(tokens)}
        contents[name] = {**counts, "sha256": digest}
    return contents


def _dtype(vocab_size: int) -> type[np.generic]:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    left = iter(records)
    while chunk := list(islice(left, size)):
        yield chunk


def _require(count: int, what: str, split: str) -> None:
    if not count:
        fix = "Give more files, or another data.held_out."
        raise ConfigError(Problem(key="data.source", rule=f"leaves no {what} for the {split} split", fix=fix))


def _write_array(path: Path, values: np.ndarray) -> None:
    with DurableFile(path) as file:
        np.save(file, values)


# ---- examples


@dataclass
class _Examples:
    """One split of examples while it is put together."""

    ids: list[np.ndarray] = field(default_factory=list)
    learnt: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    too_long: int = 0
    """Longer than data.sequence_length, and so cut or left out."""
    left_out: int = 0
    """Of them; also when no token of a response would be left."""
    chats: int = 0
    """Of them, turns of chats."""
    ends: set[int] = field(default_factory=set)
    """Tokens that responses end with."""

    def add(self, example: Encoded, section: DataSection, tokenizer: Tokenizer, end: int) -> None:
        """Take the example in, as far as it fits. ValueError: it is too long, and data.too_long says error."""
        fitted = self._fitted(example, section)
        if fitted is None:
            return
        self.ends |= example.ends({*tokenizer.special_ids, end})
        dtype = _dtype(len(tokenizer))
        self.ids.append(np.array(fitted.ids, dtype))
        self.learnt.append(np.array(fitted.learnt, np.bool_))
        words = [token for token, counts in zip(fitted.ids, fitted.learnt, strict=True) if counts]
        self.size += len(tokenizer.decode(words, skip_special_tokens=True).encode())

    def _fitted(self, example: Encoded, section: DataSection) -> Encoded | None:
        """The example as it is trained on, None if it is left out."""
        most = section.sequence_length
        if len(example) <= most:
            return example
        if section.too_long == "error":
            raise ValueError(
                f"has {len(example)} tokens, more than data.sequence_length = {most}. Raise it, or set data.too_long "
                "to skip or truncate"
            )
        self.too_long += 1
        cut = example.cut(most)
        if section.too_long == "truncate" and cut.num_learnt:
            return cut
        self.left_out += 1
        return None


def _write_examples(records: Records, tokenizer: Tokenizer, folder: Path, end: int) -> dict[str, Any]:
    """Tokenise into three files a split; what the manifest says of them."""
    splits = {name: _Examples() for name in SPLITS}
    problems: list[Problem] = []
    for record in records:
        try:
            for example in _encoded(record, records.section, tokenizer, end):
                split = splits[SPLITS[record.held_out]]
                split.add(example, records.section, tokenizer, end)
                split.chats += "messages" in record.values
        except TokenizerError as error:  # no fault of the line's
            log.warning("%s is left out: %s", record.where, error)
        except ValueError as error:
            problems.append(Problem(key="", rule=f"{record.where}: {str(error).rstrip('.')}"))
            if len(problems) == MOST_PROBLEMS:
                break
    if problems:
        raise ConfigError(*problems)
    return {name: _write_split(folder, name, split) for name, split in splits.items()}


def _encoded(record: Record, section: DataSection, tokenizer: Tokenizer, end: int) -> list[Encoded]:
    values = record.values
    if "messages" in values:
        variables = section_variables(section) | chat_variables(values)
        return encode_chat(tokenizer, values["messages"], end, **variables)
    return [encode_pair(tokenizer, values["prompt"], values["response"], end)]


def _write_split(folder: Path, name: str, split: _Examples) -> dict[str, Any]:
    _require(len(split.ids), "examples", name)
    lengths = np.array([len(ids) for ids in split.ids], np.int32)
    arrays = {"": np.concatenate(split.ids), "_learnt": np.concatenate(split.learnt), "_lengths": lengths}
    digest = hashlib.sha256()
    for suffix, values in arrays.items():
        _write_array(folder / f"{name}{suffix}.npy", values)
        digest.update(values.tobytes())
    return {
        "documents": len(lengths),
        "bytes": split.size,
        "tokens": len(arrays[""]),
        "learnt": int(sum(learnt[1:].sum() for learnt in split.learnt)),
        "too_long": split.too_long,
        "left_out": split.left_out,
        "chats": split.chats,
        "ends": sorted(split.ends),
        "sha256": digest.hexdigest(),
    }


# ---- reading it back


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a split."""

    tokens: np.ndarray
    learnt: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    """Place in `tokens` where each example ends."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of an example, and of each whether it counts."""
        end = int(self.ends[index])
        place = slice(end - int(self.lengths[index]), end)
        return self.tokens[place], self.learnt[place]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared folder, opened: token ids as memory maps and what is known of them."""

    folder: Path
    train: np.ndarray | ExampleSet
    """Running text, or examples."""
    held_out: np.ndarray | ExampleSet
    vocab_size: int
    eos_token_id: int
    """Ends texts, and responses that nothing else ends."""
    ends: tuple[int, ...]
    """Every token that a model learns to end with."""
    facts: dict[str, Any]
    """The manifest."""

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """CheckpointError if the folder is incomplete."""
        facts = read_json(folder / MANIFEST)
        open_split = _open_text if facts["format"] == "text" else _open_examples
        try:
            train, held_out = (open_split(folder, name, facts["splits"][name]) for name in SPLITS)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{folder}: the prepared text is damaged: {error}. Remove the folder.") from error
        return cls(
            folder=folder,
            train=train,
            held_out=held_out,
            vocab_size=facts["vocab_size"],
            eos_token_id=facts["eos_token_id"],
            ends=tuple(facts["splits"]["train"].get("ends", [facts["eos_token_id"]])),
            facts=facts,
        )

    @property
    def digest(self) -> str:
        """Changes with any token of the training split."""
        return self.facts["splits"]["train"]["sha256"]

    @property
    def held_out_tokens_per_byte(self) -> float:
        """Of the text that is predicted."""
        split = self.facts["splits"]["held_out"]
        return split.get("learnt", split["tokens"]) / split["bytes"]


def _open_text(folder: Path, name: str, facts: dict[str, Any]) -> np.ndarray:
    tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
    if len(tokens) != facts["tokens"]:
        raise CheckpointError(f"{folder / name}.npy: {len(tokens)} tokens, {MANIFEST} says otherwise")
    return tokens


def _open_examples(folder: Path, name: str, facts: dict[str, Any]) -> ExampleSet:
    tokens = _open_text(folder, name, facts)
    learnt = np.load(folder / f"{name}_learnt.npy", mmap_mode="r")
    lengths = np.load(folder / f"{name}_lengths.npy")
    if len(learnt) != len(tokens) or lengths.sum() != len(tokens):
        raise CheckpointError(f"{folder / name}_learnt.npy: does not fit {name}.npy")
    return ExampleSet(tokens, learnt, lengths, np.cumsum(lengths, dtype=np.int64))
