"""Chains of runs that meet a fault each and go on from what the run before has left; test_faults.py says which.

The last run of a chain meets none, and what it leaves must be what an undisturbed run leaves: so the restart after one
fault is the start of the next, and a chain of seven faults takes eight runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forks import ROOT, TRAINING, Ended, Forks

from megalite.convert.verify import verify
from megalite.train.checkpoint import newest_state

STEP_TIMEOUT, PATIENT = 4.0, 120.0
"""Seconds that a rank which hangs keeps the others waiting: at first, and on a machine so busy that another was taken
for it."""
RANKS = 2


@dataclass(frozen=True)
class Case:
    """What strikes a run, where."""

    place: str
    fault: str
    rank: int

    def __str__(self) -> str:
        return f"{self.place}-{self.fault}-{self.rank}"


@dataclass(frozen=True)
class Struck:
    """A run that met its fault, or none."""

    case: Case | None
    ended: Ended
    left: dict[str, str]
    """What is on the disk, by name: finished prompts, or the newest checkpoint."""


class Infer:
    """The lines of its output file are what it leaves."""

    points = {"load": "weights.read#2", "prefill": "prefill.step#2", "decode": "decode.step#4"}
    config = """
model: {{path: {model}, dtype: float32}}
engine: {{max_num_seqs: 2, max_model_len: 64, block_size: 8}}
sampling: {{temperature: 0.9, ignore_eos: true, seed: 4}}
parallel: {{pp: 2}}
distributed: {{peer_timeout: 1.0}}
monitor: {{report: false}}
"""

    def __init__(self, forks: Forks, folder: Path, model: Path):
        self.forks, self.folder = forks, folder
        folder.mkdir()
        (folder / "job.yaml").write_text(self.config.format(model=json.dumps(str(model))))
        lines = [{"prompt": [5 + n, 6, 7], "sampling": {"max_tokens": 1 + 3 * n % 7}} for n in range(18)]
        (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def run(self, name: str, fault: str, *overrides: str) -> Ended:
        files = f"input.file={self.folder / 'in.jsonl'}", f"output.file={self.folder / name}"
        command = (ROOT / "launch" / "infer.py", "--config", self.folder / "job.yaml")
        return self.forks.run(*command, *files, *overrides, MEGALITE_FAULT=fault)

    def left(self, name: str) -> dict[str, str]:
        """Lines by id; each must be whole, and there once."""
        file = self.folder / name
        text = file.read_text() if file.exists() else ""
        assert text == "" or text.endswith("\n")
        found = {json.loads(line)["id"]: line for line in text.splitlines()}
        assert len(found) == text.count("\n")
        return found

    def result(self, name: str) -> str:
        """All of the file."""
        return (self.folder / name).read_text()


class Hybrid:
    """A tiny GRPO job on two training stages, which generate with tp=2. Its newest checkpoint is what it leaves."""

    points = {"sync": "sync.bucket#2", "save": "state.save#4"}
    config = """
model:
  config: {model_type: qwen3, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
           head_dim: 8, intermediate_size: 32, max_position_embeddings: 32, rope_theta: 10000.0}
  dtype: float32
