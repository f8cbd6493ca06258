"""Text to training sequences: which files, which split, what a document looks like, and in which order it is read."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as TokenizerFile

from megalite.config.schema import DataSection, TokenizerSection
from megalite.errors import CheckpointError, ConfigError
from megalite.text.tokenizer import Tokenizer
from megalite.train.data import bpe
from megalite.train.data.order import TrainingOrder, held_out_windows, read_windows
from megalite.train.data.prepared import Corpus, prepare
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


def names(section: DataSection) -> list[str]:
    return [file.name for file in find_files(section)]


# ---- which files


def test_files_of_a_folder_are_sorted_and_filtered(source):
    found = names(section(source))
    assert found == sorted(found) and len(found) == COUNT + 3
    assert "tables/big.py" in found and "notes.txt" not in found
    assert names(section(source, exclude=["tables/*", "module_*"])) == ["empty.py", "latin.py"]
    assert names(section(source, pattern="*.txt")) == ["notes.txt"]


def test_files_of_a_glob(source):
    found = names(DataSection(source=f"{source}/module_1*.py"))
    assert found == sorted(f"{source}/module_{index}.py" for index in (1, *range(10, 20)))


def test_the_standard_library_is_that_of_this_interpreter():
    found = find_files(DataSection(pattern="json/*.py"))
    assert "json/decoder.py" in [file.name for file in found]
    assert Path(json.decoder.__file__).samefile(next(f.path for f in found if f.name == "json/decoder.py"))
    assert not any("site-packages" in name for name in names(DataSection()))


def test_no_files_is_an_error(source):
    with pytest.raises(ConfigError, match="data.source: must name some files"):
        find_files(section(source, pattern="*.rs"))


# ---- the split


def test_the_split_depends_on_the_name_alone():
    """Another hash would move held-out files of the demo model into a later training run."""
    share = 0.03
    names = ("hashlib.py", "heapq.py", "json/decoder.py", "lzma.py", "enum.py", "urllib/request.py")
    assert [name for name in names if is_held_out(name, share)] == ["hashlib.py", "lzma.py", "urllib/request.py"]
    many = [f"package/module_{index}.py" for index in range(20_000)]
    held = {name for name in many if is_held_out(name, share)}
    assert 0.8 * share < len(held) / len(many) < 1.2 * share
    assert held < {name for name in many if is_held_out(name, 0.1)}, "a larger share takes the same files and more"


def test_splits_share_no_document_and_miss_none(source, prepared):
    splits = prepared.facts["splits"]
    readable = [f for f in find_files(section(source)) if f.name not in ("latin.py", "empty.py")]
    held_out = [f for f in readable if is_held_out(f.name, 0.2)]
    assert splits["held_out"]["documents"] == len(held_out) > 0
    assert splits["train"]["documents"] == len(readable) - len(held_out) > 0
    assert splits["held_out"]["bytes"] == sum(f.path.stat().st_size for f in held_out)
    texts = {f.path.read_text() for f in readable}
    assert set(documents(prepared, "train")) | set(documents(prepared, "held_out")) == texts
    assert set(documents(prepared, "held_out")) == {f.path.read_text() for f in held_out}


def documents(corpus: Corpus, split: str) -> list[str]:
    """The split's texts, decoded from its tokens."""
    tokens = getattr(corpus, split).tolist()
    end = corpus.eos_token_id
    assert tokens[0] == tokens[-1] == end
    tokenizer = TokenizerFile.from_file(str(corpus.folder / "tokenizer.json"))
    cuts = [index for index, token in enumerate(tokens) if token == end]
    return [
        tokenizer.decode(tokens[a + 1 : b], skip_special_tokens=False) for a, b in zip(cuts, cuts[1:], strict=False)
    ]


# ---- preparing


def test_text_is_tokenised_as_the_exported_model_will_be_read(source, tmp_path):
    """transformers makes a Qwen2's tokenizer anew, with words of its own, whatever tokenizer_config.json says."""
    from transformers import AutoTokenizer

    prepare(section(source), TOKENIZER, tmp_path, model={"model_type": "qwen2"})
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    corpus = Corpus.open(tmp_path)
    end = corpus.eos_token_id
    for split in ("train", "held_out"):
        tokens = getattr(corpus, split).tolist()
        wanted = [
            end,
            *(
                token
                for text in documents(corpus, split)
                for token in (*theirs.encode(text, split_special_tokens=True), end)
            ),
        ]
        assert tokens == wanted


