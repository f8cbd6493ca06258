"""Choice of the next tokens of n rows of logits on a GPU, as Triton kernels that no host value enters.

A row is greedy (temperature 0) or draws from integer weights, floor(exp((logit - largest) / temperature) * 2**b), whose
sums are exact in any order: so the split of the vocabulary into chunks, and the order in which programs come to their
turn, change no token. A float32 holds such a weight exactly, and its bits, the weight's key, order like the weight.

Nothing is sorted. Five kernels, which greedy rows leave at once after the second:

1. survey: peak, its id and the sum of exponentials of each chunk (one pass over the logits);
2. merge: those of the row; a greedy row's token. For top_k and top_p, a sample of the row's logits says between which
   two keys the last token that stays most probably is;
3. window: the weight of each chunk above that window, and a list of what is inside it (another pass);
4. cut: the key and, of equal ones, the id of the last token that stays, by bisection over the list. Where the sample
   misled, or the list is too short for all equals, over the whole row: slower, and as exact;
5. draw: the chunk, then the token, at which the running sum exceeds the row's uniform number (Philox4x32-10, Salmon et
   al. 2011; the host has the same in inference/draws.py).

Log-sum-exp is over chunks of one length whatever the batch, so log-probabilities do not depend on the batch either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.jit import jit, require_triton, tl, triton

CHUNK = 8192
"""Logits of one program."""
SAMPLE = 4096
"""Logits of a row from which the window is estimated."""
GROUP = 16
"""Neighbours that are sampled together: one sector of memory."""
LISTED = 16384
"""Tokens that a row's window may hold."""
STEP = 1024
"""Logits of a chunk that are looked at together for the window: few, so that registers leave room for many programs."""
TALLY = 2048
"""Listed tokens that are looked at together."""

COLUMNS = SEED, INDEX, PROMPT, TOP_K, LEAST, TOP_P, TEMPERATURE, PENALTIES = tuple(range(8))
"""Of a row's parameters, int64: seed, sample index, prompt length, top_k (0: all), the least weight that min_p keeps;
and the bits of float64: top_p, temperature (0: greedy) and, from PENALTIES on, three that the kernels leave alone."""
WIDTH = 10
"""Numbers of a row's parameters."""
MAX_BEST = 32
"""Likeliest tokens that `best` can find."""


def weight_bits(vocab_size: int) -> int:
    """The likeliest token weighs 2**this, so that the sum of a row's weights fits into an int64."""
    return 62 - vocab_size.bit_length()


# ---- what the kernels share


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
def _weights(x, peak, temperature, least, SCALE: tl.constexpr):
    """Integer weights of logits, as the float32 that hold them exactly. Every pass has to get the same."""
    weights = tl.floor(tl.exp((x - peak) / temperature) * SCALE)
    return tl.where(weights.to(tl.int64) < least, 0.0, weights)


@jit
def _share(total, top_p):
    """The least integer that is top_p of an int64 total; at least 1, so that one token stays."""
    exact = top_p * total.to(tl.float64)
    goal = exact.to(tl.int64)
    goal += (goal.to(tl.float64) < exact).to(tl.int64)
    goal = tl.where(top_p < 1, tl.maximum(goal, 1), total)
    return tl.minimum(goal, total)


@jit
def _uniform(seed, index, position):
    """The number in [0, 1) that draws output token `position`: 53 bits of Philox4x32-10 in float64."""
    key0 = seed & 0xFFFFFFFF
    key1 = (seed >> 32) & 0xFFFFFFFF
    a = position & 0xFFFFFFFF
    b = index & 0xFFFFFFFF
    c = a * 0
    d = a * 0
    for _ in tl.static_range(10):
        first = a * 0xD2511F53  # may become negative: its bits count
        second = c * 0xCD9E8D57
        a = ((second >> 32) & 0xFFFFFFFF) ^ b ^ key0
        b = second & 0xFFFFFFFF
        c = ((first >> 32) & 0xFFFFFFFF) ^ d ^ key1
        d = first & 0xFFFFFFFF
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    bits = (((b << 32) | a) >> 11) & 0x1FFFFFFFFFFFFF
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53


