"""Attention over a paged KV cache in host memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.config import AttentionSpec


def attend_block(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, start: int) -> Tensor:
    """Attention of `count` queries at positions start.. over keys at positions 0..start+count-1.

    q [B, H, count, D], k and v [B, K, start + count, D] -> [B, H, count, D].
    """
    count, length = q.shape[-2], k.shape[-2]
    if count == 1:
        seen = slice(-spec.window if spec.window is not None else None, None)
        return attend_one(spec, q[..., 0, :], k[..., seen, :], v[..., seen, :])[..., None, :]
    windowed = spec.window is not None and length > spec.window
    grouped = q.shape[1] != k.shape[1]
    if spec.softcap is None and start == 0 and not windowed:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    mask = causal_mask(count, length, spec.window, q.device)
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _softcapped(spec, q, k, v, torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf))


def attend_one(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query a sequence, over all keys given: q [B, H, D], k and v [B, K, L, D] -> [B, H, D].

    The query heads that share a KV head take the place of a sequence of queries, so its keys are read once for all of
    them. `mask` [B, 1, 1, L] is added to the scores.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, G, D]
    if spec.softcap is None:
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=spec.scale)
    else:
        out = _softcapped(spec, grouped, k, v, mask)
    return out.flatten(1, 2)


def _softcapped(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = spec.softcap * torch.tanh(q.float() @ k.float().mT * (spec.scale / spec.softcap))
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).type_as(v) @ v


def causal_mask(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [count, length]: each of the last `count` positions sees itself and earlier ones, at most `window`."""
    query = torch.arange(length - count, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


@dataclass(frozen=True, slots=True)
class CacheRow:
    """The tokens of one sequence in a step: where they are in the pack and where its keys are in the cache."""

    offset: int
    """First token in the pack."""
    start: int
    """Position of that token."""
    count: int
    first_slot: int | None
    """Cache slot of position 0 when all its slots are one run."""
    blocks: Tensor | None
    """Otherwise its block ids, int64, as many as its keys need."""

    @property
    def length(self) -> int:
        return self.start + self.count

    @property
    def decodes_in_place(self) -> bool:
        """One query over keys that are one run."""
        return self.count == 1 and self.first_slot is not None


class HostCache:
    """Keys and values of this rank's layers in host memory: for each global layer index [2, K, slots, D].

    Zeroed, because masked positions are multiplied, but a page takes real memory only once it is written.
    """

    def __init__(
        self, layers: Sequence[int], kv_heads: int, blocks: int, head_dim: int, *, block_size: int, dtype: torch.dtype
    ):
        self.block_size = block_size
        self._shape = (2, kv_heads, blocks * block_size, head_dim)
        self._dtype = dtype
        self._places = tuple(layers)
        self.allocate()

    def allocate(self) -> None:
        """Take the memory; what the cache held is gone."""
        nbytes = math.prod(self._shape) * self._dtype.itemsize
        self.layers = {
            layer: torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(self._dtype).view(self._shape)
            for layer in self._places
        }

    def free(self) -> None:
        """Give the memory back, until `allocate`."""
        self.layers = {}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())


ROW_COST = 256
"""Keys one attention call could have read in the time it takes to start one, measured on CPU; see `_Lanes`."""


