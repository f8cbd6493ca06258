"""How long a step takes on each stage of a layout: a roofline of every layer, and more. Imports no torch.

A layer's matmuls take sqrt(r^2 + c^2): r seconds to read their weights, c to compute. The smaller of both never hides
entirely behind the larger; this sum of squares is within 7% of what matmuls took in steps of 32 to 256 rows of a 0.6B
and an 8B model (docs/planner.md). Attention reads every cached key and value once; norms, rotation, gate and residual
read and write what they work on; every kernel costs a little beside. Sums over tp cost a latency and bytes over the
link's rate, as do messages between stages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from megalite.core.layout import Layout, width
from megalite.model.config import ModelConfig
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.planner.devices import Device
from megalite.planner.memory import CAPTURED_WORK, kv_itemsize
from megalite.weights.table import owned

KERNELS = 9
"""Kernels of a layer for many rows;"""
KERNELS_OF_ONE = 6
"""for one row."""
END_KERNELS = 16
"""Of embedding, head and sampling."""
SCORE_SHARE = 0.64
"""Of the matmul rate, that attention to fresh keys reaches: 12.4 of 19.4 ms for 8 prompts of 2,048 on an H100."""
FLOAT32_SHARE = 1 / 15
"""Of a GPU's rate in bfloat16, what it does in float32."""
SUMS = 2
"""Sums over tp in a layer."""


@dataclass(frozen=True, slots=True)
class LayerShard:
    """What the widest tp rank has of one layer, in numbers."""

    matrices: int
    """Every token is multiplied by them."""
    experts: int
    """In experts, of which a token takes `share`."""
    share: float
    num_experts: int
    top_k: int
    queries: int
    keys: int
    inner: int
    """Width of what gate and activation work on, gate included."""
    window: int | None


@dataclass(frozen=True, slots=True)
class ModelShard:
    """What the widest tp rank has of a model."""

    layers: tuple[LayerShard, ...]
    elements: tuple[int, ...]
    """Of each layer, all of them."""
    first: int
    last: int
    """Of both ends, the head included where it is tied as well."""
    head: int


