"""Programs in the spirit of vLLM's offline examples, of which only the import and the model's name are ours."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from reference import greedy
from tiny_tokenizer import with_tokenizer

PROGRAMS = Path(__file__).parent / "vllm_examples"
EOS = 2


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3"), tmp_path_factory.mktemp("examples") / "model")


@pytest.fixture(scope="module")
def theirs(folder):
    """The model's tokenizer in transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def run(monkeypatch):
    """`run(name, *arguments)`: what the program's names stand for at its end."""
    ran = []

    def program(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        ran.append(runpy.run_path(str(PROGRAMS / name), run_name="__main__"))
        return ran[-1]

    yield program
    for names in ran:
        names["llm"].close()


def completion(folder: Path, ids: list[int], max_tokens: int) -> list[int]:
    """What transformers writes greedily, its end token included."""
    tokens = greedy(folder, ids, max_tokens).tokens
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.fixture
def check(folder, theirs):
    def check(outputs: list, max_tokens: int, prompts: list[str], *, chat: bool = False) -> None:
        for output, prompt in zip(outputs, prompts, strict=True):
            assert output.prompt_token_ids == theirs.encode(prompt, add_special_tokens=not chat)
            wanted = completion(folder, output.prompt_token_ids, max_tokens)
            [one] = output.outputs
            assert (one.token_ids, one.text) == (wanted, theirs.decode(wanted, skip_special_tokens=True))

    return check


def test_basic(run, folder, check, capsys):
    done = run("basic.py", folder)
    check(done["outputs"], 12, done["prompts"])
    assert capsys.readouterr().out.count("Prompt: ") == 3


def test_prefix_caching(run, folder, check, capsys):
    done = run("prefix_caching.py", folder)
    check(done["regular"], 8, done["prompts"])
    check(done["outputs"], 8, done["prompts"])
    assert "Generated texts are the same: True" in capsys.readouterr().out
    assert all(output.num_cached_tokens >= 48 for output in done["outputs"])
    assert all(output.num_cached_tokens == 0 for output in done["regular"])


def test_chat(run, folder, check, theirs):
    done = run("chat.py", folder)
    text = theirs.apply_chat_template(done["conversation"], tokenize=False, add_generation_prompt=True)
    check(done["outputs"] + done["several"], 8, [text] * 4, chat=True)
    check(done["same"], 8, [text], chat=True)
    own = "".join(f"[{one['role']}] {one['content']}\n" for one in done["conversation"])
    check(done["templated"], 8, [own], chat=True)


def test_generate(run, folder, check):
    done = run("generate.py", "--model", folder, "--dtype", "float", "--max-tokens", "10", "--temperature", "0")
    check(done["outputs"], 10, ["Hello, my name is", "The future of AI is"])
    check(done["alone"], 10, ["Hello, my name is"])


def test_torchrun(forks, folder, theirs):
    """On two hosts; one under torchrun itself is in test_llm.py."""
    first, second = (rank.ended() for rank in forks.hosts(2, PROGRAMS / "torchrun.py", folder))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    prompts = ["Hello, my name is", "The capital of France is", "a"] * 2
    wanted = [completion(folder, theirs.encode(prompt), 6) for prompt in prompts]
    [line] = [line for line in first.out.splitlines() if line.startswith("[[")]
    assert json.loads(line) == wanted
