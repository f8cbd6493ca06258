"""The engine's promise: what a request gets depends on nothing but its prompt, its parameters and its seed.

One list of requests uses every sampling option. What each should get is worked out by slow_generation.py. Then the list
runs in every setting that could change it: layouts, chunks, preemptions, cached prefixes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from one_request import make_request
from pool_replica import make_replica, make_requests
from slow_generation import EOS, Ask, Completion, Expected, Slow
from tiny_models import VOCAB
from tiny_tokenizer import with_tokenizer
from waiting import wait_until

from megalite.config.schema import SamplingParams
from megalite.core.agreement import broadcast_bytes
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError
from megalite.inference import channel
from megalite.inference.channel import News
from megalite.inference.engine import LOOKAHEAD, Engine, Hooks
from megalite.inference.io.inputs import RawRequest
from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.replica import Replica
from megalite.inference.request import Request
from megalite.inference.run import make_feed, prepare, prompt_limits, run_everywhere
from megalite.text.tokenizer import Tokenizer

MODEL = "llama3", 3
"""With a layer for each of three stages."""
TOLERANCE = 1e-4
MAX_MODEL_LEN = 96

_random = random.Random(7)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(_random.randrange(3, VOCAB) for _ in range(count))


LONG, SHARED = tokens(45), tokens(24)
SHORT = [tokens(6) for _ in range(24)]
_ASKED = [
    (tokens(1), {"temperature": 0, "max_tokens": 22}),
    (LONG, {"temperature": 0, "prompt_logprobs": 2}),
    (tokens(17), {"temperature": 0, "max_tokens": 1}),
    (SHARED, {"n": 3, "prompt_logprobs": 0}),
    (SHARED[:16] + tokens(3), {"temperature": 0.7, "top_p": 0.8, "seed": 5}),
    (SHARED, {"temperature": 1.3, "top_k": 6, "seed": 2**62}),
    (tokens(9), {"min_p": 0.1, "seed": 3, "logprobs": None}),
    (tokens(12), {"temperature": 1.2, "n": 2, "best_of": 4, "seed": 11}),
    (tokens(6) * 3, {"temperature": 0, "repetition_penalty": 1.4, "max_tokens": 18}),
    (tokens(8), {"temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": 0.5, "max_tokens": 18}),
    (tokens(5), {"logit_bias": {7: 6.0, 9: 5.5, 11: -100.0}, "top_p": 0.95}),
    (tokens(7), {"ignore_eos": False, "min_tokens": 6, "logit_bias": {EOS: 12.0}}),  # ends as soon as it may
    (tokens(10), {"temperature": 0.8, "stop_token_ids": list(range(3, 40)), "min_tokens": 3}),
    (LONG[:32], {"temperature": 0, "prompt_logprobs": 1, "max_tokens": 4}),
    (LONG[:32] + tokens(20), {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "seed": 1}),
    (LONG[:40], {"max_tokens": 0, "prompt_logprobs": 0}),  # `score` asks so
    (tokens(1), {"max_tokens": 0, "prompt_logprobs": 3}),
    (tokens(8), {"allowed_token_ids": list(range(20, 90, 3)), "temperature": 1.5, "n": 2}),
    (tokens(4), {"allowed_token_ids": [50, 51, 52], "temperature": 0, "repetition_penalty": 1.2}),
]
ASKS = [
    Ask(place, prompt, replace(SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2), **changes))
    for place, (prompt, changes) in enumerate(_ASKED)
]
_LETTERS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2, allowed_token_ids=[30, 31, 32])
ASKS += [
    Ask(len(ASKS), tokens(3), _LETTERS, bad_words=((30, 31), (31, 31), (32, 30, 30))),
    Ask(len(ASKS) + 1, tokens(5), replace(_LETTERS, temperature=0), bad_words=((31,), (30, 30), (30, 32, 30))),
]


# ---- engines in the pool


@pytest.fixture(scope="module")
def expected(tiny) -> list[Expected]:
    """What every ask of ASKS should get."""
    return [Slow(tiny(*MODEL))(ask) for ask in ASKS]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that must not change a result."""

    layout: Layout = Layout()
    dp_mode: str = "sync"
    engine: dict = field(default_factory=dict)
    rounds: int = 1
    """How often the whole list runs on the same engine."""
    alone: bool = False
    """One request at a time."""


@dataclass
class Seen:
    """What happened in one round on one rank."""

    hits: int = 0
    """Tokens found in the prefix cache."""
    recomputed: int = 0
    """Preemptions of one kind."""
    swapped: int = 0
    """And of the other."""
    scattered: int = 0
    """Rows whose blocks were no neighbours."""
    chunks: int = 0
    """Rows that ended before their prompt did."""


def replica_of(setting: Setting, rank: int, folder: Path, store: str) -> Replica:
    engine = {"max_model_len": MAX_MODEL_LEN, "check_lockstep": True, **setting.engine}
    return make_replica(rank, folder, setting.layout, store=store, dp_mode=setting.dp_mode, **engine)


