"""Choice of the next tokens of n rows of logits on a GPU, as Triton kernels that no host value enters.

A row is greedy (temperature 0) or draws from integer weights, floor(exp((logit - largest) / temperature) * 2**b), whose
sums are exact in any order: so the split of the vocabulary into chunks, and the order in which programs come to their
turn, change no token. A float32 holds such a weight exactly, and its bits, the weight's key, order like the weight.

Nothing is sorted. Six launches, which greedy rows leave at once after the second:

1. survey: peak, its id and the sum of exponentials of each chunk (one pass over the logits; kernels/survey.py);
2. merge: those of the row; a greedy row's token. For top_k and top_p, a histogram of a sample of the row's weights says
   between which two keys the last token that stays most probably is;
3. window: the weight of each span above that window, and a list of what is inside it (another pass);
4. cut: the key and, of equal ones, the id of the last token that stays, by bisection over the list in registers. Where
   the sample misled, or the list is too short for all equals, in a second launch over the whole row: slower, and as
   exact;
5. draw: the span, then the token, at which the running sum exceeds the row's uniform number (Philox4x32-10, Salmon et
   al. 2011; the host has the same in inference/draws.py).

Log-sum-exp is over chunks of one length whatever the batch, so log-probabilities do not depend on the batch either.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megalite.kernels.cut import _cut_kernel
from megalite.kernels.jit import cdiv, jit, next_power_of_2, require_triton, tl
from megalite.kernels.survey import _merge_kernel, _survey_kernel
from megalite.kernels.weights import (
    _fractions,
    _keys,
    _least,
    _load,
    _parameters,
    _rate,
    _worth,
    weight_bits,
)

CHUNK = 8192
"""Logits of one program that surveys."""
SPAN = 256
"""Logits whose weights are summed together: of a bfloat16 row what one warp reads at once."""
SPANS_EACH = 8
"""Spans of a program that looks for the window: one a warp."""
SAMPLE = 8192
"""Logits of a row from which the window is estimated."""
GROUP = 16
"""Neighbours that are sampled together: one sector of memory."""
BINS = 2048
"""Of the sample's histogram, 32 to each power of two: more powers than there are between the least weight and the most.
"""
LISTED = 8192
"""Tokens that a row's window may hold."""
CUT_WARPS = 16
WINDOW_REGISTERS, CUT_REGISTERS = 64, 64
"""Of a thread, at most: more programs then fit into a multiprocessor."""

COLUMNS = SEED, INDEX, PROMPT, TOP_K, LEAST, TOP_P, TEMPERATURE, PENALTIES = tuple(range(8))
"""Of a row's parameters, int64: seed, sample index, prompt length, top_k (0: all), the least weight that min_p keeps;
and the bits of float64: top_p, temperature (0: greedy) and, from PENALTIES on, three that the kernels leave alone."""
WIDTH = 10
"""Numbers of a row's parameters."""


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


