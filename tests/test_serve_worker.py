"""A replica's side of the server: the link, the worker between engine and HTTP process, and a replica started for real.

The HTTP process is played by these tests over real sockets.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from forks import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from one_request import make_request
from pool_replica import generate, make_replica
from tiny_tokenizer import with_tokenizer
from waiting import PATIENCE

from megalite.config.schema import SamplingParams
from megalite.errors import EXIT_DONE, EXIT_RANK_LOST
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.logprobs import FlatLogprobs, Logprob
from megalite.inference.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.inference.run import prompt_limits
from megalite.serve import frames, worker
from megalite.serve.frames import Frames, frame
from megalite.serve.link import Link, LinkError, connect
from megalite.serve.messages import Abort, FromReplica, Hello, Leave, Step, Submit, ToReplica
from megalite.text.tokenizer import Tokenizer

SERVE = str(ROOT / "launch" / "serve.py")
DRAWN = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, logprobs=1)
ASKED = [
    ((5, 6, 7), DRAWN),
    ((9, 8, 7, 6), replace(DRAWN, n=2, best_of=4)),
    (tuple(range(20, 45)), replace(DRAWN, prompt_logprobs=2, max_tokens=1, temperature=0)),
    ((11, 12), replace(DRAWN, frequency_penalty=0.5, stop="never written", logit_bias={7: 2.0})),
]


class HTTPSide:
    """The other end of a replica's connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.frames = Frames.of_replica()
        self.messages: list[FromReplica] = []

    def send(self, *messages: ToReplica) -> None:
        self.connection.sendall(frame(messages))

    def read(self) -> bool:
        """Take what comes next; False at the end."""
        data = self.connection.recv(1 << 20)
        self.messages += self.frames.feed(data)
        return bool(data)

    def steps(self) -> list[Step]:
        return [message for message in self.messages if isinstance(message, Step)]

    def outputs(self) -> list[RequestOutput]:
        found = [output for step in self.steps() for output in step.outputs]
        return sorted(found, key=lambda output: output.request_id)

    def await_outputs(self, count: int) -> list[RequestOutput]:
        while len(self.outputs()) < count:
            assert self.read(), "the replica has left"
        return self.outputs()


def requests_of(limits: PromptLimits) -> list[Request]:
    return [make_request(prompt, params, limits, place) for place, (prompt, params) in enumerate(ASKED)]


