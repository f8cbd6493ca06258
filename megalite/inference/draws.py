"""Draws tokens from integer weights: top_k, top_p and the inverse of the cumulative distribution, in exact arithmetic.

Probabilities become integers (`integer_weights`), whose sums are exact in any order, so kernels that add in an order of
their own choice can't change a result. The uniform number of a draw comes from a counter (`uniform`), no generator's
state. This is the way of a CPU; kernels/sampling.py does the same on a GPU.

R rows, a vocabulary of V ids. Equal weights rank by id, lowest first.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
"""Multipliers of the two halves of Philox's counter."""
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
"""What is added to its key after each round."""

BUCKET_SHIFT = 18
"""Bits dropped of a float32 to find its bucket: its sign, exponent and 5 bits of mantissa stay."""
BUCKETS = (127 + 63) << (23 - BUCKET_SHIFT)
"""Buckets for weights below 2**63."""


def uniform(seeds: np.ndarray, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, that draw output tokens `positions` (from 0) of samples `indices` of requests.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the seed's 64 bits
    and the counter (position, index, 0, 0); the first two words, lower first, give the upper 53 bits of a fraction. The
    three arrays have one shape or broadcast; a seed is taken modulo 2**64, the others are below 2**32.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    key = seeds.astype(np.uint64)
    key0, key1 = key & low, key >> shift
    zero = np.zeros_like(key)
    counter = [positions.astype(np.uint64), indices.astype(np.uint64), zero, zero]
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = counter[0] * np.uint64(PHILOX_M0), counter[2] * np.uint64(PHILOX_M1)
        counter = [
            (product1 >> shift) ^ counter[1] ^ key0,
            product1 & low,
            (product0 >> shift) ^ counter[3] ^ key1,
            product0 & low,
        ]
        key0, key1 = (key0 + np.uint64(PHILOX_W0)) & low, (key1 + np.uint64(PHILOX_W1)) & low
    bits = (counter[1] << shift | counter[0]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def largest_weight(vocab_size: int) -> int:
    """The weight of a row's likeliest token: 2**(62 - bits of the vocabulary size), e.g. 2**44 for 152k tokens.

    So a weight and an id fit into one int64 together, and so does the sum of V weights.
    """
    return 1 << (62 - vocab_size.bit_length())


def integer_weights(logits: Tensor, peaks: Tensor, temperatures: Tensor | None) -> Tensor:
    """Unnormalised probabilities of float32 logits [R, V], of which `peaks` [R, 1] are the largest, at the rows'
    `temperatures` (float32 [R]; None: all 1), as int64 [R, V].

    The likeliest token has `largest_weight`; what is less likely than it by more than that factor has 0.
    """
    shifted = logits - peaks
    if temperatures is not None:
        shifted /= temperatures[:, None]
    return shifted.exp_().mul_(largest_weight(logits.shape[1])).long()


@lru_cache(maxsize=8)
def descending_ids(vocab_size: int, device: torch.device) -> Tensor:
    """V - 1 ... 0: in the low bits of a sorting key, it puts the lower of two equal tokens first."""
    return torch.arange(vocab_size - 1, -1, -1, device=device)


def best_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [R, k] of the largest float32 logits [R, V] without NaN, best first."""
    if k == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    # Float bits, read as an integer, ascend with the value once negative ones are turned round; + 0.0 drops -0.0.
    bits, vocab_size = (logits + 0.0).view(torch.int32), logits.shape[1]
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | descending_ids(vocab_size, logits.device)
    return vocab_size - 1 - (keys.topk(k).values & 0xFFFFFFFF)


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Places [R] at which the running sum of weights [R, K] first exceeds `numbers` [R], in [0, 1), of their total.

    The sums are exact and `numbers` at most 1 - 2**-53, which rounding leaves below the total: a place of weight 0
    never comes out.
    """
    reached = weights.cumsum(-1)
    goal = (numbers * reached[:, -1].double()).long()
    return torch.searchsorted(reached, goal[:, None], right=True)[:, 0]


def draw_of_best(weights: Tensor, top_k: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """Ids [R] drawn from each row's `top_k` largest weights, of them the smallest set that holds `top_p` [R]."""
    vocab_size, device, size = weights.shape[1], weights.device, int(top_k.max())
    id_bits = vocab_size.bit_length()
    best, _ = torch.topk((weights << id_bits) | descending_ids(vocab_size, device), size)
    likely = best >> id_bits
    likely.masked_fill_(torch.arange(size, device=device) >= top_k[:, None], 0)
    reached = likely.cumsum(-1)
    likely.masked_fill_(reached - likely >= _share_of(reached[:, -1], top_p)[:, None], 0)
    ids: Tensor
    ids, order = torch.sort(vocab_size - 1 - (best & (2**id_bits - 1)))
    places = draw(likely.gather(1, order), numbers)
    return ids.gather(1, places[:, None])[:, 0]


def nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights [R, V], those outside the smallest set that holds `top_p` [R] of the total made 0.

    Nothing is sorted but the few tokens near the border: the total of each bucket of similar weights says in which
    bucket the border is, and that bucket's members are then taken best first.
    """
    num_rows = len(weights)
    buckets = weights.float().view(torch.int32) >> BUCKET_SHIFT  # [R, V]
    filled = weights.new_zeros(num_rows, BUCKETS).scatter_add_(1, buckets.long(), weights)
    upto = filled.cumsum(-1)
    total = upto[:, -1:]
    left_out = total - _share_of(total[:, 0], top_p)[:, None]
    border = torch.searchsorted(upto, left_out, right=True)  # the first bucket that isn't left out whole
    wanted = upto.gather(1, border) - left_out  # of the border bucket, best first
    border = border.int()  # the type of buckets, or comparing would widen them
    row, token = (buckets == border).nonzero(as_tuple=True)
    near = weights[row, token]
    order = near.argsort(descending=True, stable=True)  # equals stay in the order of their ids
    order = order[row[order].argsort(stable=True)]
    row, token, near = row[order], token[order], near[order]
    before = near.cumsum(0) - near  # may wrap over many rows; the difference below is right all the same
    sizes = row.bincount(minlength=num_rows)
    outside = before - before[sizes.cumsum(0) - sizes][row] >= wanted[row, 0]
    kept = weights.masked_fill(buckets < border, 0)
    kept[row[outside], token[outside]] = 0
    return kept


def _share_of(total: Tensor, shares: Tensor) -> Tensor:
    """The least integer [R] that is `shares` [R] of `total` [R]; at least 1, so that one token stays."""
    goal = (shares * total.double()).ceil().long().clamp(min=1)
    return torch.where(shares < 1, goal, total).minimum(total)