class Columns(Protocol):
    """The vocabulary cut over ranks."""

    widths: list[int]
    """Columns of each rank."""
    begins: Tensor
    """int32 [ranks + 1]: the first of each, and their number."""

    def gathered(self, x: Tensor) -> Tensor:
        """x [n, width] of every rank -> [n, ranks * width]."""

    def gathered_drawn(self, logits: Tensor, rows: Tensor, table: Tensor) -> Tensor:
        """Logits [n, width of this rank] -> [n, V]; rows that are greedy by the table hold anything."""


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
    spans,
    listed,
    vocab,
    SCALE: tl.constexpr,
    SPAN: tl.constexpr,
    EACH: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program EACH spans of a row: `sums` int64 [2, n, spans] of the weights above the window and of all; `listed`
    int64 [n, LISTED] what is inside it, in any order: the bits of a weight, not yet rounded down, above its id."""
    n = tl.program_id(1).to(tl.int64)
    kind = tl.load(state + 6 * n)
    if kind == 0:
        return
    span = tl.program_id(0) * EACH + tl.arange(0, EACH)
    there = span < spans
    place = n * spans + span
    top_k, least, top_p, temperature = _parameters(table, tl.load(rows + n))
    low = tl.load(state + 6 * n + 1).to(tl.float32, bitcast=True)
    high = tl.load(state + 6 * n + 2).to(tl.float32, bitcast=True)  # both integers: rounding changes no comparison
    least_weight = _least(least)
    ids = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    x = _load(edited, n, edited_stride, ids, vocab)
    weights = _fractions(x, tl.load(stats + 3 * n), _rate(temperature), SCALE)
    whole = tl.where(weights >= least_weight, weights, 0.0).to(tl.int64)
    total = tl.sum(whole, 1)
    tl.store(sums + num_parts + place, total, mask=there)
    if kind == 1:
        tl.store(sums + place, total, mask=there)
    else:
        tl.store(sums + place, tl.sum(tl.where(weights >= high, whole, 0), 1), mask=there)
        inside = (weights >= tl.maximum(low, least_weight)) & (weights < high)
        count = tl.sum(inside.to(tl.int32), 1)
        first = tl.atomic_add(state + 6 * n + 3 + span * 0, count, mask=count > 0, sem="relaxed")
        at = first[:, None] + tl.cumsum(inside.to(tl.int32), 1) - 1
        entries = (weights.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)
        tl.store(listed + n * LISTED + at, entries, mask=inside & (at < LISTED))


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
    spans,
    vocab,
    ids,
    logprobs,
    AT_TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program a row."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(state + 6 * n) == 0:
        return
    row = tl.load(rows + n)
    top_k, least, top_p, temperature = _parameters(table, row)
    output = tl.load(positions + n) - tl.load(table + row * 10 + 2)
    number = _uniform(tl.load(table + row * 10), tl.load(table + row * 10 + 1), output)
    span = tl.arange(0, SPANS)
    masses = tl.load(sums + n * spans + span, mask=span < spans, other=0)
    goal = (number * tl.sum(masses, 0).to(tl.float64)).to(tl.int64)
    chosen_span = tl.sum(((tl.cumsum(masses, 0) <= goal) & (span < spans)).to(tl.int32), 0)
    goal -= tl.sum(tl.where(span < chosen_span, masses, 0), 0)
    keys, places = _keys(
        chosen_span * SPAN, tl.load(state + 6 * n + 4), tl.load(state + 6 * n + 5), edited, edited_stride, n, vocab,
        tl.load(stats + 3 * n), temperature, least, SCALE, SPAN,
    )  # fmt: skip
    reached = tl.cumsum(_worth(keys, 1, False), 0)
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
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens, int64 [n], and their log-probabilities, float32 [n], of logits `raw` [n, V] of any float dtype; and
    float32 [n, 3] of which (logit - [1]) - [2] is any token's log-probability.

    `edited` [n, V]: what is chosen from; None: the raw ones, of which the log-probabilities are anyhow. `rows` int64
    [n]: of `table` int64 [rows, WIDTH]. `positions` int64 [n]: prompt length and tokens of output so far. A token is
    -1 where raw logits are NaN, and -2 where none is above -inf. `at_temperature`: log-probabilities of drawn tokens
    are those at the row's temperature. The vocabulary has at most 2**22 ids.

    `columns`: `raw` has this rank's columns of the vocabulary only, and nothing is edited. Only the logits of rows that
    draw their token are gathered then. Every rank calls this alike, and gets the same.
    """
    n, vocab = raw.shape
    ids, logprobs = torch.empty_like(rows), torch.empty(n, device=raw.device)
    stats = torch.empty((n, 3), device=raw.device)
    if n == 0:
        return ids, logprobs, stats
    require_triton()
    chosen_from = raw if edited is None else edited
    assert raw.stride(1) == chosen_from.stride(1) == 1 and table.shape[1] == WIDTH and table.is_contiguous()
    ranks = 1 if columns is None else len(columns.widths)
    splits = cdiv(vocab if columns is None else max(columns.widths), CHUNK)
    kind = {"AT_TEMPERATURE": at_temperature}
    parts = torch.empty((n, 5, splits), device=raw.device)
    _survey_kernel[(splits, n)](
        *(raw, raw.stride(0), chosen_from, chosen_from.stride(0), rows, table),
        *(parts, parts.view(torch.int32), splits, vocab),
        EDITED=edited is not None,
        CHUNK=CHUNK,
        **kind,
        num_warps=8,
    )
    if columns is not None:
        parts = columns.gathered(parts.view(n, -1))
        raw = chosen_from = columns.gathered_drawn(raw, rows, table)
        vocab = raw.shape[1]
    spans = cdiv(vocab, SPAN)
    sums = torch.empty((2, n, spans), dtype=torch.int64, device=raw.device)
    state = torch.empty((n, 6), dtype=torch.int32, device=raw.device)
    listed = torch.empty((n, LISTED), dtype=torch.int64, device=raw.device)
    bits = weight_bits(vocab)
    raw_in, edited_in = (raw, raw.stride(0)), (chosen_from, chosen_from.stride(0))
    scale = {"SCALE": 2.0**bits}
    top = {"TOP": (127 + bits) << 23}
    lanes = {"SPANS": next_power_of_2(spans), "SPAN": SPAN}
    _merge_kernel[(n,)](
        *(*raw_in, *edited_in, rows, table, parts, parts.view(torch.int32)),
        *(rows if columns is None else columns.begins, splits, vocab, stats, state, ids, logprobs),
        **(kind | scale | top),
        SPLITS=next_power_of_2(ranks * splits),
        RANKS=ranks,
        SAMPLE=SAMPLE,
        GROUP=GROUP,
        BINS=BINS,
        LISTED=LISTED,
        num_warps=8,
        maxnreg=128,  # so that two programs fit into a multiprocessor, and below four
    )
    _window_kernel[(cdiv(spans, SPANS_EACH), n)](
        *(*edited_in, rows, table, stats, state, sums, n * spans, spans, listed, vocab),
        **scale,
        SPAN=SPAN,
        EACH=SPANS_EACH,
        LISTED=LISTED,
        num_warps=SPANS_EACH,
        maxnreg=WINDOW_REGISTERS,
    )
    for by_list in (True, False):
        _cut_kernel[(n,)](
            *(*edited_in, rows, table, stats, state, sums, n * spans, spans, listed, vocab),
            **(scale | top | lanes),
            BY_LIST=by_list,
            EACH=SPANS_EACH,
            LISTED=LISTED,
            num_warps=CUT_WARPS,
            maxnreg=CUT_REGISTERS,
        )
    _draw_kernel[(n,)](
        *(*raw_in, *edited_in, rows, positions, table, stats, state, sums, spans, vocab, ids, logprobs),
        **(kind | scale | lanes),
        num_warps=4,
    )
    return ids, logprobs, stats


def workspace_bytes(num_rows: int, vocab_size: int) -> int:
    """Device memory that `choose` takes for a step of so many rows."""
    return num_rows * (8 * LISTED + 20 * -(-vocab_size // CHUNK) + 16 * -(-vocab_size // SPAN) + 64)
