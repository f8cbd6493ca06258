"""Which host has what, what the hosts have alike, and what is found out before a run over them starts."""

import os
import socket
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import PATIENCE, free_port

from megalite.config.load import load_config
from megalite.config.schema import InferConfig
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, RankLost
from megalite.planner import choose
from megalite.preflight import given
from megalite.run import hosts, joining, rendezvous
from megalite.run.facts import (
    RankInfo,
    differences,
    driver_warning,
    facts_of,
    hosts_of,
    refusals,
    summary,
    table,
)
from megalite.run.hostfile import check_ranks
from megalite.run.hostfile import hosts_of as hosts_of_file
from megalite.run.launch_env import LaunchEnv, first_host, outside
from megalite.run.placement import Host, by_host, consecutive, tp_inside, warnings
from megalite.run.start import misplaced
from megalite.weights.identity import sampled_digest

# ---- a layout by host


def on(*slots: int) -> list[Host]:
    return consecutive((name, count) for name, count in zip("abcd", slots, strict=False))


@pytest.mark.parametrize(
    ("slots", "layout", "shares"),
    [
        ((2, 2), Layout(2, 2, 1), ["a  ranks 0-1: stage 0", "b  ranks 2-3: stage 1"]),
        ((8, 8), Layout(2, 1, 8), ["a  ranks 0-7: replicas 0-3", "b  ranks 8-15: replicas 4-7"]),
        ((3, 1), Layout(1, 2, 2), ["a  ranks 0-2: replica 0; stage 0 of replica 1", "b  rank 3: stage 1 of replica 1"]),
        ((2, 2), Layout(4), ["a  ranks 0-1: tp ranks 0-1", "b  ranks 2-3: tp ranks 2-3"]),
        ((2, 2), Layout(1, 1, 2, first_rank=2), ["a  ranks 0-1: no part of it", "b  ranks 2-3: replicas 0-1"]),
    ],
)
def test_each_host_has_whole_replicas_stages_or_parts(slots, layout, shares):
    title, *lines = by_host({"parallel": layout}, on(*slots))
    assert title == f"{layout} on 2 hosts:" and [line.strip() for line in lines] == shares


def test_two_layouts_and_many_hosts():
    nodes = consecutive((f"node{number:03}", 8) for number in range(64))
    lines = by_host({"train.parallel": Layout(8, 8, 8), "infer.parallel": Layout(8, 1, 64)}, nodes)
    assert lines[0].startswith("train.parallel: tp=8,pp=8") and lines[1] == "  node000  ranks 0-7: stage 0 of replica 0"
    assert len(lines) == 2 * 34 and lines[33] == "  and 32 more hosts"


@pytest.mark.parametrize(
    ("hosts", "layout", "says"),
    [
        (on(4, 4), Layout(4, 2), None),
        (on(4, 2), Layout(2, 3), None),
        (on(1, 1), Layout(1, 2), None),
        (on(2, 2), Layout(4), ("0, 1, 2, 3 are one tp group and are on a and b:", "Set parallel.tp=2 parallel.pp=2")),
        (on(3, 3), Layout(2, 1, 3), ("ranks 2, 3 are", "tp=1 parallel.pp=2 to keep tp inside hosts, or give every")),
        (on(4, 4), Layout(8), ("on a and b:", "Set parallel.tp=4 parallel.pp=2")),
        (on(2, 2, 2, 2), Layout(4, 2), ("on a and b, as 1 other group:", "tp=2 parallel.pp=4")),
        ([Host("a", (0, 2)), Host("b", (1, 3))], Layout(2, 2), ("0, 1", "a has ranks 0, 2; number them host after")),
    ],
)
def test_tp_groups_that_cross_hosts_are_named_with_what_to_set(hosts, layout, says):
    found = warnings({"parallel": layout}, hosts)
    assert tp_inside(layout, hosts) == (says is None) and len(found) == (says is not None)
    assert all(words in found[0] for words in says or ())


