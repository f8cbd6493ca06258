"""What cost a run memory or speed, in plain words, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from megalite.monitor.metrics import Phase, RankReport
from megalite.monitor.words import format_bytes, format_count, format_percent

SHORT_RUN = 10.0
"""Seconds. Where the time of a run that is over sooner went says little, and nobody has waited for it."""
WAITING_IS_MUCH = 0.5
UNEVEN_STAGES = 0.15
"""Share of the time that a stage waits, from which on another cut of the layers is looked for."""
WORTH_A_CUT = 0.1
"""Least share of the slowest stage's time that another cut must save."""
COMMUNICATION_IS_MUCH = 0.4
SMALL_MESSAGE = 1 << 18
"""Bytes below which a collective takes its latency, not its bandwidth."""
BUBBLE_IS_MUCH = 0.2
PREEMPTIONS_ARE_MANY = 0.1
"""For each prompt."""
QUEUE_IS_LONG = 0.5
"""Sequences that wait for each that runs."""
UNEVEN_REPLICAS = 0.7
"""A replica that was done in less than this share of the slowest one's time."""
LOADING_SLACK = 64 * 2**20
"""Bytes a process may take for itself while it loads: imported code, buffers, threads."""
THREADS_ARE_STARVED = 0.2
"""Share of the time in which a thread could have run and had no core."""


def hints(ranks: list[RankReport]) -> list[str]:
    """What cost memory or speed; of speed only where the run was long enough."""
    found = _overloaded(ranks)
    if max(report.seconds for report in ranks) >= SHORT_RUN:
        found += _starved(ranks) or _waiting(ranks) + _communicating(ranks)
        found += _preempted(ranks) or _queued(ranks)
        found += _uneven_replicas(ranks)
    return found


