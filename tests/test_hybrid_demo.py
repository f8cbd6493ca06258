"""The arithmetic demo in short: a model that knows almost no sums learns half of them and more from rewards alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_model_learns_to_add(tmp_path):
    shorter = ["hybrid.steps=18", "hybrid.samples_per_prompt=32", "hybrid.save_every=100"]
    shorter += ["optimizer.warmup_steps=26", "optimizer.learning_rate=1.75e-3"]  # as steep a rise as in the demo
    one_rank = ["train.parallel.dp=1", "infer.parallel.tp=1"]
    command = [sys.executable, "launch/hybrid.py", "--config", "configs/hybrid/grpo_arithmetic.yaml"]
    subprocess.run(
        [*command, *shorter, *one_rank, f"output.folder={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,  # minutes of work on a busy machine
    )
    log = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in log if "iteration" in line]
    assert len(rewards) == 18 and rewards[0] < 0.1 and min(rewards[-3:]) > 0.3
