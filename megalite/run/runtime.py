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
Memory or a disk that turned out too small leaves the block as ResourceError, whatever raised it. So an exception that
leaves the block is the run's own, and the caller prints it exactly once. Work that may fail, such
as finishing the output, belongs inside the block: code 0 is given when the block has been left on all ranks.

The launchers' environment variables are read here and in `launch_env`, and a device is chosen here.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megalite.config.schema import DistributedSection
from megalite.core.parallel_state import COLLECTIVE_TIMEOUT, forget_groups
from megalite.core.progress import here
from megalite.errors import (
    EXIT_CRASH,
    EXIT_SIGINT,
    ConfigError,
    MegaliteError,
    Problem,
    RankLost,
    Stopped,
    maybe_fault,
    resource_error,
)
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.meeting_folder import claim, run_folder
from megalite.run.network import interface_of, machine_id, network_namespace, pid_namespace, route_to, way_to
from megalite.run.processes import Process, die_with_parent, launcher_name, launchers, this_process
from megalite.run.referee import End, Peer
from megalite.run.rendezvous import Deadline, RankInfo, meet, open_store
from megalite.run.status import StatusFile
from megalite.run.watchdog import ORPHAN_WAIT, Watchdog, listen

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""What torch.distributed is asked for: with NCCL on the devices, CPU tensors go over gloo."""
_GOODBYE = 30.0
"""Seconds for process groups to be destroyed at the end of a run, all of whose work is done."""
_LAST_STEP = 10.0
"""Seconds, at least, for ranks that have met to connect."""
_LOOPBACK = "127.0.0.1"


class Runtime:
    """This process as one rank of the run. A context manager; see the module's text for what leaving it means."""

    def __init__(
        self,
        env: LaunchEnv,
        ranks: Sequence[RankInfo],
        backend: str,
        store: dist.Store,
        folder: Path | None,
        runs_here: int,
    ):
        """What is known once all have met, of which `ranks` tells; `folder` is the run's on this host, if launched."""
        self.rank, self.world_size = env.rank, env.world_size
        self.local_rank = env.local_rank
        """Among the ranks that the same launcher process started."""
        self.info = ranks[env.rank]
        self.local_world_size = sum(info.machine == self.info.machine for info in ranks) * runs_here
        """Ranks that share this machine's memory, cores and devices, those of equal runs included."""
        self.hostname = self.info.host
        self.device = torch.device(self.info.device)
        self.backend = backend
        """`nccl` or `gloo`, of the collectives on `device`."""
        self.store: dist.Store = dist.PrefixStore("user", store)
        """Key-value store over all ranks."""
        self.before_groups_go: list[Callable[[], None]] = []
        """Called at the end of a run that went well: gives back what holds on to its process groups."""
        self.ranks, self.folder, self._common_store = ranks, folder, store
        self._launched = folder is not None
        """By a launcher, with which this process has to end."""
        self._stopped = False
        self._watchdog: Watchdog

    def signal_received(self) -> int | None:
        """The SIGINT or SIGTERM that asks the run to drain, whichever rank got it; None: go on.

        Ranks see it at different moments, so only a rank whose decision the others follow should act on it. A second
        signal ends the run at once without anyone's help.
        """
        return self._watchdog.signal_received

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = error and resource_error(error)
        self.stop(told or error)
        if told:
            raise told from error

    def stop(self, error: BaseException | None = None) -> None:
        """Leave the run; `error` is why, None after success. Idempotent. What `with` does at the end of its block.

        Waits until every rank has done so. Raises SystemExit when the error to be shown is another rank's.
        """
        if self._stopped:
            return
        self._stopped = True
        end = self._report(error)
        if end.code == 0 or not self._launched:
            self._close()
        if end.code and (error is None or end.speaker != self.rank):
            raise SystemExit(end.code)

    def watch(self, watchdog: Watchdog, seconds: float) -> None:
        """Begin the watch over launcher and peers. RankLost if rank 0's watch does not answer within `seconds`."""
        self._watchdog = watchdog
        try:
            watchdog.start(seconds)
        except OSError as error:
            address, port = self.ranks[0].hub or (_LOOPBACK, 0)
            raise RankLost(
                f"{self.info}: no connection to rank 0's watch at {address}:{port} from {way_to(address, port)}: "
                f"{error.strerror or error}. "
                "A firewall between the hosts must let their ranks connect to each other on any port."
            ) from error
        if self._launched:
            die_with_parent(0)  # asked for while there was no watch; from here on it does that better

    def connect(self, section: DistributedSection, deadline: Deadline) -> None:
        """Wait until all watch each other, then make torch's process group of all ranks."""
        if not self._watchdog.together.wait(max(_LAST_STEP, deadline.left())):
            missing = self._watchdog.missing() if self.rank == 0 else []
            names = ", ".join(str(self.ranks[rank]) for rank in missing) or "some"
            raise RankLost(f"{names} met the others but never connected to rank 0's watch at {self.ranks[0].hub}.")
        interface = section.interface or interface_of(self.info.address)
        for variable, before in (("GLOO_SOCKET_IFNAME", ""), ("NCCL_SOCKET_IFNAME", "=")):
            if interface and (section.interface or variable not in os.environ):
                os.environ[variable] = before + interface
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))
        if self.world_size > 1:
            dist.init_process_group(
                BACKENDS[self.backend],
                store=dist.PrefixStore("torch", self._common_store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=self.device if self.backend == "nccl" else None,
            )

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
    beside: tuple[int, int] = (0, 1),
) -> Runtime:
    """Join the run that the launcher started, or be a run of one rank without a launcher. Every rank calls it.

    `sha256` and `config_text` are compared over the ranks before anything else. `status_file`: where rank 0 keeps the
    run's state as JSON. `handle_signals`: SIGINT and SIGTERM set `signal_received` instead of ending the process; needs
    the main thread. `beside`: which of how many equal runs this is that share the machine.

    Returns when all ranks are there, connected, and watch each other: within `section.start_timeout` seconds.
    ConfigError when the ranks disagree or an option does not fit the machine, RankLost naming who never came; raised
    by one rank, the others leave by SystemExit with the same code.
    """
    deadline = Deadline(section.start_timeout)
    env = LaunchEnv.of(os.environ)
    maybe_fault("start", env.rank if env else 0)
    door, pipe = door_of(os.environ) or (None, None)
    status = StatusFile(status_file, pipe)
    chain = launchers(this_process(), door) if env else []
    owner = next((process for process in chain if process.pid == door or launcher_name(process)), None)
    runtime, listener = _meet(section, env, owner, status, sha256, config_text, deadline, beside)
    hub, ranks = runtime.ranks[0], runtime.ranks
    status.peers = [Peer(info.rank, info.host, info.pid) for info in ranks]
    watchdog = Watchdog(
        rank=runtime.rank,
        peers=status.peers,
        token=bytes.fromhex(hub.token),
        hub=listener or hub.hub,
        timeout=section.peer_timeout,
        launchers=chain,
        orphan_wait=ORPHAN_WAIT if door is None or env is None or env.over_hosts else 0.0,
        handle_signals=handle_signals,
        # where rank 0's files are not, its status can't be written
        on_end=status.ended if runtime.info.machine == hub.machine else lambda end: None,
        claim=lambda: runtime.folder is None or claim(runtime.folder),
        visible=[info.rank for info in ranks if info.pids == runtime.info.pids],
        progress=here,
        step_timeout=section.step_timeout,
    )
    runtime.watch(watchdog, deadline.left())
    try:
        runtime.connect(section, deadline)
        if runtime.rank == 0:
            status.running()
        maybe_fault("started", runtime.rank)
    except BaseException as error:
        runtime.stop(error)
        raise
    return runtime


