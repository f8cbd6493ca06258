"""Config files and overrides: what they are read as, where each value came from, bounds, and the rules of sampling."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megalite.config import yaml_lines
from megalite.config.explain import explain, table
from megalite.config.load import SCHEMAS, load_config, loaded_from, resolve, with_origins
from megalite.config.rules import NO_BOUNDS, Rules
from megalite.config.sampling import sampling_from_mapping, sampling_problems
from megalite.config.schema import InferConfig, ModelSection, SamplingParams
from megalite.config.typecheck import hints, sections
from megalite.config.validate import engine_problems, model_location, validate
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


def test_an_empty_file_is_all_defaults_and_frozen(write):
    loaded = load_config("infer", write("# nothing\n"))
    assert loaded.config == InferConfig() and type(loaded.config.model) is ModelSection
    assert loaded.origins == dict.fromkeys(hints(InferConfig), "default")
    assert yaml_lines.read(loaded.given, "t") == {}
    with pytest.raises(FrozenInstanceError):
        loaded.config.parallel.tp = 3


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_class_is_a_structured_config(kind):
    assert OmegaConf.to_object(OmegaConf.structured(SCHEMAS[kind])) == SCHEMAS[kind]()


def test_every_value_has_its_origin(write):
    path = write("model:\n  path: a/b\n\nparallel:\n  tp: 2\n  pp: 2\nsampling:\n")
    loaded = load_config("infer", path, ["parallel.pp=4", "--engine.seed=3"])
    assert loaded.origins["model.path"] == f"{path}:2"
    assert loaded.origins["parallel.tp"] == f"{path}:5"
    assert loaded.origins["parallel.pp"] == "the command line"
    assert loaded.origins["parallel.dp"] == "default"
    assert (loaded.config.parallel.pp, loaded.config.engine.seed) == (4, 3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
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
        ('input.prompts=["a", [1, 2], [{role: user}]]', ["a", [1, 2], [{"role": "user"}]]),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(write, override, value):
    section, name = override.removeprefix("--").partition("=")[0].removesuffix(".5").split(".")
    got = getattr(getattr(load_config("infer", write(""), [override]).config, section), name)
    assert got == value and type(got) is type(value)


def test_pieces_of_a_mapping_join_what_the_file_has(write):
    path = write("deepspeed: {a: {b: 1, c: 2}}\nmodel: {config: {hidden_size: 8}}")
    loaded = load_config("train", path, ["deepspeed.a.b=5", "deepspeed.x=[1]", "model.config.vocab_size=9"])
    assert loaded.config.deepspeed == {"a": {"b": 5, "c": 2}, "x": [1]}
    assert loaded.config.model.config == {"hidden_size": 8, "vocab_size": 9}
    assert loaded.origins["deepspeed"] == f"{path}:1 and the command line"
    assert load_config("train", path, ["deepspeed={d: 1}"]).config.deepspeed == {"d": 1}
    assert load_config("train", write(loaded.text)).config == loaded.config


def test_equal_configs_have_equal_digests_however_written(write):
    one = load_config("infer", write("parallel: {tp: 2}\nsampling: {temperature: 1, logit_bias: {3: 1}}"))
    other = load_config(
        "infer", write("sampling:\n  temperature: 1.0\n"), ["parallel.tp=2", "sampling.logit_bias={3: 1.0}"]
    )
    third = load_config("infer", write("parallel: {tp: 3}"))
    assert one.sha256 == other.sha256 != third.sha256


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${model.revision}", "a${b", "???"])
def test_interpolation_is_refused(write, value):
    assert "must be a plain value" in problems_of(load_config, "infer", write(f"model: {{path: '{value}'}}"))
    assert "must be a plain value" in problems_of(load_config, "infer", write(""), [f"model.path={value}"])
    assert "must be a plain value" in problems_of(load_config, "train", write(f"deepspeed: {{a: ['{value}']}}"))
    assert "must be a plain value" in problems_of(load_config, "train", write(f"deepspeed: {{'{value}': 1}}"))


def test_text_for_the_model_is_taken_as_it_stands(write):
    odd = ["echo ${HOME} ${oc.env:HOME}", "???", "\\${x}", "$$", "~", "é\u2028\x85\n"]
    loaded = load_config("infer", write(yaml_lines.write({"input": {"prompts": odd}, "sampling": {"stop": odd}})))
    assert loaded.config.input.prompts == odd
    assert loaded.config.sampling.stop == odd


def test_a_value_with_a_problem_keeps_its_default(write):
    loaded, problems = resolve("infer", write("parallel: {tp: x, pp: 2}"))
    assert [problem.key for problem in problems] == ["parallel.tp"]
    assert (loaded.config.parallel.tp, loaded.config.parallel.pp) == (1, 2)


# ---- YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "job.yaml:1: not YAML"),
        ("model:\n\tpath: x", "job.yaml:2: not YAML"),
        ("model:\n\tpath: x", "Indent with spaces, not tabs."),
        ("model: {path: a}\nmodel: {path: b}", "job.yaml:2: the key 'model' is given twice"),
        ("parallel: {tp: 1, tp: 2}", "job.yaml:1: the key 'tp' is given twice"),
        ("a: &x 1\nb: *x", "job.yaml:2: aliases"),
        ("a: !!python/object:os.system x", "job.yaml:1: the tag '!!python/object:os.system' is not read"),
        ("a: 1\n---\nb: 2", "job.yaml:2: not YAML: expected a single document"),
        ("- a", "must hold sections"),
        ("[a]: b", "a key must be one word or number"),
        ("parallel: 3", "parallel: is a section and must hold keys, got 3"),
        ("model: {path: a: b}", "Put text that contains a colon in quotes"),
        ("[" * 5000, "nested too deeply"),
        ('model: {path: "\\ud800"}', "not Unicode"),
        ("parallel: {tp: '2'}", "must be a whole number or null, got '2'. Write 2, without quotes."),
        ("engine: {swap_space: '0.5'}", "must be a number, got '0.5'. Write 0.5, without quotes."),
        ("\n\nengine: {enforce_eager: yes}", "must be true or false, got 'yes'. Write true. (from "),
        ("output: {file: 5}", 'output.file: must be text or null, got 5. Put it in quotes: "5".'),
        ("sampling: {temperature: .nan}", "sampling.temperature: must be a finite number"),
        ("sampling: {stop_token_ids: [1, x]}", "stop_token_ids[1]: must be a whole number"),
        ("sampling: {logit_bias: {a: 1}}", "sampling.logit_bias: its keys must be whole numbers, got 'a'"),
    ],
)
def test_files_that_are_not_read(write, text, says):
    assert says in problems_of(load_config, "infer", write(text))


def test_yaml_is_read_as_it_looks():
    text = "a: 010\nb: 1e-3\nc: yes\nd: 1:30\ne: 2020-01-01\nf: 0x10\ng: 1_000\nh: ~\ni: .5\nj: on\nk: -.inf\n<<: no"
    texts = {"a": "010", "c": "yes", "d": "1:30", "e": "2020-01-01", "f": "0x10", "g": "1_000", "j": "on", "<<": "no"}
    assert yaml_lines.read(text, "t") == texts | {"b": 0.001, "h": None, "i": 0.5, "k": -math.inf}


scalars = st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 10**6), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150)
@given(trees)
def test_what_is_written_is_read_back(tree):
    assert yaml_lines.read(yaml_lines.write({"k": tree}), "t") == {"k": tree}
    line = yaml_lines.write({"k": tree}, inline=True)
    assert "\n" not in line and yaml_lines.read(line, "t") == {"k": tree}


@settings(max_examples=25)
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


# ---- bounds and rules --------------------------------------------------------------------------------------------

BOUNDS = """
parallel: tp 0 | 1; pp 0 | 1; layers [0] | [1] null; dp 0 | 1; interleave 0 | 1; first_rank -1 | 0
engine: max_model_len 0 -1 | 1 null; gpu_memory_utilization 0 1.1 90 | 0.1 1; num_kv_blocks 0 | 1 null
engine: swap_space -4 | 0; block_size 0 1025 | 1 1024; max_num_seqs 0 | 1; max_num_batched_tokens 0 | 1
engine: seed -1 9223372036854775808 | 0 9223372036854775807
sampling: n 0 16385 1000000000 | 1 16384; presence_penalty -2.1 2.1 | -2 2; frequency_penalty -2.1 2.1 | -2 2
sampling: repetition_penalty 0 | 0.1; temperature -0.5 | 0; top_p 0 1.01 | 0.1 1; top_k -2 | -1 0; min_p -0.1 1.5 | 0 1
sampling: seed -1 9223372036854775808 | 0 null; max_tokens 0 | 1 null; min_tokens -1 | 0; best_of 0 16385 | 1 null
server: port -1 65536 | 0 65535; max_queued_requests 0 | 1; max_queued_tokens 0 | 1; max_samples 0 16385 | 1 16384
server: max_logprobs -1 | 0; max_body 0 | 0.1; body_timeout 0 | 0.1; drain_timeout -1 | 0; stall_timeout 0 | 0.1
server: restarts -1 | 0
distributed: start_timeout 0 | 0.1; peer_timeout 0 | 0.1; step_timeout 0 | 0.1
model: router_aux_loss_coef -1 | 0 null
data: held_out 0 1 | 0.1; sequence_length 1 | 2; seed -1 9223372036854775808 | 0
optimizer: learning_rate 0 | 0.1; min_learning_rate -1 | 0; warmup_steps -1 | 0; weight_decay -1 | 0
optimizer: betas [-1,0] [0,1] | [0,0.9]; eps 0 | 0.1; gradient_clipping -1 | 0
train: steps 0 | 1; micro_batch_size 0 | 1; gradient_accumulation_steps 0 | 1; eval_every 0 | 1; eval_batches 0 | 1
train: patience 0 | 1 null; max_seconds 0 | 0.1 null; save_every 0 | 1; log_every 0 | 1; micro_batch_tokens 0 | 1
train: seed -1 9223372036854775808 | 0
supervised: steps -1 | 0; examples_per_step 0 | 1
hybrid: steps 0 | 1; prompts_per_step 0 1048577 | 1 1048576; samples_per_prompt 0 16385 | 1 16384
hybrid: updates_per_step 0 | 1; sync_every 0 | 1; reward_workers 0 | 1; reward_time_limit 0 | 0.1; clip_low -0.1 1 | 0
hybrid: clip_high -0.1 | 0; kl_coefficient -1 | 0; importance_limit 0.9 | 1; sync_bucket 0 | 0.1
hybrid: save_every 0 | 1; log_every 0 | 1
"""
"""`SECTION: KEY REFUSED ... | TAKEN ...; ...`"""


@pytest.mark.parametrize("kind", SCHEMAS)
def test_bounds(kind, write):
    path, table = write(""), {}
    for line in BOUNDS.strip().splitlines():
        section, _, keys = line.partition(": ")
        for name, *values in map(str.split, keys.split("; ")):
            if f"{section}.{name}" in hints(SCHEMAS[kind]):
                bar = values.index("|")
                table[f"{section}.{name}"] = {True: values[:bar], False: values[bar + 1 :]}
    for refused in (True, False):
        for i in range(3):
            given = {key: values[refused][i] for key, values in table.items() if i < len(values[refused])}
            loaded = load_config(kind, path, [f"{key}={value}" for key, value in given.items()])
            found = [one for one in Rules(loaded.config).problems if one.rule != "is needed"]
            validate(loaded.config, None, None)  # no rule between values fails over one that is out of bounds
            assert [one.key.partition("[")[0] for one in found] == [
                key for key in loaded.origins if refused and key in given
            ]
    bounded = {
        f"{prefix}.{field.name}"
        for prefix, section in sections(SCHEMAS[kind]).items()
        for field in fields(section)
        if field.metadata.get("bounds", NO_BOUNDS).limits and prefix.count(".") == 0
    }
    assert bounded - table.keys() <= {"sampling.logit_bias"}, "a new bound needs a place in the table"


def test_a_bound_is_told_with_its_unit_null_and_what_to_write(write):
    args = [
        "engine.swap_space=-4",
        "engine.seed=-1",
        "engine.num_kv_blocks=0",
        "sampling.top_p=1.5",
        "sampling.n=99999",
    ]
    args += ["sampling.logit_bias={5: 1e3}", "engine.gpu_memory_utilization=90"]
    loaded = load_config("infer", write("model: {path: a/b}\nparallel:\n  tp: 0\n"), args)
    found = [
        str(one).removesuffix(" (from the command line)")
        for one in with_origins(Rules(loaded.config).problems, loaded.origins)
    ]
    assert found == [
        f"parallel.tp: must be >= 1, or null, got 0. (from {loaded.origins['parallel.tp']})",
        "engine.gpu_memory_utilization: must be above 0 and at most 1, got 90.0.",
        "engine.num_kv_blocks: must be >= 1, or null, got 0.",
        "engine.swap_space: must be >= 0 GiB, got -4.0.",
        "engine.seed: must be between 0 and 2^63 - 1, got -1.",
        "sampling.n: must be at most 16384, got 99999.",
        "sampling.top_p: must be above 0 and at most 1, got 1.5. 1 keeps all tokens.",
        "sampling.logit_bias.5: must be between -100 and 100, got 1000.0.",
    ]


def test_the_defaults_break_no_rule():
    config = replace(InferConfig(), model=ModelSection(path="owner/name"))
    assert engine_problems(config, None) == []
    assert [problem.key for problem in validate(config, None, 1)] == ["input"]


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
    ("changes", "says"),
    [
        ({"n": True}, "n: must be a whole number"),
        ({"n": 3, "best_of": 2}, "best_of: must be at least n = 3, got 2"),
        ({"best_of": 2, "temperature": 0.0}, "best_of: with temperature 0 all samples are equal"),
        ({"temperature": math.nan}, "temperature: must be a finite number"),
        ({"temperature": math.inf}, "temperature: must be a finite number"),
        ({"max_tokens": 0}, "max_tokens: must be >= 1"),
        ({"min_tokens": 17}, "min_tokens: must be at most max_tokens = 16, got 17"),
        ({"stop": 5}, "stop: must be text, a list of texts, or null, got 5"),
        ({"stop": ["a", ""]}, "stop: must not hold an empty text"),
        ({"stop": ["a", 5]}, "stop: must be text, a list of texts, or null"),
        ({"stop": "a", "detokenize": False}, "detokenize: stop strings are looked for in the text"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: the model's token ids are 0 to 99, got -1"),
        ({"stop_token_ids": [100]}, "stop_token_ids: the model's token ids are 0 to 99, got 100"),
        ({"logprobs": -2}, "logprobs: must be between 0 and 20"),
        ({"logprobs": 21}, "logprobs: must be between 0 and 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: must be between 0 and 20"),
        ({"allowed_token_ids": []}, "allowed_token_ids: must hold a token id"),
        ({"allowed_token_ids": [5, 100]}, "allowed_token_ids: the model's"),
        ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids: must hold at most 262144 entries"),
        ({"bad_words": ["a", " "]}, "bad_words: must not hold an empty text"),
        ({"bad_words": "a"}, "bad_words: must be a list of texts"),
        ({"bad_words": ["a"] * 1025}, "bad_words: must be at most 1024 texts"),
        ({"logit_bias": {100: 1.0}}, "logit_bias: the model's"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: its keys must be whole numbers"),
    ],
)
def test_sampling_rules(changes, says):
    (problem,) = sampling_problems(SamplingParams(**changes), prefix="", vocab_size=100)
    assert str(problem).startswith(says)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 2, "best_of": 2},
        {"n": 2, "temperature": 0},
        {"max_tokens": None, "min_tokens": 100},
        {"stop": ["a"], "stop_token_ids": (99,)},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"logprobs": -1, "allowed_token_ids": [0, 99], "bad_words": ["a b"], "detokenize": False},
        {"logit_bias": {0: -100, 99: 100}},
    ],
)
def test_sampling_that_is_fine(changes):
    assert sampling_problems(SamplingParams(**changes), vocab_size=100) == []


# ---- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEMAS)
def test_help_explains_every_key(kind):
    text = explain(kind)
    lines = [line.strip() for line in text.splitlines()]
    heads = {name: i for i, line in enumerate(lines) for name in re.findall(r"^(\w+)  \(", line)}
    for key in hints(SCHEMAS[kind]):
        meaning = lines[heads[key.rpartition(".")[2]] + 1]
        assert meaning and not re.match(r"\w+  \(", meaning), f"{key} has no words"
    assert "tp  (whole number or null, >= 1; default 1)\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_print_config_has_a_line_a_key(write):
    path = write('parallel: {tp: 2}\ninput: {prompts: ["a\\nb"]}')
    lines = table(load_config("infer", path)).splitlines()
    assert [line.split()[0] for line in lines] == list(hints(InferConfig))
    assert next(line for line in lines if line.startswith("parallel.tp ")).split() == ["parallel.tp", "2", f"{path}:1"]
    assert len({line.rindex("default") for line in lines if line.endswith("default")}) == 1
