"""One model trains in one layout and generates in another: what it generates is what it has become."""

from __future__ import annotations

import itertools
import json
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from reference import greedy, load
from safetensors.torch import load_file
from train_helpers import as_run

from megalite.config.schema import (
    EngineSection,
    HybridConfig,
    HybridDataSection,
    HybridInferSection,
    HybridSection,
    HybridTrainSection,
    NewModelSection,
    OptimizerSection,
    ParallelSection,
    SamplingParams,
    SupervisedSection,
    TokenizerSection,
    TrainOutputSection,
)
from megalite.hybrid.job import Job
from megalite.train.data import bpe

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 44,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
FOUR_LAYERS = {**SHAPE, "num_hidden_layers": 4}
LLAMA = {**SHAPE, "model_type": "llama", "tie_word_embeddings": False}
OPTIMIZER = OptimizerSection(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=1)


def settings(out: Path, train: ParallelSection, infer: ParallelSection, *, zero: int = 1, shape=SHAPE) -> HybridConfig:
    """Three supervised steps, then greedy samples of eight prompts; nothing is learnt from these."""
    return HybridConfig(
        model=NewModelSection(config=shape, dtype="float32"),
        tokenizer=TokenizerSection(vocab_size=257),
        data=HybridDataSection(source="configs.hybrid.grpo_arithmetic:additions", options={"digits": 1}),
        train=HybridTrainSection(parallel=train, zero_stage=zero, micro_batch_tokens=64),
        infer=HybridInferSection(parallel=infer, engine=EngineSection(block_size=4, max_num_seqs=4)),
        sampling=SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        optimizer=OPTIMIZER,
        supervised=SupervisedSection(steps=3, examples_per_step=16),
        hybrid=HybridSection(
            algorithm="rejection",
            steps=1,
            prompts_per_step=8,
            samples_per_prompt=1,
            keep_above=1.0,
            reward="megalite.rewards:exact_match",
            sync_bucket=0.01,
        ),
        output=TrainOutputSection(folder=str(out)),
    )


def run_job(rank: int, config: HybridConfig, stop_at: int = 0) -> str:
    """What the rank says. From the `stop_at`-th time that rank 1 asks for a signal, there is a SIGTERM."""
    said = StringIO()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for rewards of the tests
    with as_run(rank) as runtime, redirect_stdout(said), redirect_stderr(said):
        asked = itertools.count(1)
        if stop_at and rank == 1:
            runtime.signal_received = lambda: signal.SIGTERM if next(asked) >= stop_at else None
        Job(config, runtime).run()
    return said.getvalue()


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **more) -> ParallelSection:
    return ParallelSection(tp=tp, pp=pp, dp=dp, **more)


