"""The timeline of a run as a Chrome trace: every span of every rank, for Perfetto (ui.perfetto.dev) and our own plots.

A rank is a process of the trace, its host, its device and each of its groups a track; arrows go from a stage's send to
what the next does with it. All ranks of a host append to one file, whole lines at a time (of a name that ends in .gz
whole gzip members), and a list of events needs no end: a run that was killed leaves a file that opens. Format: "Trace
Event Format", JSON array form, of the Chromium project.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FLUSH_EVENTS = 4096
"""Events in memory, at most; then they are written."""
FLUSH_SECONDS = 1.0
FILE_BYTES = 256 << 20
"""Of the events of all ranks, before compression; each rank may write its share, then nothing more."""
TRACKS = ("steps", "parts", "host", "device", "queue")
"""The first tracks of a rank; those of its groups follow as they come."""


class Timeline:
    """Takes the spans of one rank to the file; times are of its meter's clock, in seconds."""

    def __init__(
        self, path: Path, *, rank: int, ranks: int, label: str, to_origin: Callable[[float], float], ends: bool
    ):
        """`path`: made by `create` before any rank opens it. `label`: of the rank. `to_origin`: a time of this rank's
        clock -> seconds since the origin of all ranks. `ends`: it is this rank that `finish`es the file."""
        self.rank = rank
        self.ends = ends
        self.room = FILE_BYTES // ranks
        """Bytes that are left to this rank."""
        self.dropped = 0
        """Events for which there was no room."""
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._to_origin = to_origin
        self._tracks: dict[str, int] = {}
        self._lines: list[str] = []
        self._flushed = 0.0
        self._meta("process_name", 0, name=label)
        self._meta("process_sort_index", 0, sort_index=rank)
        for name in TRACKS:
            self._track(name)

    @staticmethod
    def create(path: Path, token: str) -> None:
        """An empty timeline, in place of whatever was there; `token`: of the run. OSError: it can't be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_packed(path, _head(token)))

    @staticmethod
    def was_created(path: Path, token: str) -> bool:
        """Whether the file is there, with this token: another host's, which shares it."""
        try:
            with path.open("rb") as file:
                return file.read(len(head := _packed(path, _head(token)))) == head
        except FileNotFoundError:
            return False

    # ---- what a collector gives

    def span(
        self, lane: str, name: str, begin: float, end: float, *, phase: str = "", values: dict[str, Any] | None = None
    ) -> None:
        start = self._us(begin)
        args = f',"args":{json.dumps(values)}' if values else ""
        took = max(0.0, self._us(end) - start)
        self._lines.append(
            f'{{"ph":"X","pid":{self.rank},"tid":{self._track(lane)},"ts":{start},"dur":{took:.1f},'
            f'"cat":"{phase}","name":"{name}"{args}}},\n'
        )

    def flow(self, name: str, number: int, at: float, *, begins: bool) -> None:
        """`number`: of the message in its flow, alike on both ends. An arrow ends at the next span of its track."""
        lane, kind = ("pp", "s") if begins else ("host", "f")
        self._lines.append(
            f'{{"ph":"{kind}","pid":{self.rank},"tid":{self._track(lane)},"ts":{self._us(at)},"cat":"flow",'
            f'"name":"{name}","id":"{name} {number}"}},\n'
        )

    def values(self, lane: str, at: float, values: dict[str, float]) -> None:
        self._lines.append(
            f'{{"ph":"C","pid":{self.rank},"tid":{self._track(lane)},"ts":{self._us(at)},"name":"{lane}",'
            f'"args":{json.dumps(values)}}},\n'
        )

    def tick(self, now: float) -> None:
        """Write what has gathered, if it is much or old."""
        if len(self._lines) >= FLUSH_EVENTS or now - self._flushed >= FLUSH_SECONDS:
            self._flushed = now
            self.flush()

    # ---- the file

    def flush(self) -> None:
        """Write what has gathered. A full disk costs the timeline, not the run."""
        lines, self._lines = self._lines, []
        text = "".join(lines)
        if not lines or self.dropped or len(text) > self.room:
            self.dropped += len(lines)
            return
        self.room -= len(text)
        data = _packed(self._path, text)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError:
            self.dropped += len(lines)

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        os.close(self._file)

    def finish(self) -> None:
        """End the list of events, once every rank that writes to this file has closed it."""
        with self._path.open("ab") as file:
            file.write(_packed(self._path, '{"ph":"M","pid":0,"name":"end"}\n]\n'))

    def _us(self, at: float) -> float:
        return round(self._to_origin(at) * 1e6, 1)

    def _track(self, name: str) -> int:
        number = self._tracks.get(name)
        if number is None:
            number = self._tracks[name] = len(self._tracks)
            self._meta("thread_name", number, name=name)
            self._meta("thread_sort_index", number, sort_index=number)
        return number

    def _meta(self, kind: str, track: int, **values: Any) -> None:
        event = {"ph": "M", "pid": self.rank, "tid": track, "name": kind, "args": values}
        self._lines.append(json.dumps(event) + ",\n")


def _head(token: str) -> str:
    return "[\n" + json.dumps({"ph": "M", "pid": 0, "name": "run", "args": {"token": token}}) + ",\n"


def _packed(path: Path, text: str) -> bytes:
    data = text.encode()
    return gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data


def read_timeline(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a timeline, also of one whose end is missing. ValueError: it is none."""
    data = path.read_bytes()
    lines = (_unpacked(data) if data[:2] == b"\x1f\x8b" else data).decode(errors="replace").splitlines()
    if not lines or lines[0].strip() != "[":
        raise ValueError("it is no timeline that megalite wrote")
    for line in lines[1:]:
        try:
            event = json.loads(line.rstrip().rstrip(","))
        except ValueError:
            continue  # the end, or torn
        if isinstance(event, dict):
            yield event


def _unpacked(data: bytes) -> bytes:
    """The content of whole gzip members, and what there is of a torn one at the end."""
    found = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        try:
            found += member.decompress(data)
        except zlib.error:
            break
        data = member.unused_data
    return found
