"""Where a launcher put this process: what deepspeed, torchrun and srun say in the environment. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import ConfigError, Problem

LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
"""Launchers by a variable that only they set."""
_HOSTS = ("CROSS_SIZE", "GROUP_WORLD_SIZE")
"""Where deepspeed and torchrun say how many hosts there are."""
_SLURM = "SLURM_PROCID"
_PORTS = range(20000, 30000)
"""Ports for steps of Slurm, which names none; below those that systems give to connections by themselves."""

DOOR_VARIABLE = "MEGALITE_DOOR"
"""Environment variable with `PID:DESCRIPTOR` of the door, or of its other half on this host: without that process its
ranks must not go on, and through that descriptor rank 0 tells it how the run goes (`status`)."""


@dataclass(frozen=True, kw_only=True)
class LaunchEnv:
    """This process among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int
    started_here: int | None
    """Ranks that the launcher started on this host; None: it does not say."""
    hosts: int | None = None
    """Hosts of the run; None: it does not say."""
    master_addr: str = "127.0.0.1"
    master_port: int = 1
    agent_store: bool = False
    """torchrun already serves a TCP store at the master's address."""
    restart: str = "0"
    """Which restart of the ranks by the same launcher this is."""
    launcher: str = "the launcher"
    """What to call it in messages."""

    @property
    def over_hosts(self) -> bool:
        """The launcher says that there are ranks on other hosts."""
        return self.started_here is not None and self.started_here < self.world_size

    @classmethod
    def of(cls, env: Mapping[str, str]) -> LaunchEnv | None:
        """None without a launcher; ConfigError if its variables are incomplete or make no sense."""
        launcher = "the launcher"
        if "RANK" not in env:
            launcher, env = "srun", _of_slurm(env)
        if "RANK" not in env:
            return None

        def number(name: str, low: int, high: int) -> int:
            text = env.get(name, "")
            if not (text.isascii() and text.isdecimal() and low <= int(text) < high):
                rule = f"must be a whole number from {low} to {high - 1}" if text else "is not set, but RANK is"
                fix = "Start the ranks with deepspeed, torchrun or srun, or unset RANK to run alone."
                raise ConfigError(Problem(key=name, rule=rule, value=text or None, fix=fix, origin="the environment"))
            return int(text)

        world_size = number("WORLD_SIZE", 1, 1 << 20)
        local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
        hosts = next((name for name in _HOSTS if name in env), None)
        return cls(
            rank=number("RANK", 0, world_size),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0, world_size),
            started_here=number(local_size, 1, world_size + 1) if local_size else None,
            hosts=number(hosts, 1, world_size + 1) if hosts else None,
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=number("MASTER_PORT", 1, 1 << 16),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
            launcher=next((name for mark, name in LAUNCHERS.items() if mark in env), launcher),
        )


def outside(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that a rank starts and that is none itself."""
    return {name: value for name, value in env.items() if name not in ("RANK", _SLURM, DOOR_VARIABLE)}


def _of_slurm(env: Mapping[str, str]) -> Mapping[str, str]:
    """The variables as torchrun would set them, of a task of a Slurm step (`srun`) with several; else as they are.

    Only srun sets SLURM_STEP_NUM_TASKS: what a batch script starts by itself is no rank. The master is the first host
    of the step, where task 0 is, and the port follows from job and step, unless MASTER_ADDR and MASTER_PORT are set.
    """
    if _SLURM not in env or env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return env
    tasks = _numbers(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = env.get("SLURM_NODEID", "0")
    here = tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else None
    numbers = [int(env.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if env.get(name, "0").isdecimal()]
    found = {
        "RANK": env[_SLURM],
        "LOCAL_RANK": env.get("SLURM_LOCALID", ""),
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"),
        "MASTER_PORT": str(_PORTS[sum(one * 131**place for place, one in enumerate(numbers)) % len(_PORTS)]),
        **({"LOCAL_WORLD_SIZE": str(here)} if here else {}),
        **({"GROUP_WORLD_SIZE": str(len(tasks))} if tasks else {}),
    }
    return {**env, **found, **{name: env[name] for name in ("MASTER_ADDR", "MASTER_PORT") if env.get(name)}}


def _numbers(text: str) -> list[int]:
    """Tasks of each host, as Slurm writes them: `2(x3),1` is 2, 2, 2, 1."""
    found = []
    for one in filter(None, text.split(",")):
        if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", one)):
            return []
        found += [int(match[1])] * int(match[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: `gpu[07-09,12],login` begins with gpu07."""
    name = re.match(r"[^\[,]*", nodes)
    assert name is not None, "it matches nothing too"
    begin, rest = name[0], nodes[name.end() :]
    if not rest.startswith("["):
        return begin
    inside, _, after = rest[1:].partition("]")
    return begin + re.split("[-,]", inside)[0] + first_host(after)


def door_of(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Process id of the door that started this very process as a rank, and what leads to it; None without one."""
    pid, _, descriptor = env.get(DOOR_VARIABLE, "").partition(":")
    return (int(pid), int(descriptor)) if pid == str(os.getppid()) and descriptor.isdecimal() else None
