"""The watch over real processes that are killed, stopped, orphaned, interrupted; and its parts without any."""

from __future__ import annotations

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from started import Started
from waiting import PATIENCE, wait_until

from megalite.core.progress import Progress
from megalite.run import wire
from megalite.run.processes import Process, ancestors, descendants, launcher_name, launchers
from megalite.run.referee import End, Peer, Referee
from megalite.run.stall import Account, Place, account, blame, read_account
from megalite.run.watchdog import Watchdog, listen

SCRIPT = Path(__file__).with_name("watched_rank.py")


def watched(folder: Path, behaviours: Sequence[str], timeout: float, step_timeout: float = 3.0) -> Started:
    """Ranks of watched_rank.py under their launcher."""
    path = os.pathsep.join(
        [str(SCRIPT.parents[1]), *filter(None, sys.path)]
    )  # -S starts quickly, and knows no packages
    command = [sys.executable, "-S", SCRIPT, "launch", folder, timeout, *behaviours]
    run = Started(folder, command, PYTHONPATH=path, STEP_TIMEOUT=str(step_timeout))
    run.size = len(behaviours)
    return run


# ---- whole runs


def send(*signals: tuple[int, int]) -> Callable[[Started], None]:
    """Once all ranks are at work, send rank -> signal; rank -1 is the launcher, -2 its whole process group."""

    def act(run: Started) -> None:
        run.ready(run.size)
        for rank, signum in signals:
            if rank == -2:
                os.killpg(run.process.pid, signum)
            else:
                os.kill(run.rank(rank).pid if rank >= 0 else run.process.pid, signum)

    return act


def signal_twice(run: Started) -> None:
    """Two signals at once are one; then ask again until it counts as a second, a second after the first was seen."""
    send((1, signal.SIGSTOP), (1, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGCONT))(run)
    time.sleep(1.0)
    assert run.process.poll() is None
    victim = run.rank(1)

    def ended() -> bool:
        victim.kill(signal.SIGINT)
        return run.process.poll() is not None

    wait_until(ended, "the second signal ends it")


def suspend(run: Started) -> None:
    """The whole job, for longer than one rank alone would be waited for."""
    send((-2, signal.SIGSTOP))(run)
    time.sleep(4)
    os.killpg(run.process.pid, signal.SIGCONT)
    time.sleep(1)
    (run.folder / "over").touch()


LOST_1 = r"rank 1 \(pid \d+ on here\) was lost: "
WORDLESS, SILENT = "ended without a word", "no sign of life"
CASES = {
    "an agreed end": (["work:0.3", "finish", "work:0.6"], None, [0, 0, 0], (0, None, []), ""),
    "a killed rank": (["stuck", "work"], send((1, 9)), [70, -9], (70, None, [1]), LOST_1 + WORDLESS),
    "a killed hub": (["stuck", "work", "stuck"], send((0, 9)), [-9, 70, 70], (70, None, [0]), "rank 0 .*was lost"),
    "one that leaves early with 0": (
        ["work", "vanish", "stuck"],
        None,
        [70, 0, 70],
        (70, None, [1]),
        LOST_1 + WORDLESS,
    ),
    "a stopped rank": (["stuck", "work", "stuck", 2], send((1, 19)), [70, -9, 70], (70, None, [1]), LOST_1 + SILENT),
    "a stopped hub": (["stuck", "work", 2], send((0, 19)), [-9, 70], (70, None, [0]), f"rank 0 .*{SILENT}"),
    "a call that holds Python's lock": (["hog:4", "work:1", "hog:4", 2], None, [0, 0, 0], (0, None, []), ""),
    "two lost together": (
        ["stuck"] * 4,
        send((1, 9), (3, 9)),
        [70, -9, 70, -9],
        (70, None, [1, 3]),
        "ranks 1, 3 on here",
    ),
    "a killed launcher": (["stuck", "work"], send((-1, 9)), None, (70, None, []), r"its ranks \(0, 1\), is gone"),
    "an exception of the hub": (["fail:3", "stuck", "work"], None, [3, 3, 3], (3, 0, []), "rank 0 speaks: fail:3"),
    "an exception": (["stuck", "fail:3", "work"], None, [3, 3, 3], (3, 1, []), "rank 1 speaks: fail:3"),
    "several exceptions": (["fail:2", "fail:2", "fail:2"], None, [2, 2, 2], None, r"rank \d speaks: fail:2"),
    "a crash that a lost peer caused": (["crash:1", "vanish", "crash:1"], None, [70, 0, 70], (70, None, [1]), LOST_1),
    "a crash of its own": (["stuck", "crash:1"], None, [1, 1], (1, 1, []), "rank 1 speaks: crash:1"),
    "a signal to one": (["work", "work", "work"], send((2, 15)), [143] * 3, (143, 0, []), "rank 0 speaks: work"),
    "a second signal": (["stuck", "stuck"], signal_twice, [130, 130], (130, None, []), "second SIGINT"),
    "a launcher that goes after a signal": (
        ["work", "work:60"],
        send((-2, signal.SIGSTOP), (0, signal.SIGINT), (-1, signal.SIGKILL), (-2, signal.SIGCONT)),
        None,
        (130, 0, []),
        "rank 0 speaks: work",
    ),
    "a rank that does not come": (
        ["in:812", "in:812", "before:812"],
        None,
        [70] * 3,
        (70, None, [2]),
        r"rank 2 \(pid \d+ on here\) has not entered all_reduce #812 of tp group \[0, 1, 2\], for which rank [01] has "
        r"waited \d+ s; it is in layer 5 of step 130, for \d+ s\. The run was stopped\.$",
    ),
    "one that holds Python's lock": (
        ["in:7", "before:7,3600"],
        None,
        [70, -9],
        (70, None, [1]),
        r"rank 1 .* has not entered all_reduce #7 of tp group .*was last heard \d+ s ago: a native call holds",
    ),
    "a hub that holds Python's lock": (
        ["before:7,3600", "in:7"],
        None,
        [-9, 70],
        (70, None, [0]),
        r"rank 0 .* has not entered all_reduce #7 of tp group .*was last heard \d+ s ago: a native call holds",
    ),
    "a job that was suspended": (["work", "work", 2], suspend, [0, 0], (0, None, []), ""),
}
"""How the ranks behave (and their time-out, 30 s if none), what is done to them, their exit codes, the end that is
decided (code, speaker, lost), and the one line that is said."""


