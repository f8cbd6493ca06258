"""What each replica of a host gets of its cores and GPUs. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that CUDA programs see here, as the environment gives them, else their numbers."""
    if VISIBLE in environment:
        names = [name.strip() for name in environment[VISIBLE].split(",")]
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    return [str(i) for i in range(sum(bool(re.fullmatch(r"nvidia\d+", one.name)) for one in devices.iterdir()))]


def share(replica: int, replicas: int, ranks: int, gpus: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for replica `replica` of so many, each of so many ranks.

    Each rank gets as many cores as every other of all replicas, and a GPU of its own as far as there are enough. What
    the user has set stays as it is.
    """
    cores = len(os.sched_getaffinity(0)) // (replicas * ranks)
    found = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, cores)))}
    if len(gpus) > ranks:
        found[VISIBLE] = ",".join(gpus[(replica * ranks + rank) % len(gpus)] for rank in range(ranks))
    return found
