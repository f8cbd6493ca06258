"""Results out: a JSON-lines file that a killed run can go on with. Torch-free.

Beside `out.jsonl` lies `out.jsonl.run.json`: what decides the results of the run that writes the file. Lines are
appended as prompts finish; when all have, the file is put in input order, whole or not at all. Kill the run at any
moment, start it again, and every id is there exactly once. Prompts that failed are tried again by the next run; where
that changes a line, the old one stays until the file is put in order.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megalite.config.schema import InferConfig
from megalite.config.typecheck import printable, problem, shown
from megalite.errors import ConfigError, maybe_fault
from megalite.files import DurableFile, LineFile, left_behind, lock_at_once, write_json
from megalite.inference.outputs import RequestOutput

_NEW_FILE = "Set output.overwrite=true to start anew, or write to another file."
_SHOWN_CHANGES = 8
_WEIGHTS, _INPUT = "the weights", "the input"


def fingerprint(config: InferConfig, *, weights: str, inputs: str) -> dict[str, Any]:
    """What decides the results of a run, by config key, as JSON values.

    Layout, memory and batching are left out: results do not depend on them. `weights` identifies the weights,
    `inputs` what was read (`InputBatch.digest`).
    """
    model, engine = asdict(config.model), asdict(config.engine)
    keys = ("path", "revision", "tokenizer", "dtype", "load_format", "quantization")
    decides = {f"model.{key}": model[key] for key in keys}
    decides |= {f"engine.{key}": engine[key] for key in ("max_model_len", "seed")}
    if config.engine.kv_cache_dtype != "auto":
        decides["engine.kv_cache_dtype"] = config.engine.kv_cache_dtype
    decides |= {f"lora.{name}": folder for name, folder in config.lora.items()}
    decides |= {f"sampling.{key}": value for key, value in asdict(config.sampling).items()}
    decides |= {_WEIGHTS: weights, _INPUT: inputs[:16]}
    as_read: dict[str, Any] = json.loads(json.dumps(decides))
    return as_read


def check_settings(config: InferConfig) -> None:
    """ConfigError if the output file is of a run that its settings tell from this one, without a look at weights or
    input."""
    path = Path(os.path.realpath(config.output.file or ""))
    if config.output.file and not config.output.overwrite and path.is_file() and path.stat().st_size:
        _compare(path, fingerprint(config, weights="", inputs=""), but=(_WEIGHTS, _INPUT))


class OutputFile:
    """The results of a run, one JSON line a prompt; made by `open`. One process writes it."""

    def __init__(self, path: Path, lines: LineFile, lock: BinaryIO, order: Collection[str], places: dict[str, _Place]):
        self.path = path
        self._lines = lines
        self._lock = lock
        self._order = order
        self.known = frozenset(order)
        """Every id of the run."""
        self._places = {name: place for name, place in places.items() if not place.failed}
        """Where in the file the line of each finished id is."""
        self._failed = {name: place for name, place in places.items() if place.failed}
        """Where the line of each id is that failed in an earlier run."""
        self._end = max((place.end for place in places.values()), default=0)

    @classmethod
    def open(
        cls, path: str | Path, fingerprint: Mapping[str, Any], order: Collection[str], *, overwrite: bool = False
    ) -> OutputFile:
        """Start the file, or go on with it if it is of a run with the same `fingerprint`.

        `order`: every id of the run, in input order. ConfigError: the file is of another run (it says what changed), of
        no run, or being written by another process; `overwrite` replaces it in the first two cases.
        """
        path = Path(os.path.realpath(path))
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(problem("output.file", "must be a regular file", str(path)))
        LineFile(path).close()
        with ExitStack() as undo:
            lock = undo.enter_context(_locked(path))
            if path.stat().st_size and not overwrite:
                _compare(path, fingerprint)
            else:
                # Emptied first: stopped between the two, no old result stands beside a new record.
                LineFile(path, anew=True).close()
                write_json(_record(path), {"made_by": "megalite", "decided_by": dict(fingerprint)})
            for other in left_behind(path.parent):
                if other.name.startswith(f".{path.name}."):  # killed while it put this file in order
                    other.unlink()
            lines = undo.enter_context(LineFile(path))
            lines.cut_torn_line()
            lines.sync()
            places = _read_places(path, order)
            undo.pop_all()
        return cls(path, lines, lock, order, places)

    @property
    def finished(self) -> frozenset[str]:
        """Ids whose results are in the file; they need not run again."""
        return frozenset(self._places)

    def write(self, output: RequestOutput) -> None:
        """Append a result; it outlives this process from here on. Each id of the run comes once."""
        name = output.request_id
        assert name in self.known and name not in self._places, f"id {name!r} is unknown or written already"
        line = output.to_line()
        maybe_fault("output.write")
        data = line.encode() + b"\n"
        place = self._failed.get(name)
        if place is None or self._read(place) != data:
            self._lines.append(line)
            place = _Place(self._end, len(data))
            self._end += len(data)
        self._places[name] = place

    def _read(self, place: _Place) -> bytes:
        with self.path.open("rb") as lines:
            lines.seek(place.start)
            return lines.read(place.length)

    def close(self) -> bool:
        """Make what is written durable and, if every id is there, put the lines in input order; True if it is so."""
        self._lines.close()
        complete = len(self._places) == len(self._order)
        size = sum(place.length for place in self._places.values())
        if complete and (list(self._places) != list(self._order) or size != self._end):
            maybe_fault("output.order")
            with DurableFile(self.path) as ordered, self.path.open("rb") as lines:
                for name in self._order:
                    lines.seek(self._places[name].start)
                    ordered.write(lines.read(self._places[name].length))
                maybe_fault("output.ordered")
        self._lock.close()
        return complete


@dataclass(frozen=True, slots=True)
class _Place:
    """A line in the file; start and length in bytes."""

    start: int
    length: int
    failed: bool = False
    """The line says why the prompt could not run."""

    @property
    def end(self) -> int:
        return self.start + self.length


def _locked(path: Path) -> BinaryIO:
    """An open file that keeps other runs from writing `path` until it is closed or this process ends."""
    while True:
        lock = path.open("r+b", buffering=0)
        if not lock_at_once(lock):
            lock.close()
            fix = "Wait for it, or write to another file."
            raise ConfigError(problem("output.file", "another run is writing it", str(path), fix))
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
        lock.close()  # the other run put its file in order meanwhile: this is the one from before


def _record(path: Path) -> Path:
    """Where it stands what run an output file is of."""
    return path.with_name(f"{path.name}.run.json")


def _compare(path: Path, fingerprint: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """ConfigError unless the file's run is the same as this one, but for the keys of `but`."""
    record = _record(path)
    try:
        before = dict(json.loads(record.read_bytes())["decided_by"])
    except FileNotFoundError:
        rule = f"exists and is of no run that can go on ({printable(record.name)} is missing)"
        raise ConfigError(problem("output.file", rule, str(path), _NEW_FILE)) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            problem("output.file", f"its {printable(record.name)} can't be read", str(path), _NEW_FILE)
        ) from error
    keys = [key for key in {**before, **fingerprint} if before.get(key) != fingerprint.get(key) and key not in but]
    if not keys:
        return
    changes = [f"{key} was {shown(before.get(key))}, is {shown(fingerprint.get(key))}" for key in keys[:_SHOWN_CHANGES]]
    more = [f"{len(keys) - len(changes)} more"] if len(keys) > len(changes) else []
    rule = f"holds results of another run ({'; '.join(changes + more)})"
    raise ConfigError(problem("output.file", rule, str(path), _NEW_FILE))


def _read_places(path: Path, order: Collection[str]) -> dict[str, _Place]:
    """Where each result of a file of whole lines is: of one that failed and was tried again, the later.

    ConfigError: a line is no result of this run.
    """
    places: dict[str, _Place] = {}
    known, start = frozenset(order), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                output = RequestOutput.from_line(line)
                name, failed = output.request_id, output.error is not None
            except (AttributeError, KeyError, TypeError, ValueError):
                name, failed = None, False
            twice = isinstance(name, str) and name in places and not places[name].failed
            if not isinstance(name, str) or twice or name not in known:
                why = "there twice" if twice else "of no prompt of this run"
                rule = f"line {number}: id {name!r} is {why}" if isinstance(name, str) else f"line {number} is damaged"
                raise ConfigError(problem("output.file", rule, str(path), _NEW_FILE))
            places[name] = _Place(start, len(line), failed)
            start += len(line)
    return places
