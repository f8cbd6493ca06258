"""Generations that are read while they run: alone, over ranks, asynchronously, and left early."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from pool_replica import make_replica, make_requests
from tiny_tokenizer import with_tokenizer

from megalite import LLM, SamplingParams
from megalite.config.load import load_config
from megalite.core.layout import Layout
from megalite.errors import ConfigError
from megalite.inference import job
from megalite.inference.io.printing import shown
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.run import run_everywhere
from megalite.inference.streaming import Generation, StreamedRun

LONG = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9], [9, 10]]
PARAMS = [
    SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2, seed=1),
    SamplingParams(max_tokens=9, n=3, temperature=0.8, seed=2),
    SamplingParams(max_tokens=30, ignore_eos=True, stop=["e", "a"], seed=3),
    SamplingParams(max_tokens=20, ignore_eos=True, prompt_logprobs=1, seed=4),
]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3", 2), tmp_path_factory.mktemp("streaming") / "model")


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    with LLM(str(folder), dtype="float32", max_model_len=100, block_size=8) as made:
        yield made


def assert_gained(deltas: list[TokenDelta], outputs: list[RequestOutput]) -> None:
    """Put together, the deltas are the results."""
    assert {one.request_id for one in deltas} == {output.request_id for output in outputs}
    for output in outputs:
        for completion in output.outputs:
            mine = [one for one in deltas if (one.request_id, one.index) == (output.request_id, completion.index)]
            assert "".join(one.text for one in mine) == completion.text
            assert [token for one in mine for token in one.token_ids] == completion.token_ids
            logprobs = [entry for one in mine for entry in one.logprobs or ()]
            assert logprobs == (completion.logprobs or [])
            *earlier, last = mine
            assert (last.finish_reason, last.stop_reason) == (completion.finish_reason, completion.stop_reason)
            assert not any(one.finish_reason for one in earlier)


def results(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Without their names, and which replica ran them."""
    return [replace(output, request_id="", replica=None) for output in outputs]


def chosen(outputs: list[RequestOutput]) -> list[tuple]:
    """What does not hang on which requests a replica ran together, as the last digit of log-probabilities does."""
    return [
        (output.request_id, one.token_ids, one.text, one.stop_reason) for output in outputs for one in output.outputs
    ]


def assert_idle(llm: LLM) -> None:
    scheduler = llm._engine.scheduler
    assert not scheduler.has_work() and not llm._engine.outputs._running


# ---- over ranks


def streamed(rank: int, folder: Path, layout: Layout, store: str, engine: dict):
    """What this rank sees of a whole generation, of one that the last rank leaves, and of one of all requests after."""
    replica = make_replica(rank, folder, layout, store=store, block_size=4, **engine)
    engine = replica.engine()
    requests = make_requests(replica, zip(PROMPTS, PARAMS, strict=True))
    plain = run_everywhere(replica, engine, requests, key="plain")
    asked = [replace(request, stream=True) for request in requests]
    generation = Generation(StreamedRun(replica, engine, asked, key="all"))
    deltas = list(generation)
    assert chosen(generation.outputs) == chosen(plain) and generation.ended
    assert_gained(deltas, generation.outputs)

    left = Generation(StreamedRun(replica, engine, asked, key="left"))
    if rank == layout.size - 1:
        seen = [next(left) for _ in range(5)]
        left.close()
    else:
        seen = list(left)
    assert left.ended and list(left) == []
    assert not engine.scheduler.has_work()
    assert chosen(run_everywhere(replica, engine, requests, key="after")) == chosen(plain)
    return deltas, seen, [output.request_id for output in left.outputs]


@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        (Layout(), {"async_scheduling": True}),
        (Layout(2, 2, 1), {}),
        (Layout(1, 2, 2), {"dp_mode": "async", "max_num_seqs": 2, "async_scheduling": True}),
    ],
    ids=str,
)
def test_every_rank_sees_the_same(layout, engine, folder, ranks, tmp_path):
    answers = ranks(layout.size).run(streamed, folder, layout, str(tmp_path / "store"), engine)
    for deltas, seen, finished in answers:
        assert deltas == answers[0][0]
        assert seen[:5] == answers[0][1][:5] and len(seen) < len(deltas), "one rank left, so all did"
        assert len(finished) < len(PROMPTS) and finished == answers[0][2]


# ---- from Python


def test_a_stream_gives_what_the_call_would_have_given(llm):
    outputs = llm.generate(PROMPTS, PARAMS)
    generation = llm.generate(PROMPTS, PARAMS, stream=True)
    deltas = list(generation)
    assert generation.request_ids == [output.request_id for output in generation.outputs]
    assert_gained(deltas, generation.outputs)
    assert results(generation.outputs) == results(outputs)
    first = [one.request_id for one in deltas[: len(PROMPTS)]]
    assert len(set(first)) > 1, "the requests run together"
    chat = [{"role": "user", "content": "hi"}]
    text = "".join(delta.text for delta in llm.chat(chat, LONG, stream=True))
    assert text == llm.chat(chat, LONG)[0].outputs[0].text
    assert list(llm.generate([], stream=True)) == []


