"""A batch of requests through transformers with `device_map="auto"`, and through a layout of ours.

For `megalite plan --compare-device-map`; both give output tokens a second, of a second time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megalite.core.layout import Layout
from megalite.errors import MegaliteError
from megalite.kernels.device import release_memory
from megalite.planner.generation import Workload
from megalite.tools.benchmarks import plan


def theirs(folder: Path, load: Workload, *, cuda: bool) -> float:
    """Random prompts of one length; a batch of transformers' ends with its longest output."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    untyped: Any = logging
    untyped.disable_progress_bar()
    load_model: Any = AutoModelForCausalLM.from_pretrained  # untyped
    model = load_model(folder, device_map="auto", dtype="auto" if cuda else torch.float32)
    rows, length = load.concurrency, int(load.input.mean)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)
    _generate(model, ids, min(4, load.output.high))
    seconds = _generate(model, ids, load.output.high)
    device = model.device
    del model
    release_memory(device)  # the ranks that come next need it
    return rows * load.output.mean / seconds


def _generate(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds for a batch of greedy outputs."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return time.perf_counter() - began


def ours(folder: Path, load: Workload, layout: Layout, *, cuda: bool) -> float:
    """The ranks of the layout are started for it. MegaliteError: they failed."""
    with tempfile.TemporaryDirectory(prefix="megalite-plan-") as place:
        task = plan.Task(
            folder=str(folder),
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            device="cuda" if cuda else "cpu",
            requests=load.concurrency,
            input=(load.input.low, load.input.high),
            output=(load.output.low, load.output.high),
            batched_tokens=8192,
            out=f"{place}/found",
        )
        ranks = plan.start(task)
        if ranks is None:
            raise MegaliteError(f"--compare-device-map: the ranks of {layout} failed; see above")
        return plan.speed(task, ranks)
