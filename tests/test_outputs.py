"""Results: stop strings, text and log-probabilities of running requests, the output file and the terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_family import panicking
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from waiting import PATIENCE

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.errors import ConfigError
from megalite.inference.io.output_file import OutputFile, fingerprint, print_output
from megalite.inference.logprobs import Logprob
from megalite.inference.outputs import (
    CompletionOutput,
    OutputProcessor,
    RequestMetrics,
    RequestOutput,
    pack_outputs,
    unpack_outputs,
)
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


@settings(max_examples=400)
@given(st.lists(letters, max_size=8), stop_lists)
def test_first_stop_whatever_the_pieces(pieces, stops):
    checker, match = StopChecker(stops), None
    for piece in pieces:
        match = checker.feed(piece)
        if match:
            break
    expected = first_stop("".join(pieces), stops)
    assert (match and (match.stop, match.start)) == expected


@settings(max_examples=300)
@given(st.lists(letters, max_size=6), stop_lists)
def test_what_is_held_back_could_become_a_stop(pieces, stops):
    checker, text = StopChecker(stops), ""
    for piece in pieces:
        text += piece
        if checker.feed(piece):
            return
        longest = max((n for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) for s in stops)), default=0)
        assert checker.held_back == longest


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


@dataclass
class Scored:
    """As the sampler describes a token."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@cache
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, {})


