"""How the ranks of a run find each other before they have any connection, and agree that they are one run.

Each rank leaves its `RankInfo` (host, process, device, what must be alike) in a store, under the number of its arrival.
Rank 0 waits for all of them within the deadline, names whoever never came, compares what they say, chooses the back end
and leaves its verdict and the list of all; the others wait for that. So a rank makes a few requests, however many
ranks there are. On one host the store is a file in a folder that only this user can open; over several hosts it is a
TCP store that listens only on the address that leads to the other ranks. Nothing read from a store is ever run: it is
JSON with known fields.
"""

from __future__ import annotations

import base64
import errno
import json
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import yaml
from torch.distributed import DistError, FileStore, HashStore, PrefixStore, Store, TCPStore

from megalite.errors import ConfigError, MegaliteError, Problem, RankLost
from megalite.run.facts import RankInfo, differences, hosts_of, refusals, table
from megalite.run.launch_env import LaunchEnv
from megalite.run.network import pid_namespace, route_to, way_to
from megalite.run.placement import ranks_words
from megalite.run.processes import Process

_POLL = 0.02
"""Seconds between two looks at the store,"""
_AT_A_TIME = 64
"""of so many ranks; more look less often, since one process serves them all."""
_PATIENCE = 10.0
"""Seconds the other ranks wait for rank 0's word after the deadline."""
_AFTER_PROBLEM = 20.0
"""Seconds rank 0 waits for the others, which may have problems too, when one has come that can't take part."""
_LINGER = 2.0
"""Seconds rank 0, which may serve the store, stays after bad news so that all can read it."""


class Deadline:
    """The end of `seconds` from now."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain, at least a moment, for calls that need a timeout."""
        return max(0.1, self._end - time.monotonic())

    def over(self, extra: float = 0.0) -> bool:
        return time.monotonic() >= self._end + extra


class RanksRefuse(ConfigError):
    """Ranks can't take part, for reasons that are said as they came."""

    def __init__(self, reasons: Sequence[str], exit_code: int):
        MegaliteError.__init__(self, "\n".join(reasons))
        self._reasons = reasons
        self.exit_code = exit_code

    def lines(self) -> list[str]:
        return [f"error: {reason}" for reason in self._reasons]


class RanksDiffer(ConfigError):
    """Ranks do not have alike what they must; shown with the table of all."""

    def __init__(self, problems: Sequence[Problem], ranks: Sequence[RankInfo]):
        super().__init__(*problems)
        self._table = table(ranks)

    def lines(self) -> list[str]:
        return [*self._table, "", *super().lines()]


# ---- the store -------------------------------------------------------------------------------------------------------


def open_store(env: LaunchEnv, folder: Path | None, deadline: Deadline) -> Store:
    """The store through which the ranks meet; waits until rank 0 serves it. RankLost if it never does."""
    seconds = timedelta(seconds=deadline.left())
    if env.world_size == 1:
        return HashStore()
    if folder is not None and env.started_here == env.world_size:
        return FileStore(str(folder / "store"), env.world_size)
    host, port = env.master_addr, env.master_port
    serves = env.rank == 0 and not env.agent_store
    listener = _listen(route_to(host, port), port).detach() if serves else None
    if not serves:
        _wait_for_port(env, deadline)
    store = TCPStore(host, port, None, serves, seconds, wait_for_workers=False, master_listen_fd=listener)
    return PrefixStore(f"megalite/{env.restart}", store)


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        fix = "Another run uses it; give another one (deepspeed --master_port)."
        raise ConfigError(Problem(key="MASTER_PORT", rule=f"is taken on {address}", value=port, fix=fix)) from error
    listener.listen(1024)
    return listener


def _wait_for_port(env: LaunchEnv, deadline: Deadline) -> None:
    """Wait for a listener; asked by ourselves because the store's own client floods the terminal while it retries."""
    host, port = env.master_addr, env.master_port
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError as error:
            if deadline.over():
                raise RankLost(
                    f"rank 0 of {env.world_size} never came within {deadline.seconds:g} s: nothing answers at "
                    f"{host}:{port}, asked from {way_to(host, port)}: {error.strerror or error}. "
                    "Look for its own message, at a firewall between them, or raise distributed.start_timeout."
                ) from error
        time.sleep(5 * _POLL)


# ---- meeting ---------------------------------------------------------------------------------------------------------


def meet(
    env: LaunchEnv,
    store: Store,
    info: RankInfo,
    config_text: str,
    deadline: Deadline,
    choose: Callable[[list[RankInfo]], str],
) -> tuple[list[RankInfo], str]:
    """What all ranks say of themselves, in rank order, and the back end that rank 0 chose for them. All ranks call it.

    When the run can't begin, rank 0 raises RankLost naming ranks that never came or died, RanksDiffer naming all that
    differs between them, or ConfigError with the problems that ranks have; the others raise SystemExit with the same
    exit code, as the user is told once. They raise RankLost when rank 0 itself never came.
    """
    try:
        store.set(f"text/{env.rank}", config_text)
        store.set(f"here/{store.add('came', 1)}", json.dumps(asdict(info)))
        return _lead(env, store, deadline, choose) if env.rank == 0 else _follow(env, store, deadline)
    except DistError as error:
        raise RankLost(f"rank 0 was lost while {info} started: its store went away. {_meeting_place(env)}") from error


