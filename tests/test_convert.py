"""Any layout to any layout and back, bit for bit; killed, resumed, refused and verified."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import random_configs
from forks import Forks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Sizes, contents, values_of, write_folder, write_model, write_tensors
from waiting import PATIENCE

from megalite.convert.convert import convert, export, parse_layout, reshard
from megalite.convert.output import NewFile, Output
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, ResourceError
from megalite.model import families
from megalite.weights import manifest as manifests
from megalite.weights import rounding
from megalite.weights.checkpoint import open_checkpoint
from megalite.weights.dtypes import STORAGE, WEIGHT_DTYPES, torch_dtype
from megalite.weights.hf import is_weights, read_headers
from megalite.weights.shards import JOURNAL, STEP
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import new_header

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", Sizes("llama"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def flip(path: Path, at: int, bit: int = 4) -> None:
    """Change one bit of a file; `at` counts from the end if it is negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ---- there and back ----------------------------------------------------------------------------------------------


@st.composite
def layouts(draw, layers: int) -> Layout:
    """Any that so many layers can be cut for, interleaved ones too."""
    tp, pp = draw(st.integers(1, 7)), draw(st.integers(1, layers))
    return Layout(tp, pp, interleave=draw(st.integers(1, layers // pp)) if pp > 1 else 1)


def drawn(family: str, seed: int, **changes: int) -> dict:
    """config.json of a random model of a family; `changes`: of its sizes."""
    chance = random.Random(seed)
    return random_configs.draw(chance, family, replace(random_configs.odd_sizes(chance), **changes))


def check_chain(folder: Path, model: Path, chain: list[Layout], *, jobs: int = 1, max_shard_bytes: int = 10**9) -> None:
    """Converted, resharded from layout to layout and exported: what was there. What comes out of a reshard is what
    comes out of a convert to the same layout."""
    here = folder / "0"
    convert(model, chain[0], here, jobs=jobs)
    for index, layout in enumerate(chain[1:], 1):
        reshard(here, layout, folder / str(index))
        here = folder / str(index)
    assert verify(here, model).findings == []
    convert(model, chain[-1], folder / "fresh")
    assert manifests.read(here).files == manifests.read(folder / "fresh").files
    export(here, folder / "back", max_shard_bytes=max_shard_bytes)
    assert contents(folder / "back") == contents(model)
    assert verify(folder / "back", folder / "fresh").is_well and verify(model, folder / "back").is_well
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / "back" / name).read_bytes() == (model / name).read_bytes()


@settings(max_examples=14, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=st.builds(drawn, st.sampled_from(sorted(families.FAMILIES)), st.integers(0, 10**6)),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    vector_dtype=st.sampled_from(["", "F32"]),
    files=st.integers(1, 3),
    data=st.data(),
)
def test_any_chain_of_layouts_gives_back_every_bit(tmp_path_factory, values, dtype, vector_dtype, files, data):
    layers = families.from_values(Path("config.json"), values).num_layers
    chain = data.draw(st.lists(layouts(layers), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("chain")
    try:
        model = write_folder(folder / "model", values, dtype=dtype, vector_dtype=vector_dtype, files=files)
        most = data.draw(st.sampled_from([1, 3000, 10**9]))
        check_chain(folder, model, chain, jobs=data.draw(st.integers(1, 3)), max_shard_bytes=most)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_goes_through_a_chain_of_layouts(family, tmp_path):
    model = write_folder(tmp_path / "model", drawn(family, 0, layers=2), dtype="BF16")
    convert(model, Layout(3), tmp_path / "cut")
    reshard(tmp_path / "cut", Layout(2, 2), tmp_path / "other")
    export(tmp_path / "other", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(model)


def test_transformers_loads_what_was_exported(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    original = tiny("gpt2_bare")
    convert(original, Layout(3, 2), tmp_path / "cut")
    export(tmp_path / "cut", tmp_path / "hf", max_shard_bytes=60_000)
    before, after = contents(original), contents(tmp_path / "hf")
    assert {key: before[key] for key in after} == after
    assert before.keys() - after.keys() == {"h.0.attn.bias"}, "which is no weight"
    logits = []
    for folder in (original, tmp_path / "hf"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        with torch.inference_mode():
            logits.append(model(torch.tensor([[5, 17, 3, 60, 8]])).logits)
    assert torch.equal(*logits)


BESIDE_TEXT = ("vision_tower.", "multi_modal_projector.", "model.visual.")


@pytest.mark.parametrize("name", ["gemma3_vision", "qwen3_5_moe"])
def test_text_parts_come_back(name, tiny, tmp_path):
    """Of a model within another, whose tensors stay behind."""
    original = tiny(name)
    convert(original, Layout(3), tmp_path / "cut")
    reshard(tmp_path / "cut", Layout(2, 2), tmp_path / "other")
    export(tmp_path / "other", tmp_path / "hf", max_shard_bytes=60_000)
    before, after = contents(original), contents(tmp_path / "hf")
    assert {key: before[key] for key in after} == after
    assert all(key.startswith(BESIDE_TEXT) for key in before.keys() - after.keys())
    assert verify(tmp_path / "other", original).is_well


def test_a_number_of_the_code_that_is_another_is_refused(tiny, tmp_path):
    model = tmp_path / "apertus"
    shutil.copytree(tiny("apertus"), model)
    info = read_headers(model).tensors["model.layers.1.mlp.act_fn.beta"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(np.float32(0.6).tobytes())
    with pytest.raises(CheckpointError, match="act_fn.beta is 0.6; only 0.5 is supported"):
        convert(model, Layout(), tmp_path / "cut")


# ---- dtypes ------------------------------------------------------------------------------------------------------


def test_dtypes_are_converted_as_torch_does():
    import torch

    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20_000, dtype=torch.float64, generator=generator)
    exact *= 2.0 ** torch.randint(-30, 15, exact.shape, generator=generator)
    exact = torch.cat([exact, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0 + 2**-9, 1.0 + 3 * 2**-9])])
    for source, target in product(WEIGHT_DTYPES, repeat=2):
        values = exact.clamp(-60000, 60000).to(torch_dtype(source))
        stored = values.view(torch.uint8).numpy().view(STORAGE[source])
        got = np.ascontiguousarray(rounding.convert(stored, source, target, "it")).view(np.uint8)
        want = values.to(torch_dtype(target)).view(torch.uint8).numpy()
        assert np.array_equal(got, want), f"{source} to {target}"
    odd = np.array([np.nan, 1.0, np.inf], np.float32)
    assert rounding.convert(odd, "F32", "BF16", "it").tolist() == [0x7FC0, 0x3F80, 0x7F80]
    assert np.isnan(rounding.convert(odd, "F32", "F16", "it")).tolist() == [True, False, False]


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path, out):
    model = write_model(tmp_path / "model", Sizes("llama", dtype="F32"))
    info = read_headers(model).tensors["model.norm.weight"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(np.float32(7e4).tobytes())
    with pytest.raises(CheckpointError, match=r"model.norm.weight: holds 70000, which is too large for F16"):
        convert(model, Layout(2), out, dtype="float16")
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_dtype_changes_weights_and_config(family, tmp_path):
    import torch

    model = write_model(tmp_path / "model", Sizes(family, dtype="F32"))
    convert(model, Layout(2, 2), tmp_path / "cut", dtype="bfloat16")
    report = verify(tmp_path / "cut", model)
    assert report.findings == [] and report.notes == ["compared after conversion: F32 there, BF16 here"]
    assert families.read(tmp_path / "cut").dtype == "bfloat16"
    export(tmp_path / "cut", tmp_path / "hf")
    before, after = contents(model), contents(tmp_path / "hf")
    for name, (dtype, shape, data) in after.items():
        values = torch.frombuffer(bytearray(before[name][2]), dtype=torch.float32).bfloat16()
        assert dtype == "BF16" and shape == before[name][1]
        assert bytes(values.view(torch.uint8).numpy()) == data


def test_weights_that_share_a_parameter_need_one_dtype(tmp_path, out):
    model = write_model(tmp_path / "model", Sizes("llama", dtype="F32"))
    name = "model.layers.0.self_attn.q_proj.weight"
    shapes = hf_shapes(families.read(model))
    entries = {key: ("F16" if key == name else "F32", shape) for key, shape in shapes.items()}
    write_tensors(model / "model.safetensors", entries, random.Random(0))
    with pytest.raises(CheckpointError, match="q_proj.weight is F16, .*k_proj.weight is F32.*--dtype"):
        convert(model, Layout(), out)
    convert(model, Layout(), out, dtype="float32")


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_layouts_as_they_are_written():
    assert parse_layout("tp=4,pp=2") == Layout(4, 2)
    assert parse_layout("pp=3") == Layout(1, 3)
    assert parse_layout("tp=1,pp=2,interleave=2") == Layout(1, 2, interleave=2)
    for text in ("", "tp", "tp=0", "tp=2,pp=x", "ep=2", "tp=2,dp=2", "tp=-1", "tp=2;pp=2", "tp=2,interleave=2"):
        with pytest.raises(ConfigError, match="--layout"):
            parse_layout(text)


def test_what_can_not_be_done_is_refused_and_leaves_nothing(model, tmp_path, out):
    cut, file = tmp_path / "cut", tmp_path / "file"
    convert(model, Layout(2), cut)
    file.write_text("")
    linked = shutil.copytree(model, tmp_path / "linked")
    (linked / "tokenizer_config.json").symlink_to(file)
    for action, reason in (
        (lambda: convert(cut, Layout(), out), "megalite reshard --from"),
        (lambda: reshard(model, Layout(), out), "megalite convert --model"),
        (lambda: convert(linked, Layout(), out), "outside the model folder"),
        (lambda: reshard(cut, Layout(1, 4), out), "pp must be at most the model's 3 layers, got 4"),
        (lambda: reshard(cut, Layout(), cut, overwrite=True), "is the folder that is read"),
        (lambda: reshard(cut, Layout(), "/proc/megalite"), "can't be written"),
        (lambda: reshard(cut, Layout(), file), "is a file"),
        (lambda: reshard(cut, Layout(), file / "x"), "can't be written"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=reason):
            action()
        assert not out.exists()


def test_nothing_is_overwritten_unasked(model, out):
    """And with it nothing of the old model is left: its chat template beside the new weights would be wrong."""
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds thesis.txt.*--overwrite"):
        convert(model, Layout(2), out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    convert(model, Layout(2), out, overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite"):
        convert(model, Layout(3), out)
    old = write_model(out.parent / "old", Sizes("llama", files=2))
    (old / "chat_template.jinja").write_text("of the old model")
    (old / "thesis.txt").write_text("mine")
    for folder in (out, old):
        convert(model, Layout(3), folder, overwrite=True)
        assert verify(folder, model).findings == []
        weights = {f"rank-00{rank}.safetensors" for rank in range(3)} | {"manifest.json"}
        beside = {"config.json", "generation_config.json", "tokenizer.json", "thesis.txt"}
        assert {path.name for path in folder.iterdir()} == weights | beside
        assert (folder / "thesis.txt").read_text() == "mine"


def test_an_export_is_known_again_by_its_bytes(model, tmp_path):
    """A Hugging Face folder does not say what it was made from; the same command again must not ask to overwrite it."""
    cut, out = tmp_path / "cut", tmp_path / "hf"
    convert(model, Layout(2), cut)
    assert convert(model, Layout(2), cut).was_done
    for size in (10**9, 3000):
        assert not export(cut, out, max_shard_bytes=size, overwrite=True).was_done
        (out / "thesis.txt").write_text("mine")
        assert export(cut, out, max_shard_bytes=size).was_done
        file = sorted(out.glob("*.safetensors"))[-1]
        for path, at in [(file, -1), (out / "tokenizer.json", 3), (out / "model.safetensors.index.json", -5)]:
            if path.exists():
                flip(path, at)
                with pytest.raises(ConfigError, match="already holds.*--overwrite"):
                    export(cut, out, max_shard_bytes=size)
                flip(path, at)
    with pytest.raises(ConfigError, match="--overwrite"):
        export(cut, out)
    with pytest.raises(ConfigError, match="Hugging Face layout already"):
        export(out, tmp_path / "x")


def test_more_files_than_may_be_open_at_first(model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for action in (
            lambda: convert(model, Layout(60), tmp_path / "a"),
            lambda: reshard(tmp_path / "a", Layout(50), tmp_path / "b"),
            lambda: verify(tmp_path / "b", model),
        ):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_disk_too_small_is_known_before_the_first_byte(out):
    files = [NewFile("rank-000.safetensors", b"", 1 << 60)]
    with pytest.raises(ResourceError, match=r"1048576 TiB are needed and .* are free"):
        Output(out, files, "work", overwrite=False).__enter__()
    assert list(out.iterdir()) == []


def test_a_disk_that_fills_up_is_reported_and_gone_on_with(model, out):
    """RLIMIT_FSIZE stands in for a full disk; the kernel answers alike."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="rank-000.safetensors: File too large. Free some space"):
            convert(model, Layout(2), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    convert(model, Layout(2), out)
    assert verify(out, model).findings == []


def test_two_at_once_do_not_mix(out):
    files = [NewFile("rank-000.safetensors", b"12345678", 10)]
    with (
        Output(out, files, "work", overwrite=False),
        pytest.raises(CheckpointError, match="another process is writing to it"),
    ):
        Output(out, files, "work", overwrite=False).__enter__()


def test_every_other_file_goes_along_in_subfolders_too(model, tmp_path):
    """There and back; not code, what is another form of the weights, a model or training run of its own, or hidden."""
    along = ("LICENSE", "NOTICE", "additional_chat_templates/tool_use.jinja", "assets/deep/a.svg", "b/c.json")
    other = ("b/consolidated.00.pth", "onnx/model.onnx", "pytorch_model.bin", ".git/config", "x/.hidden", "model.py")
    apart = ("checkpoint-5/config.json", "checkpoint-5/model.safetensors", "training/log.jsonl", "training/data/a.npy")
    for name in (*along, *other, *apart):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "assets" / "round").symlink_to(model / "assets")
    (tmp_path / "links").mkdir()
    for path in model.iterdir():  # as models are shared on a cluster
        (tmp_path / "links" / path.name).symlink_to(path)
    convert(tmp_path / "links", Layout(2), tmp_path / "cut")
    export(tmp_path / "cut", tmp_path / "out")
    assert verify(tmp_path / "cut", model).is_well
    for folder in (tmp_path / "cut", tmp_path / "out"):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        kept = {name for name in names if not is_weights(name) and name != "manifest.json"}
        assert kept == {"config.json", "generation_config.json", "tokenizer.json", *along}
        assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in kept)
    (tmp_path / "cut" / "assets" / "deep" / "a.svg").write_text("another")
    assert "not as it was when the shards were written" in verify(tmp_path / "cut").findings[0]
    (tmp_path / "cut" / "mine.txt").write_text("mine")
    convert(model, Layout(), tmp_path / "cut", overwrite=True)
    assert verify(tmp_path / "cut", model).is_well and (tmp_path / "cut" / "mine.txt").exists()


def test_a_damaged_source_is_not_passed_on(model, tmp_path):
    convert(model, Layout(2), tmp_path / "a")
    flip(tmp_path / "a" / "rank-001.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"rank-001.safetensors: damaged: tensor .*, .* (rows|columns) \d+"):
        reshard(tmp_path / "a", Layout(1), tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()


# ---- killed and resumed ------------------------------------------------------------------------------------------


def killed(forks: Forks, model: Path, out: Path, point: str = "shards.seal") -> None:
    """Converted to two files, but for what comes after a fault point."""
    run = forks.tool("convert", "--model", model, "--layout", "pp=2", "--out", out, "--jobs", 1, MEGALITE_FAULT=point)
    assert run.code == -signal.SIGKILL, run.err


def test_what_is_finished_when_it_is_killed_is_kept(forks, model, out):
    killed(forks, model, out, "shards.written#30=kill")
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(out)
    written = convert(model, Layout(1, 2), out)
    assert written.reused > 0 and written.nbytes > 0
    files = manifests.read(out).files.values()
    total = sum(math.prod(tensor.shape) * 2 for file in files for tensor in file.tensors.values())
    assert written.reused + written.nbytes == total
    assert verify(out, model).findings == []
    assert convert(model, Layout(1, 2), out).was_done


@pytest.mark.parametrize("damage", ["none", "file", "journal", "no journal"])
def test_killed_before_the_manifest_only_what_was_damaged_is_written_again(damage, forks, model, out):
    killed(forks, model, out, "shards.seal=kill")
    assert (out / "rank-000.safetensors").exists() and not (out / "manifest.json").exists()
    journal = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    if damage == "file":
        flip(out / "rank-001.safetensors", -3)
    if damage == "journal":
        nonsense = [b'{"work"\n', b"\xff\xfe\n", b"[1, 2]\n", b'{"file": 3, "digests": [1]}\n', b'{"file": "x"}\n']
        (out / JOURNAL).write_bytes(b"".join([journal[0], *nonsense, journal[1], journal[2][:40]]))
    if damage == "no journal":
        (out / JOURNAL).write_bytes(journal[0])
    written = convert(model, Layout(1, 2), out)
    assert (written.nbytes == 0) == (damage == "none") and (written.reused == 0) == (damage == "no journal")
    assert verify(out, model).findings == []


def test_an_unfinished_folder_is_not_taken_for_another_work(forks, model, out):
    killed(forks, model, out, "shards.seal=kill")
    with pytest.raises(ConfigError, match="an unfinished conversion of something else.*--overwrite"):
        convert(model, Layout(3), out)
    os.utime(model / "model.safetensors")  # the source may have changed
    with pytest.raises(ConfigError, match="something else"):
        convert(model, Layout(1, 2), out)
    convert(model, Layout(3), out, overwrite=True)
    assert verify(out, model).findings == []


@pytest.mark.parametrize(("tool", "jobs", "more"), [("convert", 1, []), ("export", 2, ["--max-shard-size", "40KB"])])
def test_killed_again_and_again_until_it_is_through(tool, jobs, more, forks, tmp_path, out):
    """Killed at the first step, run again and killed at the second, and so on: each change to the folder is the last
    of some run. What a reader takes for whole is whole every time, and so is the result."""
    model = write_model(tmp_path / "model", Sizes("qwen3", layers=2, vocab=600, files=2))
    convert(model, Layout(2, 2), tmp_path / "cut")
    arguments = ["--model", model, "--layout", "tp=1,pp=2"] if tool == "convert" else ["--from", tmp_path / "cut"]
    command = [tool, *arguments, *more, "--out", out, "--jobs", jobs]
    kills = 0
    while (code := forks.tool(*command, MEGALITE_FAULT=f"{STEP}#{kills + 1}=kill").code) == -signal.SIGKILL:
        kills += 1
        try:
            open_checkpoint(out)
        except CheckpointError:
            continue
        assert verify(out, model).findings == []
    assert code == 0 and kills > 8
    assert verify(out, model).findings == [] if tool == "convert" else contents(out) == contents(model)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert forks.tool(*command).code == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert not [name for name in before if name.startswith(".")]


# ---- verifying ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(model, tmp_path):
    convert(model, Layout(2, 2), tmp_path / "cut")
    return tmp_path / "cut"


def test_every_flipped_bit_is_found(cut, model):
    """In each file, at random places: headers, weights, manifest, config, tokenizer."""
    chance = random.Random(3)
    for path in sorted(cut.iterdir()):
        whole = path.read_bytes()
        for at in [0, 8, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(3))]:
            flip(path, at, chance.randrange(8))
            findings = verify(cut).findings
            assert findings and path.name in findings[0], (path.name, at)
            path.write_bytes(whole)
    assert verify(cut, model).is_well
    name = "layers.0.attn.qkv.weight"
    info = open_checkpoint(cut).files["rank-001.safetensors"][name]
    flip(info.file, info.offset)
    (finding,) = verify(cut).findings
    assert f"rank-001.safetensors: {name}: model.layers.0.self_attn.q_proj.weight rows 12..24" in finding


def test_files_in_the_wrong_place_are_found(cut):
    first, second = cut / "rank-000.safetensors", cut / "rank-001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    findings = verify(cut).findings
    assert len(findings) == 2 and "rank-000.safetensors: is the file rank-001.safetensors; were files" in findings[0]
    (cut / "rank-003.safetensors").unlink()
    file = cut / "rank-002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    (cut / "tokenizer.json").unlink()
    shutil.copy(first, cut / "rank-009.safetensors")
    findings = "\n".join(verify(cut).findings)
    assert "rank-003.safetensors: missing" in findings
    assert "rank-002.safetensors: cut short" in findings
    assert "tokenizer.json: can't be read: No such file" in findings
    assert "rank-009.safetensors: not listed" in findings
    (cut / "manifest.json").unlink()
    assert "unfinished" in verify(cut).findings[0]


def test_a_consistent_lie_is_found_against_the_original(cut, tmp_path):
    """A folder that agrees with itself but was made of other weights."""
    other = write_model(tmp_path / "other", Sizes("llama", seed=1))
    report = verify(cut, other)
    assert verify(cut).is_well
    assert len(report.findings) > 30 and f"differs from {other}" in report.findings[0]
    larger = write_model(tmp_path / "larger", Sizes("llama", vocab=40))
    assert "not the same model" in verify(cut, larger).findings[0]


def test_a_folder_in_hugging_face_layout_is_compared_or_checked_in_part(cut, model):
    note = "only headers were checked: a Hugging Face folder has no digests; use --against"
    assert verify(model).notes == [note] and verify(model, cut).is_well
    info = next(one for name, one in read_headers(model).tensors.items() if "attn" in name)
    flip(info.file, info.offset + 1)
    (finding,) = verify(model, cut).findings
    assert info.name in finding


# ---- memory ------------------------------------------------------------------------------------------------------


LARGE = {
    "llama": Sizes("llama", layers=3, kv_heads=4, group=4, head_dim=64, hidden=1024, inner=8192, vocab=10000),
    "gpt2": Sizes("gpt2", layers=1, kv_heads=32, group=1, head_dim=64, inner=8192, vocab=1000, dtype="F32"),
}
"""More than 200 MB of weights; the largest of gpt2 is 67 MB."""


@pytest.mark.parametrize("family", LARGE)
def test_memory_does_not_grow_with_the_model(family, tmp_path):
    """A few MiB a thread, and one whole matrix where it has to be turned (GPT-2); also when the dtype changes."""
    folder, sizes = tmp_path / "model", LARGE[family]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values_of(sizes)))
    entries = {name: (sizes.dtype, shape) for name, shape in hf_shapes(families.read(folder)).items()}
    header, infos = new_header(folder / "model.safetensors", entries, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + sum(info.nbytes for info in infos.values()))  # a hole
    code = (
        "import re, sys\n"
        "from megalite.core.layout import Layout\n"
        "from megalite.convert.convert import convert, export\n"
        "convert(sys.argv[1], Layout(3, 2 if sys.argv[4] == 'llama' else 1), sys.argv[2], jobs=2)\n"
        "export(sys.argv[2], sys.argv[3], jobs=2, dtype='float16')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", code, folder, tmp_path / "cut", tmp_path / "hf", family]
    peak = int(subprocess.check_output(command, text=True, cwd=ROOT, timeout=PATIENCE))
    assert sum(path.stat().st_size for path in (tmp_path / "cut").glob("rank-*")) > 200e6
    in_flight = 2 * 67e6 if family == "gpt2" else 0
    assert peak * 1024 < 120e6 + in_flight  # interpreter and numpy included
