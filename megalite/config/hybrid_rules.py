"""The rules of a hybrid config's own sections."""

from __future__ import annotations

import re
from typing import Any

from megalite.config.chat import section_problems
from megalite.config.sampling import MAX_SAMPLES
from megalite.config.schema import HybridConfig, HybridSection, ParallelSection, SamplingParams
from megalite.config.typecheck import ModelFacts, Rules, problem
from megalite.errors import Problem

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
}
"""What shapes the distribution that a sample is drawn from, other than the temperature; and values that don't."""
_UNCORRECTED = (
    "would draw samples from another distribution than the one that learns from them (grpo's ratios, divergence and "
    "importance weights are over the whole vocabulary at sampling.temperature), and nothing corrects for that"
)
MAX_PROMPTS = 1 << 20
"""Most prompts of an iteration."""
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`package.module:function`."""


def hybrid_problems(config: HybridConfig, model: ModelFacts | None) -> list[Problem]:
    """What the sections break that other configs do not have."""
    found = _loop_problems(config.hybrid) + _data_problems(config)
    found += _sampling_problems(config.sampling, config.hybrid, model)
    found += _rank_problems(config.train.parallel, config.infer.parallel)
    rules = Rules(config.supervised, "supervised.")
    rules.need("steps", config.supervised.steps >= 0, "must be >= 0")
    rules.need("examples_per_step", config.supervised.examples_per_step >= 1, "must be >= 1")
    found += rules.problems
    rules = Rules(config.train, "train.")
    rules.need("micro_batch_tokens", config.train.micro_batch_tokens >= 1, "must be >= 1")
    rules.need("seed", 0 <= config.train.seed < 2**63, "must be between 0 and 2^63 - 1")
    parallel = config.train.parallel
    is_apart = num_ranks(parallel, config.infer.parallel) > parallel.tp * parallel.pp * parallel.dp
    rule = "3 has to train on every rank of the job: DeepSpeed 0.19.8 would wait for ranks outside train.parallel"
    rules.need("zero_stage", config.train.zero_stage < 3 or not is_apart, rule, "Set it to 1 or 2.")
    found += rules.problems
    if config.infer.model is not None:
        rule = "one model trains and generates, so there can't be another one here"
        found.append(problem("infer.model", rule, config.infer.model, "Leave it out and set model.path."))
    return found


def num_ranks(train: ParallelSection, infer: ParallelSection) -> int:
    """Ranks of a job with these two layouts."""
    return max(end_rank(train), end_rank(infer))


def end_rank(parallel: ParallelSection) -> int:
    """The first global rank after a layout."""
    return parallel.first_rank + parallel.tp * parallel.pp * parallel.dp


def _loop_problems(hybrid: HybridSection) -> list[Problem]:
    rules = Rules(hybrid, "hybrid.")
    for name in ("steps", "prompts_per_step", "sync_every", "save_every", "log_every", "reward_workers"):
        rules.need(name, getattr(hybrid, name) >= 1, "must be >= 1")
    least = 2 if hybrid.algorithm == "grpo" else 1
    rule = "must be >= 2 for grpo: an advantage is a sample's reward beside those of its group"
    rules.need("samples_per_prompt", hybrid.samples_per_prompt >= least, rule if least == 2 else "must be >= 1")
    rules.need("samples_per_prompt", hybrid.samples_per_prompt <= MAX_SAMPLES, f"must be at most {MAX_SAMPLES}")
    rules.need("prompts_per_step", hybrid.prompts_per_step <= MAX_PROMPTS, f"must be at most {MAX_PROMPTS}")
    if rules.need("updates_per_step", hybrid.updates_per_step >= 1, "must be >= 1"):
        rule = f"must divide prompts_per_step = {hybrid.prompts_per_step}: whole groups are dealt out to the updates"
        rules.need("updates_per_step", hybrid.prompts_per_step % hybrid.updates_per_step == 0, rule)
    if hybrid.sync_every >= 1 and hybrid.save_every >= 1:
        rule = f"must be a multiple of sync_every = {hybrid.sync_every}: a job that goes on begins with a sync"
        rules.need("save_every", hybrid.save_every % hybrid.sync_every == 0, rule)
    rules.need("reward_time_limit", hybrid.reward_time_limit > 0, "must be above 0 seconds")
    rules.need("clip_low", 0 <= hybrid.clip_low < 1, "must be at least 0 and below 1")
    for name in ("clip_high", "kl_coefficient"):
        rules.need(name, getattr(hybrid, name) >= 0, "must be >= 0")
    rules.need("importance_limit", hybrid.importance_limit >= 1, "must be >= 1: weights above it are cut to it")
    rules.need("sync_bucket", hybrid.sync_bucket > 0, "must be above 0 MiB")
    fix = "Such as megalite.rewards:parses_as_python."
    if hybrid.reward is None:
        rules.problems.append(Problem(key="hybrid.reward", rule="is needed", fix=fix))
    else:
        rules.need("reward", bool(FUNCTION.fullmatch(hybrid.reward)), "must be package.module:function", fix)
    if hybrid.sync_every > 1 and hybrid.algorithm == "grpo" and hybrid.importance_correction == "off":
        fix = "Set hybrid.importance_correction to token or sequence."
        rule = "the samples come from older weights than those that learn from them, which needs a correction"
        rules.problems.append(problem("hybrid.sync_every", rule, hybrid.sync_every, fix))
    return rules.problems


def _data_problems(config: HybridConfig) -> list[Problem]:
    data = config.data
    fix = "Such as my_tasks:sums, or a file of JSON lines."
    if data.source is None:
        return [Problem(key="data.source", rule="is needed", fix=fix)]
    rules = Rules(data, "data.")
    is_file = not FUNCTION.fullmatch(data.source)
    if is_file and data.options:
        fix = "Leave them out; a file has no arguments."
        rules.problems.append(problem("data.options", "are for a task's function", data.options, fix))
    rules.need("seed", 0 <= data.seed < 2**63, "must be between 0 and 2^63 - 1")
    return rules.problems + section_problems(data, "data.")


def _sampling_problems(sampling: SamplingParams, hybrid: HybridSection, model: ModelFacts | None) -> list[Problem]:
    rules = Rules(sampling, "sampling.")
    fix = "Set hybrid.samples_per_prompt."
    rules.need("n", sampling.n == 1, "is hybrid.samples_per_prompt here", fix)
    rules.need("best_of", sampling.best_of is None, "would choose among the samples that are to be learnt from", fix)
    rules.need("logprobs", sampling.logprobs is None, "is set by the job, which needs those of the samples")
    rules.need("prompt_logprobs", sampling.prompt_logprobs is None, "has no use here")
    rules.need("detokenize", sampling.detokenize, "must be true: rewards are given for texts")
    several = hybrid.samples_per_prompt > 1
    rule = "must be above 0, or the samples of a prompt would all be the same"
    rules.need("temperature", sampling.temperature > 0 or not several, rule)
    rules.need("detokenize", sampling.detokenize, "must be true: rewards read the text of a sample")
    if hybrid.algorithm == "grpo":
        for name, neutral in _NEUTRAL.items():
            rules.need(name, getattr(sampling, name) in neutral, _UNCORRECTED, f"Leave it out (it is {neutral[0]!r}).")
    if rules.need("max_tokens", sampling.max_tokens is not None, "is needed") and model is not None:
        most = model.max_position_embeddings
        rule = f"leaves no room for a prompt: the model has {most} positions"
        rules.need("max_tokens", sampling.max_tokens < most, rule)
    rules.need("seed", sampling.seed is None, "is made from engine.seed, the iteration and the prompt", "Leave it out.")
    return rules.problems


def _rank_problems(train: ParallelSection, infer: ParallelSection) -> list[Problem]:
    """Every rank must be in a layout."""
    rules = {"train": Rules(train, "train.parallel."), "infer": Rules(infer, "infer.parallel.")}
    for side, section in (("train", train), ("infer", infer)):
        rules[side].need("first_rank", section.first_rank >= 0, "must be >= 0")
    if all(rule.problems == [] for rule in rules.values()):
        low, high = sorted((train, infer), key=lambda section: section.first_rank)
        side = "train" if low is train else "infer"
        rules[side].need("first_rank", low.first_rank == 0, "one of the two layouts must begin at rank 0")
        side = "infer" if low is train else "train"
        rule = f"leaves ranks without work: the other layout ends before rank {end_rank(low)}"
        rules[side].need("first_rank", high.first_rank <= end_rank(low), rule)
    return rules["train"].problems + rules["infer"].problems