def test_leaving_early_gives_up_what_runs(llm):
    whole = llm.generate(PROMPTS, LONG)
    for _ in llm.generate(PROMPTS, LONG, stream=True):
        break
    assert_idle(llm)
    generation = llm.generate(PROMPTS, LONG, stream=True)
    next(generation)
    for call in (lambda: llm.generate([5], LONG), lambda: llm.logprobs([[5, 6]]), llm.reset_prefix_cache):
        with pytest.raises(ConfigError, match="is being streamed; read it to its end, or close"):
            call()
    generation.close()
    generation.close()
    assert list(generation) == [] and generation.outputs == []
    assert results(llm.generate(PROMPTS, LONG)) == results(whole)
    with pytest.raises(ZeroDivisionError):
        for _ in llm.generate(PROMPTS, LONG, stream=True):
            raise ZeroDivisionError
    gc.collect()
    assert_idle(llm)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_engine_usable(llm, monkeypatch, error):
    whole = llm.generate(PROMPTS, LONG)
    execute, steps = llm._engine.runner.execute, []

    def failing(*args):
        steps.append(args)
        if len(steps) == 9:
            raise error("in the middle")
        return execute(*args)

    monkeypatch.setattr(llm._engine.runner, "execute", failing)
    generation = llm.generate(PROMPTS, LONG, stream=True)
    with pytest.raises(error, match="in the middle"):
        list(generation)
    assert generation.ended and list(generation) == []
    assert_idle(llm)
    assert results(llm.generate(PROMPTS, LONG)) == results(whole)


def test_what_is_wrong_is_said_at_once(llm):
    with pytest.raises(ConfigError, match="best_of: which samples are the best is known at the end only"):
        llm.generate("x", SamplingParams(n=1, best_of=2), stream=True)
    with pytest.raises(ConfigError, match=r"prompts\[1\]: an empty prompt"):
        llm.generate(["x", ""], stream=True)
    assert list(llm.generate("x", SamplingParams(n=2, best_of=2, max_tokens=3), stream=True))


def test_closing_the_llm_ends_a_stream(folder):
    llm = LLM(str(folder), dtype="float32", max_model_len=100)
    generation = llm.generate([5, 6], LONG, stream=True)
    next(generation)
    llm.close()
    assert generation.ended and list(generation) == []


# ---- asynchronously


def test_async_for(llm):
    plain = llm.generate(PROMPTS, LONG)

    async def read() -> tuple[list[TokenDelta], int, Generation]:
        ticks, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        generation = llm.generate(PROMPTS, LONG, stream=True)
        deltas = [delta async for delta in generation]
        done.set()
        await ticking
        return deltas, ticks, generation

    deltas, ticks, generation = asyncio.run(read())
    assert_gained(deltas, generation.outputs)
    assert results(generation.outputs) == results(plain)
    assert ticks > 60, "the loop had turns while the engine worked"


def test_a_cancelled_wait_loses_nothing(llm, monkeypatch):
    whole = list(llm.generate([5, 6], LONG, stream=True))
    execute, go_on = llm._engine.runner.execute, threading.Event()

    def held(*args):
        go_on.wait()
        return execute(*args)

    async def read() -> list[TokenDelta]:
        generation = llm.generate([5, 6], LONG, stream=True)
        deltas = [await anext(generation)]
        monkeypatch.setattr(llm._engine.runner, "execute", held)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.01)
        go_on.set()
        return deltas + [delta async for delta in generation]

    deltas = asyncio.run(read())
    assert [one.token_ids for one in deltas] == [one.token_ids for one in whole]


def test_an_async_stream_is_left_early(llm):
    async def leave() -> None:
        async with aclosing(llm.generate(PROMPTS, LONG, stream=True)) as generation:
            async for _ in generation:
                break
        assert generation.ended
        async for _ in llm.generate(PROMPTS, LONG, stream=True):
            break

    asyncio.run(leave())
    gc.collect()
    assert_idle(llm)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("generation")]


# ---- one prompt on a terminal


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.append(text)
        return super().write(text)


@pytest.mark.parametrize(("overrides", "streams"), [((), True), (("sampling.n=2",), False)])
def test_the_only_completion_is_printed_as_it_grows(folder, tmp_path, monkeypatch, overrides, streams):
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{path: {json.dumps(str(folder))}, dtype: float32}}\nengine: {{max_model_len: 100}}\n"
        "input: {prompts: [Hi]}\nsampling: {temperature: 0, max_tokens: 30, ignore_eos: true}\n"
    )
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert job.run(load_config("infer", config, overrides)) == 0
    monkeypatch.undo()
    said = out.getvalue()
    assert said.startswith("=== 0 ===\nHi\n--- completion")
    assert (len(out.written) > 20) == streams
    assert ("prompts |" in err.getvalue()) != streams, "no bar where text grows"
    if streams:
        with LLM(str(folder), dtype="float32", max_model_len=100) as llm:
            [output] = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        text = shown(output.outputs[0].text)
        assert said == f"=== 0 ===\nHi\n--- completion\n{text}\n--- 30 tokens, length\n\n"
