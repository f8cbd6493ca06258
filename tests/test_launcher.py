"""The door and the real launchers over real ranks: exit codes, the one line, and nothing left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.core import launcher
from megalite.core.launcher import environment, run_under_deepspeed, spool_stdin
from megalite.core.status import StatusFile
from megalite.errors import ResourceError
from megalite.monitor.processes import Process, descendants, launcher_name
from megalite.monitor.referee import End, Peer

HERE = Path(__file__).parent
WATCHED, JOINED = HERE / "watched_rank.py", HERE / "joined_rank.py"
DOOR = """
import sys
from megalite.core.launcher import run_under_deepspeed
script, resolved, sha256, ranks, *extra = sys.argv[1:]
sys.exit(run_under_deepspeed(script, resolved, sha256, int(ranks), bool(extra), extra))
"""


def wait_until(true, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Started:
    """A command in a session of its own, and all processes it has below it."""

    def __init__(self, folder: Path, command: list[object], **env: str | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = [(folder / name).open("w") for name in ("stdout", "stderr")]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent), **env}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
            env={name: value for name, value in env.items() if value is not None},
        )
        self.process.stdin.close()
        self.all: list[Process] = []

    def ready(self, ranks: int, mark: str = "ready") -> "Started":
        wait_until(lambda: self._marks(mark) == ranks or self.process.poll() is not None, 90, mark)
        assert self._marks(mark) == ranks, self.err
        self.all = [Process.of(self.process.pid), *descendants(self.process.pid)]
        return self

    def _marks(self, mark: str) -> int:
        return len(list(self.folder.glob(f"{mark}-*")))

    def named(self, name: str) -> Process:
        return next(process for process in self.all if launcher_name(process) == name)

    def rank(self, rank: int) -> Process:
        return Process.of(json.loads((self.folder / f"card-{rank}").read_text())["pid"])

    def ended(self, seconds: float = 10) -> int:
        """Wait until every process is gone; the exit code."""
        code = self.process.wait(seconds)
        wait_until(lambda: not any(process.alive() for process in self.all), seconds, "all are gone")
        return code

    @property
    def out(self) -> list[str]:
        return sorted((self.folder / "stdout").read_text().splitlines())

    @property
    def err(self) -> list[str]:
        return (self.folder / "stderr").read_text().splitlines()

    def kill(self) -> None:
        for process in [*descendants(self.process.pid), *self.all]:
            process.kill()
        self.process.kill()
        self.process.wait()
        for file in self._files:
            file.close()


def door(folder: Path, behaviours: str) -> Started:
    """The door over torch-free ranks that behave so."""
    ranks = len(behaviours.split(","))
    return Started(folder, [sys.executable, "-c", DOOR, WATCHED, folder, behaviours, ranks])


DOORS = {
    "rank": "stuck,work",
    "inner": "stuck,work",
    "outer": "stuck,work",
    "door": "stuck,work",
    "exception": "stuck,fail:3",
    "interrupt": "work,work",
    "twice": "stuck,stuck",
    "late": "stuck,late",
}


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """Runs under the door, by name. All are started at once: DeepSpeed's launcher mostly waits for its own imports."""
    folder = tmp_path_factory.mktemp("doors")
    started = {name: door(folder / name, behaviours) for name, behaviours in DOORS.items()}
    yield started
    for run in started.values():
        run.kill()


def test_a_killed_rank_is_70_and_named(doors):
    run = doors["rank"].ready(2)
    victim = run.rank(1)
    victim.kill()
    assert run.ended() == 70
    assert len(run.err) == 1 and f"rank 1 (pid {victim.pid} on here) was lost" in run.err[0]


@pytest.mark.parametrize(
    ("victim", "name", "code"),
    [("inner", "deepspeed.launcher.launch", 70), ("outer", "deepspeed.launcher.runner", 70)],
)
def test_a_killed_launcher_is_70_and_named(doors, victim, name, code):
    run = doors[victim].ready(2)
    process = run.named(name)
    process.kill()
    assert run.ended() == code
    assert len(run.err) == 1 and f"{name} (pid {process.pid}) on here" in run.err[0]


