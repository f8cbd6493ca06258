"""What a rank reads out of shards of any layout is what resharding would have written for it, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import Sizes, write_model
from safetensors.torch import load_file

from megalite.convert.convert import convert, parse_layout
from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.model import families
from megalite.weights import manifest as manifests
from megalite.weights import shards
from megalite.weights.manifest import WEIGHT
from megalite.weights.transfer import read_parameters

LAYOUTS = [Layout(), Layout(3), Layout(2, 2), Layout(4, 1), Layout(1, 3), Layout(1, 2, interleave=2)]
MODELS = [
    Sizes("llama", layers=4, tied=True),
    Sizes("gpt2", layers=4, tied=True, dtype="F32"),
    Sizes("phi3", layers=5),
    Sizes("qwen3_moe", layers=4, vector_dtype="F32"),
]


def local(folder: Path, layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    return dict(read_parameters(folder, families.read(folder), layout, rank, WEIGHT))


@pytest.mark.parametrize("sizes", MODELS, ids=lambda sizes: sizes.family)
def test_a_rank_reads_what_its_file_would_hold(sizes, tmp_path):
    model = write_model(tmp_path / "model", sizes)
    for layout in LAYOUTS:
        convert(model, layout, tmp_path / str(layout))
    for layout in LAYOUTS:
        for rank in layout.ranks:
            want = load_file(tmp_path / str(layout) / manifests.file_name(rank))
            for source in LAYOUTS:
                got = local(tmp_path / str(source), layout, rank)
                assert got.keys() == want.keys()
                for name, values in want.items():
                    same = got[name].dtype == values.dtype and torch.equal(got[name], values)
                    assert same, f"{name} of rank {rank} in {layout} from {source}"


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
    convert(write_model(tmp_path / "model", Sizes("llama", layers=4, kv_heads=4)), source, tmp_path / "cut")
    want = local(tmp_path / "cut", layout, rank)
    for other in set(source.ranks) - needed:
        file = tmp_path / "cut" / manifests.file_name(other)
        head = len(file.read_bytes()) - sum(values.nbytes for values in load_file(file).values())
        with open(file, "r+b") as damaged:
            damaged.seek(head)
            damaged.write(bytes(file.stat().st_size - head))
    got = local(tmp_path / "cut", layout, rank)
    assert all(torch.equal(got[name], values) for name, values in want.items())
    file = tmp_path / "cut" / manifests.file_name(max(needed))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name}: damaged: tensor "):
        local(tmp_path / "cut", layout, rank)


def test_interleaved_layouts_are_noted_only_where_they_are(tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", layers=4))
    layout = parse_layout("tp=1,pp=2,interleave=2")
    convert(model, layout, tmp_path / "cut")
    convert(model, Layout(1, 2), tmp_path / "plain")
    assert manifests.read(tmp_path / "cut").layout == layout
    assert "interleave" not in (tmp_path / "plain" / manifests.NAME).read_text()


def test_layouts_that_no_model_could_have_are_refused(tmp_path):
    convert(write_model(tmp_path / "model", Sizes("llama", layers=4)), Layout(1, 2), tmp_path / "cut")
    manifest, model = manifests.read(tmp_path / "cut"), families.read(tmp_path / "cut")
    for layout in (Layout(1, 5), Layout(1, 2, interleave=4)):
        with pytest.raises(CheckpointError, match="is not possible with 4 layers"):
            shards.check_file(tmp_path / "cut", next(iter(manifest.files.values())), model, layout)
    text = manifests.encode(manifest)
    for wrong in (b'"pp": 2, "interleave": 0', b'"pp": 1, "interleave": 2', b'"pp": 2, "interleave": null'):
        body, _ = text.replace(b'"pp": 2', wrong).rsplit(b'\n  "digest"', 1)
        content = body + f'\n  "digest": "{manifests.digest_of(body)}"\n}}\n'.encode()
        with pytest.raises(CheckpointError, match="layout"):
            manifests.decode(content, Path("manifest.json"))
