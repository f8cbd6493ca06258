"""The report at the end of a run, as plain text: a table of the ranks, the totals, and what to do about slow parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

from megalite.monitor.advice import control_ranks, hints
from megalite.monitor.metrics import RankReport
from megalite.monitor.words import COLUMNS, format_bytes, format_count, format_percent, format_rate, wrapped

_COLUMNS: dict[str, Callable[[RankReport], str]] = {
    "rank": lambda rank: str(rank.rank),
    "tp/pp/dp": lambda rank: f"{rank.tp}/{rank.pp}/{rank.dp}",
    "layers": lambda rank: _range(*rank.layers),
    "weights": lambda rank: format_bytes(rank.weight_bytes),
    "KV cache": lambda rank: format_bytes(rank.kv_bytes) if rank.kv_bytes else "-",
    "prefill": lambda rank: format_rate(rank.prefill_tokens, rank.prefill_seconds),
    "decode": lambda rank: format_rate(rank.decode_tokens, rank.decode_seconds),
    "memory": lambda rank: format_bytes(rank.peak_bytes),
    "busy": lambda rank: format_percent(rank.share("compute")),
    "comm": lambda rank: format_percent(rank.share("communication")),
    "wait": lambda rank: format_percent(rank.share("waiting")),
    "host": lambda rank: format_percent(rank.share("scheduling") + rank.share("sampling")),
}
"""Tokens a second; the last four are shares of the time: forward and backward passes, collectives and messages, waiting
for another rank, scheduling and sampling. On a device the first three are its own time, beside the host's."""
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
    lines += _moved(ranks) + _queue(ranks)
    lines += [wrapped(f"hint: {hint}") for hint in hints(ranks)]
    return "\n".join(lines)


def _range(lo: int, hi: int) -> str:
    return f"{lo}-{hi - 1}" if lo < hi else "none"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Right-aligned, two spaces apart; one, from the right on, where a terminal has no room for two."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    close = max(0, sum(widths) + 2 * (len(widths) - 1) - COLUMNS)
    padded = [width + (2 if place < len(widths) - close else 1) for place, width in enumerate(widths)]
    padded[0] = widths[0]
    return ["".join(cell.rjust(width) for cell, width in zip(row, padded, strict=True)) for row in rows]


def _pipeline_idle(ranks: list[RankReport]) -> str:
    shares = []
    for stage in sorted({report.pp for report in ranks}):
        idle = fmean(report.share("waiting") for report in ranks if report.pp == stage)
        shares.append(f"stage {stage}: {format_percent(idle)}")
    return f"pipeline idle: {format_percent(fmean(report.share('waiting') for report in ranks))} ({', '.join(shares)})"


def _moved(ranks: list[RankReport]) -> list[str]:
    """What went between ranks, by group: of the rank that had most of it."""
    lines = []
    for group in ("tp", "pp", "dp"):
        of_group = [report.traffic[group] for report in ranks if group in report.traffic]
        if not of_group:
            continue
        most = max(of_group, key=lambda traffic: traffic.bytes)
        line = (
            f"along {group}: at most {format_bytes(most.bytes)} by a rank, in {format_count(most.messages, 'message')}"
        )
        line += f" of {format_bytes(most.message_bytes)}"
        timed = max((traffic.bandwidth for traffic in of_group), default=0.0)
        lines.append(wrapped(line + (f", {format_bytes(int(timed))}/s" if timed else "")))
    return lines


def _queue(ranks: list[RankReport]) -> list[str]:
    """Sequences that ran and that waited for a place."""
    replicas = [report for report in control_ranks(ranks) if report.seconds > 0]
    queued, running = (
        sum(getattr(report, f"{name}_seconds") / report.seconds for report in replicas)
        for name in ("queued", "running")
    )
    if queued < 0.5:
        return []
    prompts = max(1, sum(report.prompts for report in replicas))
    each = sum(report.queued_seconds for report in replicas) / prompts
    return [wrapped(f"queue: {running:.0f} sequences ran and {queued:.0f} waited on average, {each:.1f} s a prompt")]


def _totals(ranks: list[RankReport]) -> str:
    replicas = control_ranks(ranks)
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
        parts.append(f"{format_percent(cached / looked_up)} of prompt tokens from the prefix cache")
    if preemptions:
        parts.append(format_count(preemptions, "preemption"))
    return ", ".join(parts)
