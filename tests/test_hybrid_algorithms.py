"""What is learnt from rewarded samples, against formulas written out; samples on their way; the log of a job."""

import json
import math
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.config.hybrid_rules import hybrid_rules
from megalite.config.rules import Rules
from megalite.config.schema import HybridConfig, HybridSection, SamplingParams, SupervisedSection
from megalite.hybrid.algorithms import (
    Agreement,
    PolicyLoss,
    agreement,
    best_of_group,
    group_advantages,
    importance_weights,
)
from megalite.hybrid.learner import UpdateResult
from megalite.hybrid.log import HybridLog
from megalite.hybrid.rollout import Rollout, ScoredRollout, pack_groups, rollout_file, unpack_groups, write_rollouts
from megalite.model import families
from megalite.monitor.collector import Meter
from megalite.train.micro_batch import from_sequences

MODEL = families.read(Path(__file__).resolve().parent.parent / "checkpoints" / "demo")

# ---- advantages, choices, weights


def test_an_advantage_is_the_distance_from_the_mean_of_the_group():
    assert group_advantages([1, 0, 0, 1], divide=False) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1, 0, 0, 1], divide=True) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    rewards = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.tensor(group_advantages(rewards.tolist(), divide=True), dtype=torch.float64)
    torch.testing.assert_close(found, (rewards - rewards.mean()) / rewards.std(correction=0), rtol=1e-4, atol=0)


NUMBERS = st.floats(-1e6, 1e6)


@given(NUMBERS, st.integers(1, 70), st.booleans())
def test_a_group_of_equals_teaches_nothing(reward, size, divide):
    """To the bit: Adam makes a whole step of 1e-11 too."""
    assert group_advantages([reward] * size, divide=divide) == [0.0] * size
    noisy = [reward * (1 + 2e-16 * (place % 3)) for place in range(size)]
    assert group_advantages(noisy, divide=divide) == [0.0] * size, "what differs is rounding"


@given(st.lists(NUMBERS, min_size=2, max_size=20), st.booleans())
def test_a_difference_teaches(rewards, divide):
    found = group_advantages(rewards, divide=divide)
    if max(rewards) - min(rewards) > 1e-6 * max(1, *map(abs, rewards)):
        assert max(found) > 0 > min(found)
        assert sum(found) == pytest.approx(0, abs=1e-6 * sum(map(abs, found)))


NOT_SHAPING = {"n", "best_of", "temperature", "max_tokens", "seed", "stop", "stop_token_ids", "logprobs"}
NOT_SHAPING |= {
    "detokenize",
    "flat_logprobs",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
}


@pytest.mark.parametrize("name", sorted({field.name for field in fields(SamplingParams)} - NOT_SHAPING))
def test_what_nothing_corrects_for_is_refused(name):
    """Whatever else changes what a sample is drawn from; a new parameter has to be thought about."""
    value = {"top_p": 0.9, "min_p": 0.1, "logit_bias": {3: 1.0}, "repetition_penalty": 1.1}.get(name, 1)
    for algorithm in ("grpo", "rejection"):
        config = HybridConfig(
            hybrid=HybridSection(algorithm=algorithm, reward="a:b"),
            sampling=replace(SamplingParams(max_tokens=4), **{name: value}),
        )
        rules = Rules(config)
        hybrid_rules(rules, None)
        found = [one for one in rules.problems if one.key == f"sampling.{name}"]
        assert bool(found) == (algorithm == "grpo")
        assert all("nothing corrects for that" in one.rule for one in found)


def test_the_best_of_a_group_is_the_first_of_equals_and_above_the_bar():
    assert best_of_group([0.2, 0.9, 0.9, 0.1], above=0.0) == 1
    assert best_of_group([0.2, 0.9], above=0.9) is None
    assert best_of_group([0.0, 0.0], above=0.0) is None


def test_importance_weights_are_ratios_cut_at_the_limit():
    trainer, sampler = [-1.0, -2.0, -5000.0, -1.0], [-1.5, -1.0, -1.0, -5000.0]
    weigh = {kind: importance_weights(trainer, sampler, kind=kind, limit=2.0) for kind in ("off", "token")}
    assert weigh["off"] == [1.0] * 4
    assert weigh["token"] == pytest.approx([math.exp(0.5), math.exp(-1), 0.0, 2.0])
    whole = importance_weights(trainer[:2], sampler[:2], kind="sequence", limit=2.0)
    assert whole == pytest.approx([math.exp(-0.5)] * 2)


