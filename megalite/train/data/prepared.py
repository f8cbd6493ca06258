"""Files to token ids, once: a prepared folder with a tokenizer and two splits, which a run reads from then on.

    texts     train.npy          document <eos> document <eos> ...
    examples  train.npy          the tokens of all examples, end to end
              train_learnt.npy   the loss mask: of each token whether it counts; those of responses do
              train_lengths.npy  tokens of each example
    both      the same of held_out, the tokenizer's files, and data.json, written last

The folder is made once and not looked at again, so that a run which is resumed after the files have changed goes on
with the text it began with.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from megalite.text.detokenizer import TokenizerError
from megalite.text.tokenizer import Tokenizer
from megalite.train.data import bpe
from megalite.train.data.examples import Encoded, encode_chat, encode_pair
from megalite.train.data.records import JSON_LINES, MOST_PROBLEMS, Record, Records, find_files, hash_of, line_problems
from megalite.weights import side_files

PREPARED = Path("training/data")
"""The prepared folder of a run, in its output folder."""
MANIFEST = "data.json"
SPLITS = ("train", "held_out")
ARRAYS = {"text": ("",), "examples": ("", "_learnt", "_lengths")}
"""Files of a split of either format: what follows its name."""
TEXTS_AT_ONCE = 256
VERSION = 2
"""Version of the way from text to tokens: a folder of an earlier one holds other tokens, and is not used."""
ONLY_READING = {"text": ("sequence_length", "seed", "too_long", "tools", "chat_template_kwargs"), "examples": ("seed",)}
"""Keys of the data section that do not decide what a folder of either format holds."""

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
    if manifest.exists():
        made = read_json(manifest)
        current, wanted = made.get("version") == VERSION, _settings(data, tokenizer, made.get("format", "text"))
        if current and wanted == made.get("settings"):
            return
        if in_use:
            raise ConfigError(*_changes(wanted, made.get("settings", {}), folder, current))
        manifest.unlink()
    files = find_files(data)
    # Neighbours in a training sequence should not be neighbours in a folder: order by hash.
    files.sort(key=lambda file: hash_of(file.name[::-1]))
    records = Records(files, data)
    bring_tokenizer(tokenizer, records, folder)
    known = Tokenizer.load(folder, model=model)
    assert known is not None, "it was just brought"
    end = end_of_text(known, ends)
    splits = (_tokenised_texts if records.format == "text" else _tokenised_examples)(records, known, end)
    known.close()
    _require_both(splits, records)
    values = {
        "format": records.format,
        "version": VERSION,
        "settings": _settings(data, tokenizer, records.format),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "vocab_size": len(known),
        "eos_token_id": end,
        "splits": {name: split.write(folder, name) for name, split in splits.items()},
    }
    write_json(manifest, values)


def _settings(data: DataSection, tokenizer: TokenizerSection, form: str) -> dict[str, Any]:
    """The values that decide what the folder holds."""
    values = {f"data.{key}": value for key, value in asdict(data).items() if key not in ONLY_READING[form]}
    return values | {f"tokenizer.{key}": value for key, value in asdict(tokenizer).items()}


def _changes(wanted: dict[str, Any], made_with: dict[str, Any], folder: Path, current: bool) -> list[Problem]:
    """Why a run can't go on with the folder. `current`: it is of this VERSION."""
    if not current:
        rule = f"{folder} was prepared by a version of megalite that made other tokens of the same text"
        return [Problem(key="output.folder", rule=rule, fix="Choose another, or go on with that version.")]
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
        raise ConfigError(Problem(key="tokenizer.path", rule="must hold tokenizer.json", value=section.path))
    side_files.write(side_files.of_tokenizer(source), folder)


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
    named = map(tokenizer.backend.token_to_id, (bpe.END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"))
    known = (token for token in ends if token < len(tokenizer))
    for token in (tokenizer.eos_token_id, *known, *named):
        if token is not None:
            return token
    raise ConfigError(Problem(key="tokenizer.path", rule=f"has no end-of-text token such as {bpe.END_OF_TEXT}"))


# ---- tokens


class _NewSplit:
    """One split while it is put together."""

    def __init__(self, form: str, *counts: str):
        """`form`: its format; `counts`: what is counted."""
        self.form = form
        self.arrays: dict[str, list[Any]] = {name: [] for name in ARRAYS[form]}
        self.counts = dict.fromkeys(("documents", "bytes", *counts), 0)
        self.ends: set[int] = set()
        """Tokens that responses end with."""

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """Write the arrays; what the manifest says of the split, which is not empty."""
        digest = hashlib.sha256()
        whole = {suffix: np.concatenate(parts) for suffix, parts in self.arrays.items()}
        for suffix, values in whole.items():
            digest.update(values.tobytes())
            with DurableFile(folder / f"{name}{suffix}.npy") as file:
                np.save(file, values)
        ends = {"ends": sorted(self.ends)} if self.ends else {}
        return {**self.counts, "tokens": len(whole[""]), **ends, "sha256": digest.hexdigest()}


def _require_both(splits: Mapping[str, _NewSplit], records: Records) -> None:
    """ConfigError if a split is empty, with what became of what was found."""
    empty = next((name for name, split in splits.items() if not split.counts["documents"]), None)
    if empty is None:
        return
    form, is_lines = records.format, any(file.is_lines for file in records.files)
    kept, left_out = (sum(split.counts.get(key, 0) for split in splits.values()) for key in ("documents", "left_out"))
    found = [f"{kept:,} found that can be used, files {len(records.files):,}"]
    found += [f"{left_out:,} too long and left out"] if left_out else []
    found += [f"not UTF-8 text {len(records.passed_over):,}"] if records.passed_over else []
    fix = "Give more of them, or another data.held_out."
    if left_out and not kept:
        fix = "Raise data.sequence_length, or set data.too_long to truncate."
    elif not is_lines:
        fix = (
            "A file is held out as a whole: give several, or its parts as lines of a file whose name ends in "
            f'{JSON_LINES}, such as {{"text": "..."}}.'
        )
    rule = f"leaves no {form} for the {empty} split: {'; '.join(found)}"
    raise ConfigError(Problem(key="data.source", rule=rule, value=records.section.source, fix=fix))


def _dtype(tokenizer: Tokenizer) -> type[np.generic]:
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.int32


def _tokenised_texts(records: Records, tokenizer: Tokenizer, end: int) -> dict[str, _NewSplit]:
    tokenizer.backend.encode_special_tokens = True  # text that spells a special token is text
    splits = {name: _NewSplit("text") for name in SPLITS}
    stop = np.array([end], _dtype(tokenizer))
    for split in splits.values():
        split.arrays[""].append(stop)  # the first document, too, begins after an end
    left = iter(records)
    while batch := list(islice(left, TEXTS_AT_ONCE)):
        texts = [record.values["text"] for record in batch]
        for record, ids in zip(batch, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if isinstance(ids, ValueError):
                log.warning("%s is left out: %s", record.where, ids)
                continue
            split = splits[SPLITS[record.held_out]]
            split.arrays[""] += [np.array(ids, stop.dtype), stop]
            split.counts["documents"] += 1
            split.counts["bytes"] += len(record.values["text"].encode())
    return splits


def _tokenised_examples(records: Records, tokenizer: Tokenizer, end: int) -> dict[str, _NewSplit]:
    splits = {name: _NewSplit("examples", "learnt", "too_long", "left_out", "chats") for name in SPLITS}
    problems: list[Problem] = []
    for record in records:
        try:
            split = splits[SPLITS[record.held_out]]
            for example in _encoded(record, records.section, tokenizer, end):
                _add(split, example, records.section, tokenizer, end)
                split.counts["chats"] += "messages" in record.values
        except TokenizerError as error:  # no fault of the line's
            log.warning("%s is left out: %s", record.where, error)
        except ValueError as error:
            problems.append(Problem(key="", rule=f"{record.where}: {str(error).rstrip('.')}"))
            if len(problems) == MOST_PROBLEMS:
                break
    if problems:
        raise ConfigError(*problems)
    return splits


def _encoded(record: Record, section: DataSection, tokenizer: Tokenizer, end: int) -> Iterable[Encoded]:
    values = record.values
    if "messages" in values:
        variables = section_variables(section) | chat_variables(values)
        return encode_chat(tokenizer, values["messages"], end, **variables)
    return [encode_pair(tokenizer, values["prompt"], values["response"], end)]


def _add(split: _NewSplit, example: Encoded, section: DataSection, tokenizer: Tokenizer, end: int) -> None:
    """Take the example in, as far as it fits. ValueError: it is too long, and data.too_long says error."""
    ends = example.ends({*tokenizer.special_ids, end})
    if len(example) > section.sequence_length:
        if section.too_long == "error":
            raise ValueError(
                f"has {len(example)} tokens, more than data.sequence_length = {section.sequence_length}. Raise it, or "
                "set data.too_long to skip or truncate"
            )
        split.counts["too_long"] += 1
        example = example.cut(section.sequence_length)
        if section.too_long == "skip" or not example.num_targets:
            split.counts["left_out"] += 1
            return
    split.ends |= ends
    split.arrays[""].append(np.array(example.ids, _dtype(tokenizer)))
    split.arrays["_learnt"].append(np.array(example.loss_mask, np.bool_))
    split.arrays["_lengths"].append(np.array([len(example)], np.int32))
    split.counts["documents"] += 1
    split.counts["learnt"] += example.num_targets
    response = [token for token, counts in zip(example.ids, example.loss_mask, strict=True) if counts]
    split.counts["bytes"] += len(tokenizer.decode(response, skip_special_tokens=True).encode())


# ---- reading it back


@dataclass(frozen=True)
class Split:
    """One split as memory maps: running text, or examples, which are a sequence of (token ids, loss mask)."""

    tokens: np.ndarray
    """uint16 or int32 [N]."""
    loss_mask: np.ndarray = field(default_factory=lambda: np.array([], np.int32))
    """bool [N]; this and `lengths` for examples only."""
    lengths: np.ndarray = field(default_factory=lambda: np.array([], np.int32))
    """Tokens of each example."""

    @cached_property
    def _ends(self) -> np.ndarray:
        """Index in `tokens` after each example."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self._ends[index] - self.lengths[index], self._ends[index])
        return self.tokens[place], self.loss_mask[place]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared folder, opened: its splits, and what its manifest says of them."""

    folder: Path
    train: Split
    held_out: Split
    vocab_size: int
    eos_token_id: int
    """The token that ends texts, and responses that nothing else ends."""
    ends: tuple[int, ...]
    """Every token that a model learns to end with."""
    is_text: bool
    """Running text, not examples."""
    facts: dict[str, Any]
    """The manifest."""
    digest: str
    """Changes with any token of the training split."""
    held_out_tokens_per_byte: float
    """Tokens for each byte of the held-out text that is predicted."""

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """CheckpointError if the folder is incomplete."""
        facts = read_json(folder / MANIFEST)
        is_text, found, splits = facts["format"] == "text", facts["splits"], {}
        try:
            for name in SPLITS:
                files = [folder / f"{name}{suffix}.npy" for suffix in ARRAYS[facts["format"]]]
                splits[name] = split = Split(*(np.load(file, mmap_mode="r") for file in files))
                if len(split.tokens) != found[name]["tokens"]:
                    raise ValueError(f"{files[0]}: {len(split.tokens)} tokens, {MANIFEST} says otherwise")
                if not is_text and not len(split.tokens) == len(split.loss_mask) == split.lengths.sum():
                    raise ValueError(f"{files[1]}: does not fit {files[0].name}")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{folder}: the prepared text is damaged: {error}. Remove the folder.") from error
        train, held_out = found["train"], found["held_out"]
        return cls(
            folder=folder,
            **splits,
            vocab_size=facts["vocab_size"],
            eos_token_id=facts["eos_token_id"],
            ends=tuple(train.get("ends", [facts["eos_token_id"]])),
            is_text=is_text,
            facts=facts,
            digest=train["sha256"],
            held_out_tokens_per_byte=held_out.get("learnt", held_out["tokens"]) / held_out["bytes"],
        )