def requests_for(replica: Replica, asks: Sequence[Ask]) -> list[Request]:
    made = make_requests(replica, [(ask.prompt, ask.params) for ask in asks])
    return [replace(request, bad_words=ask.bad_words) for request, ask in zip(made, asks, strict=True)]


def assert_idle(engine: Engine) -> None:
    """Nothing is left of a run: no sequence, no block held, nothing remembered."""
    scheduler = engine.scheduler
    scheduler.pool.check([])
    assert not scheduler.has_work() and scheduler.num_running == scheduler.num_waiting == 0
    assert not engine.outputs._running and not engine.runner._returning
    assert not engine.channel.sent and not any(out.sends for out in engine.runner.link.outward.values())


class Spy:
    """Counts what an engine does."""

    def __init__(self, engine: Engine):
        self.stats, self.seen, self.hits = engine.scheduler.stats, Seen(), 0
        self.preempt, self.execute = engine.scheduler._preempt, engine.runner.execute
        engine.scheduler._preempt, engine.runner.execute = self._on_preempt, self._on_execute

    def _on_preempt(self, cohort: int):
        victim = self.preempt(cohort)
        self.seen.swapped += bool(victim.host_blocks)
        self.seen.recomputed += not victim.host_blocks
        return victim

    def _on_execute(self, plan, *on_prompt):
        self.seen.scattered += sum(not row.sequence.contiguous for row in plan.rows)
        self.seen.chunks += sum(row.start + row.count < len(row.sequence.token_ids) for row in plan.rows)
        return self.execute(plan, *on_prompt)

    def take(self) -> Seen:
        """What was seen since the last time."""
        seen, self.seen = self.seen, Seen()
        seen.hits, self.hits = self.stats.prefix_hit_tokens - self.hits, self.stats.prefix_hit_tokens
        return seen


def generate(rank: int, folder: Path, setting: Setting, asks: Sequence[Ask], store: str):
    """What this rank gets and sees in each round: [(outputs in the order of `asks`, Seen), ...]."""
    replica = replica_of(setting, rank, folder, store)
    engine = replica.engine()
    spy, requests = Spy(engine), requests_for(replica, asks)
    calls = [[request] for request in requests] if setting.alone else [requests]
    rounds = []
    for number in range(setting.rounds):
        outputs = []
        for place, call in enumerate(calls):
            outputs += run_everywhere(replica, engine, call, key=f"{number}/{place}")
        rounds.append((outputs, spy.take()))
        assert_idle(engine)
    return rounds


def assert_as_expected(asks: Sequence[Ask], outputs: Sequence[RequestOutput], expected: Sequence[Expected]) -> None:
    for ask, output, want in zip(asks, outputs, expected, strict=True):
        assert output.request_id == str(ask.place) and output.prompt_token_ids == list(ask.prompt)
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in want.completions], ask
        for index, (one, wanted) in enumerate(zip(output.outputs, want.completions, strict=True)):
            assert (one.index, one.finish_reason) == (index, wanted.reason)
            assert one.cumulative_logprob == pytest.approx(sum(wanted.logprobs), abs=len(one.token_ids) * TOLERANCE)
            assert (one.logprobs is None) == (ask.params.logprobs is None)
            if one.logprobs is not None:
                assert_logprobs(one.logprobs, one.token_ids, wanted.logprobs, ask.params.logprobs)
        assert (output.prompt_logprobs is None) == (ask.params.prompt_logprobs is None)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs[0] is None
            assert_logprobs(output.prompt_logprobs[1:], ask.prompt[1:], want.prompt, ask.params.prompt_logprobs)


def assert_logprobs(entries, token_ids, logprobs, most: int) -> None:
    for entry, token, logprob in zip(entries, token_ids, logprobs, strict=True):
        assert next(iter(entry)) == token and max(most, 1) <= len(entry) <= most + 1
        assert entry[token].logprob == pytest.approx(logprob, abs=TOLERANCE)


# ---- every setting gives the same