def control_ranks(ranks: list[RankReport]) -> list[RankReport]:
    """Tp rank 0 of each replica's last stage: what it counts, it counts for the replica."""
    last = max(report.pp for report in ranks)
    return [report for report in ranks if report.pp == last and report.tp == 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCosts:
    """Why the stages of a pipeline take the time that they take: each so much a layer, the last something besides."""

    each: tuple[float, ...]
    """Seconds of a layer, by stage."""
    head: float
    """Seconds of what the last stage does besides its layers."""

    @classmethod
    def of(cls, seconds: Sequence[float], layers: Sequence[int]) -> StageCosts:
        """Seconds at work and number of layers, by stage; at least two. What the last stage takes longer for each of
        its layers than others do is what the head and sampling cost."""
        each = [spent / max(1, count) for spent, count in zip(seconds, layers, strict=True)]
        last = min(each[-1], median(each[:-1]))
        return cls(each=(*each[:-1], last), head=seconds[-1] - last * layers[-1])

    def slowest(self, layers: Sequence[int]) -> float:
        """Seconds of the slowest stage with so many layers on each."""
        return max(self._stages(layers))

    def waiting(self, layers: Sequence[int]) -> float:
        """Share of the time that the stages wait, on average, once the pipeline is full."""
        stages = self._stages(layers)
        return 1 - sum(stages) / len(stages) / max(stages)

    def best(self, num_layers: int) -> list[int]:
        """Layers of each stage, at least 1, such that the slowest takes least."""
        layers = [1] * len(self.each)
        for _ in range(num_layers - len(layers)):
            more = [spent + one for spent, one in zip(self._stages(layers), self.each, strict=True)]
            layers[more.index(min(more))] += 1
        return layers

    def _stages(self, layers: Sequence[int]) -> list[float]:
        spent = [one * count for one, count in zip(self.each, layers, strict=True)]
        spent[-1] += self.head
        return spent


def _replicas(ranks: list[RankReport]) -> dict[int, list[list[RankReport]]]:
    """The stages of each replica, and the ranks of each stage."""
    found: dict[int, dict[int, list[RankReport]]] = {}
    for report in ranks:
        found.setdefault(report.dp, {}).setdefault(report.pp, []).append(report)
    return {dp: [stage for _, stage in sorted(stages.items())] for dp, stages in sorted(found.items())}


def _starved(ranks: list[RankReport]) -> list[str]:
    """Threads that fight for cores: with each other, or with other programs."""
    found = [report for report in ranks if report.starved > THREADS_ARE_STARVED]
    if not found:
        return []
    most = max(report.starved for report in found)
    return [
        f"{_names(found)} had threads that could have run and got no core for up to {format_percent(most)} of the "
        "time: more threads are at work than this machine has cores. OMP_NUM_THREADS=1 often is faster by far then; or "
        "use fewer ranks, or end other programs."
    ]


def _waiting(ranks: list[RankReport]) -> list[str]:
    found = []
    for replica, stages in _replicas(ranks).items():
        waits = [fmean(report.share("waiting") for report in stage) for stage in stages]
        if len(stages) == 1:
            found += _waiting_on_control(stages[0])
        elif min(waits) > WAITING_IS_MUCH and not stages[0][0].learnt_tokens:
            found.append(
                f"all {len(stages)} stages of replica {replica} waited more than half of the time: too few prompts are "
                "in flight to fill the pipeline. Give it more prompts at once, or use a smaller parallel.pp."
            )
        elif max(waits) > UNEVEN_STAGES:
            found += _uneven_stages(replica, stages, waits) or _bubble(replica, stages, waits)
    return found


def _uneven_stages(replica: int, stages: list[list[RankReport]], waits: list[float]) -> list[str]:
    """Stages that wait for another, which has more to do than they."""
    work: tuple[Phase, ...] = ("compute", "communication", "sampling")
    seconds = [fmean(sum(report.spent(phase) for phase in work) for report in stage) for stage in stages]
    layers = [stage[0].layers[1] - stage[0].layers[0] for stage in stages]
    slow = seconds.index(max(seconds))
    if min(layers) < 1 or seconds[slow] <= 0:
        return []
    costs = StageCosts.of(seconds, layers)
    best = costs.best(sum(layers))
    saved = 1 - costs.slowest(best) / seconds[slow]
    idle = [pp for pp, share in enumerate(waits) if share > UNEVEN_STAGES and pp != slow]
    if not idle or waits[slow] >= max(waits):
        return []
    told = ", ".join(f"{pp} ({format_percent(waits[pp])})" for pp in idle)
    many = "s" if len(idle) > 1 else ""
    begin = f"replica {replica}: stage{many} {told} waited for stage {slow}"
    if slow == len(stages) - 1 and costs.head > costs.each[-1]:
        why = f"the head and sampling cost as much as {costs.head / max(costs.each[-1], 1e-12):.1f} of its layers"
    elif costs.each[slow] > 1.25 * median(costs.each):
        why = f"a layer takes {costs.each[slow] / median(costs.each):.1f} times as long there as on other stages"
    else:
        why = f"it holds {format_count(layers[slow], 'layer')}"
    if saved >= WORTH_A_CUT:
        cut = str(best).replace(" ", "")
        idle_now, idle_then = (format_percent(costs.waiting(one)) for one in (layers, best))
        return [
            f"{begin}: {why}; try parallel.layers={cut}, with which a full pipeline would wait {idle_then} instead of "
            f"{idle_now} of the time."
        ]
    if max(waits) > WAITING_IS_MUCH:
        return [f"{begin}: {why}. Use a smaller parallel.pp with a larger parallel.tp, or look what else runs there."]
    return []


def _bubble(replica: int, stages: list[list[RankReport]], waits: list[float]) -> list[str]:
    """Training: a pipeline that fills and drains in every step."""
    first = stages[0][0]
    if not first.learnt_tokens or fmean(waits) < BUBBLE_IS_MUCH:
        return []
    return [
        f"replica {replica}: the {len(stages)} stages waited {format_percent(fmean(waits))} of the time for the "
        "pipeline to fill and to drain. More micro batches a step (train.gradient_accumulation_steps, in a hybrid job "
        "a smaller train.micro_batch_tokens) or parallel.interleave=2 shorten that."
    ]


def _waiting_on_control(stage: list[RankReport]) -> list[str]:
    """One stage: its ranks wait only for the control rank's sampling."""
    idle = [report for report in stage if report.share("waiting") > WAITING_IS_MUCH]
    if not idle:
        return []
    slow = min(stage, key=lambda report: (report.share("waiting"), report.rank))
    return [
        f"{_names(idle)} waited more than half of the time for rank {slow.rank}, "
        f"which spent {format_percent(slow.share('sampling'))} of it sampling."
    ]


def _communicating(ranks: list[RankReport]) -> list[str]:
    busy = [report for report in ranks if report.share("communication") > COMMUNICATION_IS_MUCH]
    if not busy:
        return []
    most = max(busy, key=lambda report: report.share("communication"))
    share = format_percent(most.share("communication"))
    tp = most.traffic.get("tp")
    size = 1 + max(report.tp for report in ranks)
    if tp is None or tp.seconds < 0.5 * most.spent("communication") or size == 1:
        return [
            f"{_names(busy)} spent up to {share} of the time in communication: on these links the model is too small "
            "for this layout. Try a smaller parallel.tp, with parallel.pp or parallel.dp for the other ranks."
        ]
    replicas = (1 + max(report.dp for report in ranks)) * size
    stages = (1 + max(report.pp for report in ranks)) * size
    weights = format_bytes(most.weight_bytes * size)
    what = f"{_names(busy)} spent up to {share} of the time in collectives of {format_bytes(tp.message_bytes)}"
    why = "which take their latency" if tp.message_bytes < SMALL_MESSAGE else "for which the links are too slow"
    return [
        f"{what} along tp, {why}: parallel.tp=1 parallel.dp={replicas} would be faster here, if a rank has room for "
        f"{weights} of weights; else parallel.tp=1 parallel.pp={stages}."
    ]


def _queued(ranks: list[RankReport]) -> list[str]:
    found = []
    for report in control_ranks(ranks):
        if report.seconds <= 0:
            continue
        queued, running = report.queued_seconds / report.seconds, report.running_seconds / report.seconds
        if queued >= max(2.0, QUEUE_IS_LONG * running):
            found.append(
                f"replica {report.dp}: {queued:.0f} sequences waited for a place on average while {running:.0f} ran. "
                "Raise engine.max_num_seqs, or where the KV cache is full engine.gpu_memory_utilization or "
                "engine.num_kv_blocks; or use more replicas (parallel.dp)."
            )
    return found


def _preempted(ranks: list[RankReport]) -> list[str]:
    found = []
    for report in control_ranks(ranks):
        if report.preemptions > PREEMPTIONS_ARE_MANY * max(report.prompts, 1):
            found.append(
                f"replica {report.dp} ran out of KV cache: {format_count(report.preemptions, 'preemption')} for "
                f"{format_count(report.prompts, 'prompt')}. Raise engine.gpu_memory_utilization or "
                "engine.num_kv_blocks, set engine.swap_space, or lower engine.max_num_seqs."
            )
    return found


def _overloaded(ranks: list[RankReport]) -> list[str]:
    return [
        f"rank {report.rank} took {format_bytes(report.load_peak_bytes)} while loading, more than its weights and one "
        f"tensor ({format_bytes(report.load_bound_bytes)})."
        for report in ranks
        if report.load_peak_bytes is not None
        and report.load_bound_bytes is not None
        and report.load_peak_bytes > report.load_bound_bytes + LOADING_SLACK
    ]


def _uneven_replicas(ranks: list[RankReport]) -> list[str]:
    seconds: dict[int, float] = {}
    for report in ranks:
        seconds[report.dp] = max(seconds.get(report.dp, 0.0), report.seconds)
    slowest = max(seconds, key=lambda dp: (seconds[dp], -dp))
    early = [dp for dp in sorted(seconds) if seconds[dp] < UNEVEN_REPLICAS * seconds[slowest]]
    if not early:
        return []
    first = min(early, key=lambda dp: (seconds[dp], dp))
    return [
        f"replica {first} was done after {seconds[first]:.1f} s, replica {slowest} after {seconds[slowest]:.1f} s. "
        "parallel.dp_mode=async lets a replica that is free take work from the others."
    ]


def _names(ranks: list[RankReport]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(report.rank) for report in ranks)}"
