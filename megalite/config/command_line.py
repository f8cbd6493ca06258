"""The command line of a job: options, overrides and what --help says of them. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from megalite.config.explain import explain
from megalite.config.load import COMMAND_LINE, SCHEMAS, Kind
from megalite.config.typecheck import key_of, printable
from megalite.errors import ConfigError, Problem

FLAGS = {
    "--check": "stop after the checks, to which the tokenizer and every prompt belong then; with --hostfile or under a "
    "launcher the ranks also meet, and show in a table what each has",
    "--print-config": "print every value and where it came from, then stop",
    "--dry-run": "print which rank would hold what, and the bytes of it, then stop; loads nothing",
    "--no_ssh": "with --hostfile and --node_rank N: start this host's ranks only",
    "--live": "as monitor.live=true: ranks, queues, tokens/s and GPUs on the terminal while it runs",
    "--debug": "show tracebacks for errors of all kinds",
    "--help": "show this",
}
_TAKEN = {
    "--config FILE": "the config, YAML",
    "--max-restarts N": "start a run again, up to N times, that was lost or crashed; it goes on from what is on disk",
}
HOSTS = ("--hostfile", "--include", "--exclude", "--master_addr", "--master_port", "--ssh_port", "--node_rank")
"""Options with a value that go to deepspeed; the last with its flag --no_ssh, once on each host."""
_FROM_US = ("--resolved-config", "--resolved-sha256", "--replica", "--socket", "--external")
RESTARTS = "--max-restarts"
VALUED = ("--config", RESTARTS, *HOSTS, *_FROM_US, "--local_rank", "--local-rank")
"""Options with a value; those after the hosts' are for the processes of a run, from its launcher or one another."""
_DEEPSPEED = (
    "DeepSpeed's keys go into a training config's section `deepspeed`; batch size, ZeRO stage, clipping, optimizer and "
    "dtype are keys of its other sections (see --help)."
)
ELSEWHERE = {"--deepspeed": _DEEPSPEED, "--deepspeed_config": _DEEPSPEED, "--deepspeed-config": _DEEPSPEED}
"""Options of scripts that DeepSpeed's argument parser makes, and what to do here instead."""
_EXAMPLES = {"infer": "demo", "train": "sft", "hybrid": "grpo_demo", "serve": "demo"}
"""Configs to begin with, in configs/KIND."""


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
    restarts: int = 0
    """How often a run that is lost is started again."""
    program: tuple[str, ...] = ()
    """The script that was started, and the words before its options."""
    replica: str = ""
    """`NUMBER` or `NUMBER/COUNT` of the server's replica that this process is, or is a rank of; empty: of none."""
    socket: str = ""
    """Where its HTTP process listens."""
    external: tuple[int, ...] = ()
    """Descriptors with which rank 0 of a launcher's run started this HTTP process: of its unix socket, and if there are
    other hosts of its TCP socket and of a file with the run's token."""

    @property
    def for_ranks(self) -> list[str]:
        options: list[str] = [flag for flag in ("--debug", "--check") if flag in self.flags]
        return [*options, "--replica", self.replica, "--socket", self.socket] if self.replica else options

    @property
    def replica_place(self) -> tuple[int, int]:
        """Number of the replica, and of how many on this host."""
        number, _, count = self.replica.partition("/")
        return int(number or 0), int(count or 1)


def read_arguments(argv: Sequence[str], kind: Kind = "infer") -> Options:
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
            problems.append(usage_problem(name, "takes no value", f"Write {name}."))
        elif name not in VALUED:
            following = rest[0] if rest and "=" not in rest[0] and not rest[0].startswith("-") else ""
            fix = _instead_of(name, value or following, kind)
            problems.append(usage_problem(name, "unknown option", fix))
        elif not equals and (not rest or rest[0].startswith("-")):
            problems.append(usage_problem(name, "needs a value", f"Write {name} VALUE."))
        elif values.setdefault(name, text := value if equals else rest.pop(0)) != text:
            problems.append(usage_problem(name, "is given twice", "Keep one."))
    if "--live" in flags:
        overrides.append("monitor.live=true")
    if "--help" in flags:
        return Options(flags=frozenset(flags))
    hosts = [word for name in HOSTS if name in values for word in (name, values[name])]
    hosts += [] if "--no_ssh" not in flags else ["--no_ssh"]
    if hosts and "--hostfile" not in values:
        problems.append(usage_problem(hosts[0], "needs --hostfile", "Add --hostfile FILE."))
    if not values.get("--config") and "--resolved-config" not in values:
        words = [one for one in overrides if "=" not in one]
        named = next(
            (one for one in words if one.endswith((".yaml", ".yml"))), f"configs/{kind}/{_EXAMPLES[kind]}.yaml"
        )
        model = f" model.path={words[0]}" if words and words[0] != named and not problems else ""
        fix = f"Write --config {printable(f'{named}{model}')}."
        problems.append(usage_problem("--config", "is needed: the config file", fix))
    restarts = values.get(RESTARTS, "0")
    if not (restarts.isascii() and restarts.isdecimal()):
        problems.append(usage_problem(RESTARTS, f"must be a whole number, got {restarts!r}", "Write --max-restarts 3."))
    if problems:
        raise ConfigError(*problems)
    return Options(
        restarts=int(restarts),
        config=values.get("--config", ""),
        overrides=tuple(overrides),
        flags=frozenset(flags),
        hosts=tuple(hosts),
        resolved=values.get("--resolved-config", ""),
        sha256=values.get("--resolved-sha256", ""),
        replica=values.get("--replica", ""),
        socket=values.get("--socket", ""),
        external=tuple(map(int, filter(None, values.get("--external", "").split(",")))),
    )


def _instead_of(name: str, value: str, kind: Kind) -> str:
    """What to write in place of an option that there is not."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    key = key_of(name.lstrip("-").replace("-", "_"), SCHEMAS[kind])
    if key is not None:
        return f"Write {printable(f'{key}={value}' if value else f'{key}=VALUE')}."
    close = difflib.get_close_matches(name, [*FLAGS, "--config", RESTARTS, *HOSTS], n=1, cutoff=0.7)
    return f"Did you mean {close[0]}?" if close else "--help lists all options."


def usage_problem(key: str, rule: str, fix: str) -> Problem:
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
        *(f"  {name:18}{meaning}" for name, meaning in (_TAKEN | FLAGS).items()),
        "",
        "keys of the config, by section; each can be overridden as section.key=value:",
        "",
    ]
    return "\n".join(lines) + "\n" + explain(kind)
