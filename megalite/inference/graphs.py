"""Steps as CUDA graphs: one capture for each padded size, replayed with the numbers of other rows.

A small model's step is hundreds of kernels of a few microseconds each; replaying them as one graph spares the host the
launches. A graph holds the whole step, from the numbers of its rows to the sampled tokens. There are three kinds: rows
that all decode, one short prompt alone, and rows with any numbers of tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.inference.choice import Choice
from megalite.inference.request import StepPlan
from megalite.inference.rows import FIELDS, Batch, Rows
from megalite.kernels.fresh import PLANNED_LENGTHS, PLANNED_TOKENS
from megalite.monitor.collector import Meter, Tally
from megalite.planner.memory import PROMPT_SIZES, chunk_sizes, decode_sizes


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step on one stage."""

    batch: Batch
    hidden: Tensor
    """Hidden states [T, hidden]; on the last stage this rank's columns [R, vocab/tp] of the sampled rows' logits."""
    choice: Choice | None
    """Last stage, captured steps: the sampled tokens, as rows without special needs get them."""


class Shape(NamedTuple):
    """What steps are padded to."""

    rows: int
    tokens: int
    decodes: bool
    """Every row has one token and samples the next."""


Step = Callable[[Batch, Tensor | None], StepOutput]
"""(batch, hidden states of the stage before) -> what the step makes."""


def _is_even(plan: StepPlan) -> bool:
    """Long prompts of one length from their beginning: attention over fresh keys is faster then, see kernels/fresh."""
    length = plan.rows[0].count
    even = all(row.start == 0 and row.count == length for row in plan.rows)
    return even and plan.num_tokens >= PLANNED_TOKENS and length % PLANNED_LENGTHS == 0


class StepGraphs:
    """Captured steps of one stage. `step` must not wait for the device, and its collectives must be capturable."""

    def __init__(
        self,
        step: Step,
        rows: Rows,
        *,
        max_rows: int,
        max_tokens: int,
        weights: int,
        hidden: int,
        dtype: torch.dtype,
        capture: bool,
        meter: Meter,
    ):
        """`max_rows`, `max_tokens`: of a step. `weights`: of the stage. `hidden`: width of what the stage before sends;
        0: there is none. `capture` False: `step` runs as it is, but padded alike, so that both give the same result.
        `meter`: is told what a replay moves between ranks."""
        self.step = step
        self.rows = rows
        self.max_rows = max_rows
        self.decode_sizes = decode_sizes(max_rows)
        self.chunk_sizes = chunk_sizes(max_tokens, weights)
        self.capture = capture
        self.decodes_only = bool(rows.cache.states)
        """Layers keep states of sequences: how a step of several tokens a row goes through them, the host says."""
        self.meter = meter
        tokens = max(max_rows, *PROMPT_SIZES, *self.chunk_sizes)
        self.hidden = torch.zeros(tokens, hidden, dtype=dtype, device=rows.device) if hidden else None
        self.inputs = torch.zeros(FIELDS * max_rows, dtype=torch.int32, device=rows.device)
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, StepOutput, Tally]] = {}
        self.stream: torch.cuda.Stream | None = None
        """Where captures are warmed up: one for all, or the memory of each would be kept for itself."""

    def run(self, plan: StepPlan, x: Tensor | None) -> StepOutput | None:
        """Run a plan's step, if it is of one of the kinds, else None; the tensors are overwritten by the next run."""
        shape = self._shape(plan)
        if shape is None:
            return None
        if self.capture and shape not in self.captured:
            self._capture(shape)
        inputs = self._inputs(shape)
        sent = torch.from_numpy(self.rows.step_inputs(plan, shape.rows))
        inputs.copy_(sent.pin_memory() if inputs.is_cuda else sent, non_blocking=True)
        if self.hidden is not None and x is not None:
            self.hidden[: len(x)].copy_(x)
        if not self.capture:
            return self._run(shape)
        graph, output, tally = self.captured[shape]
        graph.replay()
        self.meter.replayed(tally)
        return output

    def capture_all(self, most: int) -> None:
        """Capture the steps of up to `most` rows now, the largest first, whose temporary memory the others share."""
        if not self.capture:
            return
        shapes = []
        if not self.decodes_only:
            shapes = [Shape(self.max_rows, size, False) for size in self.chunk_sizes]
            shapes += [Shape(1, size, False) for size in PROMPT_SIZES]
        shapes += [Shape(size, size, True) for size in self.decode_sizes[: bisect_left(self.decode_sizes, most) + 1]]
        for shape in sorted(shapes, key=lambda shape: -shape.tokens):
            self._capture(shape)

    def _shape(self, plan: StepPlan) -> Shape | None:
        """What a plan is padded to; None: it is of no kind."""
        if plan.decodes:
            size = self.decode_sizes[bisect_left(self.decode_sizes, len(plan.rows))]
            return Shape(size, size, True)
        if self.decodes_only or any(row.prompt_logits[1] for row in plan.rows) or _is_even(plan):
            return None
        sizes, rows = (PROMPT_SIZES, 1) if len(plan.rows) == 1 else (self.chunk_sizes, self.max_rows)
        place = bisect_left(sizes, plan.num_tokens)
        return Shape(rows, sizes[place], False) if place < len(sizes) else None

    def _inputs(self, shape: Shape) -> Tensor:
        """The buffer of a step's numbers."""
        return self.inputs[: FIELDS * shape.rows].view(FIELDS, shape.rows)

    def _run(self, shape: Shape) -> StepOutput:
        inputs = self._inputs(shape)
        batch = self.rows.decode_batch(inputs) if shape.decodes else self.rows.chunk_batch(inputs, shape.tokens)
        return self.step(batch, None if self.hidden is None else self.hidden[: shape.tokens])

    def _capture(self, shape: Shape) -> None:
        """A warm-up and the capture, of a step of padding: a state of a sequence must not be advanced twice."""
        self._inputs(shape).copy_(torch.from_numpy(self.rows.step_inputs(StepPlan(0, 0, ()), shape.rows)))
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        # compile kernels and warm up libraries outside the capture
        with torch.cuda.stream(self.stream), self.meter.capturing():
            self._run(shape)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # They share their temporary memory, for none runs before another's result is used.
        pool = next((other.pool() for other, *_ in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool), self.meter.capturing() as tally:
            output = self._run(shape)
        self.captured[shape] = graph, output, tally
