"""Results: stop strings, text and log-probabilities of running requests, the output file and the terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_family import panicking, token_a_byte

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.errors import ConfigError
from megalite.inference.choice import TokenLogprobs
from megalite.inference.io.output_file import OutputFile, fingerprint
from megalite.inference.io.packed_outputs import pack_outputs, unpack_outputs
from megalite.inference.io.printing import print_output
from megalite.inference.logprobs import Logprob
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.outputs import CompletionOutput, RequestMetrics, RequestOutput
from megalite.inference.request import Request, Sequence
from megalite.inference.stopping import StopChecker
from megalite.monitor.progress import ProgressBar
from megalite.text.tokenizer import Tokenizer

# ---- stop strings

letters = st.text("abcé", max_size=12)
stop_lists = st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, int] | None:
    """Slow reference: look at every end."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[start:end], start
    return None


@settings(max_examples=150, deadline=None)
@given(st.lists(letters, max_size=8), stop_lists)
def test_first_stop_whatever_the_pieces(pieces, stops):
    """And what is held back before it is what could become a stop."""
    checker, text, match = StopChecker(stops), "", None
    for piece in pieces:
        text += piece
        match = checker.feed(piece)
        if match:
            break
        longest = max((n for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) for s in stops)), default=0)
        assert checker.held_back == longest
    assert (match and (match.stop, match.start)) == first_stop(text, stops)


def test_skipped_text_counts_only_as_a_beginning():
    checker = StopChecker(["ab", "zz"])
    checker.skip("zz ab a")
    match = checker.feed("b")
    assert match is not None and (match.stop, match.start, match.end) == ("ab", 6, 8)
    checker = StopChecker(["abc", "x"])
    checker.skip("x")
    assert checker.feed("abx").start == 3


def test_stop_checker_work_does_not_grow():
    checker = StopChecker(["never", "ever again"])
    for _ in range(20_000):
        assert checker.feed("evev") is None
        assert len(checker._tail) <= 9


# ---- running requests


def scored(token_id: int, logprob: float, rank: int, top: list[tuple[int, float]]) -> TokenLogprobs:
    """As the sampler describes a token."""
    return TokenLogprobs(token_id, logprob, rank, [id for id, _ in top], [score for _, score in top])


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(token_a_byte(), {"bos_token": "<s>", "eos_token": "</s>"}, {})


EOS = 1


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def request(name: str = "r", stop_ids: tuple[int, ...] = (EOS,), **params) -> Request:
    return Request(
        id=name,
        prompt="in: ",
        prompt_token_ids=tuple(ids("in: ")),
        params=SamplingParams(**params),
        seed=0,
        max_tokens=100,
        stop_token_ids=frozenset({*stop_ids, *(params.get("stop_token_ids") or ())}),
    )


def sequences(of: Request) -> list[Sequence]:
    return [Sequence(of, index, list(of.prompt_token_ids)) for index in range(of.num_samples)]


def generate(tokens: list[int], of: Request, processor: OutputProcessor | None = None) -> CompletionOutput:
    """Feed tokens as the engine does, until one ends the output; max_tokens is reached at the end of `tokens`."""
    processor = processor or OutputProcessor(tokenizer())
    processor.add(of)
    (sequence,) = sequences(of)
    sequence.finish_reason = "length"
    for token_id in tokens:
        stopped = processor.append(sequence, token_id, -1.0)
        sequence.token_ids.append(token_id)
        if stopped or (token_id in of.stop_token_ids and sequence.num_output >= of.params.min_tokens):
            sequence.finish_reason = "stop"
            break
    output = processor.finish(sequence)
    assert output is not None and output.request_id == of.id and output.prompt == of.prompt
    return output.outputs[0]


