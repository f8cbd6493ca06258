"""The HTTP process: replicas as its children, or as a launcher's ranks, the router and the HTTP server. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config.command_line import Options
from megalite.config.load import Loaded
from megalite.config.schema import ServeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class External:
    """The replicas are ranks of a launcher's run, whose rank 0 started this process as its child.

    The listening sockets come as inherited descriptors, so that rank 0 knows the addresses before this process runs.
    """

    unix: int
    """Descriptor of a listening unix socket, for replicas of this host."""
    tcp: int | None = None
    """Descriptor of a listening TCP socket, for replicas of other hosts; these prove that they know the token."""
    token: bytes = b""
    """The run's; see `frames.proof`."""


def main(loaded: Loaded[ServeConfig], options: Options, external: External | None = None) -> int:
    """Serve until a signal or until no replica is left; gives the exit code.

    `options`: how this process was started. Replicas are started as
    `options.program --config FILE --resolved-sha256 S --replica I --socket PATH`, unless they are there (`external`).
    """
    raise NotImplementedError
