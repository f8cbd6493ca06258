"""Two layouts for one job that trains and generates on the same devices. Imports no torch.

An iteration samples, learns and moves the weights. What training keeps meanwhile (weights, gradients, optimizer) is not
there for the sampler; where both layouts are equal they share the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.planner import generation
from megalite.planner.cost import Cluster
from megalite.planner.generation import Prediction, Workload
from megalite.planner.search import Choice, layouts, search_training
from megalite.planner.training import TrainingPrediction, TrainingWork

LOOKED_AT = 6
"""Layouts that train, the best so many, for each of which all that generate are looked at."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The layouts of a hybrid job."""

    train: TrainingPrediction
    infer: Prediction
    learning: float
    """Seconds of an iteration that it learns,"""
    sampling: float
    """samples,"""
    sync: float
    """and moves weights."""
    reason: str = ""

    @property
    def seconds(self) -> float:
        return self.learning + self.sampling + self.sync


def search_pairs(
    config: ModelConfig,
    cluster: Cluster,
    work: TrainingWork,
    load: Workload,
    engine: EngineSection,
    *,
    itemsize: int,
    train: Iterable[Layout] | None = None,
    infer: Iterable[Layout] | None = None,
    offloads: bool = False,
) -> tuple[list[Pair], list[Choice]]:
    """Pairs that fit, the fastest iteration first; and all layouts that train. `offloads`: the optimizer's state is in
    host memory while the job samples. `load` has a number of requests: the samples of an iteration."""
    assert load.requests is not None
    trained = search_training(config, cluster, work, itemsize=itemsize, candidates=train)
    candidates = list(layouts(cluster.devices, config) if infer is None else infer)
    pairs = []
    for choice in [one for one in trained if not one.prediction.short][:LOOKED_AT]:
        learner = choice.prediction
        assert isinstance(learner, TrainingPrediction)
        for layout in candidates:
            same = layout.sizes == learner.layout.sizes
            held = max(
                stage.gradients + (0 if offloads else stage.optimizer) + (0 if same else stage.weights)
                for stage in learner.memory
            )
            crowd = min(cluster.per_host, layout.size) if cluster.device.shared else 1
            left = replace(cluster.device, memory=max(0, cluster.device.memory - held * crowd))
            place = replace(cluster, device=left)
            sampler = generation.predict(config, layout, place, load, engine, itemsize=itemsize)
            if not sampler.short:
                pairs.append(_pair(learner, sampler, cluster, load, same=same))
    pairs.sort(key=lambda pair: pair.seconds)
    return [replace(pair, reason=_reason(pair, pairs[0])) for pair in pairs], trained


def _pair(learner: TrainingPrediction, sampler: Prediction, cluster: Cluster, load: Workload, *, same: bool) -> Pair:
    assert sampler.seconds is not None and load.requests is not None
    tokens = load.requests * (load.input.mean + load.output.mean)
    moved = max(stage.weights for stage in sampler.memory)
    rate = cluster.device.link if cluster.hosts == 1 else cluster.device.network
    return Pair(
        train=learner,
        infer=sampler,
        learning=tokens / learner.throughput,
        sampling=sampler.seconds,
        sync=0.0 if same else moved / rate,
    )


def _reason(pair: Pair, first: Pair) -> str:
    if pair is first:
        parts = f"{pair.sampling:.3g} s sampling, {pair.learning:.3g} s learning, {pair.sync:.2g} s moving weights"
        return f"the shortest iteration: {parts}"
    lost = {
        "sampling": pair.sampling - first.sampling,
        "learning": pair.learning - first.learning,
        "moving weights": pair.sync - first.sync,
    }
    worst = max(lost, key=lambda name: lost[name])
    return f"{pair.seconds / first.seconds:.2f} times as long: {lost[worst]:.2g} s more {worst}"