S = ids("s")[0]
SHOWN = {"skip_special_tokens": False}
INCLUDED = {"include_stop_str_in_output": True}
ENDS: dict[str, tuple[str, dict, str, str, str, str | int | None]] = {
    "length": ("héllo 🙂", {}, "héllo 🙂", "", "length", None),
    "end of sequence": ("yes</s>never", {}, "yes", "never", "stop", None),
    "end of sequence, not skipped": ("a</s>", SHOWN, "a", "", "stop", None),
    "end of sequence, included": ("a</s>", SHOWN | INCLUDED, "a</s>", "", "stop", None),
    "end of sequence, ignored": ("a</s>b", SHOWN | {"stop_ids": ()}, "a</s>b", "", "length", None),
    "end of sequence, ignored and skipped": ("a</s>b", {"stop_ids": ()}, "ab", "", "length", None),
    "stop token": ("yes sir", {"stop_token_ids": [S]}, "ye", " sir", "stop", S),
    "stop token, included": ("yes sir", {"stop_token_ids": [S]} | INCLUDED, "yes", " sir", "stop", S),
    "stop token before min_tokens": ("sasb", {"stop_token_ids": [S], "min_tokens": 2}, "sa", "b", "stop", S),
    "stop string over tokens": ("one two three", {"stop": ["xyz", "two"]}, "one ", " three", "stop", "two"),
    "stop string, included": ("one two three", {"stop": "two"} | INCLUDED, "one two", " three", "stop", "two"),
    "stop string of one character": ("a🙂b", {"stop": "🙂"}, "a", "b", "stop", "🙂"),
    "stop string that begins in the prompt": ("x ab", {"stop": ": x"}, "x ab", "", "length", None),
    "stop string before min_tokens": ("ab ab ab", {"stop": "ab", "min_tokens": 3}, "ab ", " ab", "stop", "ab"),
}


@pytest.mark.parametrize("case", ENDS)
def test_how_an_output_ends(case):
    """The text that is written, parameters; text of the result, what is not sampled any more, and why."""
    written, params, text, left, reason, stop = ENDS[case]
    done = generate(ids(written), request(**params))
    assert (done.text, done.finish_reason, done.stop_reason) == (text, reason, stop)
    assert done.token_ids == ids(written.removesuffix(left))
    assert (done.index, done.cumulative_logprob, done.logprobs) == (0, -len(done.token_ids), None)


def test_stop_string_that_is_only_certain_at_the_end():
    """An unfinished character becomes U+FFFD when the output ends."""
    done = generate(ids("a🙂")[:-1], request(stop="\ufffd"))
    assert (done.text, done.finish_reason, done.stop_reason) == ("a", "stop", "\ufffd")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_text_never_holds_a_stop_string(data):
    tokens = data.draw(st.lists(st.integers(0, 258), max_size=30))
    stops = data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=3))
    of = request(stop=stops or None, ignore_eos=True, stop_ids=())
    done = generate(tokens, of)
    plain = tokenizer().decode([*of.prompt_token_ids, *tokens], skip_special_tokens=True)[len("in: ") :]
    expected = first_stop(plain, stops)
    assert done.text == (plain if expected is None else plain[: expected[1]])
    assert done.stop_reason == (expected and expected[0])
    assert done.finish_reason == ("stop" if expected else "length")


def test_without_tokenizer():
    done = generate([5, 6, EOS], request(), OutputProcessor(None))
    assert (done.text, done.token_ids, done.finish_reason) == ("", [5, 6, EOS], "stop")


def test_a_tokenizer_that_fails_at_an_output_costs_that_request_only():
    processor = OutputProcessor(Tokenizer(panicking(), {}, {}))
    tokens = {"whole": [2, 2], "late": [2, 1, 2], "first": [1, 2], "alone": [2]}
    results = {}
    for name in tokens:
        of = replace(request(name, stop_ids=(), logprobs=0), prompt_token_ids=(2,))
        processor.add(of)
        [sequence] = sequences(of)
        for token_id in tokens[name]:
            details = scored(1 if name == "alone" else 2, -1.0, 1, [])
            assert not processor.append(sequence, token_id, -1.0, details)
        sequence.finish_reason = "length"
        results[name] = processor.finish(sequence)
    assert [name for name, one in results.items() if one.error is None] == ["whole"]
    assert "the tokenizer fails at these tokens" in results["late"].error
    assert {name: one.outputs[0].token_ids for name, one in results.items()} == tokens, "what was sampled is kept"
    texts = [one.outputs[0].text for one in results.values()]
    assert texts == ["long tokenlong token", "long token", "", "long token"]
    assert results["alone"].outputs[0].logprobs[0][1].decoded_token is None
    assert unpack_outputs(pack_outputs([results["late"]])) == [results["late"]]


