"""How the ranks of a run find each other before they have any connection, and agree that they are one run.

Each rank leaves a card (host, process, device, digest of its config) in a store. Rank 0 waits for all cards within the
deadline, names whoever never came, compares the configs and makes the plan; the others wait for the plan. On one host
the store is a file in a folder that only this user can open; over several hosts it is a TCP store that listens only on
the address that leads to the other ranks. Nothing read from a store is ever run: it is JSON with known fields.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from torch.distributed import DistError, FileStore, PrefixStore, Store, TCPStore

from megalite.errors import ConfigError, MegaliteError, Problem, RankLost
from megalite.run.launch_env import LaunchEnv
from megalite.run.network import pid_namespace, route_to
from megalite.run.processes import Process

_POLL = 0.02
"""Seconds between two looks at the store."""
_PATIENCE = 10.0
"""Seconds the other ranks wait for rank 0's word after the deadline."""
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
    sha256: str
    """Digest of the config it was given."""
    problem: str = ""
    """Why it can't take part, for the user; '' if it can."""
    code: int = 0
    """Exit code of that problem."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


# ---- the store -------------------------------------------------------------------------------------------------------


def open_store(place: LaunchEnv, folder: Path | None, deadline: Deadline) -> Store:
    """The store through which the ranks meet; waits until rank 0 serves it. RankLost if it never does."""
    seconds = timedelta(seconds=deadline.left())
    if folder is not None and place.started_here == place.world_size:
        return FileStore(str(folder / "store"), place.world_size)
    prefix = f"megalite/{place.restart}"
    host, port = place.master_addr, place.master_port
    if place.rank == 0 and not place.agent_store:
        listener = _listen(route_to(host, port), port)
        store = TCPStore(
            host, port, None, True, seconds, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
        return PrefixStore(prefix, store)
    _wait_for_port(host, port, deadline, place)
    return PrefixStore(prefix, TCPStore(host, port, None, False, seconds, wait_for_workers=False))


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


def _wait_for_port(host: str, port: int, deadline: Deadline, place: LaunchEnv) -> None:
    """Wait for a listener; asked by ourselves because the store's own client floods the terminal while it retries."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError as error:
            if deadline.over():
                raise RankLost(
                    f"rank 0 of {place.world_size} never came within {deadline.seconds:g} s: nothing answers at "
                    f"{host}:{port}, asked from {socket.gethostname()} ({error.strerror or error}). "
                    "Look for its own message or at its host, or raise distributed.start_timeout."
                ) from error
        time.sleep(5 * _POLL)


# ---- meeting ---------------------------------------------------------------------------------------------------------


def meet(
    place: LaunchEnv,
    store: Store,
    card: RankInfo,
    config_text: str,
    deadline: Deadline,
    make_plan: Callable[[list[RankInfo]], dict[str, Any]],
) -> tuple[list[RankInfo], dict[str, Any]]:
    """All ranks' cards in rank order and the plan that rank 0 made of them. Every rank calls it.

    When the run can't begin, rank 0 raises RankLost naming ranks that never came or died, ConfigError naming a rank
    whose config differs and where, or the problem on a rank's card; the others raise SystemExit with the same exit
    code, as the user needs the story once. They raise RankLost when rank 0 itself never came.
    """
    try:
        store.set(f"text/{place.rank}", config_text)
        store.set(f"here/{place.rank}", json.dumps(asdict(card)))
        if place.rank == 0:
            plan = _lead(place, store, deadline, make_plan)
        else:
            plan = _follow(place, store, deadline)
        return [_card(store, rank) for rank in range(place.world_size)], plan
    except DistError as error:
        raise RankLost(f"rank 0 was lost while {card} started: the store at {place.master_addr} went away.") from error


