"""What benchmarks share: figures for a program, Markdown tables, times, ranks that generate in a layout, gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megalite.run.launcher import run_ranks
from megalite.run.processes import die_with_parent

if TYPE_CHECKING:
    from megalite import LLM

T = TypeVar("T")
STOPPED_TIMEOUT = 60.0
"""Seconds without a sign of life after which a rank is taken for stopped: what is compiled first may take some."""


def write_figures(figures: object, file: str | Path | None) -> None:
    """Write figures as JSON where --json says; None: nowhere."""
    if file:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def head(*columns: str) -> str:
    """The first two lines of a Markdown table."""
    return f"{row(*columns)}\n|{'---|' * len(columns)}"


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True)
class Timed(Generic[T]):
    """How long something took, and what it gave."""

    seconds: float
    cpu_seconds: float
    """Of this process."""
    result: T


def timed(work: Callable[[], T]) -> Timed[T]:
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Timed(time.perf_counter() - clock, time.process_time() - cpu, result)


@dataclass(frozen=True, kw_only=True)
class LayoutTask:
    """What ranks that generate are told: the JSON of a task is the argument of the module that each of them runs."""

    folder: str
    """Of the model."""
    tp: int
    pp: int
    dp: int
    device: str
    load_format: str = "dummy"

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def start(self, module: str) -> int:
        """Run a module in all ranks; gives their exit code. One rank is a plain process."""
        words = ["-m", module, self.to_json()]
        if self.ranks > 1:
            return run_ranks(words, self.ranks, stopped_timeout=STOPPED_TIMEOUT)
        return subprocess.run([sys.executable, *words], preexec_fn=die_with_parent).returncode

    def llm(self, **engine: Any) -> LLM:
        """The model on these ranks, in one of which this is called."""
        from megalite import LLM

        return LLM(
            self.folder,
            device=self.device,
            dtype=self.dtype,
            load_format="dummy" if self.load_format == "dummy" else "auto",
            generation_config="vllm",
            tensor_parallel_size=self.tp,
            pipeline_parallel_size=self.pp,
            data_parallel_size=self.dp,
            **engine,
        )


def spawn(rank_main: Callable[..., None], ranks: int, *arguments: Any, fork: bool = False) -> None:
    """Run `rank_main(rank, *arguments)` in so many processes of one thread each; see `join`.

    `fork`: as forks, which import nothing anew, of a process that has computed nothing; not for CUDA.
    """
    import torch.multiprocessing

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.start_processes(rank_main, arguments, ranks, start_method="fork" if fork else "spawn")


def join(folder: str | Path, rank: int, ranks: int, backend: str = "gloo") -> None:
    """Make a process group of the ranks of `spawn`, who meet in a file of a folder."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, patience = f"file://{folder}/store", timedelta(minutes=10)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=patience)
