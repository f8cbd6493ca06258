"""What is written beside the weights of a trained model: what its base had, and the end tokens that it was taught."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_examples import TALK, lines, section
from tiny_tokenizer import with_tokenizer

from megalite.config.schema import DataSection, NewModelSection, TokenizerSection, TrainConfig
from megalite.text.tokenizer import Tokenizer
from megalite.train import card
from megalite.train.data.prepared import Corpus, prepare
from megalite.train.export import files_beside
from megalite.train.new_model import starting_point
from megalite.weights import side_files as companions
from megalite.weights.folder import ModelFolder

START = 1
FINE_TUNE = TrainConfig(model=NewModelSection(path="base"), data=DataSection(source="chats.jsonl"))
TURNS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends turns with token 1, which is nobody's end token."""
OWN = {
    "several, one beyond the vocabulary": {"eos_token_id": [2, 303], "temperature": 0.6, "pad_token_id": 0},
    "null": {"eos_token_id": None, "do_sample": True, "top_k": 20},
    "none, and settings of others": {"assistant_early_exit": 4, "custom": {"a": [1]}, "max_new_tokens": 9},
    "the one that is taught": {"eos_token_id": [START], "repetition_penalty": 1.1},
    "an empty list": {"eos_token_id": []},
    "a sampler": {"bos_token_id": 1, "do_sample": True, "temperature": 0.5},
    "no file": None,
}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A tiny Qwen3 whose template ends turns with a token that no file names as an end, and much beside it."""
    folder = with_tokenizer(tiny("qwen3"), tmp_path_factory.mktemp("model") / "qwen3")
    (folder / "chat_template.jinja").write_text(TURNS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools " + TURNS)
    for name in ("LICENSE", "NOTICE.txt", "assets/logo.svg", "README.md", "added_tokens.json", "modeling_x.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


PAIRS = [{"prompt": f"{i}: ", "response": "y"} for i in range(8)]


@pytest.fixture(scope="module")
def chats(model, tmp_path_factory) -> Corpus:
    """A few chats, prepared with the model's tokenizer."""
    records = [{"messages": [*TALK, {"role": "user", "content": str(i)}]} for i in range(8)]
    return prepared(records, model, tmp_path_factory.mktemp("chats"), ())


def prepared(records: list[dict], tokenizer: Path, folder: Path, ends: tuple[int, ...]) -> Corpus:
    data = section(lines(folder / "examples.jsonl", *records), sequence_length=128)
    prepare(data, TokenizerSection(path=str(tokenizer)), folder / "data", ends=ends)
    return Corpus.open(folder / "data")


def exported(base: Path, out: Path, corpus: Corpus) -> ModelFolder:
    """Make the folder that a run on these examples would leave, without the weights."""
    found = starting_point(
        NewModelSection(path=str(base)),
        tokenizer=corpus.folder,
        vocab_size=corpus.vocab_size,
        end=corpus.eos_token_id,
        taught=corpus.ends,
    )
    companions.write(files_beside(found), out)
    return found


def changed(model: Path, folder: Path, own, **config) -> Path:
    """A copy of the model with another generation_config.json, and other values in config.json."""
    shutil.copytree(model, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    if own is not None:
        (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize("own", OWN.values(), ids=OWN.keys())
@pytest.mark.parametrize("eos", [2, None, [5, 50256]])
def test_the_bases_generation_settings_stay_and_the_taught_end_is_added(own, eos, model, chats, tmp_path):
    from transformers import GenerationConfig

    base = changed(model, tmp_path / "base", own, eos_token_id=eos)
    found = exported(base, tmp_path / "out", chats)
    before, after = ModelFolder.open(base).generation, ModelFolder.open(tmp_path / "out").generation
    assert START in found.model.eos_token_ids
    assert after.eos_token_ids == tuple(dict.fromkeys([*before.eos_token_ids, START]))
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert tuple(ends) == after.eos_token_ids
    if own is None:
        return
    wanted = GenerationConfig.from_pretrained(base).to_diff_dict() | {"eos_token_id": theirs.eos_token_id}
    assert theirs.to_diff_dict() == wanted
    if own == OWN["the one that is taught"]:
        name = "generation_config.json"
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("named", [None, "</s>"])
def test_pairs_teach_the_end_of_text(named, model, tmp_path):
    """The tokenizer's, else the model's, else the one that is called so."""
    base = changed(model, tmp_path / "base", {"eos_token_id": [7, 9]})
    values = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": named}))
    pairs = prepared(PAIRS, base, tmp_path, ModelFolder.open(base).generation.eos_token_ids)
    ends = exported(base, tmp_path / "out", pairs).model.eos_token_ids
    assert ends == ((7, 9, 2) if named else (7, 9))


def test_all_that_the_base_has_goes_along_but_its_card_and_code(model, chats, tiny, tmp_path):
    """Another tokenizer takes the place of the base's."""
    exported(model, tmp_path / "out", chats)
    folder = tmp_path / "out"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("additional_chat_templates/tool_use.jinja", "added_tokens.json", "LICENSE", "NOTICE.txt", "assets/logo.svg"),
    }
    assert (folder / "config.json").read_text() == json.dumps(ModelFolder.open(model).values, indent=2) + "\n"
    other = with_tokenizer(tiny("qwen3"), tmp_path / "other")
    (other / "chat_template.jinja").write_text(TURNS)
    folder = tmp_path / "second"
    exported(model, folder, prepared(PAIRS, other, tmp_path, ()))
    assert not (folder / "additional_chat_templates").exists() and not (folder / "added_tokens.json").exists()
    assert (folder / "LICENSE").exists() and Tokenizer.load(folder).has_chat_template


CARDS = {
    "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model": {"license": "apache-2.0"},
    "---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\n": {
        **{"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    },
    "---\nlicense: [mit, bsd]\n---": {"license": ["mit", "bsd"]},
    "---\n{license: [\n---": {},
    "---\n- license\n---": {},
    "# no front matter\n---\nlicense: mit\n---": {},
}


@pytest.mark.parametrize(("text", "wanted"), CARDS.items())
def test_the_card_carries_the_bases_licence(text, wanted, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card.licence_of(tmp_path) == wanted
    front = card.front_matter(FINE_TUNE, card.licence_of(tmp_path)).split("---\n")
    values = yaml.safe_load(front[1])
    assert front[0] == front[2] == "" and values["library_name"] == "transformers"
    assert {key: values[key] for key in card.LICENCE if key in values} == (wanted or {"license": "unknown"})
    (tmp_path / "LICENSE").write_text("terms")
    assert card.licence_of(tmp_path)["license"] == wanted.get("license", "other")


@pytest.mark.parametrize("text", ["plain", "~~~\ncode\n~~~\n", "`````\n~~~~~", "a ~ b"])
def test_a_fence_is_longer_than_what_it_holds(text):
    block = card.fenced(text, "python").splitlines()
    assert block[0] == f"{block[-1]}python" and len(block[-1]) >= 3 and set(block[-1]) == {"~"}
    assert block[-1] not in text and "\n".join(block[1:-1]).rstrip("\n") == text.rstrip("\n")
