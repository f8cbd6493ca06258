"""Attention over a paged KV cache in host memory. Shapes: B rows, H query heads, K KV heads, L keys, D channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.attention import Heads, Latents, attend_written, causal_mask
from megalite.model.config import AttentionSpec
from megalite.model.kv_cache import FP8, HostCache, as_kept
from megalite.model.recurrence import Recurrence, Run


def attend_block(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, start: int) -> Tensor:
    """Causal attention of queries at positions start..L-1 over keys at positions 0..L-1.

    q [B, H, L - start, D], k and v [B, K, L, D] -> [B, H, L - start, D].
    """
    length, group = k.shape[-2], q.shape[1] // k.shape[1]
    low = spec.first_key(length - 1)
    if length - start == 1:
        return attend_one(spec, q[..., 0, :], k[..., low:, :], v[..., low:, :], sinks)[..., None, :]
    plain = spec.softcap is None and sinks is None
    if plain and start == 0 and low == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=group > 1)
    mask = causal_mask(range(start, length), range(length), spec, q.device)
    if plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=group > 1)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return attend_written(q, k, v, spec, mask, None if sinks is None else sinks[:, None, None])


def attend_one(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """One query a sequence, over all keys given: q [B, H, D], k and v [B, K, L, D] -> [B, H, D].

    The query heads that share a KV head take the place of a sequence of queries, so its keys are read once for all of
    them. `mask` [B, 1, 1, L] is added to the scores.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, G, D]
    if spec.softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=spec.scale)
    else:
        of_heads = None if sinks is None else sinks.view(k.shape[1], -1, 1)
        out = attend_written(grouped, k, v, spec, mask, of_heads)
    return out.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One sequence's new tokens in a step, and where its keys are in the cache."""

    offset: int
    """Index of the first new token among the step's T tokens."""
    start: int
    """Position of that token in the sequence."""
    count: int
    """Number of new tokens."""
    first_slot: int | None
    """Cache slot of position 0, if the sequence's slots are contiguous."""
    blocks: Tensor | None
    """Otherwise the sequence's block ids, int64, as many as its keys need."""
    row: int = 0
    """Row of the sequence's states, if layers keep any."""

    @property
    def length(self) -> int:
        return self.start + self.count

    @property
    def decodes_in_place(self) -> bool:
        """It has one query, and its keys are contiguous in the cache."""
        return self.count == 1 and self.first_slot is not None


ROW_COST = 256
"""Keys that could be read in the time that starting an attention call takes, measured on a CPU; see `_Lanes`."""


