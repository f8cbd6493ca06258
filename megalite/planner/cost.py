"""How long a step takes on each stage of a layout: a roofline of every layer, and more. Imports no torch.

A layer's matmuls take sqrt(r^2 + c^2): r seconds to read their weights, c to compute. The smaller of both never hides
entirely behind the larger; this sum of squares is within 7% of what matmuls took in steps of 32 to 256 rows of a 0.6B
and an 8B model (docs/planner.md). What weights in codes take is said in `applied`. Attention reads every cached key and
value once, and a state is read and written; norms, rotation, gate and residual read and write what they work on; every
kernel costs a little beside. Sums over tp cost a latency and bytes over the link's rate, as do messages between stages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

from megalite.core import formats
from megalite.core.layout import Layout, width
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import LayerKind
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.planner.applied import Matrices, Rates, applied
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
    """What the widest tp rank has of one layer."""

    matrices: tuple[Matrices, ...]
    """Every token is multiplied by them."""
    experts: tuple[Matrices, ...]
    """Of experts, of which a token takes `top_k`."""
    num_experts: int
    top_k: int
    queries: int
    """Numbers of a token's queries,"""
    keys: int
    """and of its keys."""
    cached: int
    """Numbers that a token leaves in pages of the cache."""
    scored: float
    """Operations for each key that a token is compared with,"""
    stepped: float
    """and those of a token on the state of its sequence,"""
    state: int
    """which takes so many bytes."""
    inner: int
    """Width of what gate and activation work on, gate included."""
    span: int | None
    """Keys that a token is compared with, at most."""

    @property
    def in_codes(self) -> bool:
        return any(one.way != "numbers" for one in self.matrices)


@dataclass(frozen=True, slots=True)
class ModelShard:
    """What the widest tp rank has of a model."""

    layers: tuple[LayerShard, ...]
    elements: tuple[int, ...]
    """Of each layer, all of them,"""
    nbytes: tuple[int, ...]
    """and what they take."""
    first: tuple[int, int]
    last: tuple[int, int]
    """Both of each end, the head included where it is tied as well."""
    head: Matrices


