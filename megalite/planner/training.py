"""How fast a layout trains, and what it holds: predictions of one optimizer step. Imports no torch.

A micro batch's backward pass is twice its forward pass, and once more where activations are recomputed. A pipeline of
p stages in v chunks waits (p - 1) / v micro batches a step (arXiv 2104.04473, section 2.2). Then gradients are summed
over dp, each rank updates its part of the optimizer's state and gathers the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalite.config.parallel_rules import zero_refusal
from megalite.core.layout import Layout
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.planner.cost import Batch, Cluster, StageCosts, Times
from megalite.planner.generation import Prediction
from megalite.planner.memory import Footprint, TrainingMemory
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.table import local_elements

OPTIMIZER_BYTES = 30
"""AdamW reads weight, two moments and gradient in float32 and writes three and the model's own weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """One optimizer step."""

    sequence: int = 4096
    """Tokens."""
    batch: int | None = 256
    """Sequences of a step, over all replicas; None: `accumulation` micro batches a replica."""
    micro: int = 1
    """Sequences of a micro batch."""
    accumulation: int = 1
    zero_stage: int = 1
    gradient_bytes: int = 4
    recompute: bool | None = None
    """None: where it does not fit otherwise."""
    adapter: AdapterTable | None = None
    """Adapters that train, beside weights that are frozen."""

    def micro_batches(self, dp: int) -> int:
        return self.accumulation if self.batch is None else max(1, -(-self.batch // (self.micro * dp)))

    def __str__(self) -> str:
        batch = f"accumulation={self.accumulation}" if self.batch is None else f"batch={self.batch}"
        return f"training on sequence={self.sequence},{batch},micro={self.micro},zero={self.zero_stage}"


def parse(text: str) -> TrainingWork:
    """`sequence=4096,batch=256,micro=1,zero=1`; ConfigError for anything else."""
    names = {"sequence": "sequence", "batch": "batch", "micro": "micro", "zero": "zero_stage"}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        good = name in names and value.isascii() and value.isdecimal() and 1 <= int(value) <= 1 << 24
        if not good or (name == "zero" and int(value) > 3):
            rule = (
                "must be numbers of tokens, sequences and a ZeRO stage, such as sequence=4096,batch=256,micro=1,zero=1"
            )
            raise ConfigError(Problem(key="--workload", rule=rule, value=part))
        found[names[name]] = int(value)
    return TrainingWork(**found)


@dataclass(frozen=True, kw_only=True)
class TrainingPrediction(Prediction):
    """One layout; `throughput` is trained tokens a second, `per_token` means nothing."""

    recompute: bool = False
    """Activations are recomputed, since they do not fit otherwise, or as asked."""
    kept: int = 0
    """Bytes of activations on the fullest rank if they are kept,"""
    recomputed: int = 0
    """and if they are recomputed."""
    bubble: float = 0.0
    """Share of a step that the pipeline takes to fill and empty."""


def predict(
    config: ModelConfig, layout: Layout, cluster: Cluster, work: TrainingWork, *, itemsize: int
) -> TrainingPrediction:
    """Memory and speed of a layout."""
    costs = StageCosts(config, layout, cluster, itemsize)
    count, tokens = work.micro_batches(layout.dp), work.sequence * work.micro
    ranks = [
        TrainingMemory(config, layout, layout.rank(pp=pp), itemsize, work.zero_stage, work.gradient_bytes, work.adapter)
        for pp in range(layout.pp)
    ]
    both = {
        recompute: tuple(rank.footprint(tokens, count, recompute=recompute) for rank in ranks)
        for recompute in (False, True)
    }
    device = cluster.device
    room = device.memory // (min(cluster.per_host, layout.size) if device.shared else 1)

    def short(memory: tuple[Footprint, ...]) -> int:
        return max(0, max(stage.total for stage in memory) - room)

    recompute = bool(short(both[False])) if work.recompute is None else work.recompute
    seconds, spent, idle, bubble, sent = _step(costs, work, count, recompute=recompute)
    trained = work.sequence * work.micro * count * layout.dp
    each = Times()
    each.add(spent, 1 / trained)
    return TrainingPrediction(
        layout=layout,
        memory=both[recompute],
        short=short(both[recompute]),
        concurrency=count,
        throughput=trained / seconds,
        seconds=seconds,
        sent=sent / (trained / layout.dp),
        idle=idle,
        spent=each,
        recompute=recompute,
        kept=max(stage.activations for stage in both[False]),
        recomputed=max(stage.activations for stage in both[True]),
        bubble=bubble,
    )


def _step(
    costs: StageCosts, work: TrainingWork, count: int, *, recompute: bool
) -> tuple[float, Times, tuple[float, ...], float, float]:
    """Seconds of an optimizer step, what they go into, each stage's waiting, the bubble, bytes that a rank sends."""
    layout, cluster, device = costs.layout, costs.cluster, costs.cluster.device
    tokens = work.sequence * work.micro
    batch = Batch(fresh=tokens, fresh_keys=tokens * work.sequence / 2, sampled=tokens)
    stages = []
    for stage in range(layout.pp):
        forward, once = costs.forward(stage, batch), Times()
        # Frozen weights have no gradients: the backward pass is that of the inputs alone.
        once.add(forward, (3.0 if work.adapter is None else 2.0) + recompute)
        once.sampling = 3 * forward.sampling
        once.host = max(0.0, device.launch * 3 * forward.kernels / device.kernel - once.total)
        stages.append(once)
    slowest = max(stages, key=lambda one: one.total)
    numbers = tokens * costs.config.hidden_size * costs.itemsize
    hops = sum(cluster.hop(numbers, across=across) for across in costs.crossings)
    fill = sum(one.total for one in stages) - slowest.total + 2 * hops
    seconds = count * slowest.total + fill / layout.interleave
    spent = Times()
    spent.add(slowest, count)
    spent.waiting += seconds - count * slowest.total
    idle = tuple(1 - count * one.total / seconds for one in stages)
    bubble = 1 - count * slowest.total / seconds
    most = max(stage.elements for stage in costs.stages)
    if work.adapter is not None:
        most = max(local_elements(work.adapter, layout, layout.rank(pp=stage)) for stage in range(layout.pp))
    exchange, exchanged = _exchange(costs, work, most, count)
    spent.sums += exchange
    update = OPTIMIZER_BYTES * most / layout.dp / (device.read / costs.crowd(1.0))
    spent.weights += update
    sent = exchanged + count * max(2 * costs.sent(stage, batch) for stage in range(layout.pp))
    return seconds + exchange + update, spent, idle, bubble, sent


def _exchange(costs: StageCosts, work: TrainingWork, elements: int, count: int) -> tuple[float, float]:
    """Seconds and bytes of a rank to sum gradients over dp and gather weights, at stage 3 twice a micro batch."""
    layout, cluster = costs.layout, costs.cluster
    if layout.dp == 1:
        return 0.0, 0.0
    ranks = [layout.rank(dp=replica) for replica in range(layout.dp)]
    gathers = 2 * count if work.zero_stage == 3 else 1
    nbytes = elements * (work.gradient_bytes + gathers * costs.itemsize) / 2  # an all-reduce is both halves
    seconds = cluster.all_reduce(nbytes, layout.dp, cluster.spread(ranks))
    return seconds, 2 * (layout.dp - 1) / layout.dp * nbytes


def trainable(layout: Layout, config: ModelConfig, work: TrainingWork) -> bool:
    """Whether a layout can train at the ZeRO stage of `work`."""
    adapts = work.adapter is not None
    tied = config.tie_embeddings and not adapts
    return zero_refusal(work.zero_stage, pp=layout.pp, tied=tied, adapts=adapts) is None
