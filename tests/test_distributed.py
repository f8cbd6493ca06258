"""How ranks find each other, what they tell the user when they don't, and one rank's whole life."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import FileStore
from waiting import PATIENCE, free_port, wait_until

from megalite.config.schema import DistributedSection
from megalite.errors import ConfigError, RankLost, ResourceError, Stopped
from megalite.run import meeting_folder as run_folder
from megalite.run import rendezvous
from megalite.run import runtime as distributed
from megalite.run.facts import Given, RankInfo
from megalite.run.joining import backend_of
from megalite.run.launch_env import LaunchEnv
from megalite.run.network import interface_of, machine_id, network_namespace, pid_namespace, route_to
from megalite.run.processes import Process
from megalite.run.referee import End, Peer
from megalite.run.rendezvous import Deadline, RanksDiffer, meet, open_store
from megalite.run.status import StatusFile

CPU = DistributedSection(device="cpu")


def rank_info(rank: int, **changes) -> RankInfo:
    me = Process.of(os.getpid())
    where = {"host": "hostA", "machine": machine_id(), "pids": pid_namespace(), "network": network_namespace()}
    what = {
        "pid": me.pid,
        "start": me.start,
        "address": "127.0.0.1",
        "device": "cpu",
        "gpu": "",
        "facts": {"config": "same"},
    }
    return RankInfo(**{"rank": rank, **where, **what, **changes})


def launched(rank: int, world_size: int, **changes) -> LaunchEnv:
    return LaunchEnv(**{"rank": rank, "world_size": world_size, "local_rank": rank, "started_here": None, **changes})


# ---- the launcher's variables

UNDER = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_the_environment_under_both_launchers():
    assert LaunchEnv.of({"WORLD_SIZE": "4"}) is None
    assert LaunchEnv.of({**UNDER, "LOCAL_SIZE": "2"}).started_here == 2
    env = LaunchEnv.of({**UNDER, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (env.rank, env.world_size, env.local_rank, env.started_here, env.restart) == (1, 4, 1, 4, "0")
    assert (env.master_addr, env.master_port, env.agent_store, env.launcher) == ("a", 29500, True, "the launcher")
    assert not env.over_hosts and LaunchEnv.of({**UNDER, "LOCAL_SIZE": "2"}).over_hosts
    assert LaunchEnv.of({**UNDER, "TORCHELASTIC_RUN_ID": "none"}).launcher == "torchrun"
    assert LaunchEnv.of({**UNDER, "CROSS_SIZE": "1"}).launcher == "deepspeed"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("4", "-1", "x", "١")),
        ("WORLD_SIZE", "0"),
        ("MASTER_PORT", "65536"),
        *((name, None) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")),
    ],
)
def test_senseless_and_missing_variables_are_named(name, value):
    env = {key: one for key, one in {**UNDER, name: value}.items() if one is not None}
    says = "is not set, but RANK is" if value is None else f"must be a whole number .*got '{value}'"
    with pytest.raises(ConfigError, match=f"{name}: {says}"):
        LaunchEnv.of(env)


# ---- meeting


def meet_all(folder: Path, infos: list[RankInfo], world_size: int, seconds: float, texts: dict[int, str]):
    """What each rank's `meet` gives or raises, by rank, where rank 0 comes last; ranks are threads over one store."""

    def one(info: RankInfo):
        store, env = FileStore(str(folder / "store"), world_size), launched(info.rank, world_size)
        choose = lambda here: f"backend of {len(here)}"  # noqa: E731
        if info.rank == 0:
            wait_until(lambda: store.add("came", 0) == len(infos) - 1, "the others are there")
        try:
            return meet(env, store, info, texts.get(info.rank, "tp: 1\n"), Deadline(seconds), choose)
        except (Exception, SystemExit) as error:
            return error

    with ThreadPoolExecutor(len(infos)) as pool:
        return dict(zip([info.rank for info in infos], pool.map(one, infos), strict=True))