# ---- who is here -----------------------------------------------------------------------------------------------------


def _meet(
    section: DistributedSection,
    launched: LaunchEnv | None,
    owner: Process | None,
    status: StatusFile,
    sha256: str,
    config_text: str,
    deadline: Deadline,
    beside: tuple[int, int],
) -> tuple[Runtime, socket.socket | None]:
    """Come together with all ranks; on rank 0 of several, the second is the socket for the watch.

    `owner`: the process that started this host's ranks, as far as it is known.
    """
    env = launched or LaunchEnv(rank=0, world_size=1, local_rank=0, started_here=1)
    folder = run_folder(owner, env.restart) if owner else None
    try:
        store = open_store(env, folder, deadline)
        one_host = env.started_here == env.world_size
        address = _LOOPBACK if one_host else route_to(env.master_addr, env.master_port)
        listener = listen(address) if env.rank == 0 and env.world_size > 1 else None
        slot = beside[0] * (env.started_here or env.world_size) + env.local_rank
        info = _introduce(section, env, sha256, address, listener, slot)
        ranks, backend = meet(env, store, info, config_text, deadline, lambda here: _backend(section, here))
    except MegaliteError as error:
        if folder is not None and not claim(folder):
            raise SystemExit(error.exit_code) from error
        status.failed(error.exit_code, str(error))
        raise
    if launched and folder is None:
        first_here = next(other for other in ranks if (other.host, other.pids) == (info.host, info.pids))
        folder = run_folder(Process(first_here.pid, first_here.start))
    return Runtime(env, ranks, backend, store, folder, beside[1]), listener


