"""Every family generates and scores what transformers does, whatever the layout: the promise of the project in one
table.

Generation: paged cache, chunked prefill, cohorts and all. Scores: packed forward passes through the training pipeline.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from one_request import make_request
from pool_runtime import PoolRuntime
from tiny_models import VARIANTS, VOCAB

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.inference.replica import load_replica
from megalite.inference.run import prompt_limits, run_everywhere
from megalite.train.micro_batch import from_sequences
from megalite.train.model import Scorer

LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (3, 1, 1), (1, 3, 1)]
EVERYWHERE = ("llama3", "qwen3_moe", "gemma2")
"""Run in every layout. How the weights of any family are cut for any layout is tested with test_convert.py."""
VARIANT_NAMES = [*VARIANTS, "gpt2_bare"]
ROTATION = [(2, 1, 1), (2, 2, 1), (3, 1, 1), (1, 2, 1)]
"""Every other variant in one of these, the next one in another."""
MORE = {
    "llama_tied": [(1, 3, 1), (1, 1, 2)],
    "llama_one_kv_head": [(2, 2, 1)],
    "mistral": [(1, 1, 2), (1, 1, 1)],
    "qwen2": [(2, 2, 1), (1, 3, 1)],
    "qwen3": [(2, 1, 1), (1, 1, 1)],
    "mixtral": [(2, 1, 1), (2, 2, 1)],
    "phi3_longrope": [(2, 2, 1), (1, 1, 2)],
    "gpt2": [(2, 1, 1), (1, 3, 1)],
    "gemma": [(2, 2, 1)],
    "qwen3_next": [(1, 1, 1), (2, 2, 1), (4, 1, 1)],
    "deepseek_v3": [(4, 1, 1)],
    "gpt_oss": [(4, 1, 1)],
    "granitemoehybrid": [(4, 1, 1)],
}
"""And these also in others: checkpoints of the most used families, and each kind of layer on four ranks."""


def layouts_of(name: str) -> list[tuple[int, int, int]]:
    if name in EVERYWHERE:
        return LAYOUTS
    return list(dict.fromkeys([ROTATION[VARIANT_NAMES.index(name) % len(ROTATION)], *MORE.get(name, [])]))


CASES = [(name, layout) for name in VARIANT_NAMES for layout in layouts_of(name)]
TOLERANCE = 1e-4
MAX_TOKENS = 3

_random = random.Random(14)
PROMPTS = [[_random.randrange(3, VOCAB) for _ in range(length)] for length in (1, 9, 36)]


def generate_and_score(rank: int, folder: Path, layout: Layout, sequences: list[list[int]]):
    """(tokens, log-probabilities [prompt + output - 1, vocab] after all positions but the last) of each prompt; and
    the log-probability of every next token of `sequences`.

    The engine has small blocks and a small token budget, so that prompts are prefilled in chunks.
    """
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32"),
        parallel=ParallelSection(tp=layout.tp, pp=layout.pp, dp=layout.dp),
        engine=EngineSection(block_size=4, max_num_batched_tokens=20, max_num_seqs=4),
    )
    replica, _ = load_replica(config, PoolRuntime(rank, layout.size))
    limits = prompt_limits(replica)
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB
    )
    requests = [make_request(prompt, params, limits, i) for i, prompt in enumerate(PROMPTS)]
    results = []
    for output in run_everywhere(replica, replica.engine(), requests, key="matrix"):
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        rows = [[entry[token].logprob for token in range(VOCAB)] for entry in entries]
        results.append((output.outputs[0].token_ids, torch.tensor(rows)))
    [scores] = Scorer(replica.decoder).logprobs([from_sequences(sequences, [[1.0] * (len(s) - 1) for s in sequences])])
    return results, scores


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_greedy_choices_of_the_reference_are_not_near_ties(name, reference):
    """Otherwise equal tokens would be luck."""
    generated = reference(name, PROMPTS, MAX_TOKENS)
    assert min(g.margin for g in generated) > 10 * TOLERANCE
    assert len({token for g in generated for token in g.tokens}) > 2


@pytest.mark.parametrize("name, layout", CASES, ids=lambda one: one if isinstance(one, str) else str(Layout(*one)))
def test_equals_transformers(name, layout, tiny, reference, ranks):
    layout = Layout(*layout)
    expected = reference(name, PROMPTS, MAX_TOKENS)
    nexts = [want.logprobs[:-1].gather(1, torch.tensor(want.ids)[1:, None])[:, 0] for want in expected]
    for results, scores in ranks(layout.size).run(generate_and_score, tiny(name), layout, [g.ids for g in expected]):
        for want, (tokens, logprobs) in zip(expected, results, strict=True):
            assert tokens == want.tokens
            torch.testing.assert_close(logprobs, want.logprobs[:-1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(scores, torch.cat(nexts), atol=TOLERANCE, rtol=0)
