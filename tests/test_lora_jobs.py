"""Jobs that train LoRA adapters: states, exports and refusals; hybrid jobs that sync adapters alone."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pool_replica import generate, make_replica
from safetensors.torch import load_file, save_file
from tiny_tokenizer import with_tokenizer
from train_helpers import as_run, same_tensors

from megalite.config.load import loaded_from
from megalite.config.schema import (
    DataSection,
    EngineSection,
    HybridConfig,
    HybridDataSection,
    HybridInferSection,
    HybridSection,
    HybridTrainSection,
    LoraSection,
    NewModelSection,
    OptimizerSection,
    ParallelSection,
    SamplingParams,
    SupervisedSection,
    TrainConfig,
    TrainOutputSection,
    TrainSection,
)
from megalite.core.layout import Layout
from megalite.dry_run import describe
from megalite.errors import FAULT_VARIABLE, CheckpointError, ConfigError, MegaliteError
from megalite.hybrid import job as hybrid
from megalite.hybrid.samples import write_samples
from megalite.model import families
from megalite.planner.memory import TrainingMemory
from megalite.preflight import check
from megalite.train.checkpoint import newest_state
from megalite.train.job import Job
from megalite.train.trained import trained_of
from megalite.weights import lora_training
from megalite.weights.adapter_table import AdapterTable, table_of
from megalite.weights.checkpoint import open_checkpoint
from megalite.weights.folder import ModelFolder
from megalite.weights.table import expected, local_elements, owned

LORA = LoraSection(r=4, lora_alpha=8)
OPTIMIZER = OptimizerSection(learning_rate=1e-2, min_learning_rate=1e-2, warmup_steps=1)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    return with_tokenizer(tiny("llama3", 2), tmp_path_factory.mktemp("lora_base") / "model")


# ---- beginning -------------------------------------------------------------------------------------------------------


def begun(table: AdapterTable, layout: Layout, rank: int):
    """A rank's ranges of new adapters, and their values."""
    held = {name: torch.empty(shape) for name, (shape, _) in expected(table, layout, rank).items()}
    lora_training.initialise(held, table, layout, rank, seed=5)
    ranges = owned(table, layout, rank)
    return [(one, held[one.piece.param].narrow(one.dim, one.start, one.count)) for one in ranges]


def test_adapters_begin_as_those_of_peft_and_alike_in_every_layout(base):
    table = table_of(LORA, families.read(base))
    whole = {one.piece.hf: values for one, values in begun(table, Layout(), 0)}
    for name, values in whole.items():
        if name.endswith("lora_B.weight"):
            assert not values.any()
            continue
        bound = values.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
        assert values.abs().max() <= bound and values.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    for layout in (Layout(tp=3), Layout(tp=2, pp=2)):
        for rank in layout.ranks:
            for one, values in begun(table, layout, rank):
                assert torch.equal(values, whole[one.piece.hf].narrow(one.piece.hf_dim, one.lo, one.count))