def _lead(
    place: LaunchEnv, store: Store, deadline: Deadline, make_plan: Callable[[list[RankInfo]], dict[str, Any]]
) -> dict[str, Any]:
    here: list[RankInfo] = []
    try:
        _gather(store, place.world_size, deadline, here)
        _compare(store, here)
        plan = make_plan(here)
    except MegaliteError as error:
        store.set("verdict", json.dumps({"code": error.exit_code, "plan": {}}))
        until = Deadline(_LINGER)
        readers = [f"read/{card.rank}" for card in here if card.rank]
        while not until.over() and not store.check(readers):
            time.sleep(_POLL)
        raise
    store.set("verdict", json.dumps({"code": 0, "plan": plan}))
    return plan


def _follow(place: LaunchEnv, store: Store, deadline: Deadline) -> dict[str, Any]:
    while not store.check(["verdict"]):
        if deadline.over(_PATIENCE):
            here = [_card(store, rank) for rank in range(place.world_size) if store.check([f"here/{rank}"])]
            if here[0].rank != 0:
                raise RankLost(_never_came(place.world_size, here, deadline))
            raise RankLost(f"{here[0]} came but fell silent before the run began. Look for its own message.")
        time.sleep(_POLL)
    verdict = json.loads(store.get("verdict"))
    if verdict["code"]:
        store.set(f"read/{place.rank}", "")
        raise SystemExit(verdict["code"])
    return verdict["plan"]


def _gather(store: Store, world_size: int, deadline: Deadline, here: list[RankInfo]) -> None:
    """Collect the cards of all ranks in `here`, in rank order; RankLost if some don't come or die meanwhile."""
    mine = pid_namespace()
    while len(here) < world_size:
        known = {card.rank for card in here}
        new = [rank for rank in range(world_size) if rank not in known and store.check([f"here/{rank}"])]
        here += [_card(store, rank) for rank in new]
        here.sort(key=lambda card: card.rank)
        dead = next((c for c in here if c.pids == mine and not Process(c.pid, c.start).alive()), None)
        if dead is not None:
            raise RankLost(f"{dead} (pid {dead.pid}) died while the run started. Look for its own message.")
        if len(here) < world_size:
            if deadline.over():
                raise RankLost(_never_came(world_size, here, deadline))
            time.sleep(_POLL)


def _compare(store: Store, cards: Sequence[RankInfo]) -> None:
    for card in cards:
        if card.problem:
            error = MegaliteError(f"{card}: {card.problem}" if card.rank else card.problem)
            error.exit_code = card.code
            raise error
    for card in cards:
        if card.sha256 != cards[0].sha256:
            texts = [store.get(f"text/{rank}").decode() for rank in (0, card.rank)]
            raise ConfigError(_difference(cards[0], card, *texts))


def _card(store: Store, rank: int) -> RankInfo:
    return RankInfo(**json.loads(store.get(f"here/{rank}")))


def _never_came(world_size: int, here: Sequence[RankInfo], deadline: Deadline) -> str:
    missing = sorted(set(range(world_size)) - {card.rank for card in here})
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    hosts = {host: ", ".join(str(c.rank) for c in here if c.host == host) for host in sorted({c.host for c in here})}
    came = "; ".join(f"{ranks} on {host}" for host, ranks in hosts.items())
    return (
        f"{who} never came within {deadline.seconds:g} s (of {world_size}; here are {came}). "
        "Look for its own message or at its host, or raise distributed.start_timeout."
    )


def _difference(ours: RankInfo, theirs: RankInfo, our_text: str, their_text: str) -> str:
    """Names the rank whose config differs from rank 0's and the first key that does."""
    mine, other = _flat(yaml.safe_load(our_text)), _flat(yaml.safe_load(their_text))
    for key in [*mine, *(key for key in other if key not in mine)]:
        if mine.get(key, "not set") != other.get(key, "not set"):
            what = f"{key} is {other.get(key, 'not set')!r} there and {mine.get(key, 'not set')!r} on {ours}"
            break
    else:
        what = f"its sha256 is {theirs.sha256[:12]}, that of {ours} {ours.sha256[:12]}"
    return f"{theirs} was given another config: {what}. Give every rank the same file and overrides"


def _flat(value: object, path: str = "") -> dict[str, object]:
    """A nested mapping as dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{path}.{name}".lstrip(".")).items()}
