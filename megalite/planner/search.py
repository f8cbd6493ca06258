"""All layouts of some devices, best first, each with the reason why it loses to the first. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.monitor.words import format_bytes, format_count, format_seconds
from megalite.planner import generation, training
from megalite.planner.cost import Cluster, Times
from megalite.planner.generation import Prediction, Workload
from megalite.planner.training import TrainingPrediction, TrainingWork

Objective = Literal["throughput", "per_token", "first_token"]
"""What a layout is chosen by: most tokens a second, or least seconds between tokens, or to the first."""
NEAR = 0.02
"""Layouts closer than this are equal, as far as predictions go; of such the one with fewer messages comes first."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout and what to say of it."""

    prediction: Prediction
    reason: str
    """Why it is first, loses to the first, or does not fit: one sentence."""

    @property
    def layout(self) -> Layout:
        return self.prediction.layout


def layouts(
    devices: int,
    config: ModelConfig,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
) -> Iterator[Layout]:
    """Every tp x pp x dp of so many devices that the model can be cut into, those that do not divide it included.

    Sizes that are given are kept. Beyond one query head and one MLP column a rank, tp has nothing to cut.
    """
    most = config.num_heads
    for one in range(1, min(devices, most) + 1):
        for stages in range(1, min(devices // one, config.num_layers) + 1):
            replicas, rest = divmod(devices, one * stages)
            if not rest and tp in (None, one) and pp in (None, stages) and dp in (None, replicas):
                yield Layout(one, stages, replicas)


def search(
    config: ModelConfig,
    cluster: Cluster,
    workload: Workload,
    engine: EngineSection,
    *,
    itemsize: int,
    candidates: Iterable[Layout] | None = None,
    objective: Objective = "throughput",
) -> list[Choice]:
    """Layouts that generate, best first."""
    every = layouts(cluster.devices, config) if candidates is None else candidates
    found = [generation.predict(config, layout, cluster, workload, engine, itemsize=itemsize) for layout in every]
    return ranked(found, objective, asked=workload.concurrency)


def search_training(
    config: ModelConfig,
    cluster: Cluster,
    work: TrainingWork,
    *,
    itemsize: int,
    candidates: Iterable[Layout] | None = None,
) -> list[Choice]:
    """Layouts that train, best first."""
    every = layouts(cluster.devices, config) if candidates is None else candidates
    found = [
        training.predict(config, layout, cluster, work, itemsize=itemsize)
        for layout in every
        if training.trainable(layout, config, work)
    ]
    return ranked(found, "throughput", asked=0)


def ranked(found: Iterable[Prediction], objective: Objective, *, asked: int) -> list[Choice]:
    """Best first; those that do not fit come last, the nearest to fitting first. `asked`: sequences at once."""
    every = list(found)
    fitting = sorted((one for one in every if not one.short), key=lambda one: _key(one, objective))
    choices = [Choice(prediction=one, reason=_reason(one, fitting[0], asked, objective)) for one in fitting]
    short = sorted((one for one in every if one.short), key=lambda one: one.short)
    return choices + [Choice(prediction=one, reason=_shortfall(one)) for one in short]


def _key(one: Prediction, objective: Objective) -> tuple[float, ...]:
    value = -one.throughput if objective == "throughput" else getattr(one, objective)
    return value, one.layout.tp, one.layout.pp


def _shortfall(one: Prediction) -> str:
    """By how much a layout does not fit."""
    fullest = max(one.memory, key=lambda stage: stage.total - stage.kv)
    largest = max(fullest.items().items(), key=lambda item: item[1])
    less = ""
    if not isinstance(one, TrainingPrediction) and one.short < (fullest.activations + fullest.graphs) / 2:
        less = "; a smaller engine.max_num_batched_tokens may be enough"
    return (
        f"does not fit: {format_bytes(one.short)} too little on a rank, of which {largest[0]} take "
        f"{format_bytes(largest[1])}{less}"
    )


WORDS = {
    "weights": "reading weights takes {mine} of {what} beside {best}: {held}",
    "products": "its matmuls take {mine} of {what} beside {best}",
    "attention": "reading cached keys and values takes {mine} of {what} beside {best}",
    "elements": "norms and gates, which tp does not divide, take {mine} of {what} beside {best}",
    "kernels": "launching its smaller kernels takes {mine} of {what} beside {best}",
    "sampling": "the head and sampling take {mine} of {what} beside {best}",
    "sums": "sums over tp take {mine} of {what} beside {best}",
    "host": "the devices wait for the host for {mine} of {what} beside {best}",
    "waiting": "stages wait for each other for {mine} of {what} beside {best}",
}
"""What makes a layout slower than the first, by the field of `Times`."""


def _reason(one: Prediction, first: Prediction, asked: int, objective: Objective) -> str:
    if one is first:
        return _praise(one, objective)
    mine, best = _spent(one, objective), _spent(first, objective)
    lost = {kind.name: getattr(mine, kind.name) - getattr(best, kind.name) for kind in fields(Times)}
    worst = max(lost, key=lambda name: lost[name])
    ratio = one.throughput / first.throughput
    how = f"{ratio:.0%} of the first's speed"
    if objective != "throughput":
        took = [format_seconds(getattr(each, objective)) for each in (one, first)]
        how = f"{took[0]} where the first takes {took[1]}"
    elif ratio > 1 - NEAR:
        how = f"as fast as the first within {NEAR:.0%}"
    if one.concurrency < min(first.concurrency, asked):
        return f"{how}: only {one.concurrency} of {asked} sequences fit at once"
    if lost[worst] <= 0:
        return f"{how}: a request's own tokens come slower, though all together do not"
    held = f"a rank holds {format_bytes(max(stage.weights for stage in one.memory))}"
    if isinstance(one, TrainingPrediction):
        held += " of them"
    else:
        rows = one.concurrency / one.layout.dp / one.layout.pp
        held += f" and reads them for {format_count(max(1, round(rows)), 'sequence')} at a time"
    words = WORDS[worst].format(
        mine=format_seconds(getattr(mine, worst)),
        best=format_seconds(getattr(best, worst)),
        what="the first token" if objective == "first_token" else "a token",
        held=held,
    )
    return f"{how}: {words}"


def _spent(one: Prediction, objective: Objective) -> Times:
    return one.spent_first if objective == "first_token" else one.spent


def _praise(one: Prediction, objective: Objective) -> str:
    """What the time of the first goes into."""
    spent = _spent(one, objective)
    shares = {kind.name: getattr(spent, kind.name) / spent.total for kind in fields(Times)}
    most = sorted(shares, key=lambda name: -shares[name])[:2]
    names = {"products": "matmuls", "elements": "norms and gates", "kernels": "small kernels"}
    parts = " and ".join(f"{names.get(name, name)} {shares[name]:.0%}" for name in most)
    least = {"throughput": "the most tokens a second", "per_token": "the least time a token"}
    return f"{least.get(objective, 'the least time to the first token')}; its time: {parts}"
