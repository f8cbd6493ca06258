"""Decode steps as CUDA graphs: one capture for each padded number of rows, replayed with new buffers' contents.

A small model's decode step is hundreds of kernels of a few microseconds each; replaying them as one graph spares the
host the launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.inference.batch import Batch, blank_decode_batch, fill_decode_batch
from megalite.model.kv_cache import DeviceCache

Forward = Callable[[Batch, Tensor], Tensor]
"""(batch, token ids or hidden states) -> hidden states, or logits on the last stage."""


class DecodeGraphs:
    """Captured decode steps of one stage. `forward` must not synchronise, and its collectives must be capturable."""

    def __init__(self, forward: Forward, cache: DeviceCache, *, max_blocks: int):
        self.forward = forward
        self.cache = cache
        self.max_blocks = max_blocks
        """Width of the block table: blocks of the longest sequence."""
        self.captured: dict[int, _Captured] = {}
        self.stream: torch.cuda.Stream | None = None
        """Where captures are warmed up: one for all, or the memory of each would be kept for itself."""

    def run(self, batch: Batch, x: Tensor) -> Tensor:
        """Same result as `forward(batch, x)` for a decode batch."""
        rows = batch.token_ids.shape[0]
        if rows not in self.captured:
            self.captured[rows] = self._capture(rows, x)
        graph = self.captured[rows]
        fill_decode_batch(graph.batch, batch)
        graph.x.copy_(x)
        graph.graph.replay()
        return graph.out.clone()  # it may still be on its way to the next stage when the graph runs again

    def _capture(self, rows: int, x: Tensor) -> _Captured:
        batch = blank_decode_batch(self.cache, rows, self.max_blocks)
        static_x = batch.token_ids if x.dtype == torch.int64 else torch.zeros_like(x)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile kernels and warm up libraries outside the capture
            for _ in range(2):
                self.forward(batch, static_x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # They share their temporary memory, for none runs before another's result is copied.
        pool = next((other.graph.pool() for other in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            out = self.forward(batch, static_x)
        return _Captured(graph, batch, static_x, out)


class _Captured:
    def __init__(self, graph: torch.cuda.CUDAGraph, batch: Batch, x: Tensor, out: Tensor):
        self.graph = graph
        self.batch = batch
        self.x = x
        self.out = out
