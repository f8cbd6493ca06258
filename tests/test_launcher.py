"""The door and the real launchers over real ranks: exit codes, the one line, and nothing left running."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import two_hosts
from forks import Ended
from started import Started
from waiting import PATIENCE, free_port, wait_until

from megalite.errors import ConfigError
from megalite.run import hosts, launcher
from megalite.run.launch_env import LaunchEnv, door_of
from megalite.run.launcher import environment, run_ranks
from megalite.run.processes import Process

HERE = Path(__file__).parent
DOOR, WATCHED, JOINED = HERE / "door.py", HERE / "watched_rank.py", HERE / "joined_rank.py"


REALLY = pytest.mark.skipif(two_hosts.missing() is None, reason="test_two_hosts.py does it on two hosts")


def loading(run: Started, rank: int) -> Process:
    """A rank that has not come yet."""
    return next(process for process in run.all[1:] if f"RANK={rank}".encode() in process.environment())


def kill(rank: int, signum: int = signal.SIGKILL, loads: bool = False) -> Callable[[Started], int]:
    def act(run: Started) -> int:
        victim = loading(run, rank) if loads else run.rank(rank)
        victim.kill(signum)
        return victim.pid

    return act


def stop_group(run: Started) -> int:
    """Also what a rank has started; the door has less patience here than the rank beside it."""
    os.killpg(run.rank(1).pid, signal.SIGSTOP)
    return run.rank(1).pid


def signal_twice(run: Started) -> int:
    """The second once the first has come through to the ranks, and so late that it is no echo of that."""
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: run.marks("signalled") == 2, "both ranks are to drain")
    time.sleep(launcher._AGAIN)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    return 0


def to_door(signum: int, group: bool = False) -> Callable[[Started], int]:
    """`group`: as a terminal does, to its whole foreground group."""
    return lambda run: (os.killpg if group else os.kill)(run.process.pid, signum) or run.process.pid


DOORS = {
    "a killed rank": ("stuck,work", "ready", kill(1), 70, r"rank 1 \(pid PID on here\) was lost"),
    "a stopped rank": (
        "stuck,work",
        "ready",
        stop_group,
        70,
        r"^error: rank 1 \(pid PID\) was lost: stopped for 1 s\.$",
    ),
    "a rank stopped while it loads": (
        *("late,late", "loads", kill(0, signal.SIGSTOP, loads=True), 70),
        r"^error: rank 0 \(pid PID\) was lost: stopped for 1 s\.$",
    ),
    **{
        f"{name} while it loads": ("late,late", "loads", kill(1, signal.Signals[name], loads=True), code, says)
        for name, code, says in (
            ("SIGTERM", 143, "^stopped by SIGTERM before the run began.$"),
            ("SIGINT", 130, "^stopped by SIGINT before the run began.$"),
            ("SIGKILL", 70, r"^error: rank 1 \(pid PID\) was killed by signal 9 before the run began.$"),
        )
    },
    "a killed door": (
        *("stuck,work", "ready", to_door(signal.SIGKILL), -signal.SIGKILL),
        r"\(pid PID\) on here, which started its ranks \(0, 1\), is gone",
    ),
    "an exception": ("stuck,fail:3", None, None, 3, "^rank 1 speaks: fail:3$"),
    "an interrupt": ("work,work", "ready", to_door(signal.SIGINT, group=True), 130, "^rank 0 speaks: work$"),
    "a second signal": (
        *("deaf,deaf", "ready", signal_twice, 143),
        "^stopped by SIGTERM at once; unfinished work is given up.$",
    ),
    "a signal before the run": (
        *("stuck,late", "come", to_door(signal.SIGINT), 130),
        "^stopped by SIGINT before the run began.$",
    ),
}
"""How the ranks behave, what is waited for, what is done then (its result is PID), the exit code, the one line."""


@pytest.fixture(scope="module")
def missing(forks, tmp_path_factory):
    """Two ranks that join, of which one never comes. The door has patience with it, so it is started first."""
    path = a_config(tmp_path_factory.mktemp("missing"), steps=2, start_timeout=1)
    return forks.start(DOOR, 2, "no", JOINED, "--config", path, MEGALITE_FAULT="start@1=hang")


@pytest.fixture(scope="module")
def doors(missing, tmp_path_factory):
    """The runs under the door by name, all at once, over torch-free ranks: once it has ended; its code; PID."""
    folder, runs = tmp_path_factory.mktemp("doors"), []

    def whole(place: int, name: str) -> tuple[Started, int, int]:
        behaviours, mark, act, *_ = DOORS[name]
        here = folder / str(place)
        runs.append(run := Started(here, [sys.executable, DOOR, 2, "no", WATCHED, here, behaviours]))
        if mark:
            run.ready(1 if mark == "come" else 2, mark)
        return run, act(run) if act else 0, run.ended()

    with ThreadPoolExecutor(len(DOORS)) as pool:
        yield {name: pool.submit(whole, place, name) for place, name in enumerate(DOORS)}
    for run in runs:
        run.kill()


@pytest.mark.parametrize("name", DOORS)
def test_the_door_ends_with_the_runs_code_one_line_and_no_process(doors, name):
    run, pid, ended = doors[name].result()
    *_, code, line = DOORS[name]
    assert ended == code
    assert len(run.err) == 1 and re.search(line.replace("PID", str(pid)), run.err[0]), run.err


# ---- whole runs of ranks that really join


def a_config(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return path


@pytest.fixture
def joined(forks):
    """Starts a door over two ranks that join, as forks."""

    def run(path: Path, *arguments: str, stdin: str = "no", **environment: str | None) -> Ended:
        return forks.run(DOOR, 2, stdin, JOINED, "--config", path, *arguments, **environment)

    return run


def test_a_whole_run_through_the_door_is_quiet(joined, tmp_path):
    path = a_config(tmp_path, steps=2, stdin="true")
    run = joined(path, "a b", "$(x)", stdin="stdin", OMP_NUM_THREADS=None)
    assert (run.code, run.err) == (0, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    says = "rank {} of 2: sum 1, 2 here, gloo on lo, threads {}, open False, stdin '', ['a b', '$(x)']"
    assert sorted(run.out.splitlines()) == [says.format(rank, threads) for rank in range(2)]


def test_a_run_whose_groups_never_go_is_done_all_the_same(joined, tmp_path):
    """They have longer than the ranks are watched for signs of life, and its work is done."""
    run = joined(a_config(tmp_path, steps=2, peer_timeout=1, goodbye=2))
    assert run.code == 0 and len(run.out.splitlines()) == 2
    why = "its process groups were not destroyed within 2 s; it leaves without that"
    assert sorted(run.err.splitlines()) == [f"rank {rank}: {why}" for rank in range(2)]


def test_a_missing_rank(missing):
    run = missing.ended()
    assert run.code == 70
    [line] = run.err.splitlines()
    assert line.startswith("error: ") and "rank 1 never came within 1 s (of 2; here are 0 on" in line


def test_two_hosts_lose_a_rank(forks, tmp_path):
    path = a_config(tmp_path, steps=600, start_timeout=PATIENCE)
    ranks = forks.hosts(2, JOINED, "--config", path, MEGALITE_FAULT="step@1#5=kill")
    first, second = (rank.ended() for rank in ranks)
    assert (first.code, second.code) == (70, -signal.SIGKILL)
    [line] = first.err.splitlines()
    assert line.startswith("error: ") and "rank 1 " in line and second.err == ""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_one_rank_alone_loads(tmp_path, signum, code):
    command = [sys.executable, HERE.parent / "launch" / "infer.py", "--config", HERE.parent / "configs/infer/demo.yaml"]
    run = Started(tmp_path, command, MEGALITE_FAULT="start=hang")
    status = Path(f"/proc/{run.process.pid}/status")
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # noqa: E731
    wait_until(lambda: caught() >> signal.SIGTERM - 1 & 1, "it takes signals")
    run.process.send_signal(signum)
    assert run.ended() == code
    assert run.err == [f"stopped by {signal.Signals(signum).name} before the run began."]


# ---- several hosts

PDSH = """#!{python}
# What pdsh and ssh do with a command: its words are joined, %n and %h replaced, and each host's shell reads the rest.
import subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
words = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
shells = [
    subprocess.Popen(["sh", "-c", words.replace("%n", str(number)).replace("%h", host)])
    for number, host in enumerate(hosts)
]
sys.exit(max(shell.wait() for shell in shells))
"""


SSH = '#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n'


@REALLY
def test_no_shell_between_the_hosts_changes_a_value(tmp_path):
    """Two hosts of one rank, behind what pdsh does to arguments."""
    for name, text in {"pdsh": PDSH.format(python=sys.executable), "ssh": SSH}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("hostA slots=1  # the first\n\nhostB slots=1\n")
    hostile = """$HOME $(echo x) `echo y` %h %n "quoted" \\"half ${PATH} 'one' ~ * ; ü"""
    options = ["--hostfile", hosts, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    config = HERE.parent / "configs" / "infer" / "demo.yaml"
    output = tmp_path / "out.jsonl"
    values = ["parallel.tp=2", "sampling.max_tokens=2", f"output.file={output}", "monitor.report=false"]
    values.append(f"input.prompts={json.dumps([hostile])}")
    run = Started(
        tmp_path / "run",
        [sys.executable, HERE.parent / "launch" / "infer.py", *options, "--config", config, *values],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert run.process.wait(PATIENCE) == 0, run.err
    assert json.loads(output.read_text())["prompt"] == hostile


LONG = [f"word {number * 7919 % 99991}" for number in range(60_000)]


@pytest.mark.parametrize("text", ["", "a: $HOME `x` %h\n", "ä" * 100_000, "\u2028\0"])
def test_a_config_is_packed_in_harmless_letters(text):
    packed = hosts.pack_config(text)
    assert hosts.unpack_config(packed) == text and re.fullmatch("[A-Za-z0-9_=-]*", packed)


def test_a_config_that_can_not_be_sent(tmp_path):
    with pytest.raises(ConfigError, match=r"--hostfile: the config is too long .* \(input.file\)"):
        hosts.pack_config("\n".join(LONG))
    for damaged in ("x", "eJwDAAAAAAE", "%h"):
        with pytest.raises(ConfigError, match="--resolved-config: was changed on its way to this host"):
            hosts.unpack_config(damaged)
    with pytest.raises(ConfigError, match="holds characters that a remote shell would change"):
        hosts.run_over_hosts(["--hostfile", "a b"], "launch/infer.py", [])


@pytest.mark.parametrize(
    ("texts", "overrides", "remote", "refused"),
    [
        ([], [], True, ""),
        ([], ["parallel.tp=2", "model.dtype=float32"], True, ""),
        (["model.path"], ["model.path=/root/model"], True, "model.path"),
        (["model.path"], ["model.path=/root/model"], False, ""),
        ([], ["sampling.seed=$RANDOM"], False, "sampling.seed=$RANDOM"),
        (["input.file"], ["input.file=`date`"], False, "input.file=`date`"),
        (["output.file"], ["output.file=out-%h"], False, "output.file=out-%h"),
        (["output.file"], ["output.file=100%"], False, ""),
    ],
)
def test_ranks_distrust_text_that_came_through_shells(monkeypatch, texts, overrides, remote, refused):
    monkeypatch.setattr(hosts, "ancestors", lambda process: [] if remote else [process])
    monkeypatch.setattr(hosts, "launcher_name", lambda process: "deepspeed")
    found = [str(problem) for problem in hosts.distrust(texts, overrides, "python x --hostfile HOSTS")]
    assert bool(found) == bool(refused)
    for line in found:
        assert line.startswith(f"{refused}: text in arguments goes through a shell") and "python x --hostfile" in line


# ---- what the door decides


def test_the_environment_of_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    made = environment({"A": "b", "RANK": "9", "CUDA_VISIBLE_DEVICES": "GPU-1"}, 3, 5, "7:8")
    place = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1"}
    assert made.items() >= {"A": "b", "CUDA_VISIBLE_DEVICES": "GPU-1", "OMP_NUM_THREADS": "2", **place}.items()
    assert LaunchEnv.of(made).started_here == 5
    assert environment({}, 0, 50, "")["OMP_NUM_THREADS"] == "1"
    assert environment({"OMP_NUM_THREADS": "7"}, 0, 2, "")["OMP_NUM_THREADS"] == "7"


def test_a_door_is_the_parent_and_nobody_else():
    """What a rank starts inherits its environment, and must not write to that descriptor."""
    assert door_of({"MEGALITE_DOOR": f"{os.getppid()}:5"}) == (os.getppid(), 5)
    for other in ("", "5", f"{os.getpid()}:5", f"{os.getppid()}:", f"{os.getppid()}:x"):
        assert door_of({"MEGALITE_DOOR": other}) is None


class Left:
    """A rank that has ended."""

    def __init__(self, code: int):
        self.returncode, self.pid = code, 77

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(
    ("said", "codes", "code", "says"),
    [
        ("running, ended 0", [0, 0], 0, ""),
        ("running, ended 0", [5, 5], 5, ""),
        ("running, ended 0", [0, 1], 1, ""),
        ("running, ended 0", [0, -9], 70, "error: rank 1 (pid 77) was killed by signal 9 after the run ended"),
        ("running, ended 3", [0, 0], 3, ""),
        ("running, ended 3, ended 70", [3, 3], 3, ""),
        ("running, ended 70", [70, -9], 70, ""),
        ("ended 70", [70, 70], 70, ""),
        ("running, ended 130", [130, 130], 130, ""),
        ("running", [0, 0], 70, "error: the ranks left without a word"),
        ("running", [-9, 70], 70, "error: rank 0 (pid 77) was killed by signal 9 while the ranks were at work"),
        ("running", [0, 1], 70, "error: rank 1 (pid 77) left with code 1 while the ranks were at work"),
        ("", [0, 0], 70, "error: the ranks left without a word"),
        ("", [2, 0], 2, ""),
        ("", [-11, 0], 70, "error: rank 0 (pid 77) was killed by signal 11 before the run began"),
        ("", [0, 143], 143, "stopped by SIGTERM before the run began"),
        ("", [-2, 0], 130, "stopped by SIGINT before the run began"),
    ],
)
def test_the_true_exit_code(capsys, said, codes, code, says):
    door = launcher._Door(2, 1.0)
    door._ranks = [Left(code) for code in codes]
    os.write(door._their_end, "".join(f"megalite: {line}\n" for line in said.split(", ") if line).encode())
    assert door._until_end() == code
    assert capsys.readouterr().err == (f"{says}.\n" if says else "")


class Draining:
    """A rank that ends when it is sent a signal."""

    def __init__(self):
        self.returncode, self.pid = None, 77

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        self.returncode = 128 + signum


def test_a_signal_sent_because_the_run_began_never_comes_before_it(monkeypatch, capsys):
    """The door has just listened, in vain, when the run begins, and who waited for that sends a signal at once."""
    door = launcher._Door(1, 60.0)
    door._ranks = [Draining()]
    listen, rank_says = door._listen, [b"megalite: running\n", b"megalite: ended 143\n"]

    def listened() -> None:
        listen()
        if rank_says:
            os.write(door._their_end, rank_says.pop(0))
            door._on_signal(signal.SIGTERM, None)

    monkeypatch.setattr(door, "_listen", listened)
    assert (door._until_end(), capsys.readouterr().err) == (143, "")


def test_a_script_that_fails_before_the_run_begins(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(2)")
    bystander = subprocess.Popen(["sleep", "60"])
    assert run_ranks([str(script)], 2, stopped_timeout=5) == 2
    assert bystander.poll() is None, "only processes of the run are cleaned up"
    bystander.kill()
    bystander.wait()
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.rglob("*") if path != script] == [f"megalite-{os.getuid()}"]
