"""Every family in every layout generates what transformers generates: paged cache, chunked prefill, cohorts and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pool_runtime import PoolRuntime
from test_layout_matrix import LAYOUTS, MAX_TOKENS, PROMPTS, TOLERANCE, VARIANT_NAMES
from tiny_models import VOCAB

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.inference.io.inputs import make_request
from megalite.inference.replica import load_replica
from megalite.inference.run import prompt_limits, run_everywhere


def generate(rank: int, folder: Path, layout: Layout):
    """(tokens, log-probabilities [prompt + output - 1, vocab] after all positions but the last) of each prompt.

    The engine has small blocks and a small token budget, so that prompts are prefilled in chunks and wait for places.
    """
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32"),
        parallel=ParallelSection(tp=layout.tp, pp=layout.pp, dp=layout.dp),
        engine=EngineSection(block_size=4, max_num_batched_tokens=16, max_num_seqs=3),
    )
    replica, _ = load_replica(config, PoolRuntime(rank, layout.size))
    limits = prompt_limits(replica)
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB
    )
    requests = [make_request(prompt, params, limits, id=str(i), index=i)[0] for i, prompt in enumerate(PROMPTS)]
    results = []
    for output in run_everywhere(replica, replica.engine(), requests, {}, key="matrix"):
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        rows = [[entry[token].logprob for token in range(VOCAB)] for entry in entries]
        results.append((output.outputs[0].token_ids, torch.tensor(rows)))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}pp{}dp{}".format(*layout))
@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_engine_equals_transformers(name, layout, tiny, reference, ranks):
    layout = Layout(*layout)
    expected = reference(name, PROMPTS, MAX_TOKENS)
    for results in ranks(layout.size).run(generate, tiny(name), layout):
        for want, (tokens, logprobs) in zip(expected, results, strict=True):
            assert tokens == want.tokens
            torch.testing.assert_close(logprobs, want.logprobs[:-1], atol=TOLERANCE, rtol=0)
