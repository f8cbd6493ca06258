"""One rank of a run that only watches itself, without torch, and the launcher of such ranks.

test_watchdog.py and test_launcher.py run it.

`watched_rank.py launch FOLDER TIMEOUT BEHAVIOUR...` starts one rank for each behaviour and waits for them all.
`watched_rank.py rank FOLDER TIMEOUT RANK WORLD BEHAVIOUR` is such a rank. STEP_TIMEOUT: seconds, in the environment.
`watched_rank.py FOLDER BEHAVIOUR,BEHAVIOUR...` is one that the door started; with a timeout behind, on one of several
hosts, which share the folder.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from megalite.core.progress import Progress
from megalite.run.hosts import tell_the_door
from megalite.run.launch_env import door_of
from megalite.run.network import route_to
from megalite.run.processes import Process, die_with_parent, launchers
from megalite.run.referee import Peer
from megalite.run.status import StatusFile
from megalite.run.watchdog import ORPHAN_WAIT, Watchdog, listen

STEP_TIMEOUT = float(os.environ.get("STEP_TIMEOUT", "3"))
LOOPBACK = "127.0.0.1"
PATIENCE = 300.0
"""Seconds for the ranks to meet."""


def launch(folder: str, timeout: str, behaviours: list[str]) -> int:
    world = str(len(behaviours))
    command = [sys.executable, "-S", __file__, "rank", folder, timeout]
    ranks = [subprocess.Popen([*command, str(rank), world, what]) for rank, what in enumerate(behaviours)]
    codes = [rank.wait() for rank in ranks]
    (Path(folder) / "codes").write_text(json.dumps(codes))
    return max(codes)


def put(path: Path, value: object) -> None:
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)


def meet(folder: Path, rank: int, world: int, address: str, port: int) -> list[dict]:
    host = "here" if address == LOOPBACK else socket.gethostname()
    put(folder / f"card-{rank}", {"pid": os.getpid(), "address": address, "port": port, "host": host})
    cards = [folder / f"card-{other}" for other in range(world)]
    while not all(path.exists() for path in cards):
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in cards]


def stand_still(progress: Progress, what: str, world: int, number: int, seconds: int = 0) -> None:
    """Wait in an all_reduce `number` over all ranks; or never come to it, `seconds` of that holding Python's lock."""
    track = progress.track("tp", tuple(range(world)))
    for _ in range(number - 1):
        track.begun("all_reduce")
    progress.step, progress.layer = ("step", 130), 5
    if what == "in":
        with track.entering("all_reduce"):
            threading.Event().wait()
    ctypes.PyDLL(None).sleep(seconds)
    threading.Event().wait()


def rank(folder: Path, timeout: float, rank: int, world: int, behaviour: str, address: str = LOOPBACK) -> int:
    if behaviour == "late":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        (folder / f"loads-{rank}").touch()
        time.sleep(3600)
    (folder / f"come-{rank}").touch()
    listener = listen(address) if rank == 0 else None
    cards = meet(folder, rank, world, address, listener.getsockname()[1] if listener else 0)

    def claim() -> bool:
        try:
            (folder / ("told" if address == LOOPBACK else f"told-{address}")).open("x").close()
        except FileExistsError:
            return False
        return True

    door, pipe = door_of(os.environ) or (None, None)
    status = StatusFile(None, pipe)
    status.peers = [Peer(other, card["host"], card["pid"]) for other, card in enumerate(cards)]

    def on_end(end) -> None:
        (folder / f"end-{rank}").write_text(json.dumps([end.code, end.speaker, end.lost]))
        status.ended(end)

    progress = Progress()
    watchdog = Watchdog(
        rank=rank,
        peers=status.peers,
        token=b"secret" if behaviour != "stranger" else b"guess",
        hub=listener or (cards[0]["address"], cards[0]["port"]),
        timeout=timeout,
        launchers=launchers(Process.of(os.getpid()), door),
        orphan_wait=ORPHAN_WAIT if door is None or address != LOOPBACK else 0.0,
        handle_signals=True,
        on_end=on_end,
        claim=claim,
        visible=[other for other, card in enumerate(cards) if card["address"] == address],
        progress=progress,
        step_timeout=STEP_TIMEOUT,
    )
    watchdog.start(PATIENCE)
    die_with_parent(0)
    while not watchdog.together.wait(1.0):
        put(folder / f"missing-{rank}", watchdog.missing())
    if rank == 0:
        status.running()
    (folder / f"ready-{rank}").touch()
    what, _, detail = behaviour.partition(":")
    if what in ("in", "before"):
        stand_still(progress, what, world, *map(int, detail.split(",")))
    if what == "hog":
        ctypes.PyDLL(None).sleep(int(detail))  # holds the interpreter's lock, as one long json.dumps does
    if what == "stuck":
        threading.Event().wait()
    if what == "deaf":  # to what it is asked
        while watchdog.signal_received is None:
            time.sleep(0.02)
        (folder / f"signalled-{rank}").touch()
        threading.Event().wait()
    if what == "vanish":
        os._exit(0)
    if what == "fail" or what == "crash":
        end = watchdog.fail(int(detail), crash=what == "crash")
    elif what == "work":
        until = time.monotonic() + float(detail or 3600)
        while watchdog.signal_received is None and time.monotonic() < until and not (folder / "over").exists():
            time.sleep(0.02)
        end = watchdog.finish(128 + watchdog.signal_received if watchdog.signal_received else 0)
    else:
        end = watchdog.finish()
    if end.speaker == rank:
        print(f"rank {rank} speaks: {behaviour}", file=sys.stderr, flush=True)
    if end.code == 0:
        watchdog.close()
        print(f"rank {rank} done", flush=True)
    return end.code


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch(sys.argv[2], sys.argv[3], sys.argv[4:]))
    if sys.argv[1] != "rank":
        number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        folder, behaviour = Path(sys.argv[1]), sys.argv[2].split(",")[number]
        if sys.argv[3:]:
            tell_the_door()
            address = route_to(os.environ["MASTER_ADDR"], 1)
            sys.exit(rank(folder, float(sys.argv[3]), number, world, behaviour, address))
        sys.exit(rank(folder, 30.0, number, world, behaviour))
    sys.exit(rank(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]))
