"""Attention contexts: how the tokens of a forward pass attend. The model never asks whether it trains or generates.

`PackedAttention` is for whole sequences laid end to end (training, scoring). Generation uses a paged KV cache:
`HostAttention` in host memory, `DeviceAttention` on an accelerator. Shapes: T tokens, H query heads, K KV heads (H is a
multiple of K), D channels of a head; query head h attends to KV head h // (H / K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megalite.core import fused
from megalite.core.functional import has_kernels
from megalite.core.layers import RMSNorm
from megalite.model.config import AttentionSpec
from megalite.model.recurrence import Recurrence, Run
from megalite.model.rope import Rotation

CHUNK = 512
"""Queries whose scores are in memory at once, where torch has no fused attention."""

Kernel = Literal["varlen", "cudnn", "batched"]
"""What computes a pack: FlashAttention-2 over sequences of any lengths, cuDNN's attention over equal ones, or
`_attend_batch` for each run of neighbours of equal length."""
PREFERRED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_MULTIPLE = 128
"""cuDNN gets only multiples of this length, as windows of text have: planning a new shape takes longer than a step."""


def choose_kernel(
    spec: AttentionSpec,
    runs: Sequence[tuple[int, int]],
    *,
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
) -> Kernel:
    """The fastest kernel for a pack of `runs` (number of sequences, their length).

    `capability`: of the CUDA device, None on a CPU. On Hopper and data-centre Blackwell cuDNN is faster than
    FlashAttention-2 (262 against 480 us forward for 8 x 2048 x 16 heads of 128 channels on an H100); it takes no
    window.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if capability is None or capability < (8, 0) or not half or spec.softcap is not None or head_dim % 8:
        return "batched"
    longest = max(length for _, length in runs)
    if spec.chunk is not None and spec.chunk < longest:
        return "batched"
    windowed = spec.window is not None and spec.window < longest
    if len(runs) == 1 and not windowed:
        planned = capability in ((9, 0), (10, 0)) and head_dim <= 128 and longest % CUDNN_MULTIPLE == 0
        return "cudnn" if planned else "batched"
    return "varlen" if head_dim <= 256 else "batched"


@dataclass(frozen=True, slots=True)
class Heads:
    """The product of a layer's q, k and v, and what happens to its heads before they attend."""

    qkv: Tensor
    """[T, H + 2 K, D]: queries, keys, values."""
    counts: tuple[int, int, int]
    """(H, K, K)."""
    norms: tuple[RMSNorm, RMSNorm] | None
    """The norms of each query head and of each key head."""
    rotation: Rotation | None
    """The rotation of queries and keys, applied after the norms."""
    sinks: Tensor | None = None
    """See `AttentionContext.attend`."""

    def treated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D] and keys [T, K, D] after norms and rotation, and values [T, K, D]."""
        num_q, num_k, _ = self.counts
        weights = [norm.weight for norm in self.norms or ()]
        if self.rotation is not None and fused.learns_by_kernels(self.qkv, *weights):
            norms, zero_centred = None, False
            if self.norms is not None:
                q_norm, k_norm = self.norms
                norms, zero_centred = (q_norm.weight, k_norm.weight, q_norm.eps), q_norm.zero_centred
            return fused.turned_heads(self.qkv, (num_q, num_k), *self.rotation.table, norms, zero_centred=zero_centred)
        q, k, v = self.qkv.split(self.counts, 1)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.rotation is None:
            return q, k, v
        if has_kernels(q):
            return self.rotation(q), self.rotation(k), v
        together = self.qkv[:, : num_q + num_k] if self.norms is None else torch.cat([q, k], 1)
        q, k = self.rotation(together).split((num_q, num_k), 1)
        return q, k, v


class Latents(Protocol):
    """Queries and latent keys of one layer, from which a context makes what it attends with; see `layers.latent`."""

    def expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [T, H, D] and values [T, H, V] of every head."""

    def absorbed(self) -> tuple[Tensor, Tensor]:
        """Queries [T, H, R + P] over latent keys [T, 1, R + P], whose first R channels are their values."""

    def valued(self, mixed: Tensor) -> Tensor:
        """Attended latent vectors [T, H, R] -> values [T, H, V]."""


