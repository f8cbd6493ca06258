"""What transformers' `device_map="auto"` does with the same devices, for comparison. Imports no torch.

accelerate fills one device after the other with whole layers, each up to the model's share plus a quarter more than a
layer; the first leaves room for one more (accelerate 1.x, `get_balanced_memory` and `infer_auto_device_map`). Then one
device computes at a time, on all sequences, and hands its result to the next; a batch is done when its longest output
is. Ranks of a CPU are one device to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.planner.cost import Batch, Cluster, StageCosts, Times, shard
from megalite.planner.generation import Workload


@dataclass(frozen=True)
class DeviceMap:
    """Whole layers on each device, and what comes of it."""

    layers: tuple[int, ...]
    """On each device."""
    idle: tuple[float, ...]
    """Share of a decode step in which each device waits for the others."""
    throughput: float
    """Output tokens a second, predicted with this project's kernels launched one by one."""
    step: float
    """Seconds of a decode step."""


def spread(config: ModelConfig, devices: int, itemsize: int) -> tuple[int, ...]:
    """Layers on each device."""
    whole = shard(config, 1, itemsize, codes=False)
    embedding, head = whole.first[1], 0 if config.tie_embeddings else whole.head.nbytes
    sizes = whole.nbytes
    room = (embedding + sum(sizes) + head) // devices + int(1.25 * max(sizes))
    kept = max(sizes) if config.tie_embeddings else max(*sizes, embedding, head)
    found, used, device = [0] * devices, 0, 0
    for layers, size in [(0, embedding), *((1, size) for size in sizes)]:
        while device < devices - 1 and used + size > room - (kept if device == 0 else 0):
            device, used = device + 1, 0
        found[device] += layers
        used += size
    return tuple(found)


def compare(config: ModelConfig, cluster: Cluster, load: Workload, *, itemsize: int) -> DeviceMap:
    """Predict a batch of all sequences at once, as one call of `generate` takes them."""
    if cluster.device.shared:
        cluster = Cluster(cluster.device, 1)
    layers = spread(config, cluster.devices, itemsize)
    costs = StageCosts(config, Layout(), cluster, itemsize)
    rows, prompt, output = load.concurrency, load.input.mean, load.output.mean
    decode = Batch(rows=rows, keys=rows * (prompt + output / 2), sampled=rows)
    prefill = Batch(fresh=rows * prompt, fresh_keys=rows * prompt * prompt / 2, sampled=rows)
    steps, first = _sequence(costs, cluster, layers, decode), _sequence(costs, cluster, layers, prefill)
    seconds = sum(first) + load.output.high * sum(steps)
    idle = tuple(1 - one / sum(steps) for one in steps)
    return DeviceMap(layers=layers, idle=idle, throughput=rows * output / seconds, step=sum(steps))


def _sequence(costs: StageCosts, cluster: Cluster, layers: tuple[int, ...], batch: Batch) -> list[float]:
    """Seconds that each device works in one step, with the message that it hands on."""
    device, total = cluster.device, sum(layers)
    whole = costs.forward(0, batch)
    ends = Times(sampling=whole.sampling)
    each = (whole.total - ends.total) / total
    if device.kind == "cuda":
        each = max(each, 9 * device.launch)  # the host launches every kernel by itself, and does nothing else meanwhile
    numbers = batch.tokens * costs.config.hidden_size * costs.itemsize
    hop = cluster.hop(numbers, across=False) if len(layers) > 1 else 0.0
    return [count * each + (ends.total if index == len(layers) - 1 else hop) for index, count in enumerate(layers)]
