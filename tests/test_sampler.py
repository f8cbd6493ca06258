"""The sampler against a slow, plain reference, and the promises it makes about batches, ties and extremes."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_sampler import INF, TooClose, next_token, ruled_out

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference.draws import RUN, draw, draw_by_runs, uniform
from megalite.inference.request import Request, Row, Sequence
from megalite.inference.sampler import CPU_CHUNK, Sampler

VOCAB = 24
"""Of the comparison over all options."""
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def make_row(params, *, seed=0, index=0, prompt=(0,), output=(), stop=(), bad_words=(), request_id="r"):
    request = Request(
        id=request_id,
        prompt_token_ids=tuple(prompt),
        params=params,
        seed=seed,
        max_tokens=1000,
        stop_token_ids=frozenset(stop),
        bad_words=tuple(map(tuple, bad_words)),
    )
    tokens = [*prompt, *output]
    return Row(Sequence(request=request, index=index, token_ids=tokens), len(tokens) - 1, 1, True)


def sample_one(logits, params, **where):
    logits = torch.as_tensor(logits)[None]
    return Sampler(logits.shape[1]).sample(logits, [make_row(params, **where)])


def ruled_out_of(row, vocab):
    """Ids that must not come next in a row."""
    sequence, request = row.sequence, row.sequence.request
    output = sequence.token_ids[sequence.num_prompt :]
    return ruled_out(request.params, output, stops=request.stop_token_ids, bad_words=request.bad_words, vocab=vocab)


def reference_token(logits, row):
    sequence, request = row.sequence, row.sequence.request
    prompt, output = sequence.token_ids[: sequence.num_prompt], sequence.token_ids[sequence.num_prompt :]
    number = uniform(request.seed, sequence.index, sequence.num_output)
    return next_token(logits, request.params, prompt, output, ruled_out_of(row, len(logits)), number)


def log_softmax(logits):
    peak = max(logits)
    total = math.log(sum(math.exp(x - peak) for x in logits))
    return [x - peak - total for x in logits]


# Quarters and powers of two, so that float32 and the reference's doubles agree on what is a tie.
tokens = st.integers(0, VOCAB - 1)
rows_of_logits = (
    st.binary(min_size=VOCAB, max_size=VOCAB)
    .map(lambda data: [-INF if byte >= 235 else (byte % 49 - 24) / 4 for byte in data])
    .filter(lambda row: sum(x > -INF for x in row) > 6)
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 0.7, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, VOCAB - 1, VOCAB, 10 * VOCAB]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.77, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.4, 1.0 - 1e-4]),
    presence_penalty=st.sampled_from([0.0, 0.75, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
    min_tokens=st.sampled_from([0, 0, 3]),
    logit_bias=st.none() | st.dictionaries(tokens, st.integers(-40, 40).map(lambda n: n / 4), max_size=3),
    logprobs=st.sampled_from([None, 0, 3, -1]),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=30),
)
sampled_rows = st.builds(
    make_row,
    params,
    seed=st.integers(-(2**63), 2**64),
    index=st.integers(0, 5),
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(st.integers(0, 3) | tokens, max_size=6),
    stop=st.sets(tokens, max_size=3),
    bad_words=st.lists(st.lists(st.integers(0, 3) | tokens, min_size=1, max_size=3), max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(rows_of_logits, sampled_rows), min_size=1, max_size=6))
def test_equals_reference_for_every_combination_of_options(cases):
    logits = [values for values, _ in cases]
    rows = [row for _, row in cases]
    for values, row in cases:
        withheld = ruled_out_of(row, VOCAB)
        assume(any(x > -INF for token, x in enumerate(values) if token not in withheld))
    got = Sampler(VOCAB).sample(torch.tensor(logits), rows)
    compared = 0
    for values, row, token, logprob in zip(logits, rows, got.token_ids, got.logprobs, strict=True):
        try:
            assert token == reference_token(values, row)
        except TooClose:
            continue
        compared += 1
        assert logprob == pytest.approx(log_softmax(values)[token], abs=1e-5)
    assume(compared)


OPTIONS = {
    "greedy": dict(temperature=0),
    "plain": dict(),
    "cold": dict(temperature=0.2),
    "hot": dict(temperature=100.0),
    "top_k": dict(top_k=40),
    "top_k_large": dict(top_k=2500, temperature=3.0),
    "top_p": dict(top_p=0.9),
    "top_p_hot": dict(top_p=0.6, temperature=20.0),
    "min_p": dict(min_p=0.02, temperature=1.5),
    "top_k_top_p": dict(top_k=50, top_p=0.8, temperature=1.3),
    "min_p_top_p": dict(min_p=0.001, top_p=0.95, temperature=2.0),
    "all": dict(min_p=0.001, top_k=100, top_p=0.9, temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3),
    "bias": dict(logit_bias={3: 5.0, 7: -100.0}, presence_penalty=0.5),
    "min_tokens": dict(min_tokens=100, top_p=0.99),
}


def mixed_rows(copies, vocab):
    """Rows that take every path of the sampler, each with a history of its own."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for n in range(copies):
        for name, options in OPTIONS.items():
            history = torch.randint(vocab, (12 + n,), generator=generator).tolist()
            where = {"prompt": history[:10], "output": history[10:], "stop": {1, 2}, "request_id": f"{name}-{n}"}
            params = SamplingParams(**options, logprobs=4 if n == 1 else None)
            rows.append(make_row(params, seed=n, index=n % 3, **where))
    return rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_reference_s_token_alone_and_in_any_batch(dtype, device):
    vocab = 5003  # odd, so that rows of a batch begin anywhere between vector registers
    rows = mixed_rows(8, vocab)
    assert len(rows) * vocab > 4 * CPU_CHUNK  # several chunks
    logits = (3 * torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(5))).to(device, dtype)
    before = logits.clone()
    together = Sampler(vocab).sample(logits, rows)
    assert torch.equal(logits, before), "logits are left as they are"
    compared = dict.fromkeys(OPTIONS, 0)
    for i, (values, row) in enumerate(zip(logits.tolist(), rows, strict=True)):
        name = row.sequence.request.id
        alone = Sampler(vocab).sample(logits[i : i + 1].clone(), [row])
        assert alone.token_ids[0] == together.token_ids[i], name
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.top_logprobs[0] == together.top_logprobs[i]
        try:
            assert together.token_ids[i] == reference_token(values, row), name
            compared[name.split("-")[0]] += 1
        except TooClose:
            pass
    assert min(compared.values()) >= 4
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = Sampler(vocab).sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]
    assert shuffled.logprobs == [together.logprobs[i] for i in order]


