"""Reading prompts: what a line may say, what is refused, and that one bad line costs no other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_request import make_request
from tokenizer_family import token_a_byte
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megalite.config.schema import InputSection, SamplingParams
from megalite.errors import ConfigError
from megalite.inference.io.inputs import PromptLimits, derived_seed
from megalite.inference.io.job_input import InputBatch, input_problems, read_inputs
from megalite.text.tokenizer import MAX_TOKEN, Tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ raise_exception('no') if x }}"
DEFAULTS = SamplingParams(temperature=0.7, max_tokens=20)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
HI = [{"role": "user", "content": "hi"}]


@cache
def tokenizer(template: str = CHAT) -> Tokenizer:
    return Tokenizer(token_a_byte(bos=True), NAMES, {"default": template} if template else {})


def limits(**changes) -> PromptLimits:
    base = PromptLimits(tokenizer=tokenizer(), vocab_size=258, max_model_len=64, eos_token_ids=(7,), seed=3)
    return replace(base, **changes)


def read(lines: list[object] | bytes, tmp_path=None, **changes) -> InputBatch:
    """From standard input, or from a file in `tmp_path`; objects become JSON lines."""
    if not isinstance(lines, bytes):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        lines = "\n".join(texts).encode("utf-8", "surrogatepass")
    if tmp_path is None:
        return read_inputs(InputSection(file="-"), DEFAULTS, limits(**changes), stdin=io.BytesIO(lines))
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines)
    return read_inputs(InputSection(file=str(path)), DEFAULTS, limits(**changes))


def errors(batch: InputBatch) -> list[str]:
    return [failure.error for failure in batch.failures]


# ---- what is read


def test_prompts_of_every_kind():
    batch = read(
        [
            {"prompt": "ab"},
            {"prompt": [5, 6, 7], "id": "mine"},
            {"messages": HI, "id": 12},
            {"prompt": "ab", "sampling": {"n": 2, "max_tokens": 3, "stop": "x", "logit_bias": {"5": 1.0}}},
        ]
    )
    assert batch.failures == ()
    first, second, third, fourth = batch.requests
    text = tokenizer().encode("ab")
    assert [request.id for request in batch.requests] == ["0", "mine", "12", "3"] == list(batch.order)
    assert first.prompt_token_ids == tuple(text) and text[0] == 0
    assert second.prompt_token_ids == (5, 6, 7)
    assert [request.prompt for request in batch.requests] == ["ab", None, "<s>user:hi;", "ab"]
    assert third.prompt_token_ids.count(0) == 1  # the template writes the only <s>
    assert (fourth.params.n, fourth.max_tokens, fourth.params.logit_bias) == (2, 3, {5: 1.0})
    assert fourth.params.temperature == DEFAULTS.temperature
    assert first.params is DEFAULTS


def test_inline_prompts():
    section = InputSection(prompts=["ab", [1, 2], [{"role": "user", "content": "x"}], "", [300], 5])
    batch = read_inputs(section, DEFAULTS, limits())
    assert batch.order == ("0", "1", "2", "3", "4", "5")
    assert [request.id for request in batch.requests] == ["0", "1", "2"]
    for place, error in zip((3, 4, 5), errors(batch), strict=True):
        assert error.startswith(f"input.prompts[{place}]")


def test_a_file_and_standard_input_give_the_same(tmp_path):
    """Blank lines, line ends and a byte order mark as well."""
    lines = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \t \n{"prompt": "b"}\r\n{"prompt": ""}'
    from_file, from_stdin = read(lines, tmp_path), read(lines)
    assert from_file.requests == from_stdin.requests and from_file.digest == from_stdin.digest
    assert [request.prompt for request in from_file.requests] == ["a", "b"]
    assert from_file.order == ("0", "1", "2")
    assert errors(from_file)[0].startswith("prompts.jsonl:5:")
    assert errors(from_stdin)[0].startswith("stdin:5:")


def test_the_digest_is_of_the_content():
    base = read([{"prompt": "a"}, {"prompt": "b"}]).digest
    assert read([{"prompt": "a"}, "", {"prompt": "b"}]).digest == base
    assert read([{"prompt": "b"}, {"prompt": "a"}]).digest != base
    assert read([{"prompt": "a"}]).digest != base


# ---- what is refused, by line


CHAT_OF = '{"messages": [{"role": "user"%s}]%s}'
SAMPLED = '{"prompt": "a", "sampling": %s}'
BAD_LINES = [
    ('{"prompt": "a"', "is not valid JSON at column"),
    ('"text"', "must be a JSON object"),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
    (b'{"prompt": "\xff"}', "is not UTF-8 at byte 13"),
    ("{}", "needs either a prompt or messages"),
    ('{"prompt": "a", "messages": []}', "needs either a prompt or messages"),
    ('{"promt": "a"}', "unknown key 'promt'; perhaps 'prompt' is meant"),
    ('{"prompt": "a", "zzzz": 1}', "the keys are prompt, messages, tools, chat_template_kwargs, id, sampling"),
    ('{"prompt": null}', "a prompt must be text"),
    ('{"prompt": 5}', "a prompt must be text"),
    ('{"prompt": ""}', "empty prompt"),
    ('{"prompt": []}', "empty prompt"),
    ('{"prompt": [258]}', "[0]: the model's token ids are 0 to 257, got 258"),
    ('{"prompt": [-1]}', "token ids are 0 to 257"),
    ('{"prompt": [1.0]}', "token id"),
    ('{"prompt": [true]}', "token id"),
    ('{"prompt": ["a", "b"]}', "several prompts"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"messages": []}', "messages must be a list"),
    ('{"messages": "hi"}', "messages must be a list"),
    ('{"messages": [1]}', "messages must be a list"),
    ('{"messages": [{"content": "a"}]}', "[0]: a chat message needs a role"),
    (CHAT_OF % (', "content": 3', ""), "content: must be text"),
    (CHAT_OF % (', "content": [{"type": "image_url"}]', ""), "content[0].type: only texts"),
    (CHAT_OF % ("", ', "tools": [3]'), "tools[0]: must be a JSON schema"),
    (CHAT_OF % ("", ', "chat_template_kwargs": {"tools": []}'), "tools: is no variable"),
    ('{"prompt": "a", "tools": []}', "tools and chat_template_kwargs are for chats, and the prompt is none"),
    ('{"prompt": "a", "id": ""}', "id: must be a text that is not empty"),
    ('{"prompt": "a", "id": true}', "id: must be"),
    ('{"prompt": "a", "id": [1]}', "id: must be"),
    ('{"prompt": "a", "id": "\\udfff"}', "id: has half a surrogate pair"),
    (SAMPLED % "3", "sampling"),
    (SAMPLED % '{"temprature": 1}', "temprature"),
    (SAMPLED % '{"temperature": "hot"}', "sampling.temperature"),
    (SAMPLED % '{"temperature": -1}', "sampling.temperature: must be >= 0, got -1"),
    (SAMPLED % '{"n": 3, "best_of": 2}', "at least n = 3"),
    (SAMPLED % '{"stop_token_ids": [300]}', "token ids are 0 to 257"),
    (SAMPLED % '{"n": 1000000000}', "sampling.n: must be at most 16384, got 1000000000"),
    (SAMPLED % '{"n": 1e9}', "sampling.n"),
    (SAMPLED % '{"best_of": 16385}', "sampling.best_of: must be at most 16384"),
    (SAMPLED % '{"stop": [%s"a"]}' % ('"a",' * 1024), "at most 1024 texts"),
    (SAMPLED % '{"stop": "%s"}' % ("a" * 65537), "at most 65536 characters together"),
    (SAMPLED % '{"stop_token_ids": [%s 1]}' % ("1," * (1 << 18)), "at most 262144"),
    (SAMPLED % '{"logprobs": 21}', "logprobs: must be between 0 and 20"),
    ('{"prompt": "%s"}' % ("a" * 63), "the prompt has 64 tokens, and with the output it must fit in 64"),
]


def test_bad_lines_cost_no_others():
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in BAD_LINES]
    batch = read(b"".join(line + b'\n{"prompt": "fine"}\n' for line in lines))
    places = [str(2 * place) for place in range(len(lines))]
    assert [request.id for request in batch.requests] == [str(int(place) + 1) for place in places]
    assert [failure.request_id for failure in batch.failures] == places
    assert batch.order == tuple(map(str, range(2 * len(lines))))
    for place, (failure, (_, message)) in enumerate(zip(batch.failures, BAD_LINES, strict=True)):
        assert failure.error.startswith(f"stdin:{2 * place + 1}") and message in failure.error
        assert failure.outputs == [] and json.loads(failure.to_line().encode())["id"] == str(2 * place)


@pytest.mark.parametrize(
    ("max_model_len", "sampling", "message"),
    [
        (1 << 20, {"n": 129, "max_tokens": None}, "129 samples of up to 1048576 tokens are 135266304 tokens"),
        (1 << 20, {"n": 1, "best_of": 129, "max_tokens": 1 << 30}, "one request may have 134217728"),
        (1 << 20, {"n": 8, "logprobs": 20, "max_tokens": 1 << 19}, "88080384 log-probabilities"),
        (64, {"n": 16384, "stop": ["a"] * 1024, "logit_bias": {"5": 1.0}}, "16793600 values"),
    ],
)
def test_a_request_has_a_price_as_a_whole(max_model_len, sampling, message):
    """Each value is fine by itself."""
    lines = [{"prompt": [1, 2], "sampling": sampling}, {"prompt": [1, 2]}]
    batch = read(lines, max_model_len=max_model_len)
    assert [request.id for request in batch.requests] == ["1"]
    assert message in errors(batch)[0], errors(batch)
    lines[0]["sampling"] = {**sampling, "n": 1, "best_of": None}
    assert read(lines, max_model_len=max_model_len).failures == ()


KEEP_THEIR_ID = [
    '{"id": "x", "messages": []}',
    '{"messages": [], "id": "x"}',
    '{"id": "x", "prompt": "a", "prompt": "b"}',
    '{"prompt": [NaN], "id": "x"}',
    '{"id": "x", "prompt": "a", "sampling": {"n": 0}}',
    '{"id": "x", "prompt": "a", "sampling": 3}',
    '{"id": "x", "prompt": ""}',
    '{"id": "x", "prompt": [%s]}' % ("9" * 5000),
    '{"id": "x", "prompt": "breaks off',
    '{"id": "x", "prompt": "a", "tools": 3}',
    ' { "id" : "x" , "prompt": "a",}',
    b'{"prompt": "\xff", "id": "x"}',
]
HAVE_NO_ID = [
    "nonsense",
    "[]",
    '{"prompt": ""}',
    '{"prompt": "a", "sampling": {"n": 0}}',
    '{"id": "x", "id": "y", "prompt": "a"}',
    b'{"id": "\xff", "prompt": "a"}',
    '{"id": true}',
]


@pytest.mark.parametrize("line", [*KEEP_THEIR_ID, *HAVE_NO_ID], ids=lambda value: str(value)[:40])
def test_a_line_that_is_wrong_keeps_its_own_id_and_takes_none_away(line):
    raw = line if isinstance(line, bytes) else line.encode()
    batch = read(raw + b'\n{"id": 0, "prompt": "a"}\n{"id": "stdin:1", "prompt": "b"}\n{"prompt": "c"}')
    assert [request.id for request in batch.requests] == ["0", "stdin:1", "3"], errors(batch)
    assert batch.order == ("x" if line in KEEP_THEIR_ID else "stdin:1'", "0", "stdin:1", "3")


class Counting:
    """A tokenizer's backend that notes how many characters it was given."""

    def __init__(self, backend: Backend):
        self.backend, self.given = backend, 0

    def encode_batch_fast(self, texts: list[str]):
        self.given += sum(map(len, texts))
        return self.backend.encode_batch_fast(texts)

    def __getattr__(self, name: str):
        return getattr(self.backend, name)


