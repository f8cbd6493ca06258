"""The commands: `megalite COMMAND ...`, and what the jobs among them share with launch/: arguments, checks, messages
and exit codes. Imports no torch.

Started by itself, a job's command is the door: it resolves and checks everything, then runs in this process, or starts
the ranks that the layout needs. Under `deepspeed` or `torchrun` the same command is a rank: it checks that it was
started as the config asks, and runs.
"""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FrameType
from typing import Any, get_args

from megalite import __version__, terminal
from megalite.config.explain import explain, table
from megalite.config.load import COMMAND_LINE, Kind, Loaded, resolve
from megalite.config.schema import Config, InferConfig
from megalite.config.typecheck import hints, mentions
from megalite.config.validate import layout_words, num_ranks, world_size_problem
from megalite.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_SIGINT,
    ConfigError,
    MegaliteError,
    Problem,
    ResourceError,
)
from megalite.model.config import ModelConfig
from megalite.preflight import as_sampled, check
from megalite.run.hosts import check_hostfile, distrust, pack_config, run_over_hosts, tell_the_door, unpack_config
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.launcher import run_ranks
from megalite.run.processes import die_with_parent

COMMANDS = {
    "infer": "generate text, as a config asks",
    "train": "train a model, as a config asks",
    "hybrid": "train and generate in one job, as a config asks",
    "convert": "cut a Hugging Face model for a layout",
    "reshard": "cut rank shards anew, for another layout",
    "export": "rank shards back to a Hugging Face folder",
    "import_deepspeed": "DeepSpeed checkpoints written elsewhere to a Hugging Face folder",
    "verify": "prove that weights are whole",
    "describe": "what a checkpoint is",
    "bench": "measure megalite beside what it replaces",
}
"""What `megalite` can be told to do; the first three are jobs (launch/), the others tools (tools/)."""

Run = Callable[[Loaded[Any]], int]
Checks = Callable[[Config], list[Problem]]
"""What a job checks of its config besides what holds for all jobs; before torch is imported."""

FLAGS = {
    "--check": "stop after the checks, to which each line of input.file belongs then",
    "--print-config": "print every value and where it came from, then stop",
    "--dry-run": "print which rank would hold what, and the bytes of it, then stop; loads nothing",
    "--no_ssh": "with --hostfile and --node_rank N: start this host's ranks only",
    "--debug": "show tracebacks for errors of all kinds",
    "--help": "show this",
}
LINES_SHOWN = 10
"""Lines of input that can't run, listed by --check."""
HOSTS = ("--hostfile", "--include", "--exclude", "--master_addr", "--master_port", "--ssh_port", "--node_rank")
"""Options with a value that go to deepspeed; the last with its flag --no_ssh, once on each host."""
VALUED = ("--config", *HOSTS, "--resolved-config", "--resolved-sha256", "--local_rank", "--local-rank")
"""Options with a value; the last four are for the ranks, from a launcher or the door."""
_DEEPSPEED = (
    "DeepSpeed's keys go into a training config's section `deepspeed`; batch size, ZeRO stage, clipping, optimizer and "
    "dtype are keys of its other sections (see --help)."
)
ELSEWHERE = {"--deepspeed": _DEEPSPEED, "--deepspeed_config": _DEEPSPEED, "--deepspeed-config": _DEEPSPEED}
"""Options of scripts that DeepSpeed's argument parser makes, and what to do here instead."""
MOST_RANKS_PER_CORE = 8
QUIET_WAIT = 3.0
"""Seconds that ranks wait which leave the message to another: a launcher kills the rest when the first one ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line, read."""

    config: str = ""
    overrides: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    hosts: tuple[str, ...] = ()
    """What deepspeed is told when the run is over several hosts."""
    resolved: str = ""
    """The resolved config, packed, when the door on another host started this rank."""
    sha256: str = ""
    """Of the resolved config, when the door started this rank."""
    program: tuple[str, ...] = ()
    """The script that was started, and the words before its options."""

    @property
    def for_ranks(self) -> list[str]:
        return ["--debug"] if "--debug" in self.flags else []


def no_checks(config: Config) -> list[Problem]:
    return []


