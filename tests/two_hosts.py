"""Two hosts on one machine: namespaces joined by a cable (veth), each with its own name, loopback, processes and sshd.

All of it lives in namespaces whose first process ends when its standard input does; so nothing outlives the tests, not
even if they are killed. Needs root and the programs of `missing`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher_only import launcher_only
from waiting import wait_until

from megalite.run.processes import Process, descendants
from megalite.run.runtime import INTERFACES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "openssh-server openssh-client pdsh iproute2 procps"
SLOTS = {"mega-a": "10.77.0.1", "mega-b": "10.77.0.2"}
"""The hosts and their addresses."""

_SET_UP = r"""
set -e
cd "$1"
hostname mega-a
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind hosts /etc/hosts
sshd() { exec "$(PATH=$PATH:/usr/sbin:/sbin type -P sshd)" -D -e -f /dev/null -h "$PWD/host_key" -o PidFile=none \
    -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes -o AuthorizedKeysFile="$PWD/key.pub" \
    -o SetEnv="OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu" 2>>"$2.sshd"; }
export -f sshd
ip link set lo up
sshd "$1" "$2" &
unshare --net --uts --mount --pid --fork --mount-proc bash -c \
    'hostname mega-b; ip link set lo up; touch "$2.b"; sshd "$1" "$2" & wait' b "$1" "$2" &
until [ -e "$2.b" ]; do sleep 0.01; done
b=$(pgrep -P $!)
ip link add mega-a0 type veth peer name mega-b0 netns "$b"
ip addr add 10.77.0.1/24 dev mega-a0
ip link set mega-a0 up
nsenter --target "$b" --net ip addr add 10.77.0.2/24 dev mega-b0
nsenter --target "$b" --net ip link set mega-b0 up
for address in 10.77.0.1 10.77.0.2; do until (exec 3<>"/dev/tcp/$address/22") 2>&-; do sleep 0.01; done; done
echo ready
read -r _ || true
"""
"""Makes both hosts, in the folder $1 with what all hosts share; $2 begins the names of files of its own."""


def missing() -> str | None:
    """Why there can be no two hosts here; None if there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    where = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    needed = ("ip", "ssh", "ssh-keygen", "sshd", "pdsh", "unshare", "nsenter", "pgrep")
    absent = [name for name in needed if not shutil.which(name, path=where)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install {PACKAGES})"
    made = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return "this machine allows no namespaces" if made.returncode else None


def prepare(folder: Path) -> None:
    """What all pairs of hosts share: keys, known hosts, an ssh that uses them, and a launcher that starts quickly."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    names = [f"{name},{address}" for name, address in SLOTS.items()]
    (folder / "known_hosts").write_text("".join(f"{name} {key}\n" for name in names))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in SLOTS.items()))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\nLogLevel ERROR\n"
        "ServerAliveInterval 2\nServerAliveCountMax 2\n"
    )
    launcher_only(folder / "light")
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)


@dataclass(frozen=True)
class Run:
    """A command on a host."""

    process: subprocess.Popen[bytes]
    _out: Path
    _err: Path

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()


class TwoHosts:
    """One pair of hosts and what runs on them. A context manager; at its end all of that is gone."""

    def __init__(self, shared: Path, folder: Path):
        """`shared`: see `prepare`; `folder`: for what the hosts say."""
        folder.mkdir()
        self.folder, self._shared = folder, shared
        apart = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._outer = subprocess.Popen(
            [*apart, "bash", "-c", _SET_UP, "mega-a", str(shared), str(folder / "setup")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "setup.err").open("w"),
        )
        assert self._outer.stdout is not None
        said = self._outer.stdout.readline()
        assert said == b"ready\n", (folder / "setup.err").read_text()
        (first,) = [one for one in descendants(self._outer.pid) if _above(one) == self._outer.pid]
        beside = {_above(one): one for one in descendants(first.pid)}
        (second,) = [beside[one.pid] for one in descendants(first.pid) if one.command()[:1] == ["unshare"]]
        self._inits = {"mega-a": first, "mega-b": second}
        self._networks = {os.readlink(f"/proc/{one.pid}/ns/net"): host for host, one in self._inits.items()}

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        assert self._outer.stdin is not None
        self._outer.stdin.close()
        try:
            self._outer.wait(10)
        except subprocess.TimeoutExpired:
            self._outer.kill()
            self._outer.wait()

    def start(self, *command: object, host: str = "mega-a", light: bool = False) -> Run:
        """Start a command on a host, in the checkout; `light`: see launcher_only.py."""
        env = {name: value for name, value in os.environ.items() if name not in INTERFACES}  # runs in this process set
        python = f"{self._shared}/light:{ROOT}" if light else str(ROOT)
        env |= {"PATH": f"{self._shared}/bin:{os.environ['PATH']}", "PYTHONPATH": python}
        out, err = (self.folder / f"{host}.{name}" for name in ("out", "err"))
        process = subprocess.Popen(
            [*self._enter(host), f"--wd={ROOT}", *map(str, command)],
            env={**env, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out.open("w"),
            stderr=err.open("w"),
        )
        return Run(process, out, err)

    def do(self, host: str, *command: str) -> None:
        """Run a command of the system on a host."""
        subprocess.run([*self._enter(host), *command], check=True)

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "--target", str(self._inits[host].pid), "--mount", "--net", "--uts", "--pid"]

    def processes(self, host: str, pattern: str) -> list[Process]:
        """Those of a host whose command line matches."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            process = Process.of(int(name))
            if (
                process is not None
                and self._host(process) == host
                and re.search(pattern, " ".join(process.command()), re.DOTALL)
            ):
                found.append(process)
        return found

    def ranks(self, host: str) -> list[Process]:
        """In rank order."""
        found = {}
        for process in self.processes(host, f"^{re.escape(sys.executable)} "):
            place = [int(word[5:]) for word in process.environment() if word.startswith(b"RANK=")]
            found |= {rank: process for rank in place}
        return [found[rank] for rank in sorted(found)]

    def _host(self, process: Process) -> str | None:
        try:
            return self._networks.get(os.readlink(f"/proc/{process.pid}/ns/net"))
        except OSError:  # it has ended
            return None

    def none_left(self) -> None:
        """Wait until there is no rank on any host."""
        wait_until(lambda: not any(self.ranks(host) for host in SLOTS), "no rank is left")


def _above(process: Process) -> int:
    parent = process.parent()
    return parent.pid if parent else 0