def test_a_text_that_is_far_too_long_is_not_tokenised():
    counting = Counting(tokenizer().backend)
    counted = Tokenizer(counting, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": CHAT})
    counting.given = 0
    most = 64 * MAX_TOKEN
    chat = [{"role": "user", "content": "a" * most}]
    lines = [{"prompt": "a" * (most + 1)}, {"prompt": "ab"}, {"messages": chat}, {"prompt": "a" * most}]
    batch = read(lines, tokenizer=counted)
    assert [request.id for request in batch.requests] == ["1"]
    says = f"characters, and no text of more than {most} is taken"
    assert f"{most + 1} {says}" in errors(batch)[0] and f"{most + 9} {says}" in errors(batch)[1]
    assert f"the prompt has {most} tokens" in errors(batch)[2]
    assert counting.given == 2 + most


def test_a_tokenizer_that_panics_costs_one_prompt():
    """A pattern that backtracks for ever ends in pyo3's PanicException, which is no Exception."""
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?:(a+)+)+b"), "isolated")
    batch = read([{"prompt": "ab"}, {"prompt": "a" * 32}, {"prompt": "ca"}], tokenizer=Tokenizer(backend, {}, {}))
    assert [request.prompt_token_ids for request in batch.requests] == [(0, 1), (2, 0)]
    assert "stdin:2: the tokenizer fails at this text: " in errors(batch)[0]


