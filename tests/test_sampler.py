"""The sampler against a slow, plain reference, and the promises it makes about batches, ties and extremes."""

import math
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_sampler import INF, TooClose, next_token, philox, ruled_out, uniform

from megalite.config.schema import SamplingParams
from megalite.core.layout import Even, Layout, width
from megalite.core.parallel_state import ParallelState
from megalite.errors import MegaliteError
from megalite.inference import draws
from megalite.inference.choice import FAILURES, PLAIN, Needs
from megalite.inference.host_sampler import FEW
from megalite.inference.matchers import Masks
from megalite.inference.request import Request
from megalite.inference.sampler import Sampler
from megalite.inference.vocabulary import Vocabulary
from megalite.planner.memory import CPU_CHUNK

VOCAB = 24
"""Of the comparison over all options."""
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@dataclass
class Placed:
    """A sequence in a row, as far as the sampler looks at it."""

    request: Request
    index: int
    token_ids: list[int]
    row: int = -1

    @property
    def num_prompt(self):
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self):
        return len(self.token_ids) - self.num_prompt

    @property
    def planned(self):
        return len(self.token_ids) + 1


class Engine:
    """What a runner does around the sampler: rows numbered from the last, their tokens on the device."""

    def __init__(self, vocab_size, sequences, device="cpu", at_temperature=False, max_len=40):
        self.sequences, self.device = sequences, device
        self.tokens = torch.full((len(sequences) + 1, max_len), -7, dtype=torch.int32, device=device)
        self.sampler = Sampler(
            vocab_size,
            max_rows=len(sequences),
            max_len=max_len,
            device=torch.device(device),
            tokens=self.tokens,
            at_temperature=at_temperature,
        )
        for row, sequence in enumerate(reversed(sequences)):
            sequence.row = row
            self.write(sequence)
        self.sampler.admit(sequences)

    def write(self, sequence):
        ids = torch.tensor(sequence.token_ids, dtype=torch.int32)
        self.tokens[sequence.row, : len(ids)] = ids

    def choose(self, logits, sequences=None, masks=None):
        """Of some of the sequences."""
        sequences = self.sequences if sequences is None else sequences
        rows = torch.tensor([sequence.row for sequence in sequences], dtype=torch.int64, device=self.device)
        places = [len(sequence.token_ids) for sequence in sequences]
        positions = torch.tensor(places, dtype=torch.int64, device=self.device)
        return self.sampler.sample(logits.to(self.device), rows, positions, self.sampler.needs(sequences), masks)

    def sample(self, logits, sequences=None, masks=None):
        choice = self.choose(logits, sequences, masks).to_host()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return choice.listed()


def bare(vocab_size):
    return Engine(vocab_size, []).sampler


def sample(logits, sequences, **options):
    return Engine(logits.shape[1], sequences, logits.device.type, **options).sample(logits)


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
    return Placed(request, index, [*prompt, *output])


def masks_of(places, words):
    """Masks that are made already, of rows at these places."""
    made = Future()
    made.set_result(words.astype(np.int32))
    return Masks(places, made)