class AttentionContext(Protocol):
    """The sequences that the T tokens of a forward pass belong to, and how they attend to each other."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence, from 0: int64 [T]."""

    @property
    def lengths(self) -> Tensor:
        """Length that each token's sequence may reach, on which its rotary frequencies may depend: int64 [T]."""

    @property
    def recurrence(self) -> Recurrence:
        """The sequences for layers that keep a state of each."""

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Causal attention of layer `spec.layer`: q [T, H, D], k and v [T, K, D] -> [T, H, D].

        `sinks` [H]: for each head the score of a further key, whose value is zero.
        """

    def attend_latent(self, spec: AttentionSpec, heads: Latents) -> Tensor:
        """Causal attention over latent vectors -> [T, H, `heads.value_width`]."""

    def attend_heads(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        """`attend` after norms and rotation of the heads, which may overwrite `heads.qkv` -> [T, H, D]."""


class PackedAttention:
    """Whole sequences of `lengths` tokens laid end to end, without padding and without a KV cache; differentiable.

    Neighbours of one length are computed as a batch: sequences sorted by length, as `packing.pack` makes them, need at
    most sqrt(2 T) batches for T tokens. A GPU computes all of them in one kernel where torch has one: float16 or
    bfloat16, no softcap; see `choose_kernel`. `beyond`: tokens of each sequence that are not in the pack, because they
    are targets only.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", *, beyond: int = 0):
        self.longest = max(lengths)
        self.runs = [(len(list(alike)), length) for length, alike in groupby(lengths)]
        """(number of neighbours of equal length, that length), in order."""
        self.cu_lengths = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.lengths = torch.cat([torch.full((length,), length + beyond, device=device) for length in lengths])
        on_gpu = self.positions.is_cuda
        self.capability = torch.cuda.get_device_capability(self.positions.device) if on_gpu else None

    @cached_property
    def recurrence(self) -> Recurrence:
        counts = [length for count, length in self.runs for _ in range(count)]
        offsets = accumulate(counts, initial=0)
        return Recurrence.of_runs([Run(*run) for run in zip(offsets, counts, strict=False)], self.positions.device)

    def attend_heads(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        return self.attend(spec, *heads.treated(), sinks=heads.sinks)

    def attend_latent(self, spec: AttentionSpec, heads: Latents) -> Tensor:
        return self.attend(replace(spec, values=None), *heads.expanded())

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        if q.shape[1] == 0:
            return q.new_empty(*q.shape[:2], v.shape[2])
        if sinks is not None:
            return self._attend_runs(spec, q, k, v, sinks)
        kernel = choose_kernel(spec, self.runs, head_dim=q.shape[2], dtype=q.dtype, capability=self.capability)
        if v.shape[2] != k.shape[2]:
            kernel = "batched"
        if kernel == "varlen" and (varlen := _varlen_attention()) is not None:
            left = -1 if spec.window is None else spec.window - 1
            place = (self.cu_lengths, self.cu_lengths, self.longest, self.longest)
            out: Tensor = varlen(q, k, v, *place, scale=spec.scale, window_size=(left, 0))
            return out
        with sdpa_kernel(PREFERRED, set_priority=True) if kernel == "cudnn" else nullcontext():
            return self._attend_runs(spec, q, k, v, None)

    def _attend_runs(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        sizes = [count * length for count, length in self.runs]
        whole = len(sizes) == 1  # the gradient of a split is a copy, even of one into one part
        attended = []
        for run, *parts in zip(self.runs, *([x] if whole else x.split(sizes) for x in (q, k, v)), strict=True):
            batched_q, batched_k, batched_v = (x.unflatten(0, run).transpose(1, 2) for x in parts)  # [B, H or K, L, D]
            done = _attend_batch(batched_q, batched_k, batched_v, spec, sinks)
            attended.append(done.transpose(1, 2).flatten(0, 1))
        return attended[0] if whole else torch.cat(attended)


@cache
def _varlen_attention() -> Callable[..., Any] | None:
    """torch's attention over sequences of different lengths, where this version has it.

    Imported at first use: torch's compiler comes with it, which takes two seconds.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" in signature(varlen_attn).parameters:  # wants to be told that query heads share KV heads
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _attend_batch(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """Sequences of one length, q [B, H, L, D], k and v [B, K, L, D] -> [B, H, L, D]. What runs:

    - no softcap, no window below L: torch's fused causal attention, FlashAttention (or what its caller prefers) but for
      float32 on CUDA, where it is the memory-efficient kernel;
    - a window or chunks: the memory-efficient kernel with a mask [L, L];
    - a softcap or sinks: the scores are written out, `CHUNK` queries at a time, and made again in the backward pass.
    """
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    plain, whole = spec.softcap is None and sinks is None, spec.first_key(length - 1) == 0
    if plain and whole and not (q.is_cuda and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=group > 1)
    if group > 1:  # only flash attention knows groups; without this the others would fall back to written-out scores
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if plain and whole:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
    if plain:
        mask = causal_mask(range(length), range(length), spec, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
    again = partial(checkpoint, attend_written, use_reentrant=False, preserve_rng_state=False)
    attend = again if torch.is_grad_enabled() else attend_written  # `checkpoint` imports the compiler, for seconds
    chunks = []
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        low = spec.first_key(first)
        mask = causal_mask(range(first, last), range(low, last), spec, q.device)
        parts = q[:, :, first:last], k[:, :, low:last], v[:, :, low:last], spec, mask
        of_heads = None if sinks is None else sinks[:, None, None]
        chunks.append(attend(*parts, of_heads))
    return torch.cat(chunks, 2)


def causal_mask(queries: range, keys: range, spec: AttentionSpec, device: torch.device) -> Tensor:
    """bool [queries, keys], by position: a query sees itself and earlier keys, in its window and its chunk."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None]
    seen = key <= query
    if spec.window is not None:
        seen = seen & (key > query - spec.window)
    return seen if spec.chunk is None else seen & (key >= query // spec.chunk * spec.chunk)


def attend_written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with its scores written out in float32: [..., L, D] and [..., M, D] -> [..., L, D].

    `mask` as in F.scaled_dot_product_attention: bool, True where the query sees the key; or float, added to the scores.
    `sinks`, in the shape of one key's scores: see `AttentionContext.attend`.
    """
    if spec.softcap is None:
        scores = q.float() @ k.float().mT * spec.scale
    else:
        scores = spec.softcap * torch.tanh(q.float() @ k.float().mT * (spec.scale / spec.softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(-1).type_as(v) @ v
    scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., :-1].type_as(v) @ v