@pytest.mark.parametrize(
    ("given", "order", "failed"),
    [
        (["x", "x", "1", None], ("x", "stdin:2", "1", "3"), ["stdin:2: the id 'x' is used by stdin:1 already."]),
        (["1", None, None, 2], ("1", "stdin:2", "stdin:3", "2"), []),  # a place that is another's id is no id
        (
            ["stdin:2", "stdin:2", 1],
            ("stdin:2", "stdin:2'", "1"),
            ["stdin:2: the id 'stdin:2' is used by stdin:1 already."],
        ),
    ],
)
def test_every_id_occurs_once(given, order, failed):
    batch = read([{"prompt": "a", "id": name} for name in given])
    assert (batch.order, errors(batch)) == (order, failed)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
            st.builds(
                lambda value: json.dumps(value).encode(),
                st.fixed_dictionaries(
                    {},
                    optional={
                        "prompt": st.one_of(st.text(max_size=8), st.lists(st.integers(-1, 300), max_size=4)),
                        "id": st.one_of(st.none(), st.integers(0, 4), st.sampled_from(["a", "stdin:2", ""])),
                        "sampling": st.sampled_from([None, {}, {"n": 0}, {"n": 2}, {"x": 1}]),
                    },
                ),
            ),
        ),
        max_size=8,
    )
)
def test_every_line_is_one_request_or_one_failure(lines):
    raw = b"\n".join(lines)
    kept = [line for line in lines if line.strip()]
    if not kept:
        with pytest.raises(ConfigError, match="has no prompts"):
            read(raw)
        return
    batch = read(raw)
    names = [*(request.id for request in batch.requests), *(failure.request_id for failure in batch.failures)]
    assert sorted(names) == sorted(batch.order)
    assert len(set(names)) == len(names) == len(kept)
    for request in batch.requests:
        assert request.prompt_token_ids and len(request.prompt_token_ids) + request.max_tokens <= 64
    for failure in batch.failures:
        assert failure.error.startswith("stdin:")
        failure.to_line().encode()


