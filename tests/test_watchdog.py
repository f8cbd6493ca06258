"""The watch over real processes that are killed, stopped, orphaned, interrupted; and its parts without any."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from waiting import PATIENCE, wait_until

from megalite.run import wire
from megalite.run.processes import Process, ancestors, descendants, launcher_name, launchers
from megalite.run.referee import End, Peer, Referee
from megalite.run.watchdog import Watchdog, guardian_command, listen

SCRIPT = Path(__file__).with_name("watched_rank.py")


class Run:
    """Ranks of watched_rank.py under their launcher."""

    def __init__(self, folder: Path, *behaviours: str, timeout: float = 30.0):
        self.folder = folder
        self._error = (folder / "stderr").open("w")
        self._out = (folder / "stdout").open("w")
        command = [sys.executable, "-S", str(SCRIPT), "launch", str(folder), str(timeout), *behaviours]
        path = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, sys.path)])
        self.launcher = subprocess.Popen(
            command,
            stderr=self._error,
            stdout=self._out,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.size = len(behaviours)

    def ready(self) -> "Run":
        def ready() -> bool:
            assert self.launcher.poll() is None, self.errors
            return all((self.folder / f"ready-{rank}").exists() for rank in range(self.size))

        wait_until(ready, "ready")
        self.all = [Process.of(self.launcher.pid), *descendants(self.launcher.pid)]
        self.ranks = [Process.of(json.loads((self.folder / f"card-{r}").read_text())["pid"]) for r in range(self.size)]
        return self

    def gone(self) -> None:
        """Wait until no process is left."""
        wait_until(lambda: not [p for p in self.all if p.alive() and p.pid != self.launcher.pid], "gone")
        self.launcher.wait(PATIENCE)

    @property
    def codes(self) -> list[int]:
        return json.loads((self.folder / "codes").read_text())

    @property
    def errors(self) -> list[str]:
        return (self.folder / "stderr").read_text().splitlines()

    def kill(self) -> None:
        for process in [*descendants(self.launcher.pid), *getattr(self, "all", [])]:
            process.kill()
        self.launcher.kill()
        self.launcher.wait()
        self._error.close()
        self._out.close()


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(*behaviours: str, timeout: float = 30.0) -> Run:
        runs.append(Run(tmp_path, *behaviours, timeout=timeout))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


# ---- whole runs


def test_agreed_end(start):
    run = start("work:0.3", "finish", "work:0.6")
    assert run.launcher.wait(PATIENCE) == 0
    assert run.codes == [0, 0, 0] and run.errors == []
    assert json.loads((run.folder / "end-0").read_text()) == [0, None, []]
    done = (run.folder / "stdout").read_text().split("\n")
    assert sorted(filter(None, done)) == [f"rank {rank} done" for rank in range(3)]


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_is_named_once_and_all_are_gone(start, victim):
    run = start("stuck", "work", "stuck").ready()
    run.ranks[victim].kill()
    run.gone()
    assert [code for rank, code in enumerate(run.codes) if rank != victim] == [70, 70]
    assert len(run.errors) == 1 and f"rank {victim} (pid {run.ranks[victim].pid} on here) was lost" in run.errors[0]
    writer = 0 if victim else next(path for path in run.folder.glob("end-*")).name[-1]
    assert json.loads((run.folder / f"end-{writer}").read_text()) == [70, None, [victim]]


def test_rank_that_leaves_early_with_0_is_lost(start):
    run = start("work", "vanish", "stuck")
    assert run.launcher.wait(PATIENCE) == 70
    assert len(run.errors) == 1 and "rank 1 " in run.errors[0] and "ended without a word" in run.errors[0]


@pytest.mark.parametrize(("victim", "timeout"), [(1, 6.0), (0, 4.0)])
def test_stopped_rank_is_named_and_killed(start, victim, timeout):
    run = start("stuck", "work", "stuck", timeout=timeout).ready()
    run.ranks[victim].kill(signal.SIGSTOP)
    run.gone()
    assert len(run.errors) == 1 and f"rank {victim} " in run.errors[0] and "no sign of life" in run.errors[0]
    assert run.codes[victim] == -signal.SIGKILL and sorted(run.codes)[1:] == [70, 70]


def test_a_call_that_holds_pythons_lock_is_no_loss(start):
    """For longer than a rank is waited for, on rank 0 and on another."""
    run = start("hog:7", "work:1", "hog:7", timeout=4.0)
    assert run.launcher.wait(PATIENCE) == 0 and run.errors == [] and run.codes == [0, 0, 0]


def test_two_ranks_lost_together_are_one_line(start):
    run = start("stuck", "stuck", "stuck", "stuck").ready()
    run.ranks[1].kill()
    run.ranks[3].kill()
    run.gone()
    assert len(run.errors) == 1 and "ranks 1, 3 on here were lost" in run.errors[0]


def test_killed_launcher_takes_its_ranks_along(start):
    run = start("stuck", "work").ready()
    run.launcher.kill()
    run.gone()
    assert len(run.errors) == 1
    assert f"(pid {run.launcher.pid}) on here, which started its ranks (0, 1), is gone" in run.errors[0]
    assert json.loads((run.folder / "end-0").read_text())[0] == 70


@pytest.mark.parametrize("speaker", [0, 1])
def test_exception_of_one_rank_is_everyones_exit_code(start, speaker):
    behaviours = ["stuck", "stuck", "work"]
    behaviours[speaker] = "fail:3"
    run = start(*behaviours)
    assert run.launcher.wait(PATIENCE) == 3
    assert run.codes == [3, 3, 3] and run.errors == [f"rank {speaker} speaks: fail:3"]


def test_first_of_many_exceptions_speaks(start):
    run = start("fail:2", "fail:2", "fail:2")
    run.launcher.wait(PATIENCE)
    assert run.codes == [2, 2, 2] and len(run.errors) == 1


def test_a_crash_caused_by_a_lost_peer_is_not_the_story(start):
    run = start("crash:1", "vanish", "crash:1")
    run.launcher.wait(PATIENCE)
    assert len(run.errors) == 1 and "rank 1 " in run.errors[0]
    assert run.codes == [70, 0, 70]


def test_a_crash_of_its_own_is(start):
    run = start("stuck", "crash:1")
    run.launcher.wait(PATIENCE)
    assert run.codes == [1, 1] and run.errors == ["rank 1 speaks: crash:1"]


def test_signal_to_one_rank_drains_all(start):
    run = start("work", "work", "work").ready()
    run.ranks[2].kill(signal.SIGTERM)
    assert run.launcher.wait(PATIENCE) == 143
    assert run.codes == [143] * 3 and run.errors == ["rank 0 speaks: work"]


def test_repeated_signal_is_one_but_a_second_ends_at_once(start):
    run = start("stuck", "stuck").ready()
    run.ranks[1].kill(signal.SIGSTOP)  # so that both arrive together
    run.ranks[1].kill(signal.SIGINT)
    run.ranks[1].kill(signal.SIGTERM)
    run.ranks[1].kill(signal.SIGCONT)
    time.sleep(1.0)
    assert run.launcher.poll() is None

    def ended() -> bool:
        """Ask again until it counts as a second signal, which it does a second after the first was seen."""
        run.ranks[1].kill(signal.SIGINT)
        return run.launcher.poll() is not None

    wait_until(ended, "the second signal ends it")
    assert run.launcher.wait(PATIENCE) == 130
    assert run.codes == [130, 130] and len(run.errors) == 1 and "second SIGINT" in run.errors[0]


def test_launcher_that_goes_after_a_signal_leaves_time_to_drain(start):
    run = start("work", "work:60").ready()
    os.killpg(run.launcher.pid, signal.SIGSTOP)  # so that the ranks wake up to both events at once
    run.ranks[0].kill(signal.SIGINT)
    run.launcher.kill()
    os.killpg(run.launcher.pid, signal.SIGCONT)
    run.gone()
    assert json.loads((run.folder / "end-0").read_text())[0] == 130
    assert run.errors == ["rank 0 speaks: work"]


def test_suspended_job_wakes_up_again(start):
    run = start("work", "work", timeout=4.0).ready()
    os.killpg(run.launcher.pid, signal.SIGSTOP)
    time.sleep(7)  # longer than the time-out and the guardians' limit would allow one rank alone
    os.killpg(run.launcher.pid, signal.SIGCONT)
    time.sleep(1)
    (run.folder / "over").touch()
    assert run.launcher.wait(PATIENCE) == 0 and run.errors == []


def test_who_does_not_know_the_token_stays_outside(start):
    run = start("stuck", "stranger", "work")
    missing = run.folder / "missing-0"
    wait_until(lambda: missing.exists() and missing.read_text() == "[1]", "the others are there")
    time.sleep(2)
    assert missing.read_text() == "[1]" and not list(run.folder.glob("ready-*"))


def test_strangers_do_not_disturb_a_run(tmp_path):
    ended = []
    listener = listen("127.0.0.1")
    peers = [Peer(rank, "here", os.getpid()) for rank in range(2)]
    common = {"peers": peers, "token": b"t", "timeout": 60.0, "launchers": (), "claim": lambda: True}
    hub = Watchdog(rank=0, hub=listener, handle_signals=False, on_end=ended.append, **common)
    other = Watchdog(rank=1, hub=listener.getsockname(), handle_signals=False, on_end=ended.append, **common)
    hub.start(1)
    rude = [b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b'{"kind": "end", "code": 9}\n', b"[" * 4000 + b"\n"]
    rude += [b'{"kind": "hello", "rank": 1, "proof": "00"}\n', b'{"kind": "abort", "signum": 2}\n', b"\xff\xfe\n"]
    for words in rude:
        with socket.create_connection(listener.getsockname(), timeout=PATIENCE) as stranger:
            stranger.sendall(words)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):  # the hub's nonce, then the end: it hangs up
                    pass
    silent = socket.create_connection(listener.getsockname())
    assert hub.missing() == [1]
    other.start(1)
    assert hub.together.wait(PATIENCE) and other.together.wait(PATIENCE)
    ends = []
    thread = threading.Thread(target=lambda: ends.append(other.finish()))
    thread.start()
    ends.append(hub.finish())
    thread.join(30)
    silent.close()
    assert ends == [End(code=0)] * 2 and ended == [End(code=0)]


@pytest.mark.parametrize(
    ("does", "fault"),
    [
        (lambda peer, one: peer.close(), ""),
        (lambda peer, one: peer.sendall(b"GET /\n"), "it sent what is no message"),
        (lambda peer, one: one.socket.close(), "receiving failed: Bad file descriptor"),
    ],
    ids=["ended", "rude", "closed under it"],
)
def test_a_connection_knows_what_broke_it(does, fault):
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()) as peer:
        wait_until(lambda: select.select([listener], [], [], 0)[0], "it arrives")
        one = wire.Connection(listener.accept()[0], now=0.0, timeout=60.0)
        does(peer, one)
        wait_until(lambda: one.receive(1.0) or one.closed, "it is closed")
        assert one.fault == fault
        one.close()


# ---- the guardian


def test_guardian_is_told_to_go_or_goes_with_its_rank():
    ours, its = socket.socketpair()
    with its, subprocess.Popen(guardian_command(os.getpid(), 60.0), stdin=its) as process:
        its.close()
        status = Path(f"/proc/{process.pid}/status")
        mask = sum(1 << signum - 1 for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        ignored = lambda: int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16)  # noqa: E731
        wait_until(lambda: ignored() & mask == mask, "it is set up")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        ours.close()
        assert process.wait(PATIENCE) == 0


# ---- the referee

PEERS = [Peer(0, "a", 10), Peer(1, "a", 11), Peer(2, "b", 12)]


def test_all_finished_is_done_and_less_is_nothing():
    referee = Referee(PEERS)
    for rank in (2, 0):
        referee.finished(rank, 0, 1.0)
    assert referee.verdict(1e9) is None
    referee.finished(1, 0, 2.0)
    assert referee.verdict(2.0) == End(code=0)


def test_lost_ranks_gather_before_the_line():
    referee = Referee(PEERS)
    referee.lost(2, "it went", 10.0)
    assert referee.verdict(10.1) is None
    referee.lost(1, "it went", 10.1)
    end = referee.verdict(10.4)
    assert (end.code, end.lost, end.speaker) == (70, (1, 2), None)
    assert end.line == "error: ranks 1, 2 on a, b were lost: it went. The other ranks were stopped."
    referee.failed(0, 3, False, 10.5)
    assert referee.verdict(11.0) is end


def test_meant_exception_beats_an_earlier_crash_and_loss_beats_both():
    referee = Referee(PEERS)
    referee.failed(0, 1, True, 10.0)
    assert referee.verdict(10.5) is None
    referee.failed(1, 3, False, 10.5)
    assert referee.verdict(10.5) == End(code=3, speaker=1)
    referee = Referee(PEERS)
    referee.failed(0, 1, True, 10.0)
    referee.lost(2, "it went", 10.9)
    assert referee.verdict(11.1) is None
    assert referee.verdict(11.3).lost == (2,)


def test_drain_is_bounded():
    referee = Referee(PEERS)
    referee.finished(0, 130, 10.0)
    referee.finished(2, 130, 12.0)
    assert referee.verdict(129.9) is None
    end = referee.verdict(130.0)
    assert end.code == 70 and end.lost == (1,) and "rank 1 (pid 11 on a)" in end.line


def test_drained_run_has_the_signals_code():
    referee = Referee(PEERS)
    for rank, code in ((0, 0), (1, 143), (2, 143)):
        referee.finished(rank, code, 10.0)
    assert referee.verdict(10.0) == End(code=143, speaker=1)


# ---- the wire


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"{}",
        b'{"kind": "stopped", "more": 1}',
        b'{"kind": "signal"}',
        b'{"kind": "signal", "signum": true}',
        b'{"kind": "signal", "signum": -1}',
        b'{"kind": "signal", "signum": "2"}',
        b'{"kind": "fail", "code": 1, "crash": 0}',
        b'{"kind": "__class__"}',
        b'{"kind": ["stopped"]}',
    ],
)
def test_what_is_not_a_message_is_refused(line):
    with pytest.raises((ValueError, TypeError)):
        wire.parse(line)


def test_end_travels_whole_and_can_not_drive_a_terminal():
    end = End(code=70, line="error: \x1b[2Jgone\n", lost=(1, 2))
    message = wire.parse(json.dumps({"kind": "end", **wire.end_fields(end)}).encode())
    assert wire.end_of(message) == End(code=70, line="error: ?[2Jgone?", lost=(1, 2))


# ---- processes


def test_a_process_is_not_a_later_one_with_its_id():
    me = Process.of(os.getpid())
    assert me.alive() and not Process(me.pid, me.start - 1).alive()
    assert ancestors(me)[0] == Process.of(os.getppid()) and me.parent() == Process.of(os.getppid())
    child = subprocess.Popen(["sleep", "60"])
    process = Process.of(child.pid)
    assert process in descendants(os.getpid())
    process.kill()
    wait_until(lambda: not process.alive(), "a zombie is not alive")
    child.wait()
    process.kill()


def spawn_named(tmp_path: Path, name: str, code: str) -> str:
    script = tmp_path / name
    script.write_text(code)
    return str(script)


LOOK = """
import os
from megalite.run.processes import *
chain = launchers(Process.of(os.getpid()))
print([launcher_name(p) for p in chain])
"""


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        (["deepspeed"], ["deepspeed"]),
        (["deepspeed", "inner.py"], ["", "deepspeed"]),
        (["torchrun"], ["torchrun"]),
        (["train.py", "torchrun", "deepspeed"], ["deepspeed", "torchrun"]),
        (["torchrun", "train.py", "other.py"], ["", "", "torchrun"]),
        (["train.py", "other.py"], [""]),
    ],
)
def test_the_launchers_are_found_above_a_rank(tmp_path, above, expected):
    code = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    command = [spawn_named(tmp_path, "rank.py", LOOK)]
    for name in reversed(above):
        command = [spawn_named(tmp_path, name, code), *command]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ([], ""),
        (["/sbin/init"], ""),
        (["python", "-m"], ""),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--x"], "deepspeed.launcher.launch"),
        (["python", "/a/bin/torchrun", "train.py"], "torchrun"),
        (["python", "train.py", "-m", "torch.distributed.run"], ""),
        (["vim", "notes about deepspeed"], ""),
    ],
)
def test_launchers_are_known_by_their_command(monkeypatch, command, name):
    monkeypatch.setattr(Process, "command", lambda self: command)
    assert launcher_name(Process(1, 1)) == name


def test_the_door_counts_as_a_launcher():
    me = Process.of(os.getpid())
    line = ancestors(me)
    assert launchers(me, door=line[0].pid)[-1] == line[0]
    if len(line) > 1 and not any(map(launcher_name, line)):
        assert launchers(me, door=line[1].pid) == line[:2]


def test_dying_with_the_parent():
    code = """
import os, sys, time
from megalite.run.processes import die_with_parent
if os.fork() == 0:
    die_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = Process.of(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        wait_until(lambda: not child.alive(), "the child is gone")