# ---- 1 and 2: peaks, greedy tokens, windows


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
    num_parts,
    vocab,
    EDITED: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk of a row. `parts` float32 [4, n, chunks]: the raw logits' peak, NaN if one is, and sum of
    exponentials over it; the same of the edited ones, the sum at the row's temperature where top_p wants it."""
    n = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    place = n * tl.num_programs(0) + tl.program_id(0)
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    x = _load(raw, n, raw_stride, ids, vocab)
    damaged = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, float("-inf"), x)
    peak = tl.max(x, 0)
    shifted = x - tl.where(peak == float("-inf"), 0.0, peak)
    if AT_TEMPERATURE:
        shifted = shifted / tl.where(temperature > 0, temperature, 1.0)
    tl.store(parts + place, tl.where(damaged, float("nan"), peak))
    tl.store(parts + num_parts + place, tl.sum(tl.exp(shifted), 0))
    if EDITED:
        x = _load(edited, n, edited_stride, ids, vocab)
        x = tl.where(x != x, float("-inf"), x)
        peak = tl.max(x, 0)
    tl.store(parts + 2 * num_parts + place, peak)
    tl.store(best + place, tl.min(tl.where(x == peak, ids, vocab), 0))
    if (temperature > 0) & (top_p < 1):
        shifted = x - tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(parts + 3 * num_parts + place, tl.sum(tl.exp(shifted / temperature), 0))


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
    num_parts,
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
):
    """One program a row: `stats` float32 [n, 3] (peak; raw peak, logarithm of the sum) and `state` int32 [n, 6] (0
    done, 1 draws from all, 2 from a part; window's lowest and first higher key; its tokens; last key and id)."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    there = split < splits
    places = n * splits + split
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    raw_peaks = tl.load(parts + places, mask=there, other=float("-inf"))
    damaged = tl.max((raw_peaks != raw_peaks).to(tl.int32), 0) > 0
    raw_peaks = tl.where(raw_peaks != raw_peaks, float("-inf"), raw_peaks)
    raw_peak = tl.max(raw_peaks, 0)
    sums = tl.load(parts + num_parts + places, mask=there, other=0.0)
    shifted = raw_peaks - tl.where(raw_peak == float("-inf"), 0.0, raw_peak)
    if AT_TEMPERATURE:
        shifted = shifted / tl.where(temperature > 0, temperature, 1.0)
    log_total = tl.log(tl.sum(sums * tl.exp(shifted), 0))
    peaks = tl.load(parts + 2 * num_parts + places, mask=there, other=float("-inf"))
    peak = tl.max(peaks, 0)
    first = tl.min(tl.where((peaks == peak) & there, tl.load(best + places, mask=there, other=vocab), vocab), 0)
    failed = damaged | (raw_peak == float("-inf")) | (peak == float("-inf"))
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
        i = tl.arange(0, SAMPLE)
        spread = (i // GROUP) * vocab // (SAMPLE // GROUP) + i % GROUP
        some = tl.where(vocab > SAMPLE, spread, i)
        x = _load(edited, n, edited_stride, some, vocab)
        scale = tl.maximum(vocab / SAMPLE, 1.0)  # each sampled token stands for so many
        weights = _weights(x, peak, temperature, least, SCALE)
        keys = weights.to(tl.int32, bitcast=True)
        shares = weights * (1.0 / SCALE)
        # Mass, over that of the likeliest token, that top_p leaves out.
        sums = tl.load(parts + 3 * num_parts + places, mask=there, other=0.0)  # only there for top_p
        total = tl.sum(sums * tl.exp((peaks - peak) / temperature), 0)
        if least > 0:
            total -= scale * tl.sum(tl.where(weights == 0, tl.exp((x - peak) / temperature), 0.0), 0)
        tail = (1 - top_p).to(tl.float32) * total
        expected = top_k.to(tl.float32) / scale
        enough = tl.where(vocab > SAMPLE, expected + 4 * tl.sqrt(expected) + 4, expected)
        # Bisect, in steps of 2**12 keys, for the highest key that is most probably not above the last token that stays,
        # and for the lowest that is above it. An estimate is out by less than four standard deviations, most probably.
        low = kind * 0 + (0x3F800000 >> 12)
        high = kind * 0 + ((TOP >> 12) + 1)
        below = low
        above = high
        highest = high
        for _ in range(17):
            middle = (low + high) // 2
            less = (keys < (middle << 12)) & (keys > 0)
            mass = scale * tl.sum(tl.where(less, shares, 0.0), 0)
            error = 4 * scale * tl.sqrt(tl.sum(tl.where(less, shares * shares, 0.0), 0))
            count = tl.sum((keys >= (middle << 12)).to(tl.int32), 0).to(tl.float32)
            holds = tl.where(top_k > 0, count >= enough, mass + error <= tail)
            low = tl.where(holds, middle, low)
            high = tl.where(holds, high, middle)
            middle = (below + above) // 2
            less = (keys < (middle << 12)) & (keys > 0)
            mass = scale * tl.sum(tl.where(less, shares, 0.0), 0)
            error = 4 * scale * tl.sqrt(tl.sum(tl.where(less, shares * shares, 0.0), 0))
            over = mass - error > tail
            above = tl.where(over, middle, above)
            below = tl.where(over, below, middle)
        endless = (top_k > 0) | (above == highest)
        tl.store(state + 6 * n + 1, low << 12)
        tl.store(state + 6 * n + 2, tl.where(endless, 0x7F800000, above << 12))


# ---- 3: the window


@jit
def _window_kernel(
    edited,
    edited_stride,
    rows,
    table,
    stats,
    state,
    sums,
    num_parts,
    listed,
    vocab,
    SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTED: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program a chunk of a row: `sums` int64 [2, n, chunks] of the weights above the window and of all; `listed`
    int32 [n, 2, LISTED] the keys and ids inside it, in any order."""
    n = tl.program_id(1).to(tl.int64)
    kind = tl.load(state + 6 * n)
    if kind == 0:
        return
    place = n * tl.num_programs(0) + tl.program_id(0)
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    peak = tl.load(stats + 3 * n)
    low = tl.load(state + 6 * n + 1)
    high = tl.load(state + 6 * n + 2)
    above = tl.zeros([STEP], tl.int64)
    total = tl.zeros([STEP], tl.int64)
    first = tl.program_id(0) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, vocab), STEP):
        ids = start + tl.arange(0, STEP)
        x = _load(edited, n, edited_stride, ids, vocab)
        weights = _weights(x, peak, temperature, least, SCALE)
        keys = weights.to(tl.int32, bitcast=True)
        whole = weights.to(tl.int64)
        total += whole
        above += tl.where(keys >= high, whole, 0)
        inside = ((keys >= low) & (keys < high)).to(tl.int32)
        count = tl.sum(inside, 0)
        if count > 0:
            at = tl.atomic_add(state + 6 * n + 3, count) + tl.cumsum(inside, 0) - 1
            fits = (inside > 0) & (at < LISTED)
            tl.store(listed + n * 2 * LISTED + at, keys, mask=fits)
            tl.store(listed + n * 2 * LISTED + LISTED + at, ids, mask=fits)
    tl.store(sums + place, tl.sum(above, 0))
    tl.store(sums + num_parts + place, tl.sum(total, 0))


