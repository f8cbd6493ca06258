"""lm-evaluation-harness: the same results as by its own hf backend, on small tasks made here."""

from __future__ import annotations

import random
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
from eval_tasks import evaluate, write_tasks
from tiny_tokenizer import with_tokenizer

from megalite import cli
from megalite.errors import CheckpointError

HARNESS = ("lm_eval", "accelerate", "peft")
if not all(map(find_spec, HARNESS)):  # found, not imported: that takes seconds
    pytest.skip(f"the harness and its hf backend need {', '.join(HARNESS)}", allow_module_level=True)

TASKS = {
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "Q"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3"), tmp_path_factory.mktemp("evals") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks; some texts are longer than the model's 128 positions, some shorter."""
    place = tmp_path_factory.mktemp("tasks")
    words = random.Random(3)
    text = ["".join(words.choice("abc de fgh.XY\n") for _ in range(length)) for length in (20, 127, 128, 129, 400)]
    lines = [
        {"text": one, "question": f"Q{n}: {one[:30]}", "choices": [" yes", " no it is", "x"], "label": n % 3}
        for n, one in enumerate(text)
    ]
    write_tasks(place, TASKS, lines)
    return place


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_agrees_with_the_hf_backend(folder, tasks):
    import megalite.evals  # noqa: F401

    model = f"pretrained={folder},dtype=float32"
    ours, theirs = (evaluate(backend, model, TASKS, tasks) for backend in ("megalite", "hf"))
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours["results"][name][metric] == same, (name, metric)
        for mine, wanted in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for [got], [answer] in zip(mine["resps"], wanted["resps"], strict=True):
                if isinstance(answer, tuple):
                    assert got == (pytest.approx(answer[0], abs=1e-3), answer[1])
                else:
                    assert got == (answer if isinstance(answer, str) else pytest.approx(answer, abs=1e-2))


def module() -> int:
    with pytest.raises(SystemExit) as end:
        runpy.run_module("megalite.evals", run_name="__main__")
    return end.value.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", [cli.evaluate, module])
def test_the_command_knows_our_model_and_the_harness_own(command, monkeypatch):
    """The command itself takes a minute to list the harness's tasks."""
    import lm_eval.__main__
    from lm_eval.api.registry import get_model

    from megalite.evals import MegaliteLM

    known = []
    names = ("megalite", "hf", "dummy")
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: known.extend(map(get_model, names)))
    assert command() == 0
    assert known[0] is MegaliteLM and [model.__name__ for model in known[1:]] == ["HFLM", "DummyLM"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", [cli.evaluate, module])
def test_the_command_says_what_is_wrong_in_a_line(command, monkeypatch, capsys):
    import lm_eval.__main__

    def no_model() -> None:
        raise CheckpointError("no/such/model: no config.json")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", no_model)
    assert command() == 3
    assert capsys.readouterr().err == "error: no/such/model: no config.json\n"


def test_chats_and_settings(folder):
    from transformers import AutoTokenizer

    from megalite.evals import MegaliteLM

    settings = {"max_length": 50, "chat_template_args": {"name": "bot"}, "add_bos_token": True}
    lm = MegaliteLM(str(folder), **settings, device="cuda:0")
    theirs = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    assert (
        lm.tok_encode("some text") == theirs.encode("some text") != theirs.encode("some text", add_special_tokens=False)
    )
    for without in (lm.tok_encode("<s>hi"), lm.tok_encode("<s>hi", add_special_tokens=False)):
        assert without == theirs.encode("<s>hi", add_special_tokens=False)
    chat = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(chat) == "<s>user: hi\nbot: "
    begun = [*chat, {"role": "assistant", "content": "well"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<s>user: hi\nassistant: well"
    assert lm.chat_template(True) and lm.max_length == 50 and lm.prefix_token_id == 1
    lm.llm.close()
