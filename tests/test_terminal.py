"""Standard output that is full, closed or read no more: no traceback, and a code that says what is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE

from megalite.config.schema import InferConfig
from megalite.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RESOURCES
from megalite.inference.job import Writer
from megalite.inference.outputs import RequestOutput

ROOT = Path(__file__).resolve().parent.parent
MEGALITE = ("-c", "import sys; from megalite.cli import megalite; sys.exit(megalite())")
GUARDED = "import sys; from megalite import terminal; terminal.guard(); "


def shell(command: str, *arguments: str) -> tuple[int, str]:
    """The exit code of a line of bash, in which PYTHON and ARGS are ours, and what it said on standard error."""
    line = command.replace("PYTHON", sys.executable).replace("ARGS", '"$@"')
    shell = ["bash", "-o", "pipefail", "-c", line, "bash"]
    done = subprocess.run([*shell, *arguments], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("command", [("launch/hybrid.py",), ("tools/bench.py",), ("tools/check_imports.py",), MEGALITE])
def test_help_on_a_full_disk(command):
    """Of jobs, of tools (which share what does it) and of all commands."""
    code, said = shell("PYTHON ARGS > /dev/full", *command, "--help")
    assert (code, said) == (
        EXIT_RESOURCES,
        "error: standard output: No space left on device. What should be read there is lost.\n",
    )


WAYS = {
    "PYTHON ARGS | true": (EXIT_DONE, ""),
    "PYTHON ARGS | head -1 > /dev/null": (EXIT_DONE, ""),
    "PYTHON ARGS >&-": (EXIT_CONFIG, "error: standard output: closed. What should be read there is lost.\n"),
    "PYTHON ARGS < /dev/null 1<&0": (EXIT_CONFIG, "error: standard output: Bad file descriptor. "),
    "PYTHON ARGS 2>&-": (EXIT_DONE, ""),
    "PYTHON ARGS 2> /dev/full": (EXIT_DONE, ""),
    "PYTHON ARGS <&- 2>&- >&-": (EXIT_CONFIG, ""),
    "PYTHON ARGS --bogus > /dev/full 2> /dev/full": (EXIT_CONFIG, ""),
}


@pytest.mark.parametrize(
    ("script", "way"),
    [
        *(("launch/train.py --config configs/train/sft.yaml --print-config", way) for way in WAYS),
        *(("tools/describe.py checkpoints/demo --all", way) for way in list(WAYS)[:3]),
    ],
)
def test_odd_standard_streams(script, way):
    code, said = shell(way, *script.split())
    assert code == WAYS[way][0] and said.startswith(WAYS[way][1]) and (WAYS[way][1] or not said)


def test_a_tool_that_writes_a_folder_has_done_its_work_all_the_same(tmp_path):
    arguments = ["--model", "checkpoints/demo", "--layout", "tp=2", "--out", str(tmp_path / "out")]
    code, said = shell("PYTHON ARGS > /dev/full", "tools/convert.py", *arguments)
    assert code == EXIT_DONE and said.startswith("warning: standard output: No space left on device.")
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}])
def test_characters_that_the_terminal_lacks_are_escaped(environment):
    code = GUARDED + "print('\\u2013 caf\\xe9 \\ud800'); print('\\u20ac', file=sys.stderr)"
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, timeout=PATIENCE)
    e = b"\xe9" if "latin" in environment["PYTHONIOENCODING"] else rb"\xe9"
    assert (done.returncode, done.stdout, done.stderr) == (0, rb"\u2013 caf" + e + rb" \ud800" + b"\n", b"\\u20ac\n")


def test_a_terminal_that_does_not_block_gets_everything():
    """As programs leave it that share it; Python's own streams raise BlockingIOError."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = GUARDED + "print('x' * 1_000_000); terminal.require_stdout()"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=write)
    os.close(write)
    with open(read, "rb") as pipe:
        assert len(pipe.read()) == 1_000_001
    assert writer.wait(PATIENCE) == 0


def test_a_line_is_not_held_back_where_python_buffers_nothing():
    """`python -u`, as the door starts ranks."""
    code = "import os; " + GUARDED + "print('said'); print('told', file=sys.stderr); os._exit(0)"
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == (b"said\n", b"told\n")


def test_a_file_is_not_taken_for_a_closed_stream(tmp_path):
    """The lowest descriptor that is free is given to the next file: what is printed must not land in it."""
    code = (
        GUARDED + "file = open('out', 'w'); print('lost'); sys.stdout.flush(); import os; os.system('echo also lost')"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&- 2>&-'], cwd=tmp_path, timeout=PATIENCE, check=True)
    assert (tmp_path / "out").read_text() == ""


# ---- results on the terminal


def written(names: str) -> Writer:
    """A writer to the terminal that was given the results of these of the prompts a to e, in this order."""
    batch = SimpleNamespace(order=tuple("abcde"), requests=[None] * 5)
    writer = Writer(InferConfig(), SimpleNamespace(layout=SimpleNamespace(dp=2)), "", batch)
    for name in names:
        writer.write(RequestOutput(request_id=name, prompt=f"prompt {name}", prompt_token_ids=[1]))
    return writer


@pytest.mark.parametrize(
    ("finished", "at_once", "in_the_end"),
    [("abcde", "abcde", ""), ("ecadb", "abcde", ""), ("bad", "ab", "d"), ("e", "", "e")],
)
def test_results_are_printed_in_the_order_of_the_prompts(finished, at_once, in_the_end, capsys):
    def shown() -> str:
        return "".join(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("==="))

    with written(finished):
        assert shown() == at_once
    assert shown() == in_the_end, "also those of a run that was stopped"