def test_a_killed_door_takes_all_along(doors):
    run = doors["door"].ready(2)
    run.process.kill()
    assert run.ended() == -signal.SIGKILL
    assert (
        len(run.err) == 1 and f"(pid {run.process.pid}) on here, which started its ranks (0, 1), is gone" in run.err[0]
    )


def test_an_exception_gives_its_code_and_speaks_once(doors):
    run = doors["exception"]
    assert (run.process.wait(90), run.err) == (3, ["rank 1 speaks: fail:3"])


def test_an_interrupt_at_the_terminal_drains(doors):
    run = doors["interrupt"].ready(2)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to its whole foreground group
    assert (run.ended(), run.err) == (130, ["rank 0 speaks: work"])


def test_a_second_signal_ends_at_once(doors):
    run = doors["twice"].ready(2)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert (run.ended(), run.err) == (143, ["stopped by SIGTERM at once; unfinished work is given up."])


def test_a_signal_before_the_run_begins(doors):
    run = doors["late"].ready(1, "come")
    run.process.send_signal(signal.SIGINT)
    assert (run.ended(), run.err) == (130, ["stopped by SIGINT before the run began."])


# ---- whole runs of ranks that really join


def a_config(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return path


def test_a_whole_run_through_the_door_is_quiet(tmp_path):
    path = a_config(tmp_path, steps=2, stdin="true")
    run = Started(tmp_path, [sys.executable, "-c", DOOR, JOINED, path, "x", 2, "a b", "$(x)"], OMP_NUM_THREADS=None)
    assert (run.process.wait(90), run.err) == (0, [])
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    says = "rank {} of 2: sum 1, 2 here, gloo on lo, threads {}, open False, stdin '', ['--debug', 'a b', '$(x)']"
    assert run.out == [says.format(rank, threads) for rank in range(2)]
    assert run.ended() == 0


def test_a_run_whose_groups_never_go_is_done_all_the_same(tmp_path):
    """They have longer than the ranks are watched for signs of life, and its work is done."""
    path = a_config(tmp_path, steps=2, peer_timeout=2, goodbye=4)
    run = Started(tmp_path, [sys.executable, "-c", DOOR, JOINED, path, "x", 2])
    assert run.process.wait(90) == 0 and len(run.out) == 2
    why = "its process groups were not destroyed within 4 s; it leaves without that"
    assert sorted(run.err) == [f"rank {rank}: {why}" for rank in range(2)]
    assert run.ended() == 0


def test_two_hosts_without_ssh_lose_a_rank(tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("hostA slots=1\nhostB slots=1\n")
    path = a_config(tmp_path, steps=600)
    common = ["--hostfile", hostfile, "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", launcher._free_port()]
    quiet = ["--no_local_rank", "--log_level", "critical"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *common, *quiet]
    hosts = []
    for node in range(2):
        line = [*command, "--node_rank", node, JOINED, "--config", path, "--resolved-sha256", "x"]
        hosts.append(Started(tmp_path / f"host{node}", line, MEGALITE_FAULT="step@1#5=kill"))
    codes = [host.process.wait(90) for host in hosts]
    assert codes == [70, 247]
    errors = [line for host in hosts for line in host.err]
    assert len(errors) == 1 and "rank 1 " in errors[0] and errors == hosts[0].err
    for host in hosts:
        host.kill()


def test_torchrun_and_a_missing_rank(tmp_path):
    path = a_config(tmp_path, steps=2, start_timeout=2)
    run = [shutil.which("torchrun"), "--nproc-per-node", 2, JOINED, "--config", path, "x", "x"]
    started = Started(tmp_path, run, MEGALITE_FAULT="start@1=hang")
    assert started.process.wait(90) != 0
    lines = [line for line in started.err if line.startswith("error:")]
    assert lines and "rank 1 never came within 2 s (of 2; here are 0 on" in lines[0]
    started.kill()


# ---- what the door decides


def test_the_environment_of_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(launcher, "_gpu_in_sight", lambda env: False)
    made = environment({"A": "b"}, 5, tmp_path / "status.json")
    assert made["OMP_NUM_THREADS"] == "2" and made["DS_ACCELERATOR"] == "cpu" and made["A"] == "b"
    assert made["MEGALITE_STATUS"] == str(tmp_path / "status.json") and made["MEGALITE_DOOR"] == str(os.getpid())
    assert environment({}, 50, tmp_path)["OMP_NUM_THREADS"] == "1"
    assert environment({"OMP_NUM_THREADS": "7"}, 2, tmp_path)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(launcher, "_gpu_in_sight", lambda env: True)
    made = environment({"CUDA_VISIBLE_DEVICES": "GPU-1"}, 2, tmp_path)
    assert made["MEGALITE_VISIBLE_DEVICES"] == "GPU-1"
    assert "CUDA_VISIBLE_DEVICES" not in made and "DS_ACCELERATOR" not in made


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_in_sight(monkeypatch, hidden):
    monkeypatch.setattr(launcher.Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    assert launcher._gpu_in_sight({}) and not launcher._gpu_in_sight({"CUDA_VISIBLE_DEVICES": hidden})


@pytest.mark.parametrize(
    ("end", "launcher_code", "code", "says"),
    [
        (End(code=0), 0, 0, ""),
        (End(code=0), 1, 1, ""),
        (End(code=0), 247, 70, "ended with code 247 after the run ended"),
        (End(code=3, speaker=1), 0, 3, ""),
        (End(code=70, lost=(1,)), 247, 70, ""),
        (End(code=130, speaker=0), 130, 130, ""),
        ("running", 0, 70, "ended with code 0 while its ranks were at work"),
        ("running", -9, 70, "was killed by signal 9 while its ranks were at work"),
        ("running", 1, 70, "ended with code 1 while its ranks were at work"),
        (None, 0, 70, "ended with code 0 before the run began"),
        (None, 2, 2, ""),
        (None, 247, 70, "ended with code 247 before the run began"),
    ],
)
def test_the_true_exit_code(tmp_path, capsys, end, launcher_code, code, says):
    path = tmp_path / "status.json"
    status = StatusFile([path])
    status.peers = [Peer(0, "a", 1)]
    if end == "running":
        status.running()
    elif end is not None:
        status.ended(end)
    assert launcher._Door([], {}, path)._truth(launcher_code) == code
    error = capsys.readouterr().err
    assert error == (
        f"error: deepspeed {says}: a rank or a launcher was killed, or left without a word.\n" if says else ""
    )


def test_a_script_that_fails_before_the_run_begins(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(2)")
    bystander = subprocess.Popen(["sleep", "60"])
    assert run_under_deepspeed(script, tmp_path / "c", "x", 1) == 2
    assert bystander.poll() is None, "only processes of the run are cleaned up"
    bystander.kill()
    bystander.wait()
    assert capfd.readouterr() == ("", "")


SPOOL = "import sys; from megalite.core.launcher import spool_stdin; print(spool_stdin(sys.argv[1]))"


def test_standard_input_is_kept_for_the_ranks(tmp_path):
    path = tmp_path / "input"
    done = subprocess.run(
        [sys.executable, "-c", SPOOL, path], input=b"a\xff\n" * 100_000, capture_output=True, timeout=30
    )
    assert done.stdout == b"300000\n" and path.read_bytes() == b"a\xff\n" * 100_000
    assert path.stat().st_mode & 0o777 == 0o600


def test_standard_input_that_can_not_be_kept(monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(__file__))
    with sys.stdin, pytest.raises(ResourceError, match="/dev/full: standard input could not be kept there"):
        spool_stdin("/dev/full")