def test_nothing_is_generated_when_only_the_prompt_is_scored():
    processor = OutputProcessor(tokenizer())
    of = request(prompt_logprobs=0, max_tokens=0)
    processor.add(of)
    (sequence,) = sequences(of)
    processor.append_prompt(sequence, 0, [scored(t, -0.5, 1, [(t, -0.5)]) for t in of.prompt_token_ids[1:3]])
    processor.append_prompt(sequence, 2, [scored(t, -1.5, 2, [(9, -0.1)]) for t in of.prompt_token_ids[3:]])
    sequence.finish_reason = "length"
    output = processor.finish(sequence)
    assert [done.token_ids for done in output.outputs] == [[]]
    nothing, n, _, last = output.prompt_logprobs
    assert nothing is None and n == {of.prompt_token_ids[1]: Logprob(-0.5, 1, "n")}
    assert [(token, entry.rank) for token, entry in last.items()] == [(of.prompt_token_ids[3], 2), (9, 1)]


def test_logprobs():
    processor = OutputProcessor(tokenizer())
    of = request(logprobs=2)
    processor.add(of)
    (sequence,) = sequences(of)
    a, b, c = ids("abc")
    processor.append(sequence, a, -2.0, scored(a, -2.0, 7, [(b, -0.1), (c, -0.5)]))
    processor.append(sequence, b, -0.3, scored(b, -0.3, 1, [(b, -0.3), (c, -math.inf)]))
    sequence.finish_reason = "length"
    done = processor.finish(sequence).outputs[0]
    assert list(done.logprobs[0]) == [a, b, c]  # the token itself, then by rank
    assert done.logprobs[0][a] == Logprob(-2.0, 7, "a")
    assert done.logprobs[0][b] == Logprob(-0.1, 1, "b")
    assert done.logprobs[1] == {b: Logprob(-0.3, 1, "b"), c: Logprob(-math.inf, 2, "c")}
    assert done.cumulative_logprob == pytest.approx(-2.3)


@pytest.mark.parametrize(
    ("params", "logprobs", "order", "texts"),
    [
        ({"n": 3}, [-3.0, -1.0, -2.0], [2, 0, 1], "abc"),
        ({"n": 2, "best_of": 4}, [-3.0, -1.0, -1.0, -2.0], [3, 1, 0, 2], "bc"),  # of equals the first
        ({"n": 2, "best_of": 4}, [-3.0, -2.5, -1.0, -0.5], [0, 1, 2, 3], "dc"),
    ],
)
def test_several_samples(params, logprobs, order, texts):
    processor, of = OutputProcessor(tokenizer()), request(**params)
    samples = sequences(of)
    processor.add(of)
    for sequence, logprob in zip(samples, logprobs, strict=True):
        processor.append(sequence, ids("a")[0] + sequence.index, logprob)
        sequence.finish_reason = "length"
    *earlier, last = [processor.finish(samples[place]) for place in order]
    assert earlier == [None] * (len(order) - 1)
    assert [(done.index, done.text) for done in last.outputs] == list(enumerate(texts))


def test_requests_side_by_side_and_nothing_kept():
    processor = OutputProcessor(tokenizer(), replica=2)
    one, two = sequences(request("x"))[0], sequences(request("y"))[0]
    processor.add(one.request)
    processor.add(two.request)
    for left, right in zip(ids("left"), ids("rite"), strict=True):
        processor.append(one, left, -1.0)
        processor.append(two, right, -2.0)
    one.finish_reason, two.finish_reason = "length", "abort"
    second, first = processor.finish(two), processor.finish(one)
    assert (first.outputs[0].text, first.replica) == ("left", 2)
    assert (second.outputs[0].text, second.outputs[0].finish_reason) == ("rite", "abort")
    assert processor._running == {}
    processor.add(request("z"))
    processor.clear()
    assert processor._running == {}


# ---- lines