SMALL = {"block_size": 4, "max_num_seqs": 13, "max_num_batched_tokens": 13}
TIGHT = {**SMALL, "num_kv_blocks": 26}
"""Room for two or three sequences."""
GIB_A_BLOCK = 2 * 4 * 2 * 8 * 4 * 3 / 2**30
"""A block of 4 tokens, 2 KV heads, 8 float32 each, in 3 layers, keys and values."""
SWAP = {**TIGHT, "swap_space": 60 * GIB_A_BLOCK}
OVERLAP = {"async_scheduling": True}
"""Results come a step late, as on a GPU."""
SETTINGS = {
    "together": Setting(),
    "alone": Setting(alone=True, engine={"enable_prefix_caching": False}),
    "chunks of 7": Setting(engine={"block_size": 4, "max_num_batched_tokens": 7, "max_num_seqs": 5}),
    "blocks of 1": Setting(engine={"block_size": 1, "max_num_batched_tokens": 40, "max_num_seqs": 40}),
    "one place": Setting(engine={"max_num_seqs": 1}),
    "all cached": Setting(rounds=2, engine={"block_size": 4}),
    "recomputed": Setting(rounds=2, engine=TIGHT),
    "recomputed, no prefix cache": Setting(engine={**TIGHT, "enable_prefix_caching": False}),
    "swapped": Setting(engine=SWAP),
    "swapped and recomputed": Setting(engine={**TIGHT, "swap_space": 4 * GIB_A_BLOCK}),
    "overlap": Setting(engine=OVERLAP),
    "overlap, recomputed": Setting(engine={**TIGHT, **OVERLAP}),
    "overlap, tp2 pp2 swapped": Setting(layout=Layout(2, 2, 1), engine={**SWAP, **OVERLAP}),
    "pp2": Setting(layout=Layout(1, 2, 1), engine=SMALL),
    "dp2": Setting(layout=Layout(1, 1, 2), engine=SMALL),
    "pp2 swapped": Setting(layout=Layout(1, 2, 1), engine={**TIGHT, "swap_space": 120 * GIB_A_BLOCK}),
    "pp3 swapped": Setting(layout=Layout(1, 3, 1), engine=SWAP),
    "tp3 recomputed": Setting(layout=Layout(3, 1, 1), engine=TIGHT),
    "pp2 dp2 async": Setting(layout=Layout(1, 2, 2), engine={**SMALL, "max_num_seqs": 3}, dp_mode="async"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_else_changes_a_result(name, tiny, ranks, expected, tmp_path):
    setting = SETTINGS[name]
    answers = ranks(setting.layout.size).run(generate, tiny(*MODEL), setting, ASKS, str(tmp_path / "store"))
    for rounds in answers:
        for (outputs, _), (same, _) in zip(rounds, answers[0], strict=True):
            assert_as_expected(ASKS, outputs, expected)
            assert outputs == same, "every rank gets the same"
    seen = [[one for _, one in rounds] for rounds in answers]
    assert_it_happened(name, setting, seen)
    if setting.dp_mode == "sync":
        assert {output.replica for outputs, _ in answers[0] for output in outputs} == set(range(setting.layout.dp))


def assert_it_happened(name: str, setting: Setting, seen: list[list[Seen]]) -> None:
    """The setting did what it is there for, on every rank, and the ranks of a replica in the same way."""
    first = seen[0][0]
    if setting.layout.dp == 1:
        assert all(rounds == seen[0] for rounds in seen)
    for rounds in seen:
        assert all(one.recomputed > 0 for one in rounds) == ("recomputed" in name)
        assert all(one.swapped > 0 for one in rounds) == ("swapped" in name)
        assert all(one.scattered > 0 for one in rounds) or "num_kv_blocks" not in setting.engine
    # Which replica gets a long prompt depends on the clock when they share a queue.
    whole = [seen] if setting.dp_mode == "async" else [[rounds] for rounds in seen]
    chunked = [sum(one.chunks for one in round_) > 0 for ranks in whole for round_ in zip(*ranks, strict=True)]
    assert chunked == [setting.engine.get("max_num_batched_tokens", 256) < 45] * len(chunked)
    if name == "alone":  # without a prefix cache
        assert first.hits == hits(16, siblings_only=True) > 0
    if name == "all cached":
        assert seen[0][1].hits == hits(4)
    if name == "recomputed":
        assert seen[0][1].hits > 0


def hits(block_size: int, *, siblings_only: bool = False) -> int:
    """Tokens that ASKS find in a cache that knows every prompt, or only what a request's first sample has computed.

    The last token is computed in any case, and so is all of a prompt whose log-probabilities are wanted.
    """
    count = 0
    for ask in ASKS:
        known = (len(ask.prompt) - 1) // block_size * block_size
        siblings = (ask.params.best_of or ask.params.n) - 1
        count += known * (siblings + (not siblings_only and ask.params.prompt_logprobs is None))
    return count


# ---- windows and soft caps


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2_window", "phi3"])
def test_windows_slide_over_a_scattered_cache(family, tiny, reference, ranks, tmp_path):
    """Every prompt and output is longer than the window, blocks are shared, scattered, lost and computed again."""
    prompts = [SHARED, SHARED[:20] + LONG[:9], LONG[:3], LONG[:31]]
    wanted = [
        Expected([Completion(made.tokens, _picked(made.logprobs[len(made.prompt) - 1 :], made.tokens), "length")], [])
        for made in reference(family, prompts, 24)
    ]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    asks = [Ask(place, tuple(prompt), params) for place, prompt in enumerate(prompts)]
    engine = {"block_size": 2, "max_num_seqs": 7, "max_num_batched_tokens": 7, "num_kv_blocks": 48}
    for swap_space in (0.0, 1e-4):
        setting = Setting(rounds=2, engine={**engine, "swap_space": swap_space})
        [rounds] = ranks(1).run(generate, tiny(family), setting, asks, str(tmp_path / f"store{swap_space}"))
        for outputs, seen in rounds:
            assert_as_expected(asks, outputs, wanted)
            assert seen.scattered and seen.chunks and (seen.swapped if swap_space else seen.recomputed)
        assert rounds[1][1].hits > 0


def _picked(logprobs: torch.Tensor, token_ids: Sequence[int]) -> list[float]:
    return [logprobs[place, token].item() for place, token in enumerate(token_ids)]


# ---- layers with a state of each sequence

STATEFUL = {
    "overlap": Setting(engine={**SMALL, **OVERLAP}),
    "recomputed": Setting(engine={**TIGHT, "swap_space": 1.0}),  # nothing can be swapped out
    "overlap, tp2 pp2 recomputed": Setting(layout=Layout(2, 2, 1), engine={**TIGHT, **OVERLAP}),
}


@pytest.mark.parametrize("family, names", [("qwen3_next", tuple(STATEFUL)), ("granitemoehybrid", ("recomputed",))])
def test_states_follow_their_sequences(family, names, tiny, ranks, tmp_path):
    """What a sequence gets is what it gets alone, see test_engine_matrix, and nothing comes from a prefix cache."""
    asks = ASKS[:5]
    [[(alone, _)]] = ranks(1).run(generate, tiny(family), Setting(alone=True), asks, str(tmp_path / "alone"))
    wanted = [_as_expected(output) for output in alone]
    for name in names:
        setting = STATEFUL[name]
        answers = ranks(setting.layout.size).run(generate, tiny(family), setting, asks, str(tmp_path / name))
        for outputs, seen in (round_ for rounds in answers for round_ in rounds):
            assert_as_expected(asks, outputs, wanted)
            assert seen.hits == seen.swapped == 0 and seen.chunks and (seen.recomputed > 0) == ("recomputed" in name)


def _as_expected(output: RequestOutput) -> Expected:
    def logprobs(entries, token_ids: Sequence[int]) -> list[float]:
        return [entry[token].logprob for entry, token in zip(entries, token_ids, strict=True)]

    completions = [
        Completion(one.token_ids, logprobs(one.logprobs or [], one.token_ids if one.logprobs else []), "length")
        for one in output.outputs
    ]
    for one, completion in zip(output.outputs, completions, strict=True):
        if not completion.logprobs:
            completion.logprobs.append(one.cumulative_logprob)
    prompt = output.prompt_logprobs
    return Expected(completions, logprobs(prompt[1:], output.prompt_token_ids[1:]) if prompt else [])


# ---- stop strings


@pytest.fixture(scope="module")
def talking(tiny, tmp_path_factory) -> Path:
    """The model with a tokenizer."""
    return with_tokenizer(tiny(*MODEL), tmp_path_factory.mktemp("talking") / "model")


@pytest.fixture(scope="module")
def unstopped(talking, ranks, tmp_path_factory) -> list[tuple[Ask, CompletionOutput]]:
    """Requests, and the outputs that nothing stops; a layout changes none of them."""
    free = [Ask(place, SHORT[place], SamplingParams(max_tokens=40, ignore_eos=True, seed=place)) for place in range(6)]
    [[(outputs, _)]] = ranks(1).run(generate, talking, Setting(), free, str(tmp_path_factory.mktemp("free") / "store"))
    return [(ask, output.outputs[0]) for ask, output in zip(free, outputs, strict=True)]


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [(Layout(), False), (Layout(), True), (Layout(2, 1, 1), True), (Layout(1, 3, 1), False), (Layout(1, 3, 1), True)],
    ids=str,
)
def test_stop_strings_end_every_stage(layout, overlap, talking, unstopped, ranks, tmp_path):
    setting = Setting(layout=layout, engine={**SMALL, "num_kv_blocks": 40, "async_scheduling": overlap})
    text_of = Tokenizer.load(talking).decode
    stopped, wanted = [], []
    for ask, one in unstopped:
        stop = one.text[8:11] if ask.place % 2 else one.text[9]
        changes = {"stop": ["never written", stop], "min_tokens": 0}
        # the output ends with the first token that completes the text
        length = next(n for n in range(41) if stop in text_of(one.token_ids[:n]))
        text = one.text[: one.text.index(stop)]
        if ask.place > 3:
            changes["include_stop_str_in_output"] = True
            text += stop
        stopped.append(replace(ask, params=replace(ask.params, **changes)))
        wanted.append((one.token_ids[:length], text, "stop", stop))
    for rounds in ranks(layout.size).run(generate, talking, setting, stopped, str(tmp_path / "stopped")):
        got = [output.outputs[0] for output in rounds[0][0]]
        assert [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in got] == wanted


def test_no_stop_string_before_min_tokens(talking, ranks, tmp_path):
    free = [Ask(0, SHORT[0], SamplingParams(max_tokens=60, ignore_eos=True, seed=4, logit_bias={50: 7.0}))]
    run = ranks(1).run
    [[([output], _)]] = run(generate, talking, Setting(), free, str(tmp_path / "free"))
    ids, character = output.outputs[0].token_ids, Tokenizer.load(talking).decode([50], skip_special_tokens=True)
    first, *later = [place for place, token in enumerate(ids, 1) if token == 50]
    later = [place for place in later if place > first + 1]
    assert later, "the character comes again after min_tokens"
    params = replace(free[0].params, stop=character, min_tokens=first + 1)
    [[([output], _)]] = run(generate, talking, Setting(), [replace(free[0], params=params)], str(tmp_path / "stopped"))
    assert output.outputs[0].token_ids == ids[: later[0]] and output.outputs[0].stop_reason == character


# ---- leaving off, and what comes after


def leave_off(rank: int, folder: Path, setting: Setting, asks: Sequence[Ask], store: str, after: int):
    """Run, stop after some steps, then run what is left on the same engine: (outputs before, outputs of the rest)."""
    replica = replica_of(setting, rank, folder, store)
    engine, requests = replica.engine(), requests_for(replica, asks)
    before: list[RequestOutput] = []
    steps = []
    hooks = Hooks(on_output=before.append, on_step=steps.append, stop_requested=lambda: len(steps) >= after)
    assert not engine.run(make_feed(replica, requests, "first"), hooks)
    assert_idle(engine)
    state = replica.state
    names = json.dumps([output.request_id for output in before]).encode() if state.is_control else None
    done = json.loads(broadcast_bytes(names, state.control_rank))
    rest = [request for request in requests if request.id not in done]
    return before, run_everywhere(replica, engine, rest, key="second")


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 2, 1)], ids=str)
def test_a_stopped_engine_goes_on_with_the_rest(layout, tiny, ranks, expected, tmp_path):
    setting, asks = Setting(layout=layout, engine=SWAP), ASKS[:9]
    answers = ranks(layout.size).run(leave_off, tiny(*MODEL), setting, asks, str(tmp_path / "store"), 30 * layout.pp)
    [before] = [before for before, _ in answers if before]
    assert 0 < len(before) < len(asks)
    for _, rest in answers:
        outputs = sorted([*before, *rest], key=lambda output: int(output.request_id))
        assert_as_expected(asks, outputs, expected[: len(asks)])