def test_agreement_is_over_the_tokens_of_all_samples():
    found = agreement([(-1.0, -2.0), (-3.0,)], [(-1.0, -2.1), (-3.005,)])
    assert found.share_off == pytest.approx(1 / 3)
    assert (found.largest, found.mean) == (pytest.approx(0.1), pytest.approx(0.105 / 3))
    assert agreement([], []) == Agreement()


# ---- the loss


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_policy_loss_is_the_formula(kl):
    """Loss and gradient of each token by the formula in plain numbers, with ratios on both sides of both bounds."""
    ratios = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0]
    cases = [(ratio, advantage) for ratio in ratios for advantage in (-1.5, 0.0, 2.0)]
    count = len(cases)
    generator = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(count, generator=generator)
    reference, importance = -3 * torch.rand(count, generator=generator), 0.1 + torch.rand(count, generator=generator)
    values = {
        "old": old.tolist(),
        "advantage": [advantage for _, advantage in cases],
        "importance": importance.tolist(),
        "reference": reference.tolist(),
    }
    batch = from_sequences([range(count + 1)], [[1.0] * count], {name: [row] for name, row in values.items()})
    logprobs = (old + torch.tensor([ratio for ratio, _ in cases]).log()).requires_grad_()
    found = PolicyLoss(clip_low=0.2, clip_high=0.28, kl_coefficient=kl)(logprobs, batch)
    found.loss.sum().backward()
    for place, (ratio, advantage) in enumerate(cases):
        bounded = min(max(ratio, 0.8), 1.28)
        clipped = bounded * advantage < ratio * advantage
        weight, behind = float(importance[place]), float(reference[place] - logprobs[place].detach())
        distance = math.exp(behind) - behind - 1 if kl else 0.0
        wanted = -weight * min(ratio * advantage, bounded * advantage) + kl * distance
        slope = (0.0 if clipped else -weight * ratio * advantage) + kl * (1 - math.exp(behind))
        case = (ratio, advantage)
        assert float(found.loss[place].detach()) == pytest.approx(wanted, abs=1e-5), case
        assert float(logprobs.grad[place]) == pytest.approx(slope, abs=1e-5), case
        assert bool(found.metrics["clipped"][place]) == clipped, case
        assert float(found.metrics["kl"][place]) == pytest.approx(distance, abs=1e-5), case


# ---- samples on their way, and kept

ROLLOUT = Rollout(
    example=3,
    sample=1,
    prompt="def f(x):\n    'ä\0\u2028'",
    prompt_token_ids=(1, 2),
    token_ids=(5, 6, 0),
    text="\ud800 half a character",
    logprobs=(-0.1, -1e-30, -123.456),
    finish_reason="stop",
    weight_version=7,
)


def test_samples_arrive_as_they_were_sent():
    sent = [ROLLOUT, replace(ROLLOUT, sample=2, token_ids=(), logprobs=(), text="", finish_reason=None)]
    assert unpack_groups(pack_groups({12: sent, 3: []})) == {12: sent, 3: []}
    assert unpack_groups(pack_groups({})) == {}


def test_two_million_tokens_leave_time_for_other_threads():
    """One call that holds Python's lock for as long as it takes to write them as text would silence a rank.

    A busy machine may silence a thread as well, but not each time.
    """
    ids = tuple(range(8192))
    long = replace(ROLLOUT, token_ids=ids, logprobs=tuple(-one / 7 for one in ids))
    groups = {number: [long] * 8 for number in range(32)}
    assert any(longest_silence(groups) < 0.5 for _ in range(5))


def longest_silence(groups: dict) -> float:
    """Seconds of this process's own work in which another thread of it could not run, while the samples travel."""
    gaps, over = [0.0], threading.Event()

    def look() -> None:
        last = time.thread_time(), time.process_time()
        while not over.wait(0.001):
            now = time.thread_time(), time.process_time()
            gaps.append(now[1] - last[1] - (now[0] - last[0]))  # of this process' own work, not of a busy machine
            last = now

    watcher = threading.Thread(target=look)
    watcher.start()
    arrived = unpack_groups(pack_groups(groups))
    over.set()
    watcher.join()
    assert arrived == groups
    return max(gaps)