def output(name: str = "a", text: str = "out", **changes) -> RequestOutput:
    completion = CompletionOutput(index=0, text=text, token_ids=[1, 2], cumulative_logprob=-1.5, finish_reason="length")
    return RequestOutput(
        request_id=name, prompt="in", prompt_token_ids=[3], **{"outputs": [completion], "replica": 0, **changes}
    )


def failure(name: str, why: str, prompt: str | None = None) -> RequestOutput:
    return RequestOutput(request_id=name, prompt=prompt, prompt_token_ids=[], error=why)


def test_a_line_has_exactly_the_promised_keys():
    value = json.loads(output().to_line())
    assert list(value) == ["id", "prompt", "prompt_token_ids", "outputs", "replica"]
    keys = ["index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"]
    assert list(value["outputs"][0]) == keys
    failed = json.loads(failure("a", "too long").to_line())
    assert (failed["error"], failed["outputs"]) == ("too long", [])


ENDED = CompletionOutput(
    index=1,
    text="",
    token_ids=[2**31 - 1],
    cumulative_logprob=0.0,
    logprobs=[{7: Logprob(-1e-9, 1, "\ufffd")}],
    finish_reason="stop",
    stop_reason=7,
)


@pytest.mark.parametrize(
    "made",
    [
        output(),
        output(text='\n\u2028\x00é🙂\ufffd"\\'),
        output(outputs=[], error="no", replica=None),
        output(prompt_logprobs=[None, {5: Logprob(-math.inf, 3, "x"), 6: Logprob(-0.5, 1, None)}]),
        output(outputs=[*output().outputs, ENDED]),
        output(prompt_logprobs=[None]),
        failure("a", "why", prompt="\ud800é"),  # half a surrogate pair
    ],
    ids=range(7),
)
def test_lines_read_back(made):
    assert "\n" not in made.to_line()
    assert RequestOutput.from_line(made.to_line().encode()) == made
    assert unpack_outputs(pack_outputs([made, output(), made])) == [made, output(), made]


def test_outputs_travel_whole():
    """From rank to rank to the last bit, with what lines leave out."""
    made = output()
    made.outputs[0].token_logprobs = [-0.1, -math.inf]
    made.num_cached_tokens, made.metrics = 32, RequestMetrics(1.7e9 + 0.123456, 5.5, 6.5, 7.5, 8.5, 2.0, 9)
    [same] = unpack_outputs(pack_outputs([made]))
    assert (same, same.num_cached_tokens, same.metrics) == (made, made.num_cached_tokens, made.metrics)
    assert RequestOutput.from_line(made.to_line()).outputs[0].token_logprobs == []
    assert unpack_outputs(pack_outputs([])) == []


# ---- the output file

IDS = ("a", "b", "c", "d")
RUN = {"sampling.temperature": 0.7, "the input": "abc"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "out.jsonl"


def opened(path: Path, run: dict = RUN, **options) -> OutputFile:
    return OutputFile.open(path, run, IDS, **options)


def lines_of(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def write_rest(file: OutputFile, names: str) -> None:
    for name in names:
        if name not in file.finished:
            file.write(output(name))


def cut_short(file: OutputFile) -> None:
    """As a process that is killed leaves it."""
    file._lines.close()
    file._lock.close()


def test_lines_are_there_at_once_and_in_order_at_the_end(path):
    file = opened(path)
    for done, name in enumerate("cadb", 1):
        file.write(output(name))
        assert lines_of(path) == list("cadb"[:done])
        assert file.finished == set("cadb"[:done])
    assert file.close() is True
    assert lines_of(path) == list("abcd")
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    again = opened(path)
    assert again.finished == set(IDS)
    assert again.close() is True


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.permutations(IDS), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 700)), max_size=4))
def test_runs_that_end_anywhere_go_on(path, order, cuts):
    """Each run writes some lines and loses the end of the file, until one comes through."""
    opened(path, overwrite=True).close()
    for count, cut in cuts:
        file = opened(path)
        write_rest(file, "".join(order[:count]))
        cut_short(file)
        with path.open("rb+") as raw:
            raw.truncate(min(cut, path.stat().st_size))
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
        file = opened(path)
        assert file.finished == {json.loads(line)["id"] for line in whole}
        assert path.read_bytes() == b"".join(line + b"\n" for line in whole)
        assert file.close() is (len(whole) == len(IDS))
    file = opened(path)
    write_rest(file, "".join(order))
    assert file.close() is True
    assert [RequestOutput.from_line(line) for line in path.read_text().splitlines()] == [output(name) for name in IDS]


