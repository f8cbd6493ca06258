"""The report at the end of a run, as plain text: a table of the ranks, the totals, and what to do about slow parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megalite.monitor.metrics import RankReport
from megalite.monitor.words import format_bytes, format_count, format_rate, wrapped

SHORT_RUN = 10.0
"""Seconds. Where the time of a run that is over sooner went says little, and nobody has waited for it."""
WAITING_IS_MUCH = 0.5
COMMUNICATION_IS_MUCH = 0.4
PREEMPTIONS_ARE_MANY = 0.1
"""For each prompt."""
UNEVEN_REPLICAS = 0.7
"""A replica that was done in less than this share of the slowest one's time."""
LOADING_SLACK = 64 * 2**20
"""Bytes a process may take for itself while it loads: imported code, buffers, threads."""

THREADS_ARE_STARVED = 0.2
"""Share of the time in which a thread could have run and had no core."""

_COLUMNS: dict[str, Callable[[RankReport], str]] = {
    "rank": lambda rank: str(rank.rank),
    "tp/pp/dp": lambda rank: f"{rank.tp}/{rank.pp}/{rank.dp}",
    "layers": lambda rank: _range(*rank.layers),
    "weights": lambda rank: format_bytes(rank.weight_bytes),
    "KV cache": lambda rank: format_bytes(rank.kv_bytes) if rank.kv_bytes else "-",
    "prefill": lambda rank: format_rate(rank.prefill_tokens, rank.prefill_seconds),
    "decode": lambda rank: format_rate(rank.decode_tokens, rank.decode_seconds),
    "memory": lambda rank: format_bytes(rank.peak_bytes),
    "busy": lambda rank: _percent(rank.share("compute")),
    "comm": lambda rank: _percent(rank.share("communication")),
    "wait": lambda rank: _percent(rank.share("waiting")),
}
"""Tokens a second; the last three are shares of the time, and what is missing to 100% is the host's own work."""
_OF_GENERATION = ("KV cache", "prefill", "decode")


def format_report(reports: Iterable[RankReport]) -> str:
    """The whole report for the ranks of a run, in any order; at least one. Lines that fit a terminal of 80 columns."""
    ranks = sorted(reports, key=lambda report: report.rank)
    left_out = ("memory",) if any(report.kv_bytes for report in ranks) else _OF_GENERATION
    columns = {name: cell for name, cell in _COLUMNS.items() if name not in left_out}
    lines = _table([tuple(columns), *(tuple(cell(report) for cell in columns.values()) for report in ranks)])
    if max(report.pp for report in ranks) > 0:
        lines.append(wrapped(_pipeline_idle(ranks)))
    lines.append(wrapped(f"total: {_totals(ranks)}"))
    lines.append(f"memory: at most {format_bytes(max(report.peak_bytes for report in ranks))} in one process")
    lines += _moved(ranks)
    lines += [wrapped(f"hint: {hint}") for hint in hints(ranks)]
    return "\n".join(lines)


def hints(ranks: list[RankReport]) -> list[str]:
    """What cost memory or speed, in plain words, and what to try; of speed only where the run was long enough."""
    found = _overloaded(ranks)
    if max(report.seconds for report in ranks) >= SHORT_RUN:
        found += _starved(ranks) or _waiting(ranks) + _communicating(ranks)
        found += _preempted(ranks) + _uneven_replicas(ranks)
    return found


def _range(lo: int, hi: int) -> str:
    return f"{lo}-{hi - 1}" if lo < hi else "none"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _mean(shares: Iterable[float]) -> float:
    values = list(shares)
    return sum(values) / len(values)


def _stages(ranks: list[RankReport]) -> dict[tuple[int, int], list[RankReport]]:
    """(replica, stage): its ranks."""
    stages: dict[tuple[int, int], list[RankReport]] = {}
    for report in ranks:
        stages.setdefault((report.dp, report.pp), []).append(report)
    return dict(sorted(stages.items()))


def _control_ranks(ranks: list[RankReport]) -> list[RankReport]:
    """Of each replica, tp rank 0 of the last stage: what it counts, it counts for the replica."""
    last = max(report.pp for report in ranks)
    return [report for report in ranks if report.pp == last and report.tp == 0]


def _pipeline_idle(ranks: list[RankReport]) -> str:
    shares = []
    for stage in sorted({report.pp for report in ranks}):
        idle = _mean(report.share("waiting") for report in ranks if report.pp == stage)
        shares.append(f"stage {stage}: {_percent(idle)}")
    return f"pipeline idle: {_percent(_mean(report.share('waiting') for report in ranks))} ({', '.join(shares)})"


