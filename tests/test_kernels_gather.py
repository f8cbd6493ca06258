"""Columns of rows on several ranks: gathered by the kernel, and chosen from without gathering what is not needed.

Compiled where there is a CUDA device, under Triton's interpreter where there is none; skipped without Triton.
"""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from test_kernels import DEVICE, needs_triton
from test_kernels_sampling import WAYS, make_table, small  # noqa: F401

from megalite.kernels import gather, sampling
from megalite.kernels.reduce import Peers

pytestmark = needs_triton


class SharedSlots:
    """Symmetric buffers of all ranks in one process; those of the others hold what they have written for a call."""

    def __init__(self, size, slots, blocks):
        self.halves = [torch.full((2, slots * gather.SLOT), 255, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        self.flags = [torch.zeros((blocks, size), dtype=torch.int32, device=DEVICE) for _ in range(size)]
        self.epochs = [torch.zeros(blocks, dtype=torch.int32, device=DEVICE) for _ in range(size)]
        addresses = [
            torch.tensor([one.data_ptr() for one in each], dtype=torch.int64, device=DEVICE)
            for each in (self.halves, self.flags)
        ]
        self.peers = [
            Peers(rank, size, gather.SLOT, torch.uint8, slots, blocks, *addresses, self.epochs[rank])
            for rank in range(size)
        ]

    def call(self, rank, count, parts, **options):
        """One rank's part of the call of number `count`, from 1; the others have put theirs of `parts` there."""
        lanes = gather.SLOT // parts[0].element_size()
        pieces = max(gather.pieces(part.shape[1], part.element_size()) for part in parts)
        for peer, part in enumerate(parts):
            if peer != rank:
                slots = part.new_zeros(len(part), pieces * lanes)
                slots[:, : part.shape[1]] = part
                self.halves[peer][count % 2, : slots.numel() * part.element_size()] = slots.view(torch.uint8).flatten()
                self.flags[rank][:, peer] = 2 * count
        return gather.gather_rows(parts[rank], self.peers[rank], **options)


def begins_of(widths):
    return torch.tensor([0, *accumulate(widths)], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "widths, rows, dtype",
    [((5, 5), 1, torch.float32), ((41, 40), 4, torch.bfloat16), ((30, 0, 29), 3, torch.float32)],
    ids=str,
)
def test_a_rank_has_the_columns_of_all(monkeypatch, widths, rows, dtype):
    monkeypatch.setattr(gather, "SLOT", 64)
    whole = torch.randn(rows, sum(widths), device=DEVICE).to(dtype)
    for rank in range(len(widths)):
        shared = SharedSlots(len(widths), slots=24, blocks=4)
        for count in (1, 2, 3):
            whole = whole.flip(0) + count
            parts = whole.split(widths, 1)
            options = {} if len(set(widths)) == 1 else {"widths": widths, "begins": begins_of(widths)}
            assert torch.equal(shared.call(rank, count, parts, **options), whole)
            used = min(4, rows * gather.pieces(max(widths), dtype.itemsize))
            assert shared.epochs[rank].tolist() == [count] * used + [0] * (4 - used)


@pytest.mark.parametrize("drawn", [(), (2,), (0, 3, 4)], ids=str)
def test_rows_that_are_greedy_are_passed_by(monkeypatch, drawn):
    """Programs that have nothing else meet nobody: the flags of the others would have them wait for ever."""
    monkeypatch.setattr(gather, "SLOT", 64)
    widths = (21, 20)
    whole = torch.randn(5, sum(widths), device=DEVICE)
    table = make_table([{"temperature": 0.5 if row in drawn else 0.0} for row in range(6)])
    rows = torch.tensor([4, 3, 2, 1, 0], device=DEVICE)
    shared = SharedSlots(2, slots=24, blocks=4)
    if not drawn:
        shared.flags[0].fill_(-1000)
    options = {"widths": widths, "begins": begins_of(widths), "drawn": (rows, table)}
    parts = whole.split(widths, 1)
    if drawn:
        found = shared.call(0, 1, parts, **options)
        places = [4 - row for row in drawn]
        assert torch.equal(found[places], whole[places])
    else:
        gather.gather_rows(parts[0], shared.peers[0], **options)
        assert not shared.epochs[0].any() and not shared.flags[1].any()


class Told(Exception):
    pass


class FakeColumns:
    """What a rank's columns have to do with the others', in two passes: first each tells what it gathers."""

    def __init__(self, widths, whole):
        self.widths, self.begins, self.whole = widths, begins_of(widths), whole
        self.told, self.listening = [], True

    def gathered(self, x):
        if self.listening:
            self.told.append(x.clone())
            raise Told
        return torch.cat(self.told, 1)

    def gathered_drawn(self, logits, rows, table):
        greedy = table[rows, sampling.TEMPERATURE].view(torch.float64) == 0
        return self.whole.masked_fill(greedy[:, None], math.nan)


@pytest.mark.parametrize(("widths", "at_temperature"), [((101, 99), False), ((70, 0, 64), True)], ids=str)
def test_ranks_choose_what_one_would_from_all_columns(small, widths, at_temperature):  # noqa: F811
    vocab, generator = sum(widths), torch.Generator().manual_seed(1)
    options = [*WAYS[1::2], *(dict(temperature=0.0, seed=i) for i in range(6))]
    whole = (torch.randn(len(options), vocab, generator=generator) * 4).round() / 2  # with ties
    whole[-1], whole[-2, 5], whole[-3, :70], whole[-4, 70:] = -math.inf, math.nan, -math.inf, -math.inf
    whole = whole.to(DEVICE)
    table, rows = make_table(options), torch.arange(len(options), device=DEVICE)
    kind = {"at_temperature": at_temperature}
    ids, scores, stats = sampling.choose(whole, None, rows, rows, table, **kind)
    columns, parts = FakeColumns(widths, whole), whole.split(widths, 1)
    for part in parts:
        with pytest.raises(Told):
            sampling.choose(part, None, rows, rows, table, columns=columns, **kind)
    columns.listening = False
    found = sampling.choose(parts[0], None, rows, rows, table, columns=columns, **kind)
    assert found[0].tolist() == ids.tolist() and min(ids.tolist()) == -2
    torch.testing.assert_close(found[1], scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2][:-2], stats[:-2], rtol=0, atol=1e-5)
