"""The door: starts `deepspeed` on this host, watches it, and returns the run's true exit code. Imports no torch.

DeepSpeed's launcher is not a supervisor. It is two processes over the ranks; a signal to the outer one leaves the rest
running, it ends with 0 when its inner one is killed or a rank leaves early, and it gives codes of its own for signals.
So the ranks watch each other and their launchers (`monitor.watchdog`) and write down how the run ended, and the door
believes that: exit code 0 is given only if all ranks agreed on the end. What is still there when DeepSpeed has ended
is given time to end by itself, then killed; orphans come to the door because it adopts them. All is killed soon after
the ranks have said that one of them is lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megalite.core.status import STATUS_VARIABLE, read_status
from megalite.errors import EXIT_RANK_LOST, ResourceError
from megalite.monitor.processes import Process, adopt_orphans, descendants

DOOR_VARIABLE = "MEGALITE_DOOR"
"""Environment variable with the process id of the door, without which its ranks must not go on."""
VISIBLE_VARIABLE = "MEGALITE_VISIBLE_DEVICES"
"""Environment variable with the user's CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher replaces by 0, 1, 2..."""

_TICK = 0.05
"""Seconds between two looks at the launcher."""
_LEFTOVERS = 8.0
"""Seconds that ranks have to notice by themselves that their launcher has ended."""
_FAREWELL = 1.5
"""Seconds that the processes of a run have to leave once its ranks have said that one of them is lost."""
_AGAIN = 0.3
"""Seconds after which a signal counts as a second one; a terminal and a shell may both send the first."""
_KILL = 5.0
"""Seconds for killed processes to vanish."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_under_deepspeed(
    script: str | os.PathLike[str],
    resolved: str | os.PathLike[str],
    sha256: str,
    num_ranks: int,
    debug: bool = False,
    extra: Sequence[str] = (),
) -> int:
    """Run `script --config resolved --resolved-sha256 sha256` on `num_ranks` ranks of this host; returns its exit code.

    The ranks get no standard input (see `spool_stdin`) and write to this process's output. SIGINT, SIGTERM and SIGHUP
    are passed on to the ranks, which drain; a second one kills. When this returns, no process of the run is left.
    `extra`: further arguments of the script. Main thread only.
    """
    folder = Path(tempfile.mkdtemp(prefix="megalite-door-"))
    status = folder / "status.json"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "this host only")]
    command += ["--num_gpus", str(num_ranks), "--no_local_rank", "--master_port", str(_free_port())]
    # "critical": the launcher's errors that matter are exceptions; what it logs repeats what the ranks have said
    command += ["--log_level", "critical", str(script), "--config", str(resolved), "--resolved-sha256", sha256]
    command += [*(["--debug"] if debug else []), *extra]
    try:
        return _Door(command, environment(os.environ, num_ranks, status), status).watch()
    finally:
        shutil.rmtree(folder)


def environment(outside: Mapping[str, str], num_ranks: int, status: Path) -> dict[str, str]:
    """The environment of the launcher and its ranks, made of the user's."""
    inside = {**outside, STATUS_VARIABLE: str(status), DOOR_VARIABLE: str(os.getpid())}
    cores = len(os.sched_getaffinity(0))
    inside.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    if "CUDA_VISIBLE_DEVICES" in inside:
        inside[VISIBLE_VARIABLE] = inside.pop("CUDA_VISIBLE_DEVICES")
    if not _gpu_in_sight(outside):
        inside.setdefault("DS_ACCELERATOR", "cpu")
    return inside


