"""A user's own script under a launcher, for tests: `llm_rank.py FOLDER MODEL SIZES`, SIZES as JSON for LLM(...).

Every rank writes what it got to FOLDER/rank-N.json, then generates until it is stopped and writes that down too.
"""

import json
import os
import sys
from pathlib import Path

from megalite import LLM, SamplingParams
from megalite.errors import ConfigError, Stopped
from megalite.inference.logprobs import FlatLogprobs
from megalite.inference.outputs import RequestOutput

PROMPTS = ["def f(x):", [40, 41, 42], "a longer prompt, so that the replicas differ", "x"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(max_tokens=20, n=2, logprobs=1),
    SamplingParams(max_tokens=9, prompt_logprobs=0, seed=3),
    SamplingParams(max_tokens=30, ignore_eos=True, stop=["e", "a"]),
]
FLAT = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1, flat_logprobs=True)
CHAT = [{"role": "user", "content": "hi"}]


def flat_values(output: RequestOutput) -> list:
    """Ids, ranks and texts of flat log-probabilities, which are equal whatever the layout is."""
    [one] = output.outputs
    assert isinstance(one.logprobs, FlatLogprobs) and isinstance(output.prompt_logprobs, FlatLogprobs)
    return [[lp.token_ids, lp.ranks, lp.decoded_tokens] for lp in (one.logprobs, output.prompt_logprobs)]


def answers(llm: LLM) -> dict:
    """Everything that the tests compare, as JSON values."""
    results = {
        "generate": [output.to_line() for output in llm.generate(PROMPTS, PARAMS)],
        "chat": [output.to_line() for output in llm.chat(CHAT, PARAMS[1])],
        "again": [output.to_line() for output in llm.generate(PROMPTS[::-1], PARAMS[::-1])],
        "flat": [flat_values(output) for output in llm.generate(PROMPTS, FLAT)],
        "score": llm.score(["some text", [5, 6, 7]]),
    }
    gained: dict[str, str] = {}
    for delta in llm.generate(PROMPTS, PARAMS, stream=True):
        gained[f"{delta.request_id}/{delta.index}"] = gained.get(f"{delta.request_id}/{delta.index}", "") + delta.text
    results["stream"] = sorted(gained.items())
    try:
        llm.generate(["fine", ""])
    except ConfigError as error:
        results["refused"] = str(error)
    return results


def main(folder: Path, model: str, sizes: dict) -> None:
    rank = int(os.environ["RANK"])
    wrong = ""
    try:
        LLM(model, **{**sizes, "tensor_parallel_size": 5})
    except ConfigError as error:
        wrong = str(error)
    with LLM(model, dtype="float32", check_lockstep=True, **sizes) as llm:
        (folder / f"rank-{rank}.json").write_text(json.dumps({**answers(llm), "wrong": wrong}))
        (folder / f"ready-{rank}").write_text(str(os.getpid()))
        endless = SamplingParams(max_tokens=100, ignore_eos=True)
        try:
            while (folder / "go on").exists():
                llm.generate([[5, 6, 7]] * 8, endless)
        except Stopped as error:
            (folder / f"stopped-{rank}").write_text(str(error.exit_code))
            raise  # all ranks leave the block by it together; an exit here would end the others at once


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    except Stopped as error:
        sys.exit(error.exit_code)