def test_memory_and_dry_run_count_the_optimizer_of_adapters_alone(base):
    model, layout = families.read(base), Layout(tp=2, dp=2)
    table = table_of(LORA, model)
    count, frozen = local_elements(table, layout, 0), local_elements(model, layout, 0)
    state = TrainingMemory(model, layout, 0, 2, zero_stage=2, adapter=table).state()
    assert (state.weights, state.gradients) == (2 * (frozen + count), 4 * count // 2)
    assert state.optimizer == 12 * count // 2 < state.weights
    config = TrainConfig(model=NewModelSection(path=str(base)), train=TrainSection(lora=LORA))
    said = describe(config, model)
    assert f"adapters of {local_elements(table, Layout(), 0):,} numbers train; the weights are frozen" in said


@pytest.mark.parametrize(
    ("lora", "more", "says"),
    [
        ({"lora_dropout": 1.0}, {}, "train.lora.lora_dropout"),
        ({"target_modules": ["q_proj", "nope"]}, {}, "train.lora.target_modules: 'nope' is no linear that can be"),
        ({"target_modules": ["embed_tokens"]}, {}, "the embeddings are not adapted"),
        ({"target_modules": 3}, {}, "must be all-linear, a list of names"),
        ({"target_modules": "(q"}, {}, "must be a regular expression"),
        ({"r": None, "use_rslora": True}, {}, "is of adapters, and there are none"),
        ({"path": "nowhere"}, {}, "train.lora.r: is the adapter's own in path"),
        ({"r": None, "path": "nowhere"}, {}, "train.lora.path: must be a folder as PEFT saves adapters"),
        ({}, {"zero_stage": 3}, "train.zero_stage: 3 cuts what trains over dp"),
    ],
)
def test_what_adapters_cannot_do_is_refused_before_anything_starts(lora, more, says, base, tmp_path):
    train = TrainSection(lora=replace(LORA, **lora), **more)
    config = TrainConfig(
        model=NewModelSection(path=str(base)), train=train, output=TrainOutputSection(folder=str(tmp_path / "out"))
    )
    with pytest.raises(ConfigError, match=re.escape(says)):
        check(loaded_from(config, {}), [], read_headers=False)


# ---- training jobs ---------------------------------------------------------------------------------------------------


def training(base: Path, folder: Path, *, lora: LoraSection = LORA, parallel=None, **train) -> TrainConfig:
    """Six steps on a few pairs."""
    return TrainConfig(
        model=NewModelSection(path=str(base), dtype="float32"),
        parallel=ParallelSection(**(parallel or {})),
        data=DataSection(source=str(base.parent / "pairs.jsonl"), held_out=0.2, sequence_length=24),
        optimizer=OPTIMIZER,
        train=TrainSection(
            lora=lora, **{"steps": 6, "micro_batch_size": 4, "eval_every": 2, "save_every": 2, "log_every": 1, **train}
        ),
        output=TrainOutputSection(folder=str(folder), tensorboard=False),
    )


@pytest.fixture(scope="module")
def pairs(base) -> None:
    lines = [json.dumps({"prompt": f"{a}+{b}=", "response": f"{a + b}\n"}) for a in range(6) for b in range(6)]
    (base.parent / "pairs.jsonl").write_text("\n".join(lines))


def run_job(rank: int, config: TrainConfig | HybridConfig, stop_at: int = 0, fault: str = "") -> str:
    """What is said. `stop_at`: a SIGTERM comes during that step."""
    said = io.StringIO()
    with as_run(rank) as runtime, redirect_stdout(said), redirect_stderr(said):
        os.environ[FAULT_VARIABLE] = fault
        asked = itertools.count(1)
        if stop_at:
            runtime.signal_received = lambda: signal.SIGTERM if next(asked) >= stop_at else None
        try:
            if isinstance(config, HybridConfig):
                hybrid.Job(config, runtime).run()
            else:
                Job(config, runtime, write_samples).run()
        except (MegaliteError, RuntimeError) as error:
            return f"{said.getvalue()}{type(error).__name__}: {error}"
    return said.getvalue()


def test_a_run_goes_on_exactly_and_in_another_layout_and_leaves_what_peft_loads(base, pairs, ranks, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    whole, broken, moved = (tmp_path / name for name in ("whole", "broken", "moved"))
    two, dropping = {"tp": 2}, replace(LORA, lora_dropout=0.2)
    said = ranks(2).run(run_job, training(base, whole, lora=dropping, parallel=two))[0]
    assert f"the adapter of step 6 is in {whole}" in said.replace("\n  ", " "), said
    assert "stopped by SIGTERM" in ranks(2).run(run_job, training(base, broken, lora=dropping, parallel=two), 4)[0]
    path, manifest = newest_state(broken / "training/state")
    assert manifest.training["step"] == 4 and manifest.training["base"]["path"] == str(base)
    assert not (path / "config.json").exists() and (path / "adapter_config.json").exists()
    held = sum(file.stat().st_size for file in path.glob("rank-*.safetensors"))
    assert held < 0.5 * (base / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError, match="the state of LoRA adapters in training beside"):
        open_checkpoint(path)
    shutil.copytree(broken, moved)
    assert "going on after step 4" in ranks(2).run(run_job, training(base, broken, lora=dropping, parallel=two))[0]
    same_tensors(broken, whole, rtol=0, atol=0)
    other = training(base, moved, lora=dropping, parallel={"pp": 2}, zero_stage=2)
    assert "going on after step 4" in ranks(2).run(run_job, other)[0]
    same_tensors(moved, whole, rtol=1e-3, atol=1e-4)

    prompt = torch.tensor([[5, 9, 33, 7, 21]])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, str(whole)).eval()
    names = {name.replace(".default", "") for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == load_file(whole / "adapter_model.safetensors").keys()
    with torch.no_grad():
        tokens = adapted.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, 5:].tolist()
    assert ranks(1).run(generate_with, base, whole, prompt[0].tolist()) == [tokens]
    assert "library_name: peft" in (whole / "README.md").read_text()


def generate_with(rank: int, base: Path, adapter: Path, prompt: list[int]) -> list[int]:
    replica = make_replica(rank, base, lora={"mine": str(adapter)})
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return generate(replica, [(prompt, params)], ["mine"])[0].outputs[0].token_ids


def test_a_killed_export_leaves_the_adapter_before_and_another_run_goes_on_from_it(base, pairs, ranks, tmp_path):
    """`train.lora.path`: rank, alpha and modules are those of the folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    some = LoraSection(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "down_proj"])
    ended = ranks(1).run(run_job, training(base, first, lora=some), 0, "export.save#2=raise")[0]
    assert "injected fault at export.save" in ended
    before = load_file(first / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in before} == {"v_proj", "down_proj"}
    config = training(base, second, lora=LoraSection(path=str(first)), steps=2, sample_prompts=["1+1="])
    assert "the adapter of step 2" in ranks(1).run(run_job, config)[0].replace("\n  ", " ")
    assert "## Samples" in (second / "README.md").read_text()
    after, settings = (
        load_file(second / "adapter_model.safetensors"),
        json.loads((second / "adapter_config.json").read_text()),
    )
    assert after.keys() == before.keys() and (settings["r"], settings["use_rslora"]) == (3, True)
    moved = [(after[name] - before[name]).abs().max() for name in before]
    assert all(0 < one < 5 * OPTIMIZER.learning_rate for one in moved), "it went on from there"


def test_a_state_of_other_adapters_or_beside_other_weights_is_refused(base, pairs, ranks, tmp_path):
    config = training(base, tmp_path / "run", steps=1)
    ranks(1).run(run_job, config)
    _, manifest = newest_state(tmp_path / "run/training/state")
    folder = ModelFolder.open(base)
    trained_of(LORA, folder).check(manifest)
    with pytest.raises(ConfigError, match="train.lora: is not what the run began with: r, target_modules"):
        trained_of(replace(LORA, r=2, target_modules=["q_proj"]), folder).check(manifest)
    with pytest.raises(ConfigError, match="trained adapters, and train.lora.r is null"):
        trained_of(LoraSection(), folder).check(manifest)
    other = shutil.copytree(base, tmp_path / "other")
    trained_of(LORA, ModelFolder.open(other)).check(manifest)  # the same weights elsewhere
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="does not hold the weights beside which the run began"):
        trained_of(LORA, ModelFolder.open(other)).check(manifest)


# ---- hybrid jobs -----------------------------------------------------------------------------------------------------


def sampling(base: Path, folder: Path, train: dict, infer: dict, **loop) -> HybridConfig:
    """Two supervised steps; then greedy samples from which nothing is learnt, unless `loop` says otherwise."""
    loop = {"algorithm": "rejection", "samples_per_prompt": 1, "keep_above": 1.0, "steps": 1, **loop}
    grpo = loop["algorithm"] == "grpo"
    return HybridConfig(
        model=NewModelSection(path=str(base), dtype="float32"),
        data=HybridDataSection(source="configs.hybrid.grpo_arithmetic:additions", options={"digits": 1}),
        train=HybridTrainSection(lora=LORA, parallel=ParallelSection(**train), micro_batch_tokens=64),
        infer=HybridInferSection(
            parallel=ParallelSection(**infer), engine=EngineSection(block_size=4, max_num_seqs=8, seed=1)
        ),
        sampling=SamplingParams(temperature=float(grpo), max_tokens=6, ignore_eos=not grpo),
        optimizer=OPTIMIZER,
        supervised=SupervisedSection(steps=2, examples_per_step=8),
        hybrid=HybridSection(prompts_per_step=4, reward="hybrid_rewards:many_digits", sync_bucket=0.01, **loop),
        output=TrainOutputSection(folder=str(folder), tensorboard=False),
    )


def sync_of(rank: int, config: HybridConfig) -> tuple[bool, int, str]:
    """Whether weights are shared, the bytes that a sync brings to this rank, and what a run of the job says."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for rewards of the tests
    said = io.StringIO()
    with as_run(rank) as runtime, redirect_stdout(said), redirect_stderr(said):
        job = hybrid.Job(config, runtime)
        job.run()
    return job.sync.is_shared, job.sync.received_bytes, said.getvalue()


PAIRS = {
    "the same": (2, {"tp": 2}, {"tp": 2}),
    "dp2 to tp2": (2, {"dp": 2}, {"tp": 2}),
    "pp2 to a rank of its own": (3, {"pp": 2}, {"first_rank": 2}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_samples_after_a_sync_of_adapters_are_those_of_the_exported_adapter(pair, base, ranks, tmp_path):
    size, train, infer = PAIRS[pair]
    found = ranks(size).run(sync_of, sampling(base, tmp_path, train, infer))
    table = table_of(LORA, families.read(base))
    moved = sum(received for _, received, _ in found)
    assert found[0][0] == (train == infer) and moved <= 4 * local_elements(table, Layout(), 0)
    assert (moved > 0) == (size == 3), "ranks of dp hold all that those of tp need"
    samples = [json.loads(line) for line in (tmp_path / "training/rollouts/iteration-000001.jsonl").open()]
    prompts = [sample["prompt_token_ids"] for sample in samples]
    assert ranks(1).run(generate_all, base, tmp_path, prompts)[0] == [sample["token_ids"] for sample in samples]


def generate_all(rank: int, base: Path, adapter: Path, prompts: list[list[int]]) -> list[list[int]]:
    replica = make_replica(rank, base, lora={"mine": str(adapter)})
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = generate(replica, [(prompt, params) for prompt in prompts], ["mine"] * len(prompts))
    return [output.outputs[0].token_ids for output in outputs]


def test_a_hybrid_job_learns_the_same_in_every_layout(base, ranks, tmp_path):
    """Policy updates with the divergence from the adapters as they were after the supervised steps."""
    loop = {"algorithm": "grpo", "samples_per_prompt": 4, "steps": 2, "kl_coefficient": 0.1}
    found = []
    for size, train, infer in ((1, {}, {}), PAIRS["dp2 to tp2"]):
        folder = tmp_path / str(size)
        ranks(size).run(sync_of, sampling(base, folder, train, infer, **loop))
        log = [line for line in map(json.loads, (folder / "training/log.jsonl").open()) if "iteration" in line]
        assert all(line["logprob_difference_max"] < 1e-5 for line in log) and log[0]["kl"] < 1e-6 < log[1]["kl"]
        found.append(([line["loss"] for line in log], load_file(folder / "adapter_model.safetensors")))
    (losses, whole), (others, weights) = found
    assert losses == pytest.approx(others, abs=1e-5)
    for name, values in weights.items():
        torch.testing.assert_close(values, whole[name], rtol=0, atol=2e-4)
