"""Rank shards: what a rank loads from them, what a folder says of itself, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Sizes, write_model
from tiny_models import VARIANTS

from megalite import cli
from megalite.convert.convert import convert
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import EXIT_CHECKPOINT, EXIT_DONE, CheckpointError
from megalite.model import families
from megalite.weights import manifest as manifests
from megalite.weights import shards
from megalite.weights.hf import open_checkpoint
from megalite.weights.sources import open_source
from megalite.weights.table import owned
from megalite.weights.transfer import build, load_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cut(tmp_path):
    """A small model and its shards for tp=2,pp=2."""
    model = write_model(tmp_path / "model", Sizes("llama"))
    convert(model, Layout(2, 2), tmp_path / "cut", jobs=1)
    return tmp_path / "cut"


def compare(rank: int, model: Path, folder: Path, layout: Layout, dtype: torch.dtype) -> int:
    """Fill two decoders, one from each folder; gives how many parameters there were to compare."""
    config, state = families.read(model), ParallelState(layout)
    ours, theirs = (build(config, state, dtype=dtype, device=torch.device("cpu")) for _ in range(2))
    for param in ours.parameters():
        param.data.fill_(torch.nan)
    load_folder(ours, folder)
    load_folder(theirs, model)
    wanted = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        assert torch.equal(param, wanted[name]), name
    names = families.weight_names(config)
    with open_checkpoint(model, names=names) as checkpoint:  # and that is what the file holds, read another way
        mine = owned(config, layout, rank)
        for one in mine:
            values = checkpoint.read(one.piece.hf, one.piece.hf_dim, one.lo, one.hi).to(dtype)
            here = wanted[one.piece.param].narrow(one.piece.dim, one.start, one.hi - one.lo)
            assert torch.equal(here, values.t() if one.piece.transpose else values), one
    return len(wanted)


@pytest.mark.parametrize("name", [*VARIANTS, "gpt2_bare"])
def test_loads_what_the_original_holds(name, tiny, tmp_path):
    convert(tiny(name), Layout(), tmp_path / "cut")
    assert compare(0, tiny(name), tmp_path / "cut", Layout(), torch.float32) > 20


CUTS = [
    (Layout(4, 1), Layout(4, 1)),
    (Layout(4, 1), Layout(3, 1)),
    (Layout(2, 2), Layout(2, 2)),
    (Layout(2, 2), Layout()),
    (Layout(1, 2, 2), Layout(1, 2)),
    (Layout(1, 2, 2), Layout(2, 2, interleave=2)),
]
"""Layout of the run, and of the files."""


@pytest.mark.parametrize(("layout", "cut"), CUTS, ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "phi3", "gpt2", "qwen3_moe"])
def test_every_rank_loads_its_own_whatever_the_files_are_cut_for(name, layout, cut, tiny, ranks, tmp_path):
    convert(tiny(name), cut, tmp_path / "cut")
    counts = ranks(4).run(compare, tiny(name), tmp_path / "cut", layout, torch.float32)
    assert min(counts) > 5


def test_loads_into_another_dtype(tiny, tmp_path):
    convert(tiny("llama3"), Layout(), tmp_path / "cut")
    assert compare(0, tiny("llama3"), tmp_path / "cut", Layout(), torch.bfloat16) > 20


# ---- what a folder says of itself --------------------------------------------------------------------------------


def test_knows_shards_from_models(cut, tiny):
    assert shards.is_sharded(cut)
    assert not shards.is_sharded(cut.parent / "model")
    (cut / "manifest.json").unlink()
    assert shards.is_sharded(cut)
    other = cut.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"settings": "of something else"}')
    assert not shards.is_sharded(other)


def test_the_door_accepts_shards_of_any_layout(cut, tmp_path, capsys):
    shutil.copy(ROOT / "checkpoints" / "demo" / "tokenizer.json", cut)
    config = tmp_path / "infer.yaml"
    config.write_text(f"model: {{path: {cut}}}\ninput: {{prompts: [a]}}\n")
    arguments = ["--config", str(config), "--check", "parallel.tp=2"]
    assert cli.main("infer", None, [*arguments, "parallel.pp=2"]) == EXIT_DONE
    assert cli.main("infer", None, arguments) == EXIT_DONE
    (cut / "rank-001.safetensors").unlink()
    assert cli.main("infer", None, arguments) == EXIT_CHECKPOINT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "rank-001.safetensors: missing" in error and "Traceback" not in error


@pytest.mark.parametrize("action", [open_source, shards.open_manifest])
def test_an_unfinished_folder_is_named_as_such(cut, action):
    (cut / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(str(cut))}: unfinished"):
        action(cut)


def test_files_that_are_gone_or_cut_short_are_named(cut):
    file = cut / "rank-002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"rank-002.*{len(content) - 1} bytes, manifest.json says {len(content)}"
    ):
        shards.open_manifest(cut)
    file.unlink()
    with pytest.raises(CheckpointError, match="rank-002.safetensors: missing"):
        shards.open_manifest(cut)


def test_a_file_may_be_a_link_and_a_name_may_not_lead_out_of_the_folder(cut):
    outside = cut.parent / "outside"
    (cut / "rank-001.safetensors").rename(outside)
    (cut / "rank-001.safetensors").symlink_to(outside)
    assert verify(cut).is_well
    manifest = manifests.read(cut)
    for name in ("../model/config.json", "/etc/passwd", "a//b", "a/../../b", "a\\b"):
        manifests.write(cut, replace(manifest, copies={name: "0" * 32}))
        with pytest.raises(CheckpointError, match="has a name that is not plain"):
            open_source(cut)


def test_a_file_of_another_rank_is_refused(tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", layers=3))
    convert(model, Layout(1, 2), tmp_path / "cut")
    first, second = (tmp_path / "cut" / f"rank-00{rank}.safetensors" for rank in (0, 1))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(CheckpointError, match="rank-000.safetensors"):
        open_source(tmp_path / "cut")


def test_a_pointer_in_place_of_a_file_is_explained(cut):
    file = cut / "rank-000.safetensors"
    size = file.stat().st_size
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n".ljust(size, b" "))
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_source(cut)


# ---- a manifest that can't be trusted ----------------------------------------------------------------------------


def forge(folder: Path, change) -> None:
    """Change the manifest's values and make its own digest right again."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    seal(path, values)