PATIENT = 20
"""Where a machine is so busy that a case ends as another, it is seen again with time-outs so many times as long."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Starts a case, with so many times its time-outs: the run once it has ended. All are started now."""
    folder, runs = tmp_path_factory.mktemp("watched"), []

    def whole(name: str, times: int) -> Started:
        (*behaviours, last), act, *_ = CASES[name]
        timeout = 30 if isinstance(last, str) else last
        behaviours = behaviours if timeout == last else [*behaviours, last]
        run = watched(folder / f"{name} {times}", behaviours, times * timeout, times * 3.0)
        runs.append(run)
        if act:
            act(run)
        run.ended()
        return run

    with ThreadPoolExecutor(len(CASES)) as pool:
        found = {name: pool.submit(whole, name, 1) for name in CASES}
        yield lambda name, times=1: found[name].result() if times == 1 else whole(name, times)
    for run in runs:
        run.kill()


@pytest.mark.parametrize("name", CASES)
def test_how_a_run_ends(ended, name):
    try:
        check_end(ended(name), name)
    except AssertionError:
        check_end(ended(name, PATIENT), name)


def check_end(run: Started, name: str) -> None:
    _, _, codes, end, line = CASES[name]
    said, *stack = run.err or [""]
    assert bool(said) == bool(line) and re.search(line, said), run.err
    if stack:  # of who did not come
        assert name == "a rank that does not come" and stack[0].startswith("Python stack of rank 2")
        assert any("in stand_still" in call for call in stack), stack
    ends = [tuple(json.loads(path.read_text())) for path in run.folder.glob("end-*")]
    assert len(ends) == 1 and end in (ends[0], None)
    if codes is not None:  # the launcher lived to tell
        assert json.loads((run.folder / "codes").read_text()) == codes
    done = [f"rank {rank} done" for rank in range(run.size)] if ends[0][0] == 0 else []
    assert run.out == done


def test_who_does_not_know_the_token_stays_outside(tmp_path):
    run = watched(tmp_path, ["stuck", "stranger", "work"], 30.0)
    missing = run.folder / "missing-0"
    wait_until(lambda: missing.exists() and missing.read_text() == "[1]", "the others are there")
    wait_until(lambda: not ((stranger := run.rank(1)) and stranger.alive()), "it is refused, and leaves")
    assert missing.read_text() == "[1]" and not list(run.folder.glob("ready-*"))
    run.kill()


