"""Supervised fine-tuning: lines to examples, which tokens count, how they are packed, and the step they make."""

import json
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import tokenizer as tokenizer_of
from tiny_tokenizer import CHAT, with_tokenizer
from tokenizer_family import FAMILY, bytes_of
from tokenizers import Tokenizer as Backend
from train_helpers import as_run, build_from, replicas

from megalite.config.schema import (
    DataSection,
    NewModelSection,
    OptimizerSection,
    TokenizerSection,
    TrainConfig,
    TrainOutputSection,
    TrainSection,
)
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError
from megalite.text.tokenizer import Tokenizer
from megalite.train.data.examples import encode_chat, encode_pair
from megalite.train.data.order import TrainingOrder
from megalite.train.data.prepared import Corpus, check, prepare
from megalite.train.data.reading import ExampleReader, open_reader
from megalite.train.data.records import MOST_PROBLEMS, Records, find_files, line_problems
from megalite.train.trainer import Trainer

END = 2
ENDED = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.role == 'assistant' and loop.last %}<thought>{% endif %}{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "content": "6 it is"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A tiny Qwen3 with a tokenizer of one token a character."""
    return with_tokenizer(tiny("qwen3"), tmp_path_factory.mktemp("model") / "qwen3")


def with_template(folder: Path, out: Path, template: str) -> Path:
    """A copy of its tokenizer with another chat template."""
    out.mkdir()
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return out


def lines(path: Path, *records, raw: bytes = b"") -> Path:
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + raw)
    return path


def pair(number: int, size: int = 3) -> dict:
    return {"prompt": f"# {number}\n", "response": "x" * size + "\n", "id": number}


def section(source: Path, **changes) -> DataSection:
    return DataSection(**{"source": str(source), "pattern": "**/*", "held_out": 0.25, "sequence_length": 32, **changes})


# ---- lines


def test_what_the_lines_hold_decides_the_format(tmp_path):
    kinds = {
        "texts.jsonl": ({"text": "one"}, {"text": "two", "url": "not used"}),
        "pairs.jsonl": (pair(1), pair(2)),
        "chats.jsonl": ({"messages": TALK, "prompt": "a copy of the first message"},),
    }
    for name, records in kinds.items():
        data = section(lines(tmp_path / name, *records))
        found = Records(find_files(data), data)
        assert found.format == ("text" if name == "texts.jsonl" else "examples")
        assert [record.where for record in found] == [f"{tmp_path / name}:{1 + i}" for i in range(len(records))]
    assert list(found)[0].values == {"messages": TALK}
    (tmp_path / "chats.jsonl").rename(tmp_path / "notes.txt")
    data = section(tmp_path / "notes.txt")
    assert Records(find_files(data), data).format == "text", "a file that is not named .jsonl is a text"


BAD = {
    "unfinished": (b'{"prompt": "a"', "is not valid JSON at column 15"),
    "a list": (b"[1]", "must be a JSON object"),
    "latin": (b'{"text": "caf\xe9"}', "is not UTF-8 at byte 14"),
    "another kind": (b'{"text": "a"}', "holds 'text', the lines before it 'prompt'/'response'"),
    "two kinds": (b'{"text": "a", "messages": []}', "holds 'text' and 'messages', where a line is one of them"),
    "half a pair": (b'{"prompt": "a"}', "has 'prompt' but no 'response'"),
    "none": (b'{"question": "a"}', "needs 'text', 'prompt'/'response' or 'messages'; it has ['question']"),
    "a pair of TRL's": (b'{"prompt": "a", "completion": "b"}', "'completion' is called 'response' here"),
    "a number": (b'{"prompt": 1, "response": "a"}', "'prompt' must be a text, got int"),
    "half a character": (rb'{"prompt": "\ud800", "response": "a"}', "'prompt' has half a surrogate pair"),
    "nothing": (b'{"prompt": "a", "response": ""}', "'response' is empty"),
    "no turn": (b'{"messages": [{"role": "user"}]}', "no message has the role 'assistant'"),
    "no role": (b'{"messages": [{"content": "a"}]}', "messages[0]: a chat message needs a role"),
    "tools": (b'{"messages": [{"role": "assistant"}], "tools": "f"}', "tools: must be a list of JSON schemas"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_before_anything_starts(case, tmp_path):
    raw, says = BAD[case]
    source = lines(tmp_path / "data.jsonl", pair(1), raw=b"\n" + raw + b"\n")
    config = TrainConfig(data=section(source), output=TrainOutputSection(folder=str(tmp_path / "out")))
    (found,) = check(config)
    assert str(found).startswith(f"{source}:3: ") and says in str(found)


def test_the_first_few_bad_lines_are_told_at_once(tmp_path):
    source = lines(tmp_path / "data.jsonl", *[pair(1), {"text": "a"}] * (2 * MOST_PROBLEMS))
    found = line_problems(section(source))
    numbers = [int(str(one).split(":")[1]) for one in found]
    assert numbers == list(range(2, 2 * MOST_PROBLEMS + 1, 2))


def test_kinds_are_not_mixed_across_files_either(tmp_path):
    lines(tmp_path / "a.jsonl", pair(1))
    lines(tmp_path / "b.jsonl", {"text": "a"})
    (tmp_path / "c.txt").write_text("a text")
    first, second = line_problems(section(tmp_path))
    assert "b.jsonl:1: holds 'text', and the first file holds examples" in str(first)
    assert "c.txt: a text, where all others are examples" in str(second)
    (only,) = line_problems(section(tmp_path, format="text"))
    assert "a.jsonl:1: holds 'prompt'/'response', and data.format says texts" in str(only)


# ---- the loss mask


def counted(tokenizer: Tokenizer, example) -> str:
    """The text of the tokens that count."""
    return tokenizer.decode([i for i, counts in zip(example.ids, example.loss_mask, strict=True) if counts], **RAW)


RAW = {"skip_special_tokens": False}


def test_of_a_pair_the_response_and_its_end_count(folder):
    known = Tokenizer.load(folder)
    # "er" is one token, and in the second the border is inside it
    for prompt, response, wanted in (("er a", " a er", " a er</s>"), ("the e", "rror", "error</s>")):
        example = encode_pair(known, prompt, response, END)
        assert known.decode(example.ids, **RAW) == f"{prompt}{response}</s>" and counted(known, example) == wanted
    assert encode_pair(known, "a", "b</s>", END).ids.count(END) == 1
    _, composing = of_family("byte level, NFC")
    example = encode_pair(composing, "he", "\u0301 a", END)
    assert counted(composing, example) == "\u00e9 a</s>", "a mark goes with its letter"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (ENDED, ["4</s>6 it is</s>"]),  # with its end, and not the line end after it
        (CHAT, ["4\n6 it is\n</s>"]),  # without ends of its own
        (THINKING, ["<thought>4</s>", "<thought>6 it is</s>"]),  # turns that are shown otherwise later, as generated
    ],
)
def test_of_a_chat_every_turn_of_the_assistant_counts(template, wanted, folder, tmp_path):
    known = Tokenizer.load(with_template(folder, tmp_path / "tokenizer", template))
    found = encode_chat(known, TALK, END)
    assert [counted(known, example) for example in found] == wanted
    whole = known.chat_text(TALK[:-1], add_generation_prompt=False)
    known.close()
    shown = known.decode(found[-1].ids, **RAW)
    assert shown == whole + ("</s>" if template == CHAT else ""), "what comes after the last turn is left out"
    assert list(found[-1].ids[: -1 if template == CHAT else None]) == known.encode(whole, add_special_tokens=False)


def test_templates_see_what_a_line_or_the_config_gives_them(folder, tmp_path):
    template = "{{ mood }}{{ tools | length if tools }}: " + ENDED
    chats = [{"messages": [*TALK, {"role": "user", "content": str(i)}]} for i in range(12)]
    own = {"tools": [{}, {}], "chat_template_kwargs": {"mood": "wild"}}
    source = lines(tmp_path / "chats.jsonl", *chats, *({**chat, **own} for chat in chats))
    path = with_template(folder, tmp_path / "tokenizer", template)
    data = section(source, sequence_length=96, tools=[{}], chat_template_kwargs={"mood": "calm"})
    prepare(data, TokenizerSection(path=str(path)), tmp_path / "prepared")
    corpus = Corpus.open(tmp_path / "prepared")
    found = [text.partition(":")[0] for split in ("train", "held_out") for text in texts(corpus, split)]
    assert sorted(found) == ["calm1"] * 12 + ["wild2"] * 12


def test_a_template_whose_prompt_is_no_beginning_is_refused_by_line(folder, tmp_path):
    template = ENDED.replace("assistant: {% endif %}", "assistant (thinks): {% endif %}")
    source = lines(tmp_path / "chats.jsonl", *[{"messages": TALK}] * 2)
    path = with_template(folder, tmp_path / "tokenizer", template)
    with pytest.raises(ConfigError, match="shows message 2, an assistant's, otherwise") as caught:
        prepare(section(source), TokenizerSection(path=str(path)), tmp_path / "prepared")
    assert [str(one).split(": ")[0] for one in caught.value.problems] == [f"{source}:1", f"{source}:2"]


@cache
def of_family(name: str) -> tuple[Backend, Tokenizer]:
    """A tokenizer of tokenizer_family.py, and ours made of it."""
    return FAMILY[name](), Tokenizer(FAMILY[name](), {"bos_token": "<s>", "eos_token": "</s>"}, {"default": TURNS})


TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = st.lists(st.sampled_from([*"ab :\n.é🙂", "the", "hello", " the", "  ", "he", "e\u0301", "한"]), max_size=8)
PARTS = st.one_of(WORDS.map("".join), st.text(max_size=6))


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=25, deadline=None)
@given(prompt=PARTS, response=PARTS)
@example(prompt="Answer: ", response="the")
@example(prompt="hell", response="o")
@example(prompt="hel", response="lo the")
@example(prompt="e", response="\u0301 a")
@example(prompt="a ", response=" ")
@example(prompt="", response="hello")
def test_the_tokens_of_a_pair_read_as_it_is_written(name, prompt, response):
    made, known = of_family(name)
    written = prompt + response
    if not written:
        return
    example = encode_pair(known, prompt, response, END)
    head, ids = known.encode(""), known.encode(written)
    assert list(example.ids) == (ids if ids[-1] == END else [*ids, END]) and example.loss_mask[-1]
    text = unicodedata.normalize("NFC", written) if "NFC" in name else written
    if name == "byte level, prefix":
        assert known.decode(ids, skip_special_tokens=True).removeprefix(" ") == text.removeprefix(" ")
    elif name in ("metaspace first", "metaspace always"):  # a space at the start is as good as theirs, and dropped
        assert known.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")
    else:
        assert known.decode(ids, skip_special_tokens=True) == text
    assert not any(example.loss_mask[: len(head)])
    if text == written:
        check_border(bytes_of(made, ids[len(head) :], text), example.loss_mask[len(head) :], text, len(prompt))


def check_border(spelled, loss_mask, text: str, border: int) -> None:
    """A token is learnt if a byte of a character of the response is in it."""
    char_of = [place for place, character in enumerate(text) for _ in character.encode()]
    done = 0
    for token, counts in zip(spelled, loss_mask, strict=False):
        done += len(token)
        if token:
            assert counts == (char_of[done - 1] >= border), (token, done)


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=10, deadline=None)
@given(contents=st.lists(PARTS.filter(lambda text: "<" not in text), min_size=1, max_size=5), begins=st.booleans())
@example(contents=["hell", "o the", ": ", " the"], begins=True)
def test_the_turns_of_a_chat_read_as_its_template_shows_them(name, contents, begins):
    made, known = of_family(name)
    roles = ["assistant", "user"] if begins else ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    if not any(message["role"] == "assistant" for message in messages):
        return
    (example,) = encode_chat(known, messages, END)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    text = known.chat_text(messages, add_generation_prompt=False)
    assert list(example.ids) == made.encode(text, add_special_tokens=False).ids
    answers = "".join(f"{message['content']}</s>" for message in messages if message["role"] == "assistant")
    answers = unicodedata.normalize("NFC", answers) if "NFC" in name else answers
    assert counted(known, example).replace(" ", "") == answers.replace(" ", "")
    if name.startswith("byte level") and "prefix" not in name:
        assert counted(known, example) == answers


@cache
def places_by_transformers(kind: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind).backend)


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "word_suffix", "plain_words"])
@settings(max_examples=15, deadline=None)
@given(prompt=PARTS, response=PARTS)
@example(prompt="the quick", response=" brown fox")
@example(prompt="the qu", response="ick")
def test_tokenizers_that_drop_characters_learn_what_is_left(kind, prompt, response):
    """Against the places of tokens that transformers gives, from which a token that reaches over the border counts."""
    theirs = places_by_transformers(kind)(prompt + response, return_offsets_mapping=True)
    if len(theirs.input_ids) == 0:
        return
    example = encode_pair(tokenizer_of(kind), prompt, response, END)
    assert list(example.ids)[: len(theirs.input_ids)] == theirs.input_ids
    wanted = [stop > len(prompt) for _, stop in theirs.offset_mapping]
    if unicodedata.is_normalized("NFD", prompt + response) and "\u0301" not in response[:1]:
        assert list(example.loss_mask)[: len(wanted)] == wanted


# ---- prepared, packed and read


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory) -> Corpus:
    """Forty examples of 9 to 24 tokens."""
    place = tmp_path_factory.mktemp("prepared")
    source = lines(place / "pairs.jsonl", *(pair(number, 3 + number % 16) for number in range(40)))
    prepare(section(source), TokenizerSection(path=str(folder)), place)
    return Corpus.open(place)


def texts(corpus: Corpus, split: str) -> list[str]:
    known, found = Tokenizer.load(corpus.folder), getattr(corpus, split)
    return [known.decode(found[i][0].tolist(), **RAW) for i in range(len(found))]


def test_examples_are_split_by_what_they_hold(prepared, folder, tmp_path):
    train, held_out = texts(prepared, "train"), texts(prepared, "held_out")
    assert len(train) + len(held_out) == len({*train, *held_out}) == 40 and 3 < len(held_out) < 18
    again = lines(tmp_path / "other name.jsonl", *(pair(number, 3 + number % 16) for number in reversed(range(40))))
    prepare(section(again), TokenizerSection(path=str(folder)), tmp_path)
    assert set(texts(Corpus.open(tmp_path), "held_out")) == set(held_out)
    facts = prepared.facts["splits"]["train"]
    assert facts["learnt"] == sum(len(text.partition("\n")[2]) - len("</s>") + 1 for text in train)


@pytest.mark.parametrize(("too_long", "left", "cut"), [("skip", 6, 0), ("truncate", 0, 6)])
def test_examples_that_are_too_long(too_long, left, cut, folder, tmp_path):
    source = lines(tmp_path / "pairs.jsonl", *(pair(number, 30 if number % 4 == 0 else 3) for number in range(24)))
    tokenizer = TokenizerSection(path=str(folder))
    with pytest.raises(ConfigError, match=r"has 36 tokens, more than data.sequence_length = 20. Raise it") as caught:
        prepare(section(source, sequence_length=20), tokenizer, tmp_path)
    assert [str(one).split(": ")[0] for one in caught.value.problems] == [f"{source}:{1 + 4 * i}" for i in range(6)]
    data = section(source, sequence_length=20, too_long=too_long)
    prepare(data, tokenizer, tmp_path)
    corpus = Corpus.open(tmp_path)
    said = open_reader(corpus, data, TrainSection(), ParallelState(Layout())).describe()
    assert said.endswith(f". 6 were longer than data.sequence_length: {left} are left out, {cut} lost their end")
    assert {len(corpus.train[i][0]) for i in range(len(corpus.train))} <= {9, 10, 20}
    with pytest.raises(ConfigError, match="data.sequence_length: is not what the run began with"):
        prepare(section(source, sequence_length=24, too_long=too_long), tokenizer, tmp_path, in_use=True)


def test_a_new_tokenizer_is_trained_on_pairs_and_has_no_template_for_chats(tmp_path):
    data = section(lines(tmp_path / "pairs.jsonl", *(pair(number) for number in range(20))))
    prepare(data, TokenizerSection(vocab_size=300), tmp_path)
    corpus = Corpus.open(tmp_path)
    assert "# 1\nxxx\n<|endoftext|>" in texts(corpus, "train") + texts(corpus, "held_out")
    chats = lines(tmp_path / "chats.jsonl", *({"messages": [*TALK, {"role": str(i)}]} for i in range(9)))
    with pytest.raises(ConfigError, match=r"a new tokenizer has no chat template, and .*chats.jsonl:\d is a chat"):
        prepare(section(chats), TokenizerSection(vocab_size=300), tmp_path / "other")


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_what_a_step_reads_does_not_hang_on_the_replicas(dp, prepared):
    """12 examples a step, over more than an epoch; every replica has as many micro batches, none above the capacity."""
    data = section(prepared.folder, sequence_length=24)
    train = TrainSection(micro_batch_size=2, gradient_accumulation_steps=6 // dp)
    readers = [ExampleReader(prepared, data, train, state) for state in replicas(dp)]
    order = TrainingOrder(len(prepared.train), data.seed)
    for step in range(5):
        steps = [reader.step(12 * step) for reader in readers]
        wanted = [prepared.train[i][0].tolist() for i in order.indices(12 * step, 12)]
        got = []
        for batch in (batch for one in steps for batch in one.batches):
            assert batch.num_tokens <= 2 * 24
            parts = zip(batch.ids.split(batch.lengths), batch.targets.split(batch.lengths), strict=True)
            got += [[*ids.tolist(), int(targets[-1])] for ids, targets in parts if batch.weights.any()]
        assert sorted(got) == sorted(wanted)
        assert len({len(one.batches) for one in steps}) == 1
        assert steps[0].lengths == [len(ids) - 1 for ids in wanted]


def test_held_out_examples_are_scored_once_each(prepared):
    data, train = section(prepared.folder), TrainSection(micro_batch_size=1)
    batches = [list(ExampleReader(prepared, data, train, state).held_out(None)) for state in replicas(2)]
    assert len(batches[0]) == len(batches[1])
    weight = sum(float(batch.weights.sum()) for some in batches for batch in some)
    assert weight == prepared.facts["splits"]["held_out"]["learnt"]
    fewer = sum(sum(batch.lengths) for batch in ExampleReader(prepared, data, train, replicas(1)[0]).held_out(2))
    assert fewer == sum(prepared.held_out.lengths[:2]) - 2


# ---- a step


def train_on_examples(rank: int, folder: Path, corpus: Corpus, train: TrainSection, layout: Layout):
    with as_run(rank):
        state = ParallelState(layout)
        trainer = Trainer(build_from(folder, state), OptimizerSection(), steps=1)
        reader = open_reader(corpus, section(corpus.folder, sequence_length=24), train, state)
        captured = {}
        for name, param in trainer.decoder.named_parameters():
            param.register_hook(lambda grad, name=name: captured.__setitem__(name, captured.get(name, 0) + grad))
        report = trainer.step(reader.step(0).batches)
        return trainer.read(report)["loss"], trainer.gradient_norm, {k: v.float() for k, v in captured.items()}


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2)], ids=str)
def test_a_step_is_that_of_transformers_with_prompts_masked(layout, prepared, folder, ranks):
    """labels = -100 on the prompt, each example in a row of its own: loss and gradients, in float32."""
    from transformers import AutoModelForCausalLM

    train = TrainSection(micro_batch_size=3, gradient_accumulation_steps=2 // layout.dp)
    results = ranks(layout.size).run(train_on_examples, folder, prepared, train, layout)
    examples = [prepared.train[i] for i in TrainingOrder(len(prepared.train), 0).indices(0, 6)]
    width = max(len(ids) for ids, _ in examples)
    ids, labels = torch.zeros(6, width, dtype=torch.int64), torch.full((6, width), -100)
    mask = torch.zeros(6, width, dtype=torch.int64)
    for row, (tokens, counts) in enumerate(examples):
        tokens = torch.from_numpy(tokens.astype(np.int64))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(np.array(counts)), tokens, -100)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    for got_loss, got_norm, _ in results:
        assert got_loss == pytest.approx(loss.item(), rel=1e-5)
        assert got_norm == pytest.approx(float(norm), rel=1e-4)
    down = sum(gradients["layers.2.mlp.down.weight"] for _, _, gradients in results) / layout.dp
    torch.testing.assert_close(down, model.model.layers[2].mlp.down_proj.weight.grad, rtol=1e-3, atol=1e-6)


def test_a_tokenizer_goes_along_with_the_model_it_is_for(folder, tmp_path):
    """Fine-tuning without tokenizer.path takes that of model.path, which is refused where there is none."""
    from megalite.config.validate import validate

    source = lines(tmp_path / "pairs.jsonl", pair(1))
    output = TrainOutputSection(folder=str(tmp_path / "out"))
    config = TrainConfig(model=NewModelSection(path=str(folder)), data=section(source), output=output)
    assert validate(config, None, None) == []
    (tmp_path / "bare").mkdir()
    bare = TrainConfig(model=NewModelSection(path=str(tmp_path / "bare")), data=section(source), output=output)
    assert "tokenizer.path: is needed: model.path has no tokenizer" in str(validate(bare, None, None)[0])