# ---- 4: the last token that stays


@jit
def _tally(
    least_key,
    last_key,
    last_id,
    logits,
    n,
    stride,
    vocab,
    peak,
    temperature,
    least,
    listed,
    length,
    by_list,
    SCALE: tl.constexpr,
    LISTED: tl.constexpr,
    TALLY: tl.constexpr,
):
    """Number and weight of the tokens of at least one key that are not beyond the last one, in a row or in its list."""
    number = tl.zeros([TALLY], tl.int64)
    weight = tl.zeros([TALLY], tl.int64)
    for start in range(0, length, TALLY):
        ids = start + tl.arange(0, TALLY)
        if by_list:
            keys = tl.load(listed + ids, mask=ids < length, other=0)
            ids = tl.load(listed + LISTED + ids, mask=ids < length, other=0)
        else:
            x = _load(logits, n, stride, ids, vocab)
            keys = _weights(x, peak, temperature, least, SCALE).to(tl.int32, bitcast=True)
        stays = (keys >= least_key) & ((keys > last_key) | ((keys == last_key) & (ids <= last_id)))
        number += stays.to(tl.int64)
        weight += tl.where(stays, keys.to(tl.float32, bitcast=True).to(tl.int64), 0)
    return tl.sum(number, 0), tl.sum(weight, 0)