@pytest.fixture(scope="module")
def talking(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3"), tmp_path_factory.mktemp("talking") / "model")


def pair() -> tuple[Link, HTTPSide]:
    near, far = socket.socketpair()
    far.setblocking(False)
    return Link(near, patience=PATIENCE), HTTPSide(far)


# ---- the worker in this process


def hosted(rank: int, folder: Path, script: str):
    """What the HTTP side has heard when `script` of these tests has driven a worker over a replica."""
    worker.IDLE = 0.05
    replica = make_replica(rank, folder, max_model_len=96, max_num_seqs=2, block_size=4)
    link, side = pair()
    served = worker.Worker(replica.engine(), link)
    with closing(link), closing(side.connection):
        return globals()[script](served, side, requests_of(prompt_limits(replica)))


def step(served: worker.Worker, side: HTTPSide):
    served.wait()
    events = served.engine.step(served.news)
    served.tell(events)
    try:
        side.read()
    except BlockingIOError:
        pass
    return events


def aborts_at_every_stage(served: worker.Worker, side: HTTPSide, made: list[Request]):
    long = [replace(made[0], id=name, max_tokens=60, stream=True) for name in "abcd"]
    side.send(*map(Submit, long), Abort("unknown"))
    while not any(delta.request_id == "a" for one in side.steps() for delta in one.deltas):
        step(served, side)
    side.send(Abort("a"), Abort("d"))  # runs, and its next token is on the way; waits
    side.send(Submit(replace(made[0], id="e")), Abort("e"))  # is on its way itself
    while len(side.outputs()) < 3:
        step(served, side)
    side.send(Abort("b"), Abort("c"), Abort("a"))
    while len(side.outputs()) < 5:
        step(served, side)
    assert not served.engine.busy and served.engine.scheduler.pool.num_free == served.engine.scheduler.pool.num_blocks
    side.send(Leave())
    ended = False
    while not ended:
        ended = step(served, side).ended
    return side.messages, served.left


def test_a_request_is_given_up_wherever_it_is(talking, ranks):
    [(messages, left)] = ranks(1).run(hosted, talking, "aborts_at_every_stage")
    outputs = [output for one in messages for output in one.outputs]
    assert sorted(output.request_id for output in outputs) == ["a", "b", "c", "d", "e"] and left
    assert {sample.finish_reason for output in outputs for sample in output.outputs} == {"abort"}
    had = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
    assert 0 < had["a"] < 60 and had["d"] == had["e"] == 0
    assert {name for one in messages for name in one.started} == {"a", "b", "c"}


def same_as_ever(served: worker.Worker, side: HTTPSide, made: list[Request]):
    bad = replace(made[0], id="bad", max_tokens=1000)
    side.send(Submit(bad), *(Submit(replace(one, stream=True)) for one in made), Submit(replace(made[0], id="again")))
    while len(side.outputs()) < len(made) + 2:
        step(served, side)
    return side.messages, served.left


def test_tokens_through_a_worker_are_those_of_a_batch(talking, ranks):
    [wanted] = ranks(1).run(offline, talking)
    [(messages, _)] = ranks(1).run(hosted, talking, "same_as_ever")
    outputs = {output.request_id: output for one in messages for output in one.outputs}
    assert "exceed max_model_len" in outputs["bad"].error
    assert [sample.finish_reason for sample in outputs["bad"].outputs] == ["error"]
    for place, output in enumerate(wanted):
        assert_same(outputs[str(place)], output)
        for sample in output.outputs if place != 1 else ():  # best_of chooses in the end
            deltas = [
                d for one in messages for d in one.deltas if (d.request_id, d.index) == (str(place), sample.index)
            ]
            assert [token for delta in deltas for token in delta.token_ids] == sample.token_ids
            assert "".join(delta.text for delta in deltas) == sample.text
    last = messages[-1]
    assert last.preemptions == 0 and last.running == last.waiting == 0 and last.free_blocks > 0
    assert last.prompt_tokens == sum(len(prompt) for prompt, _ in ASKED) + 3
    assert last.output_tokens == 12 + 4 * 12 + 1 + 12 + 12
    assert [one.step for one in messages] == sorted({one.step for one in messages})


def offline(rank: int, folder: Path) -> list[RequestOutput]:
    return generate(make_replica(rank, folder, max_model_len=96, max_num_seqs=2, block_size=4), ASKED)


def assert_same(output: RequestOutput, wanted: RequestOutput) -> None:
    """Where steps are cut differently, the last digits of log-probabilities may differ."""
    assert output.prompt_token_ids == wanted.prompt_token_ids
    assert (output.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
    for entries, others in zip(output.prompt_logprobs or (), wanted.prompt_logprobs or (), strict=True):
        assert (entries is None) == (others is None)
        assert entries is None or entries.keys() == others.keys()
    for sample, other in zip(output.outputs, wanted.outputs, strict=True):
        assert (sample.token_ids, sample.text, sample.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        )
        assert sample.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
        assert [list(entry) for entry in sample.logprobs or ()] == [list(entry) for entry in other.logprobs or ()]


def without_work(served: worker.Worker, side: HTTPSide, made: list[Request]):
    for _ in range(2):
        step(served, side)
    side.send(Submit(made[0]))
    while not side.outputs():
        step(served, side)
    side.connection.shutdown(socket.SHUT_WR)
    ended = False
    while not ended:
        ended = step(served, side).ended
    return side.messages, served.left


def test_a_replica_without_work_gives_a_sign_of_life_and_ends_with_the_connection(talking, ranks):
    [(messages, left)] = ranks(1).run(hosted, talking, "without_work")
    assert messages[0].deltas == messages[0].outputs == [] and not left


# ---- the link


def test_what_is_not_read_yet_is_kept_and_sent_later():
    link, side = pair()
    with closing(link), closing(side.connection):
        big = [Step([], [], number, 0, 0, 0, 0, 0, 0, 0, started=["x" * 100_000]) for number in range(40)]
        for one in big:
            link.send(one)
        while len(side.messages) < len(big):
            try:
                side.read()
            except BlockingIOError:
                link.wait(PATIENCE)
                link.send()
        assert side.messages == big


def test_who_never_reads_counts_as_lost():
    link, side = pair()
    link._patience = 0.0
    with closing(link), closing(side.connection), pytest.raises(LinkError, match="has read nothing for 0 s"):
        for _ in range(1000):
            link.send(Step([], [], 0, 0, 0, 0, 0, 0, 0, 0, started=["x" * 100_000]))


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", frame([Hello(0, 0, 0, 0, 0, 0, 0, [], "", "")])]
)
def test_what_is_no_message_ends_the_replica(data):
    link, side = pair()
    with closing(link), closing(side.connection):
        side.connection.sendall(data)
        with pytest.raises(LinkError, match="can't be read"):
            link.receive()


def test_a_replica_of_another_host_proves_that_it_belongs_to_the_run():
    nonce, seen = os.urandom(frames.NONCE_BYTES), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def accept() -> None:
            with server.accept()[0] as accepted:
                accepted.sendall(nonce)
                seen.append(accepted.recv(frames.NONCE_BYTES, socket.MSG_WAITALL))

        thread = threading.Thread(target=accept)
        thread.start()
        connect(address, token=b"secret").close()
        thread.join()
    assert seen == [frames.proof(b"secret", nonce)]
    with pytest.raises(LinkError, match="no HTTP process answers"):
        connect(address, token=b"secret")


def test_a_long_path_is_no_hindrance(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("http")
            server.listen()
            connect(str(folder / "http")).close()
    finally:
        os.chdir(before)


# ---- messages

_numbers = st.floats(allow_nan=False)
_ids = st.integers(0, 2**31)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
_entries = st.dictionaries(_ids, st.builds(Logprob, _numbers, st.none() | _ids, st.none() | _texts), max_size=3)
_listings = st.none() | st.lists(_entries, max_size=3)
_flat = st.lists(_entries, max_size=3).map(FlatLogprobs.of)
_reasons = st.none() | st.sampled_from(["stop", "length", "abort", "error"])
_stops = st.none() | _texts | _ids
_samples = st.builds(
    CompletionOutput,
    index=_ids,
    text=_texts,
    token_ids=st.lists(_ids, max_size=5),
    cumulative_logprob=_numbers,
    logprobs=_listings | _flat,
    token_logprobs=st.lists(_numbers, max_size=5),
    finish_reason=_reasons,
    stop_reason=_stops,
)
_outputs = st.builds(
    RequestOutput,
    request_id=_texts,
    prompt=st.none() | _texts,
    prompt_token_ids=st.lists(_ids, max_size=5),
    prompt_logprobs=st.none() | st.lists(st.none() | _entries, max_size=3) | _flat,
    outputs=st.lists(_samples, max_size=2),
    replica=st.none() | _ids,
    error=st.none() | _texts,
    num_cached_tokens=st.none() | _ids,
    metrics=st.none() | st.builds(RequestMetrics),
)
_deltas = st.builds(
    TokenDelta,
    request_id=_texts,
    index=_ids,
    text=_texts,
    token_ids=st.lists(_ids, max_size=3),
    logprobs=_listings,
    finish_reason=_reasons,
    stop_reason=_stops,
)
_words = st.lists(_texts, max_size=2)
_params = st.builds(
    SamplingParams,
    n=_ids,
    temperature=_numbers,
    stop=st.none() | _texts | _words,
    stop_token_ids=st.none() | st.lists(_ids, max_size=2),
    max_tokens=st.none() | _ids,
    logprobs=st.none() | _ids,
    logit_bias=st.none() | st.dictionaries(_ids, _numbers, max_size=2),
    allowed_token_ids=st.none() | st.lists(_ids, max_size=2),
    bad_words=st.none() | _words,
    structured_outputs=st.none() | st.dictionaries(_texts, _words | st.dictionaries(_texts, _ids), max_size=1),
    best_of=st.none() | _ids,
    seed=st.none() | st.integers(0, 2**64 - 1),
)
_tokens = st.lists(_ids, max_size=3).map(tuple)
_requests = st.builds(
    Request,
    id=_texts,
    prompt=st.none() | _texts,
    prompt_token_ids=_tokens,
    params=_params,
    seed=st.integers(0, 2**64 - 1),
    max_tokens=_ids,
    stop_token_ids=st.frozensets(_ids, max_size=2),
    bad_words=st.lists(_tokens, max_size=2).map(tuple),
    grammar=_texts,
    stream=st.booleans(),
    given=st.lists(_tokens, max_size=2).map(tuple),
    ended=st.frozensets(_ids, max_size=2),
)


@settings(max_examples=30)
@given(st.lists(_deltas, max_size=2), st.lists(_outputs, max_size=2))
def test_results_travel_unharmed(deltas, outputs):
    sent = Step(deltas, outputs, 1, 2, 3, 4, 5, 6, 7, 8, ["a"], {"compute": 0.5})
    [came] = Frames.of_replica().feed(frame([sent]))
    assert came == sent and isinstance(came, Step)
    for output, other in zip(came.outputs, outputs, strict=True):
        assert (output.num_cached_tokens, output.metrics) == (other.num_cached_tokens, other.metrics)
        for sample, its in zip(output.outputs, other.outputs, strict=True):
            assert isinstance(sample.logprobs, FlatLogprobs) == isinstance(its.logprobs, FlatLogprobs)


@settings(max_examples=30)
@given(st.lists(st.builds(Submit, _requests) | st.builds(Abort, _texts) | st.just(Leave()), max_size=3), st.data())
def test_requests_travel_unharmed_however_the_stream_is_cut(messages, data):
    whole = frame(messages[:1]) + frame(messages[1:])
    cut = data.draw(st.integers(0, len(whole)))
    reader = Frames.to_replica()
    assert [*reader.feed(whole[:cut]), *reader.feed(whole[cut:])] == messages


# ---- a replica that is started


class Replica:
    """`launch/serve.py --replica`, and this test as its HTTP process."""

    def __init__(self, forks, folder: Path, *arguments: str):
        path = str(folder / "http")
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(PATIENCE)
            server.bind(path)
            server.listen()
            (folder / "serve.yaml").write_text(
                "server: {port: 0}\nengine: {max_num_seqs: 2, max_num_batched_tokens: 64}\n"
            )
            options = ["--config", folder / "serve.yaml", "--replica", "1", "--socket", path, *arguments]
            self.program = forks.start(SERVE, *options)
            self.side = HTTPSide(server.accept()[0])
        while not self.side.messages:
            assert self.side.read(), self.program.ended().err
        self.hello = self.side.messages.pop(0)


def test_a_replica_of_two_ranks_serves_until_it_may_leave(talking, forks, ranks, tmp_path):
    replica = Replica(forks, tmp_path, f"model.path={talking}", "model.dtype=float32", "parallel.tp=2", "parallel.dp=2")
    hello, side = replica.hello, replica.side
    assert (hello.replica, hello.dtype, hello.device, hello.max_num_seqs) == (1, "float32", "cpu", 2)
    limits = PromptLimits(
        tokenizer=Tokenizer.load(talking),
        vocab_size=hello.vocab_size,
        max_model_len=hello.max_model_len,
        eos_token_ids=tuple(hello.eos_token_ids),
        seed=0,
    )
    side.send(*map(Submit, requests_of(limits)))
    [wanted] = ranks(1).run(offline, talking)
    replica.program.signal(signal.SIGTERM)  # it is the HTTP process that drains
    for output, other in zip(side.await_outputs(len(ASKED)), wanted, strict=True):
        assert output.replica == 1
        assert_same(output, other)
    side.send(Submit(replace(requests_of(limits)[0], id="late", max_tokens=50)))
    side.await_outputs(len(ASKED) + 1)
    side.send(Leave())
    while side.read():
        pass
    ended = replica.program.ended()
    assert ended.code == EXIT_DONE, ended.err
    assert "rank" in ended.err and "error" not in ended.err


def test_a_replica_ends_with_its_http_process(talking, forks, tmp_path):
    replica = Replica(forks, tmp_path, f"model.path={talking}", "parallel.pp=2")
    replica.side.connection.close()
    ended = replica.program.ended()
    assert ended.code == EXIT_RANK_LOST
    assert ended.err.count("error: ") == 1 and "replica 1: the HTTP process is gone" in ended.err
