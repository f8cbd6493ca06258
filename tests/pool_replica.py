"""Replicas on ranks of the pool, and requests for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from one_request import make_request
from pool_runtime import PoolRuntime

from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.core.layout import Layout
from megalite.inference.engine import Engine
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
    lora: dict[str, str] | None = None,
    **engine,
) -> Replica:
    """This rank's part of a replica of the model in `folder`, in float32; `engine`: keys of the engine section."""
    config = InferConfig(
        model=ModelSection(path=str(folder), dtype="float32", load_format=load_format),
        parallel=ParallelSection(tp=layout.tp, pp=layout.pp, dp=layout.dp, dp_mode=dp_mode),
        engine=EngineSection(**engine),
        lora=lora or {},
    )
    shared = dist.FileStore(store, layout.size) if store is not None else None
    return load_replica(config, PoolRuntime(rank, layout.size, shared))[0]


Asked = Iterable[tuple[Sequence[int], SamplingParams]]


def make_requests(replica: Replica, asked: Asked, lora: Sequence[str] = ()) -> list[Request]:
    """A request for each prompt and its parameters, named by its place; `lora`: the adapter of each."""
    limits = prompt_limits(replica)
    return [make_request(*one, limits, place, lora=lora[place] if lora else "") for place, one in enumerate(asked)]


def generate(
    replica: Replica, asked: Asked, lora: Sequence[str] = (), *, engine: Engine | None = None, key: str = "once"
) -> list[RequestOutput]:
    """The outputs, in the order of the prompts; None: from a new engine."""
    requests = make_requests(replica, asked, lora)
    return run_everywhere(replica, engine or replica.engine(), requests, key=key)