def megalite() -> int:
    """The command `megalite`; gives its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    for kind in get_args(Kind):
        if name == kind:
            return launch(kind, command=name)
    if name in COMMANDS:
        from megalite.tools import bench, toolkit

        sys.argv = [f"megalite {name}", *sys.argv[2:]]  # as what argparse introduces the tool
        return bench.main() if name == "bench" else toolkit.tool(name)
    terminal.guard()
    try:
        if name == "--version":
            _say(f"megalite {__version__}")
            return EXIT_DONE
        if name not in ("--help", "-h"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            fix = f"Did you mean {close[0]}?" if close else "--help lists all commands."
            raise ConfigError(_usage_problem(name, "unknown command", fix))
        commands = [f"  {name:18}{meaning}" for name, meaning in COMMANDS.items()]
        _say("\n".join(["usage: megalite COMMAND ...", "", "commands, each with a --help of its own:", *commands]))
    except MegaliteError as error:
        _report(error, None, debug=False)
        return error.exit_code
    return EXIT_DONE


def launch(kind: Kind, command: str = "") -> int:
    """The whole of launch/KIND.py, and of `megalite KIND`, where `command` is that word; gives the exit code."""

    def run(loaded: Loaded[Any]) -> int:
        if kind == "infer":  # these import torch: only once everything has been checked
            from megalite.inference import job

            return job.run(loaded)
        if kind == "train":
            from megalite.hybrid.samples import write_samples
            from megalite.train import job as train_job

            return train_job.run(loaded, write_samples)
        from megalite.hybrid import job as hybrid_job

        return hybrid_job.run(loaded)

    def checks(config: Any) -> list[Problem]:
        if kind == "train":
            from megalite.train.data.prepared import check  # imports tokenizers, which --help has no need of

            return check(config)
        if kind == "hybrid":
            from megalite.hybrid.checks import problems

            return problems(config)
        return []

    words = [command] if command else []
    return main(kind, run, sys.argv[1 + len(words) :], checks, (sys.argv[0], *words))


def main(
    kind: Kind, run: Run, argv: Sequence[str] | None = None, checks: Checks = no_checks, program: Sequence[str] = ()
) -> int:
    """A job from its command line `argv` on; gives its exit code. `run` does the work and may import torch.

    `checks` are made by the process that the user starts, not again by each rank. `program`: the script that was
    started, and the words before `argv`.
    """
    terminal.guard()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    place = None
    running = False

    def run_here(loaded: Loaded[Any]) -> int:
        nonlocal running
        running = True
        return run(loaded)

    try:
        place = LaunchEnv.of(os.environ)
        with _leaving_on_signals(place):
            code = _main(kind, run_here, arguments, place, checks, program or sys.argv[:1])
        terminal.warn_of_loss()
        return code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except MegaliteError as error:
        # Before the work begins all ranks of a host find the same: one of them speaks. Later each has its own error.
        if running or place is None or place.local_rank == 0:
            _report(error, place, debug)
        else:
            time.sleep(QUIET_WAIT)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH


def evaluate() -> int:
    """The command `megalite-eval`: that of lm-evaluation-harness, which knows our model here; gives its exit code."""
    if find_spec("lm_eval") is None:
        fix = "pip install 'megalite[eval]'"
        problem = Problem(key="megalite-eval", rule="needs lm-evaluation-harness", fix=fix)
        _report(ConfigError(problem), None, debug=False)
        return ConfigError.exit_code
    from megalite import evals  # imports torch

    return evals.main()


def _main(
    kind: Kind, run: Run, argv: list[str], place: LaunchEnv | None, checks: Checks, program: Sequence[str]
) -> int:
    options = replace(read_arguments(argv), program=tuple(program))
    if "--help" in options.flags:
        _say(usage(kind, installed=len(program) > 1))
        return EXIT_DONE
    with ExitStack() as stack:
        path = options.config
        if options.resolved:
            tell_the_door()
            path = _nameless_file(unpack_config(options.resolved), stack)
        loaded, problems = resolve(kind, path, options.overrides)
    speaks = place is None or place.rank == 0
    if "--print-config" in options.flags and speaks:
        shown = loaded
        with suppress(MegaliteError):  # of a damaged folder, which the checks name
            shown = as_sampled(loaded)
        _say(table(shown))
    more = _misplaced(loaded, place, argv, options)
    if not options.sha256:
        more += checks(loaded.config)
    model = check(loaded, problems, more, read_headers=place is None)
    if "--dry-run" in options.flags and speaks:
        from megalite.dry_run import describe

        _say(describe(loaded.config, model))
    elif "--check" in options.flags and speaks:
        _check_input(as_sampled(loaded).config, model)
        _say(f"{options.config}: no problem found; {layout_words(loaded.config)}, config sha256 {loaded.sha256[:16]}")
    if options.flags & {"--print-config", "--dry-run", "--check"}:
        return EXIT_DONE
    if isinstance(loaded.config, InferConfig) and loaded.config.output.file is None:
        terminal.require_stdout()
    if place is not None:
        die_with_parent()  # the watch over launcher and peers begins only once torch is imported
    if options.hosts:
        return _start_hosts(loaded, options)
    if place is not None or num_ranks(loaded.config) == 1:
        return run(loaded)
    return _start_ranks(loaded, options)


def _check_input(config: Config, model: ModelConfig | None) -> None:
    """Read the whole input file. ConfigError for lines that can't run, which would cost a run these lines only."""
    if not isinstance(config, InferConfig) or config.input.file in (None, "-"):
        return
    from megalite.inference.io.inputs import input_problems

    found = input_problems(config.input, config.sampling, model.vocab_size if model else None)
    if found:
        more = [f"and {len(found) - LINES_SHOWN} more lines like these"] if len(found) > LINES_SHOWN else []
        raise ConfigError(*found[:LINES_SHOWN], *more)


