"""Where bands of weights are read to on their way into parameters: their own memory, or rings of page-locked memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalite.weights.rounding import Elements

IN_PLACE_BYTES = 16 << 20
"""Bytes of one read request that goes right into a parameter."""
BAND_BYTES = 4 << 20
"""Bytes of one read request and one copy to a device."""
RING = 3
"""Bands in the memory of each thread: one is read while the others are copied."""


def page_locked(*shape: int) -> NDArray[np.uint8]:
    """Uninitialised page-locked host memory, from which a device copies asynchronously."""
    memory: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


class InPlace:
    """The memory of a contiguous view [rows, columns] of a parameter on the CPU."""

    band_bytes = IN_PLACE_BYTES

    def __init__(self, view: Tensor):
        self.bytes: NDArray[np.uint8] = view.view(torch.uint8).numpy()

    def band(self, lo: int, hi: int, width: int) -> NDArray[np.uint8]:
        return self.bytes[lo:hi]


class Ring(threading.local):
    """Page-locked memory for one device, RING bands a thread; a band is used again once its last copy is done."""

    band_bytes = BAND_BYTES

    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream
        self.bands: list[NDArray[np.uint8]] = []
        self.done: list[torch.cuda.Event] = []
        self.at = 0

    def copying(self) -> AbstractContextManager[None]:
        """Context in which copies go to the stream of the ring."""
        context: AbstractContextManager[None] = torch.cuda.stream(self.stream)
        return context

    def band(self, lo: int, hi: int, width: int) -> NDArray[np.uint8]:
        if (hi - lo) * width > BAND_BYTES:  # a row that is longer
            return np.empty((hi - lo, width), np.uint8)
        if not self.bands:
            self.bands = list(page_locked(RING, BAND_BYTES))
            self.done = [torch.cuda.Event() for _ in self.bands]
        self.at = (self.at + 1) % RING
        self.done[self.at].synchronize()
        return self.bands[self.at][: (hi - lo) * width].reshape(hi - lo, width)

    def holds(self, band: Elements) -> bool:
        """Whether a band is the last that was given out; that one stays untouched until it is copied."""
        return bool(self.bands) and np.may_share_memory(band, self.bands[self.at])

    def copied(self) -> None:
        """Note that the copy of the last band has been started."""
        self.done[self.at].record(self.stream)


@contextmanager
def uploading(devices: Set[torch.device]) -> Iterator[dict[torch.device, Ring]]:
    """A ring for each CUDA device; at the end all copies are done."""
    streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.current_stream(device))
    try:
        yield {device: Ring(stream) for device, stream in streams.items()}
    finally:
        for stream in streams.values():
            stream.synchronize()
