"""Replicas on ranks of the pool, and requests for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from one_request import make_request
from pool_runtime import PoolRuntime

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.inference.outputs import RequestOutput
from megalite.inference.replica import Replica, load_replica
from megalite.inference.request import Request
from megalite.inference.run import prompt_limits, run_everywhere


def make_replica(
    rank: int,
    folder: Path,
    layout: Layout = Layout(),  # noqa: B008 (a frozen value)
    *,
    store: str | None = None,
    dp_mode: str = "sync",
    load_format: str = "auto",
    **engine,
) -> Replica:
    """This rank's part of a replica of the model in `folder`, in float32; `engine`: keys of the engine section."""
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32", load_format=load_format),
        parallel=ParallelSection(tp=layout.tp, pp=layout.pp, dp=layout.dp, dp_mode=dp_mode),
        engine=EngineSection(**engine),
    )
    shared = dist.FileStore(store, layout.size) if store is not None else None
    return load_replica(config, PoolRuntime(rank, layout.size, shared))[0]


def make_requests(replica: Replica, asked: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Request]:
    """A request for each prompt and its parameters, named by its place."""
    limits = prompt_limits(replica)
    return [make_request(*one, limits, place) for place, one in enumerate(asked)]


def generate(replica: Replica, asked: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[RequestOutput]:
    """The outputs, in the order of the prompts, from a new engine."""
    return run_everywhere(replica, replica.engine(), make_requests(replica, asked), key="once")
