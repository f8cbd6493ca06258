"""Rotary embeddings that stretch a model: how far, and which frequencies a sequence gets by its own longest length.

transformers goes by the length of what it is shown, so a sequence that is meant to get longer is shown to it with
tokens at its end that nothing before them can see.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from one_request import make_request
from pool_runtime import PoolRuntime
from reference import score
from tiny_models import VOCAB, edit_config

from megalite.config.schema import EngineSection, InferConfig, ModelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import CheckpointError
from megalite.inference.replica import load_replica
from megalite.inference.request import Row, Sequence, StepPlan
from megalite.inference.rows import Rows
from megalite.inference.run import prompt_limits, run_everywhere
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.decoder import Decoder
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import DeviceCache
from megalite.model.rope import Rotary
from megalite.train.micro_batch import from_sequences
from megalite.train.model import LanguageModel
from megalite.weights.transfer import build, load_folder

TOLERANCE = 1e-4
BORDER = 32
"""Original length of the LongRoPE checkpoint, which is stretched to 128."""
STRETCHED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn without its original length": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""Of a model made for 32 tokens, to 128."""

_random = random.Random(3)


def tokens(count: int) -> list[int]:
    return [_random.randrange(3, VOCAB) for _ in range(count)]


@cache
def right(folder: Path, ids: tuple[int, ...], length: int) -> torch.Tensor:
    """Log-probabilities [len(ids), vocab] by transformers of a sequence that may get `length` tokens long."""
    return score(folder, [*ids] + [0] * (length - len(ids)))[: len(ids)]


def of_next(logprobs: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.fixture
def stretched(tiny, tmp_path):
    """`stretched(rope)` is a checkpoint for 32 tokens, with this stretch in its config.json."""

    def copied(rope: dict) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny("llama2"), folder)
        edit_config(folder, max_position_embeddings=32, rope_parameters={"rope_theta": 10000.0, **rope})
        return folder

    return copied


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = build(families.read(folder), ParallelState(Layout()), dtype=dtype, device=torch.device("cpu"))
    load_folder(decoder, folder)
    return decoder.requires_grad_(False)


# ---- how far, and that it is right there


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_stretched_model_is_used_to_its_stretched_length(kind, stretched):
    folder = stretched(STRETCHED[kind])
    decoder = decoder_of(folder)
    assert decoder.config.max_position_embeddings == 128
    sequences = [tokens(length) for length in (20, 128, 32, 33, 60)]
    got = decoder.logits(decoder(torch.tensor(sum(sequences, [])), PackedAttention([len(ids) for ids in sequences])))
    found = zip(sequences, got.log_softmax(-1).split([len(ids) for ids in sequences]), strict=True)
    for ids, logprobs in sorted(found, key=lambda one: len(one[0])):  # transformers' dynamic rope stays stretched
        torch.testing.assert_close(logprobs, score(folder, ids), atol=TOLERANCE, rtol=0)


YARN, LINEAR = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}
LLAMA3 = STRETCHED["llama3"]