def test_ranks_that_agree_know_each_other_and_have_one_back_end(tmp_path):
    infos = [rank_info(rank, host=f"host{rank}", hub=["a", 1], token="b") for rank in range(4)]
    assert meet_all(tmp_path, infos, 4, PATIENCE, {}) == {rank: (infos, "backend of 4") for rank in range(4)}


def dead() -> dict[str, int]:
    """Process id and start of a process that has ended."""
    child = subprocess.Popen(["sleep", "60"])
    process = Process.of(child.pid)
    child.kill()
    child.wait()
    return {"pid": process.pid, "start": process.start}


CONFIGS = {
    **dict.fromkeys((0, 1), "model: {path: a}\nparallel: {tp: 2, pp: 1}\n"),
    2: "model: {path: a}\nparallel: {tp: 4, pp: 2}\n",
}


@pytest.mark.parametrize(
    ("changes", "seconds", "kind", "says", "code"),
    [
        (
            {0: {}, 1: {}, 4: {"host": "hostB"}},
            0.3,
            RankLost,
            r"ranks 2-3 never came within 0.3 s \(of 5; here are 0, 1 on hostA; 4 on hostB\)",
            70,
        ),
        ({0: {}, 2: dead}, 36_000, RankLost, r"rank 2 on hostA \(pid \d+\) died while the run started", 70),
        (
            {0: {}, 1: {}, 2: {"facts": {"config": "other"}, "host": "hostB"}},
            PATIENCE,
            RanksDiffer,
            r"parallel.tp: is 2 on ranks 0-1 \(hostA\) and 4 on rank 2 \(hostB\). .*\nparallel.pp: is 1 on ranks 0-1",
            2,
        ),
        (
            {0: {}, 1: {"problem": "distributed.device: no GPU", "code": 2}},
            PATIENCE,
            rendezvous.RanksRefuse,
            r"^rank 1 \(hostA\): distributed.device: no GPU$",
            2,
        ),
    ],
    ids=["never came", "died", "another config", "a problem"],
)
def test_rank_0_alone_says_why_a_run_can_not_begin(tmp_path, changes, seconds, kind, says, code):
    infos = [rank_info(rank, **(change() if callable(change) else change)) for rank, change in changes.items()]
    first, *others = meet_all(tmp_path, infos, infos[-1].rank + 1, seconds, CONFIGS).values()
    assert type(first) is kind and re.search(says, str(first)) and first.exit_code == code
    assert all(isinstance(other, SystemExit) and other.code == code for other in others)


def test_rank_0_that_never_came_is_named_by_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.2)
    (error,) = meet_all(tmp_path, [rank_info(1)], 3, 0.3, {}).values()
    assert isinstance(error, RankLost) and "ranks 0, 2 never came within 0.3 s" in str(error)


# ---- the back end


@pytest.mark.parametrize(
    ("changes", "backend", "expected"),
    [
        ([{}, {}], None, "gloo"),
        ([{}, {}], "gloo", "gloo"),
        ([{}, {}], "nccl", "distributed.backend: nccl needs a GPU for each rank"),
        ([{"device": "cuda:0", "gpu": "x"}, {"device": "cuda:0", "gpu": "x"}], None, "gloo"),
        ([{"device": "cuda:0", "gpu": "x"}, {"device": "cuda:1", "gpu": "y"}], None, "nccl"),
        ([{"device": "cuda:0", "gpu": "x"}, {"device": "cuda:0", "gpu": "x", "machine": "2"}], None, "nccl"),
        ([{"device": "cuda:0", "gpu": "x"}, {"device": "cuda:1", "gpu": "y"}], "gloo", "gloo"),
        ([{"device": "cuda:0", "gpu": "x"}, {"device": "cuda:0", "gpu": "x"}], "nccl", "needs a GPU for each rank"),
        ([{"device": "cuda:0", "gpu": "x"}, {}], None, "rank 0 on hostA has a GPU, rank 1 on hostA sees none"),
        ([{}, {"network": "2", "address": "10.0.0.2"}], None, "MASTER_ADDR: leads rank 0 on hostA to its own loopback"),
        ([{"address": "10.0.0.1"}, {"network": "2", "address": "10.0.0.2"}], None, "gloo"),
    ],
)
def test_back_end(monkeypatch, changes, backend, expected):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    ranks = [rank_info(rank, **change) for rank, change in enumerate(changes)]
    section = DistributedSection(backend=backend)
    if expected in ("gloo", "nccl"):
        assert backend_of(section, ranks) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            backend_of(section, ranks)


