"""Text to training sequences: which files, which split, what a document looks like, and in which order it is read."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer as TokenizerFile
from train_helpers import replicas

from megalite.config.schema import DataSection, TokenizerSection, TrainSection
from megalite.errors import CheckpointError, ConfigError
from megalite.text.tokenizer import Tokenizer
from megalite.train.data import bpe
from megalite.train.data.order import TrainingOrder
from megalite.train.data.prepared import Corpus, prepare
from megalite.train.data.reading import WindowReader
from megalite.train.data.records import find_files, is_held_out

TOKENIZER = TokenizerSection(vocab_size=300)
COUNT = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of small Python files, one of them not UTF-8, one empty, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("source")
    for index in range(COUNT):
        text = f"def f{index}(x):\n    return x + {index}  # <|endoftext|> is text here, é too\n" * (1 + index % 3)
        (folder / f"module_{index}.py").write_text(text)
    (folder / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    (folder / "empty.py").write_text("")
    (folder / "notes.txt").write_text("not taken\n")
    (folder / "tables").mkdir()
    (folder / "tables" / "big.py").write_text("x = [1, 2, 3]\n")
    return folder


def section(source: Path, **changes) -> DataSection:
    return DataSection(**{"source": str(source), "held_out": 0.2, "sequence_length": 16, **changes})


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(section(source), TOKENIZER, folder)
    return Corpus.open(folder)


# ---- which files, and which split


def test_files_are_named_by_folder_glob_or_the_standard_library(source):
    def names(section: DataSection) -> list[str]:
        return [file.name for file in find_files(section)]

    found = names(section(source))
    assert found == sorted(found) and len(found) == COUNT + 3
    assert "tables/big.py" in found and "notes.txt" not in found
    assert names(section(source, exclude=["tables/*", "module_*"])) == ["empty.py", "latin.py"]
    assert names(section(source, pattern="*.txt")) == ["notes.txt"]
    globbed = names(DataSection(source=f"{source}/module_1*.py"))
    assert globbed == sorted(f"{source}/module_{index}.py" for index in (1, *range(10, 20)))
    (decoder,) = (file for file in find_files(DataSection(pattern="json/*.py")) if file.name == "json/decoder.py")
    assert Path(json.decoder.__file__).samefile(decoder.path), "of this interpreter"
    assert not any("site-packages" in name for name in names(DataSection()))
    with pytest.raises(ConfigError, match="data.source: must name some files"):
        find_files(section(source, pattern="*.rs"))


def test_the_split_depends_on_the_name_alone():
    """Another hash would move held-out files of the demo model into a later training run."""
    share = 0.03
    names = ("hashlib.py", "heapq.py", "json/decoder.py", "lzma.py", "enum.py", "urllib/request.py")
    assert [name for name in names if is_held_out(name, share)] == ["hashlib.py", "lzma.py", "urllib/request.py"]
    many = [f"package/module_{index}.py" for index in range(20_000)]
    held = {name for name in many if is_held_out(name, share)}
    assert 0.8 * share < len(held) / len(many) < 1.2 * share
    assert held < {name for name in many if is_held_out(name, 0.1)}, "a larger share takes the same files and more"


def documents(corpus: Corpus, split: str) -> list[str]:
    """The split's texts, decoded from its tokens."""
    tokens = getattr(corpus, split).tokens.tolist()
    assert tokens[0] == tokens[-1] == corpus.eos_token_id
    tokenizer = TokenizerFile.from_file(str(corpus.folder / "tokenizer.json"))
    cuts = [index for index, token in enumerate(tokens) if token == corpus.eos_token_id]
    return [tokenizer.decode(tokens[a + 1 : b], skip_special_tokens=False) for a, b in pairwise(cuts)]


def test_splits_share_no_document_and_miss_none(source, prepared):
    splits = prepared.facts["splits"]
    readable = [f for f in find_files(section(source)) if f.name not in ("latin.py", "empty.py")]
    held_out = [f for f in readable if is_held_out(f.name, 0.2)]
    assert splits["held_out"]["documents"] == len(held_out) > 0
    assert splits["train"]["documents"] == len(readable) - len(held_out) > 0
    assert splits["held_out"]["bytes"] == sum(f.path.stat().st_size for f in held_out)
    assert prepared.held_out_tokens_per_byte == splits["held_out"]["tokens"] / splits["held_out"]["bytes"]
    texts = {f.path.read_text() for f in readable}
    assert set(documents(prepared, "train")) | set(documents(prepared, "held_out")) == texts
    assert set(documents(prepared, "held_out")) == {f.path.read_text() for f in held_out}


