"""The sampler against a slow, plain reference, and the promises it makes about batches, ties and extremes."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError
from megalite.inference.request import Request, Row, Sequence
from megalite.inference.sampler import CPU_CHUNK, RUN, Sampler, _inverse_cdf, _inverse_cdf_by_runs, uniform

INF = math.inf
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


# The reference: one row, Python floats, sets and sorted lists.


class TooClose(Exception):
    """Rounding decides this case, so the reference can't."""


def reference_distribution(logits, row):
    """{token id: probability} that a row's token is drawn from; one token for temperature 0."""
    sequence, params = row.sequence, row.sequence.request.params
    prompt, output = sequence.token_ids[: sequence.num_prompt], sequence.token_ids[sequence.num_prompt :]
    logits = list(logits)
    for token in ruled_out(row, len(logits)):
        logits[token] = -INF
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    best_first = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:
        return {best_first[0]: 1.0}
    peak = logits[best_first[0]]
    weight = {token: math.exp((logits[token] - peak) / params.temperature) for token in best_first}
    if params.min_p > 0:
        near(*(abs(weight[token] / params.min_p - 1) for token in best_first))
    kept = [token for token in best_first if weight[token] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total = sum(weight[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if nucleus and reached / total >= params.top_p:
            break
        nucleus.append(token)
        reached += weight[token]
        if params.top_p < 1:
            near(abs(reached / total - params.top_p))
    return {token: weight[token] / reached for token in nucleus if weight[token] > 0}


def ruled_out(row, vocab):
    """Ids below `vocab` that must not come next."""
    sequence, params = row.sequence, row.sequence.request.params
    output = sequence.token_ids[sequence.num_prompt :]
    out = set(sequence.request.stop_token_ids) if len(output) < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        out |= set(range(vocab)) - set(params.allowed_token_ids)
    for word in sequence.request.bad_words:
        written = " ".join(map(str, ["", *output, word[-1], ""]))
        if written.endswith(" ".join(map(str, ["", *word, ""]))):
            out.add(word[-1])
    return out


def reference_token(logits, row):
    sequence = row.sequence
    distribution = reference_distribution(logits, row)
    number = uniform(sequence.request.seed, sequence.index, sequence.num_output)
    reached = 0.0
    for token in sorted(distribution):
        reached += distribution[token]
        if len(distribution) > 1:
            near(abs(reached - number))
        if number < reached:
            return token
    raise TooClose


def near(*distances):
    if min(distances) < 2e-6:
        raise TooClose


def log_softmax(logits):
    peak = max(logits)
    total = math.log(sum(math.exp(x - peak) for x in logits))
    return [x - peak - total for x in logits]


# Quarters and powers of two, so that float32 and the reference's doubles agree on what is a tie.
tokens = st.integers(0, VOCAB - 1)
logit = st.one_of(st.integers(-24, 24).map(lambda n: n / 4), st.just(-INF))
rows_of_logits = st.lists(logit, min_size=VOCAB, max_size=VOCAB).filter(lambda row: sum(x > -INF for x in row) > 6)
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


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(rows_of_logits, sampled_rows), min_size=1, max_size=6))
def test_equals_reference_for_every_combination_of_options(cases):
    logits = [values for values, _ in cases]
    rows = [row for _, row in cases]
    for values, row in cases:
        withheld = ruled_out(row, VOCAB)
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
            logprobs = 4 if n == 1 else None
            rows.append(
                make_row(
                    SamplingParams(**options, logprobs=logprobs),
                    seed=n,
                    index=n % 3,
                    prompt=history[:10],
                    output=history[10:],
                    stop={1, 2},
                    request_id=f"{name}-{n}",
                )
            )
    return rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference_with_a_large_vocabulary(name, device):
    vocab = 5003
    generator = torch.Generator().manual_seed(11)
    logits = 3 * torch.randn(20, vocab, generator=generator)
    options = SamplingParams(**OPTIONS[name])
    rows = [make_row(options, seed=n, prompt=(5, n), output=(n, 9, 9), stop=(1, 2)) for n in range(20)]
    got = Sampler(vocab).sample(logits.to(device), rows).token_ids
    compared = 0
    for values, row, token in zip(logits.tolist(), rows, got, strict=True):
        try:
            assert token == reference_token(values, row)
            compared += 1
        except TooClose:
            pass
    assert compared >= 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_alone_and_in_any_batch(dtype, device):
    vocab = 5003  # odd, so that rows of a batch begin anywhere between vector registers
    rows = mixed_rows(4, vocab)
    assert len(rows) * vocab > 2 * CPU_CHUNK  # several chunks
    logits = (4 * torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(5))).to(device, dtype)
    together = Sampler(vocab).sample(logits, rows)
    for i, row in enumerate(rows):
        alone = Sampler(vocab).sample(logits[i : i + 1].clone(), [row])
        assert alone.token_ids[0] == together.token_ids[i], row.sequence.request.id
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.top_logprobs[0] == together.top_logprobs[i]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = Sampler(vocab).sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]
    assert shuffled.logprobs == [together.logprobs[i] for i in order]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=0.6), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=9, top_p=0.9)],
    ids=str,
)
def test_draws_follow_the_distribution(options):
    vocab, draws = 40, 20_000
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(8))
    params = SamplingParams(**options)
    row = make_row(params)
    expected = reference_distribution(logits.tolist(), row)
    # The same logits at many positions of one sequence: only the position differs between draws.
    steps = 1000
    rows = [make_row(params, seed=4, output=(0,) * steps * n) for n in range(draws // steps)]
    sampler = Sampler(vocab)
    counts = dict.fromkeys(expected, 0)
    for _ in range(steps):
        for token in sampler.sample(logits.expand(len(rows), vocab), rows).token_ids:
            counts[token] += 1  # a token that is cut off has no entry
        for row in rows:
            row.sequence.token_ids.append(0)
    common = [token for token in expected if expected[token] * draws > 5]
    chi2 = sum((counts[t] - draws * expected[t]) ** 2 / (draws * expected[t]) for t in common)
    freedom = len(common) - 1
    assert freedom >= 2
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_uniform_numbers_are_fixed_for_ever():
    assert [uniform(0, 0, 0), uniform(1, 2, 3), uniform(-(2**63), 7, 4095)] == [
        0.968251126188258,
        0.23007633747213896,
        0.21556612081249493,
    ]
    numbers = [uniform(5, 0, position) for position in range(4000)]
    assert 0 <= min(numbers) < 0.002 and 0.998 < max(numbers) < 1
    assert len(set(numbers)) == 4000
    # No two of the three may stand for each other.
    assert len({uniform(1, 11, 1), uniform(11, 1, 1), uniform(1, 1, 11), uniform(111, 1, 1)}) == 4


def test_no_number_draws_a_token_of_weight_zero():
    last = 1 - 2.0**-53
    for whole in (1, 3, 2**44, 2**53 + 1, 2**60 + 255, 2**61 - 1, 2**62 - 1):
        weights = torch.tensor([[0, whole, 0], [0, whole, 0]])
        assert _inverse_cdf(weights, torch.tensor([0.0, last], dtype=torch.float64)).tolist() == [1, 1]
    weights = torch.tensor([[0, 2, 0, 1, 1, 0]]).expand(5, 6).contiguous()
    numbers = torch.tensor([0.0, 0.4999, 0.5, 0.75, last], dtype=torch.float64)
    assert _inverse_cdf(weights, numbers).tolist() == [1, 1, 3, 4, 4]


@pytest.mark.parametrize("length", [1, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 3])
def test_running_sums_of_runs_draw_the_same(length):
    generator = torch.Generator().manual_seed(length)
    weights = (torch.rand(64, length, generator=generator) ** 20 * 2**52).long()
    weights[torch.rand(64, length, generator=generator) < 0.7] = 0
    weights[:, length // 2] += 1
    numbers = torch.rand(64, dtype=torch.float64, generator=generator)
    numbers[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert _inverse_cdf_by_runs(weights, numbers).tolist() == _inverse_cdf(weights, numbers).tolist()


def test_samples_of_one_request_differ_and_repeat():
    logits = torch.randn(1, 1000).expand(30, 1000)

    def draw(seed):
        rows = [make_row(SamplingParams(n=3), seed=seed, index=i % 3, output=[0] * (i // 3)) for i in range(30)]
        return Sampler(1000).sample(logits, rows).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    one, two, three = draw(1)[0::3], draw(1)[1::3], draw(1)[2::3]
    assert one != two and two != three and one != three


def test_equal_logits_rank_by_id():
    tied = [1.0, 5.0, 5.0, 5.0, 0.0, 5.0]
    assert sample_one(tied, SamplingParams(temperature=0)).token_ids == [1]
    rows = [make_row(SamplingParams(top_k=2), seed=n) for n in range(100)]
    assert set(Sampler(6).sample(torch.tensor([tied] * 100), rows).token_ids) == {1, 2}
    # 0.7 of four equals (the others hold under 1%) is reached by three of them.
    rows = [make_row(SamplingParams(top_p=0.7), seed=n) for n in range(100)]
    assert set(Sampler(6).sample(torch.tensor([tied] * 100), rows).token_ids) == {1, 2, 3}
    rows = [make_row(SamplingParams(top_p=0.7, top_k=4), seed=n) for n in range(100)]
    assert set(Sampler(6).sample(torch.tensor([tied] * 100), rows).token_ids) == {1, 2, 3}
    # top_p stops exactly where it is reached: two of four equals hold a half.
    rows = [make_row(SamplingParams(top_p=0.5), seed=n) for n in range(100)]
    assert set(Sampler(4).sample(torch.zeros(100, 4), rows).token_ids) == {0, 1}


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


def test_min_p_keeps_tokens_at_the_threshold():
    logits = torch.tensor([0.0, -math.log(2), -math.log(4.01), -9.0]).expand(200, 4)
    rows = [make_row(SamplingParams(min_p=0.25), seed=n) for n in range(200)]
    assert set(Sampler(4).sample(logits, rows).token_ids) == {0, 1}
    rows = [make_row(SamplingParams(min_p=0.24), seed=n) for n in range(200)]
    assert set(Sampler(4).sample(logits, rows).token_ids) == {0, 1, 2}


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


def test_frequency_penalty_ignores_the_prompt():
    row = make_row(SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0), prompt=(1, 1))
    assert Sampler(3).sample(torch.tensor([[0.0, 1.0, 0.5]]), [row]).token_ids == [1]
    row.sequence.token_ids.append(1)
    assert Sampler(3).sample(torch.tensor([[0.0, 1.0, 0.5]]), [row]).token_ids == [2]


def test_min_tokens_withholds_the_end():
    logits = [0.0, 9.0, 8.0, 1.0]
    greedy = SamplingParams(temperature=0, min_tokens=2)
    assert sample_one(logits, greedy, stop=(1, 2)).token_ids == [3]
    assert sample_one(logits, greedy, stop=(1, 2), output=(0,)).token_ids == [3]
    assert sample_one(logits, greedy, stop=(1, 2), output=(0, 0)).token_ids == [1]
    # A bias can't bring it back, and a stop id beyond the vocabulary is no mistake of ours.
    biased = SamplingParams(temperature=0, min_tokens=2, logit_bias={1: 100.0})
    assert sample_one(logits, biased, stop=(1, 77)).token_ids == [2]
    with pytest.raises(MegaliteError, match="request r: every token is ruled out"):
        sample_one(logits, greedy, stop=(0, 1, 2, 3))


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


def test_bad_words_are_of_the_output_and_come_back_when_it_goes_on():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    greedy = SamplingParams(temperature=0)
    words = [(0, 0), (2, 1, 0), (1, 1)]
    for output, token in (((), 0), ((0,), 1), ((1,), 0), ((2, 1), 2), ((0, 0), 1), ((1, 2), 0)):
        row = make_row(greedy, prompt=(0, 2), output=output, bad_words=words)
        assert Sampler(3).sample(logits, [row]).token_ids == [token], output
    beyond = make_row(greedy, bad_words=[(7,), (0,)])  # a tokenizer may know more tokens than the model
    assert Sampler(3).sample(logits, [beyond]).token_ids == [1]


def test_logit_bias_is_added_and_checked():
    assert sample_one([0.0, 5.0, 1.0], SamplingParams(temperature=0, logit_bias={2: 4.5})).token_ids == [2]
    assert sample_one([0.0, 5.0, 1.0], SamplingParams(temperature=0, logit_bias={1: -100.0})).token_ids == [2]
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


def test_logits_are_left_as_they_are():
    vocab = 5003
    rows = mixed_rows(1, vocab)
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    Sampler(vocab).sample(logits, rows)
    assert torch.equal(logits, before)


def test_no_rows_give_nothing():
    got = Sampler(7).sample(torch.empty(0, 7), [])
    assert (got.token_ids, got.logprobs, got.top_logprobs) == ([], [], [])
