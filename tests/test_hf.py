"""Opening checkpoints: folders, ranges, damaged and hostile files, and the hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM
from waiting import PATIENCE

from megalite import cli
from megalite.convert.convert import convert
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model.families import read, weight_names
from megalite.weights import tensor_file
from megalite.weights.hf import INDEX, SINGLE, open_checkpoint, resolve
from megalite.weights.tensor_file import read_header


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int = 0, end: int = 16, dtype: str = "F32", shape: object = (2, 2)) -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


GOOD = container({"a.weight": entry()}, bytes(16))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


# ---- reading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, tensors) of a file with every kind of shape and dtype that matters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(37, 19, generator=generator),
        "half": torch.randn(8, 6, generator=generator).bfloat16(),
        "vector": torch.randn(23, generator=generator).half(),
        "double": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(4, 3, 2, generator=generator),
        "mask": torch.ones(5, dtype=torch.bool),
    }
    folder = tmp_path_factory.mktemp("saved")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder, tensors


def test_every_range_equals_the_slice(saved):
    folder, tensors = saved
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        assert checkpoint.nbytes == sum(values.nbytes for values in tensors.values())
        for name in tensors.keys() - {"mask"}:
            want = tensors[name]
            whole = checkpoint.read(name)
            assert whole.dtype == want.dtype and torch.equal(whole, want)
            for dim in range(min(want.dim(), 2) if want.dim() != 3 else 1):
                size = want.shape[dim]
                for lo, hi in ((0, size), (0, 0), (1, size), (0, size - 1), (2, 3), (size, size)):
                    if 0 <= lo <= hi <= size:
                        assert torch.equal(checkpoint.read(name, dim, lo, hi), want.narrow(dim, lo, hi - lo)), name


@pytest.mark.parametrize("chunk, segment", [(64, 1 << 20), (1 << 20, 8), (1, 1 << 20)])
def test_columns_are_the_same_however_they_are_read(saved, monkeypatch, chunk, segment):
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(tensor_file, "LONG_SEGMENT_BYTES", segment)
    folder, tensors = saved
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("matrix", 1, 5, 12), tensors["matrix"][:, 5:12])
        assert torch.equal(checkpoint.read("matrix"), tensors["matrix"])


def test_reading_goes_on_after_close(saved):
    folder, tensors = saved
    checkpoint = open_checkpoint(folder)
    for _ in range(2):
        assert torch.equal(checkpoint.read("vector"), tensors["vector"])
        checkpoint.close()


def test_only_floating_point_tensors_are_weights(saved):
    with open_checkpoint(saved[0]) as checkpoint, pytest.raises(CheckpointError, match="mask is BOOL; weights must be"):
        checkpoint.read("mask")


def test_a_range_beyond_the_tensor_is_the_callers_mistake(saved):
    with open_checkpoint(saved[0]) as checkpoint:
        for dim, lo, hi in ((0, 0, 38), (0, 5, 4), (0, -1, 2), (1, 0, 20)):
            with pytest.raises(ValueError, match="elements along dim"):
                checkpoint.read("matrix", dim, lo, hi)
        with pytest.raises(ValueError, match="can't be read along dim 1"):
            checkpoint.read("vector", 1, 0, 1)


def test_a_column_read_takes_little_more_memory_than_it_returns(tmp_path):
    """Peak of a fresh process: one chunk and the result, not the tensor."""
    save_file({"big": torch.zeros(64 << 10, 512)}, tmp_path / SINGLE)  # 128 MiB
    code = (
        "import resource\nfrom megalite.weights.hf import open_checkpoint\n"
        f"checkpoint = open_checkpoint({str(tmp_path)!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoint.read_bytes('big', 1, 0, 16)\n"  # 4 MiB
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert int(done.stdout) < 40 << 10


def test_opening_needs_no_torch(saved):
    code = (
        "import sys\nfrom megalite.weights.hf import open_checkpoint\n"
        f"assert len(open_checkpoint({str(saved[0])!r}).read_bytes('matrix', 1, 2, 4)) == 37 * 2 * 4\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_shards_read_as_one(tiny):
    folder = tiny("llama_sharded")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    with open_checkpoint(folder) as checkpoint:
        for shard in shards:
            for name, values in load_file(shard).items():
                assert torch.equal(checkpoint.read(name), values)


def test_a_bare_model_gets_full_names(tiny):
    names = weight_names(read(tiny("gpt2")))
    bare, full = (open_checkpoint(tiny(one), names=names) for one in ("gpt2_bare", "gpt2"))
    assert full.tensors.keys() < bare.tensors.keys()
    assert torch.equal(bare.read("transformer.wte.weight"), full.read("transformer.wte.weight"))


def test_the_head_has_no_prefix_either_way(folder, tiny):
    header = {"wte.weight": entry(), "lm_head.weight": entry(16, 32)}
    (folder / SINGLE).write_bytes(container(header, bytes(32)))
    untied = replace(weight_names(read(tiny("gpt2"))), tied_head=None)
    assert set(open_checkpoint(folder, names=untied).tensors) == {"transformer.wte.weight", "lm_head.weight"}


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
def test_a_tied_embedding_is_read_as_transformers_reads_it(variant, tiny, tmp_path):
    """Stored as the head alone, as safetensors' save_model does; as both; listed as the head and absent."""
    original, names = tiny(variant), weight_names(read(tiny(variant)))
    model = AutoModelForCausalLM.from_pretrained(original)
    folders = {way: shutil.copytree(original, tmp_path / way) for way in ("alone", "both", "listed", "different")}
    save_model(model, str(folders["alone"] / SINGLE), metadata={"format": "pt"})
    assert names.embed.hf not in load_file(folders["alone"] / SINGLE)
    tensors = {name: values.clone() for name, values in model.state_dict().items()}
    save_file(tensors, folders["both"] / SINGLE, metadata={"format": "pt"})
    listed = folders["listed"]
    (listed / SINGLE).rename(listed / "m-1.safetensors")
    write_index(listed, dict.fromkeys([*load_file(listed / "m-1.safetensors"), "lm_head.weight"], "m-1.safetensors"))
    ids = torch.arange(3, 15)[None]
    for way in ("alone", "both", "listed"):
        theirs = AutoModelForCausalLM.from_pretrained(folders[way])
        assert torch.equal(theirs(ids).logits, model(ids).logits)
        convert(folders[way], Layout(2), tmp_path / f"{way}-cut")
        assert verify(tmp_path / f"{way}-cut", original).is_well
    tensors["lm_head.weight"] += 1
    save_file(tensors, folders["different"] / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head.weight is not .* set tie_word_embeddings to false"):
        open_checkpoint(folders["different"], names=names)


# ---- damaged and hostile files

DAMAGED = {
    "empty": (b"", "cut short or not a safetensors file"),
    "seven bytes": (b"1234567", "cut short or not a safetensors file"),
    "header longer than the file": (container({}, length=1000), "cut short or not a safetensors file"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "cut short or not a safetensors file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "data cut short": (GOOD[:-1], "cut short: "),
    "more data": (GOOD + b"\0", "1 bytes more than its header accounts for"),
    "not JSON": (container(b"{'a': 1}"), "header is damaged"),
    "not UTF-8": (container(b"\xff\xfe"), "header is damaged"),
    "deep nesting": (container(b"[" * 100_000), "header is damaged"),
    "a list": (container([1]), "header is damaged: not an object"),
    "a name twice": (container(b'{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
    "a key twice": (
        container(b'{"a": {"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "the key 'dtype' occurs twice",
    ),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__ in the header must map"),
    "entry a number": (container({"a": 1}), "must have exactly dtype, shape and data_offsets"),
    "entry with more": (container({"a": {**entry(), "x": 1}}, bytes(16)), "must have exactly"),
    "unknown dtype": (container({"a": entry(dtype="F7")}, bytes(16)), "has an unknown dtype 'F7'"),
    "dtype a list": (container({"a": {**entry(), "dtype": ["F32"]}}, bytes(16)), "has an unknown dtype"),
    "negative shape": (container({"a": entry(shape=(-2, -2))}, bytes(16)), "has a damaged shape"),
    "bool shape": (container({"a": entry(0, 4, shape=[True])}, bytes(4)), "has a damaged shape"),
    "float shape": (container({"a": entry(shape=[4.0])}, bytes(16)), "has a damaged shape"),
    "shape of 17 dims": (container({"a": entry(0, 4, shape=(1,) * 17)}, bytes(4)), "has a damaged shape"),
    "shape that overflows": (container({"a": entry(shape=(2**32, 2**32, 4))}, bytes(16)), "has 16 bytes, which is not"),
    "bytes against shape": (container({"a": entry(shape=(2, 3))}, bytes(16)), "has 16 bytes, which is not"),
    "offsets reversed": (container({"a": entry(16, 0)}, bytes(16)), "has damaged offsets"),
    "offsets negative": (container({"a": entry(-16, 0)}, bytes(16)), "has damaged offsets"),
    "three offsets": (container({"a": {**entry(), "data_offsets": [0, 8, 16]}}, bytes(16)), "has damaged offsets"),
    "overlap": (container({"a": entry(), "b": entry(8, 24)}, bytes(24)), "tensor b overlaps"),
    "same place": (container({"a": entry(), "b": entry()}, bytes(16)), "tensor b overlaps"),
    "gap": (container({"a": entry(), "b": entry(20, 36)}, bytes(36)), "tensor b leaves a gap"),
    "gap at the start": (container({"a": entry(4, 20)}, bytes(20)), "tensor a leaves a gap"),
    "name a path": (container({"../../x": entry()}, bytes(16)), "does not have a plain name"),
    "name absolute": (container({"/etc/passwd": entry()}, bytes(16)), "does not have a plain name"),
    "name with a newline": (container({"a\nb": entry()}, bytes(16)), "does not have a plain name"),
    "name empty": (container({"": entry()}, bytes(16)), "does not have a plain name"),
}


@pytest.mark.parametrize("data, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(folder, data, message):
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert str(folder / SINGLE) in text and len(text.splitlines()) == 1 and len(text) < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "", "\ud800", "a/../b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(entry())), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=8), VALUES | st.just(entry()), max_size=3), data=st.binary(max_size=32))
def test_whatever_a_header_says_the_answer_is_tensors_or_a_message(tmp_path_factory, header, data):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(container(header, data))
    try:
        tensors = read_header(file)
    except CheckpointError as error:
        assert len(str(error)) < 1000
    else:
        assert sum(info.nbytes for info in tensors.values()) == len(data)


def test_a_header_beyond_the_limit_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 10)
    (folder / SINGLE).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="at most 10 are believed"):
        open_checkpoint(folder)


def test_padding_and_order_of_the_header_do_not_matter(folder):
    header = json.dumps({"b": entry(16, 32), "a": entry(), "none": entry(16, 16, shape=(0,))}).encode() + b"   "
    (folder / SINGLE).write_bytes(container(header, bytes(range(32))))
    tensors = read_header(folder / SINGLE)
    assert list(tensors) == ["a", "none", "b"]
    assert tensors["b"].offset == 8 + len(header) + 16


def test_a_file_that_shrinks_while_open_is_noticed(folder):
    (folder / SINGLE).write_bytes(GOOD)
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / SINGLE, len(GOOD) - 4)
        with pytest.raises(CheckpointError, match=r"ends inside tensor a\.weight"):
            checkpoint.read("a.weight")


def test_a_pipe_is_not_opened(folder):
    os.mkfifo(folder / SINGLE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(folder)


def write_index(folder, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "..safetensors", "", 3, None]
)
def test_an_index_may_only_name_files_of_its_folder(folder, shard):
    (folder.parent / "x.safetensors").write_bytes(GOOD)
    write_index(folder, {"a.weight": shard})
    with pytest.raises(CheckpointError, match="is not the plain name of a safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map(folder, weight_map):
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="weight_map is missing or empty"):
        open_checkpoint(folder)


def test_missing_shards_are_counted_and_named(folder):
    (folder / "m-1.safetensors").write_bytes(GOOD)
    write_index(folder, {f"t{i}": f"m-{i}.safetensors" for i in range(1, 7)} | {"a.weight": "m-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"5 of the 6 weight files .* \(m-2\.safetensors, .*\.\.\.\).* again"):
        open_checkpoint(folder)


def test_an_index_that_disagrees_with_its_files(folder):
    (folder / "m-1.safetensors").write_bytes(GOOD)
    (folder / "m-2.safetensors").write_bytes(container({"b.weight": entry()}, bytes(16)))
    write_index(folder, {"a.weight": "m-2.safetensors", "b.weight": "m-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"a\.weight is not in m-2\.safetensors, where the index says"):
        open_checkpoint(folder)
    (folder / "m-2.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"a\.weight is also in m-1\.safetensors"):
        open_checkpoint(folder)


def test_weights_may_be_links_to_anywhere(folder):
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(GOOD)
    (folder / SINGLE).symlink_to(outside)
    assert set(open_checkpoint(folder).tensors) == {"a.weight"}
    snapshot = folder.parent / "models--o--n" / "snapshots" / "abc"
    blobs = folder.parent / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_bytes(GOOD)
    (snapshot / SINGLE).symlink_to("../../blobs/hash")
    assert set(open_checkpoint(snapshot).tensors) == {"a.weight"}


def test_a_link_to_nothing_is_named(folder):
    (folder / SINGLE).symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: can't be read: No such file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name, message",
    [
        ("pytorch_model.bin", "PyTorch pickles can run code when read.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch pickles"),
        ("model.pth", "PyTorch pickles"),
        ("model-q4.gguf", "GGUF is not read"),
        ("tf_model.h5", "TensorFlow"),
        ("model-00001-of-00002.safetensors", "Download the index too"),
        ("training_args.bin", "has no weights"),
        ("README.md", "has no weights"),
    ],
)
def test_other_weight_formats_are_refused_with_the_way_out(folder, name, message):
    (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_what_is_not_a_model_folder(folder, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no such model folder \(a model of the hub is written owner/name\)"):
        resolve(folder / "nowhere")
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match="a model is a folder, this is a file"):
        resolve(folder / "file")
    monkeypatch.chdir(folder.parent)  # `model/typo` looks like owner/name, but its parent is a folder here
    with pytest.raises(CheckpointError, match="no such model folder"):
        resolve("model/typo")


# ---- the hub

REPO = "owner/tiny-model"
SHARD = container({"b.weight": entry()}, bytes(16))
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "m-1.safetensors": GOOD,
    "m-2.safetensors": SHARD,
    INDEX: json.dumps({"weight_map": {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors"}}).encode(),
    "README.md": b"not needed",
    "pytorch_model.bin": b"not wanted",
    "consolidated.safetensors": b"a second copy",
    "onnx/model.safetensors": b"another format",
}
NEEDED = sorted(["config.json", "tokenizer.json", "chat_template.jinja", "m-1.safetensors", "m-2.safetensors", INDEX])
CODE = """
import sys
from megalite.errors import CheckpointError
from megalite.weights.hf import open_checkpoint, resolve
repo, revision, weights = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "weights"
try:
    folder = resolve(repo, revision, weights=weights)
    print(folder, *(open_checkpoint(repo, revision).tensors if weights else ()), sep="\\n")
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.add(REPO, FILES)
        yield hub


def load(hub, cache, repo=REPO, revision="", weights=True, **env):
    """(folder and tensor names, error) of a process that resolves and opens a hub id."""
    command = [sys.executable, "-c", CODE, repo, revision, "weights" if weights else "config"]
    done = subprocess.run(command, env=hub.environment(cache, **env), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()[-1] if done.returncode else ""


def test_a_model_is_downloaded_once_and_only_what_is_needed(hub, tmp_path):
    (folder, *tensors), error = load(hub, tmp_path)
    assert tensors == ["a.weight", "b.weight"] and not error
    assert hub.downloads() == NEEDED
    assert load(hub, tmp_path)[0] == [folder, *tensors]
    assert hub.downloads() == []


def test_configuration_alone(hub, tmp_path):
    load(hub, tmp_path, weights=False)
    assert hub.downloads() == ["chat_template.jinja", "config.json", INDEX, "tokenizer.json"]


def test_of_subfolders_only_that_of_chat_templates_is_needed(hub, tmp_path):
    template = "additional_chat_templates/tool_use.jinja"
    hub.add(REPO, {**FILES, template: b"t", "onnx/config.json": b"{}", "a/b.jinja": b""})
    (folder, *_), _ = load(hub, tmp_path)
    assert set(hub.downloads()) == {*NEEDED, "tool_use.jinja"} and (Path(folder) / template).is_file()


def test_gguf_is_answered_with_the_way_out(hub, tmp_path):
    hub.add("owner/quantized", {"tiny-q8.gguf": b"GGUF", "README.md": b""})
    said = load(hub, tmp_path, "owner/quantized")[1]
    assert 'from_pretrained("owner/quantized", gguf_file="tiny-q8.gguf")' in said and not hub.downloads()
    (tmp_path / "tiny-q8.gguf").write_bytes(b"GGUF")
    for action in (
        lambda: read(tmp_path),
        lambda: resolve(tmp_path / "tiny-q8.gguf"),
        lambda: read(tmp_path / "tiny-q8.gguf"),
        lambda: open_checkpoint(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="tiny-q8.gguf: GGUF is not read. Give the folder or hub id") as error:
            action()
        command = shlex.split(str(error.value).splitlines()[1])
        assert command[:2] == ["python", "-c"] and f'"{tmp_path}", gguf_file="tiny-q8.gguf"' in command[2]
        compile(command[2], "the command", "exec")


@pytest.mark.parametrize("job", ["infer", "train", "hybrid"])
def test_every_job_answers_a_gguf_file(job, tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "job.yaml").write_text("{}")
    for path in (tmp_path, tmp_path / "a.gguf"):
        assert cli.main(job, None, ["--config", str(tmp_path / "job.yaml"), "--check", f"model.path={path}"]) != 0
        assert "GGUF is not read. Give the folder or hub id" in capsys.readouterr().err


def test_a_revision(hub, tmp_path):
    commit = hub.add(
        REPO, {**FILES, "m-2.safetensors": container({"b.weight": entry(), "c": entry(16, 32)}, bytes(32))}, "v2"
    )
    assert load(hub, tmp_path, revision="v2")[0][1:] == ["a.weight", "b.weight", "c"]
    assert load(hub, tmp_path, revision=commit)[0][1:] == ["a.weight", "b.weight", "c"]
    assert load(hub, tmp_path)[0][1:] == ["a.weight", "b.weight"]
    assert "has no revision v3" in load(hub, tmp_path, revision="v3")[1]


def test_offline_uses_the_cache(hub, tmp_path):
    downloaded = load(hub, tmp_path)[0]
    hub.requests.clear()
    assert load(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == downloaded
    assert hub.requests == []
    _, error = load(hub, tmp_path, repo="owner/other", HF_HUB_OFFLINE="1")
    assert error.startswith("owner/other: no such folder, the hub can't be asked for it")
    assert "not in the cache" in error


def test_a_hub_that_refuses_connections(hub, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    _, error = load(hub, tmp_path, HF_ENDPOINT=address)
    assert "the hub can't be asked for it" in error and "Check the name and the network" in error
    downloaded = load(hub, tmp_path)[0]
    assert load(hub, tmp_path, HF_ENDPOINT=address)[0] == downloaded


@pytest.mark.slow
def test_a_hub_that_never_answers(hub, tmp_path):
    hub.hang.set()
    _, error = load(hub, tmp_path)
    assert "the hub can't be asked for it" in error


def test_models_that_one_may_not_have(hub, tmp_path):
    assert "neither a folder here nor a model of the hub" in load(hub, tmp_path, repo="owner/nothing")[1]
    hub.gated.add(REPO)
    assert "its owner must grant access" in load(hub, tmp_path)[1]


def test_an_interrupted_download_is_said_so_and_goes_on(hub, tmp_path):
    hub.commits[hub.revisions[REPO, "main"]] = {**FILES, "m-2.safetensors": SHARD[:-16] + bytes(16)}
    hub.cut_after = len(SHARD) - 8
    _, error = load(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert "the download failed" in error and "Run it again to go on" in error
    _, error = load(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "only part of it is in the cache" in error or "weight files that" in error
    hub.cut_after = None
    assert load(hub, tmp_path)[0][1:] == ["a.weight", "b.weight"]


def test_a_half_downloaded_snapshot_names_the_missing_file(hub, tmp_path):
    (folder, *_), _ = load(hub, tmp_path)
    os.unlink(os.path.join(folder, "m-2.safetensors"))
    _, error = load(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "m-2.safetensors" in error or "only part of it is in the cache" in error
    with pytest.raises(CheckpointError, match=r"1 of the 2 weight files .*m-2\.safetensors"):
        open_checkpoint(folder)
    assert load(hub, tmp_path)[0][1:] == ["a.weight", "b.weight"]