def random_masks(places, vocab, generator):
    return masks_of(places, torch.randint(-(2**31), 2**31, (len(places), vocab // 32 + 1), generator=generator).numpy())


def allowed_by(masks, place, vocab):
    words = masks.wait()[masks.places.index(place)]
    return [token for token in range(vocab) if words[token // 32] >> token % 32 & 1]


def sample_one(logits, params, **where):
    logits = torch.as_tensor(logits)[None]
    return sample(logits, [make_row(params, **where)])


def ruled_out_of(row, vocab):
    """Ids that must not come next in a row."""
    request, output = row.request, row.token_ids[row.num_prompt :]
    return ruled_out(request.params, output, stops=request.stop_token_ids, bad_words=request.bad_words, vocab=vocab)


def reference_token(logits, row):
    request, prompt, output = row.request, row.token_ids[: row.num_prompt], row.token_ids[row.num_prompt :]
    number = uniform(request.seed, row.index, row.num_output)
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(rows_of_logits, sampled_rows), min_size=1, max_size=6))
def test_equals_reference_for_every_combination_of_options(cases):
    logits = [values for values, _ in cases]
    rows = [row for _, row in cases]
    for values, row in cases:
        withheld = ruled_out_of(row, VOCAB)
        assume(any(x > -INF for token, x in enumerate(values) if token not in withheld))
    got = sample(torch.tensor(logits), rows)
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
    together = sample(logits, rows)
    assert torch.equal(logits, before), "logits are left as they are"
    compared = dict.fromkeys(OPTIONS, 0)
    for i, (values, row) in enumerate(zip(logits.tolist(), rows, strict=True)):
        name = row.request.id
        alone = sample(logits[i : i + 1].clone(), [row])
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
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]
    assert shuffled.logprobs == [together.logprobs[i] for i in order]


def test_uniform_numbers_are_philox_s_and_uniform():
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox(pi[:4], pi[4:]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)  # known from Random123
    assert uniform(0, 0, 0) == 0xE169C58D6627E8D5 // 2**11 * 2.0**-53
    places = np.array([0, 1, 63, 64, 4095, 2**31 + 5])
    for seed, index in ((0, 0), (1, 2), (2**63 - 1, 16383), (2**64 - 2**63, 7)):
        made = draws.uniform(np.array(seed, np.uint64), np.array(index), places)
        assert made.tolist() == [uniform(seed, index, place) for place in places.tolist()]
    numbers = draws.uniform(np.array(5, np.uint64), np.array(0), np.arange(4000)).tolist()
    counts = torch.tensor(numbers).histc(20, 0, 1)
    assert 0 <= min(numbers) < 0.002 and 0.998 < max(numbers) < 1 and len(set(numbers)) == 4000
    assert ((counts - 200) ** 2 / 200).sum() < 19 + 4 * math.sqrt(2 * 19)
    # No two of the three may stand for each other.
    assert len({uniform(1, 11, 1), uniform(11, 1, 1), uniform(1, 1, 11), uniform(111, 1, 1)}) == 4


def test_no_number_draws_a_token_of_weight_zero():
    last = 1 - 2.0**-53
    for whole in (1, 3, 2**44, 2**53 + 1, 2**60 + 255, 2**61 - 1, 2**62 - 1):
        weights = torch.tensor([[0, whole, 0], [0, whole, 0]])
        assert draws.draw(weights, torch.tensor([0.0, last], dtype=torch.float64)).tolist() == [1, 1]
    weights = torch.tensor([[0, 2, 0, 1, 1, 0]]).expand(5, 6).contiguous()
    numbers = torch.tensor([0.0, 0.4999, 0.5, 0.75, last], dtype=torch.float64)
    assert draws.draw(weights, numbers).tolist() == [1, 1, 3, 4, 4]


def drawn(logits, count=100, **options):
    """Ids that `count` seeds draw."""
    rows = [make_row(SamplingParams(**options), seed=n) for n in range(count)]
    return set(sample(torch.tensor([logits] * count), rows).token_ids)


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
        return sample(torch.zeros(30, 1000), rows).token_ids

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
    assert sample(logits, rows).token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("count", [3, FEW + 1])
def test_penalties_follow_a_growing_sequence(count):
    vocab = 50
    generator = torch.Generator().manual_seed(0)
    options = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3)
    rows = [make_row(options, seed=n, prompt=(3, 3, 4 + n)) for n in range(count)]
    engine = Engine(vocab, rows, max_len=50)
    repeated = 0
    for _ in range(40):
        logits = torch.randn(len(rows), vocab, generator=generator)
        got = engine.sample(logits).token_ids
        assert got == [reference_token(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
        again = [replace(row) for row in rows]
        assert got == sample(logits, again, max_len=50).token_ids  # as if it had never seen them before
        for row, token in zip(rows, got, strict=True):
            repeated += token in row.token_ids
            row.token_ids.append(token)
            engine.write(row)
    assert repeated > 3  # so counts above one were there
    newcomer = replace(rows[0], token_ids=[7])
    newcomer.request = replace(newcomer.request, prompt_token_ids=(7,))
    engine.write(newcomer)
    engine.sampler.admit([newcomer])  # the row's last tenant leaves nothing behind
    logits = torch.randn(1, vocab, generator=generator)
    assert engine.sample(logits, [newcomer]).token_ids == [reference_token(logits[0].tolist(), newcomer)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_is_like_allowed_ids_and_only_its_own_row_s(device):
    vocab, generator = 100, torch.Generator().manual_seed(5)
    options = [{}, {"temperature": 0, "repetition_penalty": 1.3}, {"top_p": 0.7, "logprobs": 2}, {"top_k": 4}, {}]
    masks = random_masks([1, 2, 4], vocab, generator)
    logits = torch.randn(len(options), vocab, generator=generator) * 3
    rows = [make_row(SamplingParams(**given), seed=i, output=(3, 4)) for i, given in enumerate(options)]
    got = Engine(vocab, rows, device).sample(logits, masks=masks)
    for place in masks.places:
        options[place]["allowed_token_ids"] = allowed_by(masks, place, vocab)
    same = [make_row(SamplingParams(**given), seed=i, output=(3, 4)) for i, given in enumerate(options)]
    assert got == Engine(vocab, same, device).sample(logits)
    assert got.logprobs[4] == pytest.approx(logits[4].log_softmax(-1)[got.token_ids[4]].item(), abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_of_rows_that_give_no_token(device):
    vocab = 40
    logits = torch.zeros(4, vocab)
    logits[0, 7] = math.nan
    masks = masks_of([0, 1, 3], np.array([[-1, -1], [0, 0], [0, 1 << 5]]))
    rows = [make_row(SamplingParams(), seed=i) for i in range(4)]
    got = Engine(vocab, rows, device).sample(logits, masks=masks).token_ids
    assert (got[0], got[1], got[3]) == (-1, -2, 37) and got[2] >= 0


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
    good = [0.0, 1.0, 2.0]
    alone = sample_one(good, params)
    for bad, code in (([0.0, math.nan, 2.0], -1), ([-INF] * 3, -2)):
        got = sample(torch.tensor([good, bad, good]), [make_row(params), make_row(params), make_row(params)])
        assert got.token_ids == [alone.token_ids[0], code, alone.token_ids[0]] and code in FAILURES
        assert got.logprobs[::2] == alone.logprobs * 2


def test_ids_beyond_the_vocabulary_are_withheld_in_vain_or_refused():
    """A stop token or a token of a bad word may be one that the model does not have; a bias names one of its own."""
    greedy = SamplingParams(temperature=0, min_tokens=2)
    assert sample_one([0.0, 9.0, 8.0], greedy, stop=(1, 77), bad_words=[(7,), (0,)]).token_ids == [2]
    assert sample_one([0.0, 9.0, 8.0], greedy, stop=(0, 1, 2)).token_ids == [-2]
    with pytest.raises(MegaliteError, match=r"request r: logit_bias: token id must be in 0\.\.2, got 3"):
        sample_one([0.0, 5.0, 1.0], SamplingParams(logit_bias={3: 1.0}))


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_of_the_raw_logits(device):
    logits = [[0.5, -INF, 3.0, 3.0, 1.0, -2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={0: 50.0})
    got = sample(torch.tensor(logits, device=device), [make_row(params), make_row(SamplingParams(top_k=1))])
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
    scores = bare(vocab).prompt_logprobs(logits, next_ids, 2)
    assert len(scores) == length
    for values, token, score in zip(logits.float().tolist(), next_ids, scores, strict=True):
        best_first = sorted(range(vocab), key=lambda t: (-values[t], t))
        assert score.rank == 1 + best_first.index(token)
        expected = [*best_first[:2], token][: 3 if score.rank > 2 else 2]
        assert [t for t, _ in score.top] == expected
        assert score.logprob == pytest.approx(log_softmax(values)[token], abs=1e-5)
    everything = bare(vocab).prompt_logprobs(logits[:2], next_ids[:2], -1)
    assert [sorted(token for token, _ in score.top) for score in everything] == [list(range(vocab))] * 2
    plain = bare(vocab).prompt_logprobs(logits, next_ids, 0)
    assert [score.logprob for score in plain] == [score.logprob for score in scores]
    assert [score.rank for score in plain] == [score.rank for score in scores]
    impossible = bare(3).prompt_logprobs(torch.tensor([[0.0, -INF, 0.0]]), [1], 0)
    assert impossible[0].logprob == -INF
    assert bare(3).prompt_logprobs(torch.empty(0, 3), [], 5) == []
    with pytest.raises(MegaliteError, match="NaN"):
        bare(3).prompt_logprobs(torch.tensor([[0.0, math.nan, 0.0]]), [1], 0)


def test_no_rows_give_nothing():
    got = sample(torch.empty(0, 7), [])
    assert (got.token_ids, got.logprobs, got.top_logprobs) == ([], [], [])


def test_only_rows_with_needs_have_needs():
    rows = [
        make_row(SamplingParams(temperature=0)),
        make_row(SamplingParams(top_p=0.5, min_p=0.1, top_k=3, seed=7)),
        make_row(SamplingParams(min_tokens=2), stop=(1,)),
        make_row(SamplingParams(logprobs=3)),
        make_row(SamplingParams(presence_penalty=0.5), prompt=range(20)),
    ]
    engine = Engine(VOCAB, rows)
    needs = engine.sampler.needs
    assert needs(rows[:2]) == PLAIN == needs([])
    assert needs(rows[1:3]) == Needs(edits=True)
    assert needs(rows[:4]) == Needs(edits=True, logprobs=(None, None, None, 3))
    assert needs(rows[4:]) == Needs(longest=32)
    rows[2].token_ids += [0, 0]
    assert needs(rows[:3]) == PLAIN
    plain = make_row(SamplingParams())
    plain.row = rows[4].row
    engine.sampler.admit([plain])
    assert needs([plain]) == PLAIN


def test_a_choice_of_some_rows():
    rows = [make_row(SamplingParams(temperature=0, logprobs=k)) for k in (None, 2, -1)]
    choice = Engine(VOCAB, rows).choose(torch.randn(3, VOCAB))
    whole, part = choice.listed(), choice[1:].to_host().listed()
    assert part.token_ids == whole.token_ids[1:] and part.logprobs == whole.logprobs[1:]
    assert part.top_logprobs == whole.top_logprobs[1:] and whole.top_logprobs[0] is None
    assert len(part.top_logprobs[1].top) == VOCAB


# ---- a vocabulary cut over ranks


def awkward_logits(vocab):
    """Rows with ties over the cuts, nothing in some ranks' columns, NaN, infinity, and nothing at all."""
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)).mul(2).round().div(2)
    logits[1, :] = 1.5
    logits[2, : vocab // 2] = -INF
    logits[3, vocab // 2 :] = -INF
    logits[4, -1], logits[5, 0] = math.nan, INF
    logits[6, :] = -INF
    logits[7, vocab // 2] = -INF
    return logits


def choose_by_columns(rank, size, vocab, temperature):
    """(tokens, log-probabilities) from this rank's columns, and from all; None for those of the columns if refused."""
    tp, widths = ParallelState(Layout(tp=size)).tp, [width(Even(vocab), size, each) for each in range(size)]
    logits = awkward_logits(vocab)
    placed = [make_row(SamplingParams(temperature=0.0)) for _ in logits]
    placed[3] = make_row(SamplingParams(temperature=temperature))
    engine = Engine(vocab, placed)
    rows, positions = torch.tensor([one.row for one in placed]), torch.ones(len(placed), dtype=torch.int64)
    vocabulary = Vocabulary(tp, widths, max_rows=len(placed), sums=None, dtype=torch.float32)
    mine = logits[:, vocabulary.begin : vocabulary.begin + widths[rank]]
    assert torch.equal(vocabulary.whole(mine).nan_to_num(7), logits.nan_to_num(7))
    found = [
        None if choice is None else (choice.ids.tolist(), choice.logprobs.tolist())
        for choice in (
            engine.sampler.sample_columns(mine, rows, positions, vocabulary),
            engine.sampler.sample(logits, rows, positions, PLAIN),
        )
    ]
    return found


@pytest.mark.parametrize("size, vocab", [(2, 5000), (4, 50), (4, 3)])
def test_ranks_choose_from_their_columns_what_one_would_from_all(ranks, size, vocab):
    for found, (ids, scores) in ranks(size).run(choose_by_columns, size, vocab, 0.0):
        assert found[0] == ids and ids[4] == -1 and ids[6] == -2
        assert [found[1][i] for i in (0, 1, 2, 3, 5, 7, 8)] == pytest.approx([scores[i] for i in (0, 1, 2, 3, 5, 7, 8)])
    assert all(found is None for found, _ in ranks(size).run(choose_by_columns, size, vocab, 0.5))