def test_strangers_do_not_disturb_a_run(tmp_path):
    ended = []
    listener = listen("127.0.0.1")
    peers = [Peer(rank, "here", os.getpid()) for rank in range(2)]
    common = {"peers": peers, "token": b"t", "timeout": 60.0, "launchers": (), "claim": lambda: True}
    hub = Watchdog(rank=0, hub=listener, handle_signals=False, on_end=ended.append, **common)
    other = Watchdog(rank=1, hub=listener.getsockname(), handle_signals=False, on_end=ended.append, **common)
    hub.start(1)
    rude = [b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b'["end", 9, null]\n', b"[" * 4000 + b"\n"]
    rude += [b'["hello", 1, "00"]\n', b'["signal", 2]\n', b"\xff\xfe\n"]
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
    ("does", "why"),
    [
        (lambda peer, one: peer.close(), "ended without a word (killed, out of memory or crashed)"),
        (
            lambda peer, one: peer.sendall(b"GET /\n"),
            "the connection to its watch broke: it sent what none of us sends",
        ),
        (
            lambda peer, one: one.socket.close(),
            "the connection to its watch broke: receiving failed: Bad file descriptor",
        ),
    ],
    ids=["ended", "rude", "closed under it"],
)
def test_a_connection_knows_what_broke_it(does, why):
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()) as peer:
        wait_until(lambda: select.select([listener], [], [], 0)[0], "it arrives")
        one = wire.Connection(listener.accept()[0], now=0.0, timeout=60.0)
        does(peer, one)
        wait_until(lambda: one.receive() or one.broken, "it is closed")
        assert one.broken == why
        one.close()


# ---- the referee

PEERS = [Peer(0, "a", 10), Peer(1, "a", 11), Peer(2, "b", 12)]
LOST_2 = End(code=70, lost=(2,), line="error: rank 2 (pid 12 on b) was lost: it went. The other ranks were stopped.")
LOST_1_2 = End(code=70, lost=(1, 2), line="error: ranks 1, 2 on a, b were lost: it went. The other ranks were stopped.")
UNDRAINED = End(
    code=70,
    lost=(1,),
    line="error: still at work 120 s after the first rank stopped for a signal: rank 1 (pid 11 on a). It was ended.",
)


@pytest.mark.parametrize(
    ("reports", "later"),
    [
        ([("finished", 2, 0, 1.0), ("finished", 0, 0, 1.0)], {1e9: None}),
        ([("finished", 2, 0, 1.0), ("finished", 0, 0, 1.0), ("finished", 1, 0, 2.0)], {2.0: End(code=0)}),
        ([("lost", 2, "it went", 10.0), ("lost", 1, "it went", 10.1)], {10.1: None, 10.4: LOST_1_2}),
        ([("failed", 0, 1, True, "", 10.0)], {10.5: None, 11.0: End(code=1, speaker=0)}),
        ([("failed", 0, 1, True, "", 10.0), ("failed", 1, 3, False, "", 10.5)], {10.5: End(code=3, speaker=1)}),
        ([("failed", 0, 1, True, "", 10.0), ("lost", 2, "it went", 10.9)], {11.1: None, 11.3: LOST_2}),
        ([("failed", 0, 1, False, "x", 1.0), ("failed", 1, 2, False, "", 1.0)], {1.0: End(code=1, line="x")}),
        ([("standing", [2], "x"), ("lost", 2, "killed", 1.0)], {1.0: End(code=70, line="x", lost=(2,))}),
        ([("lost", 2, "it went", 1.0), ("standing", [2], "x")], {1.1: None, 1.4: LOST_2}),
        ([("lost", 2, "other", 1.0), ("stopped", 2, "it went", 1.1), ("lost", 2, "other", 1.2)], {1.4: LOST_2}),
        ([("finished", 0, 130, 10.0), ("finished", 2, 130, 12.0)], {129.9: None, 130.0: UNDRAINED}),
        (
            [("finished", rank, code, 10.0) for rank, code in ((0, 0), (1, 143), (2, 143))],
            {10.0: End(code=143, speaker=1)},
        ),
    ],
)
def test_what_the_referee_makes_of_reports(reports, later):
    """The verdict at some times after what the ranks report; a verdict stays."""
    referee = Referee(PEERS)
    for kind, *values in reports:
        getattr(referee, kind)(*values)
    for now, end in later.items():
        assert referee.verdict(now) == end
    if end:
        referee.lost(0, "later", 1e9)
        assert referee.verdict(2e9) == end


# ---- the wire


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b'{"kind": "together"}',
        b'["together", 1]',
        b'["signal"]',
        b'["signal", true]',
        b'["signal", -1]',
        b'["signal", "2"]',
        b'["fail", 1, 0, ""]',
        b'["__class__"]',
        b'[["together"]]',
    ],
)
def test_what_none_of_us_sends_is_refused(line):
    with pytest.raises((ValueError, TypeError)):
        wire.parse(line)


def test_what_a_rank_says_can_not_drive_a_terminal():
    assert wire.parse(b'["fail", 70, false, "error: \\u001b[2Jgone\\n"]') == ("fail", [70, False, "error: ?[2Jgone?"])
    assert wire.parse(b'["end", 0, null]') == ("end", [0, None])


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


# ---- who keeps the others waiting


