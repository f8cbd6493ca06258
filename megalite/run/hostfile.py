"""Hostfiles as DeepSpeed's launcher reads them, and which ranks that makes for each host. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.errors import ConfigError, Problem
from megalite.run.placement import Host, consecutive

_INCLUDE, _EXCLUDE = "--include", "--exclude"


def read_hostfile(path: str) -> dict[str, int]:
    """How many ranks each host starts, in the file's order; ConfigError if it can't be read."""
    slots: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(key="--hostfile", rule=f"can't be read: {error}", value=path)) from error
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            if len(words) != 2 or not (found := re.fullmatch(r"slots=(\d+)", words[1])):
                raise ConfigError(Problem(key=f"{path}:{number}", rule="must be `HOST slots=NUMBER`", value=line))
            if words[0] in slots:
                fix = "Keep one line, with all its slots."
                raise ConfigError(Problem(key=f"{path}:{number}", rule=f"{words[0]} has a line already", fix=fix))
            slots[words[0]] = int(found[1])
    if not slots:
        raise ConfigError(Problem(key="--hostfile", rule="names no host", value=path, fix="Write `HOST slots=NUMBER`."))
    return slots


def hosts_of(options: Sequence[str]) -> list[Host]:
    """The hosts and their ranks of a run that deepspeed is told to start with `options`; ConfigError: there are none.

    `--include` and `--exclude` are `HOST[:SLOT,SLOT...]`, several joined by `@`: what takes part, or what does not.
    """
    given = dict(zip(options[::2], options[1::2], strict=False))
    path = given["--hostfile"]
    slots = {name: list(range(count)) for name, count in read_hostfile(path).items()}
    if _INCLUDE in given and _EXCLUDE in given:
        raise ConfigError(Problem(key=_EXCLUDE, rule="can't be given together with --include", fix="Keep one."))
    if _INCLUDE in given:
        slots = _filter(_INCLUDE, given[_INCLUDE], slots)
    elif _EXCLUDE in given:
        out = _filter(_EXCLUDE, given[_EXCLUDE], slots)
        slots = {name: [one for one in each if one not in out.get(name, [])] for name, each in slots.items()}
    hosts = consecutive((name, len(each)) for name, each in slots.items() if each)
    if not hosts:
        raise ConfigError(Problem(key=_EXCLUDE, rule=f"leaves no host of {path}", value=given.get(_EXCLUDE)))
    _check_others(given, "--no_ssh" in options, len(hosts))
    return hosts


def _check_others(given: Mapping[str, str], is_without_ssh: bool, hosts: int) -> None:
    """ConfigError where deepspeed's launcher would fail at what it is told besides hosts."""
    bounds = {"--master_port": (1, 65535), "--ssh_port": (1, 65535), "--node_rank": (0, hosts - 1)}
    for option, (least, most) in bounds.items():
        value = given.get(option, str(least))
        if not (value.isascii() and value.isdecimal() and least <= int(value[:9]) <= most):
            fix = "Hosts are counted from 0, in the hostfile's order." if option == "--node_rank" else ""
            rule = f"must be a whole number from {least} to {most}"
            raise ConfigError(Problem(key=option, rule=rule, value=value, fix=fix))
    missing = [option for option in ("--node_rank", "--master_addr") if option not in given]
    if is_without_ssh and missing:
        rule, fix = f"needs {' and '.join(missing)}", "Start each host by itself: docs/hosts.md shows how."
        raise ConfigError(Problem(key="--no_ssh", rule=rule, fix=fix))
    if "--node_rank" in given and not is_without_ssh:
        raise ConfigError(Problem(key="--node_rank", rule="needs --no_ssh: else the launcher numbers the hosts"))


def _filter(option: str, text: str, slots: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The slots that a filter names."""
    found: dict[str, list[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in slots:
            fix = f"There are: {', '.join(slots)}."
            raise ConfigError(Problem(key=option, rule="names a host that is not in the hostfile", value=name, fix=fix))
        chosen = numbers.split(",") if colon else [str(one) for one in slots[name]]
        if not all(one.isdecimal() and int(one) in slots[name] for one in chosen):
            rule = f"names slots that {name} does not have"
            raise ConfigError(Problem(key=option, rule=rule, value=numbers, fix="Slots are counted from 0."))
        found[name] = sorted({*found.get(name, []), *map(int, chosen)})
    return {name: found[name] for name in slots if name in found}


def check_ranks(hosts: Sequence[Host], num_ranks: int) -> None:
    """ConfigError unless the hosts start as many ranks as the layout needs."""
    slots = sum(len(host.ranks) for host in hosts)
    if slots != num_ranks:
        rule = f"its hosts start {slots} ranks, and the layout needs {num_ranks} (parallel.tp * pp * dp)"
        raise ConfigError(Problem(key="--hostfile", rule=rule, fix="Change one of them, or use --include."))
