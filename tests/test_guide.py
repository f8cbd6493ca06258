"""The commands of docs/guide.md and its Chinese twin run, and print what the pages show.

A page shows commands and what they printed in blocks of `console`. Numbers, units and digests differ between runs and
are not compared; the words of every line are, but for hints, which depend on how busy the machine is. "..." stands for
lines that are left out. `python tests/test_guide.py` runs the commands and brings the lines of both pages up to date.

Above a block may stand a comment: `<!-- needs: PACKAGE -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from forks import ROOT, Forks, Program
from waiting import PATIENCE, wait_until

PAGES = [ROOT / "docs" / name for name in ("guide.md", "guide.zh.md")]
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n\n?)?```console\n(?P<body>.*?)```\n", re.DOTALL)
NUMBER = re.compile(r"\b[0-9a-f]{10,}\b|\d[\d.,]*(e-?\d+)?\s?([KMGT]i?B/s|[KMGT]i?B|B/s|B\b|%|ms\b|us\b|s\b)?")
PRELOAD = ("megalite.serve.front", "megalite.serve.worker", "megalite.tools.plan", "torch.distributed.tensor")
NEEDED = {"accelerate": ("transformers.models.qwen3.modeling_qwen3", "megalite.tools.benchmarks.device_map")}
"""What else is imported before the commands of a block that needs a package."""
LESS = {
    "sampling.n=8": "sampling.n=3",
    "sampling.n=4 sampling.max_tokens=48": "sampling.n=2 sampling.max_tokens=12",
    "sampling.max_tokens=16": "sampling.max_tokens=6",
    "parallel.dp_mode=async sampling.max_tokens=24": "parallel.dp_mode=async sampling.max_tokens=6",
    "parallel.pp=2 sampling.max_tokens=32 'input": "parallel.pp=2 sampling.max_tokens=8 'input",
    "--tokens 1 256": "--tokens 1 256 --rounds 5",
    "--workload input=32,output=32": "--workload input=16,output=8",
    "--requests 50 --batch 1000": "--requests 20 --batch 100",
    "--requests 400 --batch 50": "--requests 100 --batch 20",
}
"""How much less work the tests do than the pages, where nothing but numbers depends on it."""


@dataclass(frozen=True)
class Command:
    """One command of a page and the lines that it is shown with."""

    words: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Commands that are run after one another; what one starts in the background ends with the block."""

    needs: str | None
    commands: tuple[Command, ...]


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        parts = re.split(r"^\$ ", match["body"], flags=re.MULTILINE)
        assert not parts[0], f"{page.name}: a block begins with output: {parts[0]}"
        commands = [part.splitlines() for part in parts[1:]]
        found.append(Block(match["needs"], tuple(Command(one[0], tuple(one[1:])) for one in commands)))
    return found


def pattern(line: str) -> str:
    """What two runs have alike."""
    return " ".join(NUMBER.sub("#", line).split())


def compared(command: Command) -> list[str]:
    """The shown lines that every run prints."""
    found, in_hint = [], False
    for line in command.shown:
        in_hint = line.startswith("hint:") or (in_hint and line.startswith("  "))
        if not in_hint and line.strip(" .") != "":
            found.append(line)
    return found


class Shell:
    """Runs the commands of one block in bash; Python's as forks."""

    def __init__(self, forks: Forks, place: Path, needs: str | None, less: Mapping[str, str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._forks, self._preload = forks, (*PRELOAD, *NEEDED.get(needs or "", ()))
        self._real, self._less = {"8000": port, "/tmp/": f"{place}/"}, less
        self._running: list[Program] = []

    def run(self, command: str) -> tuple[int, str]:
        """Exit code (0 of what goes on in the background) and what it printed."""
        for shown, real in (*self._real.items(), *self._less.items()):
            command = command.replace(shown, real)
        code, output = self._run(command)
        for shown, real in self._real.items():
            output = output.replace(real, shown)
        return code, output

    def _run(self, command: str) -> tuple[int, str]:
        words = shlex.split(command)
        if words[0] == "python":
            background = words[-1] == "&"
            start = [ROOT / words[1], *(words[2:-1] if background else words[2:])]
            program = self._forks.start(*start, preload=self._preload, XDG_CACHE_HOME=self._real["/tmp/"])
            if background:
                wait_until(lambda: "listening at" in program.err, "its address")
                self._running.append(program)
                return 0, program.err
            ended = program.ended()
            return ended.code, ended.out + ended.err
        if command == "kill %1":
            program = self._running.pop()
            program.signal(15)
            ended = program.ended()
            return ended.code, ended.out + ended.err
        environment = {**os.environ, "XDG_CACHE_HOME": self._real["/tmp/"]}
        options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": PATIENCE}
        done = subprocess.run(["bash", "-c", command], env=environment, **options)
        return done.returncode, done.stdout + done.stderr


def printed_by(block: Block, shell: Shell) -> list[str]:
    """What each command of the block printed. AssertionError: one failed, and `echo $?` does not follow."""
    outputs, code = [], 0
    for number, command in enumerate(block.commands):
        if command.words == "echo $?":
            outputs.append(f"{code}\n")
            continue
        code, output = shell.run(command.words)
        follows = block.commands[number + 1 : number + 2]
        assert code == 0 or [one.words for one in follows] == ["echo $?"], f"{command.words}\n{output}"
        outputs.append(output)
    return outputs


def test_both_pages_have_the_same_commands() -> None:
    english, chinese = (blocks(page) for page in PAGES)
    assert [block.commands for block in english] == [block.commands for block in chinese]
    assert [block.needs for block in english] == [block.needs for block in chinese]


@pytest.mark.parametrize("number", range(len(blocks(PAGES[0]))))
def test_a_block_runs_and_prints_what_is_shown(number: int, forks: Forks, tmp_path: Path) -> None:
    block = blocks(PAGES[0])[number]
    if block.needs and not find_spec(block.needs):
        pytest.skip(f"needs {block.needs}")
    for command, output in zip(
        block.commands, printed_by(block, Shell(forks, tmp_path, block.needs, LESS)), strict=True
    ):
        if command.words == "echo $?":
            assert command.shown == (output.strip(),)
        for line in compared(command):
            assert match(line, output.splitlines()), f"{command.words}\nprints no line like\n{line}\nbut\n{output}"


def match(shown: str, printed: list[str]) -> str | None:
    """The first line of `printed` that is `shown` but for its numbers, cut where that ends in "..."."""
    wanted = pattern(shown.removesuffix("..."))
    for line in printed:
        if pattern(line) == wanted or (shown.endswith("...") and pattern(line).startswith(wanted)):
            return line
    return None


def refresh(forks: Forks, place: Path) -> None:
    """Put what the commands print now in the place of what the pages show, line by line."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for block in blocks(PAGES[0]):
        for command, output in zip(
            block.commands, printed_by(block, Shell(forks, place, block.needs, {})), strict=True
        ):
            left, lines = output.splitlines(), []
            for line in command.shown:
                found = None if line == "..." else match(line, left)
                if found is None:
                    lines.append(line)
                    print("" if line == "..." or not line.strip() else f"not there now: {command.words}\n  {line}")
                else:
                    left.remove(found)
                    lines.append(line if line.endswith("...") else found)
            before, after = ("\n".join([f"$ {command.words}", *part]) + "\n" for part in (command.shown, lines))
            texts = {page: text.replace(before, after) for page, text in texts.items()}
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Forks(Path(folder)) as started:
        refresh(started, Path(folder))