# ---- the input as a whole


def test_what_is_wrong_shows_before_a_model_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a"}, {"promt": "a"}, {"prompt": [300]}, {"prompt": ""}, {"prompt": "a", "sampling": {"n": 0}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    says = ["2: unknown key", "3[0]: the model's token ids", "4: an empty prompt", "5: sampling.n: must be >= 1"]
    found = input_problems(InputSection(file=str(path)), DEFAULTS, limits())
    assert len(found) == 4
    assert all(one.startswith(f"prompts.jsonl:{start}") for one, start in zip(found, says, strict=True)), found
    assert len(input_problems(InputSection(file=str(path)), DEFAULTS, None)) == 3


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(ConfigError, match=r"input.file: No such file or directory, got .*nothing.jsonl"):
        read_inputs(InputSection(file=str(tmp_path / "nothing.jsonl")), DEFAULTS, limits())
    with pytest.raises(ConfigError, match="input.file: Is a directory"):
        read_inputs(InputSection(file=str(tmp_path)), DEFAULTS, limits())
    with pytest.raises(ConfigError, match="input.file: has no prompts"):
        read(b"\n\n")
    with pytest.raises(ConfigError, match="input.prompts: has no prompts"):
        read_inputs(InputSection(prompts=[]), DEFAULTS, limits())