def interrupt(rank: int, folder: Path, asks: Sequence[Ask], store: str):
    """Ctrl-C in the middle of a run, then the whole run again."""
    replica = replica_of(Setting(engine=SWAP), rank, folder, store)
    engine, requests = replica.engine(), requests_for(replica, asks)
    steps = []

    def on_step(count: int) -> None:
        steps.append(count)
        if len(steps) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(make_feed(replica, requests, "first"), Hooks(on_step=on_step))
    assert_idle(engine)
    return run_everywhere(replica, engine, requests, key="second")


def test_an_interrupted_engine_can_be_used_again(tiny, ranks, expected, tmp_path):
    [outputs] = ranks(1).run(interrupt, tiny(*MODEL), ASKS, str(tmp_path / "store"))
    assert_as_expected(ASKS, outputs, expected)


def hurried(rank: int, folder: Path, asks: Sequence[Ask], store: str) -> tuple[int, int]:
    """Requests that this replica finished, and the most it had at once, when replica 1 takes four times as long."""
    setting = Setting(layout=Layout(1, 2, 2), dp_mode="async", engine={"max_num_seqs": 2})
    replica = replica_of(setting, rank, folder, store)
    engine, requests = replica.engine(), requests_for(replica, asks)
    feed, had = make_feed(replica, requests, "queue"), []
    slow, steps, over = replica.state.coord.dp == 1, Path(f"{store}-steps"), Path(f"{store}-over")

    def on_step(count: int) -> None:
        had.append(len(engine.scheduler._unfinished) + engine.channel.num_arriving)
        if not slow and replica.state.coord.pp == 1:
            with steps.open("a") as file:
                file.write(".")
        if slow:
            ahead = lambda: steps.exists() and steps.stat().st_size >= 4 * len(had)  # noqa: E731
            wait_until(lambda: over.exists() or ahead(), "replica 0 is ahead")

    assert engine.run(feed, Hooks(on_step=on_step))
    if not slow:
        over.touch()
    return engine.finished, max(had, default=0)