def test_the_planner_keeps_tp_inside_hosts():
    place = choose.Place.on(on(2, 2))
    assert place.inside([Layout(4), Layout(2, 2), Layout(1, 4)]) == [Layout(2, 2), Layout(1, 4)]
    assert place.inside([Layout(4)]) == [Layout(4)] and choose.Place().inside([Layout(4)]) == [Layout(4)]
    env = LaunchEnv(rank=0, world_size=5, local_rank=0, started_here=3, hosts=2)
    assert [len(host.ranks) for host in choose.Place.of(env).hosts] == [3, 2]
    assert [len(host.ranks) for host in choose.Place.of(replace(env, started_here=2)).hosts] == [3, 2], (
        "all find the same"
    )


# ---- hostfiles


@pytest.mark.parametrize(
    ("lines", "options", "expected"),
    [
        ("a slots=2\nb slots=2\n", [], {"a": (0, 1), "b": (2, 3)}),
        ("# one\na slots=4 # two\n\n", [], {"a": (0, 1, 2, 3)}),
        ("a slots=2\nb slots=2\n", ["--include", "b"], {"b": (0, 1)}),
        ("a slots=4\nb slots=2\n", ["--include", "b@a:0,3"], {"a": (0, 1), "b": (2, 3)}),
        ("a slots=4\nb slots=2\n", ["--exclude", "a:1,2@b:0"], {"a": (0, 1), "b": (2,)}),
        ("a slots=4\nb slots=2\n", ["--exclude", "a"], {"b": (0, 1)}),
        ("a slots=2\n", ["--exclude", "a"], "leaves no host"),
        ("a slots=2\n", ["--include", "c"], "names a host that is not in the hostfile, got 'c'. There are: a."),
        ("a slots=2\n", ["--include", "a:2"], "names slots that a does not have, got '2'"),
        ("a slots=2\n", ["--include", "a", "--exclude", "a"], "can't be given together"),
        ("a\n", [], "hosts:1: must be `HOST slots=NUMBER`, got 'a'"),
        ("a slots=2\nb slots=two", [], "hosts:2: must be"),
        ("a slots=2\na slots=2\n", [], "hosts:2: a has a line already"),
        ("# none\n", [], "names no host"),
        (None, [], "--hostfile: can't be read: .*No such file"),
        ("a slots=2\n", ["--node_rank", "0", "--master_addr", "a", "--no_ssh"], {"a": (0, 1)}),
        ("a slots=2\n", ["--node_rank", "1", "--no_ssh"], "--node_rank: must be a whole number from 0 to 0, got '1'"),
        ("a slots=2\n", ["--node_rank", "0", "--no_ssh"], "--no_ssh: needs --master_addr"),
        ("a slots=2\n", ["--no_ssh"], "--no_ssh: needs --node_rank and --master_addr"),
        ("a slots=2\n", ["--node_rank", "0"], "--node_rank: needs --no_ssh"),
        ("a slots=2\n", ["--ssh_port", "ssh"], "--ssh_port: must be a whole number from 1 to 65535, got 'ssh'"),
        ("a slots=2\n", ["--master_port", "0"], "--master_port: must be a whole number from 1 to 65535, got '0'"),
    ],
)
def test_hostfiles_with_deepspeeds_options(tmp_path, lines, options, expected):
    path = tmp_path / "hosts"
    if lines is not None:
        path.write_text(lines)
    words = ["--hostfile", str(path), *options]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            hosts_of_file(words)
    else:
        assert {host.name: host.ranks for host in hosts_of_file(words)} == expected


def test_hosts_start_as_many_ranks_as_the_layout_needs():
    check_ranks(on(2, 2), 4)
    with pytest.raises(ConfigError, match="its hosts start 3 ranks, and the layout needs 4"):
        check_ranks(on(2, 1), 4)