def _gpu_in_sight(env: Mapping[str, str]) -> bool:
    """Whether the user has an NVIDIA device and has not hidden it."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def _free_port() -> int:
    """A port of the system's choice. On one host only the launcher's variables name it; nothing listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spool_stdin(path: str | os.PathLike[str]) -> int:
    """Copy standard input to a file that only this user can read; returns its bytes. ResourceError on a full disk.

    Ranks that the door starts have no standard input: DeepSpeed would give the same one to all of them.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            return file.tell()
    except OSError as error:
        raise ResourceError(f"{path}: standard input could not be kept there: {error.strerror or error}.") from error


class _Door:
    """One start of the launcher."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], status: Path):
        self._command, self._env, self._status = command, env, status
        self._mark = f"{STATUS_VARIABLE}={status}".encode()
        """In the environment of every process of the run and of no other."""
        self._signals: list[tuple[int, float]] = []
        """What this process was sent, and when."""

    def watch(self) -> int:
        """Start, wait, clean up; the exit code."""
        adopt_orphans()
        ignored = [signum for signum in _SIGNALS if signal.getsignal(signum) is signal.SIG_IGN]  # nohup
        previous = {n: signal.signal(n, self._on_signal) for n in _SIGNALS if n not in ignored}
        try:
            # a session of its own, so that a Ctrl-C at the terminal reaches the ranks through the door alone
            nothing = subprocess.DEVNULL
            launcher = subprocess.Popen(self._command, env=self._env, stdin=nothing, start_new_session=True)
            try:
                return self._until_end(launcher)
            finally:
                self._kill_all(launcher)
        finally:
            adopt_orphans(False)
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._signals.append((signum, time.monotonic()))

    def _until_end(self, launcher: subprocess.Popen[bytes]) -> int:
        passed_on = False
        while self._collect(launcher) is None:
            if self._signals and not passed_on:
                passed_on = True
                if not self._pass_on(self._signals[0][0]):
                    return self._stopped("before the run began")
            if self._again():
                return self._stopped("at once; unfinished work is given up")
            if self._hopeless():
                return EXIT_RANK_LOST
            time.sleep(_TICK)
        end = time.monotonic() + _LEFTOVERS
        while self._left() and time.monotonic() < end and not self._again():
            self._collect(launcher)
            time.sleep(_TICK)
        return self._truth(launcher.returncode)

    def _hopeless(self) -> bool:
        """The ranks have said that one is lost; DeepSpeed would now wait long for it, or not notice."""
        status = read_status(self._status)
        return status.get("exit_code") == EXIT_RANK_LOST and time.time() - status["updated"] > _FAREWELL

    def _again(self) -> bool:
        """A second signal has come."""
        return any(at - self._signals[0][1] >= _AGAIN for _, at in self._signals)

    def _stopped(self, how: str) -> int:
        signum = self._signals[0][0]
        self._say(f"stopped by {signal.Signals(signum).name} {how}")
        return 128 + signum

    def _pass_on(self, signum: int) -> bool:
        """Ask the ranks to drain; False if they have not come so far. The launchers hear nothing: they would kill."""
        left = {process.pid: process for process in self._left()}
        ranks = [left[rank["pid"]] for rank in read_status(self._status).get("ranks", []) if rank["pid"] in left]
        for rank in ranks:
            rank.kill(signal.SIGTERM if signum == signal.SIGHUP else signum)
        return bool(ranks)

    def _truth(self, launcher_code: int) -> int:
        """The run's exit code, from what its ranks wrote down and what the launcher gave."""
        status = read_status(self._status)
        ended = status.get("exit_code") is not None
        if ended and (status["exit_code"] or launcher_code == 0):
            return status["exit_code"]
        if 0 < launcher_code < 128 and (ended or not status):
            return launcher_code  # a rank failed before the run began or after it ended, and has said why
        how = f"ended with code {launcher_code}" if launcher_code >= 0 else f"was killed by signal {-launcher_code}"
        when = "after the run ended" if ended else "while its ranks were at work" if status else "before the run began"
        self._say(f"error: deepspeed {how} {when}: a rank or a launcher was killed, or left without a word")
        return EXIT_RANK_LOST

    def _say(self, line: str) -> None:
        sys.stderr.write(f"{line}.\n")
        sys.stderr.flush()

    def _left(self) -> list[Process]:
        """The processes of the run that live."""
        return [process for process in descendants(os.getpid()) if self._mark in process.environment()]

    def _collect(self, launcher: subprocess.Popen[bytes]) -> int | None:
        """Reap what has ended, adopted orphans too; the launcher's exit code once it has one.

        At once, because DeepSpeed waits up to 30 s for the processes of a rank to vanish, zombies included.
        """
        with suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-launcher.pid, os.WNOHANG))[0]:  # of the launcher's process group
                if ended[0] == launcher.pid:
                    launcher.returncode = os.waitstatus_to_exitcode(ended[1])
        return launcher.returncode

    def _kill_all(self, launcher: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _KILL
        while (left := self._left()) and time.monotonic() < end:
            for signum in (signal.SIGSTOP, signal.SIGKILL):  # none shall see another die and complain
                for process in left:
                    process.kill(signum)
            self._collect(launcher)
            time.sleep(_TICK)
        self._collect(launcher)
        launcher.wait()