def test_a_free_replica_takes_more_work(tiny, ranks, tmp_path):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    asks = [Ask(place, SHORT[place], params) for place in range(24)]
    _, (fast, most), _, (slow, some) = ranks(4).run(hurried, tiny(*MODEL), asks, str(tmp_path / "store"))
    assert fast + slow == 24 and fast >= 2 * slow > 0
    assert max(most, some) <= 2 + LOOKAHEAD, "no replica keeps work that another could do"


def texts(rank: int, folder: Path, store: str) -> list[str | None]:
    """Prompts as the results of a second call show them; the first call's were texts, the second's are token ids."""
    replica = replica_of(Setting(layout=Layout(1, 1, 2)), rank, folder, store)
    engine, limits = replica.engine(), prompt_limits(replica)
    params = [SamplingParams(max_tokens=length) for length in (3, 9)]
    shown = []
    for prompts, lengths in ((["ab", "cd"], params), ([[5, 6], [7, 8]], params[::-1])):
        made = [make_request(p, q, limits, i) for i, (p, q) in enumerate(zip(prompts, lengths, strict=True))]
        outputs = run_everywhere(replica, engine, made, key=str(len(shown)))
        shown.append([(output.prompt, output.replica) for output in outputs])
        assert_idle(engine)
    return shown


