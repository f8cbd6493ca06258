"""DeepSpeed checkpoints of others: the right weights come out, and no pickle is read unasked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from random_models import Sizes, write_model
from safetensors.torch import load_file

from megalite.convert.import_deepspeed import import_checkpoint
from megalite.errors import CheckpointError, ConfigError
from megalite.model import families
from megalite.weights.hf import read_headers
from megalite.weights.table import hf_shapes


class Leaf(torch.nn.Module):
    """One parameter, which the loss needs."""

    def __init__(self, name: str, values: torch.Tensor):
        super().__init__()
        self.register_parameter(name, torch.nn.Parameter(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        [param] = self.parameters(recurse=False)
        return (param * x).square().mean()


class Named(torch.nn.Module):
    """A model with the parameters of a checkpoint, by their names there: transformers takes each rank seconds."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self._leaves = []
        for name, values in tensors.items():
            path, inside = name.split("."), self
            for part in path[:-2]:
                if part not in dict(inside.named_children()):
                    inside.add_module(part, torch.nn.Module())
                inside = inside.get_submodule(part)
            inside.add_module(path[-2], Leaf(path[-1], values))
            self._leaves.append(inside.get_submodule(path[-2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([leaf(x) for leaf in self._leaves]).sum()


def train_and_save(rank: int, model: Path, folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """Two steps of a model in DeepSpeed; gives the float32 weights that DeepSpeed itself tells of."""
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.groups
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups.mpu = None  # of a layout that trained in this process before
    net = Named(tensors_of(model))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"DS_ACCELERATOR": "cpu", "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            patch.setenv(key, str(value))
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
        for _ in range(2):
            engine.backward(engine(torch.tensor(1.0 + rank).bfloat16()))
            engine.step()
        engine.save_checkpoint(str(folder), tag="global_step2")
    return {name: safe_get_full_fp32_param(param).clone() for name, param in net.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_checkpoints(stage, tiny, ranks, tmp_path):
    truth, _ = ranks(2).run(train_and_save, tiny("llama_tied"), tmp_path / "ck", stage)
    arguments = (tmp_path / "ck", tiny("llama_tied"))
    import_checkpoint(*arguments, tmp_path / "hf", allow_pickle=True, max_shard_bytes=50_000)
    after, before = tensors_of(tmp_path / "hf"), tensors_of(tiny("llama_tied"))
    assert after.keys() == before.keys() and len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    for name, values in truth.items():
        assert torch.equal(after[name], values.view(after[name].shape)) and not torch.equal(after[name], before[name])
    import_checkpoint(*arguments, tmp_path / "bf16", allow_pickle=True, dtype="bfloat16")
    assert families.read(tmp_path / "bf16").dtype == "bfloat16"
    assert torch.equal(tensors_of(tmp_path / "bf16")["model.norm.weight"], truth["model.norm.weight"].bfloat16())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}


def is_imported(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    found = tensors_of(folder)
    return found.keys() == tensors.keys() and all(torch.equal(found[name], values) for name, values in tensors.items())


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", Sizes("llama", layers=1, dtype="F32"))


def universal(folder: Path, tensors: dict[str, object]) -> Path:
    """A universal checkpoint as ds_to_universal lays it out."""
    for name, values in tensors.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": values, "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
    return folder


def some_tensors(model: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(families.read(model)).items()}


def test_universal_checkpoints(model, tmp_path):
    tensors = some_tensors(model)
    for wrapper in ("", "module.", "module._orig_mod."):
        folder = universal(tmp_path / f"{wrapper}ck", {wrapper + name: values for name, values in tensors.items()})
        import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True, overwrite=True)
        assert is_imported(tmp_path / "hf", tensors)


def test_interrupted_it_begins_anew(model, tmp_path, monkeypatch):
    tensors = some_tensors(model)
    folder = universal(tmp_path / "ck", tensors)
    monkeypatch.setenv("MEGALITE_FAULT", "shards.step#25=raise")
    with pytest.raises(RuntimeError, match="injected"):
        import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True, max_shard_bytes=2000)
    monkeypatch.delenv("MEGALITE_FAULT")
    assert list((tmp_path / "hf").glob("*.safetensors"))
    with pytest.raises(CheckpointError):
        read_headers(tmp_path / "hf")
    import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True, max_shard_bytes=2000)
    assert is_imported(tmp_path / "hf", tensors)
    with pytest.raises(ConfigError, match="--overwrite"):
        import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True)
    import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True, overwrite=True)
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors*")] == ["model.safetensors"]


def test_pickles_are_not_read_unasked(model, tmp_path):
    folder = universal(tmp_path / "ck", some_tensors(model))
    with pytest.raises(ConfigError, match="--allow-pickle: is needed: DeepSpeed's checkpoints are pickles"):
        import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=False)
    assert not (tmp_path / "hf").exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_code_in_a_universal_checkpoint_does_not_run_even_so(model, tmp_path):
    tensors = {**some_tensors(model), "model.norm.weight": Evil(tmp_path / "ran")}
    folder = universal(tmp_path / "ck", tensors)
    with pytest.raises(CheckpointError, match="model.norm.weight/fp32.pt: UnpicklingError"):
        import_checkpoint(folder, model, tmp_path / "hf", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown tensors: extra"),
        (lambda t: t.update(head=t.pop("lm_head.weight")), "missing tensors: lm_head.weight; unknown tensors: head"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48)}), r"\[48\], do not make up the \[24\]"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(change, reason, model, tmp_path):
    tensors = some_tensors(model)
    change(tensors)
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(universal(tmp_path / "ck", tensors), model, tmp_path / "hf", allow_pickle=True)
    assert not (tmp_path / "hf" / "model.safetensors").exists()


def test_other_folders_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint"):
        import_checkpoint(model, model, tmp_path / "hf", allow_pickle=True)
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "latest").write_text("../model")
    with pytest.raises(CheckpointError, match="not the plain name of a folder"):
        import_checkpoint(tmp_path / "ck", model, tmp_path / "hf", allow_pickle=True)
    (tmp_path / "ck" / "latest").write_text("tag")
    (tmp_path / "ck" / "tag").mkdir()
    (tmp_path / "ck" / "tag" / "mp_rank_00_model_states.pt").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="DeepSpeed can't read it"):
        import_checkpoint(tmp_path / "ck", model, tmp_path / "hf", allow_pickle=True)
    shutil.copytree(model, tmp_path / "hf")
    with pytest.raises(ConfigError, match="--out.*already holds"):
        import_checkpoint(tmp_path / "ck", model, tmp_path / "hf", allow_pickle=True)


def test_tensor_parallel_slices_are_joined():
    from megalite.convert.import_deepspeed import _joined

    whole = torch.randn(6, 4)
    assert torch.equal(_joined("a", [whole[:2], whole[2:]], (6, 4), False), whole)
    assert torch.equal(_joined("a", [whole[:, :3], whole[:, 3:]], (6, 4), False), whole)
    assert torch.equal(_joined("a", [whole, whole.clone()], (6, 4), False), whole)
    with pytest.raises(CheckpointError, match="copies of the tensor-parallel ranks differ"):
        _joined("a", [whole, whole + 1], (6, 4), False)
    with pytest.raises(CheckpointError, match="slices of a fused tensor"):
        _joined("a", [whole[:2], whole[2:]], (6, 4), True)
    with pytest.raises(CheckpointError, match="do not make up"):
        _joined("a", [whole[:2], whole[3:]], (6, 4), False)
