"""The demos of configs/hybrid: their tasks and rewards, and a model that learns to add."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
from forks import TRAINING

from megalite.errors import ConfigError
from megalite.hybrid.tasks import load_examples
from megalite.rewards.functions import exact_match
from megalite.rewards.named import NamedFunction
from megalite.rewards.pool import ARGUMENTS
from megalite.train.data.records import is_held_out

ADDITIONS = "configs.hybrid.grpo_arithmetic:additions"
LIBRARY = "configs.hybrid.grpo_demo:library_functions"
additions = NamedFunction(name=ADDITIONS, key="", keywords=("split", "seed")).load()
library_functions = NamedFunction(name=LIBRARY, key="", keywords=("split", "seed")).load()
complete_function = NamedFunction(
    name="configs.hybrid.grpo_demo:complete_function", key="", positional=ARGUMENTS
).load()


def test_a_model_learns_to_add(forks, tmp_path):
    """Ten of the demo's hundred sums, and a fifth of its parameters: right answers become ten times as many."""
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}
    smaller = [f"model.config.{name}={value}" for name, value in shape.items()] + [
        "model.config.initializer_range=0.08"
    ]
    smaller += ["data.options.count=10", "hybrid.prompts_per_step=10", "hybrid.samples_per_prompt=32"]
    shorter = ["supervised.steps=5", "supervised.examples_per_step=64", "hybrid.steps=7", "hybrid.save_every=100"]
    shorter += ["optimizer.warmup_steps=8", "optimizer.learning_rate=4e-3"]
    one_rank = ["train.parallel.dp=1", "infer.parallel.tp=1", f"output.folder={tmp_path}"]
    config = ["--config", "configs/hybrid/grpo_arithmetic.yaml"]
    options = {"preload": TRAINING, "within": 800, "OMP_NUM_THREADS": "1"}  # minutes of work on a busy machine
    done = forks.run("launch/hybrid.py", *config, *smaller, *shorter, *one_rank, **options)
    assert done.code == 0, done.err
    log = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in log if "iteration" in line]
    assert len(rewards) == 7 and rewards[0] < 0.1 and min(rewards[-3:]) > 0.3


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
    examples = examples[:80]
    whole = [complete_function(one.prompt, one.response, one.record) for one in examples]
    halves = [complete_function(one.prompt, one.response[: len(one.response) // 2], one.record) for one in examples]
    assert sum(whole) / len(whole) > 0.9 and sum(halves) / len(halves) < 0.4


# ---- completed functions

HEAD = 'def scale(values, factor):\n    """Multiply."""\n'
BODY = "    scaled = [v * factor for v in values]\n    log(scaled)\n    return scaled\n"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (BODY, 1),
        (BODY + "\n\ndef other(", 1),  # what comes after the function does not count
        (BODY + "\n@decorator\ndef other(", 1),
        (BODY + "# comment\nx = = 1\n", 1),
        (BODY.rstrip(), 0.5),  # perhaps cut off
        (BODY + "    if scaled:\n", 0.5 * 3 / 4),  # breaks off
        (BODY + "    ))\n    x\n", 0.5 * 3 / 5),
        (BODY.replace("factor", "2"), 3 / 4),  # one of two parameters
        (BODY.replace("    log(scaled)\n", ""), 2 / 3),  # two of three statements
        (BODY.replace("    log(scaled)\n", "    log(scaled)\n" * 8), 3 / 10),
        ("    # a comment\n" * 9 + BODY, 2 * 3 / 12),
        ('    """\n' + "    text\n" * 7 + '    """\n' + BODY, 2 * 3 / 12),
    ],
)
def test_completed_function(completion, reward):
    assert complete_function(HEAD, completion, {"statements": 7}) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("completion", "most"),
    [
        ("", 0),
        ("    pass\n", 0),
        ("    ...\n", 0),
        ("    return\n", 0),
        ("    return None\n\ndef f():\n    x()\n", 0),
        ("    raise NotImplementedError('soon')\n", 0),
        ("    values\n    factor\n", 0),
        ("    values = values\n    factor = factor\n", 0),
        ("    while True:\n        pass\n", 0),
        ('    """Another docstring."""\n' * 5, 0),
        ("    # only words\n" * 50, 0),
        ("x = values * factor\n", 0),
        ("    )\n", 0),
        ("\n" * 100, 0),
        ("    x = values[0] * factor\n" * 40, 0.01),
        ("    return values, factor\n", 0.34),
        ("    x = 1\n    y = 2\n    z = 3\n", 0.5),
    ],
)
def test_a_lazy_function_gets_little(completion, most):
    assert complete_function(HEAD, completion, {"statements": 7}) <= most


def test_heads_of_several_forms():
    assert complete_function("class A:\n    @property\n    async def f(self):\n", "        return self.x\n", {}) == 1
    assert complete_function("def f(): ", "return g()\n", {}) == 1
    assert complete_function("import os\n\n\ndef f(x):\n    y = 1\n", "    return os.stat(x, y)\n", {}) == 1
    assert complete_function("x = 1\n", "y = 2\n", {}) == 0, "no function"