def test_texts_of_one_call_do_not_show_up_in_the_next(talking, ranks, tmp_path):
    shown = ranks(2).run(texts, talking, str(tmp_path / "store"))
    assert shown == [[[("ab", 1), ("cd", 0)], [(None, 0), (None, 1)]]] * 2


def prepared(rank: int, folder: Path, given: dict[str, list], store: str) -> dict[str, object]:
    """Of each case what the ranks make of `given`, one entry a rank: ids, or why not; and who tokenised how often."""
    replica = replica_of(Setting(layout=Layout(1, 2, 2)), rank, folder, store)
    limits, encode, encoded = prompt_limits(replica), replica.tokenizer.encode_batch, []
    replica.tokenizer.encode_batch = lambda texts, **options: encoded.append(len(texts)) or encode(texts, **options)
    found = {}
    for case, each in given.items():
        asked = [
            RawRequest(
                prompt=prompt, params=SamplingParams(**params), id=str(place), index=place, where=f"prompts[{place}]"
            )
            for place, (prompt, params) in enumerate(each[rank % len(each)])
        ]
        try:
            made = prepare(replica, asked, limits)
            refused = [one for one in made if isinstance(one, ConfigError)]
            found[case] = str(refused[0]) if refused else [(r.prompt_token_ids, r.seed, r.prompt) for r in made]
        except ConfigError as error:
            found[case] = str(error)
    return {**found, "encoded": sum(encoded)}


def test_ranks_are_given_the_same_and_tokenise_it_once_a_replica(talking, ranks, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    same = [("one text", {}), (chat, {"seed": 3}), ([5, 6, 7], {}), ("Grüße 🙂", {"n": 2})]
    other = {
        "a text": [("another text", {}), *same[1:]],
        "a text as long": [("one test", {}), *same[1:]],
        "a chat": [same[0], ([{"role": "user", "content": "ho"}], {"seed": 3}), *same[2:]],
        "ids": [*same[:2], ([5, 6, 8], {}), same[3]],
        "a parameter": [("one text", {"temperature": 0.5}), *same[1:]],
        "a seed": [*same[:1], (chat, {"seed": 4}), *same[2:]],
        "more of them": [*same, ("one more", {})],
        "fewer of them": same[:3],
        "the order": same[::-1],
        "a prompt that can't run": [("", {}), *same[1:]],
    }
    given = {"same": [same], "refused": [[*same, ("x" * 500, {})]]}
    given |= {name: [same, same, same, case] for name, case in other.items()}
    given |= {"two of them": [same, other["ids"], same, other["a seed"]], "same again": [same]}
    results = ranks(4).run(prepared, talking, given, str(tmp_path / "store"))
    tokenizer = Tokenizer.load(talking)
    texts = ["one text", tokenizer.chat_text(chat), None, same[3][0]]
    ids = [
        tokenizer.encode(texts[0]),
        tokenizer.encode(texts[1], add_special_tokens=False),
        [5, 6, 7],
        tokenizer.encode(texts[3]),
    ]
    for found in results:
        assert [(list(i), text) for i, _, text in found["same"]] == list(zip(ids, texts, strict=True))
        assert found["same again"] == found["same"] and found["same"][1][1] == 3
        assert "prompts[4]: the prompt has" in found["refused"]
        for case in other:
            assert "prompts and sampling parameters: rank 3 has others than rank 0" in found[case], case
        assert "ranks 1, 3 have others than rank 0" in found["two of them"]
    assert [found["encoded"] for found in results] == [0, 10, 0, 10], "the control ranks, and nothing that differs"


def out_of_step(rank: int, folder: Path, asks: Sequence[Ask], store: str) -> None:
    replica = replica_of(Setting(layout=Layout(1, 2, 1)), rank, folder, store)
    engine = replica.engine()
    engine.scheduler._cache_age += rank == 0
    run_everywhere(replica, engine, requests_for(replica, asks), key="")


def test_a_rank_out_of_step_is_noticed(tiny, ranks, tmp_path):
    with pytest.raises(
        AssertionError, match="the scheduler of rank 0 differs from that of its control rank 1 at step 0"
    ):
        ranks(2).run(out_of_step, tiny(*MODEL), ASKS[:2], str(tmp_path / "store"))


# ---- step by step, as a server would


def served(rank: int, folder: Path, layout: Layout, overlap: bool, store: str):
    """Requests that only the control rank knows, streamed; one is given up on the way. (outputs, deltas, steps)."""
    replica = replica_of(Setting(layout=layout, engine={**SMALL, "async_scheduling": overlap}), rank, folder, store)
    engine = replica.engine()
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=1, n=2, stop="never written", logit_bias={7: 2.0})
    asks = [Ask(place, SHORT[place], params) for place in range(4)]
    requests = [replace(request, stream=True) for request in requests_for(replica, asks)]
    outputs, deltas, told = [], [], []

    def news(room: int) -> News:
        told.append(room)
        if len(told) <= len(requests):
            return News(requests=(requests[len(told) - 1],))
        return News(aborts=("1",) if len(told) == 12 else (), exhausted=len(told) > 12)

    ended = False
    while not ended:
        events = engine.step(news)
        outputs += events.outputs
        deltas += events.deltas
        ended = events.ended
    assert_idle(engine)
    return outputs, deltas, told


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("layout", [Layout(), Layout(2, 2, 1)], ids=str)
def test_requests_come_and_tokens_go_step_by_step(overlap, layout, talking, ranks, tmp_path):
    answers = ranks(layout.size).run(served, talking, layout, overlap, str(tmp_path / "store"))
    [(outputs, deltas, _)] = [answer for answer in answers if answer[2]]
    assert sum(bool(found) for found, _, _ in answers) == 1, "on the control rank"
    assert sorted(output.request_id for output in outputs) == ["0", "1", "2", "3"]
    for output in outputs:
        for sample in output.outputs:
            gained = [d for d in deltas if (d.request_id, d.index) == (output.request_id, sample.index)]
            assert "".join(delta.text for delta in gained) == sample.text
            assert [token for delta in gained for token in delta.token_ids] == sample.token_ids
            assert [entry for delta in gained for entry in delta.logprobs or []] == sample.logprobs
            assert [delta.finish_reason for delta in gained] == [None] * (len(gained) - 1) + [sample.finish_reason]
            assert sample.finish_reason == ("abort" if output.request_id == "1" else "length")
            assert len(sample.token_ids) == 24 or output.request_id == "1"


