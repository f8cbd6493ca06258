"""A run over several hosts, which DeepSpeed's launcher starts: what it is told, what its ranks may believe. No torch.

DeepSpeed reaches the hosts through their shells (pdsh and ssh), which replace `$HOME`, `$(...)`, backticks, `%h` and
`\\"` in arguments; all hosts get the same changed text, so no comparison between them sees it. So the door sends the
resolved config in an alphabet that no shell touches, with its digest, and no value as it stands.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from megalite.errors import EXIT_RANK_LOST, ConfigError, Problem
from megalite.run.launch_env import DOOR_VARIABLE
from megalite.run.processes import (
    adopt_orphans,
    ancestors,
    descendants,
    die_with_parent,
    launcher_name,
    this_process,
)
from megalite.run.status import TOLD

_LONGEST = 96 << 10
"""Bytes of a packed config; the whole command of a host is one argument of ssh, of at most 128 KiB."""
_HARMLESS = re.compile(r"[\w./:@,+=-]*", re.ASCII)
_CHANGED = re.compile(r'[$`"\\]|%[hnu]')
"""What a shell or pdsh would replace, or take away."""
_LAST_LINES = 5.0
"""Seconds to read what the launcher wrote before it ended."""


def pack_config(text: str) -> str:
    """A config's text in letters, digits, `-`, `_` and `=`. ConfigError if it is too long to be sent."""
    packed = base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()
    if len(packed) > _LONGEST:
        fix = "Put prompts in a file that every host has (input.file)."
        raise ConfigError(Problem(key="--hostfile", rule="the config is too long to be sent to the hosts", fix=fix))
    return packed


def unpack_config(packed: str) -> str:
    try:
        return zlib.decompress(base64.urlsafe_b64decode(packed)).decode()
    except (ValueError, zlib.error) as error:
        raise ConfigError(Problem(key="--resolved-config", rule="was changed on its way to this host")) from error


def host_slots(path: str) -> list[int]:
    """Ranks of each host of a hostfile; ConfigError if it can't be read."""
    slots = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(key="--hostfile", rule=f"can't be read: {error}", value=path)) from error
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            if len(words) != 2 or not (found := re.fullmatch(r"slots=(\d+)", words[1])):
                raise ConfigError(Problem(key=f"{path}:{number}", rule="must be `HOST slots=NUMBER`", value=line))
            slots.append(int(found[1]))
    return slots


def check_hostfile(path: str, num_ranks: int, filtered: bool) -> None:
    """ConfigError unless the hosts start as many ranks as the layout needs; `filtered`: not all of them take part."""
    slots = sum(host_slots(path))
    if slots != num_ranks and not filtered:
        rule = f"its hosts start {slots} ranks, and the layout needs {num_ranks} (parallel.tp * pp * dp)"
        raise ConfigError(Problem(key="--hostfile", rule=rule, value=path, fix="Change one of them, or use --include."))


def run_over_hosts(launcher_options: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Run `script arguments` under `deepspeed launcher_options`; returns the run's exit code, or a signal's to stop.

    DeepSpeed's launcher leaves with 0 also when the pdsh under it was killed, so 0 is believed only if rank 0 has told
    through its standard error that the run ended so (`tell_the_door`).
    ConfigError: something that has to stand in the command as it is would not reach the hosts unchanged.
    """
    for word in (os.getcwd(), sys.executable, script, *launcher_options, *arguments):
        if not _HARMLESS.fullmatch(word):
            rule = "holds characters that a remote shell would change, and has to reach every host"
            raise ConfigError(Problem(key=word, rule=rule, fix="Use letters, digits and ./:@,+=-_ only."))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options]
    command += ["--no_local_rank", "--log_level", "critical", script, *arguments]
    adopt_orphans()
    launcher = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )
    told: list[int] = []
    reader = threading.Thread(target=_pass_on_errors, args=(launcher.stderr, told), daemon=True)
    reader.start()
    received: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        launcher.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    code = launcher.wait()
    reader.join(_LAST_LINES)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if received:
        return 128 + received[0]
    if not code and not told:
        for process in descendants(os.getpid()):  # connections without a pdsh, whose ranks would go on
            process.kill()
        sys.stderr.write("error: deepspeed left with code 0, but rank 0 has not said how the run ended.\n")
        return EXIT_RANK_LOST
    return (told and told[0]) or (code if code >= 0 else 128 - code)


def tell_the_door() -> None:
    """In a rank that the door of several hosts started: its standard error carries what rank 0 tells the door."""
    os.environ[DOOR_VARIABLE] = f"{os.getppid()}:2"


def _pass_on_errors(stream: IO[bytes], told: list[int]) -> None:
    """Copy the launcher's standard error to ours, but for what rank 0 tells: the exit code goes to `told`."""
    for line in stream:
        if found := TOLD.search(line):
            told += [int(found[1])] if found[1] else []
        else:
            with suppress(OSError):  # nobody reads any more
                sys.stderr.buffer.write(line)
                sys.stderr.flush()


def distrust(texts: Sequence[str], overrides: Sequence[str], command: str) -> list[Problem]:
    """For a rank of a run over hosts that was started without the door: arguments that may not be what was typed.

    `texts`: keys that were given text, in which a change can't be seen; `overrides`: the arguments; `command`: what to
    type instead.
    """
    shown = [one for one in overrides if _CHANGED.search(one)]
    by_hand = any(launcher_name(one) in ("deepspeed", "deepspeed.launcher.runner") for one in ancestors(this_process()))
    if not shown and (by_hand or not texts):
        return []
    what = ", ".join(shown or texts)
    rule = "text in arguments goes through a shell on every host, which may change it ($, `, %h, quotes)"
    return [Problem(key=what, rule=rule, fix=f"Type instead, with the overrides as you meant them: {command}")]