@pytest.mark.parametrize(
    ("stated", "rope", "longest"),
    [
        (32768, {"rope_type": "default"}, 32768),
        (32768, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # as Qwen2.5's model card has it
        (40960, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # Qwen3's
        (131072, {**YARN, "original_max_position_embeddings": 32768}, 131072),
        (163840, {**YARN, "factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek V3's
        (200, {**YARN, "factor": 2.5, "original_max_position_embeddings": 64}, 200),
        (30, {**LINEAR, "factor": 2.55}, 76),
        (8192, {**LINEAR, "original_max_position_embeddings": 2048}, 8192),
        (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
        (131072, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.1's
        (131072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.2's
        (8192, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
        (2048, {**LINEAR, "factor": 1e299}, 1 << 30),
        (2048, {**LINEAR, "factor": 0.5}, 2048),
    ],
)
def test_how_long_a_sequence_may_get(stated, rope, longest, tiny):
    values = json.loads((tiny("llama2") / "config.json").read_text())
    config = families.from_values(
        Path("config.json"), {**values, "max_position_embeddings": stated, "rope_parameters": rope}
    )
    assert config.max_position_embeddings == longest


def test_dynamic_needs_more_than_one_pair_of_channels(tiny):
    values = json.loads((tiny("llama2") / "config.json").read_text())
    changes = {"head_dim": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(CheckpointError, match="dynamic needs 4 rotated channels or more"):
        families.from_values(Path("config.json"), {**values, **changes})


def test_phi3_takes_its_original_length_beside_the_rope(tiny):
    """As transformers, whose class has 4096 there by default and lets it win."""
    from transformers import Phi3Config

    values = json.loads((tiny("phi3_longrope") / "config.json").read_text())
    for changes in ({}, {"original_max_position_embeddings": 64}, {"original_max_position_embeddings": None}):
        given = {key: value for key, value in {**values, **changes}.items() if value is not None}
        wanted = Phi3Config(**json.loads(json.dumps(given))).rope_parameters["original_max_position_embeddings"]
        got = families.from_values(Path("config.json"), given).ropes[0].scaling.original_max_position
        assert got == wanted


def test_divisors_are_not_rounded_to_the_models_dtype(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("phi3_longrope"), folder)
    given = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_config(folder, rope_parameters={**given, "short_factor": [1.0199999809, 1.0299999713]})
    short = torch.tensor([1])
    half = decoder_of(folder, torch.bfloat16)._rotaries[0].frequencies(short)
    plain = Rotary(replace(families.read(folder).ropes[0], scaling=None)).frequencies(short)
    torch.testing.assert_close(half, plain / torch.tensor([[1.0199999809, 1.0299999713]]), atol=0, rtol=0)


# ---- LongRoPE's divisors are the request's own


Ask = tuple[list[int], SamplingParams]


def ask(limit: int, prompt: int | list[int], **params) -> Ask:
    """A request that may get `limit` tokens long."""
    ids = tokens(prompt) if isinstance(prompt, int) else prompt
    params = {"ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0, **params}
    return ids, SamplingParams(max_tokens=limit - len(ids), **params)


SHARED = tokens(24)
ASKS = [
    ask(24, 24),  # only scored
    ask(BORDER, 20, n=3),
    ask(BORDER + 1, 20, n=2),
    ask(BORDER, SHARED),
    ask(BORDER + 8, SHARED),  # the same prompt on the other side of the border
    ask(BORDER, SHARED, temperature=0),
    ask(120, SHARED[:16] + tokens(40)),
    ask(BORDER + 1, BORDER + 1),
    ask(BORDER, BORDER),
    ask(31, 2, temperature=0),
    ask(60, 3),
]


def generate(rank: int, folder: Path, engine: dict, rounds: list[list[Ask]]) -> tuple[list, int, int]:
    """Outputs, preemptions and prefix hits of rounds of requests to one engine."""
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32"),
        engine=EngineSection(**{"block_size": 4, "check_lockstep": True, **engine}),
    )
    replica, _ = load_replica(config, PoolRuntime(rank, 1))
    limits, running, outputs = prompt_limits(replica), replica.engine(), []
    for key, asks in enumerate(rounds):
        made = [make_request(*one, limits, i) for i, one in enumerate(asks)]
        outputs += run_everywhere(replica, running, made, key=str(key))
    return outputs, running.scheduler.stats.preemptions, running.scheduler.stats.prefix_hit_tokens


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"num_kv_blocks": 32, "max_model_len": 128},
        {"num_kv_blocks": 32, "max_model_len": 128, "swap_space": 0.001, "enable_prefix_caching": False},
    ],
    ids=["roomy", "in chunks", "recomputed", "swapped"],
)
def test_requests_on_both_sides_of_the_border(engine, tiny, ranks):
    folder = tiny("phi3_longrope")
    rounds = [ASKS, ASKS] if not engine else [ASKS]  # the second with a warm cache
    [(outputs, preemptions, hits)] = ranks(1).run(generate, folder, engine, rounds)
    for (prompt, params), output in zip(sum(rounds, []), outputs, strict=True):
        length = len(prompt) + params.max_tokens
        for made in output.outputs:
            ids = prompt + made.token_ids
            assert len(ids) == length
            wanted = of_next(right(folder, tuple(ids), length), ids).tolist()
            assert scored(output, prompt) + made.token_logprobs == pytest.approx(wanted, abs=TOLERANCE)
    assert bool(preemptions) == ("num_kv_blocks" in engine)
    assert hits > 0, "samples share, and so do requests on the same side"


def scored(output, prompt: list[int]) -> list[float]:
    return [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]


def test_what_is_cut_by_an_early_end_keeps_the_divisors_of_its_limit(tiny, ranks):
    """A request's keys are cached as they were rotated, so its divisors can't follow what came of it."""
    folder, ids = tiny("phi3_longrope"), tokens(12)
    stopped = SamplingParams(max_tokens=60, temperature=0, stop_token_ids=list(range(VOCAB)), prompt_logprobs=0)
    [([output], _, _)] = ranks(1).run(generate, folder, {}, [[(ids, stopped)]])
    assert len(output.outputs[0].token_ids) == 1
    got = scored(output, ids)
    assert got == pytest.approx(of_next(right(folder, tuple(ids), 72), ids).tolist(), abs=TOLERANCE)
    assert got != pytest.approx(of_next(right(folder, tuple(ids), 13), ids).tolist(), abs=0.05)


def test_in_training_by_the_length_of_each_sequence(tiny):
    folder = tiny("phi3_longrope")
    model = LanguageModel(decoder_of(folder))
    sequences = [tokens(length) for length in (BORDER + 1, 5, BORDER, 90)]
    batch = from_sequences(sequences, [[1.0] * (len(ids) - 1) for ids in sequences]).padded(32)
    got = model(batch).split([*(len(ids) - 1 for ids in sequences), batch.lengths[-1]])
    for ids, logprobs in zip(sequences, got, strict=False):
        torch.testing.assert_close(logprobs, of_next(score(folder, ids), ids), atol=TOLERANCE, rtol=0)


def test_a_batch_on_a_device_says_each_tokens_longest_length():
    """Of chunks and decodes, as they are and padded; of captured decode steps see test_kernels_step.py."""
    cache = DeviceCache({0: CacheSpec.keys_and_values(1, 4)}, 32, block_size=4, dtype=torch.float32)
    rows = Rows(4, 128, cache=cache)

    def row(number: int, prompt: int, limit: int, start: int, count: int) -> Row:
        request = make_request_of(prompt, limit)
        sequence = Sequence(request, 0, list(request.prompt_token_ids), row=number, blocks=[2 * number, 2 * number + 1])
        rows.admit([sequence])
        return Row(sequence, number, start, count, start + count == prompt)

    for plan, lengths, positions in [
        ((row(3, 6, 20, 0, 5), row(0, 3, 70, 2, 1)), [20] * 5 + [70], [0, 1, 2, 3, 4, 2]),
        ((row(3, 6, 20, 5, 1), row(0, 3, 70, 2, 1), row(1, 1, 9, 0, 1)), [20, 70, 9], [5, 2, 0]),
    ]:
        step = StepPlan(0, 0, plan)
        for batch in (rows.batch(step), rows.chunk_batch(torch.from_numpy(rows.step_inputs(step, 4)), 8)):
            assert batch.context.lengths[: len(lengths)].tolist() == lengths
            assert batch.context.positions[: len(lengths)].tolist() == positions


def make_request_of(prompt: int, limit: int):
    from megalite.inference.io.inputs import PromptLimits

    limits = PromptLimits(tokenizer=None, vocab_size=VOCAB, max_model_len=128)
    return make_request(tokens(prompt), SamplingParams(max_tokens=limit - prompt), limits)


def test_key_variants(tiny, stretched):
    longrope, plain = families.read(tiny("phi3_longrope")), families.read(tiny("llama3"))
    dynamic = families.read(stretched(STRETCHED["dynamic"]))
    for model, (length, other) in product((longrope, plain, dynamic), product((5, 32, 33, 100), repeat=2)):
        # where equal, the frequencies are; where they differ, sharing would be wrong
        frequencies = Rotary(model.ropes[0]).frequencies(torch.tensor([length, other]))
        alike = len(frequencies) == 1 or torch.equal(*frequencies)
        assert (model.key_variant(length) == model.key_variant(other)) == alike