# ---- arguments ---------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> Options:
    """Options apart from overrides; ConfigError for options that don't exist or lack their value."""
    values: dict[str, str] = {}
    flags, overrides, problems = set(), [], []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if name == "-h":
            name = "--help"
        if not name.startswith("-") or "." in name:
            overrides.append(token)
        elif name in FLAGS and not equals:
            flags.add(name)
        elif name in FLAGS:
            problems.append(_usage_problem(name, "takes no value", f"Write {name}."))
        elif name not in VALUED:
            close = difflib.get_close_matches(name, [*FLAGS, "--config"], n=1)
            fix = f"Did you mean {close[0]}?" if close else "--help lists all options."
            fix = ELSEWHERE.get(name, fix)
            problems.append(_usage_problem(name, "unknown option", fix))
        elif not equals and (not rest or rest[0].startswith("-")):
            problems.append(_usage_problem(name, "needs a value", f"Write {name} VALUE."))
        elif values.setdefault(name, text := value if equals else rest.pop(0)) != text:
            problems.append(_usage_problem(name, "is given twice", "Keep one."))
    if "--help" in flags:
        return Options(flags=frozenset(flags))
    hosts = [word for name in HOSTS if name in values for word in (name, values[name])]
    hosts += [] if "--no_ssh" not in flags else ["--no_ssh"]
    if hosts and "--hostfile" not in values:
        problems.append(_usage_problem(hosts[0], "needs --hostfile", "Add --hostfile FILE."))
    if not values.get("--config") and "--resolved-config" not in values:
        stray = next((one for one in overrides if one.endswith((".yaml", ".yml"))), "")
        overrides = [one for one in overrides if one != stray]
        fix = f"Write --config {stray or 'configs/infer/demo.yaml'}."
        problems.append(_usage_problem("--config", "is needed: the config file", fix))
    if problems:
        raise ConfigError(*problems)
    return Options(
        config=values.get("--config", ""),
        overrides=tuple(overrides),
        flags=frozenset(flags),
        hosts=tuple(hosts),
        resolved=values.get("--resolved-config", ""),
        sha256=values.get("--resolved-sha256", ""),
    )


def _usage_problem(key: str, rule: str, fix: str) -> Problem:
    return Problem(key=key, rule=rule, fix=fix, origin=COMMAND_LINE)


def usage(kind: Kind, installed: bool) -> str:
    """What `--help` prints; `installed`: of `megalite KIND`, else of launch/KIND.py."""
    script = f"$(which megalite) {kind}" if installed else f"launch/{kind}.py"
    door = f"megalite {kind}" if installed else f"python {script}"
    lines = [
        f"usage: {door} --config FILE [section.key=value ...] [options]",
        f"       {door} --hostfile HOSTS --config FILE [section.key=value ...] [options]",
        f"       deepspeed --num_gpus N {script} --config FILE [section.key=value ...] [options]",
        f"       torchrun --nproc_per_node N {script} --config FILE [section.key=value ...] [options]",
        "",
        f"{door.split()[0]} starts the ranks that the config asks for, tp * pp * dp; under deepspeed or torchrun N "
        "must be that.",
        "With --hostfile (lines `HOST slots=RANKS`) it starts them on several hosts through deepspeed; it passes on",
        "--include, --exclude, --master_addr, --master_port, --ssh_port and --node_rank.",
        "",
        "options:",
        *(f"  {name:16}{meaning}" for name, meaning in {"--config FILE": "the config, YAML", **FLAGS}.items()),
        "",
        "keys of the config, by section; each can be overridden as section.key=value:",
        "",
    ]
    return "\n".join(lines) + "\n" + explain(kind)


