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
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Sizes, values_of, write_model, write_tensors
from tiny_models import VARIANTS

from megalite.convert.convert import convert, export, parse_layout, reshard
from megalite.convert.output import NewFile, Output
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, ResourceError
from megalite.model import families
from megalite.weights import manifest as manifests
from megalite.weights.dtypes import STORAGE
from megalite.weights.dtypes import convert as convert_values
from megalite.weights.hf import is_weights, open_checkpoint
from megalite.weights.shards import JOURNAL, expected
from megalite.weights.sources import open_source
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import new_header

ROOT = Path(__file__).resolve().parent.parent


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a Hugging Face folder: dtype, shape and bytes."""
    with open_checkpoint(folder) as checkpoint:
        return {
            name: (info.dtype, info.shape, bytes(checkpoint.read_bytes(name)))
            for name, info in checkpoint.tensors.items()
        }


# ---- there and back ----------------------------------------------------------------------------------------------

SIZES = st.builds(
    Sizes,
    family=st.sampled_from(sorted(families.FAMILIES)),
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6]),
    hidden=st.integers(3, 20),
    inner=st.integers(1, 23),
    vocab=st.integers(3, 41),
    experts=st.integers(1, 5),
    tied=st.booleans(),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    vector_dtype=st.sampled_from(["", "F32"]),
    files=st.integers(1, 3),
    seed=st.integers(0, 1000),
)


@st.composite
def layouts(draw, layers: int) -> Layout:
    """Any that so many layers can be cut for, interleaved ones too."""
    tp, pp = draw(st.integers(1, 7)), draw(st.integers(1, layers))
    return Layout(tp, pp, interleave=draw(st.integers(1, layers // pp)) if pp > 1 else 1)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=SIZES, data=st.data())
def test_any_chain_of_layouts_gives_back_every_bit(tmp_path_factory, sizes, data):
    chain = data.draw(st.lists(layouts(sizes.layers), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("chain")
    try:
        model = write_model(folder / "model", sizes)
        here = folder / "0"
        convert(model, chain[0], here, jobs=data.draw(st.integers(1, 3)))
        for index, layout in enumerate(chain[1:], 1):
            reshard(here, layout, folder / str(index))
            here = folder / str(index)
        check_coverage(here, chain[-1])
        assert verify(here, model).findings == []
        export(here, folder / "back", max_shard_bytes=data.draw(st.sampled_from([1, 3000, 10**9])))
        assert contents(folder / "back") == contents(model)
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folder / "back" / name).read_bytes() == (model / name).read_bytes()
    finally:
        shutil.rmtree(folder)


def check_coverage(folder: Path, layout: Layout) -> None:
    """Rank files hold exactly what the layout asks for: every element of the model, and no gap in any parameter."""
    manifest = manifests.read(folder)
    model = families.read(folder)
    seen = {name: np.zeros(shape, bool) for name, shape in hf_shapes(model).items()}
    for rank in layout.ranks:
        file = manifest.files[f"rank-{rank:03d}.safetensors"]
        assert file.tensors.keys() == expected(model, layout, rank).keys()
        for tensor in file.tensors.values():
            covered = 0
            for one in tensor.ranges:
                where = [slice(None)] * seen[one.hf].ndim
                where[one.dim] = slice(one.lo, one.hi)
                seen[one.hf][tuple(where)] = True
                covered += seen[one.hf][tuple(where)].size
            assert covered == math.prod(tensor.shape)
    assert all(mask.all() for mask in seen.values())


@pytest.mark.parametrize("name", [*VARIANTS, "gpt2_bare"])
def test_transformers_loads_what_was_exported(name, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(tiny(name), Layout(3, 2), tmp_path / "a")
    reshard(tmp_path / "a", Layout(2, 3), tmp_path / "b")
    export(tmp_path / "b", tmp_path / "hf", max_shard_bytes=60_000)
    before, after = contents(tiny(name)), contents(tmp_path / "hf")
    assert {key: before[key] for key in after} == after
    assert before.keys() - after.keys() == ({"h.0.attn.bias"} if name == "gpt2_bare" else set())
    ids = torch.tensor([[5, 17, 3, 60, 8]])
    logits = []
    for folder in (tiny(name), tmp_path / "hf"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_a_fresh_convert_equals_a_reshard(tmp_path):
    """The same files come out, whichever way they were made."""
    model = write_model(tmp_path / "model", Sizes("qwen3_moe"))
    convert(model, Layout(2, 3), tmp_path / "a")
    reshard(tmp_path / "a", Layout(4, 2), tmp_path / "b")
    convert(model, Layout(4, 2), tmp_path / "c")
    for rank in range(8):
        name = f"rank-{rank:03d}.safetensors"
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert manifests.read(tmp_path / "b").files == manifests.read(tmp_path / "c").files


# ---- dtypes ------------------------------------------------------------------------------------------------------

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("target", TORCH)
@pytest.mark.parametrize("source", TORCH)
def test_dtypes_are_converted_as_torch_does(source, target):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, dtype=torch.float64, generator=generator)
    values *= 2.0 ** torch.randint(-30, 15, values.shape, generator=generator)
    values = torch.cat([values, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0 + 2**-9, 1.0 + 3 * 2**-9])])
    values = values.clamp(-60000, 60000).to(TORCH[source])
    stored = values.view(torch.uint8).numpy().view(STORAGE[source])
    got = convert_values(stored, source, target, "it")
    want = values.to(TORCH[target]).view(torch.uint8).numpy()
    assert np.array_equal(np.ascontiguousarray(got).view(np.uint8), want)


def test_not_a_number_stays_one():
    values = np.array([np.nan, 1.0, np.inf], np.float32)
    bits = convert_values(values, "F32", "BF16", "it")
    assert bits.tolist() == [0x7FC0, 0x3F80, 0x7F80]
    assert np.isnan(convert_values(values, "F32", "F16", "it")).tolist() == [True, False, False]


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", dtype="F32"))
    with open_checkpoint(model) as checkpoint:
        info = checkpoint.tensors["model.norm.weight"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(np.float32(7e4).tobytes())
    with pytest.raises(CheckpointError, match=r"model.norm.weight: holds 70000, which is too large for F16"):
        convert(model, Layout(2), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_dtype_changes_weights_and_config(tmp_path):
    model = write_model(tmp_path / "model", Sizes("phi3", dtype="F32"))
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


def test_weights_that_share_a_parameter_need_one_dtype(tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", dtype="F32"))
    name = "model.layers.0.self_attn.q_proj.weight"
    shapes = hf_shapes(families.read(model))
    entries = {key: ("F16" if key == name else "F32", shape) for key, shape in shapes.items()}
    write_tensors(model / "model.safetensors", entries, random.Random(0))
    with pytest.raises(CheckpointError, match="q_proj.weight is F16, .*k_proj.weight is F32.*--dtype"):
        convert(model, Layout(), tmp_path / "out")
    convert(model, Layout(), tmp_path / "out", dtype="float32")


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", Sizes("llama"))


@pytest.mark.parametrize("text", ["", "tp", "tp=0", "tp=2,pp=x", "ep=2", "tp=2,dp=2", "tp=-1", "tp=2;pp=2"])
def test_layouts_that_are_none(text):
    with pytest.raises(ConfigError, match="--layout"):
        parse_layout(text)


def test_layouts():
    assert parse_layout("tp=4,pp=2") == Layout(4, 2)
    assert parse_layout("pp=3") == Layout(1, 3)


def test_more_stages_than_layers_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="pp must be at most the model's 3 layers, got 4"):
        convert(model, Layout(1, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds thesis.txt.*--overwrite"):
        convert(model, Layout(2), out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    convert(model, Layout(2), out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="--overwrite"):
        convert(model, Layout(3), out)
    convert(model, Layout(3), out, overwrite=True)
    assert verify(out, model).findings == []
    assert len(list(out.glob("rank-*"))) == 3
    with pytest.raises(ConfigError, match="is the folder that is read"):
        reshard(out, Layout(1), out, overwrite=True)


def test_an_export_is_known_again_by_its_bytes(model, tmp_path):
    """A Hugging Face folder does not say what it was made from; the same command again must not ask to overwrite it."""
    cut, out = tmp_path / "cut", tmp_path / "hf"
    convert(model, Layout(2), cut)
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


def test_overwriting_leaves_nothing_of_the_old_model(model, tmp_path):
    """A chat template of another model beside the new weights would be wrong without a word."""
    old = write_model(tmp_path / "old", Sizes("llama", files=2))
    (old / "chat_template.jinja").write_text("of the old model")
    (old / "notes.txt").write_text("mine")
    convert(model, Layout(2), old, overwrite=True)
    assert verify(old, model).findings == []
    names = {path.name for path in old.iterdir()}
    weights = {"rank-000.safetensors", "rank-001.safetensors", "manifest.json"}
    assert names == weights | {"config.json", "generation_config.json", "tokenizer.json", "notes.txt"}


def test_more_files_than_may_be_open_at_first(model, tmp_path):
    command = 'ulimit -Sn 40; exec "$@"'
    tools = ROOT / "tools"
    for tool, *arguments in (
        ("convert", "--model", model, "--layout", "tp=60", "--out", tmp_path / "a"),
        ("reshard", "--from", tmp_path / "a", "--layout", "tp=50", "--out", tmp_path / "b"),
        ("verify", tmp_path / "b", "--against", model),
    ):
        whole = ["bash", "-c", command, "-", sys.executable, tools / f"{tool}.py", *arguments]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)


def test_each_form_has_its_tool(model, tmp_path):
    convert(model, Layout(2), tmp_path / "out")
    with pytest.raises(ConfigError, match="tools/reshard.py --from"):
        convert(tmp_path / "out", Layout(), tmp_path / "x")
    with pytest.raises(ConfigError, match="tools/convert.py --model"):
        reshard(model, Layout(), tmp_path / "x")
    with pytest.raises(ConfigError, match="Hugging Face layout already"):
        export(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_disk_too_small_is_known_before_the_first_byte(tmp_path):
    files = [NewFile("rank-000.safetensors", b"", 1 << 60)]
    with pytest.raises(ResourceError, match=r"1048576 TiB are needed and .* are free"):
        Output(tmp_path / "out", files, "work", overwrite=False).__enter__()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_is_reported_and_gone_on_with(model, tmp_path):
    """RLIMIT_FSIZE stands in for a full disk; the kernel answers alike."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="rank-000.safetensors: File too large. Free some space"):
            convert(model, Layout(2), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    convert(model, Layout(2), tmp_path / "out")
    assert verify(tmp_path / "out", model).findings == []


@pytest.mark.parametrize("where", ["/proc/megalite", "FILE", "FILE/x"])
def test_a_place_that_can_not_be_written_is_refused(where, model, tmp_path):
    (tmp_path / "file").write_text("")
    where = where.replace("FILE", str(tmp_path / "file"))
    with pytest.raises((CheckpointError, ConfigError), match="can't be written|is a file"):
        convert(model, Layout(2), where)


def test_a_tokenizer_that_links_elsewhere_is_not_copied(model, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (model / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside the model folder"):
        convert(model, Layout(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_other_file_goes_along_in_subfolders_too(model, tmp_path):
    """There and back; not what is another form of the weights, a model or a training run of its own, or hidden."""
    along = ("LICENSE", "NOTICE", "additional_chat_templates/tool_use.jinja", "assets/deep/a.svg", "b/c.json")
    other = ("b/consolidated.00.pth", "onnx/model.onnx", "pytorch_model.bin", ".git/config", "x/.hidden")
    apart = ("checkpoint-5/config.json", "checkpoint-5/model.safetensors", "training/log.jsonl", "training/data/a.npy")
    for name in (*along, *other, *apart):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "assets" / "round").symlink_to(model / "assets")
    convert(model, Layout(2), tmp_path / "cut")
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


def test_a_folder_of_links_is_a_model(model, tmp_path):
    """As models are shared on a cluster."""
    (model / "assets").mkdir()
    (model / "assets" / "a.txt").write_text("a")
    (tmp_path / "links").mkdir()
    for path in model.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    convert(tmp_path / "links", Layout(2), tmp_path / "cut")
    assert verify(tmp_path / "cut", model).is_well and (tmp_path / "cut" / "assets" / "a.txt").read_text() == "a"


def test_code_in_a_model_folder_stays_there(model, tmp_path):
    (model / "modeling_llama.py").write_text("raise SystemExit")
    convert(model, Layout(), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    copies = {"config.json", "generation_config.json", "tokenizer.json"}
    assert names == {"rank-000.safetensors", "manifest.json", *copies}


def test_a_damaged_source_is_not_passed_on(model, tmp_path):
    convert(model, Layout(2), tmp_path / "a")
    flip(tmp_path / "a" / "rank-001.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"rank-001.safetensors: damaged: tensor .*, .* (rows|columns) \d+"):
        reshard(tmp_path / "a", Layout(1), tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()


# ---- killed and resumed ------------------------------------------------------------------------------------------


def test_killed_once_it_goes_on_with_what_is_there(model, tmp_path):
    command = [sys.executable, "tools/convert.py", "--model", model, "--layout", "tp=2", "--out", tmp_path / "out"]
    killed = subprocess.run(
        [*command, "--jobs", "1"], cwd=ROOT, env={**os.environ, "MEGALITE_FAULT": "shards.written#12=kill"}
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="unfinished"):
        open_source(tmp_path / "out")
    outcome = convert(model, Layout(2), tmp_path / "out")
    assert outcome.reused > 0 and outcome.written > 0
    moved = manifests.read(tmp_path / "out").files.values()
    total = sum(math.prod(tensor.shape) * 2 for file in moved for tensor in file.tensors.values())
    assert outcome.reused + outcome.written == total
    assert verify(tmp_path / "out", model).findings == []
    assert convert(model, Layout(2), tmp_path / "out").was_done


def interrupted(model: Path, out: Path, point: str = "shards.seal=kill") -> None:
    command = [sys.executable, "tools/convert.py", "--model", model, "--layout", "tp=2", "--out", out]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "MEGALITE_FAULT": point})
    assert result.returncode == -signal.SIGKILL


def test_killed_before_the_manifest_nothing_is_written_again(model, tmp_path):
    interrupted(model, tmp_path / "out")
    assert (tmp_path / "out" / "rank-000.safetensors").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    outcome = convert(model, Layout(2), tmp_path / "out")
    assert outcome.written == 0 and outcome.reused > 0
    assert verify(tmp_path / "out", model).findings == []


def test_what_was_damaged_meanwhile_is_written_again(model, tmp_path):
    interrupted(model, tmp_path / "out")
    flip(tmp_path / "out" / "rank-001.safetensors", -3)
    outcome = convert(model, Layout(2), tmp_path / "out")
    assert 0 < outcome.written < outcome.reused
    assert verify(tmp_path / "out", model).findings == []


@pytest.mark.parametrize("journal", [b"", b'{"work"', b"\xff\xfe\n[]\n", b"[1, 2]\n" * 5])
def test_a_damaged_journal_costs_time_only(journal, model, tmp_path):
    interrupted(model, tmp_path / "out")
    path = tmp_path / "out" / JOURNAL
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + journal + rest[: len(rest) // 2])
    convert(model, Layout(2), tmp_path / "out")
    assert verify(tmp_path / "out", model).findings == []


def test_an_unfinished_folder_is_not_taken_for_another_work(model, tmp_path):
    interrupted(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="an unfinished conversion of something else.*--overwrite"):
        convert(model, Layout(3), tmp_path / "out")
    os.utime(model / "model.safetensors")  # the source may have changed
    with pytest.raises(ConfigError, match="something else"):
        convert(model, Layout(2), tmp_path / "out")
    convert(model, Layout(3), tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", model).findings == []


def test_two_at_once_do_not_mix(model, tmp_path):
    files = [NewFile("rank-000.safetensors", b"12345678", 10)]
    with (
        Output(tmp_path / "out", files, "work", overwrite=False),
        pytest.raises(CheckpointError, match="another process is writing to it"),
    ):
        Output(tmp_path / "out", files, "work", overwrite=False).__enter__()


@pytest.mark.parametrize(
    ("tool", "jobs", "more"), [("convert", 2, []), ("export", 1, []), ("export", 2, ["--max-shard-size", "900KB"])]
)
def test_killed_again_and_again_until_it_is_through(tool, jobs, more, tmp_path):
    """Killed at the first step, run again and killed at the second, and so on: each change to the folder is the last
    of some run. The result is whole, and what is written twice is bounded by what was in flight at the kills."""
    model = write_model(tmp_path / "model", Sizes("qwen3", layers=2, hidden=256, inner=500, vocab=1000, files=2))
    convert(model, Layout(2, 2), tmp_path / "cut")
    out, largest = tmp_path / "out", 1000 * 256 * 2
    arguments = ["--model", model, "--layout", "tp=3,pp=2"] if tool == "convert" else ["--from", tmp_path / "cut"]
    with Killed(tool, *arguments, *more, "--out", out, "--jobs", jobs) as killed:
        written = kills = 0
        while (code := killed.run(kills + 1)) == -signal.SIGKILL:
            kills += 1
            written += killed.written
            check_not_half_done(out, model)
        assert code == 0 and kills > 8
        if tool == "convert":
            assert verify(out, model).findings == []
        else:
            assert contents(out) == contents(model)
        total = sum(path.stat().st_size for path in out.iterdir())
        assert total <= written + killed.written <= total + kills * (jobs * 2 * largest + 100_000)
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        assert killed.run(10_000) == 0
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert not [name for name in before if name.startswith(".") or name.endswith(".part")]


class Killed:
    """Runs of a tool that end at a given step; see killed_tool.py."""

    def __init__(self, *command: object):
        script = [sys.executable, ROOT / "tests" / "killed_tool.py", *map(str, command)]
        self._process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.written = 0
        """Bytes that the last run wrote."""

    def run(self, step: int) -> int:
        """Return code of a run that is killed at a step, if it comes so far."""
        self._process.stdin.write(f"{step}\n")
        code, written = self._process.stdout.readline().split()
        self.written = int(written)
        return int(code)

    def __enter__(self) -> Killed:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def check_not_half_done(out: Path, model: Path) -> None:
    """Whatever a reader takes for whole is whole."""
    try:
        open_source(out)
    except CheckpointError:
        return
    assert verify(out, model).findings == []


# ---- verifying ---------------------------------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int = 4) -> None:
    """Change one bit of a file; `at` counts from the end if it is negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


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


def test_a_finding_names_file_tensor_and_range(cut):
    name = "layers.0.attn.qkv.weight"
    info = open_source(cut).files["rank-001.safetensors"][name]
    flip(info.file, info.offset)
    (finding,) = verify(cut).findings
    assert f"rank-001.safetensors: {name}: model.layers.0.self_attn.q_proj.weight rows 12..24" in finding


def test_swapped_shards_are_found(cut):
    first, second = cut / "rank-000.safetensors", cut / "rank-001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    findings = verify(cut).findings
    assert len(findings) == 2 and "rank-000.safetensors: is the file rank-001.safetensors; were files" in findings[0]


def test_missing_and_short_files_are_found(cut):
    (cut / "rank-003.safetensors").unlink()
    file = cut / "rank-002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    (cut / "tokenizer.json").unlink()
    shutil.copy(cut / "rank-000.safetensors", cut / "rank-009.safetensors")
    findings = "\n".join(verify(cut).findings)
    assert "rank-003.safetensors: missing" in findings
    assert "rank-002.safetensors: cut short" in findings
    assert "tokenizer.json: can't be read: No such file" in findings
    assert "rank-009.safetensors: not listed" in findings
    (cut / "manifest.json").unlink()
    assert "unfinished" in verify(cut).findings[0]


def test_a_consistent_lie_is_found_against_the_original(cut, model, tmp_path):
    """A folder that agrees with itself but was made of other weights."""
    other = write_model(tmp_path / "other", Sizes("llama", seed=1))
    report = verify(cut, other)
    assert verify(cut).is_well
    assert len(report.findings) > 30 and f"differs from {other}" in report.findings[0]
    larger = write_model(tmp_path / "larger", Sizes("llama", vocab=40))
    assert "not the same model" in verify(cut, larger).findings[0]


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_any_two_forms_can_be_compared(family, tmp_path):
    model = write_model(tmp_path / "model", Sizes(family, files=2))
    convert(model, Layout(3, 2), tmp_path / "a")
    convert(model, Layout(2, 1), tmp_path / "b")
    export(tmp_path / "a", tmp_path / "hf")
    folders = [model, tmp_path / "a", tmp_path / "b", tmp_path / "hf"]
    for here in folders:
        for there in folders:
            report = verify(here, there)
            assert report.findings == [] and report.ranges > 10
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        info = next(one for one in checkpoint.tensors.values() if "attn" in one.name and len(one.shape) == 2)
    flip(info.file, info.offset + 1)
    (finding,) = verify(tmp_path / "hf", tmp_path / "b").findings
    assert info.name in finding
    assert verify(tmp_path / "hf").notes == [
        "only headers were checked: a Hugging Face folder has no digests; use --against"
    ]


# ---- memory ------------------------------------------------------------------------------------------------------


LARGE = {
    "llama": Sizes("llama", layers=3, kv_heads=4, group=4, head_dim=64, hidden=1024, inner=8192, vocab=10000),
    "gpt2": Sizes("gpt2", layers=1, kv_heads=32, group=1, head_dim=64, inner=8192, vocab=1000, dtype="F32"),
}
"""More than 200 MB of weights; the largest of gpt2 is 67 MB."""


@pytest.mark.parametrize("family", LARGE)
def test_memory_does_not_grow_with_the_model(family, tmp_path):
    """A few MiB a thread, and one whole matrix where it has to be turned (GPT-2); also when the dtype changes."""
    write_zeros(tmp_path / "model", LARGE[family])
    code = (
        "import re, sys\n"
        "from megalite.core.layout import Layout\n"
        "from megalite.convert.convert import convert, export\n"
        "convert(sys.argv[1], Layout(3, 2 if sys.argv[4] == 'llama' else 1), sys.argv[2], jobs=2)\n"
        "export(sys.argv[2], sys.argv[3], jobs=2, dtype='float16')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "cut", tmp_path / "hf", family]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert sum(path.stat().st_size for path in (tmp_path / "cut").glob("rank-*")) > 200e6
    in_flight = 2 * 67e6 if family == "gpt2" else 0
    assert peak * 1024 < 120e6 + in_flight  # interpreter and numpy included


def write_zeros(folder: Path, sizes: Sizes) -> None:
    """A large model whose file is a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values_of(sizes)))
    shapes = hf_shapes(families.read(folder))
    path = folder / "model.safetensors"
    header, infos = new_header(path, {name: (sizes.dtype, shape) for name, shape in shapes.items()}, {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(info.nbytes for info in infos.values()))
