"""Training state is saved, checked and gone on with in any layout: by the values in it, and by the steps after it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_helpers import as_run, build_from, same_tensors

from megalite.config.schema import OptimizerSection
from megalite.convert.convert import export, reshard
from megalite.convert.describe import describe, describe_tensor
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import CheckpointError
from megalite.train.checkpoint import KINDS, load_state, newest_state, remove_unfinished, save_state
from megalite.train.export import export_model, files_beside
from megalite.train.micro_batch import from_windows
from megalite.train.trainer import Trainer
from megalite.train.zero import WEIGHT, get_whole, set_whole, whole_shape
from megalite.weights import manifest as manifests
from megalite.weights import shards
from megalite.weights.folder import ModelFolder
from megalite.weights.table import owned
from megalite.weights.transfer import random_matrix

STEPS = 8
BATCH = 4
"""Sequences of one step, over all replicas; two micro batches to fill a pipeline with."""
LENGTH = 10
STEP = 5
"""At which the states are that were not trained."""
STRAY = {"step-by-step", "notes.txt", "step-00000001"}
"""What a user may have put beside the states."""


def trainer_of(model: Path, layout: Layout, zero: int = 1) -> Trainer:
    optimizer = OptimizerSection(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1)
    return Trainer(build_from(model, ParallelState(layout)), optimizer, steps=STEPS, zero_stage=zero)


def save(trainer: Trainer, model: Path, folder: Path) -> None:
    base = ModelFolder.open(model)
    save_state(trainer, folder, {"data": "some"}, base, files_beside(base))


def load_newest(trainer: Trainer, folder: Path) -> None:
    load_state(trainer, *newest_state(folder))


def only(folder: Path) -> Path:
    (path,) = (path for path in folder.iterdir() if path.name not in STRAY)
    assert path.is_dir()
    return path


# ---- values ----------------------------------------------------------------------------------------------------------


def truth(trainer: Trainer, kind: str) -> dict[str, torch.Tensor]:
    """What each parameter of this rank should hold: a function of the Hugging Face coordinates alone."""
    params = dict(trainer.decoder.named_parameters())
    found = {name: torch.full(whole_shape(param), math.nan) for name, param in params.items()}
    for one in owned(trainer.decoder.config, trainer.state.layout, trainer.state.rank):
        piece = one.piece
        whole = random_matrix(piece, KINDS.index(kind), torch.device("cpu"))
        values = whole.narrow(piece.dim, one.lo - piece.hf_start, one.hi - one.lo)
        found[piece.param].narrow(piece.dim, one.start, one.hi - one.lo).copy_(values)
    for name in trainer.holders if kind != WEIGHT else ():  # rows of h ranks have gradients divided by sqrt(h)
        holders = trainer.holders[name].view(-1, *[1] * (found[name].ndim - 1))
        found[name] /= holders.sqrt() if kind == "exp_avg" else holders
    return found


def write_truth(rank: int, model: Path, folder: Path, layout: Layout, hf: Path | None = None) -> None:
    """Save a state of these values, and with `hf` their export."""
    with as_run(rank):
        trainer = trainer_of(model, layout)
        params = dict(trainer.decoder.named_parameters())
        for kind in KINDS:
            for name, values in truth(trainer, kind).items():
                set_whole(params[name], kind, values)
        trainer.steps_done = STEP
        save(trainer, model, folder)
        if hf is not None:
            export_model(trainer.decoder, hf / "model.safetensors", torch.float32)


def look_and_save(rank: int, model: Path, folder: Path, layout: Layout, zero: int = 1) -> None:
    """Load the newest state, look at every value, and save it in this layout."""
    with as_run(rank):
        trainer = trainer_of(model, layout, zero)
        load_newest(trainer, folder)
        assert trainer.steps_done == STEP
        params = dict(trainer.decoder.named_parameters())
        for kind in KINDS:
            # a layout that divides by the root of 2 may have been between
            tolerance = {"rtol": 3e-7 if kind == "exp_avg" else 0, "atol": 0}
            for name, values in truth(trainer, kind).items():
                got = get_whole(params[name], kind)
                torch.testing.assert_close(got, values, **tolerance, msg=lambda m, n=name, k=kind: f"{k} {n}: {m}")
                if kind == WEIGHT and zero < 3:
                    assert torch.equal(params[name], got), "the forward pass has the weights that were loaded"
        save(trainer, model, folder)


VALUES = {
    # more ranks than KV heads, chunks that are dealt out, replicas that share the writing, parts cut anew each time
    "qwen3": [
        (Layout(tp=4), 1),
        (Layout(tp=2, pp=2), 1),
        (Layout(pp=2, dp=2, interleave=2), 2),
        (Layout(tp=2, dp=2), 3),
    ],
    # a tied embedding: one copy, two, one
    "llama_tied": [(Layout(pp=4), 1), (Layout(dp=4), 1), (Layout(tp=2, pp=2, stages=(3, 1)), 1)],
    "qwen3_moe": [(Layout(tp=4), 1), (Layout(pp=2, dp=2), 1)],
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_arrives_in_every_layout(name, tiny, ranks, tmp_path):
    """Every state is of the same step, and never written over one that is whole.

    What a user has put beside the states stays where it is, and ends no run.
    """
    states, kept, names = tmp_path / "states", tmp_path / "kept", []
    (states / "step-by-step").mkdir(parents=True)
    (states / "notes.txt").touch()
    (states / "step-00000001").touch()
    for layout, zero in [(Layout(dp=4), 1), *VALUES[name]]:
        if names:
            ranks(4).run(look_and_save, tiny(name), states, layout, zero)
        else:
            ranks(4).run(write_truth, tiny(name), states, layout)
        state = only(states)
        names.append(state.name)
        assert verify(state).findings == []
        assert manifests.read(state).layout == shards.stored_layout(layout)
        shutil.copytree(states, kept, dirs_exist_ok=True)
    assert names == ["step-00000005", *(f"step-00000005-{count}" for count in range(2, len(names) + 1))]
    assert newest_state(kept)[0].name == names[-1]
    remove_unfinished(states)
    assert {path.name for path in states.iterdir()} == {names[-1], *STRAY}


# ---- steps -----------------------------------------------------------------------------------------------------------


def micro_batches(trainer: Trainer) -> list:
    """This replica's share of the step that comes next: the same sequences in every layout."""
    vocab, dp = trainer.decoder.config.vocab_size, trainer.state.dp
    generator = torch.Generator().manual_seed(trainer.steps_done)
    ids = torch.randint(vocab, (BATCH, LENGTH + 1), generator=generator)
    return [from_windows(part) for part in ids.chunk(dp.size)[dp.rank].chunk(2)]


