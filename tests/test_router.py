"""The router over replicas without a model: admission, order, replay, moves, the end. No process, no time passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from fake_replica import FakeEngine, expected, text_of

from megalite.config.schema import SamplingParams, ServerSection
from megalite.errors import ConfigError
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.logprobs import Logprob
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.serve.errors import Draining, NoReplica, Overloaded, RequestLost
from megalite.serve.messages import Step, ToReplica
from megalite.serve.router import Router, Stream
from megalite.serve.streams import Gain, Merged


class Told:
    """What a router tells, counted."""

    def __init__(self) -> None:
        self.states: list[tuple[int, str]] = []
        self.refused: list[str] = []
        self.replays = 0

    def replica_state(self, replica: int, state: str) -> None:
        self.states.append((replica, state))

    def replica_step(self, replica: int, message: Step) -> None:
        pass

    def rejected(self, reason: str) -> None:
        self.refused.append(reason)

    def replayed(self, count: int = 1) -> None:
        self.replays += count


class Bench:
    """A router and its replicas, which take a step when they are told to."""

    def __init__(self, replicas: int = 2, *, rows: int = 64, ready: bool = True, **section: Any):
        self.now = 0.0
        limits = PromptLimits(tokenizer=None, vocab_size=1 << 16, max_model_len=4096)
        self.told = Told()
        settings = ServerSection(**{"balance": "round_robin", **section})
        self.router = Router(settings, limits, replicas, self.told, clock=lambda: self.now)
        self.rows = rows
        self.engines: dict[int, FakeEngine] = {}
        for replica in range(replicas if ready else 0):
            self.join(replica)

    def join(self, replica: int, **options: Any) -> FakeEngine:
        engine = self.engines[replica] = FakeEngine(replica, max_num_seqs=self.rows, **options)

        def send(messages: Sequence[ToReplica]) -> None:
            engine.take(messages)

        self.router.joined(engine.hello, send)
        return engine

    def lose(self, replica: int, **options: Any) -> int:
        del self.engines[replica]
        return self.router.lost(replica, **options)

    def step(self, *replicas: int, **options: Any) -> None:
        for replica in replicas or tuple(self.engines):
            self.router.received(replica, self.engines[replica].step(**options))

    def run(self) -> None:
        """Until nothing is left."""
        while any(engine.requests for engine in self.engines.values()):
            self.step()


def request(name: str, *, tokens: int = 4, n: int = 1, prompt: int = 3, stream: bool = True, **params: Any) -> Request:
    ids = tuple(ord(letter) for letter in name.ljust(prompt, "-")[:prompt])
    sampling = SamplingParams(n=n, max_tokens=tokens, **params)
    return Request(id=name, prompt_token_ids=ids, params=sampling, seed=7, max_tokens=tokens, stream=stream)


async def read(stream: Stream) -> tuple[list[list[int]], list[str], RequestOutput]:
    """All that a client gets: tokens and text of each sample from deltas, and the result."""
    tokens: list[list[int]] = [[] for _ in range(stream.request.num_samples)]
    texts = [""] * len(tokens)
    async for delta in stream:
        tokens[delta.index] += delta.token_ids
        texts[delta.index] += delta.text
    return tokens, texts, await stream.result()


def check_whole(one: Request, tokens: list[list[int]], texts: list[str], output: RequestOutput) -> None:
    """As an undisturbed run's."""
    wanted = expected(one)
    assert tokens == wanted
    assert texts == [text_of(own) for own in wanted]
    assert [completion.token_ids for completion in output.outputs] == wanted
    assert [completion.text for completion in output.outputs] == texts
    assert {completion.finish_reason for completion in output.outputs} == {"length"}


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_streams_in_order_and_whole() -> None:
    bench = Bench()
    asked = [request(f"r{i}", tokens=i + 1, n=1 + i % 3) for i in range(8)]
    streams = bench.router.submit_all(asked)
    bench.run()
    for one, stream in zip(asked, streams, strict=True):
        check_whole(one, *await read(stream))
    assert {len(engine.submitted) for engine in bench.engines.values()} == {4}
    assert bench.router.replicas()[0].requests == 0


