"""One rank of a run that joins as every job does and adds up numbers over all ranks; run by test_launcher.py.

Its config is the file `--config`: `steps` all-reduces, a tenth of a second apart; `start_timeout`, `peer_timeout`;
`stdin`: whether to read it; `goodbye`: seconds to wait for process groups that are never destroyed. With the argument
`tell`, rank 0 tells a door on another host of its end. Prints what it has; leaves files beside its config: one when it
is at work, and one when it was stopped.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
import yaml

from megalite.config.schema import DistributedSection
from megalite.errors import MegaliteError, Stopped, maybe_fault
from megalite.run import runtime as distributed
from megalite.run.facts import Given
from megalite.run.hosts import tell_the_door


def listening_everywhere() -> bool:
    """This process has a socket that hosts elsewhere could connect to."""
    inodes = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as table:
            for line in list(table)[1:]:
                address, state, inode = line.split()[1], line.split()[3], line.split()[9]
                if state == "0A" and f"socket:[{inode}]" in inodes and set(address.partition(":")[0]) == {"0"}:
                    return True
    return False


def main() -> int:
    if "tell" in sys.argv:
        tell_the_door()
    path = sys.argv[sys.argv.index("--config") + 1]
    text = open(path).read()
    config = yaml.safe_load(text)
    if "goodbye" in config:
        distributed._GOODBYE = config["goodbye"]
        dist.destroy_process_group = lambda: time.sleep(60)
    timeouts = {name: config[name] for name in ("start_timeout", "peer_timeout") if name in config}
    section = DistributedSection(device="cpu", **timeouts)
    try:
        with distributed.start(section, Given(sha256=text, config_text=text)) as runtime:
            total = torch.zeros(1)
            for step in range(config["steps"]):
                total = torch.tensor([float(runtime.rank), float(runtime.signal_received() or 0)])
                dist.all_reduce(total)
                maybe_fault("step", runtime.rank)
                if step == 1:
                    open(f"{path}.at-work-{runtime.rank}", "w").close()
                if total[1]:
                    raise Stopped(runtime.signal_received() or 15)
                time.sleep(0.1)
            given = repr(sys.stdin.read()) if config.get("stdin") else "unread"
            has = [
                f"rank {runtime.rank} of {runtime.world_size}: sum {total[0]:g}",
                f"{runtime.local_world_size} here",
                f"{runtime.backend} on {os.environ['GLOO_SOCKET_IFNAME']}",
                f"threads {os.environ['OMP_NUM_THREADS']}",
                f"open {listening_everywhere()}",
                f"stdin {given}",
                f"{sys.argv[3:]}",
            ]
            os.write(1, (", ".join(has) + "\n").encode())  # in one go: the other ranks write too
    except Stopped as stopped:
        open(f"{path}.stopped", "w").close()
        print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except MegaliteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
