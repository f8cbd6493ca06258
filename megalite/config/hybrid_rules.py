"""The rules of a hybrid config's own sections."""

from __future__ import annotations

import math
import re
from typing import Any

from megalite.config.chat import section_problems
from megalite.config.rules import ModelFacts, Rules
from megalite.config.schema import HybridConfig, HybridSection, ParallelSection, SamplingParams

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
    "structured_outputs": (None,),
}
"""What shapes the sampling distribution, other than the temperature; and values that don't."""
_UNCORRECTED = (
    "would draw samples from another distribution than the one that learns from them (grpo's ratios, divergence and "
    "importance weights are over the whole vocabulary at sampling.temperature), and nothing corrects for that"
)
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`package.module:function`."""


def hybrid_rules(rules: Rules, model: ModelFacts | None) -> None:
    """What the sections of a hybrid config must obey that other configs do not have."""
    config: HybridConfig = rules.section
    _loop_rules(rules.at("hybrid"))
    _data_rules(rules.at("data"))
    _sampling_rules(rules.at("sampling"), config.hybrid, model)
    _rank_rules(rules, config.train.parallel, config.infer.parallel)
    is_apart = num_ranks(config.train.parallel, config.infer.parallel) > _size(config.train.parallel)
    rule = "3 has to train on every rank of the job: DeepSpeed 0.19.8 would wait for ranks outside train.parallel"
    rules.at("train").need("zero_stage", config.train.zero_stage < 3 or not is_apart, rule, "Set it to 1 or 2.")
    rule = "one model trains and generates, so there can't be another one here"
    rules.at("infer").need("model", config.infer.model is None, rule, "Leave it out and set model.path.")


def num_ranks(train: ParallelSection, infer: ParallelSection) -> int:
    """Ranks of a job with these two layouts."""
    return max(_end(train), _end(infer))


def _size(parallel: ParallelSection) -> int:
    return math.prod(parallel.sizes)


def _end(parallel: ParallelSection) -> int:
    """The first global rank after a layout."""
    return parallel.first_rank + _size(parallel)


def _loop_rules(rules: Rules) -> None:
    hybrid: HybridSection = rules.section
    grpo = hybrid.algorithm == "grpo"
    rule = "must be >= 2 for grpo: an advantage is a sample's reward beside those of its group"
    rules.need("samples_per_prompt", hybrid.samples_per_prompt >= 2 or not grpo, rule)
    if rules.sound("updates_per_step"):
        rule = f"must divide prompts_per_step = {hybrid.prompts_per_step}: whole groups are divided among the updates"
        rules.need("updates_per_step", hybrid.prompts_per_step % hybrid.updates_per_step == 0, rule)
    if rules.sound("sync_every"):
        rule = f"must be a multiple of sync_every = {hybrid.sync_every}: a job that goes on begins with a sync"
        rules.need("save_every", hybrid.save_every % hybrid.sync_every == 0, rule)
    named = hybrid.reward is None or FUNCTION.fullmatch(hybrid.reward) is not None
    fix = "Such as megalite.rewards:parses_as_python."
    rules.need("reward", named, "must be package.module:function", fix)
    fresh = hybrid.sync_every == 1 or not grpo or hybrid.importance_correction != "off"
    rule = "the samples come from older weights than those that learn from them, which needs a correction"
    rules.need("sync_every", fresh, rule, "Set hybrid.importance_correction to token or sequence.")


def _data_rules(rules: Rules) -> None:
    rules.problems += section_problems(rules.section, rules.prefix)


def _sampling_rules(rules: Rules, hybrid: HybridSection, model: ModelFacts | None) -> None:
    sampling: SamplingParams = rules.section
    fix = "Set hybrid.samples_per_prompt."
    rules.need("n", sampling.n == 1, "is hybrid.samples_per_prompt here", fix)
    rules.need("best_of", sampling.best_of is None, "would choose among the samples that are to be learnt from", fix)
    rules.need("logprobs", sampling.logprobs is None, "is set by the job, which needs those of the samples")
    rules.need("prompt_logprobs", sampling.prompt_logprobs is None, "has no use here")
    rules.need("detokenize", sampling.detokenize, "must be true: rewards are given for texts")
    differ = sampling.temperature > 0 or hybrid.samples_per_prompt == 1
    rules.need("temperature", differ, "must be above 0, or the samples of a prompt would all be the same")
    if hybrid.algorithm == "grpo":
        for name, neutral in _NEUTRAL.items():
            rules.need(name, getattr(sampling, name) in neutral, _UNCORRECTED, f"Leave it out (it is {neutral[0]!r}).")
    rules.need("max_tokens", sampling.max_tokens is not None, "is needed")
    if sampling.max_tokens is not None and model is not None:
        rule = f"leaves no room for a prompt: the model has {model.max_position_embeddings} positions"
        rules.need("max_tokens", sampling.max_tokens < model.max_position_embeddings, rule)
    rules.need("seed", sampling.seed is None, "is made from engine.seed, the iteration and the prompt", "Leave it out.")


def _rank_rules(rules: Rules, train: ParallelSection, infer: ParallelSection) -> None:
    """Every rank must be in a layout."""
    if not rules.sound("train.parallel.first_rank", "infer.parallel.first_rank"):
        return
    sides = [(train, rules.at("train.parallel")), (infer, rules.at("infer.parallel"))]
    (low, low_rules), (high, high_rules) = sorted(sides, key=lambda side: side[0].first_rank)
    low_rules.need("first_rank", low.first_rank == 0, "one of the two layouts must begin at rank 0")
    rule = f"leaves ranks without work: the other layout ends before rank {_end(low)}"
    high_rules.need("first_rank", high.first_rank <= _end(low), rule)
