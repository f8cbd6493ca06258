"""The processes of `bench scale`: a hub, which is the watch of rank 0 as it is, and ranks that are a socket each.

Started as `python -m megalite.tools.benchmarks.simulated_ranks hub|ranks|meet TASK`, with a `Task` as JSON. They are
told what to do in lines on standard input, and answer in lines of JSON. Only `meet` imports torch, in whose stores
ranks meet.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megalite.core.progress import Progress
from megalite.run.referee import End, Peer
from megalite.run.stall import Account, Place
from megalite.run.watchdog import Watchdog, listen
from megalite.run.wire import Connection, proof

ADDRESS = "127.0.0.1"
HOST = 8
"""Ranks of a host."""
WAITED = 12.0
"""Seconds that simulated ranks say they have waited when they are told to stand still."""
_PATIENCE = 600.0
_HEADERS = 66
"""Bytes of an Ethernet, IP and TCP header with a timestamp."""


@dataclass(frozen=True)
class Task:
    """What one of the processes is."""

    world: int
    first: int = 0
    """The ranks of this process: from here"""
    last: int = 0
    """up to this one, which is not among them."""
    port: int = 0
    timeout: float = 30.0
    step_timeout: float = 1800.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def peers(self) -> list[Peer]:
        """All ranks; no process has these ids."""
        return [Peer(rank, f"host{rank // HOST}", (1 << 23) + rank) for rank in range(self.world)]


TOKEN = b"of a simulated run"


def answer(**values: object) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def usage() -> dict[str, float]:
    """CPU seconds and memory (MiB) of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {"cpu": used.ru_utime + used.ru_stime, "mib": pages * resource.getpagesize() / (1 << 20)}


# ---- the hub


def hub(task: Task) -> None:
    """Answers its port, then when all are together, its usage when it is asked, and the end."""
    listener = listen(ADDRESS)
    answer(port=listener.getsockname()[1], **usage())

    def on_end(end: End) -> None:
        answer(at=time.monotonic(), code=end.code, line=end.line, **usage())

    watchdog = Watchdog(
        rank=0,
        peers=task.peers,
        token=TOKEN,
        hub=listener,
        timeout=task.timeout,
        launchers=(),
        handle_signals=False,
        on_end=on_end,
        claim=lambda: True,
        visible=[0],
        progress=Progress(),
        step_timeout=task.step_timeout,
    )
    watchdog.start(_PATIENCE)
    watchdog.together.wait()
    answer(at=time.monotonic(), **usage())
    for _ in sys.stdin:
        answer(**usage())


# ---- the ranks


class Simulated:
    """Many ranks, each a connection to the hub that speaks as its watch would."""

    def __init__(self, task: Task):
        self.task = task
        self.selector = selectors.DefaultSelector()
        self.ends: dict[int, Connection] = {}
        """By rank."""
        self.together = 0
        self.over = False

    def run(self) -> None:
        for rank in range(self.task.first, self.task.last):
            sock = socket.create_connection((ADDRESS, self.task.port), timeout=_PATIENCE)
            one = Connection(sock, now=time.monotonic(), timeout=self.task.timeout, rank=0)
            self.ends[rank] = one
            self.selector.register(sock, selectors.EVENT_READ, lambda rank=rank: self._hear(rank))
        self.selector.register(sys.stdin, selectors.EVENT_READ, self._obey)
        while self.ends and not self.over:
            for key, _ in self.selector.select():
                key.data()
        answer(at=time.monotonic())

    def _hear(self, rank: int) -> None:
        one = self.ends[rank]
        for kind, values in one.receive():
            if kind == "nonce":
                one.send("hello", rank, proof(TOKEN, values[0], rank))
            elif kind == "together":
                self.together += 1
                if self.together == len(self.ends):
                    answer(at=time.monotonic())
            elif kind == "ask":
                one.send("account", account_of(rank, self.task.world))
            elif kind == "end":
                one.broken = "over"
        if one.broken:
            self._drop(rank)

    def _drop(self, rank: int) -> None:
        one = self.ends.pop(rank)
        self.selector.unregister(one.socket)
        one.close()

    def _obey(self) -> None:
        """`lose FIRST LAST`, `still`, or `traffic`."""
        command, *numbers = sys.stdin.readline().split() or ["end"]
        if command == "lose":
            answer(at=time.monotonic())
            for rank in range(*map(int, numbers)):
                self._drop(rank)
        elif command == "still":
            answer(at=time.monotonic())
            for one in self.ends.values():
                one.send("still")
        elif command == "traffic":
            answer(bytes=sum(traffic(one.socket) for one in self.ends.values()))
        else:
            self.over = True


