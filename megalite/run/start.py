"""From a job's process to a run: it is a rank, or starts the ranks, on this host or on several. Imports no torch."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megalite.config.command_line import Options, usage_problem
from megalite.config.load import COMMAND_LINE, Loaded
from megalite.config.schema import InferConfig
from megalite.config.typecheck import hints, mentions
from megalite.config.validate import layout_words, num_ranks, world_size_problem
from megalite.errors import ConfigError, Problem, ResourceError
from megalite.run.hostfile import check_ranks, hosts_of
from megalite.run.hosts import check_harmless, check_reachable, distrust, pack_config, run_over_hosts
from megalite.run.launch_env import LaunchEnv
from megalite.run.launcher import run_ranks

MOST_RANKS_PER_CORE = 8


def misplaced(loaded: Loaded[Any], place: LaunchEnv | None, argv: Sequence[str], options: Options) -> list[Problem]:
    """What is wrong with how this rank was started, if it is one."""
    found: list[Problem | None] = []
    if place is not None:
        started, command = _launched(place, num_ranks(loaded.config), [*options.program, *argv])
        found.append(world_size_problem(loaded.config, place.world_size, started, command))
        if options.hosts:
            found.append(usage_problem(options.hosts[0], "can't be used by a rank", "Start with plain python."))
        if place.launcher == "deepspeed" and place.over_hosts and not options.sha256:
            texts = [key for key, hint in hints(type(loaded.config)).items() if mentions(hint, str, Any)]
            given = [key for key in texts if loaded.origins[key] == COMMAND_LINE]
            instead = f"python {' '.join(options.program)} --hostfile HOSTS --config {options.config} KEY=VALUE ..."
            found += distrust(given, options.overrides, instead)
    sha256 = options.sha256
    if sha256 and sha256 != loaded.sha256:
        rule = f"config differs from the one the run was started with (sha256 {loaded.sha256[:16]}, not {sha256[:16]})"
        found.append(Problem(key=f"host {socket.gethostname()}", rule=rule, fix="Start the run again."))
    return [problem for problem in found if problem is not None]


def _launched(place: LaunchEnv, wanted: int, argv: Sequence[str]) -> tuple[str, str]:
    """How this rank was started, and the command that starts `wanted` ranks instead; `argv`: its script and options."""
    hosts = min(wanted, place.hosts or max(1, place.world_size // (place.started_here or place.world_size)))
    each = -(-wanted // hosts)
    started = f"{place.launcher} started {place.world_size} rank{'s' if place.world_size != 1 else ''}"
    if place.launcher == "srun":
        command = f"srun --ntasks {wanted}{f' --nodes {hosts}' if hosts > 1 else ''} python"
    elif place.launcher == "torchrun":
        command = f"torchrun {f'--nnodes {hosts} ' if hosts > 1 else ''}--nproc_per_node {each}"
    else:
        command = f"deepspeed --num_nodes {hosts} --num_gpus {each}" if hosts > 1 else f"deepspeed --num_gpus {each}"
    kept = [one for one in argv if not one.startswith(("--local_rank", "--local-rank"))]
    return started, shlex.join([*command.split(), *kept])


def nameless_file(text: str, stack: ExitStack) -> str:
    """The path of a file in memory that holds `text`, for this process and those that get its descriptor."""
    file = stack.enter_context(open(os.memfd_create("config"), "w", encoding="utf-8"))
    file.write(text)
    file.flush()
    return f"/proc/self/fd/{file.fileno()}"


def _reads_stdin(loaded: Loaded[Any]) -> bool:
    return isinstance(loaded.config, InferConfig) and loaded.config.input.file == "-"


def start_hosts(loaded: Loaded[Any], options: Options) -> int:
    """Start the ranks on several hosts through deepspeed; gives its exit code."""
    hosts = hosts_of(options.hosts)
    check_ranks(hosts, num_ranks(loaded.config))
    if _reads_stdin(loaded):
        rule = "standard input can't be read on another host"
        raise ConfigError(Problem(key="input.file", rule=rule, value="-", fix="Give a file that every host has."))
    resolved = ["--resolved-config", pack_config(loaded.given), "--resolved-sha256", loaded.sha256]
    script, *words = options.program
    script = os.path.abspath(script)
    if "--no_ssh" not in options.hosts:
        needed = [os.getcwd(), sys.executable, script]
        check_harmless([*(host.name for host in hosts), *needed])
        given = dict(zip(options.hosts[::2], options.hosts[1::2], strict=False))
        check_reachable([host.name for host in hosts], given.get("--ssh_port"), needed)
    return run_over_hosts(options.hosts, script, [*words, *resolved, *options.for_ranks])


def start_ranks(loaded: Loaded[Any], options: Options) -> int:
    """Start the ranks on this host with the resolved config in a file without a name; gives the run's exit code."""
    ranks, cores = num_ranks(loaded.config), os.cpu_count() or 1
    if ranks > max(64, MOST_RANKS_PER_CORE * cores):
        raise ResourceError(
            f"parallel: {layout_words(loaded.config)} on this host, which has {cores} cores. Use several hosts "
            "(--hostfile), or lower parallel.tp, pp or dp."
        )
    with ExitStack() as stack:
        path = nameless_file(loaded.given, stack)
        resolved = ["--config", path, "--resolved-sha256", loaded.sha256]
        script, *words = options.program
        return run_ranks(
            [os.path.abspath(script), *words, *resolved, *options.for_ranks],
            ranks,
            stopped_timeout=2 * loaded.config.distributed.peer_timeout,
            files=[int(os.path.basename(path))],
            stdin=_reads_stdin(loaded),
        )