class _Lanes:
    """Decoding sequences whose keys lie at even distances in the cache, seen as one batch without copying them.

    First slots that are multiples of a distance apart make a strided view [lanes, K, longest, D]. Lanes between that
    belong to no sequence, and positions beyond a shorter sequence, are computed and thrown away.
    """

    def __init__(self, rows: Sequence[CacheRow]):
        runs = sorted((row.first_slot, row.offset, row.length) for row in rows if row.first_slot is not None)
        slots, offsets, self.lengths = map(list, zip(*runs, strict=True))
        self.first = slots[0]
        self.distance = math.gcd(*(slot - self.first for slot in slots))
        lanes = [(slot - self.first) // self.distance for slot in slots]
        self.count = lanes[-1] + 1
        self.longest = max(self.lengths)
        self.offsets = _places(offsets)
        self.lanes = _places(lanes)
        self.masks: dict[tuple[int | None, int | None], Tensor] = {}

    @classmethod
    def of(cls, rows: Sequence[CacheRow], slots: int) -> _Lanes | None:
        """The rows as lanes where that is cheaper than one call for each; None otherwise. `slots`: of the cache."""
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

    def mask(self, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
        """[lanes, 1, 1, longest], added to the scores: 0 for keys that a lane's query sees, -inf elsewhere."""
        kind = spec.window, spec.chunk
        if kind not in self.masks:
            lengths = torch.full((self.count, 1), self.longest)
            lengths[self.lanes, 0] = torch.tensor(self.lengths)
            key = torch.arange(self.longest)[None]
            hidden = key >= lengths
            if spec.window is not None:
                hidden |= key < lengths - spec.window
            if spec.chunk is not None:
                hidden |= key < (lengths - 1) // spec.chunk * spec.chunk
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[kind] = mask[:, None, None]
        return self.masks[kind]

    def attend(
        self,
        spec: AttentionSpec,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        lanes_q = q[self.offsets]
        keys, values = (self.view(cached).to(q.dtype) for cached in (keys, values))
        if len(lanes_q) < self.count:
            spread = q.new_zeros(self.count, *q.shape[1:])
            spread[self.lanes] = lanes_q
            lanes_q = spread
        mask = self.mask(spec, q.dtype)
        out[self.offsets] = attend_one(spec, lanes_q, keys, values, sinks, mask)[self.lanes]


def _places(indices: list[int]) -> slice | Tensor:
    """Indices as a slice, which costs no copy, where they ascend by one."""
    run = indices == list(range(indices[0], indices[0] + len(indices)))
    return slice(indices[0], indices[0] + len(indices)) if run else torch.tensor(indices)


class HostAttention:
    """Attention context of one step over a paged cache in host memory.

    All new keys and values are written first, then every row attends to its keys in the cache. A row whose slots are
    one run reads them in place; others gather their blocks.
    """

    def __init__(self, cache: HostCache, rows: Sequence[CacheRow], positions: Tensor, lengths: Tensor, slots: Tensor):
        self.cache = cache
        self.positions = positions
        self.lengths = lengths
        self.slots = slots
        """Cache slot of each token of the pack: int64 [T]."""
        self._all_rows = rows
        self.lanes = _Lanes.of([row for row in rows if row.decodes_in_place], cache.num_slots)
        self.rows = rows if self.lanes is None else [row for row in rows if not row.decodes_in_place]

    @cached_property
    def recurrence(self) -> Recurrence:
        runs = [Run(row.offset, row.count, row.start == 0, row.row) for row in self._all_rows]
        return Recurrence.of_runs(runs, self.positions.device, self.cache.states)

    def attend_heads(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        return self.attend(spec, *heads.treated(), sinks=heads.sinks)

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        if q.shape[1] == 0:  # more tp ranks than query heads
            return q
        keys, values = self.cache.layers[spec.layer]  # [K, slots, D] each
        self._keep(keys, k, spec.key_scale)
        self._keep(values, v, spec.value_scale)
        return self._attend_stored(spec, q, keys, values, sinks)

    def attend_latent(self, spec: AttentionSpec, heads: Latents) -> Tensor:
        q, latent = heads.absorbed()
        if q.shape[1] == 0:
            return heads.valued(q[..., : spec.values])
        (keys,) = self.cache.layers[spec.layer]  # [1, slots, R + P]
        self._keep(keys, latent, 1.0)
        return heads.valued(self._attend_stored(spec, q, keys, keys[..., : spec.values], None))

    def _keep(self, cached: Tensor, new: Tensor, scale: float) -> None:
        """Write the step's keys or values [T, K, D]."""
        new = as_kept(new, cached.dtype, scale).transpose(0, 1)
        if cached.dtype == FP8:  # which torch does not copy by index
            cached, new = cached.view(torch.uint8), new.view(torch.uint8)
        cached.index_copy_(1, self.slots, new)

    def _attend_stored(
        self, spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
    ) -> Tensor:
        out = q.new_empty(*q.shape[:2], values.shape[2])
        in_fp8, value_scale = keys.dtype == FP8, spec.value_scale
        if in_fp8:
            spec = replace(spec, scale=spec.scale * spec.key_scale)
        if self.lanes is not None:
            self.lanes.attend(spec, q, keys, values, sinks, out)
        for row in self.rows:
            mine = slice(row.offset, row.offset + row.count)
            past_k, past_v = (self._past(cached, row).to(q.dtype) for cached in (keys, values))
            asked = q[mine].transpose(0, 1)[None]
            attended = attend_block(spec, asked, past_k[None], past_v[None], sinks, start=row.start)
            out[mine] = attended[0].transpose(0, 1)
        return out.mul_(value_scale) if in_fp8 and value_scale != 1 else out

    def _past(self, cached: Tensor, row: CacheRow) -> Tensor:
        """A row's keys or values [K, length, D]."""
        if row.first_slot is not None:
            return cached[:, row.first_slot : row.first_slot + row.length]
        assert row.blocks is not None
        blocks = cached.unflatten(1, (-1, self.cache.block_size)).index_select(1, row.blocks)
        return torch.flatten(blocks, 1, 2)[:, : row.length]