def train(rank: int, model: Path, folders: list[Path], layout: Layout, zero: int) -> None:
    """Go on from the newest state, if there is one: a step for each folder, and a save into it."""
    with as_run(rank):
        trainer = trainer_of(model, layout, zero)
        if folders[0].exists():
            load_newest(trainer, folders[0])
        for folder in folders:
            trainer.step(micro_batches(trainer))
            save(trainer, model, folder)


RESUMES = {
    "tied": ("llama_tied", 4, (Layout(tp=2, pp=2), 1), [(Layout(pp=2, dp=2, interleave=2), 1)]),
    "shared-rows": ("qwen3", 2, (Layout(tp=4), 1), [(Layout(tp=2, dp=2), 3)]),
    "interleaved": ("qwen3_moe", 4, (Layout(pp=2, dp=2, interleave=2), 1), [(Layout(pp=4), 1)]),
    "cut parameters": ("qwen3", 2, (Layout(dp=2), 3), []),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_equals_one_without_a_break(case, tiny, ranks, tmp_path):
    """Bit for bit in its own layout, and within the rounding of float32 through another."""
    name, layers, own, others = RESUMES[case]
    model, run = tiny(name, layers), ranks(own[0].size).run
    broken, whole, moved = (tmp_path / folder for folder in ("broken", "whole", "moved"))
    run(train, model, [broken, whole], *own)
    shutil.copytree(broken, moved)
    run(train, model, [broken], *own)
    same_tensors(only(broken), only(whole), rtol=0, atol=0)
    for layout, zero in others:
        run(train, model, [moved], layout, zero)
    if others:
        for folder in (whole, moved):
            reshard(only(folder), Layout(), folder / "one")
        same_tensors(moved / "one", whole / "one", rtol=1e-3, atol=1e-5)


# ---- what tools make of it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"), [("llama_tied", Layout(tp=2, pp=2)), ("gpt2", Layout(pp=2, dp=2, interleave=2))], ids=str
)
def test_tools_take_a_state_of_pipeline_stages(name, layout, tiny, ranks, tmp_path):
    hf = tmp_path / "hf"
    ranks(4).run(write_truth, tiny(name), tmp_path / "states", layout, hf)
    state = only(tmp_path / "states")
    shutil.copy(tiny(name) / "config.json", hf)
    assert verify(state, hf).findings == []
    export(state, tmp_path / "again")
    assert verify(hf, tmp_path / "again").findings == []
    reshard(state, Layout(tp=3), tmp_path / "tp3")
    reshard(tmp_path / "tp3", layout, tmp_path / "back")
    same_tensors(tmp_path / "back", state, rtol=0, atol=0)
    assert verify(tmp_path / "back", state).findings == []
    facts = describe(state)
    assert facts["form"] == "training state" and facts["kinds"] == list(KINDS) and facts["training"]["step"] == STEP
    assert facts["layout"] == {"tp": layout.tp, "pp": 2, **({"interleave": 2} if layout.interleave == 2 else {})}
    layers = {tuple(map(tuple, file["layers"])) for file in facts["files"]}
    assert layers == ({((0, 1), (2, 3)), ((1, 2), (3, 4))} if layout.interleave == 2 else {((0, 2),), ((2, 4),)})
    name = next(tensor["name"] for tensor in facts["tensors"] if "embed" in tensor["name"] or "wte" in tensor["name"])
    assert len(describe_tensor(state, name)["places"]) == 2 * layout.tp, "the ends of the pipeline have a copy each"


