"""Durable writes and line files: whole or not at all, also when the disk is full or the process is killed."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from waiting import PATIENCE

from megalite.errors import CheckpointError, ResourceError
from megalite.files import DurableFile, LineFile, read_whole, write_durably, write_json


def run_python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


def test_write_replaces_the_file_with_the_mode_of_the_umask(tmp_path):
    target = tmp_path / "made" / "on" / "the way" / "file.txt"
    previous = os.umask(0o027)
    try:
        write_durably(target, "first")
        write_durably(target, "zweiter Überschrieb")
    finally:
        os.umask(previous)
    assert target.read_text() == "zweiter Überschrieb"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_json_is_whole_and_refuses_what_json_has_not(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"text": "é", "n": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"text": "é", "n": [1, 2.5, None]}
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text())["text"] == "é"


def test_an_error_in_the_block_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), DurableFile(path) as file:
        file.write(b"half")
        raise KeyError("stop")
    with pytest.raises(FileNotFoundError), DurableFile(path) as file:
        open(tmp_path / "another file")  # noqa: SIM115  (an error that is not about the target keeps its own words)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.bin"]


KILLED = """
import os, signal, sys
from megalite.files import DurableFile, LineFile
with DurableFile(sys.argv[1]) as file:
    lines = LineFile(sys.argv[2])
    for n in range(1000):
        file.write(b"x" * 1000)
        lines.append(f"line {n}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_file_and_the_lines_so_far(tmp_path):
    path, lines = tmp_path / "model.bin", tmp_path / "new" / "lines.jsonl"
    path.write_bytes(b"old")
    assert run_python(KILLED, path, lines).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert lines.read_text().splitlines() == [f"line {n}" for n in range(1000)]


FULL_DISK = """
import resource, sys
from megalite.errors import MegaliteError
from megalite.files import LineFile, write_durably
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    if sys.argv[2] == "whole":
        write_durably(sys.argv[1], b"x" * 100_000)
    else:
        with LineFile(sys.argv[1]) as file:
            file.append("y" * 600)
            file.append("z" * 600)
except MegaliteError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("way", "kept"), [("whole", "old"), ("lines", "old" + "y" * 600 + "\n")])
def test_a_full_disk_is_a_resource_error_and_takes_nothing_away(tmp_path, way, kept):
    """Neither the file that was to be replaced, nor whole lines; a half-written one is taken back."""
    path = tmp_path / "out"
    path.write_text("old")
    done = run_python(FULL_DISK, path, way)
    assert (done.returncode, done.stderr) == (ResourceError.exit_code, "")
    assert "Free some space" in done.stdout and str(path) in done.stdout
    assert path.read_text() == kept and os.listdir(tmp_path) == ["out"]


def test_a_full_device_is_named():
    with pytest.raises(ResourceError, match="/dev/full"):
        LineFile("/dev/full").append("x")


@pytest.mark.parametrize("name", ["folder", "file/child"])
def test_a_path_that_can_not_be_written_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for write in (lambda: write_durably(tmp_path / name, "x"), lambda: LineFile(tmp_path / name)):
        with pytest.raises(CheckpointError, match="can't be written"):
            write()


@pytest.mark.parametrize(
    ("before", "kept"),
    [("", ""), ("a\nb\n", "a\nb\n"), ("a\nb", "a\n"), ("b", ""), ("a\n" + "b" * 200_000, "a\n"), ("b" * 65536, "")],
)
def test_going_on_after_a_torn_line(tmp_path, before, kept):
    path = tmp_path / "lines"
    path.write_text(before)
    with LineFile(path) as file:
        assert file.cut_torn_line() == len(before) - len(kept)
        file.append("next")
        file.sync()
    assert path.read_text() == kept + "next\n"


def test_anew_empties_and_a_line_has_no_newline(tmp_path):
    path = tmp_path / "lines"
    path.write_text("old\n")
    with LineFile(path, anew=True) as file:
        file.append("new")
        with pytest.raises(ValueError):
            file.append("two\nlines")
    assert path.read_text() == "new\n"


def test_lines_to_a_pipe():
    code = "from megalite.files import LineFile\nwith LineFile('/dev/stdout') as f: f.cut_torn_line(); f.append('x')"
    assert run_python(code).stdout == "x\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        ("socket", "No such device"),
        (".", "Is a directory"),
        ("large", "larger than"),
        ("none", "No such file"),
    ],
)
def test_what_is_no_file_of_a_sane_size_is_refused_at_once(tmp_path, name, says):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(1001))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match=says):
            read_whole(tmp_path / name, 1000)
    assert len(read_whole(tmp_path / "large", 1001)) == 1001