# ---- preparing


def test_text_is_tokenised_as_the_exported_model_will_be_read(source, tmp_path):
    """transformers makes a Qwen2's tokenizer anew, with words of its own, whatever tokenizer_config.json says."""
    from transformers import AutoTokenizer

    prepare(section(source), TOKENIZER, tmp_path, model={"model_type": "qwen2"})
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    corpus = Corpus.open(tmp_path)
    for split in ("train", "held_out"):
        wanted = [corpus.eos_token_id]
        for text in documents(corpus, split):
            wanted += [*theirs.encode(text, split_special_tokens=True), corpus.eos_token_id]
        assert getattr(corpus, split).tokens.tolist() == wanted


def test_the_tokenizer_means_the_same_to_transformers_and_to_us(prepared):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(prepared.folder), Tokenizer.load(prepared.folder)
    assert theirs.eos_token_id == prepared.eos_token_id == 0 and len(theirs) == prepared.vocab_size
    for text in ("def f(x):\n    return x\n", "  \t\n\n\n x", "naïve 漢字 🙂", "a<|endoftext|>b", "1234 + 5", ""):
        ids = theirs(text)["input_ids"]
        assert ids == list(ours.encode(text)), text
        assert theirs.decode(ids) == text


def test_a_prepared_folder_is_kept_until_the_settings_change(source, prepared, tmp_path):
    prepare(section(source), TOKENIZER, tmp_path)
    digest = Corpus.open(tmp_path).digest
    assert digest == prepared.digest, "a new tokenizer comes out the same"
    before = (tmp_path / "train.npy").stat().st_mtime_ns
    prepare(section(source, sequence_length=8, seed=3), TOKENIZER, tmp_path, in_use=True)
    assert (tmp_path / "train.npy").stat().st_mtime_ns == before, "how it is read does not change what it holds"
    facts = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**facts, "version": 1}))
    with pytest.raises(ConfigError, match="output.folder: .* prepared by a version of megalite that made other tokens"):
        prepare(section(source), TOKENIZER, tmp_path, in_use=True)
    own = replace(TOKENIZER, path=str(prepared.folder))
    prepare(section(source), own, tmp_path)
    assert (tmp_path / "train.npy").stat().st_mtime_ns != before
    assert (tmp_path / "tokenizer.json").read_bytes() == (prepared.folder / "tokenizer.json").read_bytes()
    other = section(source, exclude=["module_1.py"])
    with pytest.raises(ConfigError, match=r"data.exclude: is not what the run began with.*Set it back to \[\]"):
        prepare(other, own, tmp_path, in_use=True)
    assert Corpus.open(tmp_path).digest == digest
    prepare(other, own, tmp_path)
    assert Corpus.open(tmp_path).digest != digest


def test_a_folder_that_can_not_be_used_is_refused(source, prepared, tmp_path):
    with pytest.raises(ConfigError, match="leaves no text for the held_out split"):
        prepare(section(source, held_out=1e-9), TOKENIZER, tmp_path)
    assert not (tmp_path / "data.json").exists()
    whole = (prepared.folder / "train.npy").read_bytes()
    (tmp_path / "data.json").write_bytes((prepared.folder / "data.json").read_bytes())
    for damaged in (whole[:40], whole[:-2], b""):
        (tmp_path / "train.npy").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="prepared text is damaged"):
            Corpus.open(tmp_path)