@in_loop
async def test_what_comes_while_the_reader_is_busy_is_one_delta() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("late", tokens=5))
    bench.step()
    first = await anext(stream)
    bench.run()
    rest = [delta async for delta in stream]
    assert [len(first.token_ids), *(len(delta.token_ids) for delta in rest)] == [1, 4]
    assert [first.token_ids + rest[0].token_ids] == expected(one)
    assert first.text + rest[0].text == text_of(expected(one)[0])
    assert rest[0].finish_reason == "length"
    scored = [
        TokenDelta(request_id="late", index=0, text="a", token_ids=[i], logprobs=[{i: Logprob(-1.0)}]) for i in range(2)
    ]
    scored[0].extend(scored[1])
    assert scored[0].token_ids == [0, 1] and [list(entry) for entry in scored[0].logprobs or ()] == [[0], [1]]


@in_loop
async def test_what_a_ready_writer_is_given_wakes_nobody() -> None:
    bench, writes, ready = Bench(), [], True
    merged = Merged(bench.router.submit_all([one := request("given", tokens=7, n=2)]))

    def write(found: list[Gain]) -> None:
        writes.append([delta.token_ids for _, delta in found])
        if len(writes) > 2:
            raise ValueError("no room")

    async def turn(steps: int) -> None:
        for _ in range(steps):
            bench.step()
        for _ in range(3):
            await asyncio.sleep(0)

    merged.give_to(write, lambda: ready)
    reading = asyncio.ensure_future(merged.next())
    await turn(0)
    first, second = expected(one)
    await turn(1)
    await turn(2)
    gained = [[token] for pair in zip(first[1:3], second[1:3], strict=True) for token in pair]
    assert writes == [[first[:1], second[:1]], gained]
    assert not reading.done()
    ready = False  # its client lags: what comes is the reader's again, in order
    await turn(1)
    assert [(delta.index, delta.token_ids) for _, delta in await reading] == [(0, first[3:4]), (1, second[3:4])]
    ready = True
    await turn(1)  # nobody waits: it is kept
    assert len(writes) == 2 and [delta.token_ids for _, delta in await merged.next()] == [first[4:5], second[4:5]]
    reading = asyncio.ensure_future(merged.next())
    await turn(0)
    await turn(1)
    with pytest.raises(ValueError, match="no room"):
        await reading
    reading = asyncio.ensure_future(merged.next())
    await turn(0)
    bench.run()  # the end comes with the last tokens, and wakes the reader
    assert [delta.token_ids for _, delta in await reading] == [first[6:], second[6:]]
    assert await merged.next() == []


@in_loop
async def test_a_result_without_deltas() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("whole", stream=False, n=2))
    bench.run()
    assert [delta async for delta in stream] == []
    assert [own.token_ids for own in (await stream.result()).outputs] == expected(one)


@in_loop
async def test_every_replica_lost_in_turn() -> None:
    """20 streams, some with several samples of which some have ended: nothing is repeated, nothing is missing."""
    bench = Bench(replicas=3)
    asked = [request(f"s{i}", tokens=12, n=1 + i % 3) for i in range(20)]
    streams = bench.router.submit_all(asked)
    for replica in (0, 1, 2, 0):
        bench.step()
        bench.step(replica, only="s4")  # gets ahead
        assert bench.lose(replica) > 0
        bench.router.restarting(replica)
        bench.join(replica)
    bench.run()
    for one, stream in zip(asked, streams, strict=True):
        check_whole(one, *await read(stream))
    assert bench.told.replays > 20


@in_loop
async def test_samples_that_had_ended_stay_ended() -> None:
    bench = Bench(rows=1)  # so the first sample ends before the second begins
    stream = bench.router.submit(one := request("n", tokens=3, n=2))
    for _ in range(3):
        bench.step(0)
    bench.lose(0)
    (again,) = bench.engines[1].submitted
    assert again.ended == {0}
    assert [len(tokens) for tokens in again.given] == [3, 0]
    bench.run()
    check_whole(one, *await read(stream))