class _Lanes:
    """Decoding sequences whose keys lie at even distances in the cache, seen as one batch without copying them.

    Starts that are multiples of a distance apart make a strided view [lanes, K, longest, D]; lanes between that belong
    to no sequence, and the positions beyond a shorter sequence, are computed and thrown away.
    """

    def __init__(self, rows: Sequence[CacheRow]):
        self.rows = rows = sorted(rows, key=lambda row: row.first_slot)
        self.first = rows[0].first_slot
        self.distance = math.gcd(*(row.first_slot - self.first for row in rows))
        lanes = [(row.first_slot - self.first) // self.distance for row in rows]
        self.count = lanes[-1] + 1
        self.longest = max(row.length for row in rows)
        self.offsets = _places([row.offset for row in rows])
        self.lanes = _places(lanes)
        self.masks: dict[int | None, Tensor] = {}

    @classmethod
    def of(cls, rows: Sequence[CacheRow], slots: int) -> _Lanes | None:
        """The rows as lanes where that is cheaper than one call a row; None otherwise."""
        if len(rows) < 2:
            return None
        lanes = cls(rows)
        fits = lanes.first + (lanes.count - 1) * lanes.distance + lanes.longest <= slots
        cheaper = lanes.count * lanes.longest < sum(row.length + ROW_COST for row in rows)
        return lanes if fits and cheaper else None

    def view(self, cached: Tensor) -> Tensor:
        """Keys or values [K, slots, D] as [lanes, K, longest, D]."""
        heads, _, dim = cached.shape
        head_stride, slot_stride, _ = cached.stride()
        offset = cached.storage_offset() + self.first * slot_stride
        strides = (self.distance * slot_stride, head_stride, slot_stride, 1)
        return cached.as_strided((self.count, heads, self.longest, dim), strides, offset)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[lanes, 1, 1, longest]: 0 where a lane's query may look, -inf elsewhere."""
        if window not in self.masks:
            lengths = torch.full((self.count, 1), self.longest)
            lengths[self.lanes, 0] = torch.tensor([row.length for row in self.rows])
            key = torch.arange(self.longest)[None]
            hidden = key >= lengths
            if window is not None:
                hidden |= key < lengths - window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def attend(self, spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        lanes_q = q[self.offsets]
        if len(lanes_q) < self.count:
            spread = q.new_zeros(self.count, *q.shape[1:])
            spread[self.lanes] = lanes_q
            lanes_q = spread
        mask = self.mask(spec.window, q.dtype)
        out[self.offsets] = attend_one(spec, lanes_q, self.view(keys), self.view(values), mask)[self.lanes]


def _places(indices: list[int]) -> slice | Tensor:
    """Ascending by one, indices are a slice, which costs no copy."""
    run = indices == list(range(indices[0], indices[0] + len(indices)))
    return slice(indices[0], indices[0] + len(indices)) if run else torch.tensor(indices)


class HostAttention:
    """One step over a paged cache in host memory: all keys and values are written first, then every row attends.

    A row whose slots are one run reads them in place; others gather their blocks.
    """

    def __init__(self, cache: HostCache, rows: Sequence[CacheRow], positions: Tensor, lengths: Tensor, slots: Tensor):
        self.cache = cache
        self.positions = positions
        self.lengths = lengths
        self.slots = slots
        """Cache slot of each token of the pack: int64 [T]."""
        num_slots = next(iter(cache.layers.values())).shape[2]
        self.lanes = _Lanes.of([row for row in rows if row.decodes_in_place], num_slots)
        self.rows = rows if self.lanes is None else [row for row in rows if not row.decodes_in_place]

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] == 0:  # more tp ranks than query heads
            return q
        keys, values = self.cache.layers[spec.layer]  # [K, slots, D] each
        keys.index_copy_(1, self.slots, k.transpose(0, 1))
        values.index_copy_(1, self.slots, v.transpose(0, 1))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self.lanes is not None:
            self.lanes.attend(spec, q, keys, values, out)
        for row in self.rows:
            mine = slice(row.offset, row.offset + row.count)
            past_k, past_v = self._past(keys, row), self._past(values, row)
            attended = attend_block(spec, q[mine].transpose(0, 1)[None], past_k[None], past_v[None], start=row.start)
            out[mine] = attended[0].transpose(0, 1)
        return out

    def _past(self, cached: Tensor, row: CacheRow) -> Tensor:
        """A row's keys or values [K, length, D]."""
        if row.first_slot is not None:
            return cached[:, row.first_slot : row.first_slot + row.length]
        blocks = cached.unflatten(1, (-1, self.cache.block_size)).index_select(1, row.blocks)
        return blocks.flatten(1, 2)[:, : row.length]
