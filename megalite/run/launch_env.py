"""Where a launcher put this process: what `deepspeed` and `torchrun` say in the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import ConfigError, Problem

LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
"""Launchers by a variable that only they set."""

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
        if "RANK" not in env:
            return None

        def number(name: str, low: int, high: int) -> int:
            text = env.get(name, "")
            if not (text.isascii() and text.isdecimal() and low <= int(text) < high):
                rule = f"must be a whole number from {low} to {high - 1}" if text else "is not set, but RANK is"
                fix = "Start the ranks with deepspeed or torchrun, or unset RANK to run alone."
                raise ConfigError(Problem(key=name, rule=rule, value=text or None, fix=fix, origin="the environment"))
            return int(text)

        world_size = number("WORLD_SIZE", 1, 1 << 20)
        local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
        return cls(
            rank=number("RANK", 0, world_size),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0, world_size),
            started_here=number(local_size, 1, world_size + 1) if local_size else None,
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=number("MASTER_PORT", 1, 1 << 16),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
            launcher=next((name for mark, name in LAUNCHERS.items() if mark in env), "the launcher"),
        )


def door_of(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Process id of the door that started this very process as a rank, and what leads to it; None without one."""
    pid, _, descriptor = env.get(DOOR_VARIABLE, "").partition(":")
    return (int(pid), int(descriptor)) if pid == str(os.getppid()) and descriptor.isdecimal() else None