@in_loop
async def test_what_is_not_streamed_runs_again_whole() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("again", stream=False))
    bench.step()
    bench.lose(0)
    assert bench.engines[1].submitted == [one]
    bench.run()
    assert [own.token_ids for own in (await stream.result()).outputs] == expected(one)


@in_loop
async def test_log_probabilities_of_a_replayed_stream() -> None:
    bench = Bench()
    stream = bench.router.submit(request("log", tokens=2, logprobs=0))
    for replica in (0, 1):
        step = bench.engines[replica].step()
        for delta in step.deltas:
            delta.logprobs = [{token: Logprob(-0.5 - replica)} for token in delta.token_ids]
        bench.router.received(replica, step)
        if replica == 0:
            bench.lose(0)
    tokens, _, output = await read(stream)
    (completion,) = output.outputs
    assert [entry[token].logprob for entry, token in zip(completion.logprobs, tokens[0], strict=True)] == [-0.5, -1.5]
    assert completion.cumulative_logprob == -2.0


@in_loop
async def test_requests_wait_for_a_replica_that_is_started_again() -> None:
    bench = Bench(replicas=1)
    first = bench.router.submit(one := request("one"))
    bench.step()
    assert bench.lose(0) == 1
    bench.router.restarting(0)
    second = bench.router.submit(two := request("two"))
    assert bench.router.state == "ready" and not bench.router.ready
    bench.join(0)
    assert bench.router.ready
    bench.run()
    check_whole(one, *await read(first))
    check_whole(two, *await read(second))


@in_loop
async def test_none_left() -> None:
    bench = Bench()
    stream = bench.router.submit(request("gone"))
    bench.step()
    bench.lose(0, again=False)
    assert bench.router.healthy
    bench.lose(1, again=False)
    assert not bench.router.healthy and bench.router.state == "lost"
    got = []
    with pytest.raises(RequestLost, match="no replica is left"):
        async for delta in stream:
            got.append(delta)
    assert len(got) == 1  # what was there is still read
    with pytest.raises(RequestLost):
        await stream.result()
    with pytest.raises(NoReplica):
        bench.router.submit(request("late"))
    await bench.router.idle()


@in_loop
async def test_a_request_that_kills_its_replicas_ends_alone() -> None:
    """It takes two replicas along with the innocent; the third time it is the only suspect there."""
    bench = Bench()
    bad = bench.router.submit(request("bad", tokens=8))
    asked = [request(f"i{i}", tokens=8) for i in range(6)]
    streams = bench.router.submit_all(asked)
    deaths = 0
    while bench.router.replicas()[0].requests + bench.router.replicas()[1].requests:
        for replica in (0, 1):
            if "bad" in bench.engines[replica].requests:  # before its first token
                deaths += 1
                bench.lose(replica)
                bench.router.restarting(replica)
                bench.join(replica)
                break
        else:
            bench.step()
    assert deaths == 3
    with pytest.raises(RequestLost, match="3 replicas were lost"):
        await bad.result()
    for one, stream in zip(asked, streams, strict=True):
        check_whole(one, *await read(stream))


@in_loop
async def test_a_request_that_gains_something_each_time_does_not_kill_for_ever() -> None:
    bench = Bench(replicas=1)
    bad = bench.router.submit(request("bad", tokens=100))
    for _ in range(9):
        bench.step()
        bench.lose(0)
        bench.router.restarting(0)
        bench.join(0)
    with pytest.raises(RequestLost, match="9 replicas"):
        await bad.result()


@in_loop
async def test_messages_of_a_replica_that_was_lost_count_for_nothing() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("late"))
    old = bench.engines[0]
    bench.step()
    bench.lose(0)
    bench.router.received(0, old.step())
    bench.run()
    check_whole(one, *await read(stream))


# ---- admission


