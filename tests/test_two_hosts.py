"""Whole runs over two hosts, which are network namespaces: what arrives there, and how the loss of anything ends them.

All runs are started when the first is asked for, three at a time; each has two hosts of its own, since DeepSpeed's
launcher ends a run with `pkill -f`. Each test looks at what became of one.
"""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from two_hosts import ROOT, SLOTS, Run, TwoHosts, missing, prepare
from waiting import PATIENCE, wait_until

WHY = missing()
pytestmark = pytest.mark.skipif(WHY is not None, reason=f"two hosts on one machine: {WHY}")
AT_ONCE = 3
WATCHED, JOINED = ROOT / "tests" / "watched_rank.py", ROOT / "tests" / "joined_rank.py"
DOOR = """
import sys
from megalite.run.hosts import run_over_hosts
end = sys.argv.index("--")
sys.exit(run_over_hosts(sys.argv[1:end], sys.argv[end + 1], sys.argv[end + 2 :]))
"""
"""The door, for ranks that are no job."""
PEER_TIMEOUT = 5
"""Seconds; a host that is only busy must answer within."""
HOSTILE = """$HOME $(echo x) `echo y` %h %n "quoted" \\"half ${PATH} 'one' ~ * ; ü"""


@dataclass(frozen=True)
class Over:
    """A run that is over."""

    code: int
    out: str
    err: str
    folder: Path
    """With what its ranks have written."""


