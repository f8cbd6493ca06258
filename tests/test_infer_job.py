"""The inference job as a user runs it: processes, input and output files, kills, stops and resumed runs.

The runs of `runs` go on at the same time; the tests look at what they left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks, Program
from launcher_only import launcher_only
from tiny_tokenizer import with_tokenizer
from waiting import PATIENCE, wait_until

from megalite.run.processes import Process, descendants, is_stopped

ROOT = Path(__file__).parent.parent
INFER = str(ROOT / "launch" / "infer.py")
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", INFER]
CONFIG = """
model: {{path: {model}, dtype: float32}}
engine: {{max_num_seqs: 16, max_model_len: 100, block_size: 8, check_lockstep: true}}
sampling: {{temperature: 0.9, max_tokens: 24, ignore_eos: true, seed: 4}}
"""
GOOD = [
    *({"prompt": "x" * (1 + place % 7), "id": f"text {place}"} for place in range(28)),
    *({"prompt": [5 + place, 6, 7], "sampling": {"max_tokens": 5 + 4 * place}} for place in range(8)),
    {"messages": [{"role": "user", "content": "hi"}], "id": 100, "sampling": {"seed": 1, "n": 3}},
    {"prompt": "é", "sampling": {"logprobs": 2, "prompt_logprobs": 1, "temperature": 0, "max_tokens": 3}},
    {"prompt": "stop", "sampling": {"stop": ["a", "b", "c", "d"], "best_of": 3, "temperature": 1}},
]
BAD = {
    3: ('{"prompt": "x", "promt": "y"}', "unknown key 'promt'; perhaps 'prompt' is meant"),
    4: ("{'prompt': 'x'}", "is not valid JSON at column 2"),
    20: (json.dumps({"prompt": "x" * 200}), "the prompt has 200 tokens, and with the output it must fit in 100"),
    21: ('{"prompt": ""}', "an empty prompt"),
    22: ('{"prompt": "x", "sampling": {"n": 3, "best_of": 2}}', "sampling.best_of: must be at least n = 3"),
    23: ('{"prompt": "x", "id": "text 0"}', "the id 'text 0' is used by"),
    **{number: ("{}", "needs either a prompt or messages") for number in range(24, 30)},
}
"""By line number, from 1: the line and what is said of it."""


def input_lines() -> list[str]:
    lines = [json.dumps(value) for value in GOOD]
    for number, (line, _) in BAD.items():
        lines.insert(number - 1, line)
    return lines


@dataclass
class Run:
    """One process that has ended."""

    code: int
    out: str
    err: str
    results: list[dict]
    """The lines of the output file, which must be whole."""


class Jobs:
    """Runs commands in a folder with a model, a config and an input file."""

    def __init__(self, folder: Path, model: Path, forks: Forks):
        self.folder, self.forks = folder, forks
        self.input = folder / "prompts.jsonl"
        self.input.write_text("\n".join(input_lines()) + "\n")
        self.config = folder / "job.yaml"
        self.config.write_text(CONFIG.format(model=json.dumps(str(model))))

    def start(self, name: str, *overrides: str, stdin: bool = False, fault: str = "") -> Program:
        """`name` names the output file too."""
        args = ["--config", self.config, f"output.file={self.folder / name}.jsonl"]
        args += ["input.file=-" if stdin else f"input.file={self.input}", *overrides]
        return self.forks.start(INFER, *args, stdin=self.input if stdin else os.devnull, MEGALITE_FAULT=fault)

    def ended(self, name: str, program: Program) -> Run:
        done = program.ended()
        text = (self.folder / f"{name}.jsonl").read_text()
        assert text == "" or text.endswith("\n")
        return Run(done.code, done.out, done.err, [json.loads(line) for line in text.splitlines()])

    def run(self, name: str, *overrides: str, **options) -> Run:
        return self.ended(name, self.start(name, *overrides, **options))

    def stop(self, name: str, signum: int, ranks: int, *overrides: str) -> Run:
        """Send a signal in the middle of the work, where the ranks stand still until they have it."""
        program = self.start(name, "engine.max_num_seqs=1", WAITS, *overrides, fault="decode.step#80=stop")

        def standing() -> list[Process]:
            assert program.runs, program.ended()
            there = [Process.of(program.pid), *descendants(program.pid)]
            return [one for one in there if one and is_stopped(one.pid)]

        wait_until(lambda: len(standing()) == ranks, "all ranks stand still")
        stopped = standing()
        program.signal(signum)
        wait_until(lambda: all(pending(one.pid, signum) for one in stopped), "it has come to all")
        for one in stopped:
            one.kill(signal.SIGCONT)
        return self.ended(name, program)


WAITS = f"distributed.peer_timeout={PATIENCE}"
"""A rank that is stopped does not count as lost meanwhile."""


def pending(pid: int, signum: int) -> bool:
    """A signal waits for the process to go on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> signum - 1 & 1 for mask in masks)