@in_loop
async def test_the_queue_is_bounded_by_requests() -> None:
    bench = Bench(max_queued_requests=3)
    bench.router.submit_all([request("a"), request("b")])
    with pytest.raises(Overloaded) as refused:
        bench.router.submit_all([request("c"), request("d")])
    assert refused.value.retry_after > 0
    assert len(bench.engines[0].submitted) + len(bench.engines[1].submitted) == 2  # none of the two
    bench.router.submit(request("e"))
    with pytest.raises(Overloaded):
        bench.router.submit(request("f"))
    bench.run()
    bench.router.submit_all([request("g"), request("h"), request("i")])
    assert bench.told.refused == ["overloaded"] * 2


@in_loop
async def test_the_queue_is_bounded_by_tokens() -> None:
    """A request is priced with all its samples and what it may generate."""
    bench = Bench(max_queued_tokens=100)
    bench.router.submit(request("a", prompt=5, tokens=20, n=2))  # 50
    with pytest.raises(Overloaded):
        bench.router.submit(request("b", prompt=5, tokens=12, n=3))  # 51
    bench.router.submit(request("c", prompt=5, tokens=20, n=2))
    with pytest.raises(Overloaded):
        bench.router.admit(1, 1)
    with pytest.raises(ConfigError, match="whole queue"):
        bench.router.submit(request("d", prompt=5, tokens=96))


@in_loop
async def test_when_to_try_again_follows_from_what_ends() -> None:
    bench = Bench(max_queued_requests=10)
    bench.router.submit_all([request(f"a{i}", tokens=2 if i < 4 else 90) for i in range(10)])
    for _ in range(2):
        bench.now += 4.0
        bench.step()  # four end at 8 s
    bench.router.submit_all([request(f"b{i}", tokens=90) for i in range(4)])
    bench.now = 12.0  # one a second
    with pytest.raises(Overloaded) as refused:
        bench.router.submit_all([request(f"c{i}") for i in range(8)])
    assert refused.value.retry_after == pytest.approx(8.0)


@in_loop
async def test_nothing_is_taken_before_the_first_is_ready() -> None:
    bench = Bench(ready=False)
    with pytest.raises(NoReplica):
        bench.router.submit(request("early"))
    assert bench.router.state == "starting" and bench.router.healthy and not bench.router.ready
    bench.join(0, max_model_len=512)
    assert bench.router.limits.max_model_len == 512
    bench.join(1, max_model_len=256)
    assert bench.router.limits.max_model_len == 256
    bench.router.submit(request("now"))


# ---- moves, cancels, the end


@in_loop
async def test_a_request_that_has_not_started_moves() -> None:
    bench = Bench(rows=1)
    first, second = bench.router.submit_all([request("a"), two := request("b")])
    third = bench.router.submit(request("c"))  # waits behind a
    bench.router._move("c", 0, 1)
    assert [one.id for one in bench.engines[1].submitted] == ["b"]  # until the other has given it back
    bench.step(0)
    assert [one.id for one in bench.engines[1].submitted] == ["b", "c"]
    assert "c" not in bench.engines[0].requests
    bench.run()
    check_whole(request("a"), *await read(first))
    check_whole(two, *await read(second))
    check_whole(request("c"), *await read(third))


@in_loop
async def test_a_request_that_started_while_it_was_to_move() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("m", n=2))
    raced = bench.engines[0].step()  # under way when the other message is sent
    bench.router._move("m", 0, 1)
    bench.router.received(0, raced)
    bench.step(0)
    assert [len(tokens) for tokens in bench.engines[1].submitted[0].given] == [1, 1]
    bench.run()
    check_whole(one, *await read(stream))


@in_loop
async def test_a_request_that_ended_while_it_was_to_move() -> None:
    bench = Bench()
    stream = bench.router.submit(one := request("m", tokens=1))
    last = bench.engines[0].step()
    bench.router._move("m", 0, 1)
    bench.router.received(0, last)
    assert bench.engines[1].submitted == []
    check_whole(one, *await read(stream))


