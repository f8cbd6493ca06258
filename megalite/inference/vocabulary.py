"""The vocabulary of a model cut over tp ranks, each of which has some columns of the logits: how they choose together.

Greedy rows need the largest logit only. Each rank looks at its own columns, and the ranks exchange a few numbers a row.
Everything else is done on all columns, which are gathered: edits, penalties, grammars, listed log-probabilities, scored
prompts, and draws, which would need two to four more exchanges. On a GPU the kernel that gathers passes greedy rows by,
so that a captured step has both; on a CPU a step is gathered if any of its rows draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core.collectives import gather, gather_columns, prepare_columns
from megalite.core.parallel_state import Axis
from megalite.kernels.symmetric import SymmetricColumns, SymmetricSum


@dataclass(frozen=True, slots=True)
class Largest:
    """Of each of n rows what its largest logit among some columns is, and where."""

    ids: Tensor
    """int64 [n]: of equals the lowest."""
    peaks: Tensor
    """float32 [n]: NaN if a logit is."""
    sums: Tensor
    """float32 [n]: of the exponentials of all logits over the largest."""


class Vocabulary:
    """Its columns on the ranks of a stage, `widths` of each. Collective over the axis, to make and to use."""

    def __init__(
        self, axis: Axis, widths: Sequence[int], *, max_rows: int, sums: SymmetricSum | None, dtype: torch.dtype
    ):
        """`max_rows`: sampled by a step. `sums`: what makes the axis' sums in place of NCCL. `dtype`: of logits."""
        self.axis = axis
        self.widths = list(widths)
        self.begin = sum(self.widths[: axis.rank])
        self.columns: SymmetricColumns | None = None
        """Gathers on a GPU what rows need; None: all columns of all rows are gathered by NCCL."""
        if axis.size > 1:
            self.columns = prepare_columns(axis, sums, widths=widths, max_rows=max_rows, dtype=dtype)

    def whole(self, logits: Tensor) -> Tensor:
        """This rank's columns [n, width] -> all [n, V]."""
        return gather_columns(logits, self.widths, self.axis)

    def largest(self, mine: Largest) -> Largest:
        """Of this rank's columns, with ids among them -> of all columns."""
        ids = torch.where(mine.ids >= 0, mine.ids + self.begin, 0)
        values = torch.stack([ids.double(), mine.peaks.double(), mine.sums.double()])
        ids, peaks, sums = gather(values, self.axis).unbind(1)  # [ranks, n] each
        peak = peaks.amax(0)  # NaN if one is
        first = (peaks == peak).int().argmax(0, keepdim=True)
        below = torch.where(peaks == peak, 0.0, peaks - peak)  # also where both are infinite
        return Largest(ids.gather(0, first)[0].long(), peak.float(), (sums * below.exp()).sum(0).float())
