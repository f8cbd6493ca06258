"""Standard output and error that never fail a program: what can't be written is dropped, and why is kept.

A reader that leaves (`| head`), a full disk, a descriptor closed by whoever started the process and an encoding without
the characters of a result would otherwise raise at any print, progress bar or warning, and once more at the end.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from megalite.errors import ConfigError, MegaliteError, ResourceError


class _Descriptor(io.FileIO):
    """Takes everything."""

    failure: OSError | None = None
    """Error of the first write that failed; after a reader has left, nothing is written any more."""

    def write(self, data: Any) -> int:
        try:
            while self.failure is None or self.failure.errno != errno.EPIPE:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # set to non-blocking by a program that shares it, and full
        except OSError as error:
            self.failure = self.failure or error
        return len(data)


def guard() -> None:
    """Make this process's standard streams such streams, once; characters that they lack are escaped.

    Closed descriptors become /dev/null, lest the next file that is opened be taken for one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    streams = vars(sys)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if streams[name] is streams[f"__{name}__"]:
            streams[name] = streams[f"__{name}__"] = _guarded(number, streams[name])


def _guarded(number: int, stream: Any) -> TextIO:
    """What takes the place of a standard stream; None: its descriptor was closed."""
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Descriptor):
        assert isinstance(stream, io.TextIOWrapper)
        return stream
    raw = _Descriptor(number, "w", closefd=False)
    if stream is None:
        raw.failure = OSError(errno.EBADF, "closed")
    else:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through if stream else True,  # python -u buffers nothing
        write_through=stream.write_through if stream else False,
    )


def stdout_failure() -> OSError | None:
    """Why something that was printed did not arrive; None: it has, or goes to a stream that is not guarded."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


def reader_has_left() -> bool:
    """Nobody will see what is printed from here on."""
    failure = stdout_failure()
    return failure is not None and failure.errno == errno.EPIPE


def require_stdout() -> None:
    """ResourceError if something that was printed is lost, ConfigError if standard output is closed.

    A reader that has left has seen enough, so that is neither.
    """
    failure = stdout_failure()
    if failure is not None and failure.errno != errno.EPIPE:
        kind = ConfigError if failure.errno == errno.EBADF else ResourceError
        raise kind(f"standard output: {failure.strerror}. What should be read there is lost.")


def warn_of_loss() -> None:
    """Say that something which was printed is lost, where that is not what the program was started for."""
    try:
        require_stdout()
    except MegaliteError as error:
        sys.stderr.write(f"warning: {error}\n")