def test_samples_are_kept_with_what_became_of_them(tmp_path):
    scored = ScoredRollout(
        reward=0.25, failure="it raised ValueError", advantage=-1.5, trainer_logprobs=(-0.1, 0.0, -123.0)
    )
    rollout = replace(ROLLOUT, text="ä")
    path = rollout_file(tmp_path, 12)
    write_rollouts(path, 12, [rollout], [scored])
    [line] = path.open(encoding="utf-8")
    assert path.name == "iteration-000012.jsonl"
    assert json.loads(line) == {
        "iteration": 12,
        "example": 3,
        "sample": 1,
        "prompt": rollout.prompt,
        "prompt_token_ids": [1, 2],
        "token_ids": [5, 6, 0],
        "text": "ä",
        "finish_reason": "stop",
        "weight_version": 7,
        "sampler_logprobs": [-0.1, -1e-30, -123.456],
        "reward": 0.25,
        "failure": "it raised ValueError",
        "advantage": -1.5,
        "trainer_logprobs": [-0.1, 0.0, -123.0],
    }


# ---- the log


def record(folder) -> HybridLog:
    config = HybridConfig(
        hybrid=HybridSection(steps=3, samples_per_prompt=2), supervised=SupervisedSection(steps=2, examples_per_step=1)
    )
    return HybridLog(config, MODEL, folder, is_writer=True, meter=Meter(), peak=None)


def iterate(job: HybridLog, number: int, failures=(None,) * 4) -> None:
    rollouts = [replace(ROLLOUT, text="", sample=place) for place in (0, 1, 0, 1)]
    rewards = (0.0, 1.0, 0.0, 0.0)
    scored = [
        ScoredRollout(reward=one, failure=failure, advantage=0, trainer_logprobs=(0.0,) * 3)
        for one, failure in zip(rewards, failures, strict=True)
    ]
    job.begin()
    with job.meter.part("sampling"):
        pass
    metrics = {"loss": 1.0, "gradient_norm": 2.0}
    job.iteration(number, rollouts, UpdateResult(scored=scored, agreement=Agreement(), metrics=metrics))


def logged(folder) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "training" / "log.jsonl").open()]
    return [(key, line[key]) for line in lines for key in ("supervised_step", "iteration") if key in line]


def test_the_log_says_how_good_the_samples_are(tmp_path, capsys):
    job = record(tmp_path)
    job.resume(0, 0)
    iterate(job, 1)
    job.close()
    [line] = (json.loads(line) for line in (tmp_path / "training" / "log.jsonl").open())
    assert (line["reward"], line["reward_of_best"], line["length"], line["finished"]) == (0.25, 0.5, 3, 1)
    assert line["seconds"] >= line["seconds_sampling"] >= 0 and line["weight_version"] == 7
    assert "iteration 1/3  reward 0.250 (best of each prompt 0.500)" in capsys.readouterr().out


def test_the_log_says_why_rewards_failed(tmp_path, capsys):
    job = record(tmp_path)
    job.resume(0, 0)
    for number, failures in enumerate([("slow", None, "slow", None), ("slow", "odd", None, "odd")], 1):
        iterate(job, number, failures)
    job.close()
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rewards failed: slow" in said and "3 rewards failed, 2 of them for one reason: odd" in said


def test_a_job_that_goes_on_forgets_what_it_will_do_again(tmp_path):
    """Lines of work after the checkpoint go, and a torn one; earlier ones stay."""
    job = record(tmp_path)
    job.resume(0, 0)
    for step in (1, 2):
        job.supervised(step, {"loss": 1.0, "gradient_norm": 1.0})
    for number in (1, 2, 3):
        iterate(job, number)
    job.close()
    with (tmp_path / "training" / "log.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')
    job = record(tmp_path)
    job.resume(2, 1)
    steps = [("supervised_step", 1), ("supervised_step", 2), ("iteration", 1)]
    assert logged(tmp_path) == steps
    iterate(job, 2)
    job.close()
    assert logged(tmp_path) == [*steps, ("iteration", 2)]
    job = record(tmp_path)
    job.resume(1, 0)
    job.close()
    assert logged(tmp_path) == steps[:1]


def test_tensorboard_shows_the_iterations(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, numbers in ((0, (1, 2)), (1, (2,))):  # killed after the second, it goes on from the state of the first
        job = record(tmp_path)
        job.resume(2, done)
        for number in numbers:
            iterate(job, number)
        job.close()
    events = accumulators.EventAccumulator(str(tmp_path / "training" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.25)]


def test_a_rank_that_does_not_speak_writes_nothing(tmp_path, capsys):
    job = HybridLog(HybridConfig(), MODEL, tmp_path, is_writer=False, meter=Meter(), peak=None)
    job.resume(0, 0)
    iterate(job, 1)
    job.say("hello")
    job.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
