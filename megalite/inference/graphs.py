"""Steps as CUDA graphs: one capture for each padded size, replayed on other rows' numbers.

A small model's step is hundreds of kernels of a few microseconds each; replaying them as one graph spares the host the
launches. A graph holds the whole step, from the numbers of its rows to the sampled tokens. There are two kinds: rows
that all decode, and one prompt that is computed to its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.inference.choice import Choice
from megalite.inference.memory import PROMPT_SIZES, decode_sizes
from megalite.inference.request import StepPlan
from megalite.inference.rows import FIELDS, Batch, Rows


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step of a stage makes."""

    batch: Batch
    hidden: Tensor
    """Hidden states [T, hidden]; on the last stage the logits of the sampled rows, [R, vocab]."""
    choice: Choice | None
    """Last stage, captured steps: the sampled tokens, as rows without special needs get them."""


Step = Callable[[Batch, Tensor | None], StepOutput]
"""(batch, hidden states of the stage before) -> what the step makes."""


class StepGraphs:
    """Captured steps of one stage. `step` must wait for nothing, and its collectives must be capturable."""

    def __init__(self, step: Step, rows: Rows, *, max_rows: int, hidden: int, dtype: torch.dtype, capture: bool):
        """`hidden`: width of what the stage before sends; 0: there is none. `capture` False: `step` runs as it is, but
        padded alike, so that both give the same result."""
        self.step = step
        self.rows = rows
        self.decode_sizes = decode_sizes(max_rows)
        self.capture = capture
        tokens = max(max_rows, *PROMPT_SIZES)
        self.hidden = torch.zeros(tokens, hidden, dtype=dtype, device=rows.device) if hidden else None
        self.inputs = torch.zeros(FIELDS * max_rows, dtype=torch.int32, device=rows.device)
        self.captured: dict[tuple[bool, int], tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        """By whether rows decode, and the padded size."""
        self.stream: torch.cuda.Stream | None = None
        """Where captures are warmed up: one for all, or the memory of each would be kept for itself."""

    def run(self, plan: StepPlan, x: Tensor | None) -> StepOutput | None:
        """The step of a plan of one of the two kinds; its tensors are overwritten by the next run. None: of neither."""
        size = self._size(plan)
        if size is None:
            return None
        inputs = self._inputs(plan.decodes, size)
        sent = torch.from_numpy(self.rows.step_inputs(plan, inputs.shape[1]))
        inputs.copy_(sent.pin_memory() if inputs.is_cuda else sent, non_blocking=True)
        if self.hidden is not None and x is not None:
            self.hidden[: len(x)].copy_(x)
        if not self.capture:
            return self._run(plan.decodes, size)
        if (plan.decodes, size) not in self.captured:
            self._capture(plan.decodes, size)
        graph, output = self.captured[plan.decodes, size]
        graph.replay()
        return output

    def capture_all(self, most: int) -> None:
        """Capture prompts and decode steps of up to `most` rows, the largest first, whose memory the others share."""
        if not self.capture:
            return
        sizes = self.decode_sizes[: bisect_left(self.decode_sizes, most) + 1]
        for decodes, size in [*((False, size) for size in PROMPT_SIZES[::-1]), *((True, n) for n in sizes[::-1])]:
            inputs = self._inputs(decodes, size)
            inputs.copy_(torch.from_numpy(self.rows.step_inputs(StepPlan(0, 0, ()), inputs.shape[1])))
            self._capture(decodes, size)

    def _size(self, plan: StepPlan) -> int | None:
        """The size that a plan is padded to; None: it is of neither kind."""
        if plan.decodes:
            return self.decode_sizes[bisect_left(self.decode_sizes, len(plan.rows))]
        if len(plan.rows) > 1 or not plan.sampled or plan.rows[0].prompt_logits[1]:
            return None
        place = bisect_left(PROMPT_SIZES, plan.num_tokens)
        return PROMPT_SIZES[place] if place < len(PROMPT_SIZES) else None

    def _inputs(self, decodes: bool, size: int) -> Tensor:
        """The buffer of a step's numbers."""
        count = size if decodes else 1
        return self.inputs[: FIELDS * count].view(FIELDS, count)

    def _run(self, decodes: bool, size: int) -> StepOutput:
        inputs = self._inputs(decodes, size)
        batch = self.rows.decode_batch(inputs) if decodes else self.rows.prompt_batch(inputs, size)
        return self.step(batch, None if self.hidden is None else self.hidden[:size])

    def _capture(self, decodes: bool, size: int) -> None:
        """A warm-up and the capture; the warm-up is a run of the step that only writes what the replay writes again."""
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compile kernels and warm up libraries outside the capture
            self._run(decodes, size)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # They share their temporary memory, for none runs before another's result is used.
        pool = next((other.pool() for other, _ in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            output = self._run(decodes, size)
        self.captured[decodes, size] = graph, output
