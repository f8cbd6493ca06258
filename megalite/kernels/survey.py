"""Peaks and greedy tokens of n rows of logits, and where the last token of a drawn row may be, as Triton kernels: the
first two of kernels/sampling.py."""

from __future__ import annotations

from megalite.kernels.jit import jit, tl
from megalite.kernels.weights import _fractions, _least, _load, _parameters, _rate


@jit
def _survey_kernel(
    raw,
    raw_stride,
    edited,
    edited_stride,
    rows,
    table,
    parts,
    best,
    splits,
    vocab,
    EDITED: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk of a row. `parts` float32 [n, 5, chunks]: the raw logits' peak, NaN if one is, and sum of
    exponentials over it; the same of the edited ones, the sum at the row's temperature where top_p wants it; and, as
    int32 (`best` is the same memory), the id of the latter peak."""
    n = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    place = n * 5 * splits + tl.program_id(0)
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    x = _load(raw, n, raw_stride, ids, vocab)
    damaged = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, float("-inf"), x)
    peak = tl.max(x, 0)
    shifted = x - tl.where(peak == float("-inf"), 0.0, peak)
    if AT_TEMPERATURE:
        shifted = shifted / tl.where(temperature > 0, temperature, 1.0)
    tl.store(parts + place, tl.where(damaged, float("nan"), peak))
    tl.store(parts + splits + place, tl.sum(tl.exp(shifted), 0))
    if EDITED:
        x = _load(edited, n, edited_stride, ids, vocab)
        x = tl.where(x != x, float("-inf"), x)
        peak = tl.max(x, 0)
    tl.store(parts + 2 * splits + place, peak)
    tl.store(best + 4 * splits + place, tl.min(tl.where(x == peak, ids, vocab), 0))
    if (temperature > 0) & (top_p < 1):
        shifted = x - tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(parts + 3 * splits + place, tl.sum(tl.exp2(shifted * _rate(temperature)), 0))


@jit
def _merge_kernel(
    raw,
    raw_stride,
    edited,
    edited_stride,
    rows,
    table,
    parts,
    best,
    begins,
    splits,
    vocab,
    stats,
    state,
    ids,
    logprobs,
    AT_TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    SPLITS: tl.constexpr,
    SAMPLE: tl.constexpr,
    GROUP: tl.constexpr,
    BINS: tl.constexpr,
    LISTED: tl.constexpr,
    RANKS: tl.constexpr,
):
    """One program a row, of whose logits RANKS ranks have surveyed a part each, `parts` [n, RANKS, 5, splits], with ids
    that count from `begins` (int32 [RANKS]). `stats` float32 [n, 3] (peak; raw peak, logarithm of the sum) and `state`
    int32 [n, 6] (0 done, 1 draws from all, 2 from a part, 3 from one that the list did not tell; window's lowest and
    first higher key; its tokens; last key and id)."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    there = split < RANKS * splits
    places = n * RANKS * 5 * splits + split
    if RANKS > 1:
        places += split // splits * 4 * splits
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    raw_peaks = tl.load(parts + places, mask=there, other=float("-inf"))
    damaged = tl.max((raw_peaks != raw_peaks).to(tl.int32), 0) > 0
    raw_peaks = tl.where(raw_peaks != raw_peaks, float("-inf"), raw_peaks)
    raw_peak = tl.max(raw_peaks, 0)
    sums = tl.load(parts + splits + places, mask=there, other=0.0)
    shifted = raw_peaks - tl.where(raw_peak == float("-inf"), 0.0, raw_peak)
    if AT_TEMPERATURE:
        shifted = shifted / tl.where(temperature > 0, temperature, 1.0)
    log_total = tl.log(tl.sum(sums * tl.exp(shifted), 0))
    peaks = tl.load(parts + 2 * splits + places, mask=there, other=float("-inf"))
    peak = tl.max(peaks, 0)
    found = tl.load(best + 4 * splits + places, mask=there, other=vocab)
    if RANKS > 1:
        found += tl.load(begins + split // splits, mask=there, other=0)
    first = tl.min(tl.where((peaks == peak) & there, found, vocab), 0)
    failed = damaged | (raw_peak == float("-inf")) | (peak == float("-inf"))
    if RANKS > 1:  # nothing is edited then, and a greedy row's logits are not here
        value = peak
    else:
        value = _load(raw, n, raw_stride, first, vocab)
    tl.store(ids + n, tl.where(damaged, -1, tl.where(failed, -2, first)).to(tl.int64))
    tl.store(logprobs + n, tl.where(failed, 0.0, value - raw_peak - log_total))
    tl.store(stats + 3 * n, peak)
    tl.store(stats + 3 * n + 1, raw_peak)
    tl.store(stats + 3 * n + 2, log_total)
    partial = (top_k > 0) | (top_p < 1)
    kind = tl.where(failed | (temperature == 0), 0, tl.where(partial, 2, 1))
    tl.store(state + 6 * n, kind)
    tl.store(state + 6 * n + 1, 0x3F800000)  # bits of 1.0: the least weight
    tl.store(state + 6 * n + 2, 0x3F800000)
    tl.store(state + 6 * n + 3, 0)
    tl.store(state + 6 * n + 4, 0x3F800000)
    tl.store(state + 6 * n + 5, vocab)
    if kind == 2:
        rate = _rate(temperature)
        i = tl.arange(0, SAMPLE)
        spread = (i // GROUP) * vocab // (SAMPLE // GROUP) + i % GROUP
        x = _load(edited, n, edited_stride, tl.where(vocab > SAMPLE, spread, i), vocab)
        scale = tl.maximum(vocab / SAMPLE, 1.0)  # each sampled token stands for so many
        weights = _fractions(x, peak, rate, SCALE)
        stays = weights >= _least(least)
        base: tl.constexpr = (TOP >> 18) + 1 - BINS
        bins = tl.maximum((weights.to(tl.int32, bitcast=True) >> 18) - base, 0)
        held = tl.histogram(bins, BINS, mask=stays).to(tl.float32)
        b = tl.arange(0, BINS)
        edges = ((b + base) << 18).to(tl.float32, bitcast=True) * (1.0 / SCALE)
        middles = edges * 1.015625
        # Of the tokens below each bin, estimated: their mass over the likeliest token's, and four standard deviations.
        # They count a token at the bin's edge that the sample may have missed.
        mass = scale * (tl.cumsum(held * middles, 0) - held * middles)
        squares = tl.cumsum(held * middles * middles, 0) - held * middles * middles
        error = 4 * scale * tl.sqrt(tl.maximum(squares, 0.0) + edges * edges)
        number = tl.sum(held, 0) - (tl.cumsum(held, 0) - held)  # in this bin and above it
        # What top_p leaves out.
        sums = tl.load(parts + 3 * splits + places, mask=there, other=0.0)  # only there for top_p
        total = tl.sum(sums * tl.exp2((peaks - peak) * rate), 0)
        if least > 0:
            total -= scale * tl.sum(tl.where(stays, 0.0, weights * (1.0 / SCALE)), 0)
        tail = (1 - top_p).to(tl.float32) * total
        expected = top_k.to(tl.float32) / scale
        enough = tl.where(vocab > SAMPLE, expected + 4 * tl.sqrt(expected) + 4, expected)
        holds = tl.where(top_k > 0, number >= enough, mass + error <= tail)
        low = tl.max(tl.where(holds, b, 0), 0)
        # A list of a quarter of its room costs no more than a shorter one, and is right more often.
        wide = tl.max(tl.where(holds & (number * scale >= LISTED // 4), b, 0), 0)
        low = tl.where(tl.max(tl.where(b == wide, number, 0.0), 0) * scale <= LISTED * 0.75, wide, low)
        fits = tl.max(tl.where(b == low, number, 0.0), 0) * scale <= LISTED * 0.75
        high = tl.min(tl.where(mass - error > tail, b, BINS), 0)
        endless = (top_k > 0) | fits | (high == BINS)
        tl.store(state + 6 * n + 1, tl.where(low == 0, 0x3F800000, (low + base) << 18))
        tl.store(state + 6 * n + 2, tl.where(endless, 0x7F800000, (high + base) << 18))
