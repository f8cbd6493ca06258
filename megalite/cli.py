"""The commands: `megalite COMMAND ...`, and what the jobs among them share with launch/: arguments, checks, messages
and exit codes. Imports no torch.

Started by itself, a job's command is the door: it resolves and checks everything, then runs in this process, or starts
the ranks that the layout needs. Under `deepspeed` or `torchrun` the same command is a rank: it checks that it was
started as the config asks, and runs.
"""

from __future__ import annotations

import difflib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from megalite import __version__, terminal
from megalite.config.command_line import RESTARTS, Options, read_arguments, usage, usage_problem
from megalite.config.explain import table
from megalite.config.load import COMMAND_LINE, Kind, Loaded, loaded_from, resolve
from megalite.config.schema import Config, GeneratingConfig, InferConfig, SamplingParams, ServeConfig
from megalite.config.structured import structured_problem
from megalite.config.validate import layout_words, num_ranks, parallel_sections
from megalite.core.progress import here
from megalite.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_SIGINT,
    ConfigError,
    MegaliteError,
    Problem,
    ResourceError,
)
from megalite.files import read_whole
from megalite.monitor.words import wrapped
from megalite.preflight import as_sampled, check, given, read_shape
from megalite.run import restarts
from megalite.run.facts import table as table_of_ranks
from megalite.run.hostfile import hosts_of
from megalite.run.hosts import tell_the_door, unpack_config
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.placement import Host
from megalite.run.processes import die_with_parent
from megalite.run.start import misplaced, nameless_file, start_hosts, start_ranks
from megalite.weights.hf import at_hand

COMMANDS = {
    "infer": "generate text, as a config asks",
    "train": "train a model, as a config asks",
    "hybrid": "train and generate in one job, as a config asks",
    "serve": "answer requests over HTTP as OpenAI's API does",
    "chat": "chat with a model in the terminal",
    "convert": "cut a Hugging Face model for a layout",
    "reshard": "cut rank shards anew, for another layout",
    "export": "rank shards back to a Hugging Face folder",
    "import_deepspeed": "DeepSpeed checkpoints written elsewhere to a Hugging Face folder",
    "verify": "prove that weights are whole",
    "describe": "what a checkpoint is",
    "plan": "which layout a model should have on some devices, and why",
    "plot_timeline": "a picture of who computes and who waits, from a run's timeline",
    "bench": "measure megalite beside what it replaces",
}
"""What `megalite` can be told to do; the first four are jobs (launch/), the others tools (tools/)."""

LINES_SHOWN = 10
"""Prompts that can't run, listed by --check."""
QUIET_WAIT = 3.0
"""Seconds that ranks wait which leave the message to another: a launcher kills the rest when the first one ends."""


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
            raise ConfigError(usage_problem(name, "unknown command", fix))
        commands = [f"  {name:18}{meaning}" for name, meaning in COMMANDS.items()]
        _say("\n".join(["usage: megalite COMMAND ...", "", "commands, each with a --help of its own:", *commands]))
    except MegaliteError as error:
        _report(error, None, debug=False)
        return error.exit_code
    return EXIT_DONE


def launch(kind: Kind, command: str = "") -> int:
    """The whole of launch/KIND.py, and of `megalite KIND`, where `command` is that word; gives the exit code."""
    words = [command] if command else []
    return main(kind, sys.argv[1 + len(words) :], (sys.argv[0], *words))


def main(kind: Kind, argv: Sequence[str], program: Sequence[str]) -> int:
    """A job from its command line `argv` on; gives its exit code.

    `program`: the script that was started, and the words before `argv`.
    """
    terminal.guard()
    debug = "--debug" in argv
    place = None
    running = False
    try:
        place = LaunchEnv.of(os.environ)
        if place is not None and place.over_hosts:  # of addresses without a name in the DNS, which does not matter
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with _leaving_on_signals(place):
            work = _prepare(kind, argv, place, program)
            running = True
            code = work() if work else EXIT_DONE
        terminal.warn_of_loss()
        return code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except MegaliteError as error:
        # Before the work begins all ranks of a host find the same: one of them speaks. Later each has its own error.
        if place is not None and place.over_hosts and not running:
            _refuse(error, place, debug)
        elif running or place is None or place.local_rank == 0:
            _report(error, place, debug, running)
        else:
            time.sleep(QUIET_WAIT)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if place is not None and place.world_size > 1:
            sys.stderr.write(f"{_where(place, running)}{type(error).__name__}: {error}\n")
        return EXIT_CRASH


def job_problems(kind: Kind, config: Any) -> list[Problem]:
    """What is wrong with a config besides what is checked for all jobs. Imports no torch.

    Found by the process that the user starts, not again by each rank.
    """
    if kind == "train":
        from megalite.train.data.prepared import check  # imports tokenizers, which --help has no need of

        return check(config)
    found = _grammar_problems(config.sampling)
    if kind == "hybrid":
        from megalite.hybrid.checks import problems

        found += problems(config)
    if kind == "serve":
        from megalite.serve.checks import problems as server_problems

        found += server_problems(config)
    return found