@pytest.mark.parametrize("gone", [(0,), (1,), (1, 0), (0, 1)])
def test_replicas_lost_while_a_request_moves(gone: tuple[int, ...]) -> None:
    async def test() -> None:
        bench = Bench(replicas=3)
        stream = bench.router.submit(one := request("m"))
        bench.router._move("m", 0, 1)
        for replica in gone:
            bench.lose(replica)
        bench.step()
        bench.run()
        check_whole(one, *await read(stream))

    asyncio.run(test())


@in_loop
async def test_a_client_that_goes_away() -> None:
    bench = Bench()
    async with bench.router.submit(request("left")) as stream:
        bench.step()
    assert bench.engines[0].aborted == {"left"}
    with pytest.raises(asyncio.CancelledError):
        await stream.result()
    bench.step()
    assert not bench.engines[0].requests
    stream.cancel()  # once more
    async with bench.router.submit(request("read")) as stream:
        bench.run()
        await read(stream)
    assert bench.engines[1].aborted == set()
    waits = Bench(replicas=1)
    waits.lose(0)
    waits.router.submit(request("waits")).cancel()
    assert waits.join(0).submitted == []


@in_loop
async def test_nothing_is_kept_of_what_has_ended() -> None:
    bench = Bench()
    for i in range(50):
        stream = bench.router.submit(request(f"k{i}"))
        if i % 3 == 0:
            stream.cancel()
        bench.run()
    router = bench.router
    assert not router._jobs and not router._waiting and not router._tokens and not router._balancer._jobs
    assert not any(one.jobs for one in router._replicas.values())


@in_loop
async def test_draining() -> None:
    bench = Bench()
    bench.router.submit(request("ends", tokens=1))
    stream = bench.router.submit(request("runs", n=2))
    bench.router.drain()
    with pytest.raises(Draining) as refused:
        bench.router.submit(request("new"))
    assert refused.value.retry_after > 0
    bench.step()
    bench.router.abort_all()
    bench.step()
    await bench.router.idle()
    tokens, texts, output = await read(stream)
    assert [len(own) for own in tokens] == [1, 1]
    assert [(own.token_ids, own.finish_reason) for own in output.outputs] == [(own, "abort") for own in tokens]
    assert [own.text for own in output.outputs] == texts


@in_loop
async def test_draining_without_a_replica() -> None:
    bench = Bench(replicas=1)
    streams = bench.router.submit_all([request("a"), request("b", stream=False, n=2)])
    bench.step()
    bench.router.drain()
    bench.lose(0)
    bench.router.abort_all()
    await bench.router.idle()
    tokens, _, output = await read(streams[0])
    assert output.outputs[0].finish_reason == "abort" and output.outputs[0].token_ids == tokens[0] != []
    whole = await streams[1].result()
    assert [(own.token_ids, own.finish_reason) for own in whole.outputs] == [([], "abort")] * 2


# ---- stalls


@in_loop
async def test_a_replica_that_stalls() -> None:
    bench = Bench(stall_timeout=60.0)
    bench.router.submit_all([request("a", tokens=99), request("b", tokens=99)])
    stalled = []
    for second in range(1, 80):
        bench.now = float(second)
        bench.step(0)
        if second < 15:
            bench.step(1)
        stalled += [(second, replica) for replica in bench.router.tick()][:1] if not stalled else []
    assert stalled == [(75, 1)]
    assert bench.router.healthy and bench.router.ready


@in_loop
async def test_all_stall() -> None:
    bench = Bench(stall_timeout=60.0)
    bench.router.submit_all([request("a"), request("b")])
    for second in range(1, 62):
        bench.now = float(second)
        assert bench.router.ready == (second < 10)
        bench.router.tick()
    assert not bench.router.healthy


@in_loop
async def test_nothing_to_do_is_no_stall() -> None:
    bench = Bench(stall_timeout=60.0)
    for second in range(1, 200):
        bench.now = float(second)
        bench.step()  # as each does once a second
        assert bench.router.tick() == [] and bench.router.ready
    bench.now += 1000.0  # this process was stopped, not the replicas
    assert bench.router.tick() == []
