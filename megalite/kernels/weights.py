"""Integer weights of tokens, as the sampling kernels compute them:

floor(exp((logit - largest) / temperature) * 2**b), exact in a float32, whose bits order like it.
"""

from __future__ import annotations

from megalite.kernels.jit import jit, tl


def weight_bits(vocab_size: int) -> int:
    """The likeliest token weighs 2**this, so that the sum of a row's weights fits into an int64."""
    return 62 - vocab_size.bit_length()


@jit
def _parameters(table, row):
    """top_k, least weight, top_p and temperature of a row."""
    place = table + row * 10
    top_p = tl.load(place + 5).to(tl.float64, bitcast=True)
    temperature = tl.load(place + 6).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.load(place + 3), tl.load(place + 4), top_p, temperature


@jit
def _load(logits, n, stride, ids, vocab):
    """Logits as float32, none above 2**100; -inf beyond the vocabulary."""
    x = tl.load(logits + n * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x > 1.2676506002282294e30, 1.2676506002282294e30, x)


@jit
def _rate(temperature):
    """What exponents of two are per unit of a logit."""
    return tl.minimum(1.4426950408889634 / temperature, 3e38)


@jit
def _least(least):
    """The least float32 that no weight which is ruled out reaches; at least 1."""
    low = tl.maximum(least, 1).to(tl.float32)
    short = (low.to(tl.int64) < least).to(tl.int32)
    return (low.to(tl.int32, bitcast=True) + short).to(tl.float32, bitcast=True)


@jit
def _fractions(x, peak, rate, SCALE: tl.constexpr):
    """Weights before they are rounded down. Every pass has to get the same."""
    return tl.exp2((x - peak) * rate) * SCALE


@jit
def _weights(x, peak, temperature, least, SCALE: tl.constexpr):
    """Integer weights of logits, as the float32 that hold them exactly."""
    weights = _fractions(x, peak, _rate(temperature), SCALE)
    return tl.where(weights < _least(least), 0.0, tl.floor(weights))


@jit
def _share(total, top_p):
    """The least integer that is top_p of an int64 total; at least 1, so that one token stays."""
    exact = top_p * total.to(tl.float64)
    goal = exact.to(tl.int64)
    goal += (goal.to(tl.float64) < exact).to(tl.int64)
    goal = tl.where(top_p < 1, tl.maximum(goal, 1), total)
    return tl.minimum(goal, total)


@jit
def _keys(start, last_key, last_id, logits, stride, n, vocab, peak, temperature, least, SCALE: tl.constexpr, SPAN):
    """Keys and ids of a part of a row; the keys of tokens beyond the last one are 0."""
    ids = start + tl.arange(0, SPAN)
    x = _load(logits, n, stride, ids, vocab)
    keys = _weights(x, peak, temperature, least, SCALE).to(tl.int32, bitcast=True)
    return tl.where((keys > last_key) | ((keys == last_key) & (ids <= last_id)), keys, 0), ids


@jit
def _worth(keys, key, by_number):
    """What each token of at least this key counts: 1, or its weight."""
    return tl.where(keys >= key, tl.where(by_number, 1, keys.to(tl.float32, bitcast=True).to(tl.int64)), 0)