def restarted(jobs: Jobs) -> list[Run]:
    """One rank of two is killed, and the run starts again by itself, over what an earlier one has left."""
    (jobs.folder / "restarted.jsonl").write_text("not ours\n")
    again = ("--max-restarts", "2", "output.overwrite=true", "parallel.dp=2", "engine.max_num_seqs=3")
    return [jobs.run("restarted", *again, fault="decode.step@1#40=kill")]


def stopped(jobs: Jobs) -> list[Run]:
    """SIGTERM, SIGINT, a refusal of other sampling, and the rest."""
    runs = [jobs.stop("stopped", signal.SIGTERM, 2, "parallel.dp=2", "parallel.dp_mode=async")]
    runs.append(jobs.stop("stopped", signal.SIGINT, 1))
    runs.append(jobs.run("stopped", "sampling.temperature=0.8", "engine.seed=1"))
    return [*runs, jobs.run("stopped")]


def under_deepspeed(jobs: Jobs) -> Run:
    """With the launcher's own code, which the user's standard input has to come through."""
    out = jobs.folder / "deepspeed.jsonl"
    command = [*DEEPSPEED, "--config", str(jobs.config), f"output.file={out}", "input.file=-", "parallel.pp=2"]
    python = f"{launcher_only(jobs.folder / 'light')}:{ROOT}"
    env = {**os.environ, "PYTHONPATH": python, "DS_ACCELERATOR": "cpu"}
    options = {"capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, env=env, stdin=jobs.input.open("rb"), **options)
    return Run(done.returncode, done.stdout, done.stderr, [json.loads(line) for line in out.read_text().splitlines()])


OWNERS = {"temperature": 0.0, "top_k": 7, "top_p": 0.5}


def owners_sampling(jobs: Jobs) -> list[Run]:
    """Sampling left to the model's owner on two ranks; the same by the config; and neither."""
    (folder := jobs.folder / "owners").mkdir()
    model = Path(shutil.copytree(jobs.folder / "model", folder / "model"))
    (model / "generation_config.json").write_text(json.dumps(OWNERS))
    own = Jobs(folder, model, jobs.forks)
    own.config.write_text(f"model: {{path: {model}, dtype: float32}}\nsampling: {{top_p: 0.9, ignore_eos: true}}\n")
    line = {"prompt": [5, 6, 7]}
    lines = [line, line, {**line, "sampling": {"temperature": 50, "top_k": 0, "top_p": 1}}]
    own.input.write_text("".join(json.dumps(one) + "\n" for one in lines))
    none = "model.generation_config=none"
    return [
        own.run("owners", "parallel.pp=2"),
        own.run("owners", none, "sampling.temperature=0", "sampling.top_k=7"),
        own.run("owners", none),
    ]


CHAINS: dict[str, Callable[[Jobs], list[Run]]] = {
    "undisturbed": lambda jobs: [jobs.run("undisturbed")],
    "restarted": restarted,
    "stopped": stopped,
    "the owner's sampling": owners_sampling,
    "stdin through the door": lambda jobs: [jobs.run("stdin", "parallel.tp=2", stdin=True)],
    "stdin under deepspeed": lambda jobs: [under_deepspeed(jobs)],
}


@pytest.fixture(scope="module")
def jobs(tiny, forks, tmp_path_factory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    return Jobs(folder, with_tokenizer(tiny("llama3"), folder / "model"), forks)


@pytest.fixture(scope="module")
def runs(jobs) -> dict[str, Future[list[Run]]]:
    with ThreadPoolExecutor(max_workers=3) as pool:
        yield {name: pool.submit(chain, jobs) for name, chain in CHAINS.items()}


@pytest.fixture(scope="module")
def undisturbed(runs) -> Run:
    [run] = runs["undisturbed"].result()
    return run


def ids() -> list[str]:
    """Of all prompts, in input order."""
    given = [json.loads(line).get("id") if number not in BAD else None for number, line in enumerate(input_lines(), 1)]
    names = [str(place) if name is None else str(name) for place, name in enumerate(given)]
    names[22] = "prompts.jsonl:23"  # its own is taken
    return names


def assert_same(results: list[dict], wanted: list[dict]) -> None:
    """Equal in every byte, but for the replica and the last digits of log-probabilities."""
    for got, want in zip(results, wanted, strict=True):
        assert _comparable(got, lambda value: value) == _comparable(want, lambda value: pytest.approx(value, abs=1e-3))


def _comparable(value, number: Callable[[float], object]):
    if isinstance(value, dict):
        return {key: _comparable(inner, number) for key, inner in value.items() if key != "replica"}
    if isinstance(value, list):
        return [_comparable(inner, number) for inner in value]
    return number(value) if isinstance(value, float) else value


def test_a_job_from_file_to_file(undisturbed):
    assert (undisturbed.code, undisturbed.out) == (5, "")
    assert [result["id"] for result in undisturbed.results] == ids(), "each once, in input order"
    for number, result in enumerate(undisturbed.results, 1):
        assert ("error" in result) == (number in BAD) != bool(result["outputs"])
    results = {result["id"]: result for result in undisturbed.results}
    assert len(results["100"]["outputs"]) == 3 and results["100"]["prompt"] == "<s>user: hi\nassistant: "
    assert len(results["text 27"]["outputs"][0]["token_ids"]) == 24


def test_bad_lines_are_named(undisturbed):
    errors = [line for line in undisturbed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 11 and errors.pop() == f"error: and {len(BAD) - 10} more; each one's result says why"
    results = [undisturbed.results[number - 1]["error"] for number in BAD]
    assert errors == [f"error: {one}" for one in results[:10]]
    for (number, (_, says)), error in zip(BAD.items(), results, strict=True):
        assert error.startswith(f"prompts.jsonl:{number}: ") and says in error
    assert f"total: {len(ids())} prompts ({len(BAD)} failed), " in undisturbed.err
    assert "\r" not in undisturbed.err, "no progress bar in a file"


@pytest.mark.parametrize("chain", ["restarted", "stopped", "stdin through the door", "stdin under deepspeed"])
def test_the_end_is_the_same(chain, runs, undisturbed):
    last = runs[chain].result()[-1]
    assert (last.code, last.out if "deepspeed" not in chain else "") == (5, "")
    for result in last.results if "stdin" in chain else ():  # what is read is called by another name
        for key in {"id", "error"} & result.keys():
            result[key] = result[key].replace("stdin:", "prompts.jsonl:")
    assert_same(last.results, undisturbed.results)


def test_a_lost_run_starts_again_by_itself(runs):
    [run] = runs["restarted"].result()
    lines = [line for line in run.err.splitlines() if "was lost" in line or "; restart " in line]
    assert len(lines) == 2 and "rank 1 (pid" in lines[0]
    assert lines[1] == "the run ended with code 70; restart 1 of 2 in 1 s, from what is on disk."


def test_stops_drain_and_leave_the_output_whole(runs):
    first, second, refused, _ = runs["stopped"].result()
    assert first.code == 143 and first.err.splitlines()[-1] == "stopped by SIGTERM; finished work is kept"
    assert second.code == 130 and second.err.splitlines()[-1] == "stopped by SIGINT; finished work is kept"
    assert {0, None} <= {result["replica"] for result in first.results} <= {0, 1, None}
    assert len(BAD) < len(first.results) < len(second.results) < len(ids())
    assert second.results[: len(first.results)] == first.results
    assert refused.code == 2 and refused.results == second.results
    [line] = refused.err.splitlines()
    assert line.startswith("error: output.file: holds results of another run (engine.seed was 0, is 1; ")
    assert "sampling.temperature was 0.9, is 0.8)" in line and "output.overwrite=true" in line


def test_the_owners_sampling_counts_where_the_config_is_silent(runs):
    first, same, refused = runs["the owner's sampling"].result()
    assert first.code == 0
    assert "sampling: temperature 0, top_k 7, as the model's generation_config.json says" in " ".join(first.err.split())
    greedy, again, hot = [result["outputs"][0]["token_ids"] for result in first.results]
    assert greedy == again != hot and len(greedy) == 16
    assert (
        "hint: 3 prompts had output that ended at sampling.max_tokens = 16, the default; set it to allow more."
        in " ".join(first.err.split())
    )
    assert same.code == 0 and same.results == first.results
    assert "3 of 3 prompts are done already; nothing is left to do" in " ".join(same.err.split())
    assert "total:" in first.err and "total:" not in same.err and "tokens/s" not in same.err
    assert "as the model's" not in same.err and refused.code == 2
    assert "sampling.temperature was 0.0, is 1.0" in refused.err and "sampling.top_k was 7, is 0" in refused.err


def test_the_report_and_the_dry_run_agree(jobs, runs):
    [run] = runs["stdin through the door"].result()
    lines = run.err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[:1] == ["rank"])
    columns = "rank tp/pp/dp layers weights KV cache prefill decode busy comm wait host"
    assert lines[at].split() == columns.split() and max(map(len, lines[at:])) <= 80
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[at + 1 : at + 3]]
    assert [row[:3] for row in rows] == [["0", "0/0/0", "0-3"], ["1", "1/0/0", "0-3"]]
    assert lines[at + 3].startswith(f"total: {len(ids())} prompts ({len(BAD)} failed), ")
    dry = jobs.forks.run(INFER, "--config", jobs.config, "--dry-run", "parallel.tp=2", "input.prompts=[x]")
    assert dry.code == 0
    table = [line.split("  ") for line in dry.out.splitlines()[2:5]]
    names, *ranks = [[cell.strip() for cell in row if cell.strip()] for row in table]
    assert [row[names.index("weights")] for row in ranks] == [row[3] for row in rows]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "output.file: is needed with --max-restarts, which goes on from it"),
        (("output.file=x", "input.file=-"), "input.file: can't be standard input with --max-restarts"),
        (("--max-restarts=x",), "--max-restarts: is given twice"),
    ],
)
def test_what_can_not_start_again(more, says, jobs):
    run = jobs.forks.run(INFER, "--config", jobs.config, "--max-restarts", 2, "input.prompts=[x]", *more)
    assert run.code == 2 and says in run.err