def seal(path: Path, values: object) -> None:
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "digest"}
    body = json.dumps(values, indent=2).removesuffix("\n}").encode() + b","
    path.write_bytes(body + f'\n  "digest": "{manifests.digest_of(body)}"\n}}\n'.encode())


def first_tensor(values):
    return values["files"]["rank-000.safetensors"]["tensors"]["embed.tokens.weight"]


def test_forging_without_a_change_is_accepted(cut):
    before = manifests.read(cut)
    forge(cut, lambda values: None)
    assert manifests.read(cut) == before
    open_source(cut)


FORGERIES = {
    "a rank file with a path for a name": lambda v: v["files"].update({"../../x": v["files"]["rank-000.safetensors"]}),
    "a copy with a path for a name": lambda v: v["copies"].update({"../x": "0" * 32}),
    "a digest that is no digest": lambda v: first_tensor(v)["ranges"][0].update(digest="nan"),
    "a digest that is a number": lambda v: first_tensor(v)["ranges"][0].update(digest=1.5),
    "a range that ends before it begins": lambda v: first_tensor(v)["ranges"][0].update(lo=9, hi=3),
    "a negative range": lambda v: first_tensor(v)["ranges"][0].update(lo=-1),
    "a range of another tensor": lambda v: first_tensor(v)["ranges"][0].update(hf="model.norm.weight"),
    "a tensor name with a path": lambda v: first_tensor(v)["ranges"][0].update(hf="../../x"),
    "another shape": lambda v: first_tensor(v).update(shape=[1, 1]),
    "a shape that is no list": lambda v: first_tensor(v).update(shape="19"),
    "another dtype": lambda v: first_tensor(v).update(dtype="F32"),
    "a dtype that weights can't have": lambda v: first_tensor(v).update(dtype="I64"),
    "a tensor too few": lambda v: v["files"]["rank-000.safetensors"]["tensors"].pop("embed.tokens.weight"),
    "a rank too few": lambda v: v["files"].pop("rank-003.safetensors"),
    "another layout": lambda v: v.update(layout={"tp": 4, "pp": 1}),
    "a layout of nothing": lambda v: v.update(layout={"tp": 0, "pp": 1}),
    "a huge layout": lambda v: v.update(layout={"tp": 1 << 60, "pp": 1}),
    "another version": lambda v: v.update(version=2),
    "another format": lambda v: v.update(format="tensors"),
    "a key too many": lambda v: v.update(extra=1),
    "a file of another size": lambda v: v["files"]["rank-000.safetensors"].update(nbytes=10),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_manifests_are_refused(change, cut):
    forge(cut, change)
    with pytest.raises(CheckpointError):
        open_source(cut)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace('"version": 1', '"version": NaN'), "NaN is not a JSON number"),
        (lambda text: text.replace('"bare": false', '"bare": false, "bare": true'), "the key 'bare' occurs twice"),
        (lambda text: text.replace('"lo": 0', '"lo": 1', 1), "its digest does not match"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[" * 100000, "damaged"),
        (lambda text: "[]", "not the manifest of rank shards"),
        (lambda text: "", "damaged"),
    ],
)
def test_damaged_manifests_are_refused_with_the_reason(change, reason, cut):
    path = cut / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match=reason):
        manifests.read(cut)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Shards, their manifest's values and the bytes of a rank file; for tests that put them back."""
    folder = tmp_path_factory.mktemp("sound")
    convert(write_model(folder / "model", Sizes("llama", layers=1)), Layout(2, 1), folder / "cut")
    return folder / "cut"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data(), value=JSON)
def test_fuzzed_manifests_end_in_a_reason(sound, data, value):
    """Any value in any place: understood or refused, never a crash."""
    path = sound / "manifest.json"
    whole = path.read_bytes()
    try:
        values = json.loads(whole)
        node = values
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = value
        seal(path, values)
        try:
            open_source(sound)
        except CheckpointError as error:
            assert str(sound) in str(error)
    finally:
        path.write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_fuzzed_rank_files_end_in_a_reason(sound, data):
    """Bytes of the header are changed, and the file is made longer or shorter; the manifest vouches for the rest."""
    path = sound / "rank-001.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([None, None, 0, 7, length, len(content) - 1]))]
    try:
        path.write_bytes(content)
        try:
            open_source(sound)
        except CheckpointError as error:
            assert str(sound) in str(error)
    finally:
        path.write_bytes(whole)
