"""Whole training runs: resumed, killed, stopped, ended early, refused, and what they leave behind."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import TRAINING
from tiny_tokenizer import with_tokenizer
from train_helpers import as_run, build_from, logits_of, same_tensors, transformers_logits
from waiting import PATIENCE, wait_until

from megalite.config.schema import (
    DataSection,
    NewModelSection,
    OptimizerSection,
    ParallelSection,
    SamplingParams,
    TokenizerSection,
    TrainConfig,
    TrainOutputSection,
    TrainSection,
)
from megalite.config.validate import validate
from megalite.convert.convert import export, reshard
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import FAULT_VARIABLE, MegaliteError, Stopped
from megalite.hybrid.samples import write_samples
from megalite.text.tokenizer import Tokenizer
from megalite.train.checkpoint import claim, newest_state
from megalite.train.data.records import find_files
from megalite.train.job import Job

ROOT = Path(__file__).resolve().parent.parent
EXACT = {"rtol": 0, "atol": 0}
NEAR = {"rtol": 1e-3, "atol": 1e-5}
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Some twenty small modules of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    for file in find_files(DataSection(pattern="json/*.py")) + find_files(DataSection(pattern="url*/*.py")):
        text = file.path.read_text()
        for part in range(3):
            (folder / f"{file.path.parent.name}_{file.path.stem}_{part}.py").write_text(text[part * 900 :][:900])
    return folder


@pytest.fixture
def job(source, tmp_path):
    """`job(name, **changes)`: the config of a small run into a folder of that name."""

    def make(name: str, *, shape=None, parallel=None, **train) -> TrainConfig:
        often = {"eval_every": 4, "eval_batches": 8, "save_every": 3, "log_every": 1}
        train = {"steps": 8, "micro_batch_size": 4, **often, **train}
        return TrainConfig(
            model=NewModelSection(config={**SHAPE, **(shape or {})}, dtype="float32"),
            tokenizer=TokenizerSection(vocab_size=300),
            parallel=ParallelSection(**(parallel or {})),
            data=DataSection(source=str(source), held_out=0.2, sequence_length=16),
            optimizer=OptimizerSection(learning_rate=3e-3, warmup_steps=2),
            train=TrainSection(**train),
            output=TrainOutputSection(folder=str(tmp_path / name)),
        )

    return make


def changed(run: TrainConfig, section: str, **values) -> TrainConfig:
    return replace(run, **{section: replace(getattr(run, section), **values)})


def run_job(rank: int, config: TrainConfig, stop_at: int = 0, fault: str = "", write=write_samples) -> str:
    """What the run printed, and how it ended. `stop_at`: the last rank gets a SIGTERM during that step of the run."""
    said = io.StringIO()
    with as_run(rank) as runtime, redirect_stdout(said), redirect_stderr(said):
        os.environ[FAULT_VARIABLE] = fault
        steps = itertools.count(1)
        if stop_at and rank == dist.get_world_size() - 1:
            runtime.signal_received = lambda: signal.SIGTERM if next(steps) >= stop_at else None
        try:
            Job(config, runtime, write).run()
        except (MegaliteError, Stopped, RuntimeError) as error:
            return f"{said.getvalue()}{type(error).__name__}: {error}"
    return said.getvalue()


def output(config: TrainConfig) -> Path:
    return Path(config.output.folder)


def card_of(config: TrainConfig) -> str:
    return (output(config) / "README.md").read_text()


def state_of(config: TrainConfig) -> Path:
    """The one training state of a run."""
    (folder,) = (output(config) / "training" / "state").iterdir()
    return folder


def progress_of(config: TrainConfig) -> dict:
    return json.loads((state_of(config) / "manifest.json").read_text())["training"]["progress"]


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output(config) / "training" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def same(one: TrainConfig, other: TrainConfig, *, logs: bool = True, **tolerance) -> None:
    """Both runs wrote the same state and the same model, and the same losses."""
    if logs:
        torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(other)), **tolerance)
    for place in (output, state_of):
        same_tensors(place(other), place(one), **tolerance)


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_without_a_break_and_another_tp_goes_on_from_it(job, ranks):
    """One KV head, so two ranks train a copy of its moments; another tp takes the state as it is, and cut anew."""
    shape, two = {"num_key_value_heads": 1}, {"tp": 2}
    whole, broken = (job(name, parallel=two, shape=shape) for name in ("whole", "broken"))
    assert "training ends after step 8: all steps are done" in ranks(2).run(run_job, whole)[0]
    stopped = ranks(2).run(run_job, broken, 5)
    assert "training ends after step 5: stopped by SIGTERM" in stopped[0]
    assert not any("Stopped" in text for text in stopped), "a run that was asked to end and saved is no failure"
    assert [step for step, _ in losses(broken)] == [1, 2, 3, 4, 5]
    assert state_of(broken).name == "step-00000005"
    moved, cut = job("moved", shape=shape), job("cut", shape=shape)
    for other in (moved, cut):
        shutil.copytree(output(broken), output(other))
    reshard(state_of(cut), Layout(), state_of(cut).with_name("step-00000005-tp1pp1"))
    shutil.rmtree(output(cut) / "training" / "state" / "step-00000005")
    assert "going on after step 5" in ranks(2).run(run_job, broken)[0]
    same(whole, broken, **EXACT)
    assert card_of(whole) == card_of(broken)
    for other in (moved, cut):
        start = state_of(other)
        assert f"going on after step 5, from {start}" in ranks(1).run(run_job, other)[0].replace("\n  ", " ")
        torch.testing.assert_close(torch.tensor(losses(other)), torch.tensor(losses(whole)), **NEAR)
        same_tensors(output(other), output(whole), **NEAR)
    assert verify(state_of(moved), output(moved)).findings == [], "the best model is the last one"


def test_zero_stage_and_replicas_may_change_between_runs(job, ranks):
    """ZeRO-2 on two replicas, then ZeRO-3, then one replica with twice the micro batches: the same sequences."""
    whole = job("whole", parallel={"dp": 2})
    ranks(2).run(run_job, whole)
    ranks(2).run(run_job, job("changed", parallel={"dp": 2}, zero_stage=2), 3)
    ranks(2).run(run_job, job("changed", parallel={"dp": 2}, zero_stage=3), 3)
    last = job("changed", gradient_accumulation_steps=2)
    assert "going on after step 6" in ranks(1).run(run_job, last)[0]
    same(whole, last, **NEAR)


def test_a_larger_batch_goes_on_where_the_text_was(job, ranks):
    ranks(1).run(run_job, job("batch", eval_every=100), 3)
    larger = job("batch", eval_every=100, micro_batch_size=6)
    ranks(1).run(run_job, larger)
    progress = progress_of(larger)
    assert progress["sequences"] == progress["best_sequences"] == 3 * 4 + 5 * 6
    assert f"({progress['sequences'] * 16:,} tokens" in card_of(larger)


def test_a_save_that_fails_leaves_the_old_state_or_the_new_one(job, ranks):
    """Each run dies at another point of its next save; the one after them ends as if nothing had been."""
    whole, broken = job("whole"), job("broken")
    ranks(1).run(run_job, whole)
    ranks(1).run(run_job, broken, 3)
    for fault, survivor in (
        ("state.save#2=raise", 3),  # a state has three files: in the second one
        ("state.save#3=raise", 3),  # and in the third
        ("state.manifest#1=raise", 3),
        ("state.clean#1=raise", 6),
        ("export.save#1=raise", 6),
    ):
        ended = ranks(1).run(run_job, broken, 0, fault)[0]
        assert f"injected fault at {fault.partition('#')[0]}" in ended
        path, manifest = newest_state(output(broken) / "training" / "state")
        assert (path.name, manifest.training["step"]) == (f"step-{survivor:08d}", survivor)
    unfinished = output(broken) / "training" / "state" / "step-00000008"
    unfinished.mkdir()  # as a run of another layout leaves it that is killed in its save
    (unfinished / "rank-007.safetensors").write_bytes(b"part")
    ranks(1).run(run_job, broken)
    same(whole, broken, logs=False, **EXACT)  # steps that were done twice are in the log twice
    assert card_of(whole) == card_of(broken)


def test_a_run_on_examples_goes_on_in_the_middle_of_an_epoch(job, tiny, ranks, tmp_path):
    """Fine-tuning of a model with its own tokenizer, stopped after 4 of the 7 steps of an epoch, then resumed."""
    model = with_tokenizer(tiny("llama_tied"), tmp_path / "model")
    source = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"def f{i}(", "response": f"x{i}):\n" + "    pass\n" * (i % 5)} for i in range(30)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def config(name: str) -> TrainConfig:
        made = job(name, steps=6, parallel={"dp": 2}, micro_batch_size=2, sample_prompts=["def f7("])
        made = replace(made, model=NewModelSection(path=str(model), dtype="float32"), tokenizer=TokenizerSection())
        return changed(made, "data", source=str(source), sequence_length=64, held_out=0.1)

    whole, broken = config("whole"), config("broken")
    said = ranks(2).run(run_job, whole)[0].replace("\n  ", " ")
    assert re.search(r"2\d examples of [\d,]+ tokens to train on, \d+ of them in responses; \d examples held out", said)
    assert "stopped by SIGTERM" in ranks(2).run(run_job, broken, 4)[0]
    assert "going on after step 4" in ranks(2).run(run_job, broken)[0]
    same(whole, broken, **EXACT)
    assert progress_of(whole)["sequences"] == 24 and 24 * 8 < progress_of(whole)["tokens"] < 24 * 64
    card = card_of(whole)
    assert f"`{model}`, trained further on `{source}`" in card and "on responses only" in card
    assert "~~~\ndef f7(" in card, "pairs are asked as they were learnt"
    assert (output(whole) / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_what_a_run_can_not_go_on_from_is_said(job, ranks):
    begun = job("begun", parallel={"tp": 2})
    ranks(2).run(run_job, begun, 3)

    def ended(config: TrainConfig) -> str:
        (text,) = {text.splitlines()[-1] for text in ranks(config.parallel.tp).run(run_job, config)}
        return text

    text = output(begun) / "training" / "data" / "train.npy"
    before = text.read_bytes()
    assert "output.folder: already holds a training run" in ended(changed(begun, "output", resume=False))
    other = {**SHAPE, "rope_theta": 500.0}
    assert "is not the model that the run began with: rope_theta" in ended(changed(begun, "model", config=other))
    assert "data.held_out: is not what the run began with" in ended(changed(job("begun"), "data", held_out=0.3))
    assert text.read_bytes() == before, "none of them touched the run"
    with claim(output(begun), patience=0):
        held = changed(job("begun"), "distributed", peer_timeout=0.01)
        assert "output.folder: another run is writing it" in ended(held)
    file = state_of(begun) / "exp_avg-000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file}: damaged: tensor norm.weight" in ended(job("begun"))
    file.write_bytes(content[:-1])
    assert "manifest.json says" in ended(job("begun"))


# ---- the end of a run ------------------------------------------------------------------------------------------------


def test_patience_and_time_end_a_run_with_a_model(job, ranks):
    config = changed(job("patience", eval_every=1, patience=2), "optimizer", learning_rate=1e-30, min_learning_rate=0)
    for _ in range(2):  # the second run finds nothing to do
        assert "ends after step 3: 2 evaluations without a lower held-out loss" in ranks(1).run(run_job, config)[0]
    assert "1 steps of 64 tokens" in card_of(config) and "took 3 steps" in card_of(config)
    config = job("seconds", max_seconds=1e-6)
    assert "ends after step 1: train.max_seconds=1e-06 are over" in ranks(1).run(run_job, config)[0]
    assert card_of(config) and (output(config) / "model.safetensors").exists()
    [said] = ranks(1).run(run_job, changed(config, "monitor", report=False))
    assert "ends after step 2" in said, "the next run has its own time"
    assert "total:" not in said and "memory:" not in said


def test_a_run_that_diverges_says_so_and_keeps_its_last_good_state(job, ranks):
    config = changed(job("diverges", save_every=1), "optimizer", learning_rate=1e20, warmup_steps=0)
    ended = ranks(1).run(run_job, config)[0].splitlines()[-1]
    assert "MegaliteError: step 2: the loss is" in ended and "Lower optimizer.learning_rate" in ended
    assert state_of(config).name == "step-00000001"


def test_weights_that_are_no_numbers_never_become_the_best_model(job, ranks):
    config = changed(job("first", eval_every=1, log_every=8), "optimizer", learning_rate=1e38, warmup_steps=0)
    assert "MegaliteError: step 1: the held-out loss is nan" in ranks(1).run(run_job, config)[0].splitlines()[-1]
    assert not (output(config) / "model.safetensors").exists()
    assert "NaN" not in (output(config) / "training" / "log.jsonl").read_text()


def test_a_run_that_was_stopped_before_it_had_a_model_and_is_to_do_no_more_gets_one(job, ranks):
    config = job("short")
    ranks(1).run(run_job, config, 3)
    assert not (output(config) / "model.safetensors").exists()
    short = changed(config, "train", steps=3)
    other = changed(short, "data", seed=5, sequence_length=8)
    said = " ".join(ranks(1).run(run_job, other)[0].split())
    assert "the model of step 3 is in" in said and "data.seed was 0, is 5; data.sequence_length was 16, is 8" in said
    assert "another order" not in ranks(1).run(run_job, short)[0]
    (state_of(config) / "manifest.json").unlink()
    assert "there is a log, but no whole state in" in ranks(1).run(run_job, short)[0]


class Interrupted:
    """`write_samples`, while which the last rank gets a signal."""

    def __init__(self, signum: int):
        self.signum = signum

    def __call__(self, decoder, folder, prompts, runtime, **more):
        if runtime.rank == runtime.world_size - 1:
            runtime.signal_received = lambda: self.signum
        return write_samples(decoder, folder, prompts, runtime, **more)


def test_a_signal_while_the_model_writes_ends_the_run(job, ranks):
    config = job("stopped", parallel={"pp": 2}, steps=2, sample_prompts=["def f(", "import "])
    for signum in (signal.SIGINT, signal.SIGTERM):
        said = ranks(2).run(run_job, config, 0, "", Interrupted(signum))
        assert "stopped by SIG" in said[0] and "before the model card" in said[0]
        assert all(("Stopped: " in one) == (signum == signal.SIGINT) for one in said)
        assert not (output(config) / "README.md").exists()
    assert "writing 2 samples" in ranks(2).run(run_job, config)[0]
    assert "def f(" in card_of(config)


# ---- what comes out --------------------------------------------------------------------------------------------------


def logits_of_state(rank: int, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(build_from(folder, ParallelState(Layout(tp=2))), ids)


def test_an_exported_model_is_the_trained_one_to_everybody(job, ranks):
    """The last step is the best, so the export, transformers and the training state are one model.

    model.path may be the state: another run begins with its weights.
    """
    config = job("out", parallel={"tp": 2}, sample_prompts=["def f("])
    said = ranks(2).run(run_job, config)[0]
    assert "step 8  held-out loss" in said and said.count("(best so far)") == 2
    assert "total: 8 steps, " in said and "memory: at most " in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith(("step", "total", "rank")))
    ids = torch.randint(300, (40,), generator=torch.Generator().manual_seed(3))
    want = transformers_logits(output(config), ids)
    state = ParallelState(Layout())
    torch.testing.assert_close(logits_of(build_from(output(config), state), ids), want, rtol=0, atol=1e-4)
    export(state_of(config), output(config) / "again")
    same_tensors(output(config) / "again", output(config), **EXACT)
    results = ranks(2).run(logits_of_state, state_of(config), ids)
    torch.testing.assert_close(torch.cat(results, 1), want, rtol=0, atol=1e-4)
    text = card_of(config)
    assert "~~~python\ndef f(" in text and "8 steps of 64 tokens" in text and "tests included" not in text
    start = NewModelSection(path=str(state_of(config)), dtype="float32")
    following = replace(job("second", parallel={"tp": 2}, steps=1), model=start)
    following = changed(following, "tokenizer", path=str(output(config)))
    ranks(2).run(run_job, following)
    assert losses(following)[0][1] < losses(config)[0][1] - 0.1


def completions(rank: int, folder: Path, layout: Layout, prompts: list) -> list[str | None]:
    with as_run(rank) as runtime:
        decoder = build_from(folder, ParallelState(layout))
        greedily = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return write_samples(decoder, folder, prompts, runtime, sampling=greedily, seed=0, chat_variables={})


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, dp=2), Layout(pp=2)], ids=str)
def test_a_trained_model_writes_what_transformers_does(layout, tiny, ranks, tmp_path):
    from reference import greedy

    folder = with_tokenizer(tiny("llama_tied"), tmp_path / "model")
    chat = [{"role": "user", "content": "hi"}]
    wanted = []
    known = Tokenizer.load(folder)
    for text, plain in (("def f(", True), (known.chat_text(chat, add_generation_prompt=True), False)):
        ids = known.encode(text, add_special_tokens=plain)
        wanted.append(known.decode(greedy(folder, ids, 8).tokens, skip_special_tokens=True))
    too_long = "x" * 500
    for found in ranks(layout.size).run(completions, folder, layout, ["def f(", chat, too_long]):
        assert found == [*wanted, None], "a prompt that can't run costs itself only"


def greeting(decoder, folder, prompts, runtime, **more) -> list[str]:
    """In place of the model: it wants to be asked in a chat."""
    assert prompts == [[{"role": "user", "content": "say 7"}]]
    return ["Hello."]


def test_a_model_tuned_on_chats_is_asked_as_in_a_chat(job, tiny, ranks, tmp_path):
    folder = with_tokenizer(tiny("llama_tied"), tmp_path / "model")
    chats = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": "hi"}] for number in range(40)
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = job("tuned", steps=1, sample_prompts=["say 7"])
    config = replace(config, model=NewModelSection(path=str(folder), dtype="float32"), tokenizer=TokenizerSection())
    config = changed(config, "data", source=str(tmp_path / "lines.jsonl"), sequence_length=64)
    ranks(1).run(run_job, config, 0, "", greeting)
    assert "user: say 7\n\nassistant: Hello." in card_of(config)


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("data", {"exclude": ["/usr/*"]}, "data.exclude: must hold globs of relative names"),
        ("data", {"exclude": ["ok/*", ""]}, "data.exclude: must hold globs of relative names"),
        ("data", {"pattern": "/x/*.py"}, "data.pattern: must be a relative glob"),
        ("data", {"pattern": ""}, "data.pattern: must be a relative glob"),
        ("train", {"max_seconds": 0.0}, "train.max_seconds: must be above 0, or null"),
        ("train", {"max_seconds": math.nan}, "train.max_seconds: must be above 0, or null"),
        ("train", {"sample_prompts": ["a", ""]}, "train.sample_prompts: must not hold an empty text"),
    ],
)
def test_rules(section, values, says, job):
    config = job("rules")
    assert validate(config, None, None) == []
    (problem,) = validate(changed(config, section, **values), None, None)
    assert says in str(problem)


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_signal_ends_it_cleanly(forks, tmp_path, source):
    """Killed in a save as one process, going on as two under the launcher; neither compiles an extension."""
    extensions, out = tmp_path / "extensions", tmp_path / "out"
    extensions.mkdir()
    command = ["launch/train.py", "--config", "configs/train/tiny.yaml", "distributed.device=cpu"]
    command += [f"output.folder={out}", f"data.source={source}", "data.pattern=*.py", "tokenizer.vocab_size=300"]
    command += ["train.steps=100000", "train.save_every=2", "train.log_every=1", "train.eval_every=50000"]
    env = {"TORCH_EXTENSIONS_DIR": str(extensions), "PYTHONWARNINGS": "ignore"}
    fault = {**os.environ, **env, FAULT_VARIABLE: "state.save#5=kill"}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": PATIENCE}
    killed = subprocess.run([sys.executable, *command], env=fault, **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr  # in the second file of the second save
    states = out / "training" / "state"
    assert list(states.glob("step-00000004/.*.tmp")), "the kill came in the middle of a file"
    assert newest_state(states)[0].name == "step-00000002"

    following = forks.start(*command, "parallel.dp=2", preload=TRAINING, **env)
    wait_until(lambda: "\nstep 6/" in following.out or not following.runs, "step 6")
    following.signal(signal.SIGTERM)
    ended = following.ended()
    assert ended.code == 0, ended.err
    assert "going on after step 2" in ended.out and "stopped by SIGTERM" in ended.out
    (state,) = states.iterdir()
    last = json.loads((out / "training" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert newest_state(states)[1].training["step"] == last >= 6
    assert not list(state.glob(".*")) and not list(extensions.iterdir())
