"""What a step takes beside weights and cache is what the estimate says, scored prompts included."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from pool_replica import generate, make_replica, make_requests
from reference import score
from tiny_models import VOCAB

from megalite.config.schema import SamplingParams
from megalite.core.layout import Layout
from megalite.inference.run import run_everywhere
from megalite.inference.tp_gain import tp_warning
from megalite.kernels import sampling
from megalite.model import families
from megalite.monitor.memory import peak_memory, reset_peak_memory
from megalite.planner import memory
from megalite.planner.devices import named
from megalite.planner.memory import RankMemory

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
MIB = 1 << 20


def shape(**changes) -> dict:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    return {**base, **heads, "intermediate_size": 64, "vocab_size": 1000, **changes}


def test_a_cache_in_fp8_takes_a_byte_a_number():
    config = families.from_values(Path("config.json"), shape())
    kept = [RankMemory(config, Layout(), 0, 2, kv_cache_dtype=dtype).kv_block(16) for dtype in ("auto", "fp8")]
    assert kept == [2 * kept[1], 16 * 2 * 2 * 64]


def step_bytes(one: RankMemory, *, max_tokens: int, max_rows: int) -> int:
    return one.activations(max_tokens=max_tokens) + one.logits(max_tokens=max_tokens, max_rows=max_rows)


def test_logits_of_scored_prompts_and_graphs_are_counted():
    """At 8k tokens a step and a vocabulary of 152k, logits of all would be 4.6 GiB in float32."""
    config = families.from_values(Path("config.json"), shape(vocab_size=152_000))
    one = RankMemory(config, Layout(), 0, itemsize=2)
    few, many = (step_bytes(one, max_tokens=8192, max_rows=rows) for rows in (1, 256))
    hidden = 8192 * 2 * 1000  # the layers' part is below
    chunk = memory.SCORED_LOGITS * 12 + memory.SAMPLING_CHUNK * 25
    assert chunk - 152_000 * 12 <= few <= chunk + hidden + memory.sampled_row(152_000)
    whole = 256 * (152_000 * 12 + memory.sampled_row(152_000))
    assert whole <= many <= whole + memory.SAMPLING_CHUNK * 25 + hidden
    assert memory.scored_rows(config, 1) * 152_000 <= memory.SCORED_LOGITS
    assert memory.scored_rows(config, 256) == 256, "no more than are sampled from in any case"
    stages = (RankMemory(config, Layout(1, 2, 1), rank, itemsize=2) for rank in (0, 1))
    first, last = (step_bytes(stage, max_tokens=8192, max_rows=256) for stage in stages)
    assert first <= hidden and last == many, "only the last stage has logits"
    graphs = one.graphs(max_rows=40, max_tokens=3000, weights=10**6)
    kept = 8 + len(memory.PROMPT_SIZES)  # decode steps of 1, 2, 4, 8, 16, 24, 32 and 40 rows, and prompts
    largest = step_bytes(one, max_tokens=3000, max_rows=40)
    assert graphs == 2 * largest + (kept + 4) * memory.GRAPH_OVERHEAD, "and chunks of 512, 1024, 2048 and 3000 tokens"
    assert memory.chunk_sizes(8192, 8 * 10**9) == [512, 1024], "more keep the device busy as they are"
    assert memory.chunk_sizes(300, 10) == []


def test_sampling_takes_no_more_than_is_counted():
    for vocab in (100, 152_000, 2**22):
        assert sampling.workspace_bytes(256, vocab) <= 256 * memory.sampled_row(vocab)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 250, 256, 1000, 5000])
def test_decode_steps_are_padded_to_few_more_rows(most):
    sizes = memory.decode_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) < 130
    assert all(later - size <= max(8, size / 4) for size, later in itertools.pairwise(sizes))


def scores(rank: int, folder: Path, layout: Layout, prompts: list[list[int]]) -> tuple[list[list[float]], list[int]]:
    """Of each token after the first; and of how many rows the head's outputs were."""
    memory.SCORED_LOGITS = 5 * VOCAB
    replica = make_replica(rank, folder, layout, block_size=4, max_num_batched_tokens=17, max_num_seqs=3)
    logits, seen = replica.decoder.logits, []

    def seen_logits(hidden, rows=None):
        seen.append(len(hidden if rows is None else rows))
        return logits(hidden, rows)

    replica.decoder.logits = seen_logits
    params = [SCORED, SamplingParams(max_tokens=3, prompt_logprobs=2, ignore_eos=True)]
    found = []
    for output in generate(replica, [(ids, params[i % 2]) for i, ids in enumerate(prompts)]):
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
    replica = make_replica(rank, folder, load_format="dummy", max_num_batched_tokens=length, max_num_seqs=4)
    estimate = step_bytes(replica.memory, max_tokens=length, max_rows=4)
    engine = replica.engine(longest=length, sequences=1)
    requests = make_requests(replica, [([5, 6, 7, 8] * (length // 4), SCORED)])
    before = reset_peak_memory()
    run_everywhere(replica, engine, requests, key="peak")
    return peak_memory() - before, estimate, replica.kv_bytes


def test_a_scored_prompt_takes_what_the_estimate_says(ranks, tmp_path):
    vocab, length = 120_000, 1200
    (tmp_path / "config.json").write_text(json.dumps(shape(vocab_size=vocab, hidden_size=16)))
    [(taken, estimate, cache)] = ranks(1).run(peak, tmp_path, length)
    assert taken < estimate + cache + 32 * MIB, "and no more"
    assert estimate < vocab * length * 4, "less than all logits at once"


def test_a_model_too_small_for_its_tp_is_named():
    h100, l4 = named("NVIDIA H100 80GB HBM3"), named("l4")
    small = tp_warning(h100, tp=2, rank_weight_bytes=600 * 2**20, layers=28)
    assert small is not None and "saves about 0.20 ms" in small and "0.45 ms on 56 sums" in small
    assert tp_warning(h100, tp=2, rank_weight_bytes=8 * 2**30, layers=32) is None
    assert tp_warning(h100, tp=1, rank_weight_bytes=2**20, layers=2) is None
    assert tp_warning(h100, tp=2, rank_weight_bytes=2 * 2**30, layers=32) is None
    assert tp_warning(l4, tp=2, rank_weight_bytes=300 * 2**20, layers=32), "over PCIe"
    assert tp_warning(l4, tp=2, rank_weight_bytes=2 * 2**30, layers=32) is None, "whose memory is slow, too"