@pytest.mark.parametrize("fault", ["output.write#3", "output.order", "output.ordered"])
def test_killed_at_any_moment_it_goes_on(path, fault):
    if (pid := os.fork()) == 0:
        os.environ["MEGALITE_FAULT"] = f"{fault}=kill"
        file = opened(path)
        write_rest(file, "dbca")
        file.close()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert lines_of(path) == list("dbca"[:2] if fault.startswith("output.write") else "dbca")
    file = opened(path)
    write_rest(file, "abcd")
    assert file.close() is True
    assert lines_of(path) == list("abcd") and not list(path.parent.glob(".*"))


def test_resume_with_another_config_says_what_changed(path):
    file = opened(path)
    write_rest(file, "a")
    file.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        opened(path, {**RUN, "sampling.temperature": 1.0, "engine.seed": 4})
    message = str(caught.value)
    assert message.startswith("output.file: holds results of another run")
    assert "sampling.temperature was 0.7, is 1.0" in message
    assert "engine.seed was null, is 4" in message
    assert "output.overwrite=true" in message and "another file" in message
    assert len(message.splitlines()) == 1
    with pytest.raises(ConfigError, match="; 13 more"):
        opened(path, {f"sampling.x{i}": i for i in range(19)})
    assert path.read_bytes() == before
    anew = opened(path, {**RUN, "sampling.temperature": 1.0}, overwrite=True)
    assert anew.finished == frozenset() and path.read_bytes() == b""
    anew.close()
    opened(path, {**RUN, "sampling.temperature": 1.0}).close()


def line(name: object) -> bytes:
    return output(name).to_line().encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "record", "message"),
    [
        (b"notes\n", None, "out.jsonl.run.json is missing"),
        (b"notes", None, "out.jsonl.run.json is missing"),
        (b"{}\n", "{", "out.jsonl.run.json can't be read"),
        (b"{}\n", "[]", "can't be read"),
        (b"{}\n", '{"decided_by": 3}', "can't be read"),
        (b"what\n", "good", "line 1 is damaged"),
        (b"[]\n", "good", "line 1 is damaged"),
        (b'{"id": "a"}\n', "good", "line 1 is damaged"),
        (line("a") + b"\n", "good", "line 2 is damaged"),
        (line(["a"]), "good", "line 1 is damaged"),
        (line("a") + line("z"), "good", "line 2: id 'z' is of no prompt of this run"),
        (line("a") + line("a"), "good", "line 2: id 'a' is there twice"),
    ],
)
def test_files_that_are_not_ours_are_left_alone(path, content, record, message):
    path.parent.mkdir()
    path.write_bytes(content)
    if record is not None:
        good = json.dumps({"decided_by": RUN})
        path.with_name("out.jsonl.run.json").write_text(good if record == "good" else record)
    with pytest.raises(ConfigError, match="output.file") as caught:
        opened(path)
    assert message in str(caught.value)
    assert path.read_bytes() == content
    opened(path, overwrite=True).close()
    assert path.read_bytes() == b""