def test_a_message_carries_whole_requests():
    params = SamplingParams(logit_bias={3: 1.5}, stop=["a", "b"], stop_token_ids=[4], bad_words=["x y"], seed=2**62)
    sent = Request(
        id="é",
        prompt="text",
        prompt_token_ids=(1, 2),
        params=params,
        seed=2**63 - 1,
        max_tokens=7,
        stop_token_ids=frozenset([4, 2]),
        bad_words=((1, 2), (3,)),
        stream=True,
    )
    assert channel.read_payload(News(requests=(sent,), aborts=("b",)).payload()) == ((sent,), ("b",))


# ---- replay: a request that another replica had begun


_DRAWN = SamplingParams(max_tokens=14, ignore_eos=True, seed=4)
REPLAYED = [
    (SHORT[0], replace(_DRAWN, temperature=0, repetition_penalty=1.3, logprobs=1)),
    (SHORT[1], replace(_DRAWN, n=3, frequency_penalty=0.8)),
    (SHORT[2], replace(_DRAWN, min_tokens=5, stop_token_ids=list(range(3, 60)))),
    (LONG, replace(_DRAWN, top_p=0.9, prompt_logprobs=1, n=2)),
]
Begun = tuple[tuple[tuple[int, ...], ...], frozenset[int]]
"""What Request.given and Request.ended say."""


def streamed(rank: int, folder: Path, setting: Setting, asks: Sequence, begun: Sequence[Begun], store: str):
    """Outputs and deltas of requests that other replicas have begun; on the control rank."""
    replica = replica_of(setting, rank, folder, store)
    engine = replica.engine()
    made = zip(make_requests(replica, asks), begun, strict=True)
    requests = tuple(replace(one, stream=True, given=given, ended=ended) for one, (given, ended) in made)
    said = iter([News(requests=requests)])
    outputs, deltas, events = {}, [], None
    while events is None or not events.ended:
        events = engine.step(lambda room: next(said, News(exhausted=True)))
        outputs |= {int(output.request_id): output for output in events.outputs}
        deltas += events.deltas
    assert_idle(engine)
    return [output for _, output in sorted(outputs.items())], deltas


def of(deltas: Sequence[TokenDelta], output: RequestOutput, index: int) -> list[TokenDelta]:
    return [delta for delta in deltas if (delta.request_id, delta.index) == (output.request_id, index)]


