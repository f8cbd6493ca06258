"""The demo as its readers run it: the shipped model, several processes, and the same text as from one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

LAYOUTS = {
    "one rank": (),
    "tp=2,pp=2": ("parallel.tp=2", "parallel.pp=2"),
    "dp=2 async": ("parallel.dp=2", "parallel.dp_mode=async"),
}
PROMPTS = [
    {"prompt": "def read_json(path):", "sampling": {"temperature": 0}},
    {"prompt": "class Queue:\n    def __init__(self, maxsize=0):", "sampling": {"temperature": 0.7, "seed": 1}},
    {"prompt": "import os\nimport sys\n\ndef main(argv=None):", "sampling": {"temperature": 0}},
    {"prompt": "for name in", "sampling": {"temperature": 0.7, "seed": 2, "max_tokens": 12}},
]


@pytest.fixture(scope="module")
def demos(forks, tmp_path_factory):
    """By layout: the exit code, what was said, and the output by id. All run at once."""
    folder = tmp_path_factory.mktemp("demo")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    common = ["--config", "configs/infer/demo.yaml", "model.dtype=float32", "sampling.max_tokens=24"]

    def run(name: str):
        output = folder / f"{name}.jsonl"
        files = ["input.prompts=null", f"input.file={prompts}", f"output.file={output}"]
        done = forks.run("launch/infer.py", *common, *files, *LAYOUTS[name])
        return done.code, done.err, output.read_text()

    with ThreadPoolExecutor() as pool:
        return dict(zip(LAYOUTS, pool.map(run, LAYOUTS), strict=True))


def texts(output: str) -> list[tuple[str, str, list[int]]]:
    results = [json.loads(line) for line in output.splitlines()]
    return [(result["id"], result["outputs"][0]["text"], result["outputs"][0]["token_ids"]) for result in results]


def test_one_rank_writes_python(demos):
    code, said, output = demos["one rank"]
    assert code == 0, said
    written = texts(output)
    assert [name for name, _, _ in written] == ["0", "1", "2", "3"]
    assert "\n    " in written[0][1], "a function has an indented body"
    assert "max_model_len 1024 (the model's own)" in said and "total: 4 prompts, " in said


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_several_ranks_write_the_same(layout, demos):
    code, said, output = demos[layout]
    assert code == 0, said
    assert texts(output) == texts(demos["one rank"][2])
