"""Tasks for lm-evaluation-harness that are made here, and what it finds on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_tasks(place: Path, tasks: Mapping[str, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Make `place` a folder of tasks over the same lines of data."""
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in tasks.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))


def evaluate(model: str, arguments: str, tasks: Iterable[str], place: Path, *, batch_size: int = 1) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        device="cpu",
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=True,
    )