@lru_cache(maxsize=64)
def shard(config: ModelConfig, tp: int, itemsize: int, codes: bool) -> ModelShard:
    """The widest rank is the first: shares differ by at most one unit, larger ones first. `codes`: see `applied`."""
    matrices: dict[tuple[formats.Stage, bool], dict[str, Matrices]] = {}
    elements: Counter[formats.Stage] = Counter()
    nbytes: Counter[formats.Stage] = Counter()
    head = Matrices(numbers=(size := width(config.head_vocab, tp, 0) * config.hidden_size), nbytes=size * itemsize)
    for one in owned(config, Layout(tp, 1, 1), 0):
        stage, part = one.piece.stage, applied(one, itemsize, codes=codes)
        elements[stage] += part.numbers
        nbytes[stage] += part.nbytes
        if one.piece.param.startswith("head.") and one.piece.other and part.numbers:
            head = part
        elif one.piece.other and part.numbers:
            alike = matrices.setdefault((stage, one.piece.expert is not None), {})
            alike[part.way] = alike.get(part.way, Matrices(part.way)) + part
    if config.tie_embeddings:
        elements["last"] += head.numbers
        nbytes["last"] += head.nbytes

    def shared(kind: LayerKind) -> float:
        """Of the work over keys, the part of the widest rank."""
        if isinstance(kind, SoftmaxAttention):
            return width(kind.queries, tp, 0) / kind.queries.total
        return math.ceil(kind.query_heads / tp) / max(1, kind.query_heads)

    def layer(index: int) -> LayerShard:
        made = config.layers[index]
        attention, moe = next(made.of(SoftmaxAttention), None), next(made.of(Experts), None)
        inner = sum((2 if mlp.gated else 1) * width(mlp.inner, tp, 0) for mlp in made.of(DenseMLP))
        if moe is not None:
            inner += 2 * math.ceil(moe.top_k * moe.intermediate_size / min(tp, moe.num_experts))
        most, cache = config.max_position_embeddings, made.cache(tp, 0)
        span = max((kind.attended(most) for kind in made.kinds if kind.cache(tp, 0).token), default=0)
        return LayerShard(
            matrices=tuple(matrices.get((index, False), {}).values()),
            experts=tuple(matrices.get((index, True), {}).values()),
            num_experts=0 if moe is None else moe.num_experts,
            top_k=0 if moe is None else moe.top_k,
            queries=width(attention.queries, tp, 0) if attention else 0,
            keys=width(attention.keys, tp, 0) if attention else 0,
            cached=cache.token_elements,
            scored=sum(kind.flops_per_key * shared(kind) for kind in made.kinds if kind.cache(tp, 0).token),
            stepped=sum(kind.flops_per_key / tp for kind in made.kinds if kind.cache(tp, 0).sequence),
            state=cache.sequence_bytes,
            inner=inner,
            span=None if span == most else span,
        )

    layers = range(config.num_layers)
    return ModelShard(
        layers=tuple(map(layer, layers)),
        elements=tuple(elements[index] for index in layers),
        nbytes=tuple(nbytes[index] for index in layers),
        first=(elements["first"], nbytes["first"]),
        last=(elements["last"], nbytes["last"]),
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


class Stage(NamedTuple):
    """What the widest rank of a pipeline stage has."""

    kinds: Counter[LayerShard]
    """Its layers, by kind."""
    elements: int
    nbytes: int
    """Of its weights."""


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
        device = self.cluster.device
        return shard(self.config, self.layout.tp, self.itemsize, device.kind == "cuda" and device.fp8 > 0)

    @cached_property
    def tp_hosts(self) -> int:
        """Hosts that the widest spread tp group is on."""
        tp = self.layout.tp
        firsts = range(0, self.layout.size, tp)
        return max(self.cluster.spread(range(first, first + tp)) for first in firsts)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the widest rank of each has."""
        found, made, layout = [], self.shard, self.layout
        for place in range(layout.pp):
            layers = layout.layers(place, self.config.layer_costs())
            held = [(made.elements[layer], made.nbytes[layer]) for layer in layers]
            held += [made.first] * (place == 0) + [made.last] * (place == layout.pp - 1)
            if self.config.tie_embeddings and layout.pp == 1:
                held.append((-made.head.numbers, -made.head.nbytes))  # one parameter serves as both
            elements, nbytes = map(sum, zip(*held, strict=True))
            found.append(Stage(Counter(made.layers[layer] for layer in layers), elements, nbytes))
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
        device, (kinds, elements, _) = self.cluster.device, self.stages[stage]
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
        rates = self.rates(busy)
        kinds = self.stages[stage].kinds
        found = Times()
        kernels: float = END_KERNELS
        for layer, count in kinds.items():
            found.add(
                _layer(layer, batch, config.hidden_size, (item, kv_itemsize(self.kv_cache_dtype, item)), rates), count
            )
            kernels += count * (KERNELS_OF_ONE if batch.tokens <= 1 and not layer.in_codes else KERNELS)
        layers = sum(kinds.values())
        turns = self.turns(busy)
        found.kernels = kernels * device.kernel * turns
        found.attention += layers * batch.rows * device.row_layer * turns
        numbers = batch.tokens * config.hidden_size * item
        found.sums = layers * SUMS * self.cluster.all_reduce(numbers, self.layout.tp, self.tp_hosts) if layers else 0.0
        if stage == self.layout.pp - 1 and batch.sampled:
            found.add(self._sampling(batch.sampled, rates))
        found.sums *= turns  # every rank of a sum must get a core
        return found

    def rates(self, busy: float) -> Rates:
        """What a rank gets of its device when this share of the ranks works at a time."""
        device, crowd = self.cluster.device, self.crowd(busy)
        matmul = device.matmul / crowd
        if device.kind == "cuda" and self.itemsize == 4:
            matmul *= FLOAT32_SHARE
        return Rates(device.read / crowd, matmul, matmul * device.fp8)

    def _sampling(self, rows: float, rates: Rates) -> Times:
        """The head, the gather of logits and what draws from them."""
        vocab = self.config.vocab_size
        head = sum(self.shard.head.seconds(rows, rates, self.itemsize))
        found = Times(sampling=head + 2 * rows * vocab * 4 / rates.read)
        if self.layout.tp > 1:
            found.sums = self.cluster.all_reduce(rows * vocab * 4, self.layout.tp, self.tp_hosts) / 2
        return found

    def sent(self, stage: int, batch: Batch) -> float:
        """Bytes that a rank of the stage sends in a step: sums over tp, and to the next stage."""
        kinds = self.stages[stage].kinds
        tp, numbers = self.layout.tp, batch.tokens * self.config.hidden_size * self.itemsize
        sums = sum(kinds.values()) * SUMS * 2 * (tp - 1) / tp * numbers
        return sums + (numbers if stage < self.layout.pp - 1 else 0.0)

    def round(self, batch: Batch, cohorts: int) -> Round:
        """A step of each of `cohorts` cohorts, all alike: stages work on one each, at most as many as there are."""
        pp = self.layout.pp
        steps = [self.step(stage, batch, busy=min(1.0, cohorts / pp)) for stage in range(pp)]
        numbers = batch.tokens * self.config.hidden_size * self.itemsize
        hops = sum(self.cluster.hop(numbers, across=across) for across in self.crossings)
        along = Times(waiting=hops)
        for step in steps:
            along.add(step)
        busiest = max(steps, key=lambda times: times.total)
        seconds = max(cohorts * busiest.total, along.total)
        spent = Times()
        spent.add(busiest, cohorts)
        spent.waiting += seconds - cohorts * busiest.total
        return Round(seconds, along, spent, tuple(1 - cohorts * times.total / seconds for times in steps))


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of all cohorts takes."""

    seconds: float
    along: Times
    """From the first stage to the last, of one cohort; waiting: for messages."""
    spent: Times
    """By the busiest stage, and what it waits."""
    idle: tuple[float, ...]
    """Share of the round that each stage waits."""


def _layer(layer: LayerShard, batch: Batch, hidden: int, items: tuple[int, int], rates: Rates) -> Times:
    """One layer of a step, without its sums and kernels' own costs. `items`: bytes of a number, and of a cached one."""
    item, kept = items
    parts = [one.seconds(batch.tokens, rates, item) for one in layer.matrices]
    chosen = (batch.tokens, layer.top_k, layer.num_experts)
    parts += [one.seconds_of_experts(*chosen, rates, item) for one in layer.experts]
    keys, fresh_keys = batch.keys, batch.fresh_keys
    if layer.span is not None:
        keys, fresh_keys = min(keys, batch.rows * layer.span), min(fresh_keys, batch.fresh * layer.span)
    attention = max(keys * layer.cached * kept / rates.read, layer.scored * keys / rates.matmul)
    attention += (layer.scored * fresh_keys + layer.stepped * batch.fresh) / (rates.matmul * SCORE_SHARE)
    width_ = 8 * hidden + 2 * (layer.queries + 2 * layer.keys) + 1.5 * layer.inner
    return Times(
        weights=sum(reading for reading, _ in parts),
        products=sum(beyond for _, beyond in parts),
        attention=attention + 2 * batch.rows * layer.state / rates.read,
        elements=batch.tokens * width_ * item / rates.read,
    )
