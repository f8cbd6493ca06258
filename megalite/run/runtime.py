"""Start and stop of a run over its ranks: device, back end, network, the watch, and one exit code for all.

    with distributed.start(config.distributed, given) as runtime:
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

The launchers' environment variables are read here and in `launch_env`; a device is chosen in `joining`.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
import torch.distributed as dist

from megalite.config.schema import DistributedSection
from megalite.core.parallel_state import COLLECTIVE_TIMEOUT, forget_groups
from megalite.core.progress import here
from megalite.errors import (
    EXIT_CRASH,
    EXIT_SIGINT,
    MegaliteError,
    RankLost,
    Stopped,
    maybe_fault,
    resource_error,
)
from megalite.monitor.words import wrapped
from megalite.run import placement
from megalite.run.facts import Given, RankInfo, driver_warning, hosts_of, summary
from megalite.run.joining import LOOPBACK, Joined, join
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.meeting_folder import claim
from megalite.run.network import (
    interface_of,
    way_to,
)
from megalite.run.processes import die_with_parent, launcher_name, launchers, this_process
from megalite.run.referee import End, Peer
from megalite.run.rendezvous import Deadline
from megalite.run.status import StatusFile
from megalite.run.watchdog import ORPHAN_WAIT, Watchdog

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""What torch.distributed is asked for: with NCCL on the devices, CPU tensors go over gloo."""
INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variables that tell gloo and NCCL their network interface, and what stands before a whole name."""
_FIREWALL = "A firewall between the hosts must let their ranks connect to each other on any port."
_GOODBYE = 30.0
"""Seconds for process groups to be destroyed at the end of a run, all of whose work is done."""
_LAST_STEP = 10.0
"""Seconds, at least, for ranks that have met to connect."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Runtime:
    """This process as one rank of the run. A context manager; see the module's text for what leaving it means."""

    def __init__(self, joined: Joined, runs_here: int):
        """`runs_here`: equal runs on this machine."""
        env, ranks, store, folder = joined.env, joined.ranks, joined.store, joined.folder
        self.rank, self.world_size = env.rank, env.world_size
        self.local_rank = env.local_rank
        """Among the ranks that the same launcher process started."""
        self.info = ranks[env.rank]
        self.local_world_size = sum(info.machine == self.info.machine for info in ranks) * runs_here
        """Ranks that share this machine's memory, cores and devices, those of equal runs included."""
        self.hostname = self.info.host
        self.device = torch.device(self.info.device)
        self.backend = joined.backend
        """`nccl` or `gloo`, of the collectives on `device`."""
        self.store: dist.Store = dist.PrefixStore("user", store)
        """Key-value store over all ranks."""
        self.before_groups_go: list[Callable[[], None]] = []
        """Called at the end of a run that went well: gives back what holds on to its process groups."""
        self.ranks, self.folder, self._common_store = ranks, folder, store
        self._launched = folder is not None
        """A launcher started this process, which has to end with it."""
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
            address, port = self.ranks[0].hub or (LOOPBACK, 0)
            raise RankLost(
                f"{self.info}: no connection to rank 0's watch at {address}:{port} from {way_to(address, port)}: "
                f"{error.strerror or error}. {_FIREWALL}"
            ) from error
        if self._launched:
            die_with_parent(0)  # asked for while there was no watch; from here on it does that better

    def connect(self, section: DistributedSection, deadline: Deadline) -> None:
        """Wait until all watch each other, then make torch's process group of all ranks."""
        if not self._watchdog.together.wait(max(_LAST_STEP, deadline.left())):
            missing = self._watchdog.missing() if self.rank == 0 else []
            names = ", ".join(str(self.ranks[rank]) for rank in missing) or "some"
            address, port = self.ranks[0].hub or (LOOPBACK, 0)
            over = f" ({interface_of(address)})" if self.rank == 0 else ""
            raise RankLost(
                f"{names} met the others but never connected to rank 0's watch at {address}:{port}{over}. {_FIREWALL}"
            )
        interface = section.interface or interface_of(self.info.address)
        for variable, before in INTERFACES.items():
            if interface and (section.interface or variable not in os.environ):
                os.environ[variable] = before + interface
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))
        if self.world_size == 1:
            return
        try:
            dist.init_process_group(
                BACKENDS[self.backend],
                store=dist.PrefixStore("torch", self._common_store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=self.device if self.backend == "nccl" else None,
            )
        except (dist.DistError, RuntimeError) as error:
            variables = [f"{name}={os.environ[name]}" for name in INTERFACES if name in os.environ]
            raise RankLost(
                f"{self.info}: {self.backend} did not connect the ranks from {self.info.address} "
                f"({', '.join(variables)}): {str(error).splitlines()[0]}. Their hosts must reach each other over that "
                "interface on any port; set distributed.interface to another, or open the firewall between them."
            ) from error

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
    given: Given,
    *,
    status_file: str | os.PathLike[str] | None = None,
    handle_signals: bool = True,
    beside: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = _to_stderr,
    thorough: bool = False,
) -> Runtime:
    """Join the run that the launcher started, or be a run of one rank without a launcher. Every rank calls it.

    What ranks are `given` is compared before anything else; between ranks of one host, which have the same files, only
    the config, unless `thorough`. `status_file`: where rank 0 keeps the run's state as JSON. `handle_signals`: SIGINT
    and SIGTERM set `signal_received` instead of ending the process; needs the main thread. `beside`: which of how many
    equal runs this is that share the machine. `say` gets lines for the user: on rank 0, and of several hosts only.

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
    joined = join(section, env, owner, status, given, deadline, beside=beside, thorough=thorough)
    runtime = Runtime(joined, beside[1])
    hub, ranks = runtime.ranks[0], runtime.ranks
    status.peers = [Peer(info.rank, info.host, info.pid) for info in ranks]
    watchdog = Watchdog(
        rank=runtime.rank,
        peers=status.peers,
        token=bytes.fromhex(hub.token),
        hub=joined.listener or hub.hub,
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
            for line in _told(given, ranks):
                say(line)
        maybe_fault("started", runtime.rank)
    except BaseException as error:
        runtime.stop(error)
        raise
    return runtime


def _told(given: Given, ranks: Sequence[RankInfo]) -> list[str]:
    """What rank 0 tells the user of a run over several hosts: that all agree, who has what, and what is amiss."""
    hosts = hosts_of(ranks)
    if len(hosts) == 1:
        return []
    amiss = [*placement.warnings(given.layouts, hosts), *filter(None, [driver_warning(ranks)])]
    return [
        wrapped(summary(ranks)),
        *placement.by_host(given.layouts, hosts),
        *(wrapped(f"warning: {line}") for line in amiss),
    ]


def prepare_deepspeed(runtime: Runtime) -> None:
    """Make `deepspeed.initialize` safe to call; call this first, before deepspeed is imported.

    DeepSpeed would compile a communication extension when it joins the process group (minutes, and a run killed
    meanwhile leaves a lock on which the next one hangs), and needs a process group also for one rank.
    """
    os.environ["DS_ACCELERATOR"] = runtime.device.type
    # It wraps an optimizer that is not used here in torch.compile, whose import would take a second on every rank.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": "1"}
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
