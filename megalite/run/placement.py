"""Which host has which part of a layout, in words, and the tp groups that no host has whole. Imports no torch.

Launchers number ranks host after host, and tp varies fastest in a layout: so tp groups lie inside hosts, and pp and dp
go across, where every host has a multiple of tp ranks. Two sums a layer go over tp; a stage sends one message a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megalite.core.layout import Coord, Layout
from megalite.monitor.words import format_count

_T = TypeVar("_T")
MOST_HOSTS = 32
"""Hosts that are listed one by one."""


@dataclass(frozen=True)
class Host:
    """One host of a run."""

    name: str
    ranks: tuple[int, ...]


def consecutive(slots: Iterable[tuple[str, int]]) -> list[Host]:
    """Hosts with so many ranks each, numbered host after host."""
    hosts: list[Host] = []
    first = 0
    for name, count in slots:
        hosts.append(Host(name, tuple(range(first, first + count))))
        first += count
    return hosts


def by_host(layouts: Mapping[str, Layout], hosts: Sequence[Host]) -> list[str]:
    """Lines that say what of each layout, by the key of its section, every host has."""
    lines = []
    width = max(len(host.name) for host in hosts)
    for key, layout in layouts.items():
        of = f"{key}: " if len(layouts) > 1 else ""
        lines.append(f"{of}{layout} on {len(hosts)} hosts:")
        for host in hosts[:MOST_HOSTS]:
            what = _share(layout, [rank for rank in host.ranks if rank in layout.ranks])
            lines.append(f"  {host.name:{width}}  {ranks_words(host.ranks)}: {what}")
        if len(hosts) > MOST_HOSTS:
            lines.append(f"  and {len(hosts) - MOST_HOSTS} more hosts")
    return lines


def tp_inside(layout: Layout, hosts: Sequence[Host]) -> bool:
    """Every tp group is on one host."""
    return not _crossing(layout, hosts)


def warnings(layouts: Mapping[str, Layout], hosts: Sequence[Host]) -> list[str]:
    """For each layout with tp groups that are on several hosts: which, where, and what to set instead."""
    found = []
    for key, layout in layouts.items():
        if crossing := _crossing(layout, hosts):
            group, names = crossing[0]
            more = f", as {format_count(len(crossing) - 1, 'other group')}" if len(crossing) > 1 else ""
            found.append(
                f"{key}.tp={layout.tp}: ranks {', '.join(map(str, group))} are one tp group and are on "
                f"{' and '.join(names)}{more}: two sums a layer cross the network. {_remedy(key, layout, hosts)}"
            )
    return found


def _crossing(layout: Layout, hosts: Sequence[Host]) -> list[tuple[tuple[int, ...], list[str]]]:
    """The tp groups that are on several hosts, with their hosts' names."""
    place = {rank: number for number, host in enumerate(hosts) for rank in host.ranks}
    found = []
    for group in layout.groups("tp") if layout.tp > 1 else []:
        numbers = dict.fromkeys(place[rank] for rank in group)
        if len(numbers) > 1:
            found.append((group, [hosts[number].name for number in numbers]))
    return found


def _remedy(key: str, layout: Layout, hosts: Sequence[Host]) -> str:
    apart = next((host for host in hosts if host.ranks[-1] - host.ranks[0] != len(host.ranks) - 1), None)
    if apart is not None:
        return f"{apart.name} has {ranks_words(apart.ranks)}; number them host after host (srun --distribution=block)."
    fits = math.gcd(*(len(host.ranks) for host in hosts))
    tp = max(size for size in range(1, layout.tp + 1) if fits % size == 0 and layout.tp * layout.pp % size == 0)
    instead = f"{key}.tp={tp} {key}.pp={layout.tp * layout.pp // tp}"
    return f"Set {instead} to keep tp inside hosts, or give every host a multiple of {layout.tp} ranks."


def _share(layout: Layout, ranks: Sequence[int]) -> str:
    """What of a layout these ranks are: whole replicas, whole stages, parts of a stage."""
    if not ranks:
        return "no part of it"
    places = [layout.coord(rank) for rank in ranks]
    stages = _whole([(one.dp, one.pp) for one in places], layout.tp)
    replicas = _whole([dp for dp, _ in stages], layout.pp)
    parts: list[str] = []
    if replicas:
        parts.append(_range("replica", replicas))
    for dp in dict.fromkeys(dp for dp, _ in stages if dp not in replicas):
        parts.append(_range("stage", [pp for one, pp in stages if one == dp]) + _of_replica(layout, dp))
    rest: dict[tuple[int, int], list[Coord]] = {}
    for one in places:
        if (one.dp, one.pp) not in stages:
            rest.setdefault((one.dp, one.pp), []).append(one)
    for (dp, pp), some in rest.items():
        of = f" of stage {pp}" if layout.pp > 1 else ""
        parts.append(_range("tp rank", [one.tp for one in some]) + of + _of_replica(layout, dp))
    return "; ".join(parts)


def _of_replica(layout: Layout, dp: int) -> str:
    return f" of replica {dp}" if layout.dp > 1 else ""


def _whole(items: Sequence[_T], count: int) -> list[_T]:
    """The items that occur `count` times, once each."""
    return [one for one in dict.fromkeys(items) if items.count(one) == count]


def _range(what: str, numbers: Sequence[int]) -> str:
    """`stage 2`, `stages 2-4`, `stages 0, 2`."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{what}s {numbers[0]}-{numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers))}"


def ranks_words(ranks: Sequence[int]) -> str:
    """`rank 2`, `ranks 2-4`, `ranks 0, 2`."""
    return _range("rank", ranks)
