"""Sources of prompts: files and functions, what is wrong with them, and the order in which prompts are taken."""

import json
import sys
from pathlib import Path

import pytest

from megalite.errors import ConfigError
from megalite.hybrid.tasks import check_source, load_examples

ADDITIONS = "configs.hybrid.grpo_arithmetic:additions"
LIBRARY = "configs.hybrid.grpo_demo:library_functions"


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


# ---- files


def test_a_file_of_records(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    records = [{"prompt": "1+1=", "answer": "2"}, {"messages": chat, "response": "hello"}]
    source = write(tmp_path / "tasks.jsonl", records[0], "", "  ", records[1])
    first, second = load_examples(source, {}, split="train")
    assert (first.where, first.prompt, first.messages, first.response) == ("tasks.jsonl:1", "1+1=", None, None)
    assert (second.where, second.prompt, second.messages, second.response) == ("tasks.jsonl:4", None, chat, "hello")
    assert [first.record, second.record] == records


def test_what_templates_see_is_the_records_before_the_configs(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    own = {**chat, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "wild"}}
    source = write(tmp_path / "tasks.jsonl", chat, own, {"prompt": "a", "tools": "for the reward"})
    given = {"tools": [{}], "mood": "calm", "think": False}
    seen = [dict(one.variables) for one in load_examples(source, {}, split="train", variables=given)]
    assert seen == [given, {"tools": [{"name": "f"}], "mood": "wild", "think": False}, {}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON at column 2"),
        ("[1]", 'must be a mapping such as {"prompt": "..."}'),
        ({"question": "x"}, "needs either a prompt or messages"),
        ({"promt": "x"}, "needs either a prompt or messages; it has 'promt'"),
        ({"prompt": "x", "messages": []}, "needs either a prompt or messages"),
        ({"prompt": ""}, "prompt must be a text that is not empty"),
        ({"prompt": [1, 2]}, "prompt must be a text that is not empty"),
        ({"messages": []}, "messages: must be a list of {role, content}, at least one"),
        ({"messages": [{"content": "x"}]}, "messages[0]: a chat message needs a role"),
        ({"messages": [{"role": "user"}], "tools": {}}, "tools: must be a list of JSON schemas, or null"),
        ({"prompt": "x", "response": None}, "response must be text, got null"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, message):
    source = write(tmp_path / "tasks.jsonl", {"prompt": "good"}, line, {"prompt": "good"}, line)
    with pytest.raises(ConfigError) as caught:
        load_examples(source, {}, split="train")
    assert [problem.key for problem in caught.value.problems] == ["tasks.jsonl:2", "tasks.jsonl:4"]
    assert message in caught.value.problems[0].rule


def test_many_bad_records_are_counted(tmp_path):
    (tmp_path / "tasks.jsonl").write_bytes(b"\xff\n" * 30)
    with pytest.raises(ConfigError, match="tasks.jsonl:10: is not UTF-8 at byte 1.*\n.*and 20 more"):
        load_examples(str(tmp_path / "tasks.jsonl"), {}, split="train")


def test_a_source_without_examples_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="data.source: has no train examples"):
        load_examples(write(tmp_path / "empty.jsonl"), {}, split="train")


# ---- functions

OWN_TASKS = """
def good(*, split, seed, first="a", last="c"):
    return [{"prompt": f"{split} {seed} {one}"} for one in (first, "b", last)]

def bad(*, split, seed):
    return [{"prompt": "x"}, {"prompt": 3}, {"prompt": "y", "answers": {1, 2}}]

def raises(*, split, seed):
    raise KeyError("split")

def positional(seed):
    return []
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A working folder with a module of the user's."""
    (tmp_path / "own_tasks.py").write_text(OWN_TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # and taken back after the test
    yield tmp_path
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)


def test_a_function_of_ones_own(own):
    examples = load_examples("own_tasks:good", {"last": "z"}, split="train", seed=5)
    assert [one.prompt for one in examples] == ["train 5 a", "train 5 b", "train 5 z"]
    assert examples[2].where == "own_tasks:good[2]"
    with pytest.raises(ConfigError) as caught:
        load_examples("own_tasks:bad", {}, split="train")
    assert [problem.key for problem in caught.value.problems] == ["own_tasks:bad[1]", "own_tasks:bad[2]"]
    assert "texts, numbers, lists and mappings" in caught.value.problems[1].rule
    with pytest.raises(ConfigError, match=r"it raised KeyError: 'split' \(own_tasks.py:9\)"):
        load_examples("own_tasks:raises", {}, split="train")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (ADDITIONS, {"digits": 3}, None),
        (LIBRARY, {"max_body": 8}, None),
        ("megalite.hybrid.tasks:additions", {"digits": 1}, None),  # names of earlier configs
        ("megalite.hybrid.tasks:library_functions", {}, None),
        ("own_tasks:good", {"first": "x"}, None),
        (ADDITIONS, {"digit": 3}, "data.options.digit: .*has no such option. Did you mean data.options.digits?"),
        (ADDITIONS, {"seed": 3}, "data.options.seed: .*has no such option. It takes digits, count."),
        ("own_tasks:goood", {}, "data.source: own_tasks has no function goood.* Did you mean own_tasks:good?"),
        ("own_tasks:positional", {}, r"data.source: must be callable as \(split=..., seed=...\)"),
        ("own_task:good", {}, "data.source: there is no module own_task.* Did you mean own_tasks?"),
        ("task.jsonl", {}, "data.source: no such file.* Did you mean tasks.jsonl?"),
        ("stdlib", {}, "data.source: must be a JSON-lines file or a function.*package.module:function"),
        ("tasks.jsonl", {"digits": 2}, "data.options: are for a function"),
    ],
)
def test_sources_are_checked_before_the_start(own, source, options, message):
    write(own / "tasks.jsonl", {"prompt": "x"})
    found = check_source(source, options)
    if message is None:
        assert found == []
        return
    assert len(found) == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(*found)
    with pytest.raises(ConfigError, match=message):
        load_examples(source, options, split="train")
