"""How a process joins a run: it says what it is and has, and the ranks agree that they fit together.

A device is chosen here.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megalite.config.schema import DistributedSection
from megalite.errors import ConfigError, MegaliteError, Problem
from megalite.run.facts import Given, RankInfo, facts_of
from megalite.run.launch_env import LaunchEnv
from megalite.run.meeting_folder import claim, run_folder
from megalite.run.network import interfaces, machine_id, network_namespace, pid_namespace, route_to
from megalite.run.processes import Process, this_process
from megalite.run.rendezvous import Deadline, meet, open_store
from megalite.run.status import StatusFile
from megalite.run.watchdog import listen

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A run whose ranks have met."""

    env: LaunchEnv
    ranks: Sequence[RankInfo]
    backend: str
    store: dist.Store
    folder: Path | None
    """The run's on this host, if it was launched."""
    listener: socket.socket | None
    """For the watch, on rank 0 of several."""


def join(
    section: DistributedSection,
    launched: LaunchEnv | None,
    owner: Process | None,
    status: StatusFile,
    given: Given,
    deadline: Deadline,
    *,
    beside: tuple[int, int],
    thorough: bool,
) -> Joined:
    """Come together with all ranks, see `runtime.start`.

    `owner`: the process that started this host's ranks, as far as it is known.
    """
    env = launched or LaunchEnv(rank=0, world_size=1, local_rank=0, started_here=1)
    folder = run_folder(owner, env.restart) if owner else None
    try:
        store = open_store(env, folder, deadline)
        one_host = env.started_here == env.world_size
        address = LOOPBACK if one_host else route_to(env.master_addr, env.master_port)
        listener = listen(address) if env.rank == 0 and env.world_size > 1 else None
        slot = beside[0] * (env.started_here or env.world_size) + env.local_rank
        info = _introduce(section, env, address, listener, slot)
        if not info.problem:
            info = _with_facts(info, given, thorough=thorough or not one_host)
        ranks, backend = meet(env, store, info, given.config_text, deadline, lambda here: backend_of(section, here))
    except MegaliteError as error:
        if folder is not None and not claim(folder):
            raise SystemExit(error.exit_code) from error
        status.failed(error.exit_code, str(error))
        raise
    if launched and folder is None:
        first_here = next(other for other in ranks if (other.host, other.pids) == (info.host, info.pids))
        folder = run_folder(Process(first_here.pid, first_here.start))
    return Joined(env=env, ranks=ranks, backend=backend, store=store, folder=folder, listener=listener)


def refuse(env: LaunchEnv, error: MegaliteError) -> None:
    """Tell the ranks of other hosts why this one can't take part in their run; raises nothing if they know.

    Every rank of the run calls this or `start`. Rank 0, which tells the user, raises what all ranks that can't say.
    RankLost, or `error`: they were not reached.
    """
    deadline = Deadline(DistributedSection().start_timeout)
    store = open_store(env, None, deadline)
    address = route_to(env.master_addr, env.master_port)
    info = _introduce(DistributedSection(device="cpu"), env, address, None, 0)
    info = replace(info, problem=str(error), code=error.exit_code)
    with suppress(SystemExit):  # rank 0 has told it
        meet(env, store, info, "", deadline, lambda here: "")


def _introduce(
    section: DistributedSection, env: LaunchEnv, address: str, listener: socket.socket | None, slot: int
) -> RankInfo:
    """What this rank says of itself; a device that can't be had is a problem, of which all ranks hear so. `slot`: its
    place among the ranks on this machine."""
    problem, code, device = "", 0, torch.device("cpu")
    try:
        _check_interface(section)
        device = _pick_device(section, slot)
    except MegaliteError as error:
        problem, code = str(error), error.exit_code
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
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
        gpu=str(gpu.uuid) if gpu else "",
        model=gpu.name if gpu else "",
        free=torch.cuda.mem_get_info(device)[0] if gpu else psutil.virtual_memory().available,
        hub=[address, listener.getsockname()[1]] if listener else None,
        token=secrets.token_hex(32) if env.rank == 0 else "",
        problem=problem,
        code=code,
    )


def _with_facts(info: RankInfo, given: Given, *, thorough: bool) -> RankInfo:
    try:
        facts = facts_of(given, torch=torch.__version__, cuda=torch.version.cuda, thorough=thorough)
    except MegaliteError as error:
        return replace(info, problem=str(error), code=error.exit_code)
    return replace(info, facts=facts)


def _check_interface(section: DistributedSection) -> None:
    """ConfigError if gloo is told of a network interface, by its own variable, that is not on this host."""
    key = "GLOO_SOCKET_IFNAME"
    name = None if section.interface else os.environ.get(key)
    if name and name not in (there := interfaces()):
        rule, fix = f"is no network interface of {socket.gethostname()}", f"There are: {', '.join(there)}."
        raise ConfigError(Problem(key=key, rule=rule, value=name, fix=fix, origin="the environment"))


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


def backend_of(section: DistributedSection, ranks: Sequence[RankInfo]) -> str:
    """The back end for all ranks. ConfigError when their hosts don't fit together."""
    kinds = {info.device.partition(":")[0]: info for info in ranks}
    if len(kinds) > 1:
        rule = f"{kinds['cuda']} has a GPU, {kinds['cpu']} sees none"
        raise ConfigError(Problem(key="distributed.device", rule=rule, fix="Use distributed.device=cpu."))
    inward = [info for info in ranks if info.address.startswith("127.") or info.address == "::1"]
    if inward and len({info.network for info in ranks}) > 1:
        rule = f"leads {inward[0]} to its own loopback interface, where no other host can reach it"
        fix = "Give rank 0's address (--master_addr, or the variable); /etc/hosts may map a host to 127.* on itself."
        raise ConfigError(Problem(key="MASTER_ADDR", rule=rule, fix=fix))
    own_gpus = "cuda" in kinds and len({(info.machine, info.gpu) for info in ranks}) == len(ranks)
    if section.backend == "nccl" and not own_gpus:
        rule, fix = "nccl needs a GPU for each rank", "Use distributed.backend=gloo, or leave it out."
        raise ConfigError(Problem(key="distributed.backend", rule=rule, value="nccl", fix=fix))
    return section.backend or ("nccl" if own_gpus and dist.is_nccl_available() else "gloo")
