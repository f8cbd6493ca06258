"""Which machine and which network interface this process is on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from megalite.errors import ConfigError, Problem


def machine_id() -> str:
    """The running kernel; equal in all containers and network namespaces of one machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def network_namespace() -> str:
    """Equal in processes that share a loopback interface."""
    return f"{machine_id()}/{os.stat('/proc/self/ns/net').st_ino}"


def pid_namespace() -> str:
    """Equal in processes that see each other."""
    return f"{machine_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def route_to(host: str, port: int) -> str:
    """This host's address on the way to `host`; sends nothing. ConfigError if the name is unknown or has no route."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        rule = f"can't be reached from {socket.gethostname()} ({error.strerror or error})"
        fix = "Give an address that every host can reach (--master_addr, or the variable)."
        raise ConfigError(Problem(key="MASTER_ADDR", rule=rule, value=host, fix=fix)) from error


def way_to(host: str, port: int) -> str:
    """From where and over which interface this process reaches `host`, for messages."""
    address = route_to(host, port)
    return f"{address} ({interface_of(address) or 'unknown interface'}) on {socket.gethostname()}"


def interfaces() -> list[str]:
    """Names of this host's network interfaces."""
    return list(psutil.net_if_addrs())


def interface_of(address: str) -> str | None:
    """Name of the network interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address.partition("%")[0] for one in addresses):
            return str(name)
    return None
