"""lm-evaluation-harness through the server, beside its own hf backend: `python tests/evaluate_served.py`.

Its `local-completions` client, unchanged, asks the demo model behind `launch/serve.py`; three small tasks made of the
standard library's text, one of each kind. All numbers must agree to 1e-4. Needs `lm_eval[api]`, accelerate and peft.
"""

from __future__ import annotations

import ast
import calendar
import inspect
import os
import shlex
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from eval_tasks import evaluate, write_tasks
from serve_demo import DEMO, demo

CLOSE = 1e-4
TASKS: dict[str, dict[str, Any]] = {
    "served_text": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{head}}",
        "doc_to_target": "{{tail}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "served_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{head}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "served_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{head}}",
        "doc_to_target": "{{tail}}",
        "generation_kwargs": {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def make_tasks(place: Path) -> None:
    """Heads of functions and the line that follows each, with those of other ones to choose from."""
    functions = [text.splitlines(keepends=True) for text in _functions() if text.count("\n") > 4][:16]
    halves = [("".join(lines[:4]), lines[4]) for lines in functions]
    lines = []
    for place_, (head, tail) in enumerate(halves):
        choices = [halves[(place_ + other) % len(halves)][1] for other in (1, 2)]
        choices.insert(place_ % 3, tail)
        lines.append({"head": head, "tail": tail, "choices": choices, "label": place_ % 3})
    write_tasks(place, TASKS, lines)


def _functions() -> list[str]:
    """Of some modules of the standard library."""
    found = []
    for module in (textwrap, shlex, calendar):
        text = inspect.getsource(module)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                found.append(ast.get_source_segment(text, node) or "")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache")}
        (place / "tasks").mkdir()
        make_tasks(place / "tasks")
        asked = partial(evaluate, tasks=TASKS, place=place / "tasks", batch_size=4)
        with demo(place, "parallel.dp=2") as server:
            where = f"base_url={server.url}/v1/completions,model=demo,tokenizer={DEMO},tokenizer_backend=huggingface"
            ours = asked("local-completions", f"{where},num_concurrent=4,max_length=1024")
            code = server.end()
        theirs = asked("hf", f"pretrained={DEMO},dtype=float32")
    wrong = 0
    for task in TASKS:
        for metric, wanted in theirs["results"][task].items():
            if not isinstance(wanted, float):
                continue
            found = ours["results"][task][metric]
            agrees = abs(found - wanted) <= CLOSE * max(1.0, abs(wanted))
            wrong += not agrees
            print(f"{task} {metric}: {found:.6f} through the server, {wanted:.6f} by hf{'' if agrees else '  DIFFERS'}")
        most = 0.0
        for mine, his in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for [got], [answer] in zip(mine["resps"], his["resps"], strict=True):
                if isinstance(answer, str):
                    wrong += got != answer
                else:
                    most = max(most, abs(got[0] - answer[0]) / max(1.0, abs(answer[0])))
                    wrong += got[1] != answer[1]
        wrong += most > CLOSE
        print(f"{task}: largest difference of a log-likelihood {most:.1e}")
    print(f"the server ended with {code}; {wrong} differences")
    return 1 if wrong or code else 0


if __name__ == "__main__":
    sys.exit(main())
