"""Weights on their way into parameters: read in place, through rings of page-locked memory, and to a GPU."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import Sizes, write_model
from waiting import PATIENCE

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


def failed_forks(rank: int, folder: Path) -> int:
    """Of some forks, those that could not load."""
    torch.set_num_threads(32)  # the pool of so many takes a while to make anew
    decoder = transfer.build(families.read(folder), ParallelState(Layout()), dtype=torch.bfloat16, device=CPU)
    torch.ones(1 << 16).bfloat16()  # from here on this thread takes them as made
    copy, few, met = transfer._copy, transfer.FEW_BYTES, set()
    meeting = threading.Barrier(transfer.READERS)

    def copy_together(*args):
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meeting.wait(PATIENCE)
        copy(*args)

    transfer._copy, transfer.FEW_BYTES = copy_together, 0
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    failed = 0
    try:
        for _ in range(5):
            if (pid := os.fork()) == 0:
                try:
                    transfer.load_folder(decoder, folder)
                    os._exit(0)
                finally:
                    os._exit(1)
            failed += os.waitpid(pid, 0)[1] != 0
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        transfer._copy, transfer.FEW_BYTES = copy, few
        torch.set_num_threads(1)
    return failed


def test_a_fork_can_load(ranks, tmp_path):
    """The first to use torch's threads after a fork makes them anew: several at once would find none."""
    folder = write_model(tmp_path / "model", Sizes("llama", dtype="F32", vocab=9000))
    assert ranks(1).run(failed_forks, folder) == [0]