def test_uniform_numbers_are_fixed_for_ever_and_uniform():
    assert [uniform(0, 0, 0), uniform(1, 2, 3), uniform(-(2**63), 7, 4095)] == [
        0.968251126188258,
        0.23007633747213896,
        0.21556612081249493,
    ]
    numbers = [uniform(5, 0, position) for position in range(4000)]
    counts = torch.tensor(numbers).histc(20, 0, 1)
    assert 0 <= min(numbers) < 0.002 and 0.998 < max(numbers) < 1 and len(set(numbers)) == 4000
    assert ((counts - 200) ** 2 / 200).sum() < 19 + 4 * math.sqrt(2 * 19)
    # No two of the three may stand for each other.
    assert len({uniform(1, 11, 1), uniform(11, 1, 1), uniform(1, 1, 11), uniform(111, 1, 1)}) == 4


def test_no_number_draws_a_token_of_weight_zero():
    last = 1 - 2.0**-53
    for whole in (1, 3, 2**44, 2**53 + 1, 2**60 + 255, 2**61 - 1, 2**62 - 1):
        weights = torch.tensor([[0, whole, 0], [0, whole, 0]])
        assert draw(weights, torch.tensor([0.0, last], dtype=torch.float64)).tolist() == [1, 1]
    weights = torch.tensor([[0, 2, 0, 1, 1, 0]]).expand(5, 6).contiguous()
    numbers = torch.tensor([0.0, 0.4999, 0.5, 0.75, last], dtype=torch.float64)
    assert draw(weights, numbers).tolist() == [1, 1, 3, 4, 4]


