"""The sampling kernels against the host's arithmetic on the same integer weights: the same token, whatever the logits.

Compiled where there is a CUDA device, under Triton's interpreter where there is none; skipped without Triton.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_sampler import uniform
from test_kernels import CUDA, DEVICE, needs_triton  # first: it chooses the interpreter
from test_sampler import Engine, make_row, random_masks

from megalite.config.schema import SamplingParams
from megalite.inference import draws
from megalite.inference.device_sampler import DeviceSampler
from megalite.kernels import penalties, sampling, weights
from megalite.kernels.jit import jit, tl

pytestmark = needs_triton
INF = math.inf


@pytest.fixture
def small(monkeypatch):
    """Chunks, samples and lists so small that short rows have many, and lists that overflow."""
    for name, value in {"CHUNK": 128, "SPAN": 64, "SAMPLE": 128, "GROUP": 4, "LISTED": 64}.items():
        monkeypatch.setattr(sampling, name, value)


@jit
def _weigh(logits, table, out, vocab, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    _, least, _, temperature = weights._parameters(table, n)
    x = weights._load(logits, n, vocab, at, vocab)
    found = weights._weights(x, tl.max(x, 0), temperature, least, SCALE)
    tl.store(out + n * vocab + at, found.to(tl.int64), mask=at < vocab)


def make_table(options):
    """Rows of parameters, as the sampler keeps them, from dicts."""
    table = np.zeros((len(options), sampling.WIDTH), np.int64)
    for row, given in zip(table, options, strict=True):
        row[sampling.SEED] = given.get("seed", 0)
        row[sampling.INDEX] = given.get("index", 0)
        row[sampling.PROMPT] = given.get("prompt", 0)
        row[sampling.TOP_K] = given.get("top_k", 0)
        row[sampling.LEAST] = given.get("least", 0)
        floats = row.view(np.float64)
        floats[sampling.TOP_P], floats[sampling.TEMPERATURE] = given.get("top_p", 1.0), given.get("temperature", 1.0)
    return torch.from_numpy(table).to(DEVICE)


def expected_ids(logits, options, table, positions):
    """By the host's functions, from the weights that the kernels' exponential gives."""
    n, vocab = logits.shape
    plain = logits.float().clamp(max=2.0**100)
    block = 1 << (vocab - 1).bit_length()
    found = torch.zeros((n, vocab), dtype=torch.int64, device=DEVICE)
    drawn = make_table([{**given, "temperature": given.get("temperature", 1.0) or 1.0} for given in options])
    _weigh[(n,)](plain.contiguous(), drawn, found, vocab, SCALE=2.0 ** weights.weight_bits(vocab), BLOCK=block)
    ids = []
    for i, given in enumerate(options):
        mine, row = found[i : i + 1].cpu(), plain[i].cpu()
        if row.isnan().any() or row.max() == -INF:
            ids.append(-1 if row.isnan().any() else -2)
            continue
        if given.get("temperature", 1.0) == 0:
            ids.append(int(row.numpy().argmax()))
            continue
        place = positions[i] - given.get("prompt", 0)
        number = torch.tensor([uniform(given.get("seed", 0), given.get("index", 0), place)], dtype=torch.float64)
        top_p = torch.tensor([given.get("top_p", 1.0)], dtype=torch.float64)
        if given.get("top_k", 0):
            ids.append(draws.draw_of_best(mine, torch.tensor([given["top_k"]]), top_p, number).item())
        else:
            ids.append(draws.draw(draws.nucleus(mine, top_p) if top_p < 1 else mine, number).item())
    return ids


def check(logits, options):
    """All rows together and some alone, padded with others; -> their ids."""
    logits = logits.to(DEVICE)
    n, vocab = logits.shape
    table, positions = (
        make_table(options),
        [given.get("prompt", 0) + given.get("place", i) for i, given in enumerate(options)],
    )
    rows, at = torch.arange(n, device=DEVICE), torch.tensor(positions, device=DEVICE)
    ids, logprobs, _ = sampling.choose(logits, None, rows, at, table)
    assert ids.tolist() == expected_ids(logits, options, table, positions)
    scores = logits.double().clamp(max=2.0**100).log_softmax(-1)
    for i, token in enumerate(ids.tolist()):
        if token >= 0:
            assert logprobs[i].item() == pytest.approx(scores[i, token].item(), abs=2e-5)
    order = torch.arange(n - 1, -1, -4, device=DEVICE)
    again = sampling.choose(logits[order], None, order, at[order], table)
    assert torch.equal(again[0], ids[order]) and torch.equal(again[1], logprobs[order])
    return ids.tolist()


WAYS = [
    dict(temperature=0.0),
    dict(),
    dict(temperature=0.7),
    dict(top_p=0.9),
    dict(temperature=0.7, top_p=0.95),
    dict(top_p=0.5, temperature=3.0),
    dict(top_p=1e-9),
    dict(top_p=1 - 1e-12, temperature=5.0),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=40, temperature=2.0),
    dict(top_k=150, top_p=0.8, temperature=4.0),
    dict(top_k=7, top_p=0.6),
    dict(least=2**30),
    dict(least=2**40, top_p=0.9, temperature=2.0),
]
SHAPES = {
    "random": lambda n, v, g: torch.randn(n, v, generator=g) * 2,
    "flat": lambda n, v, g: torch.zeros(n, v),
    "nearly flat": lambda n, v, g: torch.randint(0, 2, (n, v), generator=g) / 64,
    "few values": lambda n, v, g: torch.randint(-3, 4, (n, v), generator=g).float(),
    "spike": lambda n, v, g: torch.zeros(n, v).index_fill_(1, torch.tensor([v // 3]), 20.0),
    "steep": lambda n, v, g: -torch.rand(n, v, generator=g).cumsum(1),
    "mostly ruled out": lambda n, v, g: torch.randn(n, v, generator=g).masked_fill(
        torch.rand(n, v, generator=g) < 0.9, -INF
    ),
    "far apart": lambda n, v, g: torch.randn(n, v, generator=g) * 30,
}


@pytest.mark.parametrize(
    ("shape", "vocab", "dtype"),
    [(shape, 200, torch.float32) for shape in SHAPES]
    + [("random", 200, torch.bfloat16), ("random", 67, torch.float16), ("flat", 1, torch.float32)],
)
def test_tokens_equal_the_host_s(shape, vocab, dtype, small):
    generator = torch.Generator().manual_seed(vocab)
    first = list(SHAPES).index(shape)
    ways = WAYS if CUDA else [*WAYS[first::8], *WAYS[first + 4 :: 8]]  # the interpreter is slow
    ways = [way for way in ways if way.get("top_k", 0) < vocab]
    options = [{**way, "seed": 7 * i - 3, "index": i % 3, "prompt": i, "place": i % 5} for i, way in enumerate(ways)]
    check(SHAPES[shape](len(options), vocab, generator).to(dtype), options)


@pytest.mark.parametrize("options", [WAYS[1], WAYS[4]], ids=str)
def test_many_draws(options, small):
    """Every place of a row can come, and no other."""
    logits = (torch.randn(1, 200, generator=torch.Generator().manual_seed(1)) * 2).expand(6, 200)
    check(logits, [{**options, "seed": 1000 + i, "place": 0} for i in range(6)])


def test_windows_are_found_from_samples(monkeypatch, small):
    """Where the sample is small and rows are long, most borders are inside the window all the same."""
    monkeypatch.setattr(sampling, "LISTED", 1024)
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(4))
    check(
        logits,
        [dict(top_p=0.9), dict(top_p=0.5, temperature=0.5), dict(top_k=20)],
    )


def test_extremes(small):
    logits = torch.zeros(8, 150)
    logits[0, 3] = math.nan
    logits[1] = -INF
    logits[2, 140] = INF
    logits[3, 5], logits[3, 6] = 3e38, -3e38
    logits[4, :149] = -INF
    logits[5] = -3e38
    logits[6] = INF
    logits[7, 149] = math.nan
    for way in (
        dict(temperature=0.0),
        dict(),
        dict(top_p=0.5),
        dict(top_k=2),
        dict(temperature=0.01, top_k=3, top_p=0.3),
    ):
        ids = check(logits, [way] * 8)
        assert ids[:2] == [-1, -2] and ids[2] == 140 and ids[3] == 5 and ids[4] == 149 and ids[7] == -1


def test_log_probabilities_are_of_raw_logits_and_may_be_at_temperature(small):
    raw = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    edited = raw.clone()
    edited[:, :190] = -INF
    options = [dict(temperature=0.0), dict(temperature=0.5), dict(top_k=2, temperature=2.0), dict(top_p=0.4)]
    rows = torch.arange(4, device=DEVICE)
    for at_temperature in (False, True):
        ids, logprobs, _ = sampling.choose(raw, edited, rows, rows, make_table(options), at_temperature=at_temperature)
        assert min(ids.tolist()) >= 190
        for i, given in enumerate(options):
            divisor = given.get("temperature", 1.0) or 1.0 if at_temperature else 1.0
            scores = (raw[i].double() / divisor).log_softmax(-1)
            assert logprobs[i].item() == pytest.approx(scores[ids[i]].item(), abs=2e-5)


def test_the_device_s_sampler_gives_what_the_host_s_does(small):
    """Edits, penalties, log-probabilities and draws, over a few steps of growing rows."""
    vocab = 150
    options = [
        dict(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3),
        dict(temperature=0.8, top_p=0.9, frequency_penalty=-0.5, logprobs=3),
        dict(temperature=0, logit_bias={3: 9.0, 140: -5.0}, logprobs=-1),
        dict(allowed_token_ids=[5, 6, 7, 77], top_k=2, min_tokens=2),
        dict(temperature=0, bad_words=["as tokens below"], logprobs=0),
        dict(min_p=0.05, seed=3),
    ]
    generator = torch.Generator().manual_seed(0)
    sequences = [
        make_row(
            SamplingParams(**given),
            seed=i,
            prompt=torch.randint(vocab, (4 + i,), generator=generator).tolist(),
            output=(9, 9, 5)[: i % 4],
            stop=(5, 6, 9999),
            bad_words=[(77,), (1, 2), (9, 9, 5, 8)] if "bad_words" in given else [],
        )
        for i, given in enumerate(options)
    ]
    engine = Engine(vocab, sequences)
    device = DeviceSampler(engine.tokens.to(DEVICE), vocab, lambda values: torch.from_numpy(values).to(DEVICE), False)
    rows = [sequence.row for sequence in sequences]
    device.admit(rows, [engine.sampler._params[row] for row in rows])
    for sequence in sequences:
        device.edits.admit(sequence.row, sequence)
    device.penalties.admit(
        [(sequence.row, sequence) for sequence in sequences if engine.sampler._params[sequence.row].penalised]
    )
    for _ in range(4):
        logits = (torch.randn(len(rows), vocab, generator=generator) * 8).round() / 4
        logits[4, [77, 8]] = 30.0  # bad words
        masks = random_masks([1, 5], vocab, generator)
        expected, needs = engine.sample(logits, masks=masks), engine.sampler.needs(sequences)
        positions = torch.tensor([len(sequence.token_ids) for sequence in sequences], device=DEVICE)
        assert needs.edits and needs.longest and needs.logprobs
        with torch.inference_mode():
            got = device.sample(logits.to(DEVICE), torch.tensor(rows, device=DEVICE), positions, needs, masks).to_host()
        if CUDA:
            torch.cuda.synchronize()
        got = got.listed()
        assert got.token_ids == expected.token_ids
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        for mine, theirs in zip(got.top_logprobs, expected.top_logprobs, strict=True):
            if theirs is None:
                assert mine is None
                continue
            assert (mine.token_id, mine.rank) == (theirs.token_id, theirs.rank)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        for sequence, token in zip(sequences, got.token_ids, strict=True):
            sequence.token_ids.append(token)
            engine.write(sequence)
            device.edits.tokens[sequence.row, len(sequence.token_ids) - 1] = token


def test_a_copy_leaves_out_what_the_row_s_mask_does_not_name():
    count, vocab = 3, penalties.CHUNK + 70
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, vocab + 5, generator=generator)[:, :vocab].to(DEVICE)
    masks = torch.randint(-(2**31), 2**31, (2, vocab // 32 + 3), generator=generator).int().to(DEVICE)
    out = torch.empty(count, vocab, device=DEVICE)
    penalties.copy_allowed(logits, out, masks, torch.tensor([1, -1, 0], dtype=torch.int32, device=DEVICE))
    bits = masks[:, :, None] >> torch.arange(32, device=DEVICE) & 1
    allowed = bits.flatten(1)[:, :vocab].bool()
    assert torch.equal(out[1], logits[1])
    for row, mask in ((0, allowed[1]), (2, allowed[0])):
        assert torch.equal(out[row], torch.where(mask, logits[row], -INF)) and mask.any() and not mask.all()
