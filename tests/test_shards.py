"""Rank shards: what a rank loads from them, what a folder says of itself, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Sizes, contents, write_model

from megalite import cli
from megalite.convert.convert import convert, export
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.errors import EXIT_CHECKPOINT, EXIT_DONE, CheckpointError
from megalite.model import families
from megalite.weights import copying, shards
from megalite.weights import manifest as manifests
from megalite.weights.checkpoint import open_checkpoint
from megalite.weights.manifest import WEIGHT
from megalite.weights.table import owned

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = [Layout(), Layout(3), Layout(2, 2), Layout(1, 2, interleave=2)]


@pytest.fixture
def cut(tmp_path):
    """A small model and its shards for tp=2,pp=2."""
    model = write_model(tmp_path / "model", Sizes("llama"))
    convert(model, Layout(2, 2), tmp_path / "cut", jobs=1)
    return tmp_path / "cut"


# ---- what a rank reads -------------------------------------------------------------------------------------------


def local(folder: Path, layout: Layout, rank: int) -> dict:
    from megalite.weights.transfer import read_parameters

    return dict(read_parameters(folder, families.read(folder), layout, rank, WEIGHT))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes("llama", layers=4, tied=True),
        Sizes("gpt2", layers=4, tied=True, dtype="F32"),
        Sizes("qwen3_moe", layers=4, vector_dtype="F32"),
    ],
    ids=lambda sizes: sizes.family,
)
def test_a_rank_reads_what_its_file_would_hold(sizes, tmp_path):
    """Out of shards of any layout; and that is what the model's own files hold, cut by hand."""
    import torch
    from safetensors.torch import load_file

    model = write_model(tmp_path / "model", sizes)
    whole, config = load_file(model / "model.safetensors"), families.read(model)
    for layout in LAYOUTS:
        convert(model, layout, tmp_path / str(layout))
    for layout in LAYOUTS:
        for rank in layout.ranks:
            want = load_file(tmp_path / str(layout) / manifests.file_name(rank))
            for one in owned(config, layout, rank):
                values = whole[one.piece.hf].narrow(one.piece.hf_dim, one.lo, one.count)
                here = want[one.piece.param].narrow(one.dim, one.start, one.count)
                assert torch.equal(here, values.t() if one.piece.transpose else values), one
            for source in LAYOUTS:
                got = local(tmp_path / str(source), layout, rank)
                assert got.keys() == want.keys()
                for name, values in want.items():
                    same = got[name].dtype == values.dtype and torch.equal(got[name], values)
                    assert same, f"{name} of rank {rank} in {layout} from {source}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama_tied", "bfloat16"), ("phi3", "float32"), ("gpt2_bare", "bfloat16"), ("qwen3_moe", "float32")],
)
def test_every_rank_of_a_decoder_is_filled_alike_from_any_form(name, dtype, tiny, ranks, tmp_path):
    convert(tiny(name), Layout(2, 2), tmp_path / "same")
    convert(tiny(name), Layout(3, 1), tmp_path / "other")
    counts = ranks(4).run(fill_alike, [tiny(name), tmp_path / "same", tmp_path / "other"], Layout(2, 2), dtype)
    assert min(counts) > 5


def fill_alike(rank: int, folders: list[Path], layout: Layout, dtype: str) -> int:
    """Fill a decoder from each folder; gives how many parameters there were to compare."""
    import torch

    from megalite.core.parallel_state import ParallelState
    from megalite.weights.dtypes import torch_dtype
    from megalite.weights.transfer import build, load_folder

    config, state, found = families.read(folders[0]), ParallelState(layout), []
    for folder in folders:
        decoder = build(config, state, dtype=torch_dtype(dtype), device=torch.device("cpu"))
        for param in decoder.parameters():
            param.data.fill_(torch.nan)
        load_folder(decoder, folder)
        found.append(dict(decoder.named_parameters()))
    for other, name in product(found[1:], found[0]):
        assert torch.equal(found[0][name], other[name]) and not other[name].isnan().any(), name
    return len(found[0])