@jit
def _cut_kernel(
    edited,
    edited_stride,
    rows,
    table,
    stats,
    state,
    sums,
    num_parts,
    splits,
    listed,
    vocab,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTED: tl.constexpr,
    TALLY: tl.constexpr,
):
    """One program a row: finds its last token, and adds to the first of `sums` what stays of the window."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(state + 6 * n) != 2:
        return
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    peak = tl.load(stats + 3 * n)
    first_key = tl.load(state + 6 * n + 1)
    end_key = tl.minimum(tl.load(state + 6 * n + 2), TOP + 1)
    found = tl.load(state + 6 * n + 3)
    length = tl.minimum(found, LISTED)
    listed += n * 2 * LISTED
    split = tl.arange(0, SPLITS)
    there = split < splits
    above = tl.sum(tl.load(sums + n * splits + split, mask=there, other=0), 0)
    total = tl.sum(tl.load(sums + num_parts + n * splits + split, mask=there, other=0), 0)
    number, weight = _tally(
        first_key, first_key, vocab, edited, n, edited_stride, vocab, peak, temperature, least, listed, length,
        found >= 0, SCALE, LISTED, TALLY,
    )  # fmt: skip
    goal = _share(total, top_p)
    straddles = (goal > above) & (goal <= above + weight)
    enough = (found >= top_k) | (first_key == 0x3F800000)
    by_list = (found <= LISTED) & tl.where(top_k > 0, enough, straddles)
    first_key = tl.where(by_list, first_key, 0x3F800000)
    end_key = tl.where(by_list, end_key, TOP + 1)
    above = tl.where(by_list, above, 0)
    length = tl.where(by_list, length, vocab)
    last_key = first_key * 0 + 0x3F800000
    last_id = first_key * 0 + (vocab - 1)
    for stage in range(2):  # top_k, then top_p of what it keeps
        by_number = stage == 0
        if tl.where(by_number, top_k > 0, top_p < 1):
            number, weight = _tally(
                last_key, last_key, last_id, edited, n, edited_stride, vocab, peak, temperature, least, listed, length,
                by_list, SCALE, LISTED, TALLY,
            )  # fmt: skip
            share = _share(tl.where(top_k > 0, weight, total), top_p) - above
            goal = tl.where(by_number, tl.minimum(top_k, number), share)
            # The key of the last token: the highest from which on the tally reaches the goal.
            low = first_key
            high = end_key
            while high - low > 1:
                middle = low + (high - low) // 2
                number, weight = _tally(
                    middle, last_key, last_id, edited, n, edited_stride, vocab, peak, temperature, least, listed,
                    length, by_list, SCALE, LISTED, TALLY,
                )  # fmt: skip
                reached = tl.where(by_number, number, weight) >= goal
                low = tl.where(reached, middle, low)
                high = tl.where(reached, high, middle)
            # Its id: so many of the tokens of this key are needed, the lowest ids first.
            number, weight = _tally(
                low + 1, last_key, last_id, edited, n, edited_stride, vocab, peak, temperature, least, listed, length,
                by_list, SCALE, LISTED, TALLY,
            )  # fmt: skip
            each = low.to(tl.float32, bitcast=True).to(tl.int64)
            needed = tl.where(by_number, goal, number + (goal - weight + each - 1) // each)
            end = tl.where(low == last_key, last_id, vocab - 1)
            begin = low * 0 - 1
            probe = end  # all of them may be needed
            while end - begin > 1:
                number, weight = _tally(
                    low, low, probe, edited, n, edited_stride, vocab, peak, temperature, least, listed, length,
                    by_list, SCALE, LISTED, TALLY,
                )  # fmt: skip
                begin = tl.where(number >= needed, begin, probe)
                begin = tl.where((probe == end) & (number <= needed), end - 1, begin)
                end = tl.where(number >= needed, probe, end)
                probe = begin + (end - begin) // 2
            last_key = low
            last_id = end
    tl.store(state + 6 * n + 4, last_key)
    tl.store(state + 6 * n + 5, last_id)
    high = tl.load(state + 6 * n + 2)
    for start in range(0, length, TALLY):
        ids = start + tl.arange(0, TALLY)
        if by_list:
            keys = tl.load(listed + ids, mask=ids < length, other=0)
            ids = tl.load(listed + LISTED + ids, mask=ids < length, other=0)
            stays = (keys > last_key) | ((keys == last_key) & (ids <= last_id))
            weights = keys.to(tl.float32, bitcast=True).to(tl.int64)
            tl.atomic_add(sums + n * splits + ids // CHUNK, weights, mask=stays)
        else:
            x = _load(edited, n, edited_stride, ids, vocab)
            keys = _weights(x, peak, temperature, least, SCALE).to(tl.int32, bitcast=True)
            stays = (keys > last_key) | ((keys == last_key) & (ids <= last_id))
            weights = keys.to(tl.float32, bitcast=True).to(tl.int64)
            change = tl.where(stays, weights, 0) - tl.where(keys >= high, weights, 0)  # those are counted already
            tl.atomic_add(sums + n * splits + start // CHUNK, tl.sum(change, 0))


# ---- 5: the draw


@jit
def _draw_kernel(
    raw,
    raw_stride,
    edited,
    edited_stride,
    rows,
    positions,
    table,
    stats,
    state,
    sums,
    splits,
    vocab,
    ids,
    logprobs,
    AT_TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a row."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(state + 6 * n) == 0:
        return
    row = tl.load(rows + n)
    top_k, least, top_p, temperature = _parameters(table, row)
    output = tl.load(positions + n) - tl.load(table + row * 10 + 2)
    number = _uniform(tl.load(table + row * 10), tl.load(table + row * 10 + 1), output)
    split = tl.arange(0, SPLITS)
    masses = tl.load(sums + n * splits + split, mask=split < splits, other=0)
    goal = (number * tl.sum(masses, 0).to(tl.float64)).to(tl.int64)
    chunk = tl.sum(((tl.cumsum(masses, 0) <= goal) & (split < splits)).to(tl.int32), 0)
    goal -= tl.sum(tl.where(split < chunk, masses, 0), 0)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _load(edited, n, edited_stride, places, vocab)
    weights = _weights(x, tl.load(stats + 3 * n), temperature, least, SCALE)
    keys = weights.to(tl.int32, bitcast=True)
    last_key = tl.load(state + 6 * n + 4)
    stays = (keys > last_key) | ((keys == last_key) & (places <= tl.load(state + 6 * n + 5)))
    reached = tl.cumsum(tl.where(stays, weights.to(tl.int64), 0), 0)
    chosen = tl.min(tl.where(reached > goal, places, vocab - 1), 0)
    value = _load(raw, n, raw_stride, chosen, vocab) - tl.load(stats + 3 * n + 1)
    if AT_TEMPERATURE:
        value = value / temperature
    tl.store(ids + n, chosen.to(tl.int64))
    tl.store(logprobs + n, value - tl.load(stats + 3 * n + 2))


def choose(
    raw: Tensor,
    edited: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    at_temperature: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens, int64 [n], and their log-probabilities, float32 [n], of logits `raw` [n, V] of any float dtype; and
    float32 [n, 3] of which (logit - [1]) - [2] is any token's log-probability.

    `edited` [n, V]: what is chosen from; None: the raw ones, of which the log-probabilities are anyhow. `rows` int64
    [n]: of `table` int64 [rows, WIDTH]. `positions` int64 [n]: prompt length and tokens of output so far. A token is
    -1 where raw logits are NaN, and -2 where none is above -inf. `at_temperature`: log-probabilities of drawn tokens
    are those at the row's temperature. The vocabulary has at most 2**22 ids.
    """
    n, vocab = raw.shape
    ids, logprobs = torch.empty_like(rows), torch.empty(n, device=raw.device)
    stats = torch.empty((n, 3), device=raw.device)
    if n == 0:
        return ids, logprobs, stats
    require_triton()
    chosen_from = raw if edited is None else edited
    assert raw.stride(1) == chosen_from.stride(1) == 1 and table.shape[1] == WIDTH and table.is_contiguous()
    assert CHUNK % STEP == CHUNK % TALLY == 0
    splits = triton.cdiv(vocab, CHUNK)
    parts = torch.empty((4, n, splits), device=raw.device)
    best = torch.empty((n, splits), dtype=torch.int32, device=raw.device)
    sums = torch.empty((2, n, splits), dtype=torch.int64, device=raw.device)
    state = torch.empty((n, 6), dtype=torch.int32, device=raw.device)
    listed = torch.empty((n, 2, LISTED), dtype=torch.int32, device=raw.device)
    bits = weight_bits(vocab)
    raw_in, edited_in = (raw, raw.stride(0)), (chosen_from, chosen_from.stride(0))
    scale = {"SCALE": 2.0**bits}
    top = {"TOP": (127 + bits) << 23}
    lanes = {"SPLITS": triton.next_power_of_2(splits)}
    wide, kind = {"num_warps": 8, "CHUNK": CHUNK}, {"AT_TEMPERATURE": at_temperature}
    _survey_kernel[(splits, n)](
        *raw_in, *edited_in, rows, table, parts, best, n * splits, vocab, EDITED=edited is not None, **kind, **wide
    )
    _merge_kernel[(n,)](
        *raw_in,
        *edited_in,
        *(rows, table, parts, best, n * splits, splits, vocab, stats, state, ids, logprobs),
        **(kind | scale | top | lanes),
        SAMPLE=SAMPLE,
        GROUP=GROUP,
        num_warps=8,
    )
    _window_kernel[(splits, n)](
        *(*edited_in, rows, table, stats, state, sums, n * splits, listed, vocab),
        **(scale | wide),
        LISTED=LISTED,
        STEP=STEP,
    )
    _cut_kernel[(n,)](
        *(*edited_in, rows, table, stats, state, sums, n * splits, splits, listed, vocab),
        **(scale | top | lanes | wide),
        LISTED=LISTED,
        TALLY=TALLY,
    )
    _draw_kernel[(n,)](
        *raw_in,
        *edited_in,
        *(rows, positions, table, stats, state, sums, splits, vocab, ids, logprobs),
        **(kind | scale | lanes | wide),
    )
    return ids, logprobs, stats


