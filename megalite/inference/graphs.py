"""Decode steps as CUDA graphs: one capture for each padded number of rows, replayed on other rows' numbers.

A small model's decode step is hundreds of kernels of a few microseconds each; replaying them as one graph spares the
host the launches. A graph holds the whole step, from the numbers of its rows to the sampled tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.inference.choice import Choice
from megalite.inference.memory import decode_sizes
from megalite.inference.request import StepPlan
from megalite.inference.rows import FIELDS, Batch, Rows


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a decode step of a stage makes."""

    batch: Batch
    hidden: Tensor
    """Hidden states, or on the last stage the logits of the whole vocabulary: [R, ...]."""
    choice: Choice | None
    """Last stage: the sampled tokens, as rows without special needs get them."""


Step = Callable[[Tensor, Tensor | None], StepOutput]
"""(numbers of the rows, see `Rows.decode_inputs`, hidden states of the stage before) -> what the step makes."""


class DecodeGraphs:
    """Decode steps of one stage. `step` must wait for nothing, and its collectives must be capturable."""

    def __init__(self, step: Step, rows: Rows, *, max_rows: int, hidden: Tensor | None, capture: bool):
        """`hidden`: [max_rows, width] where the stage before sends hidden states; `capture` False: run `step` as it is,
        padded all the same, so that both give the same result."""
        self.step = step
        self.rows = rows
        self.sizes = decode_sizes(max_rows)
        self.hidden = hidden
        self.capture = capture
        self.inputs = torch.zeros(FIELDS * max_rows, dtype=torch.int32, device=rows.device)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self.stream: torch.cuda.Stream | None = None
        """Where captures are warmed up: one for all, or the memory of each would be kept for itself."""

    def size(self, num_rows: int) -> int:
        """The padded number of rows."""
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def run(self, plan: StepPlan, x: Tensor | None) -> StepOutput:
        """The step of a plan whose rows all decode; its tensors are overwritten by the next run."""
        size = self.size(len(plan.rows))
        inputs, hidden = self._static(size)
        sent = torch.from_numpy(self.rows.decode_inputs(plan, size))
        inputs.copy_(sent.pin_memory() if inputs.is_cuda else sent, non_blocking=True)
        if hidden is not None and x is not None:
            hidden[: len(x)].copy_(x)
        if not self.capture:
            return self.step(inputs, hidden)
        if size not in self.captured:
            self._capture(size)
        graph, output = self.captured[size]
        graph.replay()
        return output

    def capture_all(self, most: int) -> None:
        """Capture every size for up to `most` rows, the largest first, whose temporary memory the others then share."""
        if self.capture:
            for size in reversed(self.sizes[: bisect_left(self.sizes, most) + 1]):
                inputs, _ = self._static(size)
                inputs.copy_(torch.from_numpy(self.rows.decode_inputs(StepPlan(0, 0, ()), size)))
                self._capture(size)

    def _static(self, size: int) -> tuple[Tensor, Tensor | None]:
        """The buffers that a step of `size` rows reads."""
        inputs = self.inputs[: FIELDS * size].view(FIELDS, size)
        return inputs, None if self.hidden is None else self.hidden[:size]

    def _capture(self, size: int) -> None:
        """A warm-up and the capture; the warm-up is a run of the step that only writes again what the replay writes."""
        inputs, hidden = self._static(size)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compile kernels and warm up libraries outside the capture
            self.step(inputs, hidden)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # They share their temporary memory, for none runs before another's result is used.
        pool = next((other.pool() for other, _ in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            output = self.step(inputs, hidden)
        self.captured[size] = graph, output
