"""A run over several hosts, which DeepSpeed's launcher starts: what it is told, what its ranks may believe. No torch.

DeepSpeed reaches the hosts through their shells (pdsh and ssh), which replace `$HOME`, `$(...)`, backticks, `%h` and
`\\"` in arguments; all hosts get the same changed text, so no comparison between them sees it. So the door sends the
resolved config in an alphabet that no shell touches, with its digest, and no value as it stands.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
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
_CONNECT, _ANSWER = 10, 30.0
"""Seconds for ssh to connect to a host, and to come back from it."""
_AT_ONCE = 32
"""Hosts that are asked at the same time."""
_THERE, _MISSING = "megalite-there", "megalite-missing:"
"""What a host says."""
_SSH_FIXES = {
    "Permission denied": "Give it your public key: ssh-copy-id {host}.",
    "Host key verification failed": "Connect once by hand (ssh {host}), and compare the fingerprint that it shows.",
    "resolve hostname": "Correct the name in the hostfile, or give its address.",
    "refused|timed out|No route|unreachable": "Is sshd running there, its port right (--ssh_port) and not shut off?",
}
"""What to do about what ssh says, by what occurs in it."""
_NOTE = re.compile(rb"(?:[^ ]+: )?\[[-\d ]+[:,\d]+\] \[[A-Z]+\] \[launch\.py:")
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


def check_reachable(hosts: Sequence[str], ssh_port: str | None, needed: Sequence[str]) -> None:
    """ConfigError naming every host that ssh does not reach without a password, or that lacks a file that is `needed`.

    All are asked at once. Their names and paths must be free of what shells change.
    """
    tests = [f"test -e {path} || echo {_MISSING}{path};" for path in needed]
    port = ["-p", ssh_port] if ssh_port else []
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}", *port]

    def problems(host: str) -> list[Problem]:
        command = ["ssh", *options, host, " ".join([*tests, f"echo {_THERE}"])]
        try:
            asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER)
        except subprocess.TimeoutExpired:
            return [
                Problem(key=f"host {host}", rule=f"ssh did not answer within {_ANSWER:g} s", fix=f"Try: ssh {host}.")
            ]
        said = asked.stdout.splitlines()
        if _THERE not in said:
            why = (asked.stderr.strip().splitlines() or [f"ssh left with code {asked.returncode}"])[-1].strip()
            fix = next((fix for words, fix in _SSH_FIXES.items() if re.search(words, why)), "Try by hand: ssh {host}.")
            return [Problem(key=f"host {host}", rule=why.rstrip("."), fix=fix.format(host=host))]
        missing = [line.removeprefix(_MISSING) for line in said if line.startswith(_MISSING)]
        fix = "Every host needs the project and its Python at the same paths."
        return [Problem(key=f"host {host}", rule=f"has no {path}", fix=fix) for path in missing]

    absent = [name for name in ("ssh", "pdsh") if shutil.which(name) is None]
    if absent:
        fix = f"Install {' and '.join(absent)}, or start each host by itself with --no_ssh and --node_rank."
        raise ConfigError(Problem(key="--hostfile", rule=f"needs {' and '.join(absent)} here", fix=fix))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [problem for some in pool.map(problems, hosts) for problem in some]
    if found:
        raise ConfigError(*found)


def check_harmless(words: Sequence[str]) -> None:
    """ConfigError if a shell would change one of the words of a command."""
    for word in words:
        if not _HARMLESS.fullmatch(word):
            rule = "holds characters that a remote shell would change, and has to reach every host"
            raise ConfigError(Problem(key=word, rule=rule, fix="Use letters, digits and ./:@,+=-_ only."))


def run_over_hosts(launcher_options: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Run `script arguments` under `deepspeed launcher_options`; returns the run's exit code, or a signal's to stop.

    DeepSpeed's launcher leaves with 0 also when the pdsh under it was killed, so 0 is believed only if rank 0 has told
    through its standard error that the run ended so (`tell_the_door`).
    ConfigError: something that has to stand in the command as it is would not reach the hosts unchanged.
    """
    check_harmless([os.getcwd(), sys.executable, script, *launcher_options, *arguments])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options]
    command += ["--no_ssh_check", "--no_local_rank", "--log_level", "critical", script, *arguments]
    adopt_orphans()
    launcher = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )
    told: list[int] = []
    readers = [
        threading.Thread(target=_pass_on_errors, args=(launcher.stderr, told), daemon=True),
        threading.Thread(target=_pass_on_output, args=(launcher.stdout,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    received: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        launcher.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    code = launcher.wait()
    for reader in readers:
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


def _pass_on_output(stream: IO[bytes]) -> None:
    """Copy the launcher's standard output to ours, but for the notes that DeepSpeed's processes write there."""
    with stream:  # closed as soon as nobody reads ours
        for line in stream:
            if not _NOTE.match(line):
                try:
                    sys.stdout.buffer.write(line)
                    sys.stdout.flush()
                except OSError:
                    return


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