def token_ids(deltas: Sequence[TokenDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [(Layout(), 1), (Layout(2, 1, 1), 1), (Layout(1, 2, 1), 1), (Layout(1, 3, 1), 0)],
    ids=str,
)
def test_a_replay_goes_on_with_the_same_tokens(layout, overlap, talking, ranks, tmp_path):
    """Cut anywhere, also where what was given out ends a sample or completes a stop string, and nobody heard of it."""
    setting = Setting(layout=layout, engine={**SMALL, "async_scheduling": bool(overlap)})

    def run(asks, begun, name):
        answers = ranks(layout.size).run(streamed, talking, setting, asks, begun, str(tmp_path / name))
        return next(answer for answer in answers if answer[0])

    unstopped = run(REPLAYED[1:2], [((), frozenset())], "unstopped")[0][0].outputs
    stops = [unstopped[0].text[8:12], unstopped[2].text[3:5]]
    spelt = {"regex": "[a-z]{5}"}  # which ends by itself
    asks = [
        *REPLAYED,
        (SHORT[1], replace(REPLAYED[1][1], stop=stops)),
        (SHORT[4], replace(_DRAWN, structured_outputs=spelt)),
    ]
    outputs, deltas = run(asks, [((), frozenset())] * len(asks), "plain")
    assert outputs[4].outputs[0].stop_reason in stops and len(outputs[5].outputs[0].text) == 5
    begun, had = [], []
    cuts = range(16) if layout.size == 1 else (0, 3, 8, 11, 15)
    for cut in cuts:
        for output in outputs:
            streams = [of(deltas, output, sample.index) for sample in output.outputs]
            # the first sample never ends where others go on, and each is cut at another place
            counts = [min(cut + 3 * place, len(each) - (place == 0)) for place, each in enumerate(streams)]
            had.append([each[:count] for each, count in zip(streams, counts, strict=True)])
            ended = frozenset(place for place, each in enumerate(streams) if counts[place] == len(each))
            begun.append((tuple(map(token_ids, had[-1])), ended))
    again, rest = run(asks * len(cuts), begun, "again")
    for other, output, before, (given, ended) in zip(again, outputs * len(cuts), had, begun, strict=True):
        assert other.metrics.num_generation_tokens == output.metrics.num_generation_tokens
        if output.prompt_logprobs and of(rest, other, 0)[0].token_ids:  # else nothing was left to compute
            assert list(map(bool, other.prompt_logprobs)) == [False] + [True] * (len(LONG) - 1)
        for place, (sample, same) in enumerate(zip(output.outputs, other.outputs, strict=True)):
            known, after = len(given[place]), of(rest, other, place)
            assert same.token_ids == sample.token_ids and same.text == sample.text
            assert (same.finish_reason, same.stop_reason) == (sample.finish_reason, sample.stop_reason)
            assert same.token_logprobs[known:] == pytest.approx(sample.token_logprobs[known:], abs=TOLERANCE)
            assert same.cumulative_logprob == pytest.approx(sum(same.token_logprobs[known:]))
            assert all(map(math.isnan, same.token_logprobs[:known]))
            if sample.logprobs is not None:
                assert [bool(entry) for entry in same.logprobs] == [place >= known for place in range(14)]
            assert "".join(delta.text for delta in [*before[place], *after]) == sample.text
            assert list(token_ids([*before[place], *after])) == sample.token_ids
            assert [delta.finish_reason for delta in after][-1:] == [sample.finish_reason] * (place not in ended)


def test_a_request_that_cannot_run_costs_itself_only(tiny, ranks, tmp_path):
    """Beside one that can; and one all of whose samples had ended is given out at once."""
    [(outputs, _)] = ranks(1).run(refused_beside, tiny(*MODEL), str(tmp_path / "store"))
    assert [output.error is None for output in outputs] == [False, False, True, True]
    assert "exceed max_model_len" in outputs[0].error and "is not 1 outputs" in outputs[1].error
    for output in outputs[:2]:
        assert [(one.finish_reason, one.token_ids) for one in output.outputs] == [("error", [])]
    assert outputs[2].outputs[0].token_ids == list(range(3, 17)) and outputs[2].outputs[0].finish_reason == "length"
    assert len(outputs[3].outputs[0].token_ids) == 14


def refused_beside(rank: int, folder: Path, store: str):
    replica = replica_of(Setting(), rank, folder, store)
    engine = replica.engine()
    good = make_requests(replica, [(SHORT[0], _DRAWN)])[0]
    given = tuple(range(3, 17))
    requests = (
        replace(good, id="long", max_tokens=MAX_MODEL_LEN),
        replace(good, id="odd", given=(given, given)),
        replace(good, id="over", given=(given,), ended=frozenset([0])),
        good,
    )
    said, outputs, events = iter([News(requests=requests)]), [], None
    while events is None or not events.ended:
        events = engine.step(lambda room: next(said, News(aborts=("unknown",), exhausted=True)))
        outputs += events.outputs
    assert_idle(engine)
    return outputs, None


def test_news_reaches_a_stage_past_those_that_compute(ranks, tmp_path):
    """Each of three stages takes the message only once the one before it has it, whichever comes first."""
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        found = ranks(4).run(one_after_another, order, str(tmp_path / f"store{order[0]}"))
        assert found == [("stop me",)] * 4


def one_after_another(rank: int, order: list[int], path: str) -> tuple[str, ...]:
    state, store = ParallelState(Layout(pp=4)), dist.FileStore(path, 4)
    mail = channel.ReplicaChannel(state)
    if state.is_control:
        mail.send(channel.StepMessage((), News(aborts=("stop me",))))
    else:
        place = order.index(rank)
        if place:
            store.wait([f"{order[place - 1]} has it"])
    aborts = mail.receive(0).news.aborts
    store.set(f"{rank} has it", "")
    return aborts