# ---- what is refused, and what is chosen -----------------------------------------------------------------------------


def load(rank: int, model: Path, folder: Path, layout: Layout) -> str:
    with as_run(rank):
        try:
            load_newest(trainer_of(model, layout), folder)
        except CheckpointError as error:
            return str(error)
    return ""


def test_the_last_step_is_gone_on_from_and_damage_is_found_by_a_run_of_any_layout(tiny, ranks, tmp_path):
    ranks(2).run(write_truth, tiny("qwen3"), tmp_path, Layout(pp=2))
    first, other = only(tmp_path), tmp_path / "step-00000004-2"
    reshard(first, Layout(tp=2), other)
    manifest = manifests.read(other)
    for training, newest in (({"step": STEP - 1}, first), ({"step": STEP + 1}, other)):
        manifests.write(other, replace(manifest, training=training))
        assert newest_state(tmp_path)[0] == newest
    manifests.write(other, replace(manifest, training={}))
    with pytest.raises(CheckpointError, match="not a training state; to start from a model"):
        newest_state(tmp_path)
    shutil.rmtree(other)
    assert newest_state(tmp_path / "none") is None
    file = first / "exp_avg_sq-001.safetensors"  # the end of the last stage
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for layout in (Layout(tp=2), Layout(pp=2)):
        errors = ranks(2).run(load, tiny("qwen3"), tmp_path, layout)
        assert f"{file}: damaged: tensor head.weight" in errors[1]
        assert (errors[0] == "") == (layout.pp == 2), "the first stage has no need of what is damaged"