# ---- the network and the stores


def test_the_interface_that_leads_to_the_master():
    assert route_to("127.0.0.1", 29500) == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    with pytest.raises(ConfigError, match="MASTER_ADDR: can't be reached .*'no.such.host.invalid'"):
        route_to("no.such.host.invalid", 29500)


def listening_addresses(port: int) -> set[str]:
    found = set()
    for line in [*Path("/proc/net/tcp").read_text().split("\n"), *Path("/proc/net/tcp6").read_text().split("\n")]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):
            found.add(fields[1].partition(":")[0])
    return found


def test_the_store_of_several_hosts_listens_on_one_address_only():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        joining = pool.submit(open_store, launched(1, 2, master_port=port), None, Deadline(PATIENCE))
        time.sleep(0.2)
        store = open_store(launched(0, 2, master_port=port), None, Deadline(PATIENCE))
        joining.result().set("key", "value")
    assert store.get("key") == b"value"
    assert listening_addresses(port) == {"0100007F"}


def test_a_port_in_use_is_a_usage_error():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT: is taken on 127.0.0.1, got {port}.*--master_port"):
            open_store(launched(0, 2, master_port=port), None, Deadline(PATIENCE))


def test_nobody_at_the_masters_address():
    with pytest.raises(RankLost, match="rank 0 of 2 never came within 0.3 s: nothing answers at 127.0.0.1:"):
        open_store(launched(1, 2, master_port=free_port()), None, Deadline(0.3))


def test_one_host_meets_in_a_file(tmp_path):
    stores = [open_store(launched(rank, 2, started_here=2), tmp_path, Deadline(PATIENCE)) for rank in range(2)]
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value" and (tmp_path / "store").exists()


@pytest.fixture
def tmpdir_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_folder_of_a_run_is_private_found_by_all_and_swept_later(tmpdir_is):
    child = subprocess.Popen(["sleep", "60"])
    owner = Process.of(child.pid)
    folder = run_folder.run_folder(owner)
    assert folder == run_folder.run_folder(owner) != run_folder.run_folder(owner, "1")
    assert folder.stat().st_mode & 0o777 == 0o700 == folder.parent.stat().st_mode & 0o777
    assert run_folder.claim(folder) and not run_folder.claim(folder)
    child.kill()
    child.wait()
    me = Process.of(os.getpid())
    mine = run_folder.run_folder(me)
    assert mine.exists() and not folder.exists()
    assert run_folder.claim(folder), "a rank that outlived it still speaks"
    run_folder.remove_run_folder(me)
    assert not mine.exists()
    os.chmod(mine.parent, 0o755)
    with pytest.raises(ConfigError, match="must be a folder of yours that nobody else can open"):
        run_folder.run_folder(owner)


def test_a_full_tmpdir_is_said_before_any_rank_starts(tmpdir_is, monkeypatch):
    me = Process.of(os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
        with pytest.raises(ResourceError, match="TMPDIR: .* has 1 KiB left; a run needs 1 MiB there"):
            run_folder.run_folder(me)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ResourceError, match=r"TMPDIR: .*\(No space left on device\)"):
        run_folder.run_folder(me)


# ---- the status file