def _grammar_problems(sampling: SamplingParams) -> list[Problem]:
    """What is wrong with a schema or grammar that has its form."""
    key, given = "sampling.structured_outputs", sampling.structured_outputs
    if not isinstance(given, dict) or structured_problem(key, given) is not None:
        return []
    from megalite.text.grammar import GrammarError, check_grammar

    try:
        check_grammar(given)
    except GrammarError as error:
        return [Problem(key=key, rule=str(error))]
    return []


def _restart_problems(kind: Kind, config: Any, place: LaunchEnv | None) -> list[Problem]:
    """Why this process can't start the run again when it is lost."""
    if place is not None:
        fix = "Start with plain python, or use what the launcher has for that (torchrun --max-restarts)."
        return [usage_problem(RESTARTS, "can't be used by a rank", fix)]
    if kind == "serve":
        return [usage_problem(RESTARTS, "is not an option of the server", "Set server.restarts.")]
    return restarts.problems(config)


def run_job(kind: Kind, loaded: Loaded[Any], options: Options) -> int:
    """The work of a rank, or of a job of one rank; gives its exit code. Imports torch."""
    if kind == "serve":
        from megalite.serve import worker

        return worker.run(loaded, options)
    if kind == "infer":
        from megalite.inference import job

        return job.run(loaded)
    if kind == "train":
        from megalite.hybrid.samples import write_samples
        from megalite.train import job as train_job

        return train_job.run(loaded, write_samples)
    from megalite.hybrid import job as hybrid_job

    return hybrid_job.run(loaded)


def evaluate() -> int:
    """The command `megalite-eval`: that of lm-evaluation-harness, which knows our model here; gives its exit code."""
    if find_spec("lm_eval") is None:
        fix = "pip install 'megalite[eval]'"
        problem = Problem(key="megalite-eval", rule="needs lm-evaluation-harness", fix=fix)
        _report(ConfigError(problem), None, debug=False)
        return ConfigError.exit_code
    from megalite import evals  # imports torch

    return evals.main()


def _prepare(
    kind: Kind, argv: Sequence[str], place: LaunchEnv | None, program: Sequence[str]
) -> Callable[[], int] | None:
    """Check everything, and print what is asked for. What is to be done then; None: no more."""
    options = replace(read_arguments(argv, kind), program=tuple(program))
    if "--help" in options.flags:
        _say(usage(kind, installed=len(program) > 1))
        return None
    with ExitStack() as stack:
        path = options.config
        if options.resolved:
            tell_the_door()
            path = nameless_file(unpack_config(options.resolved), stack)
        loaded, problems = resolve(kind, path, options.overrides)
    if options.resolved:
        found = {key: "the door" if origin.startswith(path) else origin for key, origin in loaded.origins.items()}
        loaded = replace(loaded, origins=found)
    speaks = place is None or place.rank == 0
    loaded = _settle_layout(loaded, place, options, speaks and not problems)
    if "--print-config" in options.flags and speaks:
        shown = loaded
        with suppress(MegaliteError):  # of a damaged folder, which the checks name
            shown = as_sampled(loaded)
        _say(table(shown))
    more = misplaced(loaded, place, argv, options)
    if not options.sha256:
        more += job_problems(kind, loaded.config)
    if options.restarts:
        more += _restart_problems(kind, loaded.config, place)
    model = check(loaded, problems, more, read_headers=place is None)
    if isinstance(loaded.config, InferConfig) and loaded.config.output.file and not options.sha256:
        from megalite.inference.io.output_file import check_settings

        check_settings(as_sampled(loaded).config)
    if isinstance(loaded.config, ServeConfig) and speaks and not options.sha256:
        from megalite.serve.checks import warnings

        for warning in warnings(loaded.config.server):
            print(wrapped(f"warning: {warning}"), file=sys.stderr)
    if "--dry-run" in options.flags and speaks:
        from megalite.dry_run import describe

        _say(describe(loaded.config, model, _hosts(place, options)))
    elif "--check" in options.flags:
        if not options.sha256:
            _check_input(as_sampled(loaded).config)
        if options.hosts:
            return partial(start_hosts, loaded, options)
        if place is not None and place.world_size > 1:
            return partial(_roll_call, loaded)
        if speaks:
            _say(f"{options.config}: no problem found; {_what(loaded)}")
    if options.flags & {"--print-config", "--dry-run", "--check"}:
        return None
    if isinstance(loaded.config, InferConfig) and loaded.config.output.file is None:
        terminal.require_stdout()
    if place is not None or options.replica:
        die_with_parent()  # the watch over launcher and peers begins only once torch is imported
    if options.restarts and kind != "serve":
        start = start_hosts if options.hosts else start_ranks
        return partial(restarts.run, loaded, lambda again: start(again, options), options.restarts)
    if options.hosts:
        return partial(start_hosts, loaded, options)
    if isinstance(loaded.config, ServeConfig) and place is None:
        if not options.replica:
            return partial(_run_http, loaded, options)
        loaded, options = _one_replica(loaded, options)
    if place is not None or num_ranks(loaded.config) == 1:
        return partial(run_job, kind, loaded, options)
    return partial(start_ranks, loaded, options)