@contextmanager
def _leaving_on_signals(place: LaunchEnv | None) -> Iterator[None]:
    """Until the work begins, and takes the signals over, SIGINT and SIGTERM end this process with one line.

    The door and the first rank that a launcher started on a host say it.
    """
    speaks = place is None or (place.local_rank == 0 and door_of(os.environ) is None)

    def leave(signum: int, frame: FrameType | None) -> None:
        if speaks:
            os.write(2, f"stopped by {signal.Signals(signum).name} before the run began.\n".encode())
        os._exit(128 + signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):  # else nohup, or somebody's own
            signal.signal(signum, leave)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


# ---- processes ---------------------------------------------------------------------------------------------------


def _misplaced(loaded: Loaded[Any], place: LaunchEnv | None, argv: Sequence[str], options: Options) -> list[Problem]:
    """What is wrong with how this rank was started, if it is one."""
    found: list[Problem | None] = []
    if place is not None:
        started, command = _launched(place, num_ranks(loaded.config), [*options.program, *argv])
        found.append(world_size_problem(loaded.config, place.world_size, started, command))
        if options.hosts:
            found.append(_usage_problem(options.hosts[0], "can't be used by a rank", "Start with plain python."))
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
    hosts = max(1, place.world_size // (place.started_here or place.world_size))
    each = -(-wanted // hosts)
    started = f"{place.launcher} started {place.world_size} rank{'s' if place.world_size != 1 else ''}"
    if place.launcher == "torchrun":
        command = f"torchrun {f'--nnodes {hosts} ' if hosts > 1 else ''}--nproc_per_node {each}"
    else:
        command = f"deepspeed --num_nodes {hosts} --num_gpus {each}" if hosts > 1 else f"deepspeed --num_gpus {each}"
    kept = [one for one in argv if not one.startswith(("--local_rank", "--local-rank"))]
    return started, shlex.join([*command.split(), *kept])


def _nameless_file(text: str, stack: ExitStack) -> str:
    """The path of a file in memory that holds `text`, for this process and those that get its descriptor."""
    file = stack.enter_context(open(os.memfd_create("config"), "w", encoding="utf-8"))
    file.write(text)
    file.flush()
    return f"/proc/self/fd/{file.fileno()}"


def _reads_stdin(loaded: Loaded[Any]) -> bool:
    return isinstance(loaded.config, InferConfig) and loaded.config.input.file == "-"


def _start_hosts(loaded: Loaded[Any], options: Options) -> int:
    """Start the ranks on several hosts through deepspeed; gives its exit code."""
    filtered = "--include" in options.hosts or "--exclude" in options.hosts
    check_hostfile(options.hosts[1], num_ranks(loaded.config), filtered)
    if _reads_stdin(loaded):
        rule = "standard input can't be read on another host"
        raise ConfigError(Problem(key="input.file", rule=rule, value="-", fix="Give a file that every host has."))
    resolved = ["--resolved-config", pack_config(loaded.given), "--resolved-sha256", loaded.sha256]
    script, *words = options.program
    return run_over_hosts(options.hosts, os.path.abspath(script), [*words, *resolved, *options.for_ranks])


def _start_ranks(loaded: Loaded[Any], options: Options) -> int:
    """Start the ranks on this host with the resolved config in a file without a name; gives the run's exit code."""
    ranks, cores = num_ranks(loaded.config), os.cpu_count() or 1
    if ranks > max(64, MOST_RANKS_PER_CORE * cores):
        raise ResourceError(
            f"parallel: {layout_words(loaded.config)} on this host, which has {cores} cores. Use several hosts "
            "(--hostfile), or lower parallel.tp, pp or dp."
        )
    with ExitStack() as stack:
        path = _nameless_file(loaded.given, stack)
        resolved = ["--config", path, "--resolved-sha256", loaded.sha256]
        script, *words = options.program
        return run_ranks(
            [os.path.abspath(script), *words, *resolved, *options.for_ranks],
            ranks,
            stopped_timeout=2 * loaded.config.distributed.peer_timeout,
            files=[int(os.path.basename(path))],
            stdin=_reads_stdin(loaded),
        )


def _say(text: str) -> None:
    """Print what the command was started for."""
    print(text)
    terminal.require_stdout()


def _report(error: MegaliteError, place: LaunchEnv | None, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    where = ""
    if place is not None and place.rank != 0:
        where = f"[rank {place.rank} on {socket.gethostname()}] "
    sys.stderr.write("".join(f"{where}{line}\n" for line in error.lines()))
    sys.stderr.flush()