@pytest.mark.parametrize("length", [1, RUN, RUN + 1, 5 * RUN + 3])
def test_running_sums_of_runs_draw_the_same(length):
    generator = torch.Generator().manual_seed(length)
    weights = (torch.rand(64, length, generator=generator) ** 20 * 2**52).long()
    weights[torch.rand(64, length, generator=generator) < 0.7] = 0
    weights[:, length // 2] += 1
    numbers = torch.rand(64, dtype=torch.float64, generator=generator)
    numbers[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_by_runs(weights, numbers).tolist() == draw(weights, numbers).tolist()


def drawn(logits, count=100, **options):
    """Ids that `count` seeds draw."""
    rows = [make_row(SamplingParams(**options), seed=n) for n in range(count)]
    return set(Sampler(len(logits)).sample(torch.tensor([logits] * count), rows).token_ids)


TIED = [1.0, 5.0, 5.0, 5.0, 0.0, 5.0]
HALVES = [0.0, -math.log(2), -math.log(4.01), -9.0]


@pytest.mark.parametrize(
    ("logits", "options", "ids"),
    [
        (TIED, {"temperature": 0}, {1}),
        (TIED, {"top_k": 2}, {1, 2}),
        # 0.7 of four equals (the others hold under 1%) is reached by three of them.
        (TIED, {"top_p": 0.7}, {1, 2, 3}),
        (TIED, {"top_p": 0.7, "top_k": 4}, {1, 2, 3}),
        # top_p stops exactly where it is reached: two of four equals hold a half.
        ([0.0] * 4, {"top_p": 0.5}, {0, 1}),
        (HALVES, {"min_p": 0.25}, {0, 1}),
        (HALVES, {"min_p": 0.24}, {0, 1, 2}),
    ],
)
def test_equals_rank_by_id_and_what_is_at_a_threshold_stays(logits, options, ids):
    assert drawn(logits, **options) == ids


def test_samples_of_one_request_differ_and_repeat():
    def draw_all(seed):
        rows = [make_row(SamplingParams(n=3), seed=seed, index=i % 3, output=[0] * (i // 3)) for i in range(30)]
        return Sampler(1000).sample(torch.zeros(30, 1000), rows).token_ids

    assert draw_all(1) == draw_all(1) != draw_all(2)
    samples = [draw_all(1)[start::3] for start in range(3)]
    assert samples[0] != samples[1] != samples[2] != samples[0]


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(top_p=1e-12), dict(top_p=0.0), dict(min_p=1.0), dict(temperature=1e-6)], ids=str
)
def test_narrowest_settings_are_greedy(options):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    rows = [make_row(SamplingParams(**options), seed=n) for n in range(50)]
    # min_p keeps all equals of the best.
    if "min_p" in options:
        logits = logits.float() + torch.rand(50, 300)
    assert Sampler(300).sample(logits, rows).token_ids == logits.argmax(-1).tolist()


def test_penalties_follow_a_growing_sequence():
    vocab = 50
    generator = torch.Generator().manual_seed(0)
    options = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3)
    rows = [make_row(options, seed=n, prompt=(3, 3, 4 + n)) for n in range(3)]
    sampler = Sampler(vocab)
    repeated = 0
    for _ in range(40):
        logits = torch.randn(3, vocab, generator=generator)
        got = sampler.sample(logits, rows).token_ids
        assert got == [reference_token(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
        assert got == Sampler(vocab).sample(logits, rows).token_ids  # as if it had never seen them before
        for row, token in zip(rows, got, strict=True):
            repeated += token in row.sequence.token_ids
            row.sequence.token_ids.append(token)
    assert repeated > 3  # so counts above one were there
    assert len(sampler._seen) == 3
    sampler.forget(rows[0].sequence)
    rows[1].sequence.finish_reason = "abort"
    sampler.sample(torch.randn(1, vocab), [make_row(options)])  # a new sequence makes room
    assert len(sampler._seen) == 2


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_p=0.5), dict(top_k=2)], ids=str)
def test_extreme_logits(options):
    params = SamplingParams(**options)
    only = sample_one([-INF, -INF, 2.0, -INF, -INF], params)
    assert (only.token_ids, only.logprobs) == ([2], [0.0])
    certain = sample_one([0.0, 1.0, 2.0, INF, -3.0], params)
    assert (certain.token_ids, certain.logprobs) == ([3], [0.0])
    huge = sample_one([3e38, -3e38, 0.0, 1.0, 2.0], params)
    assert (huge.token_ids, huge.logprobs) == ([0], [0.0])
    penalised = SamplingParams(**options, repetition_penalty=0.5)
    assert sample_one([3e38, INF, 0.0, 1.0, 2.0], penalised, prompt=(0, 1)).token_ids[0] in (0, 1)
    for bad, message in (([0.0, math.nan, 2.0], "NaN"), ([-INF] * 3, "ruled out")):
        logits = torch.tensor([[0.0, 1.0, 2.0], bad])
        rows = [make_row(params), make_row(params, request_id="the-bad-one")]
        with pytest.raises(MegaliteError, match=f"the-bad-one: .*{message}"):
            Sampler(3).sample(logits, rows)


def test_ids_beyond_the_vocabulary_are_withheld_in_vain_or_refused():
    """A stop token or a token of a bad word may be one that the model does not have; a bias names one of its own."""
    greedy = SamplingParams(temperature=0, min_tokens=2)
    assert sample_one([0.0, 9.0, 8.0], greedy, stop=(1, 77), bad_words=[(7,), (0,)]).token_ids == [2]
    with pytest.raises(MegaliteError, match="request r: every token is ruled out"):
        sample_one([0.0, 9.0, 8.0], greedy, stop=(0, 1, 2))
    with pytest.raises(MegaliteError, match=r"request r: logit_bias: token id must be in 0\.\.2, got 3"):
        sample_one([0.0, 5.0, 1.0], SamplingParams(logit_bias={3: 1.0}))


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_of_the_raw_logits(device):
    logits = [[0.5, -INF, 3.0, 3.0, 1.0, -2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={0: 50.0})
    got = Sampler(6).sample(torch.tensor(logits, device=device), [make_row(params), make_row(SamplingParams(top_k=1))])
    expected = log_softmax(logits[0])
    assert got.token_ids == [0, 5]
    assert got.logprobs[0] == pytest.approx(expected[0], abs=1e-6)
    detail = got.top_logprobs[0]
    assert (detail.token_id, detail.rank) == (0, 4)
    assert detail.logprob == got.logprobs[0]
    assert [token for token, _ in detail.top] == [2, 3, 0]
    assert [value for _, value in detail.top] == pytest.approx([expected[t] for t in (2, 3, 0)], abs=1e-6)
    assert got.top_logprobs[1] is None


def test_a_token_among_the_likeliest_is_listed_once():
    logits = torch.tensor([2.0, 3.0, 3.0, 1.0])
    for k, ids in ((0, [1]), (1, [1]), (3, [1, 2, 0]), (9, [1, 2, 0, 3]), (-1, [1, 2, 0, 3])):
        detail = sample_one(logits, SamplingParams(temperature=0, logprobs=k)).top_logprobs[0]
        assert [token for token, _ in detail.top] == ids
        assert detail.rank == 1


@pytest.mark.parametrize("device", DEVICES)
def test_prompt_logprobs(device):
    vocab, length = 3001, 100  # several chunks
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(length, vocab, generator=generator).bfloat16().to(device)
    next_ids = torch.randint(vocab, (length,), generator=generator).tolist()
    scores = Sampler(vocab).prompt_logprobs(logits, next_ids, 2)
    assert len(scores) == length
    for values, token, score in zip(logits.float().tolist(), next_ids, scores, strict=True):
        best_first = sorted(range(vocab), key=lambda t: (-values[t], t))
        assert score.rank == 1 + best_first.index(token)
        expected = [*best_first[:2], token][: 3 if score.rank > 2 else 2]
        assert [t for t, _ in score.top] == expected
        assert score.logprob == pytest.approx(log_softmax(values)[token], abs=1e-5)
    everything = Sampler(vocab).prompt_logprobs(logits[:2], next_ids[:2], -1)
    assert [sorted(token for token, _ in score.top) for score in everything] == [list(range(vocab))] * 2
    plain = Sampler(vocab).prompt_logprobs(logits, next_ids, 0)
    assert [score.logprob for score in plain] == [score.logprob for score in scores]
    assert [score.rank for score in plain] == [score.rank for score in scores]
    impossible = Sampler(3).prompt_logprobs(torch.tensor([[0.0, -INF, 0.0]]), [1], 0)
    assert impossible[0].logprob == -INF
    assert Sampler(3).prompt_logprobs(torch.empty(0, 3), [], 5) == []
    with pytest.raises(MegaliteError, match="request q7: .*NaN"):
        Sampler(3).prompt_logprobs(torch.tensor([[0.0, math.nan, 0.0]]), [1], 0, request_id="q7")


def test_no_rows_give_nothing():
    got = Sampler(7).sample(torch.empty(0, 7), [])
    assert (got.token_ids, got.logprobs, got.top_logprobs) == ([], [], [])