def _lead(
    env: LaunchEnv, store: Store, deadline: Deadline, choose: Callable[[list[RankInfo]], str]
) -> tuple[list[RankInfo], str]:
    here: list[RankInfo] = []
    try:
        _gather(env, store, deadline, here)
        _compare(store, here)
        backend = choose(here)
    except MegaliteError as error:
        store.set("verdict", json.dumps([error.exit_code, ""]))
        until = Deadline(_LINGER)
        readers = [f"read/{other.rank}" for other in here if other.rank]
        while not until.over() and not store.check(readers):
            time.sleep(_POLL)
        raise
    everyone = json.dumps([asdict(info) for info in here]).encode()
    store.set("ranks", base64.b85encode(zlib.compress(everyone)).decode())
    store.set("verdict", json.dumps([0, backend]))
    return here, backend


def _follow(env: LaunchEnv, store: Store, deadline: Deadline) -> tuple[list[RankInfo], str]:
    while not store.check(["verdict"]):
        if deadline.over(_PATIENCE):
            here = sorted(_arrived(store, set()), key=lambda info: info.rank)
            if here[0].rank != 0:
                raise RankLost(_never_came(env, here, deadline))
            raise RankLost(f"{here[0]} came but fell silent before the run began. Look for its own message.")
        time.sleep(_POLL * max(1, env.world_size // _AT_A_TIME))
    code, backend = json.loads(store.get("verdict"))
    if code:
        store.set(f"read/{env.rank}", "")
        raise SystemExit(code)
    everyone = json.loads(zlib.decompress(base64.b85decode(store.get("ranks"))))
    return [RankInfo(**one) for one in everyone], str(backend)


def _arrived(store: Store, known: set[int]) -> list[RankInfo]:
    """What those say that have come besides the numbers that are `known`, to which theirs are added."""
    there = (number for number in range(1, store.add("came", 0) + 1) if number not in known)
    new = [number for number in there if store.check([f"here/{number}"])]
    known.update(new)
    return [RankInfo(**json.loads(store.get(f"here/{number}"))) for number in new]


def _gather(env: LaunchEnv, store: Store, deadline: Deadline, here: list[RankInfo]) -> None:
    """Collect the ranks in `here`, in rank order: all, unless one of them has a problem and others don't come soon.

    RankLost if some don't come or die meanwhile.
    """
    mine, known = pid_namespace(), set[int]()
    patience = None
    while len(here) < env.world_size:
        here += _arrived(store, known)
        here.sort(key=lambda info: info.rank)
        if patience is None and any(info.problem for info in here):
            patience = Deadline(_AFTER_PROBLEM)
        for info in here:
            if not info.problem and info.pids == mine and not Process(info.pid, info.start).alive():
                raise RankLost(f"{info} (pid {info.pid}) died while the run started. Look for its own message.")
        if len(here) < env.world_size:
            if patience is not None and (patience.over() or deadline.over()):
                return
            if deadline.over():
                raise RankLost(_never_came(env, here, deadline))
            time.sleep(_POLL)


def _compare(store: Store, ranks: Sequence[RankInfo]) -> None:
    if reasons := refusals(ranks):
        raise RanksRefuse(reasons, next(info.code for info in ranks if info.problem))

    def config_of(rank: int) -> dict[str, object]:
        return _flat(yaml.safe_load(store.get(f"text/{rank}")))

    if problems := differences(ranks, config_of):
        raise RanksDiffer(problems, ranks)


def _never_came(env: LaunchEnv, here: Sequence[RankInfo], deadline: Deadline) -> str:
    missing = sorted(set(range(env.world_size)) - {info.rank for info in here})
    came = "; ".join(f"{', '.join(map(str, host.ranks))} on {host.name}" for host in hosts_of(here))
    return (
        f"{ranks_words(missing)} never came within {deadline.seconds:g} s (of {env.world_size}; here are {came}). "
        f"{_meeting_place(env)}Look for {'its' if len(missing) == 1 else 'their'} own message, or raise "
        "distributed.start_timeout."
    )


def _meeting_place(env: LaunchEnv) -> str:
    """Where the ranks of several hosts meet, as a sentence."""
    if env.started_here == env.world_size:
        return ""
    own = way_to(env.master_addr, env.master_port)
    return f"The ranks meet at {env.master_addr}:{env.master_port}; this one is {own}. "


def _flat(value: object, path: str = "") -> dict[str, object]:
    """A nested mapping as dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{path}.{name}".lstrip(".")).items()}