def an_account(still, *places, finished=False, layer=None):
    """places: (name, ranks, entered, inside)."""
    made = tuple(
        Place(name=name, ranks=ranks, flow=name == "hidden", entered=entered, operation="all_reduce", inside=inside)
        for name, ranks, entered, inside in places
    )
    stack = ("model.py:7 in forward",)
    return Account(still=still, finished=finished, step=("step", 130), layer=layer, places=made, stack=stack)


TP01, TP23, FLOW = ("tp", (0, 1)), ("tp", (2, 3)), ("hidden", (1, 3))
FOUR = [Peer(rank, "ab"[rank // 2], 10 + rank) for rank in range(4)]


@pytest.mark.parametrize(
    ("accounts", "guilty", "says"),
    [
        pytest.param(
            [an_account(20.0, (*TP23, 5, False)) for _ in range(4)], None, "", id="all stand, and nobody waits"
        ),
        pytest.param(
            [
                an_account(20.0, (*TP01, 3, True)),
                an_account(20.0, (*TP01, 3, False), (*FLOW, 9, True)),  # sends, and waits for 3 to receive
                an_account(12.0, (*TP23, 811, False), layer=5),
                an_account(12.0, (*TP23, 812, True), (*FLOW, 7, False)),
            ],
            [2],
            r"rank 2 \(pid 12 on b\) has not entered all_reduce #812 of tp group \[2, 3\], for which rank 3 has waited "
            r"12 s; it is in layer 5 of step 130, for 12 s\. The run was stopped\.\nPython stack of rank 2.*\n  model",
            id="the end of a chain",
        ),
        pytest.param(
            [
                an_account(12.0, (*TP01, 3, False)),
                an_account(20.0, (*TP01, 4, True)),
                an_account(0.1, (*TP23, 811, False)),
                an_account(0.1, (*TP23, 812, True)),
            ],
            [0],
            "rank 0 .*#4 of tp group",
            id="while others go on",
        ),
        pytest.param(
            [an_account(3.0, (*TP01, 3, False)), an_account(12.0, (*TP01, 4, True))], None, "", id="who is on its way"
        ),
        pytest.param(
            [11.0, an_account(12.0, (*TP01, 4, True))], [0], "rank 0 .*holds Python's lock", id="who does not answer"
        ),
        pytest.param([2.0, an_account(12.0, (*TP01, 4, True))], None, "", id="who did answer a moment ago"),
        pytest.param(
            [an_account(12.0, (*TP01, 4, False)), an_account(12.0, (*TP01, 9, False))],
            [0],
            "rank 0 .*has not entered collective #5",
            id="a host ahead of its device",
        ),
        pytest.param(
            [an_account(12.0, (*TP01, 4, True)), an_account(12.0, (*TP01, 4, True))],
            [0, 1],
            r"all have entered all_reduce #4 of tp group \[0, 1\], and none has left it",
            id="a network that does not deliver",
        ),
        pytest.param(
            [
                an_account(12.0, (*TP01, 4, True), ("dp", (0, 1), 1, False)),
                an_account(12.0, (*TP01, 3, False), ("dp", (0, 1), 2, True)),
            ],
            [0, 1],
            r"rank 0 .*has not entered all_reduce #2 of dp.*; rank 1 .*has not entered all_reduce #4 of tp",
            id="collectives in different orders",
        ),
        pytest.param(
            [an_account(0.0, finished=True), an_account(12.0, ("tp", (0, 1), 1, True))], None, "", id="one has finished"
        ),
        pytest.param(
            [0.0, an_account(12.0, ("hidden", (0, 1), 1, True))], None, "", id="a message from who has just been heard"
        ),
        pytest.param(
            [an_account(12.0), an_account(12.0, ("hidden", (0, 1), 1, True))],
            [0],
            r"rank 0 .*has not sent message #1 \(hidden\) to 1",
            id="a message that is not sent",
        ),
    ],
)
def test_who_keeps_the_others_waiting(accounts, guilty, says):
    found = blame(dict(enumerate(accounts)), FOUR, 10.0)
    assert (found and found[0]) == guilty
    assert not found or re.match(f"error: .*{says}", found[1]), found


def test_what_an_account_is_made_of():
    progress = Progress()
    track = progress.track("tp", (0, 1))
    with track.entering("all_reduce"):
        told = read_account(account(progress, 2.5, False))
    assert told.places == (Place(name="tp", ranks=(0, 1), flow=False, entered=1, operation="all_reduce", inside=True),)
    assert "test_what_an_account_is_made_of" in told.stack[-2] and not track.inside
    for wrong in ("", "[]", "{}", '[1, false, ["x", 1], null, [[]], []]'):
        with pytest.raises(ValueError):
            read_account(wrong)