def test_of_an_empty_split_is_said_what_became_of_what_was_found(tmp_path):
    (tmp_path / "all.txt").write_text("a b c " * 50)
    (tmp_path / "codes.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "response": "b " * 50}) + "\n")
    cases = {
        "all.txt": ["held_out split: 1 found that can be used, files 1", "A file is held out as a whole"],
        "codes.bin": ["train split: 0 found", "not UTF-8 text 1"],
        "long.jsonl": ["train split: 0 found", "1 too long and left out", "Raise data.sequence_length"],
    }
    for name, says in cases.items():
        data = section(tmp_path / name, sequence_length=16, too_long="skip")
        with pytest.raises(ConfigError) as error:
            prepare(data, TokenizerSection(vocab_size=300), tmp_path / "prepared")
        assert all(words in str(error.value) for words in says), error.value


def test_what_the_tokenizer_fails_at_costs_itself_only(tmp_path, caplog):
    """A pattern that backtracks for ever panics; the tokenizer's other texts, and examples, are trained on."""
    folder = tmp_path / "tokenizer"
    bpe.save(bpe.train(["ab ca"], 300), folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(?:(a+)+)+b"}, "behavior": "Isolated", "invert": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, made["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    words = [f"ab {number}" for number in range(20)] + ["a" * 40]
    for number, keys in enumerate((["text"], ["prompt", "response"])):
        source = tmp_path / f"{number}.jsonl"
        source.write_text("".join(json.dumps(dict.fromkeys(keys, word)) + "\n" for word in words))
        prepare(section(source, sequence_length=200), TokenizerSection(path=str(folder)), tmp_path / str(number))
        facts = Corpus.open(tmp_path / str(number)).facts
        assert sum(split["documents"] for split in facts["splits"].values()) == 20
        assert f"{number}.jsonl:21 is left out: the tokenizer fails at this text" in caplog.text


# ---- the order


def test_an_epoch_reads_every_window_once_and_the_next_one_others():
    count = (1000 - 16) // 16
    order = TrainingOrder(count, 7, 16)
    first, second = (order.indices(epoch * count, count) for epoch in (0, 1))
    for starts in (first, second):
        assert sorted(np.diff(np.sort(starts)).tolist()) == [16] * (count - 1), "end to end, none twice"
        assert starts.min() >= 0 and starts.max() + 16 < 1000, "the last target is inside"
    assert first.tolist() != sorted(first)
    assert (first % 16)[0] != (second % 16)[0], "cut at another offset"
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_the_order_is_a_function_of_seed_and_number():
    count = (5000 - 16) // 16
    order = TrainingOrder(count, 7, 16)
    whole = order.indices(0, 3 * count)
    pieces = [order.indices(first, 50) for first in range(0, 3 * count - 49, 50)]
    assert np.concatenate(pieces).tolist() == whole[: 50 * len(pieces)].tolist()
    assert TrainingOrder(count, 7, 16).indices(900, 5).tolist() == whole[900:905].tolist()
    assert TrainingOrder(count, 8, 16).indices(0, 50).tolist() != whole[:50].tolist()
    # Written down: a run that is resumed elsewhere, by a later version, has to go on in the same order.
    assert whole[:4].tolist() == [3219, 547, 595, 131]
    assert TrainingOrder(40, 7).indices(38, 4).tolist() == EXAMPLES


EXAMPLES = [39, 27, 28, 21]


def windows(dp: int, tokens: int, held_out: int) -> list[WindowReader]:
    """A reader of each of dp replicas, of text whose tokens count up."""
    splits = [SimpleNamespace(tokens=np.arange(count, dtype=np.uint16)) for count in (tokens, held_out)]
    corpus, train = SimpleNamespace(train=splits[0], held_out=splits[1]), TrainSection(micro_batch_size=2)
    return [WindowReader(corpus, DataSection(sequence_length=16), train, state) for state in replicas(dp)]


def test_replicas_read_each_window_once():
    readers = windows(2, 1000, 100)
    steps = [reader.step(8) for reader in readers]
    wanted = TrainingOrder((1000 - 16) // 16, DataSection().seed, 16).indices(8, 4)
    batches = [batch for step in steps for batch in step.batches]
    assert [batch.ids[at].item() for batch in batches for at in (0, 16)] == wanted.tolist()
    assert all(batch.lengths == (16, 16) and (batch.targets == batch.ids + 1).all() for batch in batches)
    assert steps[0].lengths == [16] * 4
    for limit, most in ((None, 96), (1, 32)):
        scored = [list(reader.held_out(limit)) for reader in readers]
        assert len(scored[0]) == len(scored[1])
        targets = Counter(t for some in scored for batch in some for t in batch.targets[batch.weights > 0].tolist())
        assert targets == Counter(range(1, most + 1))


@pytest.mark.parametrize(("sizes", "split"), [((31, 100), "training"), ((1000, 16), "held-out")])
def test_too_little_text_is_an_error(sizes, split):
    with pytest.raises(ConfigError, match=f"data.sequence_length: must be shorter: the {split} text has"):
        windows(1, *sizes)
