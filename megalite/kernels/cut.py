"""The last token that top_k and top_p leave in a row, as a Triton kernel: the fourth of kernels/sampling.py."""

from __future__ import annotations

from megalite.kernels.jit import jit, tl
from megalite.kernels.weights import _keys, _parameters, _share, _worth


@jit
def _beside(keys, key, upward):
    """A key of at least this one, or one below it, negative: of either the least is wanted."""
    none = tl.full(keys.shape, 0x7FFFFFFF, tl.int32)
    return tl.where(upward, tl.where(keys >= key, keys, none), tl.where(keys < key, -keys, none))


@jit
def _beside_id(keys, ids, key, id, downward):
    """The same of the ids of one key: one up to this id, negative, or one behind it."""
    none = tl.full(keys.shape, 0x7FFFFFFF, tl.int32)
    near = tl.where(downward, tl.where(ids <= id, -ids, none), tl.where(ids > id, ids, none))
    return tl.where(keys == key, near, none)


@jit
def _last(
    keys,
    ids,
    first_key,
    end_key,
    above,
    total,
    top_k,
    top_p,
    temperature,
    least,
    logits,
    stride,
    n,
    vocab,
    peak,
    BY_LIST: tl.constexpr,
    SCALE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Key and id of the last token that stays, of the given ones or of a whole row; no token has `end_key` or more, and
    those of `first_key` or more suffice."""
    row = (logits, stride, n, vocab, peak, temperature, least)
    last_key = first_key * 0 + 0x3F800000
    last_id = first_key * 0 + (vocab - 1)
    for stage in range(2):  # top_k, then top_p of what it keeps
        by_number = stage == 0
        if tl.where(by_number, top_k > 0, top_p < 1):
            if BY_LIST:
                left = tl.where((keys > last_key) | ((keys == last_key) & (ids <= last_id)), keys, 0)
                every = tl.sum(_worth(left, 1, by_number), 0)
            else:
                sums = tl.zeros([SPAN], tl.int64)
                for start in range(0, vocab, SPAN):
                    part, _ = _keys(start, last_key, last_id, *row, SCALE, SPAN)
                    sums += _worth(part, 1, by_number)
                every = tl.sum(sums, 0)
            share = _share(tl.where(top_k > 0, every, total), top_p) - above
            goal = tl.where(by_number, tl.minimum(top_k, every), share)
            # The key of the last token: the highest from which on the tokens reach the goal. Both ends move on to keys
            # that there are, so few different ones are few rounds.
            low = first_key
            high = end_key
            beyond = goal * 0
            while high - low > 1:
                middle = low + (high - low) // 2
                if BY_LIST:
                    some = tl.sum(_worth(left, middle, by_number), 0)
                    reached = some >= goal
                    bound = tl.min(_beside(left, middle, reached), 0)
                else:
                    sums = tl.zeros([SPAN], tl.int64)
                    up = tl.full([SPAN], 0x7FFFFFFF, tl.int32)
                    down = tl.full([SPAN], 0x7FFFFFFF, tl.int32)
                    for start in range(0, vocab, SPAN):
                        part, _ = _keys(start, last_key, last_id, *row, SCALE, SPAN)
                        sums += _worth(part, middle, by_number)
                        up = tl.minimum(up, _beside(part, middle, True))
                        down = tl.minimum(down, _beside(part, middle, False))
                    some = tl.sum(sums, 0)
                    reached = some >= goal
                    bound = tl.min(tl.where(reached, up, down), 0)
                low = tl.where(reached, bound, low)
                high = tl.where(reached, high, 1 - bound)
                beyond = tl.where(reached, beyond, some)
            # Its id: so many of the tokens of this key are needed, the lowest ids first.
            each = low.to(tl.float32, bitcast=True).to(tl.int64)
            needed = tl.where(by_number, goal - beyond, (goal - beyond + each - 1) // each)
            end = tl.where(low == last_key, last_id, vocab - 1)
            begin = low * 0 - 1
            middle = end  # all of them may be needed
            while end - begin > 1:
                if BY_LIST:
                    number = tl.sum(((left == low) & (ids <= middle)).to(tl.int32), 0)
                    reached = number >= needed
                    bound = tl.min(_beside_id(left, ids, low, middle, reached), 0)
                else:
                    numbers = tl.zeros([SPAN], tl.int32)
                    up = tl.full([SPAN], 0x7FFFFFFF, tl.int32)
                    down = tl.full([SPAN], 0x7FFFFFFF, tl.int32)
                    for start in range(0, vocab, SPAN):
                        part, places = _keys(start, last_key, last_id, *row, SCALE, SPAN)
                        numbers += ((part == low) & (places <= middle)).to(tl.int32)
                        up = tl.minimum(up, _beside_id(part, places, low, middle, False))
                        down = tl.minimum(down, _beside_id(part, places, low, middle, True))
                    number = tl.sum(numbers, 0)
                    reached = number >= needed
                    bound = tl.min(tl.where(reached, down, up), 0)
                end = tl.where(reached, -bound, end)
                begin = tl.where(reached, begin, bound - 1)
                begin = tl.where(number == needed, end - 1, begin)
                middle = begin + (end - begin) // 2
            last_key = low
            last_id = end
    return last_key, last_id


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
    spans,
    listed,
    vocab,
    BY_LIST: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    EACH: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program a row: finds its last token, and adds to the first of `sums` what stays of the window. BY_LIST: from
    what was listed; where that does not do, it leaves the row to a second launch without."""
    n = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = 2 if BY_LIST else 3
    if tl.load(state + 6 * n) != kind:
        return
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    peak = tl.load(stats + 3 * n)
    first_key = tl.load(state + 6 * n + 1)
    end_key = tl.load(state + 6 * n + 2)
    span = tl.arange(0, SPANS)
    there = span < spans
    total = tl.sum(tl.load(sums + num_parts + n * spans + span, mask=there, other=0), 0)
    if BY_LIST:
        found = tl.load(state + 6 * n + 3)
        above = tl.sum(tl.load(sums + n * spans + span, mask=there, other=0), 0)
        i = tl.arange(0, LISTED)
        entries = tl.load(listed + n * LISTED + i, mask=i < found, other=0)
        ids = entries.to(tl.int32)
        keys = tl.floor((entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        goal = _share(total, top_p)
        straddles = (goal > above) & (goal <= above + tl.sum(_worth(keys, 1, False), 0))
        enough = (found >= top_k) | (first_key == 0x3F800000)
        if (found <= LISTED) & tl.where(top_k > 0, enough, straddles):
            last_key, last_id = _last(
                keys, ids, first_key, tl.minimum(end_key, TOP + 1), above, total, top_k, top_p, temperature, least,
                edited, edited_stride, n, vocab, peak, True, SCALE, EACH * SPAN,
            )  # fmt: skip
            tl.store(state + 6 * n + 4, last_key)
            tl.store(state + 6 * n + 5, last_id)
            stays = (keys > last_key) | ((keys == last_key) & (ids <= last_id))
            weights = keys.to(tl.float32, bitcast=True).to(tl.int64)
            tl.atomic_add(sums + n * spans + ids // SPAN, weights, mask=stays, sem="relaxed")
        else:
            tl.store(state + 6 * n, 3)
    else:
        last_key, last_id = _last(
            span, span, first_key * 0 + 0x3F800000, first_key * 0 + (TOP + 1), total * 0, total, top_k, top_p,
            temperature, least, edited, edited_stride, n, vocab, peak, False, SCALE, EACH * SPAN,
        )  # fmt: skip
        tl.store(state + 6 * n + 4, last_key)
        tl.store(state + 6 * n + 5, last_id)
        for start in range(0, vocab, EACH * SPAN):
            part, _ = _keys(
                start, last_key, last_id, edited, edited_stride, n, vocab, peak, temperature, least, SCALE, EACH * SPAN
            )
            of_spans = tl.sum(tl.reshape(_worth(part, 1, False), [EACH, SPAN]), 1)
            behind = start // SPAN + tl.arange(0, EACH)
            tl.store(sums + n * spans + behind, of_spans, mask=behind < spans)