def workspace_bytes(num_rows: int, vocab_size: int) -> int:
    """Device memory that `choose` takes for a step of so many rows."""
    return num_rows * (8 * LISTED + 36 * -(-vocab_size // CHUNK) + 64)


# ---- places in the distribution


@jit
def _rank_kernel(raw, raw_stride, ids, ranks, vocab, CHUNK: tl.constexpr):
    """One program a chunk of a row: adds the number of its tokens that are before the row's own."""
    n = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    own = tl.maximum(tl.load(ids + n), 0)
    x = _load(raw, n, raw_stride, places, vocab)
    mine = _load(raw, n, raw_stride, own, vocab)
    before = (x > mine) | ((x == mine) & (places < own))
    tl.atomic_add(ranks + n, tl.sum(before.to(tl.int64), 0))


@jit
def _best_kernel(raw, raw_stride, found, vocab, K: tl.constexpr, CHUNK: tl.constexpr):
    """One program a chunk of a row: `found` int64 [n, chunks, K], best first: the logit's bits, made to order like it,
    and below them the id, of equals the lowest largest."""
    n = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    bits = (_load(raw, n, raw_stride, places, vocab) + 0.0).to(tl.int32, bitcast=True)
    none = tl.full([CHUNK], -2147483648, tl.int32)
    keys = tl.where(places < vocab, bits ^ ((bits >> 31) & 0x7FFFFFFF), none)
    out = found + (n * tl.num_programs(0) + tl.program_id(0)) * K
    for k in range(K):
        key = tl.max(keys, 0)
        place = tl.min(tl.where(keys == key, places, 2147483647), 0)
        tl.store(out + k, (key.to(tl.int64) << 32) | tl.maximum(vocab - 1 - place, 0).to(tl.int64))
        keys = tl.where(places == place, none, keys)


def rank(raw: Tensor, ids: Tensor) -> Tensor:
    """Places, int64 [n] from 1, of `ids` (int64 [n]) among the logits `raw` [n, V]; of equals the lowest is first."""
    n, vocab = raw.shape
    ranks = torch.ones_like(ids)
    if n:
        require_triton()
        _rank_kernel[(triton.cdiv(vocab, CHUNK), n)](raw, raw.stride(0), ids, ranks, vocab, CHUNK=CHUNK, num_warps=8)
    return ranks


def best(raw: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids, int64 [n, k], and logits, float32 [n, k], of the largest of `raw` [n, V], best first, of equals the lowest
    id; k in 1..min(V, MAX_BEST)."""
    n, vocab = raw.shape
    splits = -(-vocab // CHUNK)
    found = torch.empty((n, splits, k), dtype=torch.int64, device=raw.device)
    if n:
        require_triton()
        _best_kernel[(splits, n)](raw, raw.stride(0), found, vocab, K=k, CHUNK=CHUNK, num_warps=8)
    keys = found.view(n, -1).topk(k).values
    high = (keys >> 32).int()
    return vocab - 1 - (keys & 0xFFFFFFFF), (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
