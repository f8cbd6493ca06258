"""Start and stop of a run over its ranks: device, back end, network, the watch, and one exit code for all.

    with distributed.start(config.distributed, sha256=loaded.sha256, config_text=loaded.text) as runtime:
        ...

How an error inside the block becomes the run's exit code. Leaving the block is agreed between the ranks:
- all leave it normally: the run is done, code 0;
- all raise `Stopped` (a signal, drained): code 130 or 143, and the lowest rank's exception is shown;
- one raises anything else: it tells the others, which end at once, wherever they are, quietly and with its exit code
  (that of its MegaliteError, otherwise 1). Its exception goes on out of the block there, for the caller to show. Where
  several raise, the first speaks; the others leave the block by SystemExit with its code. An unexpected exception is
  held back for a second, because the loss of a peer shows first as an error of a collective;
- a rank, or a launcher, is lost: every process is gone within seconds with code 70 and one line names who was lost.
So an exception that leaves the block is the run's own, and the caller prints it exactly once. Work that may fail, such
as finishing the output, belongs inside the block: code 0 is given when the block has been left on all ranks.

The launchers' environment variables are read here and in `place`, and a device is chosen here.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.schema import DistributedSection
from megalite.core.parallel_state import forget_groups
from megalite.errors import (
    EXIT_CRASH,
    EXIT_SIGINT,
    ConfigError,
    MegaliteError,
    Problem,
    RankLost,
    Stopped,
    maybe_fault,
)
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.meeting_folder import claim, run_folder
from megalite.run.network import interface_of, machine_id, network_namespace, pid_namespace, route_to
from megalite.run.processes import Process, die_with_parent, launcher_name, launchers, this_process
from megalite.run.referee import End, Peer
from megalite.run.rendezvous import Deadline, RankInfo, meet, open_store
from megalite.run.status import StatusFile
from megalite.run.watchdog import ORPHAN_WAIT, Watchdog, listen

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait inside one collective. Lost ranks are noticed in seconds by the watch; this bounds a deadlock."""
BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""What torch.distributed is asked for: with NCCL on the devices, CPU tensors go over gloo."""
_GOODBYE = 30.0
"""Seconds for process groups to be destroyed at the end of a run, all of whose work is done."""
_LAST_STEP = 10.0
"""Seconds, at least, for ranks that have met to connect."""
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """What a rank knows once all have met."""

    rank: int
    local_rank: int
    device: torch.device
    cards: Sequence[RankInfo]
    plan: dict[str, Any]
    """`backend`, `token` (hex) and `hub` ([address, port] of rank 0's watch)."""
    store: dist.Store
    folder: Path | None
    """Of the run on this host; None without a launcher."""
    listener: socket.socket | None
    """Rank 0's, at `hub`."""
    launched: bool
    """By a launcher, with which this process has to end."""

    @property
    def card(self) -> RankInfo:
        return self.cards[self.rank]

    @property
    def peers(self) -> list[Peer]:
        return [Peer(card.rank, card.host, card.pid) for card in self.cards]

    @property
    def neighbours(self) -> int:
        """Ranks on this machine, this one included."""
        return sum(card.machine == self.card.machine for card in self.cards)


class Runtime:
    """This process as one rank of the run. A context manager; see the module's text for what leaving it means."""

    def __init__(self, meeting: _Meeting, watchdog: Watchdog):
        self.rank = meeting.rank
        self.world_size = len(meeting.cards)
        self.local_rank = meeting.local_rank
        """Among the ranks that the same launcher process started."""
        self.local_world_size = meeting.neighbours
        """Ranks that share this machine's memory, cores and devices."""
        self.hostname = meeting.card.host
        self.device = meeting.device
        self.backend: str = meeting.plan["backend"]
        """`nccl` or `gloo`, of the collectives on `device`."""
        self.store: dist.Store = dist.PrefixStore("user", meeting.store)
        """Key-value store over all ranks."""
        self.before_groups_go: list[Callable[[], None]] = []
        """Called at the end of a run that went well: gives back what holds on to its process groups."""
        self._watchdog = watchdog
        self._launched = meeting.launched
        self._stopped = False

    def signal_received(self) -> int | None:
        """The SIGINT or SIGTERM that asks the run to drain, whichever rank got it; None: go on.

        Ranks see it at different moments, so only a rank whose decision the others follow should act on it. A second
        signal ends the run at once without anyone's help.
        """
        return self._watchdog.signal_received

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop(error)

    def stop(self, error: BaseException | None = None) -> None:
        """Leave the run; `error` is why, None after success. Idempotent. What `with` does at the end of its block.

        Waits until every rank has done so. Raises SystemExit when another rank's story is the one to be told.
        """
        if self._stopped:
            return
        self._stopped = True
        end = self._report(error)
        if end.code == 0 or not self._launched:
            self._close()
        if end.code and (error is None or end.speaker != self.rank):
            raise SystemExit(end.code)

    def _report(self, error: BaseException | None) -> End:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else EXIT_CRASH
            return self._watchdog.fail(code, crash=False) if code else self._watchdog.finish()
        if error is None:
            return self._watchdog.finish()
        if isinstance(error, Stopped):
            return self._watchdog.finish(error.exit_code)
        if isinstance(error, MegaliteError):
            return self._watchdog.fail(error.exit_code, crash=False)
        if isinstance(error, KeyboardInterrupt):
            return self._watchdog.fail(EXIT_SIGINT, crash=False)
        return self._watchdog.fail(EXIT_CRASH, crash=True)

    def _close(self) -> None:
        while self.before_groups_go:
            self.before_groups_go.pop(0)()
        self._watchdog.close()
        late = threading.Timer(_GOODBYE, self._leave_groups)
        late.daemon = True
        if self._launched:
            die_with_parent()  # nobody watches any more, but a rank still must not outlive its launcher
            late.start()
        if dist.is_initialized():
            dist.destroy_process_group()
            forget_groups()
        late.cancel()

    def _leave_groups(self) -> None:
        """What a run has done is not undone by a library that can't end."""
        line = f"rank {self.rank}: its process groups were not destroyed within {_GOODBYE:g} s; it leaves without that"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(0)


def start(
    section: DistributedSection,
    *,
    sha256: str,
    config_text: str,
    status_file: str | os.PathLike[str] | None = None,
    handle_signals: bool = True,
) -> Runtime:
    """Join the run that the launcher started, or be a run of one rank without a launcher. Every rank calls it.

    `sha256` and `config_text` are compared over the ranks before anything else. `status_file`: where rank 0 keeps the
    run's state as JSON. `handle_signals`: SIGINT and SIGTERM set `signal_received` instead of ending the process; needs
    the main thread.

    Returns when all ranks are there, connected, and watch each other: within `section.start_timeout` seconds.
    ConfigError when the ranks disagree or an option does not fit the machine, RankLost naming who never came; raised
    by one rank, the others leave by SystemExit with the same code.
    """
    deadline = Deadline(section.start_timeout)
    place = LaunchEnv.of(os.environ)
    maybe_fault("start", place.rank if place else 0)
    door, pipe = door_of(os.environ) or (None, None)
    status = StatusFile(status_file, pipe)
    chain: list[Process] = []
    if place is None:
        meeting = _meet_nobody(section)
    else:
        chain = launchers(this_process(), door)
        owner = next((process for process in chain if process.pid == door or launcher_name(process)), None)
        meeting = _meet_all(section, place, owner, status, sha256=sha256, config_text=config_text, deadline=deadline)
    status.peers = meeting.peers
    watchdog = Watchdog(
        rank=meeting.rank,
        peers=meeting.peers,
        token=bytes.fromhex(meeting.plan["token"]),
        hub=meeting.listener or meeting.plan["hub"],
        timeout=section.peer_timeout,
        launchers=chain,
        orphan_wait=ORPHAN_WAIT if door is None or place is None or place.over_hosts else 0.0,
        handle_signals=handle_signals,
        # where rank 0's files are not, its status can't be written
        on_end=status.ended if meeting.card.machine == meeting.cards[0].machine else lambda end: None,
        claim=lambda: meeting.folder is None or claim(meeting.folder),
        visible=[card.rank for card in meeting.cards if card.pids == meeting.card.pids],
    )
    try:
        watchdog.start(deadline.left())
    except OSError as error:
        raise RankLost(
            f"{meeting.card}: no connection to rank 0's watch at {meeting.plan['hub']} ({error.strerror or error}). "
            "A firewall between the hosts must let their ranks connect to each other on any port."
        ) from error
    if place is not None:
        die_with_parent(0)  # asked for while there was no watch; from here on it does that better
    runtime = Runtime(meeting, watchdog)
    try:
        _connect(section, meeting, watchdog, deadline)
        if runtime.rank == 0:
            status.running()
        maybe_fault("started", runtime.rank)
    except BaseException as error:
        runtime.stop(error)
        raise
    return runtime


# ---- who is here -----------------------------------------------------------------------------------------------------


def _introduce(section: DistributedSection, rank: int, local_rank: int, address: str, sha256: str) -> RankInfo:
    """This rank's card; a device that can't be had is a problem on it, so that all ranks hear of it."""
    problem, code, device = "", 0, torch.device("cpu")
    try:
        device = _pick_device(section, local_rank)
    except MegaliteError as error:
        problem, code = str(error), error.exit_code
    return RankInfo(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        start=this_process().start,
        machine=machine_id(),
        pids=pid_namespace(),
        network=network_namespace(),
        address=address,
        device=str(device),
        gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        sha256=sha256,
        problem=problem,
        code=code,
    )


def _pick_device(section: DistributedSection, local_rank: int) -> torch.device:
    """The rank's GPU, shared in turn where there are fewer than ranks, or the CPU; makes the GPU the current one."""
    gpus = 0 if section.device == "cpu" else torch.cuda.device_count()
    if section.device == "cuda" and gpus == 0:
        rule, fix = f"no GPU can be seen on {socket.gethostname()}", "Use distributed.device=cpu."
        raise ConfigError(Problem(key="distributed.device", rule=rule, value="cuda", fix=fix))
    if gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def _meet_nobody(section: DistributedSection) -> _Meeting:
    card = _introduce(section, 0, 0, _LOOPBACK, "")
    if card.problem:
        raise ConfigError(card.problem)
    plan = {**_plan(section, [card]), "hub": None}
    return _Meeting(
        rank=0,
        local_rank=0,
        device=torch.device(card.device),
        cards=[card],
        plan=plan,
        store=dist.HashStore(),
        folder=None,
        listener=None,
        launched=False,
    )


def _meet_all(
    section: DistributedSection,
    place: LaunchEnv,
    owner: Process | None,
    status: StatusFile,
    *,
    sha256: str,
    config_text: str,
    deadline: Deadline,
) -> _Meeting:
    folder = run_folder(owner, place.restart) if owner else None
    try:
        store = open_store(place, folder, deadline)
        one_host = place.started_here == place.world_size
        address = _LOOPBACK if one_host else route_to(place.master_addr, place.master_port)
        card = _introduce(section, place.rank, place.local_rank, address, sha256)
        listener = listen(address) if place.rank == 0 and place.world_size > 1 else None

        def plan_for(cards: Sequence[RankInfo]) -> dict[str, Any]:
            return {**_plan(section, cards), "hub": [address, listener.getsockname()[1]] if listener else None}

        cards, plan = meet(place, store, card, config_text, deadline, plan_for)
    except MegaliteError as error:
        if folder is not None and not claim(folder):
            raise SystemExit(error.exit_code) from error
        status.failed(error.exit_code, str(error))
        raise
    first_here = next(other for other in cards if (other.host, other.pids) == (card.host, card.pids))
    return _Meeting(
        rank=place.rank,
        local_rank=place.local_rank,
        device=torch.device(card.device),
        cards=cards,
        plan=plan,
        store=store,
        folder=folder or run_folder(Process(first_here.pid, first_here.start)),
        listener=listener,
        launched=True,
    )


def _plan(section: DistributedSection, cards: Sequence[RankInfo]) -> dict[str, Any]:
    """What all ranks have to agree on: the back end and the run's token. ConfigError when the hosts don't fit."""
    kinds = {card.device.partition(":")[0]: card for card in cards}
    if len(kinds) > 1:
        rule = f"{kinds['cuda']} has a GPU, {kinds['cpu']} sees none"
        raise ConfigError(Problem(key="distributed.device", rule=rule, fix="Use distributed.device=cpu."))
    inward = [card for card in cards if card.address.startswith("127.") or card.address == "::1"]
    if inward and len({card.network for card in cards}) > 1:
        rule = f"leads {inward[0]} to its own loopback interface, where no other host can reach it"
        fix = "Give rank 0's address with deepspeed --master_addr; /etc/hosts may map a host to 127.* on itself."
        raise ConfigError(Problem(key="MASTER_ADDR", rule=rule, fix=fix))
    own_gpus = "cuda" in kinds and len({(card.machine, card.gpu) for card in cards}) == len(cards)
    if section.backend == "nccl" and not own_gpus:
        rule, fix = "nccl needs a GPU for each rank", "Use distributed.backend=gloo, or leave it out."
        raise ConfigError(Problem(key="distributed.backend", rule=rule, value="nccl", fix=fix))
    backend = section.backend or ("nccl" if own_gpus and dist.is_nccl_available() else "gloo")
    return {"backend": backend, "token": secrets.token_hex(32)}


# ---- connections -----------------------------------------------------------------------------------------------------


def _connect(section: DistributedSection, meeting: _Meeting, watchdog: Watchdog, deadline: Deadline) -> None:
    """Wait until all watch each other, then make torch's process group of all ranks."""
    if not watchdog.together.wait(max(_LAST_STEP, deadline.left())):
        names = ", ".join(str(meeting.cards[rank]) for rank in watchdog.missing()) if meeting.rank == 0 else "some"
        raise RankLost(f"{names} met the others but never connected to rank 0's watch at {meeting.plan['hub']}.")
    interface = section.interface or interface_of(meeting.card.address)
    for variable, value in (("GLOO_SOCKET_IFNAME", interface), ("NCCL_SOCKET_IFNAME", f"={interface}")):
        if interface and (section.interface or variable not in os.environ):
            os.environ[variable] = value
    if meeting.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // meeting.neighbours))
    if len(meeting.cards) > 1:
        _init_process_group(meeting)


def _init_process_group(meeting: _Meeting) -> None:
    backend = meeting.plan["backend"]
    dist.init_process_group(
        BACKENDS[backend],
        store=dist.PrefixStore("torch", meeting.store),
        rank=meeting.rank,
        world_size=len(meeting.cards),
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=meeting.device if backend == "nccl" else None,
    )


def prepare_deepspeed(runtime: Runtime) -> None:
    """Make `deepspeed.initialize` safe to call; call this first, before deepspeed is imported.

    DeepSpeed would compile a communication extension when it joins the process group (minutes, and a run killed
    meanwhile leaves a lock on which the next one hangs), and needs a process group also for one rank.
    """
    os.environ["DS_ACCELERATOR"] = runtime.device.type
    # It wraps an optimizer that is not used here in torch.compile, whose import would take a second on every rank.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": "1"}
    for variable, value in alone.items():
        os.environ.setdefault(variable, value)
    if runtime.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(runtime.device.index)  # it takes that for the device, but ranks may share a GPU
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(BACKENDS[runtime.backend], store=runtime.store, rank=0, world_size=1)
    # DeepSpeed calls them at every step, and torch 2.13 says each time that they have new names.
    old = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