@pytest.mark.parametrize(
    ("end", "state", "guilty"),
    [
        (End(code=0), "done", []),
        (End(code=130, speaker=0), "stopped", [0]),
        (End(code=70, lost=(1,), line="x"), "lost", [1]),
        (End(code=3, speaker=1), "failed", [1]),
    ],
)
def test_status_tells_the_state_and_keeps_the_first_end(tmp_path, end, state, guilty):
    path = tmp_path / "b" / "c.json"
    door, pipe = os.pipe()
    status = StatusFile(path, pipe)
    status.peers = [Peer(0, "a", 10), Peer(1, "b", 11)]
    status.running()
    first = json.loads(path.read_text())
    assert (first["state"], first["exit_code"]) == ("running", None)
    assert first["ranks"] == [{"rank": 0, "host": "a", "pid": 10}, {"rank": 1, "host": "b", "pid": 11}]
    status.ended(end)
    status.running()
    status.failed(1, "later")
    found = json.loads(path.read_text())
    assert (found["state"], found["exit_code"], found["guilty"]) == (state, end.code, guilty)
    assert found["started"] == first["started"] <= found["updated"]
    assert os.read(door, 100) == f"megalite: running\nmegalite: ended {end.code}\n".encode()
    os.close(door)
    os.close(pipe)


def test_a_status_that_can_not_be_written_is_a_warning_and_the_door_hears_it(tmp_path, capsys):
    (tmp_path / "file").touch()
    door, pipe = os.pipe()
    status = StatusFile(tmp_path / "file" / "status.json", pipe)
    status.running()
    status.ended(End(code=0))
    assert "warning: the run's status was not written" in capsys.readouterr().err
    assert os.read(door, 100) == b"megalite: running\nmegalite: ended 0\n"
    os.close(door)
    StatusFile(None, pipe).failed(1, "the door is gone")
    os.close(pipe)


# ---- a run of one rank, in this process


@pytest.fixture
def alone(monkeypatch):
    for name in [*UNDER, "LOCAL_SIZE", "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)


def start_alone(**options) -> distributed.Runtime:
    return distributed.start(CPU, Given(sha256="x", config_text=""), **options)


def test_one_rank_without_a_launcher(alone, tmp_path):
    alarm = signal.signal(signal.SIGALRM, lambda *_: None)
    handler, path = signal.getsignal(signal.SIGTERM), tmp_path / "status.json"
    threads = threading.active_count()
    with start_alone(status_file=path) as runtime:
        assert (runtime.rank, runtime.world_size, runtime.local_rank, runtime.local_world_size) == (0, 1, 0, 1)
        assert (str(runtime.device), runtime.backend, runtime.hostname) == ("cpu", "gloo", socket.gethostname())
        assert runtime.signal_received() is None and json.loads(path.read_text())["state"] == "running"
        runtime.store.set("key", "value")
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(0.1)
        assert runtime.signal_received() is None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: runtime.signal_received() is not None, "the signal arrives")
        assert runtime.signal_received() == signal.SIGTERM
    assert json.loads(path.read_text())["state"] == "done" and signal.getsignal(signal.SIGTERM) == handler
    runtime.stop()
    signal.signal(signal.SIGALRM, alarm)
    wait_until(lambda: threading.active_count() == threads, "its threads are gone")


def test_an_exception_leaves_the_block_is_written_down_and_the_process_goes_on(alone, tmp_path):
    files, path = len(os.listdir("/proc/self/fd")), tmp_path / "status.json"
    for error, state in ((KeyError("mine"), "failed"), (ConfigError("mine"), "failed"), (Stopped(2), "stopped")):
        with pytest.raises(type(error), match="mine|stopped by SIGINT"), start_alone(status_file=path):
            raise error
        assert json.loads(path.read_text())["state"] == state
    assert len(os.listdir("/proc/self/fd")) == files


def test_no_gpu_is_a_config_error(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="distributed.device: no GPU can be seen on"):
        distributed.start(DistributedSection(device="cuda"), Given(sha256="x", config_text=""))