def _hosts(place: LaunchEnv | None, options: Options) -> Sequence[Host]:
    """The hosts of the run that this process starts or is a rank of; empty: this one alone."""
    if options.hosts:
        return hosts_of(options.hosts)
    from megalite.planner import choose

    return choose.Place.of(place).hosts if place is not None else ()


def _what(loaded: Loaded[Any]) -> str:
    return f"{layout_words(loaded.config)}, config sha256 {loaded.sha256[:16]}"


def _roll_call(loaded: Loaded[Any]) -> int:
    """The ranks meet, compare what they have, show it and leave; gives the exit code. Imports torch."""
    from megalite.run import runtime

    with runtime.start(loaded.config.distributed, given(loaded), thorough=True) as run:
        if run.rank == 0:
            print("\n".join(table_of_ranks(run.ranks)))
            _say(f"no problem found; {_what(loaded)}")
    return EXIT_DONE


def _settle_layout(loaded: Loaded[Any], place: LaunchEnv | None, options: Options, speaks: bool) -> Loaded[Any]:
    """The config with the sizes of its layout that were left open; which, and why, is said on standard error."""
    if not any(section.is_open for section in parallel_sections(loaded.config).values()):
        return loaded
    from megalite.planner import choose

    hosts = _hosts(place, options)
    where = choose.Place.on(hosts) if hosts else choose.Place()
    loaded, said = choose.choose(loaded, lambda: read_shape(loaded.config), where)
    if speaks and said:
        print("\n".join(said), file=sys.stderr, flush=True)
    return loaded


def _run_http(loaded: Loaded[ServeConfig], options: Options) -> int:
    """The work of the server's HTTP process; gives its exit code. Imports no torch."""
    from megalite.serve import front

    external = None
    if options.external:
        unix, *far = options.external
        token = bytes.fromhex(read_whole(f"/proc/self/fd/{far[1]}", 1 << 10).decode()) if far else b""
        external = front.External(unix=unix, tcp=far[0] if far else None, token=token)
    return front.main(loaded, options, external)


def _one_replica(loaded: Loaded[ServeConfig], options: Options) -> tuple[Loaded[ServeConfig], Options]:
    """What the ranks of one of the server's replicas are started with."""
    parallel = loaded.config.parallel
    config = replace(loaded.config, parallel=replace(parallel, dp=1))
    origins = loaded.origins | {"parallel.dp": COMMAND_LINE}
    return loaded_from(config, origins), replace(options, replica=f"{options.replica}/{parallel.dp}")


def _check_input(config: Config) -> None:
    """Read the model's tokenizer, where it is on this disk, and every prompt. ConfigError for prompts that can't run,
    which would cost a run these only; CheckpointError: the tokenizer is damaged."""
    if not isinstance(config, GeneratingConfig):
        return
    from megalite.inference.io.inputs import PromptLimits
    from megalite.inference.io.job_input import input_problems
    from megalite.weights.folder import ModelFolder  # imports tokenizers, which --help has no need of

    assert config.model.path is not None, "refused before"
    path = at_hand(config.model.path, config.model.revision)
    limits = PromptLimits.of(ModelFolder.open(path, tokenizer=config.model.tokenizer), config) if path else None
    if limits and limits.tokenizer is None and not Path(config.model.path).is_dir():
        limits = None  # of a hub id there may be no more than config.json here yet
    if not isinstance(config, InferConfig) or config.input.file == "-":
        return
    found = input_problems(config.input, config.sampling, limits)
    if found:
        more = [f"and {len(found) - LINES_SHOWN} more like these"] if len(found) > LINES_SHOWN else []
        raise ConfigError(*found[:LINES_SHOWN], *more)


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


def _say(text: str) -> None:
    """Print what the command was started for."""
    print(text)
    terminal.require_stdout()


def _where(place: LaunchEnv, running: bool) -> str:
    """Before what a rank of several says: who it is, and where it was in its work."""
    inside = f", {here.where}" if running else ""
    return f"[rank {place.rank} on {socket.gethostname()}{inside}] "


def _refuse(error: MegaliteError, place: LaunchEnv, debug: bool) -> None:
    """Tell the ranks of other hosts, which would wait for this one, why it does not come; rank 0 tells the user."""
    from megalite.run.joining import refuse  # imports torch

    die_with_parent()
    try:
        refuse(place, error)
    except ConfigError as all_problems:
        _report(all_problems, place, debug)
    except MegaliteError as unreached:
        if place.local_rank == 0:
            _report(error, place, debug)
            _report(unreached, place, debug)


def _report(error: MegaliteError, place: LaunchEnv | None, debug: bool, running: bool = False) -> None:
    if debug:
        traceback.print_exc()
    where = ""
    ones_own = running and isinstance(error, ResourceError)  # what else rank 0 says is the whole run's affair
    if place is not None and place.world_size > 1 and (place.rank != 0 or ones_own):
        where = _where(place, running)
    sys.stderr.write("".join(f"{where}{line}\n" for line in error.lines()))
    sys.stderr.flush()