# ---- Slurm

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_a_task_of_a_slurm_step_is_a_rank():
    env = LaunchEnv.of(STEP)
    assert (env.rank, env.local_rank, env.world_size, env.started_here, env.hosts) == (3, 1, 5, 2, 3)
    assert (env.master_addr, env.launcher, env.over_hosts) == ("gpu07", "srun", True)
    one = Namespace(config=InferConfig(), sha256="")
    said = misplaced(one, env, [], Namespace(program=["a.py"], hosts=[], sha256=""))
    assert "srun started 5 ranks, " in str(*said) and str(*said).endswith("srun --ntasks 1 python a.py")
    assert (
        20000 <= env.master_port < 30000 and env.master_port != LaunchEnv.of({**STEP, "SLURM_STEP_ID": "1"}).master_port
    )
    assert LaunchEnv.of({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}).master_port == 29500
    assert LaunchEnv.of({**STEP, "SLURM_STEP_TASKS_PER_NODE": "?"}).started_here is None


def test_what_is_no_task_of_several_is_no_rank_of_slurms():
    batch = {name: value for name, value in STEP.items() if "STEP" not in name}
    assert LaunchEnv.of(batch) is None, "a batch script starts the door"
    assert LaunchEnv.of({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert LaunchEnv.of(outside(STEP)) is None
    inner = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    assert LaunchEnv.of({**STEP, **inner}).world_size == 2, "torchrun under srun"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],x", "gpu07"), ("n[3,5]", "n3"), ("r[1-2]n[3-4]-ib,x", "r1n3-ib")],
)
def test_the_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


