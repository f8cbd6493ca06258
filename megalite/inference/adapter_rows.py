"""Which adapter the sequence in each row uses, on the device, and so each token of a step."""

from __future__ import annotations

import numpy as np
import torch

from megalite.core.adapters import NO_ADAPTER, Adapters
from megalite.inference.request import StepPlan
from megalite.inference.rows import Batch, Rows


class AdapterRows:
    """The adapter of each row, on one pipeline stage.

    On an accelerator it is a table on the device in which every step looks its rows up, so steps can be captured as
    CUDA graphs. On a CPU a step none of whose rows has an adapter runs the model without any."""

    def __init__(self, adapters: Adapters, rows: Rows):
        self.adapters = adapters
        self._rows = rows
        self._of_row = torch.full((rows.padding_row + 1,), NO_ADAPTER, device=rows.device)
        self._index = {name: index for index, name in enumerate(adapters.names)}
        self._any = True
        """Some token of the step has an adapter."""

    def admit(self, plan: StepPlan) -> None:
        """Note the adapters of sequences in new rows, before the step of `plan`."""
        if plan.admitted:
            told = [(seq.row, self._index.get(seq.request.lora, NO_ADAPTER)) for seq in plan.admitted]
            place, value = self._rows.send(np.array(told, np.int64).T.ravel()).view(2, -1)
            self._of_row.index_copy_(0, place, value)
        on_host = self._rows.device.type == "cpu"
        self._any = not on_host or any(row.sequence.request.lora for row in plan.rows)

    def choose(self, batch: Batch) -> None:
        """The tokens of a batch use their rows' adapters."""
        self.adapters.choose(self._of_row[batch.token_rows] if self._any else None)