class Play:
    """One run: its hosts, how it is started, and what is done to it."""

    def __init__(self, hosts: TwoHosts, hostfiles: dict[int, Path]):
        self.hosts, self.hostfiles, self.folder = hosts, hostfiles, hosts.folder

    def over(self, run: Run) -> Over:
        """Wait until it has ended, and has left no rank."""
        code = run.process.wait(PATIENCE)
        self.hosts.none_left()
        return Over(code, run.out, run.err, self.folder)

    def job(self, kind: str, config: str, slots: int, *values: str) -> Over:
        """`slots`: ranks a host."""
        command = [sys.executable, f"launch/{kind}.py", "--hostfile", self.hostfiles[slots]]
        light = kind == "infer"  # its ranks need no deepspeed
        return self.over(self.hosts.start(*command, "--config", f"configs/{config}", *values, light=light))

    def door(self, slots: int, *command: object, host: str = "mega-a", options: Sequence[str] = ()) -> Run:
        where = ["--hostfile", self.hostfiles[slots], "--master_addr", "10.77.0.1", *options]
        return self.hosts.start(sys.executable, "-c", DOOR, *where, "--", *command, host=host, light=True)

    def at_work(self, run: Run, marks: str, count: int) -> None:
        """Wait until so many ranks have left their mark."""
        wait_until(lambda: len(list(self.folder.glob(marks))) == count or not run.runs, "all ranks are at work")
        assert run.runs, run.err

    def watched(self, lost: Callable[[], object]) -> Over:
        """Four ranks that wait for ever, until something is lost."""
        run = self.door(2, WATCHED, self.folder, ",".join(["work"] * 4), PEER_TIMEOUT)
        self.at_work(run, "ready-*", 4)
        lost()
        return self.over(run)

    def kill(self, pattern: str, signum: int = signal.SIGKILL) -> None:
        """Of host mega-a."""
        found = self.hosts.processes("mega-a", pattern)
        assert found, pattern
        for process in found:
            process.kill(signum)

    # ---- the runs

    def infer(self) -> Over:
        values = ["parallel.pp=2", "sampling.max_tokens=2", "monitor.report=false"]
        values += [f"output.file={self.folder}/out.jsonl", f"input.prompts={json.dumps([HOSTILE])}"]
        return self.job("infer", "infer/demo.yaml", 1, *values)

    def train(self) -> Over:
        values = ["parallel.dp=2", "train.steps=2", "optimizer.warmup_steps=1", "train.sample_prompts=[]"]
        values += [f"output.folder={self.folder}/model"]
        return self.job("train", "train/sft.yaml", 1, *values)

    def cable(self) -> Over:
        return self.watched(lambda: self.hosts.do("mega-b", "ip", "link", "set", "mega-b0", "down"))

    def connection(self) -> Over:
        """That started the ranks of mega-b."""
        return self.watched(lambda: self.kill("^[^ ]*ssh -F .* mega-b .*watched_rank"))

    def pdsh(self) -> Over:
        return self.watched(lambda: self.kill("^pdsh "))

    def interrupt(self) -> Over:
        return self.watched(lambda: self.kill("^[^ ]*python[^ ]* -c .*run_over_hosts", signal.SIGINT))

    def killed(self) -> Over:
        """A rank as every job has it; each host is started by itself."""
        config = self.folder / "config.yaml"
        config.write_text(f"steps: 100000\npeer_timeout: {PEER_TIMEOUT}\nstart_timeout: {PATIENCE}\n")
        runs = [
            self.door(1, JOINED, "--config", config, host=host, options=["--no_ssh", "--node_rank", str(node)])
            for node, host in enumerate(SLOTS)
        ]
        self.at_work(runs[0], "*.at-work-*", 2)
        self.hosts.ranks("mega-b")[0].kill()
        runs[1].process.wait(PATIENCE)
        return self.over(runs[0])


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Over]]]:
    """How each run ended, by its name; all that tests ask for are started now."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    shared = tmp_path_factory.mktemp("two_hosts")
    prepare(shared)
    hostfiles = {slots: shared / f"slots{slots}" for slots in (1, 2)}
    for slots, path in hostfiles.items():
        path.write_text("".join(f"{host} slots={slots}\n" for host in SLOTS))

    running: list[TwoHosts] = []

    def play(name: str) -> Over:
        with TwoHosts(shared, shared / name) as hosts:
            running.append(hosts)
            over: Over = getattr(Play(hosts, hostfiles), name)()
            return over

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(play, name) for name in names}
        pool.shutdown(wait=False, cancel_futures=True)
        for hosts in running:
            hosts.close()


@pytest.mark.parametrize("name", ["infer"])
def test_a_model_over_both_hosts(plays, name):
    """What is typed into the door is what the ranks get, and the user is told which host has what."""
    over = plays[name].result()
    assert over.code == 0, over.err
    assert json.loads((over.folder / "out.jsonl").read_text())["prompt"] == HOSTILE
    said = re.sub(r"mega-[ab]: +", "", over.err)
    assert re.search(r"2 ranks on 2 hosts agree: config \w+, model.path \w+, megalite\s", said), over.err
    assert "tp=1,pp=2,dp=1 on 2 hosts:\nmega-a  rank 0: stage 0\nmega-b  rank 1: stage 1\n" in said
    assert "warning" not in said and "[INFO]" not in over.out


@pytest.mark.parametrize("name", ["train"])
def test_a_model_trained_by_both_hosts(plays, name):
    over = plays[name].result()
    assert over.code == 0, over.err
    assert "step 2/2" in over.out and (over.folder / "model" / "model.safetensors").exists()
    assert "mega-a  rank 0: replica 0\n" in re.sub(r"mega-[ab]: +", "", over.err)


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("killed", 70, r"rank 1 \(pid \d+ on mega-b\) was lost"),
        ("cable", 70, r"ranks 2, 3 on mega-b were lost: no sign of life"),
        ("connection", 70, r"sshd.* on mega-b, which started its ranks \(2, 3\), is gone"),
        ("pdsh", 70, "deepspeed left with code 0, but rank 0 has not said how the run ended"),
        ("interrupt", 130, ""),
    ],
)
def test_a_loss_ends_the_run_on_both_hosts(plays, name, code, says):
    """With one line that says what was lost; `Play.over` has seen that no rank is left."""
    over = plays[name].result()
    assert over.code == code, over.err
    assert re.search(says, over.err) and len([line for line in over.err.splitlines() if "lost" in line]) <= 1, over.err
    if name == "interrupt":  # pdsh ends with it, and nothing of what the ranks say arrives
        assert json.loads((over.folder / "end-0").read_text()) == [143, 0, []], "they drained"