@lru_cache(maxsize=64)
def shard(config: ModelConfig, tp: int) -> ModelShard:
    """The widest rank is the first: shares differ by at most one unit, larger ones first."""
    matrices: Counter[object] = Counter()
    experts: Counter[object] = Counter()
    elements: Counter[object] = Counter()
    head = 0
    for one in owned(config, Layout(tp, 1, 1), 0):
        stage = one.piece.stage
        count = one.elements * one.piece.numbers
        elements[stage] += count
        if one.piece.expert is not None:
            experts[stage] += count
        elif one.piece.other and stage not in ("first", "last"):
            matrices[stage] += count
    head = width(config.head_vocab, tp, 0) * config.hidden_size
    if config.tie_embeddings:
        elements["last"] += head

    def layer(index: int) -> LayerShard:
        made = config.layers[index]
        attention, moe = next(made.of(SoftmaxAttention), None), next(made.of(Experts), None)
        inner = sum((2 if mlp.gated else 1) * width(mlp.inner, tp, 0) for mlp in made.of(DenseMLP))
        if moe is not None:
            inner += 2 * math.ceil(moe.top_k * moe.intermediate_size / min(tp, moe.num_experts))
        return LayerShard(
            matrices=matrices[index],
            experts=experts[index],
            share=1.0 if moe is None else moe.top_k / moe.num_experts,
            num_experts=0 if moe is None else moe.num_experts,
            top_k=0 if moe is None else moe.top_k,
            queries=width(attention.queries, tp, 0) if attention else 0,
            keys=width(attention.keys, tp, 0) if attention else 0,
            inner=inner,
            window=attention.window if attention else None,
        )

    layers = range(config.num_layers)
    return ModelShard(
        layers=tuple(map(layer, layers)),
        elements=tuple(elements[index] for index in layers),
        first=elements["first"],
        last=elements["last"],
        head=head,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of one cohort."""

    rows: float = 0
    """Sequences that gain a token,"""
    keys: float = 0
    """and the cached tokens that they read, all together."""
    fresh: float = 0
    """Prompt tokens,"""
    fresh_keys: float = 0
    """and the tokens that these look at, all together."""
    sampled: float = 0
    """Rows of which a token is drawn."""

    @property
    def tokens(self) -> float:
        return self.rows + self.fresh


@dataclass(slots=True)
class Times:
    """Seconds, by what they go into."""

    weights: float = 0.0
    """Reading weights,"""
    products: float = 0.0
    """and what matmuls take beyond it."""
    attention: float = 0.0
    elements: float = 0.0
    """Norms, rotation, gate, residual."""
    kernels: float = 0.0
    """What each kernel costs beside its work, or on a CPU each operation."""
    sampling: float = 0.0
    """The head and drawing tokens."""
    sums: float = 0.0
    """Sums over tp, and the gather of logits."""
    host: float = 0.0
    """The host's part that the device waits for."""
    waiting: float = 0.0
    """For other stages."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, one.name) for one in fields(self)))

    def add(self, other: Times, times: float = 1.0) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + times * getattr(other, one.name))


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices of one kind on some hosts, as many on each."""

    device: Device
    devices: int
    hosts: int = 1

    @property
    def per_host(self) -> int:
        return -(-self.devices // self.hosts)

    def spread(self, ranks: Sequence[int]) -> int:
        """Hosts that these ranks are on."""
        return len({rank // self.per_host for rank in ranks})

    def all_reduce(self, nbytes: float, ranks: int, hosts: int = 1) -> float:
        """Seconds of a sum over `ranks`, spread evenly over `hosts`: first within each, then across."""
        device, within = self.device, -(-ranks // hosts)
        seconds = 0.0
        if within > 1:
            latency = device.link_latency * (1 + (within - 2) / 4)
            seconds += latency + 2 * (within - 1) / within * nbytes / device.link
        if hosts > 1:
            seconds += device.network_latency * math.log2(2 * hosts)
            seconds += 2 * (hosts - 1) / hosts * nbytes / within / device.network
        return seconds

    def hop(self, nbytes: float, *, across: bool) -> float:
        """Seconds of a message to the next stage."""
        device = self.device
        rate, latency = (device.network, device.network_latency) if across else (device.link, 0.0)
        return device.hop_latency + latency + nbytes / rate


@dataclass(frozen=True)
class StageCosts:
    """The stages of one layout on a cluster."""

    config: ModelConfig
    layout: Layout
    cluster: Cluster
    itemsize: int
    kv_cache_dtype: str = "auto"

    @cached_property
    def shard(self) -> ModelShard:
        return shard(self.config, self.layout.tp)

    @cached_property
    def tp_hosts(self) -> int:
        """Hosts that the widest spread tp group is on."""
        tp = self.layout.tp
        firsts = range(0, self.layout.size, tp)
        return max(self.cluster.spread(range(first, first + tp)) for first in firsts)

    @cached_property
    def stages(self) -> tuple[tuple[Counter[LayerShard], int], ...]:
        """Of each stage its layers by kind, and its numbers on the widest rank."""
        found = []
        for stage in range(self.layout.pp):
            layers = self.layout.layers(stage, self.config.layer_costs())
            kinds = Counter(self.shard.layers[layer] for layer in layers)
            elements = sum(self.shard.elements[layer] for layer in layers)
            elements += self.shard.first if stage == 0 else 0
            if stage == self.layout.pp - 1 and not (self.config.tie_embeddings and self.layout.pp == 1):
                elements += self.shard.last
            elif stage == self.layout.pp - 1:
                elements += self.shard.last - self.shard.head
            found.append((kinds, elements))
        return tuple(found)

    @cached_property
    def crossings(self) -> tuple[bool, ...]:
        """Of each stage but the last, whether some message from it goes to another host."""
        layout, spread = self.layout, self.cluster.spread
        return tuple(
            any(
                spread([layout.rank(pp=stage, dp=replica), layout.rank(pp=stage + 1, dp=replica)]) > 1
                for replica in range(layout.dp)
            )
            for stage in range(layout.pp - 1)
        )

    def crowd(self, busy: float) -> float:
        """How many ranks divide a device's rates, when this share of the ranks of a host works at a time."""
        if not self.cluster.device.shared:
            return 1.0
        return max(1.0, min(self.cluster.per_host, self.layout.size) * busy)

    def turns(self, busy: float) -> float:
        """How many times as long anything takes that needs a core, where ranks are more than cores."""
        return max(1.0, self.crowd(busy) / self.cluster.device.cores) if self.cluster.device.shared else 1.0

    def step(self, stage: int, batch: Batch, *, busy: float = 1.0) -> Times:
        """Seconds of one step of one cohort on a stage that generates, the host's part included."""
        device, (kinds, elements) = self.cluster.device, self.stages[stage]
        found = self.forward(stage, batch, busy=busy)
        host = device.step + device.row * batch.sampled
        if not device.overlaps:
            found.host = host * self.turns(busy)
            return found
        captured = 2.0 * elements * batch.tokens <= CAPTURED_WORK
        launched = 0.0 if captured else (sum(kinds.values()) * KERNELS + END_KERNELS) * device.launch
        found.host = max(0.0, launched - found.total, host - found.total)
        return found

    def forward(self, stage: int, batch: Batch, *, busy: float = 1.0) -> Times:
        """Seconds of the device for a batch on a stage. `busy`: share of the ranks that work at a time."""
        config, device, item = self.config, self.cluster.device, self.itemsize
        kept = kv_itemsize(self.kv_cache_dtype, item)
        crowd = self.crowd(busy)
        read, matmul = device.read / crowd, device.matmul / crowd
        if device.kind == "cuda" and item == 4:
            matmul *= FLOAT32_SHARE
        kinds, _ = self.stages[stage]
        found = Times()
        for layer, count in kinds.items():
            found.add(_layer(layer, batch, config.hidden_size, (item, kept), read, matmul), count)
        layers = sum(kinds.values())
        kernels: float = layers * (KERNELS_OF_ONE if batch.tokens <= 1 else KERNELS) + END_KERNELS
        turns = self.turns(busy)
        found.kernels = kernels * device.kernel * turns
        found.attention += layers * batch.rows * device.row_layer * turns
        numbers = batch.tokens * config.hidden_size * item
        found.sums = layers * SUMS * self.cluster.all_reduce(numbers, self.layout.tp, self.tp_hosts) if layers else 0.0
        if stage == self.layout.pp - 1 and batch.sampled:
            found.add(self._sampling(batch.sampled, read, matmul))
        found.sums *= turns  # every rank of a sum must get a core
        return found

    def _sampling(self, rows: float, read: float, matmul: float) -> Times:
        """The head, the gather of logits and what draws from them."""
        numbers, vocab = self.shard.head, self.config.vocab_size
        head = math.hypot(numbers * self.itemsize / read, 2 * numbers * rows / matmul)
        found = Times(sampling=head + 2 * rows * vocab * 4 / read)
        if self.layout.tp > 1:
            found.sums = self.cluster.all_reduce(rows * vocab * 4, self.layout.tp, self.tp_hosts) / 2
        return found

    def sent(self, stage: int, batch: Batch) -> float:
        """Bytes that a rank of the stage sends in a step: sums over tp, and to the next stage."""
        kinds, _ = self.stages[stage]
        tp, numbers = self.layout.tp, batch.tokens * self.config.hidden_size * self.itemsize
        sums = sum(kinds.values()) * SUMS * 2 * (tp - 1) / tp * numbers
        return sums + (numbers if stage < self.layout.pp - 1 else 0.0)

    def round(self, batch: Batch, cohorts: int) -> Round:
        """A step of each of `cohorts` cohorts, all alike: stages work on one each, at most as many as there are."""
        pp = self.layout.pp
        steps = [self.step(stage, batch, busy=min(1.0, cohorts / pp)) for stage in range(pp)]
        numbers = batch.tokens * self.config.hidden_size * self.itemsize
        hops = sum(self.cluster.hop(numbers, across=across) for across in self.crossings)
        path = sum(step.total for step in steps) + hops
        busiest = max(steps, key=lambda times: times.total)
        seconds = max(cohorts * busiest.total, path)
        spent = Times()
        spent.add(busiest, cohorts)
        spent.waiting += seconds - cohorts * busiest.total
        return Round(seconds, path, spent, tuple(1 - cohorts * times.total / seconds for times in steps))


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of all cohorts takes."""

    seconds: float
    path: float
    """From the first stage to the last, of the slowest cohort."""
    spent: Times
    """By the busiest stage, and what it waits."""
    idle: tuple[float, ...]
    """Share of the round that each stage waits."""


def _layer(layer: LayerShard, batch: Batch, hidden: int, items: tuple[int, int], read: float, matmul: float) -> Times:
    """One layer of a step, without its sums and kernels' own costs. `items`: bytes of a number, and of a cached one."""
    item, kept = items
    touched = 1.0
    if layer.num_experts:
        touched = 1 - (1 - layer.share) ** batch.tokens  # of experts that some token chose, all alike
    reading = (layer.matrices + layer.experts * touched) * item / read
    products = 2 * batch.tokens * (layer.matrices + layer.experts * layer.share) / matmul
    keys, fresh_keys = batch.keys, batch.fresh_keys
    if layer.window is not None:
        keys, fresh_keys = min(keys, batch.rows * layer.window), min(fresh_keys, batch.fresh * layer.window)
    attention = max(keys * 2 * layer.keys * kept / read, 4 * layer.queries * keys / matmul)
    attention += 4 * layer.queries * fresh_keys / (matmul * SCORE_SHARE)
    width_ = 8 * hidden + 2 * (layer.queries + 2 * layer.keys) + 1.5 * layer.inner
    return Times(
        weights=reading,
        products=math.hypot(reading, products) - reading,
        attention=attention,
        elements=batch.tokens * width_ * item / read,
    )