EOS = 1


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def request(name: str = "r", stop_ids: tuple[int, ...] = (EOS,), **params) -> Request:
    return Request(
        id=name,
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
    assert output is not None and output.request_id == of.id
    return output.outputs[0]


def test_a_plain_completion():
    done = generate(ids("héllo 🙂"), request())
    assert (done.text, done.token_ids) == ("héllo 🙂", ids("héllo 🙂"))
    assert (done.finish_reason, done.stop_reason, done.index) == ("length", None, 0)
    assert done.cumulative_logprob == -len(done.token_ids)
    assert done.logprobs is None


def test_a_tokenizer_that_fails_at_an_output_costs_that_request_only():
    processor = OutputProcessor(Tokenizer(panicking(), {}, {}))
    requests = {name: request(name, stop_ids=(), logprobs=0) for name in ("whole", "late", "first", "alone")}
    tokens = {"whole": [2, 2], "late": [2, 1, 2], "first": [1, 2], "alone": [2]}
    results = {}
    for name, of in requests.items():
        of = replace(of, prompt_token_ids=(2,))
        processor.add(of)
        [sequence] = sequences(of)
        for token_id in tokens[name]:
            details = Scored(1 if name == "alone" else 2, -1.0, 1, [])
            assert not processor.append(sequence, token_id, -1.0, details)
        sequence.finish_reason = "length"
        results[name] = processor.finish(sequence)
    assert {name: one.error is None for name, one in results.items()} == {
        "whole": True,
        "late": False,
        "first": False,
        "alone": False,
    }
    assert "the tokenizer fails at these tokens" in results["late"].error
    assert {name: one.outputs[0].token_ids for name, one in results.items()} == tokens, "what was sampled is kept"
    assert {name: one.outputs[0].text for name, one in results.items()} == {
        "whole": "long tokenlong token",
        "late": "long token",
        "first": "",
        "alone": "long token",
    }
    assert results["alone"].outputs[0].logprobs[0][1].decoded_token is None
    [back] = unpack_outputs(pack_outputs([results["late"]]))
    assert back == results["late"]


def test_end_of_sequence():
    done = generate([*ids("yes"), EOS, *ids("never")], request())
    assert (done.text, done.token_ids) == ("yes", [*ids("yes"), EOS])
    assert (done.finish_reason, done.stop_reason) == ("stop", None)


@pytest.mark.parametrize(("include", "text"), [(False, "ye"), (True, "yes")])
def test_stop_token(include, text):
    stop = ids("s")[0]
    done = generate(ids("yes sir"), request(stop_token_ids=[stop], include_stop_str_in_output=include))
    assert (done.text, done.finish_reason, done.stop_reason) == (text, "stop", stop)
    assert done.token_ids == ids("yes")


def test_a_stop_token_that_ended_nothing_is_part_of_the_text():
    done = generate(ids("sasb"), request(stop_token_ids=ids("s"), min_tokens=2))
    assert (done.text, done.token_ids) == ("sa", ids("sas"))


def test_end_of_sequence_that_is_not_skipped():
    assert generate([*ids("a"), EOS], request(skip_special_tokens=False)).text == "a"
    shown = request(skip_special_tokens=False, include_stop_str_in_output=True)
    assert generate([*ids("a"), EOS], shown).text == "a</s>"
    ignored = request(stop_ids=(), skip_special_tokens=False)
    assert generate([*ids("a"), EOS, *ids("b")], ignored).text == "a</s>b"
    assert generate([*ids("a"), EOS, *ids("b")], request(stop_ids=())).text == "ab"


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_stop_string_over_tokens(include, text):
    done = generate(ids("one two three"), request(stop=["xyz", "two"], include_stop_str_in_output=include))
    assert (done.text, done.finish_reason, done.stop_reason) == (text, "stop", "two")
    assert done.token_ids == ids("one two")


def test_stop_string_inside_a_character_boundary():
    done = generate(ids("a🙂b"), request(stop="🙂"))
    assert (done.text, done.token_ids) == ("a", ids("a🙂"))


def test_stop_string_does_not_begin_in_the_prompt():
    assert generate(ids("x ab"), request(stop=": x")).text == "x ab"


def test_stop_strings_wait_for_min_tokens():
    done = generate(ids("ab ab ab"), request(stop="ab", min_tokens=3))
    assert done.text == "ab "
    assert done.token_ids == ids("ab ab")


def test_stop_string_that_is_only_certain_at_the_end():
    """An unfinished character becomes U+FFFD when the output ends."""
    done = generate(ids("a🙂")[:-1], request(stop="\ufffd"))
    assert (done.text, done.finish_reason, done.stop_reason) == ("a", "stop", "\ufffd")


def test_without_tokenizer():
    done = generate([5, 6, EOS], request(), OutputProcessor(None))
    assert (done.text, done.token_ids, done.finish_reason) == ("", [5, 6, EOS], "stop")


def test_nothing_is_generated_when_only_the_prompt_is_scored():
    processor = OutputProcessor(tokenizer())
    of = request(prompt_logprobs=0, max_tokens=0)
    processor.add(of)
    (sequence,) = sequences(of)
    processor.append_prompt(sequence, 0, [Scored(t, -0.5, 1, [(t, -0.5)]) for t in of.prompt_token_ids[1:3]])
    processor.append_prompt(sequence, 2, [Scored(t, -1.5, 2, [(9, -0.1), (t, -1.5)]) for t in of.prompt_token_ids[3:]])
    sequence.finish_reason = "length"
    output = processor.finish(sequence)
    assert [done.token_ids for done in output.outputs] == [[]]
    nothing, colon, space, last = output.prompt_logprobs[0], *output.prompt_logprobs[1:4]
    assert nothing is None and len(output.prompt_logprobs) == len(of.prompt_token_ids)
    assert colon == {of.prompt_token_ids[1]: Logprob(-0.5, 1, "n")}
    assert list(last) == [of.prompt_token_ids[3], 9]
    assert last[9].rank == 1 and last[of.prompt_token_ids[3]].rank == 2 and space != last


def test_logprobs():
    processor = OutputProcessor(tokenizer())
    of = request(logprobs=2)
    processor.add(of)
    (sequence,) = sequences(of)
    a, b, c = ids("abc")
    processor.append(sequence, a, -2.0, Scored(a, -2.0, 7, [(b, -0.1), (c, -0.5), (a, -2.0)]))
    processor.append(sequence, b, -0.3, Scored(b, -0.3, 1, [(b, -0.3), (c, -math.inf)]))
    sequence.finish_reason = "length"
    done = processor.finish(sequence).outputs[0]
    assert list(done.logprobs[0]) == [a, b, c]  # the token itself, then by rank
    assert done.logprobs[0][a] == Logprob(-2.0, 7, "a")
    assert done.logprobs[0][b] == Logprob(-0.1, 1, "b")
    assert done.logprobs[1] == {b: Logprob(-0.3, 1, "b"), c: Logprob(-math.inf, 2, "c")}
    assert done.cumulative_logprob == pytest.approx(-2.3)


def finish_all(processor: OutputProcessor, of: Request, logprobs: list[float], order: list[int]) -> RequestOutput:
    samples = sequences(of)
    processor.add(of)
    for sequence, logprob in zip(samples, logprobs, strict=True):
        processor.append(sequence, ids("a")[0] + sequence.index, logprob)
    results = []
    for place in order:
        samples[place].finish_reason = "length"
        results.append(processor.finish(samples[place]))
    assert results[:-1] == [None] * (len(order) - 1)
    return results[-1]


def test_all_samples_in_order():
    output = finish_all(OutputProcessor(tokenizer()), request(n=3), [-3.0, -1.0, -2.0], [2, 0, 1])
    assert [(done.index, done.text) for done in output.outputs] == [(0, "a"), (1, "b"), (2, "c")]


def test_best_of():
    of = request(n=2, best_of=4, temperature=1.0)
    output = finish_all(OutputProcessor(tokenizer()), of, [-3.0, -1.0, -1.0, -2.0], [3, 1, 0, 2])
    assert [(done.index, done.text) for done in output.outputs] == [(0, "b"), (1, "c")]  # of equals the first
    output = finish_all(OutputProcessor(tokenizer()), of, [-3.0, -2.5, -1.0, -0.5], [0, 1, 2, 3])
    assert [done.text for done in output.outputs] == ["d", "c"]


def test_requests_side_by_side_and_nothing_kept():
    processor = OutputProcessor(tokenizer(), replica=2)
    processor.texts = {"x": "in: ", "y": "other"}
    one, two = sequences(request("x"))[0], sequences(request("y"))[0]
    processor.add(one.request)
    processor.add(two.request)
    for left, right in zip(ids("left"), ids("rite"), strict=True):
        processor.append(one, left, -1.0)
        processor.append(two, right, -2.0)
    one.finish_reason, two.finish_reason = "length", "abort"
    second, first = processor.finish(two), processor.finish(one)
    assert (first.outputs[0].text, first.prompt, first.replica) == ("left", "in: ", 2)
    assert (second.outputs[0].text, second.outputs[0].finish_reason) == ("rite", "abort")
    assert processor._running == {} and processor.texts == {}
    processor.add(request("z"))
    processor.clear()
    assert processor._running == {}


@settings(max_examples=200, deadline=None)
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


# ---- lines


def output(name: str = "a", text: str = "out", **changes) -> RequestOutput:
    completion = CompletionOutput(index=0, text=text, token_ids=[1, 2], cumulative_logprob=-1.5, finish_reason="length")
    return RequestOutput(
        request_id=name, prompt="in", prompt_token_ids=[3], **{"outputs": [completion], "replica": 0, **changes}
    )


def test_a_line_has_exactly_the_promised_keys():
    value = json.loads(output().to_line())
    assert list(value) == ["id", "prompt", "prompt_token_ids", "outputs", "replica"]
    keys = ["index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"]
    assert list(value["outputs"][0]) == keys
    failed = json.loads(output(outputs=[], replica=None, error="too long").to_line())
    assert (failed["error"], failed["outputs"]) == ("too long", [])


@pytest.mark.parametrize(
    "made",
    [
        output(),
        output(text='\n\u2028\x00é🙂\ufffd"\\'),
        output(outputs=[], error="no", replica=None),
        output(prompt_logprobs=[None, {5: Logprob(-math.inf, 3, "x"), 6: Logprob(-0.5, 1, None)}]),
        output(
            outputs=[
                CompletionOutput(
                    index=0,
                    text="",
                    token_ids=[],
                    cumulative_logprob=0.0,
                    logprobs=[{7: Logprob(-1e-9, 1, "\ufffd")}],
                    finish_reason="stop",
                    stop_reason=7,
                )
            ]
        ),
        output(prompt_logprobs=[None]),
    ],
    ids=range(6),
)
def test_lines_read_back(made):
    line = made.to_line()
    assert "\n" not in line
    assert RequestOutput.from_line(line.encode()) == made


def test_outputs_travel_whole():
    """Ids and log-probabilities to the last bit, of one output or of none."""
    made, failed = output(), RequestOutput(request_id="b", prompt="\u2028", prompt_token_ids=[], error="why")
    made.outputs[0].token_logprobs = [-0.1, -math.inf]
    made.outputs.append(CompletionOutput(index=1, text="", token_ids=[2**31 - 1], cumulative_logprob=0.0))
    assert unpack_outputs(pack_outputs([made, failed, made])) == [made, failed, made]
    assert unpack_outputs(pack_outputs([])) == []
    made.num_cached_tokens, made.metrics = 32, RequestMetrics(1.7e9 + 0.123456, 5.5, 6.5, 7.5, 8.5, 2.0, 9)
    [same] = unpack_outputs(pack_outputs([made]))
    assert (same.num_cached_tokens, same.metrics) == (made.num_cached_tokens, made.metrics)
    assert RequestOutput.from_line(made.to_line()).outputs[0].token_logprobs == []


def test_half_a_surrogate_pair_can_be_written():
    made = RequestOutput(request_id="a", prompt="\ud800é", prompt_token_ids=[])
    assert RequestOutput.from_line(made.to_line().encode()) == made


# ---- the output file

IDS = ("a", "b", "c", "d")
RUN = {"sampling.temperature": 0.7, "the input": "abc"}


def opened(path: Path, run: dict = RUN, **options) -> OutputFile:
    return OutputFile.open(path, run, IDS, **options)


def lines_of(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def write_all(file: OutputFile, names: str) -> None:
    for name in names:
        file.write(output(name))


def test_lines_are_there_at_once_and_in_order_at_the_end(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
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


def test_an_incomplete_run_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    file = opened(path)
    write_all(file, "cb")
    assert file.close() is False
    assert lines_of(path) == ["c", "b"]
    again = opened(path)
    assert again.finished == {"c", "b"}
    write_all(again, "da")
    assert again.close() is True
    assert lines_of(path) == list("abcd")
    assert [RequestOutput.from_line(line) for line in path.read_text().splitlines()] == [output(name) for name in IDS]


def test_a_torn_line_is_dropped_wherever_it_was_torn(tmp_path):
    path = tmp_path / "out.jsonl"
    file = opened(path)
    write_all(file, "cb")
    file.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in sorted({0, 1, first - 2, first - 1, first, first + 1, *range(20, len(whole), 29), len(whole) - 1}):
        path.write_bytes(whole[:length])
        again = opened(path)
        assert again.finished == (set() if length < first else {"c"})
        assert path.read_bytes() == (b"" if length < first else whole[:first])
        write_all(again, "b" if length >= first else "cb")
        again.close()
        assert path.read_bytes() == whole


def test_resume_with_another_config_says_what_changed(tmp_path):
    path = tmp_path / "out.jsonl"
    file = opened(path)
    file.write(output("a"))
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
    assert path.read_bytes() == before
    anew = opened(path, {**RUN, "sampling.temperature": 1.0}, overwrite=True)
    assert anew.finished == frozenset() and path.read_bytes() == b""
    anew.close()
    opened(path, {**RUN, "sampling.temperature": 1.0}).close()


def test_many_changes_are_counted(tmp_path):
    path = tmp_path / "out.jsonl"
    file = opened(path)
    file.write(output("a"))
    file.close()
    with pytest.raises(ConfigError, match="; 13 more"):
        opened(path, {f"sampling.x{i}": i for i in range(19)})


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
def test_files_that_are_not_ours_are_left_alone(tmp_path, content, record, message):
    path = tmp_path / "out.jsonl"
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


def test_places_that_can_not_hold_results(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="must be a regular file"):
            opened(path)


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "out.jsonl"
    path.touch()
    opened(path).close()
    assert path.with_name("out.jsonl.run.json").exists()


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "out.jsonl"
    first = opened(path)
    write_all(first, "a")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="another run is writing it"):
            opened(path, overwrite=overwrite)
    first.close()
    assert opened(path).finished == {"a"}


def test_a_lock_as_nfs_gives_it(tmp_path, monkeypatch):
    """There an exclusive lock needs a descriptor that is open for writing, flock(2)."""

    def flock(file, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY and operation & fcntl.LOCK_EX:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    file = opened(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another run is writing it"):
        opened(tmp_path / "out.jsonl")
    write_all(file, "dcba")
    assert file.close() and lines_of(tmp_path / "out.jsonl") == list(IDS)


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    file = opened(link)
    write_all(file, "dcba")
    file.close()
    assert link.is_symlink() and lines_of(real) == list("abcd")


def failure(name: str, why: str) -> RequestOutput:
    return RequestOutput(request_id=name, prompt=None, prompt_token_ids=[], error=why)


@pytest.mark.parametrize("again", [output("c"), failure("c", "why"), failure("c", "another reason")])
def test_what_failed_is_tried_again_and_is_there_once(tmp_path, again):
    path = tmp_path / "out.jsonl"
    file = opened(path)
    file.write(failure("c", "why"))
    write_all(file, "abd")
    assert file.close() is True
    whole = path.read_bytes()
    for ended in (False, True):  # the second attempt may be cut short too
        file = opened(path)
        assert file.finished == set("abd")
        file.write(again)
        assert file.finished == set(IDS)
        if ended:
            assert file.close() is True
        else:
            file._lines.close()
            file._lock.close()
            file = opened(path)
            assert ("c" in file.finished) == (again.error is None)
            file._lines.close()
            file._lock.close()
        if again.error is None:
            break
    opened(path).close()
    lines = [RequestOutput.from_line(line) for line in path.read_text().splitlines()]
    assert lines == [output("a"), output("b"), again, output("d")]
    assert (path.read_bytes() == whole) == (again.error == "why")


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_outputs import *
file = opened(Path({path!r}))
for name in {names!r}:
    if name not in file.finished:
        file.write(output(name))
file.close()
"""


@pytest.mark.parametrize("fault", ["output.write#3", "output.order", "output.ordered"])
def test_killed_at_any_moment_it_goes_on(tmp_path, fault):
    path = tmp_path / "out.jsonl"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path), names="dbca")
    environment = {**os.environ, "MEGALITE_FAULT": f"{fault}=kill"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    assert lines_of(path) == list("dbca"[:2] if fault.startswith("output.write") else "dbca")
    file = opened(path)
    write_all(file, "".join(name for name in IDS if name not in file.finished))
    assert file.close() is True
    assert lines_of(path) == list("abcd")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.permutations(IDS), st.lists(st.integers(0, 400), max_size=4))
def test_any_cuts_and_any_order(tmp_path, order, cuts):
    """Runs that end anywhere, each losing the end of the file, until one comes through."""
    path = tmp_path / "out.jsonl"
    for run, cut in enumerate([*cuts, None]):
        file = opened(path, overwrite=run == 0)
        for name in order:
            if name not in file.finished:
                file.write(output(name))
        if cut is None:
            assert file.close() is True
        else:
            file._lines.close()
            file._lock.close()
            with path.open("rb+") as raw:
                raw.truncate(min(cut, path.stat().st_size))
    assert lines_of(path) == list(IDS)


def test_fingerprint_is_what_decides_the_results():
    base = InferConfig(model=ModelSection(path="m"), sampling=SamplingParams(logit_bias={5: 1.0}))
    made = fingerprint(base, weights="w", inputs="i" * 64)
    assert made == json.loads(json.dumps(made))
    assert made["model.path"] == "m" and made["sampling.logit_bias"] == {"5": 1.0}

    def changed(**sections) -> list[str]:
        config = InferConfig(**{"model": base.model, "sampling": base.sampling, **sections})
        other = fingerprint(config, weights="w", inputs="i" * 64)
        return [key for key in made if made[key] != other[key]]

    assert changed(parallel=ParallelSection(tp=2), engine=EngineSection(max_num_seqs=3, block_size=32)) == []
    assert changed(engine=EngineSection(seed=1)) == ["engine.seed"]
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
    shown = stream.getvalue()
    assert shown == (
        "=== q ===\nin\n--- completion 1 of 2 (1 token, stop)\nfirst\n\tline \\x1b[2J\n"
        "--- completion 2 of 2 (1 token, stop)\ntoken ids [4]\n\n"
        "=== r ===\nin\n--- error: too long\n\n"
    )


def test_printing_token_ids():
    stream = io.StringIO()
    print_output(RequestOutput(request_id="0", prompt=None, prompt_token_ids=[5, 6]), stream)
    assert stream.getvalue() == "=== 0 ===\ntoken ids [5, 6]\n\n"


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


def test_imports_are_light():
    code = (
        "import sys, megalite.inference.io.output_file, megalite.monitor.progress; "
        "print([m for m in ('torch', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
