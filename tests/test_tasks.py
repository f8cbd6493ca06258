"""Sources of prompts: files and functions, what is wrong with them, and the order in which prompts are taken."""

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from megalite.errors import ConfigError
from megalite.hybrid.tasks import additions, check_source, library_functions, load_examples
from megalite.rewards.functions import complete_function, exact_match
from megalite.train.data.records import is_held_out

ADDITIONS = "megalite.hybrid.tasks:additions"
LIBRARY = "megalite.hybrid.tasks:library_functions"


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


def test_held_out_records_depend_on_themselves_alone(tmp_path):
    lines = [{"prompt": f"question {number}"} for number in range(200)]
    splits = {}
    for name, some in (("all", lines), ("half", lines[::2])):
        source = write(tmp_path / f"{name}.jsonl", *some)
        for split in ("train", "held_out"):
            splits[name, split] = {one.prompt for one in load_examples(source, {}, split=split, held_out=0.2)}
    assert splits["all", "train"] | splits["all", "held_out"] == {line["prompt"] for line in lines}
    assert not splits["all", "train"] & splits["all", "held_out"] and 20 < len(splits["all", "held_out"]) < 60
    assert splits["half", "held_out"] == splits["all", "held_out"] & {line["prompt"] for line in lines[::2]}


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
    with pytest.raises(ConfigError, match="tasks.jsonl:10: can't be read:.*\n.*and 20 more"):
        load_examples(str(tmp_path / "tasks.jsonl"), {}, split="train")


def test_a_source_without_examples_is_an_error(tmp_path):
    source = write(tmp_path / "tasks.jsonl", {"prompt": "x"})
    with pytest.raises(ConfigError, match="data.source: has no held_out examples.* Raise data.held_out"):
        load_examples(source, {}, split="held_out")
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


# ---- additions


def test_additions():
    train, held_out = (load_examples(ADDITIONS, {"digits": 2}, split=split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (2000, 1008)
    for one in train + held_out:
        left, right = one.prompt.rstrip("=").split("+")
        assert one.record["answer"] == str(int(left) + int(right)) and int(left) < 100 > int(right)
        assert exact_match(one.prompt, one.response, one.record) == 1
    prompts = [one.prompt for one in train + held_out]
    assert len(set(prompts)) == len(prompts), "none twice, none in both splits"
    # Written down: a run that is resumed elsewhere, by a later version, has to go on with the same prompts.
    assert prompts[:4] == ["57+27=", "26+39=", "38+21=", "15+15="]


def test_additions_are_a_function_of_their_arguments():
    def prompts(**options) -> list[str]:
        return [one["prompt"] for one in additions(**{"split": "train", "count": 50, **options})]

    assert prompts() == prompts() and prompts(seed=1) != prompts() and prompts(count=20) == prompts()[:20]
    for digits in (1, 3, 4, 9):
        for split in ("train", "held_out"):
            made = prompts(digits=digits, split=split, seed=3)
            assert len(set(made)) == len(made) == (50 if digits > 1 or split == "train" else len(made)) > 0
    assert not set(prompts(seed=1)) & set(prompts(seed=2, split="held_out", count=5000))
    for options, key in (({"digits": 0}, "digits"), ({"digits": 10}, "digits"), ({"count": 0}, "count")):
        with pytest.raises(ConfigError, match=f"data.options.{key}: must be"):
            prompts(**options)


# ---- functions of a library

MODULE = '''"""A module."""
import os

NAMES = []

@property
def decorated(
    self,
    name: str = "x",
):
    """Doc.

    More.
    """
    value = os.stat(name)
    return value

class Case:
    def method(self, a):
        # why
        if a:
            return self.b(a)

    def constant(self):
        return 3

    def documented(self):
        """Only words."""

    async def text(self):
        return self.run("""
left of the column
""")

    def outer(self):
        @wrapped
        def inner(x):
            return x + self.y
        return inner

def one_line(x): return x + 1

def long(x):
''' + "".join(f"    x{number} = x\n" for number in range(30))


@pytest.fixture
def library(tmp_path) -> Path:
    for number in range(20):
        text = MODULE.replace("os.stat", f"os.stat{number}").replace("self.b(", f"self.b{number}(")
        (tmp_path / f"module{number}.py").write_text(text.replace("def ", f"def f{number}_"))
    (tmp_path / "module20.py").write_text("print 'Python 2'\n")
    (tmp_path / "module21.py").write_bytes(b"# caf\xe9\ndef f(x):\n    return x.y\n")
    return tmp_path


def test_library_functions_are_cut_at_their_heads(library):
    options = {"source": str(library), "held_out": 1.0, "max_head": 9}
    made = library_functions(split="train", **options) + library_functions(split="held_out", **options)
    seen = {one["origin"].split()[1]: one for one in made}
    kinds = Counter(name.partition("_")[2] for name in seen)
    assert kinds == {"decorated": 20, "method": 20, "outer": 20, "inner": 20}
    head = '@property\ndef f3_decorated(\n    self,\n    name: str = "x",\n):\n    """Doc.\n\n    More.\n    """\n'
    assert seen["f3_decorated"] == {
        "prompt": head,
        "response": "    value = os.stat3(name)\n    return value\n",
        "statements": 2,
        "origin": "module3.py:7 f3_decorated",
    }
    assert seen["f3_method"]["prompt"] == "def f3_method(self, a):\n    # why\n"
    assert seen["f3_outer"]["prompt"] == "def f3_outer(self):\n"
    assert seen["f3_inner"]["prompt"] == "@wrapped\ndef f3_inner(x):\n"
    for one in made:
        ast.parse(one["prompt"] + one["response"])


def test_library_functions_are_of_held_out_files_only(library):
    held_out = {f"module{number}.py" for number in range(22) if is_held_out(f"module{number}.py", 0.4)}
    made = {split: library_functions(split=split, source=str(library), held_out=0.4) for split in ("train", "held_out")}
    origins = {one["origin"].partition(":")[0] for split in made for one in made[split]}
    assert origins == held_out - {"module20.py", "module21.py"}
    prompts = {split: {one["prompt"] for one in made[split]} for split in made}
    assert prompts["train"] and prompts["held_out"] and not prompts["train"] & prompts["held_out"]
    again = library_functions(split="train", source=str(library), held_out=0.4, count=3)
    assert again == made["train"][:3]
    other = library_functions(split="train", source=str(library), held_out=0.4, seed=1)
    assert other != made["train"] and {one["prompt"] for one in other} == prompts["train"]


def test_functions_of_the_standard_library_score_well_as_they_are():
    """The reward of `complete_function` for what people wrote, and for the first half of it."""
    examples = load_examples(LIBRARY, {}, split="train")
    assert len(examples) > 300
    assert all(is_held_out(one.record["origin"].partition(":")[0], 0.03) for one in examples)
    whole = [complete_function(one.prompt, one.response, one.record) for one in examples]
    halves = [complete_function(one.prompt, one.response[: len(one.response) // 2], one.record) for one in examples]
    assert sum(whole) / len(whole) > 0.9 and sum(halves) / len(halves) < 0.4