def traffic(sock: socket.socket) -> int:
    """Bytes of a connection in both directions, headers and the kernel's probes included (Linux's tcp_info)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    acknowledged, received, sent_segments, received_segments = struct.unpack_from("=QQII", info, 120)
    return int(acknowledged + received + _HEADERS * (sent_segments + received_segments))


def account_of(rank: int, world: int) -> str:
    """What a rank says of itself that waits with all others for the last one, in a collective of all but rank 0."""
    import msgspec

    late = rank == world - 1
    place = Place(
        name="world",
        ranks=tuple(range(1, world)),
        flow=False,
        entered=811 if late else 812,
        operation="all_reduce",
        inside=not late,
    )
    own = tuple(range(rank - rank % HOST, min(world, rank - rank % HOST + HOST)))
    tp = Place(name="tp", ranks=own, flow=False, entered=5000, operation="all_reduce", inside=False)
    stack = ("model.py:1 in forward",) * 12
    told = Account(still=WAITED, finished=False, step=("step", 130), layer=None, places=(tp, place), stack=stack)
    return msgspec.json.encode(told).decode()


# ---- how ranks meet


def meet_all(task: Task) -> None:
    """The ranks of this process meet those of others, as threads over the store of several hosts."""
    from megalite.run import rendezvous
    from megalite.run.launch_env import LaunchEnv

    began, took = threading.Event(), {}

    def one(rank: int) -> None:
        env = LaunchEnv(
            rank=rank,
            world_size=task.world,
            local_rank=rank % HOST,
            started_here=HOST,
            master_addr=ADDRESS,
            master_port=task.port,
        )
        deadline = rendezvous.Deadline(_PATIENCE)
        began.wait()
        store = rendezvous.open_store(env, None, deadline)
        ranks, _ = rendezvous.meet(env, store, introduced(rank), "a: 1\n", deadline, lambda here: "gloo")
        assert len(ranks) == task.world
        took[rank] = store  # which rank 0 serves, and is kept until all are done

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(task.first, task.last)]
    for thread in threads:
        thread.start()
    answer(**usage())
    sys.stdin.readline()
    at = time.monotonic()
    began.set()
    for thread in threads:
        thread.join(_PATIENCE)
    answer(began=at, at=time.monotonic(), met=len(took), **usage())
    sys.stdin.readline()
    os._exit(0)


def introduced(rank: int) -> Any:
    """What a simulated rank says of itself: as long as what a real one says."""
    from megalite.run.facts import RankInfo

    host = f"host{rank // HOST:04d}"
    machine = f"{rank // HOST:08x}-0000-4000-8000-000000000000"
    return RankInfo(
        rank=rank,
        host=host,
        pid=(1 << 23) + rank,
        start=123456789,
        machine=machine,
        pids=f"{machine}/4026531836",
        network=f"{machine}/4026531840",
        address=f"10.0.{rank // HOST // 256}.{rank // HOST % 256}",
        device=f"cuda:{rank % HOST}",
        gpu=f"GPU-{rank:08x}-0000-4000-8000-000000000000",
        model="NVIDIA H100 80GB HBM3",
        free=80 << 30,
        facts={name: "0" * 16 for name in ("config", "input", "checkpoint", "torch", "CUDA")},
        hub=[ADDRESS, 1] if rank == 0 else None,
        token="0" * 64 if rank == 0 else "",
    )


ROLES: dict[str, Callable[[Task], None]] = {
    "hub": hub,
    "ranks": lambda task: Simulated(task).run(),
    "meet": meet_all,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](Task(**json.loads(sys.argv[2])))
