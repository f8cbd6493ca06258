"""Opening model folders: headers, names, damaged and hostile files, and the hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import contents, read_bytes
from safetensors.torch import load_file, save_file

from megalite import cli
from megalite.convert.convert import convert
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model.families import read, weight_names
from megalite.weights import tensor_file
from megalite.weights.copying import OpenFiles, digest_extent
from megalite.weights.hf import INDEX, SINGLE, read_headers, resolve
from megalite.weights.moves import hf_extents
from megalite.weights.tensor_file import read_header


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int = 0, end: int = 16, dtype: str = "F32", shape: object = (2, 2)) -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


GOOD = container({"a.weight": entry()}, bytes(16))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


# ---- reading


def test_headers_say_where_what_safetensors_saved_lies(folder):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "matrix": torch.randn(37, 19),
        "half": torch.randn(8, 6).bfloat16(),
        "vector": torch.randn(23).half(),
        "double": torch.randn(3, 4, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(4, 3, 2),
        "mask": torch.ones(5, dtype=torch.bool),
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    found = read_headers(folder).tensors
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert found[name].shape == tuple(values.shape) and read_bytes(found[name]) == data, name


def test_padding_and_order_of_the_header_do_not_matter(folder):
    header = json.dumps({"b": entry(16, 32), "a": entry(), "none": entry(16, 16, shape=(0,))}).encode() + b"   "
    (folder / SINGLE).write_bytes(container(header, bytes(range(32))))
    tensors = read_header(folder / SINGLE)
    assert list(tensors) == ["a", "none", "b"]
    assert tensors["b"].offset == 8 + len(header) + 16


def test_shards_read_as_one(tiny):
    shards = sorted(tiny("llama_sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert read_headers(tiny("llama_sharded")).tensors == {k: v for one in shards for k, v in read_header(one).items()}


def test_a_bare_model_gets_full_names(tiny, folder):
    names = weight_names(read(tiny("gpt2")))
    bare, full = (read_headers(tiny(one), names) for one in ("gpt2_bare", "gpt2"))
    assert bare.bare and not full.bare and full.tensors.keys() < bare.tensors.keys()
    name = "transformer.wte.weight"
    assert read_bytes(bare.tensors[name]) == read_bytes(full.tensors[name])
    header = {"wte.weight": entry(), "lm_head.weight": entry(16, 32)}
    (folder / SINGLE).write_bytes(container(header, bytes(32)))
    untied = replace(names, tied_head=None)
    assert set(read_headers(folder, untied).tensors) == {name, "lm_head.weight"}, "the head never has the prefix"


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
def test_a_tied_embedding_is_read_as_transformers_reads_it(variant, tiny, tmp_path):
    """Stored as the head alone, as safetensors' save_model does; as both; listed as the head and absent."""
    import torch
    from safetensors.torch import save_file, save_model
    from transformers import AutoModelForCausalLM

    original, names = tiny(variant), weight_names(read(tiny(variant)))
    model = AutoModelForCausalLM.from_pretrained(original)
    folders = {way: shutil.copytree(original, tmp_path / way) for way in ("alone", "both", "listed", "different")}
    save_model(model, str(folders["alone"] / SINGLE), metadata={"format": "pt"})
    assert names.embedding not in contents(folders["alone"])
    tensors = {name: values.clone() for name, values in model.state_dict().items()}
    save_file(tensors, folders["both"] / SINGLE, metadata={"format": "pt"})
    listed = folders["listed"]
    (listed / SINGLE).rename(listed / "m-1.safetensors")
    names_in_file = read_header(listed / "m-1.safetensors")
    write_index(listed, dict.fromkeys([*names_in_file, "lm_head.weight"], "m-1.safetensors"))
    ids = torch.arange(3, 15)[None]
    for way in ("alone", "both", "listed"):
        theirs = AutoModelForCausalLM.from_pretrained(folders[way])
        assert torch.equal(theirs(ids).logits, model(ids).logits)
        convert(folders[way], Layout(2), tmp_path / f"{way}-cut")
        assert verify(tmp_path / f"{way}-cut", original).is_well
    tensors["lm_head.weight"] += 1
    save_file(tensors, folders["different"] / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head.weight is not .* set tie_word_embeddings to false"):
        read_headers(folders["different"], names)


def test_experts_that_are_one_tensor_are_read_as_each_by_itself(tiny, tmp_path):
    original = tiny("qwen3_5_moe")
    shutil.copytree(original, tmp_path / "stacked")
    tensors = load_file(original / SINGLE)
    for layer in range(4):
        base = f"model.language_model.layers.{layer}.mlp.experts."
        each = [
            {part: tensors.pop(f"{base}{e}.{part}_proj.weight") for part in ("gate", "up", "down")} for e in range(6)
        ]
        tensors[f"{base}gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in each])
        tensors[f"{base}down_proj"] = torch.stack([one["down"] for one in each])
    save_file(tensors, tmp_path / "stacked" / SINGLE, {"format": "pt"})
    names = weight_names(read(original))
    wanted = read_headers(original, names).tensors
    found = read_headers(tmp_path / "stacked", names).tensors
    assert found.keys() == wanted.keys()
    assert all(read_bytes(found[name]) == read_bytes(info) for name, info in wanted.items())
    convert(tmp_path / "stacked", Layout(2), tmp_path / "cut")
    assert verify(tmp_path / "cut", original).is_well


def test_a_file_that_shrinks_while_open_is_noticed(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama_tied"), tmp_path / "model")
    extents = hf_extents(read(folder), read_headers(folder).tensors)
    last = max(extents, key=lambda extent: extent.offset)
    os.truncate(folder / SINGLE, last.offset + 4)
    with OpenFiles() as files, pytest.raises(CheckpointError, match=f"ends inside tensor {last.info.name}"):
        digest_extent(files, last)


# ---- damaged and hostile files

DAMAGED = {
    "empty": (b"", "cut short or not a safetensors file"),
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
    "gap": (container({"a": entry(), "b": entry(20, 36)}, bytes(36)), "tensor b leaves a gap"),
    "name a path": (container({"../../x": entry()}, bytes(16)), "does not have a plain name"),
    "name with a newline": (container({"a\nb": entry()}, bytes(16)), "does not have a plain name"),
    "name empty": (container({"": entry()}, bytes(16)), "does not have a plain name"),
}


@pytest.mark.parametrize("data, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(folder, data, message):
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_headers(folder)
    text = str(caught.value)
    assert str(folder / SINGLE) in text and len(text.splitlines()) == 1 and len(text) < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "", "\ud800", "a/../b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(entry())), inner),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
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
        read_headers(folder)


def test_a_pipe_and_a_link_to_nothing_are_named(folder):
    os.mkfifo(folder / SINGLE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_headers(folder)
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: can't be read: No such file"):
        read_headers(folder)


def test_weights_may_be_links_to_anywhere(folder):
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / "hash").write_bytes(GOOD)
    for target in (folder.parent / "blobs" / "hash", "../blobs/hash"):
        (folder / SINGLE).unlink(missing_ok=True)
        (folder / SINGLE).symlink_to(target)
        assert set(read_headers(folder).tensors) == {"a.weight"}


@pytest.mark.parametrize(
    "weight_map, message",
    [
        *(
            ({"a.weight": shard}, "is not the plain name of a safetensors file")
            for shard in (
                "../m-1.safetensors",
                "/x.safetensors",
                "a/b.safetensors",
                "x.bin",
                "..safetensors",
                "",
                3,
                None,
            )
        ),
        *((wrong, "weight_map is missing or empty") for wrong in (None, {}, [], "x")),
        (
            {f"t{i}": f"m-{i}.safetensors" for i in range(2, 8)},
            r"5 of the 6 weight files .* \(m-3\.safetensors, .*\.\.\.\).* again",
        ),
        (
            {"a.weight": "m-2.safetensors", "b.weight": "m-1.safetensors"},
            r"a\.weight is not in m-2\.safetensors, where the index says",
        ),
        ({"a.weight": "m-1.safetensors", "c": "m-4.safetensors"}, r"a\.weight is also in m-1\.safetensors"),
    ],
)
def test_an_index_that_is_not_believed(folder, weight_map, message):
    """It may name files of its folder alone, all of which must be there and have what it says."""
    (folder / "m-1.safetensors").write_bytes(GOOD)
    (folder / "m-2.safetensors").write_bytes(container({"b.weight": entry()}, bytes(16)))
    if "also in" in message:
        (folder / "m-4.safetensors").write_bytes(GOOD)
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_headers(folder)


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
        read_headers(folder)


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
SCRIPT = """
import os, sys
from megalite.errors import CheckpointError
from megalite.weights import hf
from megalite.weights.hf import read_headers, resolve
hf.HUB_TIMEOUT = float(os.environ.get("SECONDS_FOR_THE_HUB", hf.HUB_TIMEOUT))
repo, revision, weights = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "weights"
try:
    folder = resolve(repo, revision, weights=weights)
    print(folder, *(read_headers(folder).tensors if weights else ()), sep="\\n")
except CheckpointError as error:
    sys.stderr.write(str(error))
    sys.exit(1)
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.add(REPO, FILES)
        yield hub


@pytest.fixture
def load(hub, forks, tmp_path):
    """(folder and tensor names, error) of a process that resolves and opens a hub id."""
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)

    def load(repo=REPO, revision="", weights=True, **env):
        environment = hub.environment(tmp_path / "cache", **env)
        words = repo, revision, "weights" if weights else "config"
        done = forks.run(script, *words, preload=("huggingface_hub.hf_api",), **environment)
        assert done.code in (0, 1) and "Traceback" not in done.err, done.err
        return done.out.splitlines(), done.err.splitlines()[-1] if done.code else ""

    return load


def test_a_model_is_downloaded_once_and_only_what_is_needed(hub, load):
    template = "additional_chat_templates/tool_use.jinja"
    hub.add(REPO, {**FILES, template: b"t", "onnx/config.json": b"{}", "a/b.jinja": b""})
    load(weights=False)
    small = {"chat_template.jinja", "config.json", INDEX, "tokenizer.json", "tool_use.jinja"}
    assert set(hub.downloads()) == small
    (folder, *tensors), error = load()
    assert tensors == ["a.weight", "b.weight"] and not error and (Path(folder) / template).is_file()
    assert small | set(hub.downloads()) == {*NEEDED, "tool_use.jinja"}
    hub.requests.clear()
    assert load()[0] == [folder, *tensors] and hub.downloads() == []
    hub.requests.clear()
    assert load(HF_HUB_OFFLINE="1")[0] == [folder, *tensors] and hub.requests == []
    _, error = load("owner/other", HF_HUB_OFFLINE="1")
    assert error.startswith("owner/other: no such folder, the hub can't be asked for it")
    assert "not in the cache" in error


def test_a_revision(hub, load):
    more = container({"b.weight": entry(), "c": entry(16, 32)}, bytes(32))
    commit = hub.add(REPO, {**FILES, "m-2.safetensors": more}, "v2")
    assert load(revision="v2")[0][1:] == load(revision=commit)[0][1:] == ["a.weight", "b.weight", "c"]
    assert load()[0][1:] == ["a.weight", "b.weight"]
    assert "has no revision v3" in load(revision="v3")[1]


def test_a_hub_that_refuses_connections(load):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    _, error = load(HF_ENDPOINT=address)
    assert "the hub can't be asked for it" in error and "Check the name and the network" in error
    downloaded = load()[0]
    assert load(HF_ENDPOINT=address)[0] == downloaded


@pytest.mark.slow
def test_a_hub_that_never_answers(hub, load):
    hub.hang.set()
    _, error = load(SECONDS_FOR_THE_HUB="0.5")
    assert "the hub can't be asked for it" in error


def test_models_that_one_may_not_have(hub, load):
    assert "neither a folder here nor a model of the hub" in load("owner/nothing")[1]
    hub.gated.add(REPO)
    assert "its owner must grant access" in load()[1]


def test_an_interrupted_download_is_said_so_and_goes_on(hub, load):
    hub.commits[hub.revisions[REPO, "main"]] = {**FILES, "m-2.safetensors": SHARD[:-16] + bytes(16)}
    hub.cut_after = len(SHARD) - 8
    _, error = load(HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert "the download failed" in error and "Run it again to go on" in error
    _, error = load(HF_HUB_OFFLINE="1")
    assert "only part of it is in the cache" in error or "weight files that" in error
    hub.cut_after = None
    (folder, *tensors), _ = load()
    assert tensors == ["a.weight", "b.weight"]
    os.unlink(os.path.join(folder, "m-2.safetensors"))
    _, error = load(HF_HUB_OFFLINE="1")
    assert "m-2.safetensors" in error or "only part of it is in the cache" in error
    with pytest.raises(CheckpointError, match=r"1 of the 2 weight files .*m-2\.safetensors"):
        read_headers(Path(folder))
    assert load()[0][1:] == tensors


def test_gguf_is_answered_with_the_way_out(hub, load, tmp_path, capsys):
    """From the hub, of a folder and of a file, in Python and by every job."""
    hub.add("owner/quantized", {"tiny-q8.gguf": b"GGUF", "README.md": b""})
    said = load("owner/quantized")[1]
    assert "hf download owner/quantized tiny-q8.gguf" in said and "--model tiny-q8.gguf" in said and not hub.downloads()
    folder, file = tmp_path / "model", tmp_path / "model" / "tiny-q8.gguf"
    folder.mkdir()
    file.write_bytes(b"GGUF")
    for action in (lambda: read(folder), lambda: read(file), lambda: resolve(file), lambda: read_headers(folder)):
        with pytest.raises(CheckpointError, match="tiny-q8.gguf: GGUF is not read as it is. Give the folder") as error:
            action()
        command = shlex.split(str(error.value).splitlines()[1])
        assert command[:4] == ["megalite", "convert", "--model", str(file)]
    (tmp_path / "job.yaml").write_text("{}")
    for job in ("infer", "train", "hybrid"):
        for path in (folder, file):
            assert cli.main(job, ["--config", str(tmp_path / "job.yaml"), "--check", f"model.path={path}"], []) != 0
            assert "GGUF is not read as it is. Give the folder or hub id" in capsys.readouterr().err