@pytest.mark.parametrize("limits", [(64, 1 << 20, 128), (1 << 20, 8, 48), (1, 1 << 20, 1 << 20), (100, 1, 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bytes_are_the_same_however_they_are_read(family, limits, monkeypatch, tmp_path):
    """In requests, segments of rows and bands of all sizes."""
    for name, value in zip(("CHUNK_BYTES", "LONG_SEGMENT_BYTES", "BAND_BYTES"), limits, strict=True):
        monkeypatch.setattr(copying, name, value)
    model = write_model(tmp_path / "model", Sizes(family, dtype="F32"))
    convert(model, Layout(3, 2), tmp_path / "cut")
    convert(model, Layout(2, 2), tmp_path / "half", dtype="bfloat16")
    export(tmp_path / "cut", tmp_path / "back")
    monkeypatch.undo()
    assert verify(tmp_path / "cut", model).is_well and verify(tmp_path / "half", model).is_well
    assert contents(tmp_path / "back") == contents(model)


@pytest.mark.parametrize(
    ("source", "layout", "rank", "needed"),
    [
        (Layout(2, 2), Layout(2, 2), 3, {3}),  # its own, though the others have copies of the norms in it
        (Layout(2, 2), Layout(1, 2), 0, {0, 1}),
        (Layout(1, 4), Layout(2, 2), 2, {2, 3}),
        (Layout(4, 1), Layout(2, 1), 1, {0, 2, 3}),  # copies of norms are read from the first
    ],
)
def test_files_that_a_rank_does_not_need_are_not_read(source, layout, rank, needed, tmp_path):
    import torch

    convert(write_model(tmp_path / "model", Sizes("llama", layers=4, kv_heads=4)), source, tmp_path / "cut")
    want = local(tmp_path / "cut", layout, rank)
    files = open_checkpoint(tmp_path / "cut").files
    for other in set(source.ranks) - needed:
        file = tmp_path / "cut" / manifests.file_name(other)
        head = min(info.offset for info in files[file.name].values())
        file.write_bytes(file.read_bytes()[:head].ljust(file.stat().st_size, b"\0"))
    got = local(tmp_path / "cut", layout, rank)
    assert all(torch.equal(got[name], values) for name, values in want.items())
    file = tmp_path / "cut" / manifests.file_name(max(needed))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name}: damaged: tensor "):
        local(tmp_path / "cut", layout, rank)


# ---- what a folder says of itself --------------------------------------------------------------------------------


def test_knows_shards_from_models(cut):
    other = cut.parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"settings": "of something else"}')
    assert shards.is_sharded(cut)
    assert not shards.is_sharded(cut.parent / "model") and not shards.is_sharded(other)
    (cut / "manifest.json").unlink()
    assert shards.is_sharded(cut)
    for action in (open_checkpoint, shards.open_manifest):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(cut))}: unfinished"):
            action(cut)


def test_the_door_accepts_shards_of_any_layout(cut, tmp_path, capsys):
    shutil.copy(ROOT / "checkpoints" / "demo" / "tokenizer.json", cut)
    config = tmp_path / "infer.yaml"
    config.write_text(f"model: {{path: {cut}}}\ninput: {{prompts: [[1, 2]]}}\n")
    arguments = ["--config", str(config), "--check", "parallel.tp=2"]
    assert cli.main("infer", [*arguments, "parallel.pp=2"], []) == EXIT_DONE
    assert cli.main("infer", arguments, []) == EXIT_DONE
    (cut / "rank-001.safetensors").unlink()
    assert cli.main("infer", arguments, []) == EXIT_CHECKPOINT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "rank-001.safetensors: missing" in error and "Traceback" not in error


def test_files_that_are_not_what_the_manifest_says_are_named(cut):
    """Short, gone, of another rank, a pointer of Git LFS; a link to the file elsewhere is none of these."""
    file, size = cut / "rank-002.safetensors", (cut / "rank-002.safetensors").stat().st_size
    content = file.read_bytes()
    other = (cut / "rank-001.safetensors").read_bytes().ljust(size, b"\0")[:size]
    pointer = b"version https://git-lfs.github.com/spec/v1\n".ljust(size, b" ")
    for wrong, reason in (
        (content[:-1], f"rank-002.*{size - 1} bytes, manifest.json says {size}"),
        (None, "rank-002.safetensors: missing"),
        (other, "rank-002.safetensors"),
        (pointer, "git lfs pull"),
    ):
        file.write_bytes(wrong) if wrong is not None else file.unlink()
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(cut)
    (cut.parent / "outside").write_bytes(content)
    file.unlink()
    file.symlink_to(cut.parent / "outside")
    assert verify(cut).is_well