def test_a_prepared_folder_is_kept_until_the_settings_change(source, tmp_path):
    prepare(section(source), TOKENIZER, tmp_path)
    digest = Corpus.open(tmp_path).digest
    (tmp_path / "train.npy").touch()
    before = (tmp_path / "train.npy").stat().st_mtime_ns
    prepare(section(source, sequence_length=8, seed=3), TOKENIZER, tmp_path, in_use=True)
    assert (tmp_path / "train.npy").stat().st_mtime_ns == before, "how it is read does not change what it holds"
    facts = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**facts, "version": 1}))
    with pytest.raises(ConfigError, match="output.folder: .* prepared by a version of megalite that made other tokens"):
        prepare(section(source), TOKENIZER, tmp_path, in_use=True)
    prepare(section(source), TOKENIZER, tmp_path)
    assert (tmp_path / "train.npy").stat().st_mtime_ns != before
    other = section(source, exclude=["module_1.py"])
    with pytest.raises(ConfigError, match=r"data.exclude: is not what the run began with.*Set it back to \[\]"):
        prepare(other, TOKENIZER, tmp_path, in_use=True)
    assert Corpus.open(tmp_path).digest == digest
    prepare(other, TOKENIZER, tmp_path)
    assert Corpus.open(tmp_path).digest != digest


def test_an_empty_split_is_an_error(source, tmp_path):
    with pytest.raises(ConfigError, match="leaves no text for the held_out split"):
        prepare(section(source, held_out=1e-9), TOKENIZER, tmp_path)
    assert not (tmp_path / "data.json").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: data[:-2], lambda data: b""])
def test_damaged_text_is_refused(source, tmp_path, damage):
    prepare(section(source), TOKENIZER, tmp_path)
    path = tmp_path / "train.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="prepared text is damaged"):
        Corpus.open(tmp_path)


def test_a_tokenizer_of_ones_own(source, prepared, tmp_path):
    prepare(section(source), dataclasses.replace(TOKENIZER, path=str(prepared.folder)), tmp_path)
    assert Corpus.open(tmp_path).digest == prepared.digest
    assert (tmp_path / "tokenizer.json").read_bytes() == (prepared.folder / "tokenizer.json").read_bytes()


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
        prepared = tmp_path / str(number)
        prepare(section(source, sequence_length=200), TokenizerSection(path=str(folder)), prepared)
        facts = json.loads((prepared / "data.json").read_text())
        assert sum(split["documents"] for split in facts["splits"].values()) == 20
        assert f"{number}.jsonl:21 is left out: the tokenizer fails at this text" in caplog.text


def test_the_tokenizer_means_the_same_to_transformers_and_to_us(prepared):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(prepared.folder), Tokenizer.load(prepared.folder)
    assert theirs.eos_token_id == prepared.eos_token_id == 0 and len(theirs) == prepared.vocab_size
    for text in ("def f(x):\n    return x\n", "  \t\n\n\n x", "naïve 漢字 🙂", "a<|endoftext|>b", "1234 + 5", ""):
        ids = theirs(text)["input_ids"]
        assert ids == list(ours.encode(text)), text
        assert theirs.decode(ids) == text


def test_training_a_tokenizer_gives_the_same_one_again(source):
    texts = [path.read_text() for path in sorted(source.glob("module_*.py"))]
    assert bpe.train(texts, 300).to_str() == bpe.train(texts, 300).to_str()


# ---- the order


def test_an_epoch_reads_every_window_once_and_the_next_one_others():
    order = TrainingOrder(1000, 16, seed=7)
    first, second = (order.starts(epoch * order.windows, order.windows) for epoch in (0, 1))
    for starts in (first, second):
        assert sorted(np.diff(np.sort(starts)).tolist()) == [16] * (order.windows - 1), "end to end, none twice"
        assert starts.min() >= 0 and starts.max() + 16 < 1000, "the last target is inside"
    assert first.tolist() != sorted(first)
    assert (first % 16)[0] != (second % 16)[0], "cut at another offset"
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_the_order_is_a_function_of_seed_and_number():
    order = TrainingOrder(5000, 16, seed=7)
    whole = order.starts(0, 3 * order.windows)
    pieces = [order.starts(first, 50) for first in range(0, 3 * order.windows - 49, 50)]
    assert np.concatenate(pieces).tolist() == whole[: 50 * len(pieces)].tolist()
    assert TrainingOrder(5000, 16, seed=7).starts(900, 5).tolist() == whole[900:905].tolist()
    assert TrainingOrder(5000, 16, seed=8).starts(0, 50).tolist() != whole[:50].tolist()
    # Written down: a run that is resumed elsewhere, by a later version, has to go on in the same order.
    assert whole[:4].tolist() == [3219, 547, 595, 131]


def test_windows_hold_inputs_and_targets():
    tokens = np.arange(100, dtype=np.uint16)
    windows = read_windows(tokens, np.array([0, 16, 83]), 16)
    assert windows.dtype == np.int64 and windows.shape == (3, 17)
    assert windows[:, 0].tolist() == [0, 16, 83] and windows[2, -1] == 99


def test_held_out_windows_score_each_token_once():
    starts = held_out_windows(100, 16)
    targets = Counter(token for start in starts.tolist() for token in range(start + 1, start + 17))
    assert targets == Counter(range(1, 97))


@pytest.mark.parametrize("make", [lambda: TrainingOrder(30, 16, 0), lambda: held_out_windows(16, 16)])
def test_too_little_text_is_an_error(make):
    with pytest.raises(ConfigError, match="data.sequence_length: must be shorter"):
        make()