PAIRS = {
    "the same": (2, layout(tp=2), layout(tp=2), {}),
    "tp4 to async dp2": (4, layout(tp=4), layout(tp=2, dp=2, dp_mode="async"), {"shape": LLAMA}),
    "pp2 in four pieces to tp2": (2, layout(pp=2, interleave=2), layout(tp=2), {"shape": FOUR_LAYERS}),
    "zero3 with sequence parallel to pp2dp2": (
        4,
        layout(tp=2, dp=2, sequence_parallel=True),
        layout(pp=2, dp=2),
        {"zero": 3},
    ),
    "ranks 0 and 1 to ranks 2 and 3": (4, layout(pp=2), layout(tp=2, first_rank=2), {"shape": LLAMA}),
    "ranks 1 and 2 to rank 0": (3, layout(dp=2, first_rank=1), layout(), {}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_sampler_generates_what_transformers_does_with_the_trained_model(pair, ranks, tmp_path):
    size, train, infer, more = PAIRS[pair]
    ranks(size).run(run_job, settings(tmp_path, train, infer, **more))
    [log] = [line for line in map(json.loads, (tmp_path / "training/log.jsonl").open()) if "iteration" in line]
    assert log["logprob_difference_max"] < 1e-5 and log["weight_version"] == 1
    samples = [json.loads(line) for line in (tmp_path / "training/rollouts/iteration-000001.jsonl").open()]
    assert len(samples) == 8
    for sample in samples:
        wanted = greedy(tmp_path, sample["prompt_token_ids"], 8)
        assert sample["token_ids"] == wanted.tokens
        scores = wanted.logprobs[len(wanted.prompt) - 1 : -1].gather(1, torch.tensor(wanted.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample["sampler_logprobs"]), scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(sample["trainer_logprobs"]), scores, rtol=0, atol=1e-5)


def test_an_example_that_the_tokenizer_fails_at_costs_itself_only(ranks, tmp_path):
    """On every rank, also on those that do not tokenise; in supervised steps and when sampling."""
    source, folder = tmp_path / "sums.jsonl", tmp_path / "tokenizer"
    prompts = [*(f"{number}+1=" for number in range(7)), "a" * 26]
    lines = [json.dumps({"prompt": prompt, "answer": "1", "response": "1\n"}) for prompt in prompts]
    source.write_text("\n".join(lines))
    bpe.save(bpe.train(prompts, 257), folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    backtracks = {"type": "Split", "pattern": {"Regex": "(?:(a+)+)+b"}, "behavior": "Isolated", "invert": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [backtracks, made["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = settings(tmp_path / "out", layout(), layout(first_rank=1))
    config = replace(config, data=HybridDataSection(source=str(source)), tokenizer=TokenizerSection(path=str(folder)))
    said = "".join(ranks(2).run(run_job, replace(config, monitor=replace(config.monitor, report=False))))
    assert "iteration 1/1" in said and "total:" not in said and "memory:" not in said
    rollouts = tmp_path / "out/training/rollouts/iteration-000001.jsonl"
    sampled = [json.loads(line)["prompt"] for line in rollouts.open()]
    assert len(sampled) == 8 and set(sampled) == set(prompts[:7])


def test_both_sides_are_at_the_sampling_temperature(ranks, tmp_path):
    """The log-probabilities that ratios, divergences and importance weights are made of."""
    config = settings(tmp_path, layout(tp=2), layout(dp=2))
    config = replace(config, sampling=SamplingParams(temperature=0.6, max_tokens=8, ignore_eos=True))
    said = "".join(ranks(2).run(run_job, config))
    assert "total: 1 step, " in said and "memory: at most " in said
    shown = [line for line in said.splitlines() if str(tmp_path) not in line]
    assert any(line.startswith("iteration 1/1  reward") for line in shown) and max(map(len, shown)) <= 80
    model = load(tmp_path)
    for sample in map(json.loads, (tmp_path / "training/rollouts/iteration-000001.jsonl").open()):
        prompt, tokens = sample["prompt_token_ids"], sample["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = (logits / 0.6).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        for side in ("sampler", "trainer"):
            torch.testing.assert_close(torch.tensor(sample[f"{side}_logprobs"]), wanted, rtol=0, atol=1e-5)


def same_reward_twice(rank: int, config: HybridConfig, out: Path) -> None:
    run_job(rank, config)
    run_job(rank, replace(config, hybrid=replace(config.hybrid, steps=0), output=TrainOutputSection(folder=str(out))))


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_equal_rewards_change_no_weight(kl, ranks, tmp_path):
    """Of any value: a tenth is not the mean of tenths."""
    config = settings(tmp_path / "learnt", layout(), layout())
    loop = replace(config.hybrid, algorithm="grpo", steps=2, samples_per_prompt=3, kl_coefficient=kl)
    loop = replace(loop, reward="hybrid_rewards:a_tenth")
    steady = replace(OPTIMIZER, min_learning_rate=OPTIMIZER.learning_rate)  # or it would depend on hybrid.steps
    config = replace(config, hybrid=loop, sampling=SamplingParams(max_tokens=4), optimizer=steady)
    ranks(1).run(same_reward_twice, config, tmp_path / "not")
    learnt, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("learnt", "not"))
    assert all(torch.equal(learnt[name], wanted[name]) for name in wanted)


ROOM = {"free_kv_while_training": True, "offload_optimizer": True}
LOOPS = {
    "one rank": (1, layout(), layout(), {}),
    "dp2 to tp2, memory given back": (2, layout(dp=2), layout(tp=2), ROOM),
    "tp2pp2 to dp4": (4, layout(tp=2, pp=2), layout(dp=4), {}),
}


def test_a_job_learns_the_same_in_every_layout(ranks, tmp_path):
    """Policy optimisation with all that it may have: several updates, a reference model, importance weights."""
    found = {}
    for name, (size, train, infer, more) in LOOPS.items():
        out = tmp_path / name
        config = settings(out, train, infer)
        loop = replace(
            config.hybrid,
            algorithm="grpo",
            steps=2,
            prompts_per_step=4,
            samples_per_prompt=4,
            updates_per_step=2,
            kl_coefficient=0.1,
            importance_correction="token",
            reward="hybrid_rewards:many_digits",
            **more,
        )
        # a draw on the very border between two tokens may fall either way after an update: this seed makes none
        sampler = replace(config.infer, engine=replace(config.infer.engine, seed=1))
        config = replace(config, hybrid=loop, infer=sampler, sampling=SamplingParams(max_tokens=6))
        ranks(size).run(run_job, config)
        log = [line for line in map(json.loads, (out / "training/log.jsonl").open()) if "iteration" in line]
        assert all(line["logprob_difference_max"] < 1e-5 and line["kl"] >= 0 for line in log)
        paths = sorted((out / "training/rollouts").iterdir())
        samples = [[json.loads(line)["token_ids"] for line in path.open()] for path in paths]
        found[name] = log, samples, load_file(out / "model.safetensors")
    whole_log, whole_samples, whole = found["one rank"]
    assert len({tuple(one) for one in whole_samples[0]}) > 8, "samples of a group are no clones"
    for log, samples, weights in found.values():
        assert samples == whole_samples
        for line, wanted in zip(log, whole_log, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
            assert line["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)
        for key, values in weights.items():
            torch.testing.assert_close(values, whole[key], rtol=0, atol=2e-4)


@pytest.mark.parametrize("dp_mode", ["sync", "async"])
def test_a_signal_while_one_replica_samples_stops_all_and_loses_nothing(dp_mode, ranks, tmp_path):
    """Rank 0 only generates, rank 1 does both, rank 2 only trains; the signal comes to rank 1 among its samples."""
    layouts = layout(tp=2, first_rank=1), layout(dp=2, dp_mode=dp_mode)
    found = {}
    for name, stops in {"undisturbed": [0], "stopped": [8, 8, 0]}.items():
        config = settings(tmp_path / name, *layouts)
        loop = replace(config.hybrid, algorithm="grpo", steps=2, samples_per_prompt=4, prompts_per_step=4)
        loop = replace(loop, reward="hybrid_rewards:many_digits")
        config = replace(config, hybrid=loop, sampling=SamplingParams(max_tokens=12))
        said = [ranks(3).run(run_job, config, stop)[1] for stop in stops]
        paths = sorted((tmp_path / name / "training/rollouts").iterdir())
        samples = [[json.loads(line)["token_ids"] for line in path.open()] for path in paths]
        found[name] = samples, load_file(tmp_path / name / "model.safetensors")
    assert "stopped by SIGTERM after 0 iterations" in said[0]
    assert "going on after 3 supervised steps and 0 iterations" in said[1]
    (wanted_samples, wanted), (samples, weights) = found.values()
    assert len(samples) == 2 and samples == wanted_samples
    for key, values in weights.items():
        torch.testing.assert_close(values, wanted[key], rtol=0, atol=2e-4)
