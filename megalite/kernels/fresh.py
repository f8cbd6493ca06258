"""Attention of whole prompts over their own keys on CUDA: rows that start at position 0, before or beside the cache.

The keys need not be looked up in blocks then, and where all rows have one length cuDNN's attention can take them, which
is the fastest there is on Hopper. It makes a plan for each shape, so only lengths that come back are given to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.attention import Tile, attend_own_tokens

PLANNED_LENGTHS = 256
"""Lengths that cuDNN is given are multiples of this: few shapes, each planned once."""
PLANNED_TOKENS = 2048
"""Tokens of a step from which the host time of cuDNN's attention is hidden behind the device's."""


class _OnlyCudnn:
    """Other attention kernels of torch are switched off inside: `torch.nn.attention.sdpa_kernel`, which takes the host
    ten times as long."""

    def __enter__(self) -> None:
        self.before = [enabled() for enabled, _ in _OTHERS]
        for _, enable in _OTHERS:
            enable(False)

    def __exit__(self, *failure: object) -> None:
        for (_, enable), before in zip(_OTHERS, self.before, strict=True):
            enable(before)


_backends: Any = torch.backends.cuda  # whose types say nothing of their arguments
_OTHERS: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (_backends.flash_sdp_enabled, _backends.enable_flash_sdp),
    (_backends.mem_efficient_sdp_enabled, _backends.enable_mem_efficient_sdp),
    (_backends.math_sdp_enabled, _backends.enable_math_sdp),
]


def which(
    tokens: int,
    rows: int,
    longest: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    capability: tuple[int, int],
) -> str:
    """ "cudnn" or "triton": what computes a step of `tokens` tokens in `rows` fresh rows of up to `longest` tokens."""
    planned = tokens == rows * longest and tokens >= PLANNED_TOKENS and longest % PLANNED_LENGTHS == 0
    plain = softcap is None and (window is None or window >= longest)
    taken = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if planned and plain and taken and capability in ((9, 0), (10, 0)) else "triton"


def fresh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_start: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_query_len: int,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Causal attention of whole sequences laid end to end: q [T, H, D], k and v [T, K, D] -> [T, H, D].

    Row b has the tokens query_start[b]..query_start[b + 1] (int32 [B + 1], from 0 to T), at positions from 0 on; the
    last dim is contiguous. `max_query_len`: the most tokens of a row; where it times B is T, all rows must have that
    length (or, for B = 1, tokens behind the row's end are computed for nothing).

    What Triton computes has the same bits as `paged_attention` over the same keys in a cache, and as a prompt in
    chunks. What cuDNN computes (see `which`) is as close to the formula but differs in the last bits, so a prompt's
    bits depend on whether it is alone among others of its length.
    """
    tokens, heads, dim = q.shape
    rows = query_start.shape[0] - 1
    plain = sinks is None and k.shape[-1] == v.shape[-1] and (chunk is None or chunk >= max_query_len)
    if q.is_cuda and tokens and heads and tile is None and plain:
        capability = torch.cuda.get_device_capability(q.device)
        if which(tokens, rows, max_query_len, dim, q.dtype, window, softcap, capability) == "cudnn":
            batched_q, batched_k, batched_v = (
                x.view(rows, max_query_len, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
            )
            grouped = heads > k.shape[1]
            given = _backends.SDPAParams(batched_q, batched_k, batched_v, None, 0.0, True, grouped)
            if _backends.can_use_cudnn_attention(given):
                with _OnlyCudnn():
                    out = F.scaled_dot_product_attention(
                        batched_q, batched_k, batched_v, is_causal=True, scale=scale, enable_gqa=grouped
                    )
                return out.transpose(1, 2).reshape(tokens, heads, dim)
    return attend_own_tokens(
        q,
        k,
        v,
        query_start,
        scale=scale,
        window=window,
        softcap=softcap,
        chunk=chunk,
        sinks=sinks,
        pdl=pdl,
        tile=tile,
    )