def test_layouts_that_no_model_could_have_are_refused(tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", layers=4))
    layout = Layout(1, 2, interleave=2)
    convert(model, layout, tmp_path / "interleaved")
    convert(model, Layout(1, 2), tmp_path / "cut")
    assert manifests.read(tmp_path / "interleaved").layout == layout
    assert "interleave" not in (tmp_path / "cut" / manifests.NAME).read_text()
    manifest, model = manifests.read(tmp_path / "cut"), families.read(tmp_path / "cut")
    for layout in (Layout(1, 5), Layout(1, 2, interleave=4)):
        with pytest.raises(CheckpointError, match="is not possible with 4 layers"):
            shards.file_extents(tmp_path / "cut", next(iter(manifest.files.values())), model, layout)


# ---- a manifest that can't be trusted ----------------------------------------------------------------------------


def seal(path: Path, values: object) -> None:
    """Write a manifest of any content, with the right digest of its own."""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "digest"}
    body = json.dumps(values, indent=2).removesuffix("\n}").encode() + b","
    path.write_bytes(body + f'\n  "digest": "{manifests.digest_of(body)}"\n}}\n'.encode())


def first_tensor(values):
    return values["files"]["rank-000.safetensors"]["tensors"]["embed.tokens.weight"]


def first_range(values):
    return first_tensor(values)["ranges"][0]


FORGERIES = {
    "a rank file with a path for a name": lambda v: v["files"].update({"../../x": v["files"]["rank-000.safetensors"]}),
    "a digest that is no digest": lambda v: first_range(v).update(digest="nan"),
    "a digest that is a number": lambda v: first_range(v).update(digest=1.5),
    "a range that ends before it begins": lambda v: first_range(v).update(lo=9, hi=3),
    "a negative range": lambda v: first_range(v).update(lo=-1),
    "a range of another tensor": lambda v: first_range(v).update(hf="model.norm.weight"),
    "a tensor name with a path": lambda v: first_range(v).update(hf="../../x"),
    "another shape": lambda v: first_tensor(v).update(shape=[1, 1]),
    "a shape that is no list": lambda v: first_tensor(v).update(shape="19"),
    "another dtype": lambda v: first_tensor(v).update(dtype="F32"),
    "a dtype that weights can't have": lambda v: first_tensor(v).update(dtype="I64"),
    "a tensor too few": lambda v: v["files"]["rank-000.safetensors"]["tensors"].pop("embed.tokens.weight"),
    "a rank too few": lambda v: v["files"].pop("rank-003.safetensors"),
    "another layout": lambda v: v.update(layout={"tp": 4, "pp": 1}),
    "a layout of nothing": lambda v: v.update(layout={"tp": 0, "pp": 1}),
    "a huge layout": lambda v: v.update(layout={"tp": 1 << 60, "pp": 1}),
    "interleaved by nothing": lambda v: v.update(layout={"tp": 2, "pp": 2, "interleave": 0}),
    "interleaved in one stage": lambda v: v.update(layout={"tp": 4, "pp": 1, "interleave": 2}),
    "interleaved by null": lambda v: v.update(layout={"tp": 2, "pp": 2, "interleave": None}),
    "another version": lambda v: v.update(version=2),
    "another format": lambda v: v.update(format="tensors"),
    "a key too many": lambda v: v.update(extra=1),
    "a file of another size": lambda v: v["files"]["rank-000.safetensors"].update(nbytes=10),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Shards for tests that change a file and put it back."""
    folder = tmp_path_factory.mktemp("sound")
    convert(write_model(folder / "model", Sizes("llama", layers=2)), Layout(2, 2), folder / "cut")
    return folder / "cut"


@pytest.fixture
def manifest(sound):
    """manifest.json, which is put back at the end."""
    path = sound / "manifest.json"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_manifests_are_refused(change, manifest):
    """Also where its own digest is right; what is written anew without a change is accepted."""
    before, values = manifests.read(manifest.parent), json.loads(manifest.read_text())
    seal(manifest, values)
    assert manifests.read(manifest.parent) == before
    change(values)
    seal(manifest, values)
    with pytest.raises(CheckpointError):
        open_checkpoint(manifest.parent)


@pytest.mark.parametrize("name", ["../model/config.json", "/etc/passwd", "a//b", "a/../../b", "a\\b"])
def test_names_of_copies_do_not_lead_out_of_the_folder(name, manifest):
    manifests.write(manifest.parent, replace(manifests.read(manifest.parent), copies={name: "0" * 32}))
    with pytest.raises(CheckpointError, match="has a name that is not plain"):
        open_checkpoint(manifest.parent)


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
def test_damaged_manifests_are_refused_with_the_reason(change, reason, manifest):
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(CheckpointError, match=reason):
        manifests.read(manifest.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=JSON)
def test_fuzzed_manifests_end_in_a_reason(sound, data, value):
    """Any value in any place: understood or refused, never a crash. Headers are fuzzed in test_hf."""
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
            open_checkpoint(sound)
        except CheckpointError as error:
            assert str(sound) in str(error)
    finally:
        path.write_bytes(whole)