# ---- ssh


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """`ssh(text)`: a shell script that is found as ssh; it has the host as $host, the command as $command."""

    def make(text: str) -> None:
        for name in ("ssh", "pdsh"):
            (tmp_path / name).write_text(f"#!/bin/sh\nfor command; do host=$last; last=$command; done\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_hosts_that_ssh_reaches(ssh, tmp_path):
    ssh('eval "$command"')
    hosts.check_reachable(["a", "b"], "2222", [str(tmp_path), sys.executable])
    with pytest.raises(ConfigError) as failed:
        hosts.check_reachable(["a", "b"], None, ["/nowhere/python", str(tmp_path), "/nowhere/infer.py"])
    assert [f"{one.key} {one.rule}" for one in failed.value.problems] == [
        f"host {host} has no /nowhere/{name}" for host in "ab" for name in ("python", "infer.py")
    ]


@pytest.mark.parametrize(
    ("said", "rule", "fix"),
    [
        ("root@b: Permission denied (publickey).", "root@b: Permission denied (publickey)", "ssh-copy-id b"),
        ("Host key verification failed.", "Host key verification failed", "Connect once by hand (ssh b)"),
        (
            "ssh: Could not resolve hostname b: unknown",
            "ssh: Could not resolve hostname b: unknown",
            "Correct the name",
        ),
        ("ssh: connect to host b port 22: Connection refused", "ssh: connect", "--ssh_port"),
        ("Banner.", "Banner", "Try by hand: ssh b"),
        ("", "ssh left with code 255", "Try by hand: ssh b"),
    ],
)
def test_hosts_that_ssh_does_not_reach_are_named_with_a_remedy(ssh, said, rule, fix):
    ssh(f'[ $host = a ] && eval "$command" || {{ echo "{said}" >&2; exit 255; }}')
    with pytest.raises(ConfigError) as failed:
        hosts.check_reachable(["a", "b"], None, [])
    (problem,) = failed.value.problems
    assert problem.key == "host b" and problem.rule.startswith(rule) and fix in problem.fix


def test_without_pdsh_no_host_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--hostfile: needs ssh and pdsh here"):
        hosts.check_reachable(["a"], None, [])


# ---- what ranks say of themselves


def info(rank: int, host: str = "a", **facts: str) -> RankInfo:
    place = {"machine": "m", "pids": host, "network": host, "address": "10.0.0.1", "device": "cpu", "gpu": ""}
    return RankInfo(rank=rank, host=host, pid=1, start=1, facts=facts, free=3 << 30, **place)


RANKS = [
    info(0, torch="2.13.0", config="c0", driver="550", **{"input.file": "x", "model.path": "m"}),
    info(1, torch="2.13.0", config="c0", driver="550", **{"input.file": "x", "model.path": "m"}),
    info(2, "b", torch="2.12.0", config="c1", driver="535", **{"input.file": "y", "model.path": ""}),
]


def test_all_that_differs_is_said_at_once_with_both_values():
    configs = {0: {"parallel.tp": 2, "seed": 1}, 2: {"parallel.tp": 2, "seed": 2, "x": None}}
    assert [str(one) for one in differences(RANKS, configs.__getitem__)] == [
        "torch: is 2.13.0 on ranks 0-1 (a) and 2.12.0 on rank 2 (b). Install the same version on every host.",
        "seed: is 1 on ranks 0-1 (a) and 2 on rank 2 (b). Give every rank the same file and overrides.",
        "x: is not set on ranks 0-1 (a) and None on rank 2 (b). Give every rank the same file and overrides.",
        "input.file: is x on ranks 0-1 (a) and y on rank 2 (b). Copy it anew to every host, or keep it on a file "
        "system that they share.",
    ], "a model that is not there yet is no other one"
    assert differences(RANKS[:2], configs.__getitem__) == [] and driver_warning(RANKS[:2]) is None
    assert driver_warning(RANKS) == "driver: is 550 on ranks 0-1 (a) and 535 on rank 2 (b)"


def test_the_table_and_the_line_of_all_ranks():
    lines = table(RANKS)
    assert lines[0].split() == "rank host address device free memory torch config driver input.file model.path".split()
    assert lines[3].split() == "2 b 10.0.0.1 cpu 3.0 GiB 2.12.0 c1 535 y -".split() and len(lines) == 4
    assert summary(RANKS[:2]) == "2 ranks agree: torch 2.13.0, config c0, input.file x, model.path m"
    assert summary([*RANKS[:2], info(2, "b")]).startswith("3 ranks on 2 hosts agree: ")
    assert "".join(rendezvous.RanksDiffer([], RANKS).lines()) == "".join(lines)


def test_hosts_of_one_name_are_told_apart():
    twins = [info(0), replace(info(1), machine="n", address="10.0.0.2"), info(2, "b")]
    assert [host.name for host in hosts_of(twins)] == ["a (10.0.0.1)", "a (10.0.0.2)", "b"]


def test_reasons_not_to_take_part_are_said_once():
    some = [
        replace(one, problem=text) for one, text in zip(RANKS, ("", "p\nq: type\n  x", "q: type\n  x"), strict=True)
    ]
    assert refusals(some) == ["rank 1 (a): p", "ranks 1-2 (a and b): q: type\n  x"]
    assert refusals([replace(one, problem="p") for one in RANKS]) == ["p"]


DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"


def facts(loaded) -> dict[str, str]:
    return facts_of(given(loaded), torch="t", cuda=None, thorough=True)


def test_what_a_rank_is_given(tmp_path, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n")
    (tmp_path / "c.yaml").write_text(f"model: {{path: {DEMO}}}\ninput: {{file: {text}}}\n")
    loaded = load_config("infer", tmp_path / "c.yaml", ["parallel.tp=2"])
    before = facts(loaded)
    assert list(before)[:4] == ["config", "input.file", "model.path", "megalite"] and before["torch"] == "t"
    assert given(loaded).layouts == {"parallel": Layout(2)} and facts(loaded) == before
    text.write_text("two\n")
    assert {key for key in before if facts(loaded)[key] != before[key]} == {"input.file"}
    assert list(facts_of(given(loaded), torch="t", cuda=None, thorough=False)) == ["config"], (
        "ranks of one host share files"
    )
    monkeypatch.setattr("megalite.preflight.at_hand", lambda *_: None)
    assert facts(loaded)["model.path"] == "", "of the hub, and not downloaded yet"
    text.chmod(0)
    monkeypatch.setattr("megalite.preflight.file_digest", lambda path: open("/nowhere/x"))
    with pytest.raises(CheckpointError, match="/nowhere/x: can't be read"):
        facts(loaded)


def test_copies_of_a_model_have_one_digest_and_others_another(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "b" / "README.md").write_text("no part of it")
    assert sampled_digest(tmp_path / "a") == sampled_digest(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes((1 << 20) - 1) + b"x")
    assert sampled_digest(tmp_path / "a") != sampled_digest(tmp_path / "b")


# ---- a rank that can't take part tells the others


def test_a_rank_of_another_host_says_why_it_does_not_come(monkeypatch):
    envs = [
        LaunchEnv(rank=rank, world_size=2, local_rank=0, started_here=1, master_port=port)
        for port in [free_port()]
        for rank in range(2)
    ]

    def first() -> BaseException | None:
        deadline = rendezvous.Deadline(PATIENCE)
        store = rendezvous.open_store(envs[0], None, deadline)
        try:
            rendezvous.meet(envs[0], store, replace(info(0), **mine), "", deadline, lambda here: "gloo")
        except ConfigError as error:
            return error
        return None

    me = joining.this_process()
    mine = {"pid": me.pid, "start": me.start}
    with ThreadPoolExecutor(2) as pool:
        told = pool.submit(first)
        assert pool.submit(joining.refuse, envs[1], CheckpointError("model.path: no such folder.")).result() is None
        error = told.result()
    assert error.exit_code == CheckpointError.exit_code
    assert error.lines() == [f"error: rank 1 ({socket.gethostname()}): model.path: no such folder."]


def test_nobody_waits_for_ever_for_others_when_one_can_not_come(monkeypatch):
    monkeypatch.setattr(rendezvous, "_AFTER_PROBLEM", 0.1)
    monkeypatch.setattr(rendezvous, "_LINGER", 0.1)
    env = LaunchEnv(rank=0, world_size=3, local_rank=0, started_here=1, master_port=free_port())
    with pytest.raises(ConfigError, match=r"^no GPU\.$"):
        joining.refuse(env, ConfigError("no GPU"))


def test_who_never_came_is_named_with_where_they_should_have(monkeypatch):
    env = LaunchEnv(rank=0, world_size=3, local_rank=0, started_here=1, master_port=free_port())
    store = rendezvous.open_store(env, None, rendezvous.Deadline(PATIENCE))
    me = joining.this_process()
    with pytest.raises(RankLost) as lost:
        rendezvous.meet(env, store, replace(info(0), pid=me.pid, start=me.start), "", rendezvous.Deadline(0.2), str)
    where = f"The ranks meet at 127.0.0.1:{env.master_port}; this one is 127.0.0.1 (lo) on {socket.gethostname()}."
    assert f"ranks 1-2 never came within 0.2 s (of 3; here are 0 on a). {where} Look for their own" in str(lost.value)


def test_an_interface_that_is_not_there(monkeypatch):
    from megalite.config.schema import DistributedSection

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME: is no network interface of .*got 'ib7'.*lo"):
        joining._check_interface(DistributedSection())
    joining._check_interface(DistributedSection(interface="lo"))


# ---- the commands


def test_the_dry_run_shows_the_layout_by_host(tmp_path, capsys):
    from megalite.cli import main

    (tmp_path / "hosts").write_text("mega-a slots=2\nmega-b slots=2\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--config", "configs/infer/demo.yaml", "--dry-run"]
    assert main("infer", [*options, f"model.path={DEMO}", "parallel.tp=2", "parallel.pp=2"], ["launch/infer.py"]) == 0
    assert (
        "tp=2,pp=2,dp=1 on 2 hosts:\n  mega-a  ranks 0-1: stage 0\n  mega-b  ranks 2-3: stage 1\n"
        in capsys.readouterr().out
    )
    assert main("infer", [*options, f"model.path={DEMO}", "parallel.tp=4"], ["launch/infer.py"]) == 0
    assert "warning: parallel.tp=4: ranks 0, 1, 2, 3 are one tp group" in capsys.readouterr().out
    assert main("infer", [*options, f"model.path={DEMO}"], ["launch/infer.py"]) == 2
    assert "its hosts start 4 ranks, and the layout needs 1" in capsys.readouterr().err
    open_sizes = ["parallel.tp=null", "parallel.pp=null", "parallel.dp=null"]
    assert main("infer", [*options, f"model.path={DEMO}", *open_sizes], ["launch/infer.py"]) == 0
    shown = capsys.readouterr()
    assert "of 2 hosts: 4 ranks were started" in shown.err and "on 2 hosts:" in shown.out and "warning" not in shown.out
