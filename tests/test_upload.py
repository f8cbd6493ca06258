"""Weights on their way into parameters: read in place, through rings of page-locked memory, and to a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from random_models import Sizes, write_model

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.weights import transfer, upload

CPU = torch.device("cpu")


class Event:
    """Stands for a CUDA event: a band must be waited for after each copy out of it, before it is read to again."""

    def __init__(self):
        self.recorded = self.waited = 0

    def synchronize(self):
        self.waited = self.recorded

    def record(self, stream):
        assert self.waited == self.recorded
        self.recorded += 1


def loaded(folder, dtype, device=CPU) -> dict[str, torch.Tensor]:
    state = ParallelState(Layout())
    decoder = transfer.build(families.read(folder), state, dtype=dtype, device=device)
    for param in decoder.parameters():
        param.data.fill_(torch.nan)
    transfer.load_folder(decoder, folder)
    return {name: param.data.cpu() for name, param in decoder.named_parameters()}


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, values in wanted.items():
        assert torch.equal(found[name], values) and not values.isnan().any(), name


@pytest.mark.parametrize("band_bytes", [1, 96, 4 << 20])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_ring_loses_nothing(family, band_bytes, monkeypatch, tmp_path):
    """Of any size, rows that are longer than a band included."""
    folder = write_model(tmp_path / "model", Sizes(family, dtype="F32"))
    wanted = loaded(folder, torch.float32)
    taken: list[Event] = []

    def event() -> Event:
        taken.append(Event())
        return taken[-1]

    @contextmanager
    def uploading(devices):
        yield {CPU: upload.Ring(None)}

    monkeypatch.setattr(upload, "BAND_BYTES", band_bytes)
    monkeypatch.setattr(upload.Ring, "band_bytes", band_bytes)
    monkeypatch.setattr(upload, "page_locked", lambda *shape: np.full(shape, 255, np.uint8))
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(transfer, "uploading", uploading)
    monkeypatch.setattr(transfer, "_lies_as_stored", lambda *_: False)
    check(loaded(folder, torch.float32), wanted)
    assert band_bytes == 1 or sum(one.recorded for one in taken) > 10


@pytest.mark.parametrize("in_place_bytes", [1, 96, 16 << 20])
def test_bytes_are_read_into_parameters(in_place_bytes, monkeypatch, tmp_path):
    folder = write_model(tmp_path / "model", Sizes("llama", dtype="F32"))
    monkeypatch.setattr(upload.InPlace, "band_bytes", in_place_bytes)
    found = loaded(folder, torch.float32)
    monkeypatch.setattr(transfer, "_lies_as_stored", lambda *_: False)
    check(found, loaded(folder, torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_gpu_gets_what_the_cpu_gets(family, dtype, tmp_path):
    folder = write_model(tmp_path / "model", Sizes(family, dtype="F32"))
    check(loaded(folder, dtype, torch.device("cuda")), loaded(folder, dtype))