def test_without_leaves_finished_ones_out():
    batch = read([{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}])
    rest = batch.without(["0", "1"])
    assert [request.id for request in rest.requests] == ["2"]
    assert rest.failures == () and rest.order == batch.order
    assert rest.requests[0] == batch.requests[1]  # the seed is of its place in the whole input


# ---- models without a tokenizer or a chat template


@pytest.mark.parametrize(
    ("line", "changes", "says"),
    [
        ({"prompt": "a"}, {"tokenizer": None}, "the model has no tokenizer.json. Give the prompt as token ids"),
        ({"messages": HI}, {"tokenizer": None}, "the model has no tokenizer.json"),
        ({"prompt": [1], "sampling": {"stop": "x"}}, {"tokenizer": None}, "stop strings need a tokenizer"),
        ({"prompt": [1], "sampling": {"bad_words": ["x"]}}, {"tokenizer": None}, "bad_words need a tokenizer"),
        ({"messages": HI}, {"tokenizer": tokenizer("")}, "the model has no chat template; give a prompt instead of"),
        ({"messages": HI}, {"tokenizer": tokenizer("{{ raise_exception('no') }}")}, "the chat template refuses: no."),
        ({"prompt": "a"}, {"vocab_size": 40}, "and the model's are 0 to 39. The tokenizer is not this model's"),
    ],
)
def test_what_the_model_can_not_take(line, changes, says):
    batch = read([line, {"prompt": [1, 2]}], **changes)
    assert errors(batch)[0].startswith("stdin:1: ") and says in errors(batch)[0]
    assert [request.prompt for request in batch.requests] == [None]


def test_no_process_is_left_after_reading():
    read([{"messages": HI}])
    assert all(template._child is None for template in tokenizer()._compiled.values())


# ---- one request


def test_lengths_resolve():
    def tokens(length: int, **params) -> int:
        return make_request([1] * length, SamplingParams(**params), limits()).max_tokens

    assert tokens(10, max_tokens=None) == 54
    assert tokens(10, max_tokens=5) == 5
    assert tokens(60, max_tokens=16) == 4
    assert tokens(63, max_tokens=16) == 1
    assert tokens(64, max_tokens=0) == tokens(65, max_tokens=0) == 0  # the last token is no input
    for length, wanted in ((64, 1), (66, 0), (64, None)):
        with pytest.raises(ConfigError, match="prompt: the prompt has"):
            tokens(length, max_tokens=wanted)


def test_what_ends_the_output():
    def stops(**params) -> set[int]:
        request = make_request([1], SamplingParams(**params), limits())
        return set(request.stop_token_ids)

    assert stops() == {7, 1}  # the model's configuration and the tokenizer
    assert stops(ignore_eos=True) == set()
    assert stops(stop_token_ids=[9], ignore_eos=True) == {9}
    assert stops(stop_token_ids=[9]) == {9, 7, 1}


def test_seeds():
    def seed(index: int, engine: int = 3, **params) -> int:
        return make_request([1], SamplingParams(**params), limits(seed=engine), index).seed

    assert seed(0, seed=11) == 11
    assert seed(0, seed=0) == 0
    assert seed(4) == derived_seed(3, 4)
    assert len({seed(index, engine) for index, engine in zip(range(100), [0, 1] * 50, strict=True)}) == 100
    assert 0 <= derived_seed(2**63 - 1, 10**9) < 2**63
    # Fixed for good: a change would change everybody's results.
    assert derived_seed(0, 0) == 6229992318841519305
    assert derived_seed(1, 23) == 3103269449248094179


def test_seed_is_of_the_place_in_the_input_not_among_the_valid():
    batch = read([{"prompt": ""}, {"prompt": "a"}])
    assert batch.requests[0].seed == derived_seed(3, 1)


def test_chat_variables_reach_the_template():
    request = make_request(
        [{"role": "user", "content": "a"}],
        SamplingParams(),
        limits(tokenizer=tokenizer("{{ mood }}{{ messages[0].content }}{{ tools | length }}")),
        chat_variables={"mood": "calm", "tools": [{}, {}]},
    )
    assert request.prompt == "calma2"
    assert tokenizer().decode(request.prompt_token_ids, skip_special_tokens=True) == "calma2"
