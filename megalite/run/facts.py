"""What a rank says of itself when the ranks meet, what they must have alike, and the table of it. Imports no torch.

Compared is what would make results wrong, or a collective hang, an hour later: the config, the files that every rank
reads, and the versions of what computes. It is compared before a weight is read, and all that differs is said at once.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import megalite
from megalite.core.layout import Layout
from megalite.errors import Problem
from megalite.monitor.words import aligned, format_bytes
from megalite.run.placement import Host, ranks_words

CONFIG, DRIVER = "config", "driver"
_FIXES = {
    CONFIG: "Give every rank the same file and overrides.",
    "megalite": "Bring every host to the same commit, or install the same version.",
    **dict.fromkeys(("torch", "python", "cuda", "deepspeed"), "Install the same version on every host."),
}
_FILES_DIFFER = "Copy it anew to every host, or keep it on a file system that they share."
_HEXADECIMAL = 10
"""Digits of a digest that are shown."""
_DRIVER_FILE = "/proc/driver/nvidia/version"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a rank was given to do."""

    sha256: str
    """Digest of the config."""
    config_text: str
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """The run's layouts, by the keys of their sections."""
    files: Callable[[], dict[str, str]] = dict
    """Digests of the files that every rank reads, by key of the config; takes as long as reading some of them."""


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """What a rank says of itself when it comes."""

    rank: int
    host: str
    pid: int
    start: int
    """Start time of the process, see `Process`."""
    machine: str
    """Same for all ranks that share memory and devices."""
    pids: str
    """Same for all ranks that see each other's processes."""
    network: str
    """Same for all ranks whose loopback interface is the same one."""
    address: str
    """This host's address on the way to the master."""
    device: str
    """`cpu` or `cuda`."""
    gpu: str
    """Unique name of the GPU this rank uses; '' on cpu."""
    model: str = ""
    """What kind of GPU that is."""
    free: int = 0
    """Bytes of the device's memory that nobody uses."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What all ranks must have alike, as short texts; '' where this rank does not know yet."""
    hub: Sequence[Any] | None = None
    """Address and port of rank 0's watch."""
    token: str = ""
    """What rank 0's watch and the others know each other by, in hexadecimal digits."""
    problem: str = ""
    """Why it can't take part, for the user, a line each; '' if it can."""
    code: int = 0
    """Exit code of that problem."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def facts_of(given: Given, *, torch: str, cuda: str | None, thorough: bool) -> dict[str, str]:
    """What this rank must have as the others. `thorough`: they may have other files and versions than this one, as
    ranks of other hosts may."""
    found = {CONFIG: given.sha256[:_HEXADECIMAL]}
    if not thorough:
        return found
    found |= {key: digest[:_HEXADECIMAL] for key, digest in given.files().items()}
    found["megalite"] = f"{megalite.__version__}+{_own_code()}"
    found["torch"] = torch
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    found |= {"cuda": cuda} if cuda else {}
    with suppress(metadata.PackageNotFoundError):
        found["deepspeed"] = metadata.version("deepspeed")
    with suppress(OSError):
        if version := re.search(r"\b\d+\.\d+(\.\d+)*\b", Path(_DRIVER_FILE).read_text()):
            found[DRIVER] = version[0]
    return found


def _own_code() -> str:
    """Digest of this package's sources, by which checkouts of one version are told apart."""
    digest = sha256()
    root = Path(megalite.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def hosts_of(ranks: Sequence[RankInfo]) -> list[Host]:
    """The hosts of a run, in the order of their first ranks; two of one name are told apart by their addresses."""
    found: dict[tuple[str, str, str], list[RankInfo]] = {}
    for info in ranks:
        found.setdefault((info.host, info.machine, info.network), []).append(info)
    names = [name for name, *_ in found]
    return [
        Host(name if names.count(name) == 1 else f"{name} ({some[0].address})", tuple(info.rank for info in some))
        for (name, *_), some in found.items()
    ]


# ---- what differs ----------------------------------------------------------------------------------------------------


def differences(ranks: Sequence[RankInfo], config_of: Callable[[int], Mapping[str, object]]) -> list[Problem]:
    """What the ranks do not have alike though they must, with the ranks and values; all of it.

    `config_of` gives a rank's config by dotted keys.
    """
    found = []
    for key in dict.fromkeys(key for info in ranks for key in info.facts if key != DRIVER):
        values = {info.rank: info.facts.get(key, "") for info in ranks}
        if len({value for value in values.values() if value}) > 1:
            found += _configs_differ(ranks, values, config_of) if key == CONFIG else []
            fix = _FIXES.get(key, _FILES_DIFFER)
            found += [Problem(key=key, rule=_by_value(ranks, values), fix=fix)] if key != CONFIG else []
    return found


def driver_warning(ranks: Sequence[RankInfo]) -> str | None:
    """Drivers that differ, with which a run may well go on."""
    values = {info.rank: info.facts.get(DRIVER, "") for info in ranks}
    return f"{DRIVER}: {_by_value(ranks, values)}" if len(set(values.values()) - {""}) > 1 else None


def _configs_differ(
    ranks: Sequence[RankInfo], digests: Mapping[int, str], config_of: Callable[[int], Mapping[str, object]]
) -> list[Problem]:
    """A problem for each key that configs differ in."""
    first = {digest: rank for rank, digest in reversed(list(digests.items()))}
    configs = {digest: config_of(rank) for digest, rank in first.items()}
    found = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        by_digest = {digest: repr(config[key]) if key in config else "not set" for digest, config in configs.items()}
        if len(set(by_digest.values())) > 1:
            values = {rank: by_digest[digest] for rank, digest in digests.items()}
            found.append(Problem(key=key, rule=_by_value(ranks, values), fix=_FIXES[CONFIG]))
    return found or [Problem(key=CONFIG, rule=_by_value(ranks, digests), fix=_FIXES[CONFIG])]


def _by_value(ranks: Sequence[RankInfo], values: Mapping[int, str]) -> str:
    """`is 2 on ranks 0-1 (a) and 4 on rank 2 (b)`, rank 0's value first."""
    holders: dict[str, list[RankInfo]] = {}
    for info in ranks:
        if values[info.rank]:
            holders.setdefault(values[info.rank], []).append(info)
    return "is " + " and ".join(f"{value} on {_names(some)}" for value, some in holders.items())


def _names(ranks: Sequence[RankInfo]) -> str:
    """`ranks 0-1 (a)`, `ranks 0-127 (a and 15 more hosts)`."""
    hosts = list(dict.fromkeys(info.host for info in ranks))
    where = " and ".join(hosts) if len(hosts) < 3 else f"{hosts[0]} and {len(hosts) - 1} more hosts"
    return f"{ranks_words([info.rank for info in ranks])} ({where})"


def refusals(ranks: Sequence[RankInfo]) -> list[str]:
    """Why ranks can't take part, each reason once, with those that have it unless all do. Indented lines of a reason
    go on from the one before."""
    reasons: dict[str, list[RankInfo]] = {}
    for info in ranks:
        for reason in re.split(r"\n(?! )", info.problem) if info.problem else ():
            reasons.setdefault(reason, []).append(info)
    return [reason if len(some) == len(ranks) else f"{_names(some)}: {reason}" for reason, some in reasons.items()]


# ---- the table -------------------------------------------------------------------------------------------------------


def summary(ranks: Sequence[RankInfo]) -> str:
    """One line that says that all agree, and on what."""
    known: dict[str, str] = {}
    for info in ranks:
        known |= {key: value for key, value in info.facts.items() if value and key != DRIVER}
    on = f"on {len(hosts)} hosts " if len(hosts := hosts_of(ranks)) > 1 else ""
    return f"{len(ranks)} ranks {on}agree: {', '.join(f'{key} {value}' for key, value in known.items())}"


def table(ranks: Iterable[RankInfo]) -> list[str]:
    """A line for each rank, under a head."""
    rows = [
        {
            "rank": str(info.rank),
            "host": info.host,
            "address": info.address,
            "device": f"{info.device} {info.model}".strip(),
            "free memory": format_bytes(info.free),
            **{key: value or "-" for key, value in info.facts.items()},
        }
        for info in ranks
    ]
    return aligned(rows, missing="-", left=True)
