"""What a step takes beside weights and cache is what the estimate says, scored prompts included."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pool_runtime import PoolRuntime
from reference import score
from tiny_models import VOCAB

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.inference import memory
from megalite.inference.io.inputs import make_request
from megalite.inference.llm import prompt_limits, run_everywhere
from megalite.inference.replica import load_replica
from megalite.model import families
from megalite.monitor.metrics import peak_memory, reset_peak_memory

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
MIB = 1 << 20


def shape(**changes) -> dict:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    return {**base, **heads, "intermediate_size": 64, "vocab_size": 1000, **changes}


def test_logits_of_scored_prompts_and_graphs_are_counted():
    """At 8k tokens a step and a vocabulary of 152k, logits of all would be 4.6 GiB in float32."""
    config = families.from_values(Path("config.json"), shape(vocab_size=152_000))
    step = {"max_tokens": 8192, "itemsize": 2}
    few, many = (memory.activation_bytes(config, Layout(), 0, max_rows=rows, **step) for rows in (1, 256))
    hidden = 8192 * 2 * 1000  # the layers' part is below
    chunk = memory.SCORED_LOGITS * 12 + memory.SAMPLING_CHUNK * 25
    assert chunk - 152_000 * 12 <= few <= chunk + hidden
    assert 256 * 152_000 * 12 <= many <= 256 * 152_000 * 12 + memory.SAMPLING_CHUNK * 25 + hidden
    assert memory.scored_rows(config, 1) * 152_000 <= memory.SCORED_LOGITS
    assert memory.scored_rows(config, 256) == 256, "no more than are sampled from in any case"
    first, last = (memory.activation_bytes(config, Layout(1, 2, 1), rank, max_rows=256, **step) for rank in (0, 1))
    assert first <= hidden and last == many, "only the last stage has logits"
    graphs = {"max_blocks": 512, "itemsize": 2}
    powers = [1, 2, 4, 8, 16, 32, 64]
    each = [memory.activation_bytes(config, Layout(), 0, max_tokens=n, max_rows=n, itemsize=2) for n in powers]
    assert memory.graph_bytes(config, Layout(), 0, max_rows=40, **graphs) >= 2 * 12 * 152_000 * sum(powers)
    assert memory.graph_bytes(config, Layout(), 0, max_rows=40, **graphs) <= 8 * each[-1] + memory.GRAPH_OVERHEAD


def scores(rank: int, folder: Path, layout: Layout, prompts: list[list[int]]) -> tuple[list[list[float]], list[int]]:
    """Of each token after the first; and of how many rows the head's outputs were."""
    memory.SCORED_LOGITS = 5 * VOCAB
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32"),
        parallel=ParallelSection(tp=layout.tp, pp=layout.pp, dp=layout.dp),
        engine=EngineSection(block_size=4, max_num_batched_tokens=17, max_num_seqs=3),
    )
    replica, _ = load_replica(config, PoolRuntime(rank, layout.size))
    limits, logits, seen = prompt_limits(replica), replica.decoder.logits, []
    replica.decoder.logits = lambda hidden: seen.append(len(hidden)) or logits(hidden)
    params = [SCORED, SamplingParams(max_tokens=3, prompt_logprobs=2, ignore_eos=True)]
    requests = [make_request(ids, params[i % 2], limits, id=str(i), index=i)[0] for i, ids in enumerate(prompts)]
    outputs = run_everywhere(replica, replica.engine(), requests, {}, key="scores")
    found = []
    for output in outputs:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append([entry[token].logprob for token, entry in pairs])
    return found, seen


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1)], ids=str)
def test_prompts_are_scored_a_chunk_at_a_time(layout, tiny, ranks):
    """Chunks that end within a prompt's part of a step, between two, and beyond the last."""
    luck, layout = random.Random(1), Layout(*layout)
    prompts = [[luck.randrange(3, VOCAB) for _ in range(length)] for length in (40, 1, 2, 6, 11, 23, 7)]
    for found, seen in ranks(layout.size).run(scores, tiny("llama3"), layout, prompts):
        for ids, got in zip(prompts, found, strict=True):
            wanted = score(tiny("llama3"), ids)
            assert got == pytest.approx([wanted[i, token].item() for i, token in enumerate(ids[1:])], abs=1e-4)
        assert max(seen, default=5) == 5


def peak(rank: int, folder: Path, length: int) -> tuple[int, int, int]:
    """Bytes that scoring a prompt took: at its peak, by the estimate, and of the cache."""
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32", load_format="dummy"),
        engine=EngineSection(max_num_batched_tokens=length, max_num_seqs=4),
    )
    replica, _ = load_replica(config, PoolRuntime(rank, 1))
    step = {"max_tokens": length, "max_rows": 4, "itemsize": 4}
    estimate = memory.activation_bytes(replica.model, replica.layout, 0, **step)
    engine = replica.engine(longest=length, sequences=1)
    request, _ = make_request([5, 6, 7, 8] * (length // 4), SCORED, prompt_limits(replica), id="0", index=0)
    before = reset_peak_memory()
    run_everywhere(replica, engine, [request], {}, key="peak")
    return peak_memory() - before, estimate, replica.kv_bytes


def test_a_scored_prompt_takes_what_the_estimate_says(ranks, tmp_path):
    vocab, length = 120_000, 1200
    (tmp_path / "config.json").write_text(json.dumps(shape(vocab_size=vocab, hidden_size=16)))
    [(taken, estimate, cache)] = ranks(1).run(peak, tmp_path, length)
    assert taken < estimate + cache + 32 * MIB, "and no more"
    assert estimate < vocab * length * 4, "less than all logits at once"