tokenizer: {vocab_size: 257}
data: {source: tasks.jsonl}
sampling: {max_tokens: 2}
optimizer: {learning_rate: 1.0e-2, min_learning_rate: 1.0e-3, warmup_steps: 1}
supervised: {steps: 1, examples_per_step: 4}
hybrid: {steps: 10, prompts_per_step: 2, samples_per_prompt: 2, reward: "megalite.rewards:length_close", save_every: 1}
train: {parallel: {pp: 2}}
infer: {parallel: {tp: 2}}
distributed: {peer_timeout: 1.0}
output: {tensorboard: false}
monitor: {report: false}
"""

    def __init__(self, forks: Forks, folder: Path):
        self.forks, self.folder = forks, folder
        folder.mkdir()
        (folder / "job.yaml").write_text(self.config)
        lines = [{"prompt": f"{n}+1=", "response": str(n + 1), "length": n % 3} for n in range(20)]
        (folder / "tasks.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def run(self, name: str, fault: str, *overrides: str) -> Ended:
        command = (ROOT / "launch" / "hybrid.py", "--config", self.folder / "job.yaml")
        options = {"cwd": self.folder, "preload": TRAINING, "OMP_NUM_THREADS": "1"}
        return self.forks.run(
            *command, f"output.folder={self.folder / name}", *overrides, MEGALITE_FAULT=fault, **options
        )

    def left(self, name: str) -> dict[str, str]:
        """The steps that the newest checkpoint, every byte of which must be right, is the sum of."""
        found = newest_state(self.folder / name / "training" / "state")
        if found is None:
            return {}
        assert verify(found[0]).findings == []
        return {str(step): "" for step in range(found[1].training["step"])}

    def result(self, name: str) -> tuple[bytes, list[str], list[object]]:
        """The exported weights, all samples, and the iterations that the log tells of."""
        out = self.folder / name
        samples = [path.read_text() for path in sorted((out / "training" / "rollouts").iterdir())]
        log = [json.loads(line).get("iteration") for line in (out / "training" / "log.jsonl").open()]
        return (out / "model.safetensors").read_bytes(), samples, log


def chain(job: Infer | Hybrid, cases: Sequence[Case]) -> list[Struck]:
    """A run for each case, and one without a fault."""
    name = str(cases[0]) if cases else "undisturbed"
    found = [strike(job, name, case) for case in cases]
    return [*found, strike(job, name, None)]


def strike(job: Infer | Hybrid, name: str, case: Case | None) -> Struck:
    point, _, nth = job.points[case.place].partition("#") if case else ("", "", "")
    fault = f"{point}@{case.rank}#{nth}={case.fault}" if case else ""
    if case is None or case.fault != "hang":
        ended = job.run(name, fault)
    else:
        ended = job.run(name, fault, f"distributed.step_timeout={STEP_TIMEOUT}")
        if not re.search(says(case), ended.err):
            ended = job.run(name, fault, f"distributed.step_timeout={PATIENT}")
    return Struck(case, ended, job.left(name))


PLACES = {
    "load": "(loading weights|the start)",
    "prefill": r"(layer \d+ of )?step \d+",
    "decode": r"(layer \d+ of )?step \d+",
    "sync": r"weight sync \d+",
    "save": r"the checkpoint of step \d+",
}
CODES = {"raise": 1, "kill": 70, "stop": 70, "exit": 70, "hang": 70, "memory": 4, "disk": 4}
"""The faults, and the exit code of a run that meets one. The last strikes ranks that write files only."""


def says(case: Case) -> str:
    """What the user must be told: which rank, where it was, and why; a regular expression."""
    place, other = PLACES[case.place], RANKS - 1 - case.rank
    full = r"File too large\. Free some space, or write to another disk\.$"
    own = rf"^\[rank {case.rank} on \S+, {place}\] "
    lost = rf"^error: rank {case.rank} \(pid \d+( on \S+)?\) was lost: "
    # The other rank may not have come so far yet, or gone on.
    when = rf"\), when rank {other} (was in [\w ]+|had finished)\. The other ranks were stopped\.$"
    return (
        "(?m)"
        + {
            "raise": rf"{own}RuntimeError: injected fault at \S+ on rank {case.rank}$",
            "memory": rf"{own}error: out of memory\. Use more ranks or a smaller batch; ",
            "disk": rf"^\[rank {case.rank} on [^\]]+\] error: \S+: {full}",
            "kill": rf"{lost}ended without a word \(killed, out of memory or crashed{when}",
            "exit": rf"{lost}ended without a word \(killed, out of memory or crashed{when}",
            # The door sees it too, and is first where the other rank's watch does not get its turn.
            "stop": rf"{lost}(no sign of life for 1 s \(stopped or cut off{when}|stopped for 2 s\.$)",
            "hang": rf"^error: rank {case.rank} .*has not (entered|sent|received) .*; it is in {place}, for \d+ s\.",
        }[case.fault]
    )