def _moved(ranks: list[RankReport]) -> list[str]:
    """Bytes between ranks, by axis."""
    most = {axis: max(getattr(report, f"{axis}_bytes") for report in ranks) for axis in ("tp", "pp", "dp")}
    parts = [f"{format_bytes(count)} along {axis}" for axis, count in most.items() if count]
    return [wrapped(f"communication: at most {', '.join(parts)} by one rank")] if parts else []


def _totals(ranks: list[RankReport]) -> str:
    replicas = _control_ranks(ranks)
    prompts, failed, tokens, looked_up, cached, preemptions = (
        sum(getattr(report, name) for report in replicas)
        for name in ("prompts", "failed_prompts", "output_tokens", "prompt_tokens", "cached_tokens", "preemptions")
    )
    steps, learnt = (max(getattr(report, name) for report in ranks) for name in ("steps", "learnt_tokens"))
    seconds = max(report.seconds for report in ranks)
    if learnt:
        parts = [format_count(steps, "step")]
        tokens = learnt
    else:
        parts = [f"{format_count(prompts, 'prompt')}{f' ({failed:,} failed)' if failed else ''}"]
    parts.append(f"{format_count(tokens, 'token')} in {seconds:.1f} s")
    if tokens and seconds:
        parts.append(f"{format_rate(tokens, seconds)} tokens/s")
    if cached:
        parts.append(f"{_percent(cached / looked_up)} of prompt tokens from the prefix cache")
    if preemptions:
        parts.append(format_count(preemptions, "preemption"))
    return ", ".join(parts)


def _starved(ranks: list[RankReport]) -> list[str]:
    """Threads that fight for cores: with each other, or with other programs."""
    found = [report for report in ranks if report.starved > THREADS_ARE_STARVED]
    if not found:
        return []
    most = max(report.starved for report in found)
    return [
        f"{_names(found)} had threads that could have run and got no core for up to {_percent(most)} of the time: more "
        "threads are at work than this machine has cores. OMP_NUM_THREADS=1 often is faster by far then; or use fewer "
        "ranks, or end other programs."
    ]


def _waiting(ranks: list[RankReport]) -> list[str]:
    found = []
    stages = _stages(ranks)
    waited = {place: _mean(report.share("waiting") for report in stage) for place, stage in stages.items()}
    for replica in sorted({dp for dp, _ in stages}):
        mine = {pp: share for (dp, pp), share in waited.items() if dp == replica}
        idle = [pp for pp, share in mine.items() if share > WAITING_IS_MUCH]
        if len(mine) == 1:
            found += _waiting_on_control(stages[replica, next(iter(mine))])
        elif len(idle) == len(mine):
            found.append(
                f"all {len(mine)} stages of replica {replica} waited more than half of the time: too few prompts are "
                "in flight to fill the pipeline. Give it more prompts at once, or use a smaller parallel.pp."
            )
        elif idle:
            slow = min(mine, key=lambda pp: (mine[pp], pp))
            lo, hi = stages[replica, slow][0].layers
            names = ", ".join(f"{pp} ({_percent(mine[pp])})" for pp in idle)
            found.append(
                f"replica {replica}: stage {slow} is slow: it waited {_percent(mine[slow])} of the time, "
                f"stage {names} waited for it. It holds {format_count(hi - lo, 'layer')}; check that nothing "
                "else runs on its machine, or use a smaller parallel.pp with a larger parallel.tp."
            )
    return found


def _waiting_on_control(stage: list[RankReport]) -> list[str]:
    """One stage: its ranks wait only for the control rank's sampling."""
    idle = [report for report in stage if report.share("waiting") > WAITING_IS_MUCH]
    if not idle:
        return []
    slow = min(stage, key=lambda report: (report.share("waiting"), report.rank))
    return [
        f"{_names(idle)} waited more than half of the time for rank {slow.rank}, "
        f"which spent {_percent(slow.share('sampling'))} of it sampling."
    ]


def _communicating(ranks: list[RankReport]) -> list[str]:
    busy = [report for report in ranks if report.share("communication") > COMMUNICATION_IS_MUCH]
    if not busy:
        return []
    most = max(report.share("communication") for report in busy)
    return [
        f"{_names(busy)} spent up to {_percent(most)} of the time in communication: on these links the model is too "
        "small for this parallel.tp. Try a smaller one, with parallel.pp or parallel.dp for the other ranks."
    ]


def _preempted(ranks: list[RankReport]) -> list[str]:
    found = []
    for report in _control_ranks(ranks):
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