def test_places_that_hold_results(tmp_path):
    """A regular file, an empty one or a link to one; nothing else."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="must be a regular file"):
            opened(place)
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.touch()
    link.symlink_to(real)
    file = opened(link)
    write_rest(file, "dcba")
    file.close()
    assert link.is_symlink() and lines_of(real) == list("abcd")


@pytest.mark.parametrize("nfs", [False, True])
def test_two_runs_do_not_share_a_file(path, monkeypatch, nfs):
    """On NFS an exclusive lock needs a descriptor that is open for writing, flock(2)."""

    def flock(file, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY and operation & fcntl.LOCK_EX:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, operation)

    real = fcntl.flock
    if nfs:
        monkeypatch.setattr(fcntl, "flock", flock)
    first = opened(path)
    write_rest(first, "a")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="another run is writing it"):
            opened(path, overwrite=overwrite)
    write_rest(first, "dcb")
    assert first.close() and lines_of(path) == list(IDS)
    assert opened(path).finished == set(IDS)


@pytest.mark.parametrize("again", [output("c"), failure("c", "why"), failure("c", "another reason")])
def test_what_failed_is_tried_again_and_is_there_once(path, again):
    file = opened(path)
    file.write(failure("c", "why"))
    write_rest(file, "abd")
    assert file.close() is True
    whole = path.read_bytes()
    file = opened(path)  # the second attempt may be cut short too
    assert file.finished == set("abd")
    file.write(again)
    cut_short(file)
    file = opened(path)
    assert ("c" in file.finished) == (again.error is None)
    if again.error is not None:
        file.write(again)
    assert file.finished == set(IDS) and file.close() is True
    lines = [RequestOutput.from_line(line) for line in path.read_text().splitlines()]
    assert lines == [output("a"), output("b"), again, output("d")]
    assert (path.read_bytes() == whole) == (again.error == "why")


def test_fingerprint_is_what_decides_the_results():
    base = InferConfig(model=ModelSection(path="m"), sampling=SamplingParams(logit_bias={5: 1.0}))
    made = fingerprint(base, weights="w", inputs="i" * 64)
    assert made == json.loads(json.dumps(made))
    assert made["model.path"] == "m" and made["sampling.logit_bias"] == {"5": 1.0}

    def changed(**sections) -> list[str]:
        config = InferConfig(**{"model": base.model, "sampling": base.sampling, **sections})
        other = fingerprint(config, weights="w", inputs="i" * 64)
        return [key for key in other if made.get(key) != other[key]]

    assert changed(parallel=ParallelSection(tp=2), engine=EngineSection(max_num_seqs=3, block_size=32)) == []
    assert changed(engine=EngineSection(seed=1)) == ["engine.seed"]
    assert changed(engine=EngineSection(kv_cache_dtype="fp8")) == ["engine.kv_cache_dtype"]
    assert changed(model=ModelSection(path="m", quantization="fp8")) == ["model.quantization"]
    assert changed(lora={"a": "folder"}) == ["lora.a"]
    assert changed(sampling=SamplingParams(logit_bias={5: 1.0}, n=2)) == ["sampling.n"]
    assert fingerprint(base, weights="v", inputs="i" * 64) != made != fingerprint(base, weights="w", inputs="j" * 64)


# ---- the terminal


def test_printing():
    stream = io.StringIO()
    two = [
        CompletionOutput(index=i, text=text, token_ids=[4], cumulative_logprob=0.0, finish_reason="stop")
        for i, text in enumerate(["first\n\tline \x1b[2J", ""])
    ]
    print_output(output("q", outputs=two), stream)
    print_output(output("r", outputs=[], error="too long"), stream)
    print_output(RequestOutput(request_id="0", prompt=None, prompt_token_ids=[5, 6]), stream)
    assert stream.getvalue() == (
        "=== q ===\nin\n--- completion 1 of 2 (1 token, stop)\nfirst\n\tline \\x1b[2J\n"
        "--- completion 2 of 2 (1 token, stop)\ntoken ids [4]\n\n"
        "=== r ===\nin\n--- error: too long\n\n"
        "=== 0 ===\ntoken ids [5, 6]\n\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal():
    now = [100.0]
    stream = Terminal()
    with ProgressBar(10, done=2, stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 0.1
            progress.advance(tokens=5)
        assert progress.tokens_per_second == pytest.approx(50, rel=0.1)
        progress.advance(prompts=3)
        with progress.aside():
            stream.write("text between\n")
        now[0] += 60
        assert progress.tokens_per_second < 1
    shown = stream.getvalue()
    assert "2/10 prompts" in shown and "5/10 prompts" in shown and "50 tokens/s" in shown
    assert "\rtext between" in shown


@pytest.mark.parametrize(("stream", "enabled"), [(io.StringIO(), True), (Terminal(), False)])
def test_progress_is_silent_elsewhere(stream, enabled):
    with ProgressBar(3, enabled=enabled, stream=stream) as progress:
        progress.advance(prompts=1, tokens=10)
        with progress.aside():
            pass
        assert progress.tokens_per_second == 0
    assert stream.getvalue() == ""
