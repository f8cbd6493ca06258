"""Config files and overrides: what they are read as, where each value came from, and that nothing is expanded."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE

from megalite.config import yaml_lines
from megalite.config.explain import explain, table
from megalite.config.load import SCHEMAS, load_config, loaded_from, resolve, with_origins
from megalite.config.sampling import sampling_from_mapping, sampling_problems
from megalite.config.schema import InferConfig, ModelSection, ParallelSection, SamplingParams, TrainConfig
from megalite.config.typecheck import hints
from megalite.config.validate import engine_problems, model_location, validate, world_size_problem
from megalite.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems_of(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


# ---- what values become ------------------------------------------------------------------------------------------


def test_an_empty_file_is_all_defaults(write):
    loaded = load_config("infer", write("# nothing\n"))
    assert loaded.config == InferConfig()
    assert set(loaded.origins.values()) == {"default"}
    assert set(loaded.origins) == set(hints(InferConfig))


def test_the_result_is_the_frozen_dataclass_tree(write):
    config = load_config("infer", write("parallel: {tp: 2}\nsampling: {temperature: 0}")).config
    assert type(config) is InferConfig and type(config.model) is ModelSection
    assert config.parallel.tp == 2 and type(config.sampling.temperature) is float
    with pytest.raises(FrozenInstanceError):
        config.parallel.tp = 3


def test_every_value_has_its_origin(write):
    path = write("model:\n  path: a/b\n\nparallel:\n  tp: 2\n  pp: 2\nsampling:\n")
    loaded = load_config("infer", path, ["parallel.pp=4", "--engine.seed=3"])
    assert loaded.origins["model.path"] == f"{path}:2"
    assert loaded.origins["parallel.tp"] == f"{path}:5"
    assert loaded.origins["parallel.pp"] == "the command line"
    assert loaded.origins["engine.seed"] == "the command line"
    assert loaded.origins["parallel.dp"] == "default"
    assert (loaded.config.parallel.pp, loaded.config.engine.seed) == (4, 3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("parallel.tp=4", 4),
        ("--parallel.tp=4", 4),
        ("engine.swap_space=1e-3", 0.001),
        ("engine.swap_space=2", 2.0),
        ("engine.enforce_eager=true", True),
        ("model.path=/a: b/c=d", "/a: b/c=d"),
        ("model.path='a b'", "a b"),
        ("model.revision=0123456", "0123456"),
        ("model.revision=1e5", "1e5"),
        ("model.revision=null", None),
        ("sampling.stop=[a, 'b: c']", ["a", "b: c"]),
        ("sampling.stop=###", "###"),
        ("sampling.stop_token_ids=[1, 2]", [1, 2]),
        ("sampling.logit_bias={5: 1, 6: -2.5}", {5: 1.0, 6: -2.5}),
        ("sampling.logit_bias.5=3", {5: 3.0}),
        (
            'input.prompts=["a", [1, 2], [{role: user, content: hi}]]',
            ["a", [1, 2], [{"role": "user", "content": "hi"}]],
        ),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(write, override, value):
    key = override.removeprefix("--").partition("=")[0].removesuffix(".5")
    section, name = key.split(".")
    got = getattr(getattr(load_config("infer", write(""), [override]).config, section), name)
    assert got == value and type(got) is type(value)


def test_pieces_of_a_mapping_join_what_the_file_has(write):
    path = write("deepspeed: {a: {b: 1, c: 2}}\nmodel: {config: {hidden_size: 8}}")
    loaded = load_config("train", path, ["deepspeed.a.b=5", "deepspeed.x=[1]", "model.config.vocab_size=9"])
    assert loaded.config.deepspeed == {"a": {"b": 5, "c": 2}, "x": [1]}
    assert loaded.config.model.config == {"hidden_size": 8, "vocab_size": 9}
    assert loaded.origins["deepspeed"] == f"{path}:1 and the command line"
    replaced = load_config("train", path, ["deepspeed={d: 1}"])
    assert replaced.config.deepspeed == {"d": 1}


# ---- nothing is expanded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${model.revision}", "a${b", "???"])
def test_interpolation_is_refused(write, value):
    assert "must be a plain value" in problems_of(load_config, "infer", write(f"model: {{path: '{value}'}}"))
    assert "must be a plain value" in problems_of(load_config, "infer", write(""), [f"model.path={value}"])
    assert "must be a plain value" in problems_of(load_config, "train", write(f"deepspeed: {{a: ['{value}']}}"))
    assert "must be a plain value" in problems_of(load_config, "train", write(f"deepspeed: {{'{value}': 1}}"))


def test_text_for_the_model_is_taken_as_it_stands(write):
    odd = ["echo ${HOME} ${oc.env:HOME}", "???", "\\${x}", "$$", "~", "é\u2028\x85\n"]
    path = write(yaml_lines.write({"input": {"prompts": odd}, "sampling": {"stop": odd}}))
    loaded = load_config("infer", path)
    assert loaded.config.input.prompts == odd
    assert loaded.config.sampling.stop == odd


# ---- problems ----------------------------------------------------------------------------------------------------


def test_all_problems_are_found_at_once(write):
    path = write(
        "paralel: {tp: 2}\nmodel: {pth: x, dtype: bf16}\nengine: {seed: 1.5}\nsampling: {stop_token_ids: [1, a]}"
    )
    text = problems_of(load_config, "infer", path, ["parallel.tp=true", "zero=1"])
    lines = text.splitlines()
    assert len(lines) == 7
    assert f"paralel: unknown key. Did you mean parallel? (from {path}:1)" in lines
    assert f"model.pth: unknown key. Did you mean model.path? (from {path}:2)" in lines
    assert any(line.startswith("model.dtype: must be one of auto, float32") for line in lines)
    assert f"engine.seed: must be a whole number, got 1.5. (from {path}:3)" in lines
    assert f"sampling.stop_token_ids[1]: must be a whole number, got 'a'. (from {path}:4)" in lines
    assert "parallel.tp: must be a whole number, got true. (from the command line)" in lines


def test_a_value_with_a_problem_keeps_its_default(write):
    loaded, problems = resolve("infer", write("parallel: {tp: x, pp: 2}"))
    assert [problem.key for problem in problems] == ["parallel.tp"]
    assert (loaded.config.parallel.tp, loaded.config.parallel.pp) == (1, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "job.yaml:1: not YAML"),
        ("model:\n\tpath: x", "job.yaml:2: not YAML"),
        ("model: {path: a}\nmodel: {path: b}", "job.yaml:2: the key 'model' is given twice"),
        ("parallel: {tp: 1, tp: 2}", "job.yaml:1: the key 'tp' is given twice"),
        ("a: &x 1\nb: *x", "job.yaml:2: aliases"),
        ("a: !!python/object:os.system x", "job.yaml:1: the tag '!!python/object:os.system' is not read"),
        ("a: 1\n---\nb: 2", "job.yaml:2: not YAML: expected a single document"),
        ("- a", "must hold sections"),
        ("parallel: 3", "parallel: is a section and must hold keys, got 3"),
        ("model: {path: a: b}", "Put text that contains a colon in quotes"),
        ("[" * 5000, "nested too deeply"),
        ('model: {path: "\\ud800"}', "not Unicode"),
    ],
)
def test_unreadable_files_name_the_line(write, text, says):
    assert says in problems_of(load_config, "infer", write(text))


def test_yaml_is_read_as_it_looks():
    text = "a: 010\nb: 1e-3\nc: yes\nd: 1:30\ne: 2020-01-01\nf: 0x10\ng: 1_000\nh: ~\ni: .5\nj: on\nk: -.inf"
    assert yaml_lines.read(text, "t") == {
        "a": "010",
        "b": 0.001,
        "c": "yes",
        "d": "1:30",
        "e": "2020-01-01",
        "f": "0x10",
        "g": "1_000",
        "h": None,
        "i": 0.5,
        "j": "on",
        "k": -math.inf,
    }


# ---- the resolved text -------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 10**6), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_what_is_written_is_read_back(tree):
    assert yaml_lines.read(yaml_lines.write({"k": tree}), "t") == {"k": tree}
    line = yaml_lines.write(tree, inline=True)
    assert "\n" not in line
    assert yaml_lines.read(yaml_lines.write({"k": tree}, inline=True), "t") == {"k": tree}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(min_size=1) | st.lists(st.integers(0, 99), min_size=1), max_size=3),
    st.none() | st.text(min_size=1) | st.lists(st.text()),
    st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=3),
    st.floats(0, 10),
)
def test_a_resolved_file_loads_back_exactly(tmp_path_factory, prompts, stop, bias, temperature):
    sampling = SamplingParams(stop=stop, logit_bias=bias, temperature=temperature)
    config = replace(InferConfig(), sampling=sampling)
    config = replace(config, input=replace(config.input, prompts=prompts))
    first = loaded_from(config)
    path = tmp_path_factory.mktemp("resolved") / "config.yaml"
    path.write_text(first.text, encoding="utf-8")
    again = load_config("infer", path)
    assert again.config == config
    assert (again.text, again.sha256) == (first.text, first.sha256)


def test_equal_configs_have_equal_digests_however_written(write):
    one = load_config("infer", write("parallel: {tp: 2}\nsampling: {temperature: 1, logit_bias: {3: 1}}"))
    other = load_config(
        "infer", write("sampling:\n  temperature: 1.0\n"), ["parallel.tp=2", "sampling.logit_bias={3: 1.0}"]
    )
    third = load_config("infer", write("parallel: {tp: 3}"))
    assert one.sha256 == other.sha256 != third.sha256


def test_train_configs_load_back_too(write, tmp_path):
    first = load_config("train", write("model: {config: {a: [1, {b: null}]}}\ndeepspeed: {c: {d: 1}}"))
    assert type(first.config) is TrainConfig
    path = tmp_path / "resolved.yaml"
    path.write_text(first.text, encoding="utf-8")
    assert load_config("train", path).config == first.config


# ---- rules -------------------------------------------------------------------------------------------------------


def test_the_defaults_break_no_rule():
    config = replace(InferConfig(), model=ModelSection(path="owner/name"))
    assert engine_problems(config, None) == []
    assert [problem.key for problem in validate(config, None, 1)] == ["input"]
    assert sampling_problems(SamplingParams()) == []


def test_origins_are_added_to_the_problems_of_rules(write):
    path = write("model: {path: a/b}\nparallel:\n  tp: 0\ninput: {prompts: ['', x]}")
    loaded = load_config("infer", path, ["sampling.n=0"])
    lines = [str(problem) for problem in with_origins(validate(loaded.config, None, None), loaded.origins)]
    assert f"parallel.tp: must be >= 1, got 0. (from {path}:3)" in lines
    assert "sampling.n: must be >= 1, got 0. (from the command line)" in lines
    assert any(line.startswith("input.prompts[0]: an empty prompt") and f"{path}:4" in line for line in lines)
    assert len(lines) == 3


def test_world_size_problem_says_what_to_type():
    config = InferConfig(parallel=ParallelSection(tp=2, dp=2))
    assert world_size_problem(config, 4) is None
    assert world_size_problem(config, None) is None
    text = str(world_size_problem(config, 2, "deepspeed started 2 ranks", "deepspeed --num_gpus 4 x.py"))
    assert "deepspeed started 2 ranks, but the config asks for tp * pp * dp = 2 * 1 * 2 = 4" in text
    assert text.endswith("deepspeed --num_gpus 4 x.py")


def test_where_a_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert model_location("models/mine") == "folder"
    assert model_location("models/mien") is None  # a slip of a local name is not asked of the hub
    assert model_location("Qwen/Qwen3-0.6B") == "hub"
    for bad in ("gpt2", "a/b/c", "/a/b", "a/../b", "a//b", "~/model", "a/b.git", "", "a/b c"):
        assert model_location(bad) is None


def test_sampling_of_an_input_line():
    base = SamplingParams(stop="${kept}", temperature=0.5)
    got = sampling_from_mapping(base, {"n": 2, "logit_bias": {"7": 1}, "stop_token_ids": [3]})
    assert got == SamplingParams(stop="${kept}", temperature=0.5, n=2, logit_bias={7: 1}, stop_token_ids=[3])
    assert sampling_from_mapping(base, {}) == base
    text = problems_of(sampling_from_mapping, base, {"tempreture": 1, "n": "2", "max_new_tokens": 5})
    assert text.splitlines() == [
        "sampling.tempreture: unknown key. Did you mean temperature?",
        "sampling.n: must be a whole number, got '2'. Write 2, without quotes.",
        "sampling.max_new_tokens: unknown key. Did you mean max_tokens?",
    ]
    assert "must be an object" in problems_of(sampling_from_mapping, base, [1])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "temperature": 0.0}, "best_of"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"logprobs": -2}, "logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 100]}, "allowed_token_ids"),
        ({"bad_words": ["a", " "]}, "bad_words"),
        ({"bad_words": "a"}, "bad_words"),
        ({"stop": "a", "detokenize": False}, "detokenize"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: 101.0}}, "logit_bias.5"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ],
)
def test_sampling_rules(changes, key):
    problems = sampling_problems(SamplingParams(**changes), prefix="", vocab_size=100)
    assert [problem.key for problem in problems] == [key]


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2, "best_of": 2},
        {"n": 2, "temperature": 0.0},
        {"top_k": -1},
        {"max_tokens": None, "min_tokens": 100},
        {"stop": ["a"], "stop_token_ids": (99,)},
        {"logprobs": 0, "prompt_logprobs": 20},
        {
            "logprobs": -1,
            "flat_logprobs": True,
            "allowed_token_ids": [0, 99],
            "bad_words": ["a b"],
            "detokenize": False,
        },
        {"logit_bias": {0: -100, 99: 100}},
        {"temperature": 0},
    ],
)
def test_sampling_that_is_fine(changes):
    assert sampling_problems(SamplingParams(**changes), vocab_size=100) == []


# ---- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_help_explains_every_key(kind):
    text = explain(kind)
    lines = [line.strip() for line in text.splitlines()]
    heads = {name: i for i, line in enumerate(lines) for name in re.findall(r"^(\w+)  \(", line)}
    for key in hints(SCHEMAS[kind]):
        meaning = lines[heads[key.rpartition(".")[2]] + 1]
        assert meaning and not re.match(r"\w+  \(", meaning), f"{key} has no words"
    assert "Tensor parallel ranks" in text
    assert max(map(len, text.splitlines())) <= 120


def test_print_config_has_a_line_a_key(write):
    path = write('parallel: {tp: 2}\ninput: {prompts: ["a\\nb"]}')
    loaded = load_config("infer", path)
    lines = table(loaded).splitlines()
    assert [line.split()[0] for line in lines] == list(hints(InferConfig))
    assert next(line for line in lines if line.startswith("parallel.tp ")).split() == ["parallel.tp", "2", f"{path}:1"]
    assert len({line.rindex("default") for line in lines if line.endswith("default")}) == 1


def test_importing_stays_light():
    code = (
        "import sys, megalite, megalite.cli, megalite.dry_run, megalite.config.validate\n"
        "from megalite import SamplingParams\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'tokenizers', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_asdict_of_the_schema_is_what_is_written():
    assert yaml_lines.read(loaded_from(InferConfig()).text, "t") == asdict(InferConfig())
