"""Attention over a paged KV cache on an accelerator, through our kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from megalite.core.functional import by_kernels
from megalite.kernels.attention import paged_attention
from megalite.kernels.fresh import fresh_attention
from megalite.kernels.jit import launches_dependents
from megalite.kernels.rope import rotate_and_store
from megalite.kernels.store import store_kv
from megalite.model.attention import Heads, Latents
from megalite.model.config import AttentionSpec
from megalite.model.kv_cache import FP8, DeviceCache, as_kept
from megalite.model.recurrence import Recurrence


@dataclass(frozen=True)
class DeviceAttention:
    """Attention context of one step of B rows and T tokens over a paged cache on an accelerator.

    All new keys and values are written first, then every row attends to its keys in the cache. The tensors may be
    static buffers of a captured graph: nothing here reads their values on the host.
    """

    cache: DeviceCache
    positions: Tensor
    """int64 [T]."""
    lengths: Tensor
    """int64 [T]; see `AttentionContext`."""
    slots: Tensor
    """Cache slot of each token, int64 [T]; -1: padding, not written."""
    query_start: Tensor
    """First token of each row, and T: int32 [B + 1]."""
    context_len: Tensor
    """Keys of each row, this step's included, int32 [B]; 0: padding."""
    block_table: Tensor
    """Cache blocks of each sequence in order, int32 [*, blocks]."""
    max_query_len: int
    """Most tokens of a row."""
    table_rows: Tensor | None = None
    """The row of block_table that row b uses, int32 [B]; None: row b itself."""
    fresh: bool = False
    """No row has keys in the cache from steps before. Rows of one length then go the fastest way there is."""

    make_recurrence: Callable[[], Recurrence] | None = None
    """Makes `recurrence`, where layers keep states."""

    @cached_property
    def recurrence(self) -> Recurrence:
        assert self.make_recurrence is not None
        return self.make_recurrence()

    @property
    def pdl(self) -> bool:
        """Whether kernels use programmatic dependent launch; see `paged_attention`."""
        return launches_dependents(self.positions.device)

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        keys, values = self.cache.layers[spec.layer]
        store_kv(k, v, keys, values, self.slots, scales=(spec.key_scale, spec.value_scale))
        return self._attend_stored(spec, q, k, v, sinks)

    def attend_latent(self, spec: AttentionSpec, heads: Latents) -> Tensor:
        """Absorbs the projections of keys and values into queries and output, for prompts too."""
        q, latent = heads.absorbed()
        (keys,) = self.cache.layers[spec.layer]
        store_kv(latent, latent, keys, keys, self.slots)
        return heads.valued(self._attend_stored(spec, q, latent, latent[..., : spec.values], None))

    def attend_heads(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        if heads.rotation is None or not by_kernels(heads.qkv):
            return self.attend(spec, *heads.treated(), sinks=heads.sinks)
        keys, values = self.cache.layers[spec.layer]
        table, positions = heads.rotation.table
        norms = heads.norms
        rotate_and_store(
            heads.qkv,
            keys,
            values,
            self.slots,
            table,
            positions=positions,
            norms=None if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps),
            zero_centred=norms is not None and norms[0].zero_centred,
            keep_keys=self.fresh,
            scales=(spec.key_scale, spec.value_scale),
            pdl=self.pdl,
        )
        q, k, v = heads.qkv.split_with_sizes(heads.counts, 1)
        return self._attend_stored(spec, q, k, v, heads.sinks)

    def _attend_stored(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """`attend` once keys and values are in the cache; k and v themselves are read where no row has earlier ones."""
        keys, *_ = self.cache.layers[spec.layer]
        if keys.dtype != FP8:
            return self._attend_kept(spec, q, k, v, sinks)
        if self.fresh:  # over what the cache keeps of them, as later steps will
            k, v = (as_kept(x, FP8, scale).to(x.dtype) for x, scale in ((k, spec.key_scale), (v, spec.value_scale)))
        out = self._attend_kept(replace(spec, scale=spec.scale * spec.key_scale), q, k, v, sinks)
        return out if spec.value_scale == 1 else out.mul_(spec.value_scale)

    def _attend_kept(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        common: dict[str, Any] = {
            "query_start": self.query_start,
            "scale": spec.scale,
            "window": spec.window,
            "chunk": spec.chunk,
            "softcap": spec.softcap,
            "sinks": sinks,
            "max_query_len": self.max_query_len,
            "pdl": self.pdl,
        }
        if self.fresh:
            return fresh_attention(q, k, v, **common)
        keys, *values = self.cache.layers[spec.layer]
        return paged_attention(
            q,
            keys,
            values[0] if values else keys[..., : spec.values],
            context_len=self.context_len,
            block_table=self.block_table,
            table_rows=self.table_rows,
            block_size=self.cache.block_size,
            **common,
        )
