"""Running requests over all replicas: who takes which, how a run ends everywhere, and results for every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megalite.core.agreement import broadcast_bytes, compare_ranks, reduce
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Stopped
from megalite.inference.engine import Engine, Hooks
from megalite.inference.feeds import Feed, SharedQueue, deal
from megalite.inference.io.inputs import PromptLimits, RawRequest, make_requests
from megalite.inference.io.packed_outputs import pack_outputs, unpack_outputs
from megalite.inference.outputs import RequestOutput
from megalite.inference.replica import Replica
from megalite.inference.request import Request
from megalite.monitor.progress import ProgressBar


class Ranks:
    """The ranks of a layout as the makers of requests see them; `what` names the input in messages. Collective."""

    def __init__(self, state: ParallelState, what: str):
        self.state = state
        self.what = what

    def once(self, make: Callable[[], bytes]) -> bytes:
        """The bytes that `make` gives on the control rank, on every rank of the replica."""
        return broadcast_bytes(make() if self.state.is_control else None, self.state.control_rank, self.state.replica)

    def compare(self, digest: bytes) -> None:
        compare_ranks(digest, self.what, self.state.world)


def prompt_limits(replica: Replica) -> PromptLimits:
    """What making requests needs to know of a replica."""
    return PromptLimits(
        tokenizer=replica.tokenizer,
        vocab_size=replica.model.vocab_size,
        max_model_len=replica.max_model_len,
        eos_token_ids=replica.model.eos_token_ids,
        seed=replica.settings.seed,
        adapters=replica.adapters.names if replica.adapters is not None else (),
    )


def prepare(replica: Replica, raw: list[RawRequest], limits: PromptLimits) -> list[Request | ConfigError]:
    """The request for each prompt, or why it can't run. Collective over the layout.

    ConfigError: ranks were given different ones.
    """
    ranks = Ranks(replica.state, "prompts and sampling parameters") if replica.state.world.size > 1 else None
    return make_requests(raw, limits, ranks)


def make_feed(replica: Replica, requests: list[Request] | tuple[Request, ...], key: str) -> Feed:
    """Where this replica's work comes from; every rank calls it with the same requests."""
    settings, replicas, own = replica.settings, replica.layout.dp, replica.state.coord.dp
    shares = deal(requests, replicas, block_size=settings.block_size, sharing=replica.shares_prefixes)
    if replica.dp_mode == "async" and replicas > 1:
        return SharedQueue(shares, own, replica.runtime.store, key)
    return Feed(shares[own])


def agree_on_end(replica: Replica, completed: bool) -> None:
    """Raise Stopped on every rank if a replica has left off for a signal. Collective over the layout.

    A rank may not have heard of the signal yet that another's control rank acted on.
    """
    signum = torch.tensor([0 if completed else replica.runtime.signal_received() or 0])
    if reduce(signum, dist.ReduceOp.MAX, replica.state.world):
        raise Stopped(int(signum))


def run_here(
    replica: Replica,
    engine: Engine,
    requests: list[Request],
    *,
    key: str,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: ProgressBar | None = None,
) -> list[RequestOutput]:
    """Generate; gives what this replica has finished, on its control rank, in any order.

    Collective over the layout; Stopped on every rank if it was stopped.
    """
    mine: list[RequestOutput] = []
    progress = progress or ProgressBar(len(requests), enabled=False)

    def on_output(output: RequestOutput) -> None:
        mine.append(output)
        progress.advance(prompts=1)

    hooks = Hooks(
        on_output=on_output, on_step=lambda tokens: progress.advance(tokens=tokens), stop_requested=stop_requested
    )
    completed = engine.run(make_feed(replica, requests, key), hooks)
    agree_on_end(replica, completed)
    return mine


def run_everywhere(
    replica: Replica,
    engine: Engine,
    requests: list[Request],
    *,
    key: str,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: ProgressBar | None = None,
) -> list[RequestOutput]:
    """As `run_here`, but gives every rank all outputs, in the order of `requests`."""
    mine = run_here(replica, engine, requests, key=key, stop_requested=stop_requested, progress=progress)
    outputs = exchanged(mine, replica)
    if progress is not None:
        progress.advance(prompts=len(requests) - len(mine))  # of other replicas
    found = {output.request_id: output for output in outputs}
    return [found[request.id] for request in requests]


def exchanged(mine: list[RequestOutput], replica: Replica) -> list[RequestOutput]:
    """The outputs of all control ranks, on every rank. Collective over the layout."""
    outputs = list(mine)
    if replica.state.world.size == 1:
        return outputs
    for source in replica.layout.control_ranks:
        is_mine = replica.state.rank == source
        packed = broadcast_bytes(pack_outputs(mine) if is_mine else None, source, replica.state.world)
        if not is_mine:
            outputs += unpack_outputs(packed)
    return outputs