def _introduce(
    section: DistributedSection, env: LaunchEnv, sha256: str, address: str, listener: socket.socket | None, slot: int
) -> RankInfo:
    """What this rank says of itself; a device that can't be had is a problem, of which all ranks hear so. `slot`: its
    place among the ranks on this machine."""
    problem, code, device = "", 0, torch.device("cpu")
    try:
        device = _pick_device(section, slot)
    except MegaliteError as error:
        problem, code = str(error), error.exit_code
    return RankInfo(
        rank=env.rank,
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
        hub=[address, listener.getsockname()[1]] if listener else None,
        token=secrets.token_hex(32) if env.rank == 0 else "",
        problem=problem,
        code=code,
    )


def _pick_device(section: DistributedSection, slot: int) -> torch.device:
    """The rank's GPU, shared in turn where there are fewer than ranks, or the CPU; makes the GPU the current one."""
    gpus = 0 if section.device == "cpu" else torch.cuda.device_count()
    if section.device == "cuda" and gpus == 0:
        rule, fix = f"no GPU can be seen on {socket.gethostname()}", "Use distributed.device=cpu."
        raise ConfigError(Problem(key="distributed.device", rule=rule, value="cuda", fix=fix))
    if gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", slot % gpus)
    torch.cuda.set_device(device)
    return device


def _backend(section: DistributedSection, ranks: Sequence[RankInfo]) -> str:
    """The back end for all ranks. ConfigError when their hosts don't fit together."""
    kinds = {info.device.partition(":")[0]: info for info in ranks}
    if len(kinds) > 1:
        rule = f"{kinds['cuda']} has a GPU, {kinds['cpu']} sees none"
        raise ConfigError(Problem(key="distributed.device", rule=rule, fix="Use distributed.device=cpu."))
    inward = [info for info in ranks if info.address.startswith("127.") or info.address == "::1"]
    if inward and len({info.network for info in ranks}) > 1:
        rule = f"leads {inward[0]} to its own loopback interface, where no other host can reach it"
        fix = "Give rank 0's address with deepspeed --master_addr; /etc/hosts may map a host to 127.* on itself."
        raise ConfigError(Problem(key="MASTER_ADDR", rule=rule, fix=fix))
    own_gpus = "cuda" in kinds and len({(info.machine, info.gpu) for info in ranks}) == len(ranks)
    if section.backend == "nccl" and not own_gpus:
        rule, fix = "nccl needs a GPU for each rank", "Use distributed.backend=gloo, or leave it out."
        raise ConfigError(Problem(key="distributed.backend", rule=rule, value="nccl", fix=fix))
    return section.backend or ("nccl" if own_gpus and dist.is_nccl_available() else "gloo")


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
