"""Plans of moving a model between layouts, for any model and any pair of layouts: complete, minimal, bounded."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import configs, local_parameters

from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import transformer_layer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts, Router
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.reshard import RoundBuilder
from megalite.weights.reshard_plan import atoms, buckets, least_received, plan
from megalite.weights.table import Range, owned

ITEM = 2
"""Bytes of an element."""


@st.composite
def cases(draw) -> tuple[ModelConfig, Layout, Layout]:
    config = draw(configs())
    layouts = [
        Layout(
            draw(st.integers(1, 5)),
            draw(st.integers(1, min(3, config.num_layers))),
            draw(st.integers(1, 3)),
            first_rank=draw(st.integers(0, 6)),
        )
        for _ in range(2)
    ]
    return config, *layouts


def values(config: ModelConfig, layout: Layout) -> dict[tuple[int, str], np.ndarray]:
    """Every parameter of every rank, from a checkpoint in which every element has a number of its own."""
    replicas = layout.replicas()
    return {
        (rank, name): param
        for place, first in enumerate(replicas[0])
        for name, param in local_parameters(config, layout, first).items()
        for rank in (replica[place] for replica in replicas)
    }


def perform(transfers, source, target) -> dict[tuple[int, str], np.ndarray]:
    """The target's parameters, filled by the transfers; fails where one is written twice."""

    def view(params, rank: int, one: Range) -> np.ndarray:
        index = [slice(None)] * params[rank, one.piece.param].ndim
        index[one.dim] = slice(one.start, one.start + one.count)
        return params[rank, one.piece.param][tuple(index)]

    filled = {key: np.full_like(param, -1) for key, param in target.items()}
    for transfer in transfers:
        goal = view(filled, transfer.receiver, transfer.target)
        assert (goal == -1).all(), f"{transfer} is written twice"
        assert goal.size == transfer.elements
        goal[...] = view(source, transfer.sender, transfer.source)
    return filled


def received(transfers) -> Counter[int]:
    """Elements that each rank gets from others."""
    counts = Counter()
    for transfer in transfers:
        counts[transfer.receiver] += 0 if transfer.is_local else transfer.elements
    return +counts


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 2000))
def test_every_element_goes_where_the_weight_table_wants_it(case, bucket_bytes):
    """By the plan, and by its rounds, which are bounded; and a rank gets no more than it lacks."""
    config, source, target = case
    transfers = plan(config, source, target)
    rounds = buckets(transfers, bucket_bytes, ITEM)
    local = [transfer for transfer in transfers if transfer.is_local]
    held, wanted = values(config, source), values(config, target)
    for way in (transfers, [*local, *(transfer for one in rounds for transfer in one)]):
        filled = perform(way, held, wanted)
        for key, param in wanted.items():
            np.testing.assert_array_equal(filled[key], param, err_msg=str(key))

    def indices(layout: Layout, rank: int) -> dict[tuple[str, int], int]:
        """Elements of each index of a Hugging Face tensor that a rank has."""
        ranges = owned(config, layout, rank) if rank in layout.ranks else ()
        return {(one.piece.hf, index): one.piece.row for one in ranges for index in range(one.lo, one.hi)}

    lacked = Counter()
    for rank in target.ranks:
        have = indices(source, rank)
        lacked[rank] = sum(row for index, row in indices(target, rank).items() if index not in have)
    assert received(transfers) == +lacked == least_received(config, source, target)

    longest = max((transfer.target.piece.row * ITEM for transfer in transfers), default=0)
    for one in rounds:
        assert one, "a round without work"
        needs: dict[int, list[int]] = defaultdict(list)
        for transfer in one:
            assert not transfer.is_local
            for rank in transfer.pair:
                needs[rank].append(transfer.elements * ITEM)
        for needed in needs.values():
            assert sum(needed) <= bucket_bytes or (len(needed) == 1 and needed[0] <= longest)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_both_ends_of_a_message_agree_on_what_is_in_it(case):
    config, source, target = case
    for one in buckets(plan(config, source, target), 300, ITEM):
        sent, got = {}, {}
        for rank in {rank for transfer in one for rank in transfer.pair}:
            sizes = {transfer.source.piece.param: 10 for transfer in one}
            mine = RoundBuilder(rank, [rank], sizes, 100).round(one)
            for slot in mine.outgoing:
                sent.setdefault(slot.transfer.pair, []).append(slot.transfer)
            for slot in mine.incoming:
                got.setdefault(slot.transfer.pair, []).append(slot.transfer)
            starts = [slot.start for slot in (*mine.outgoing, *mine.incoming)]
            sizes = [slot.transfer.elements for slot in (*mine.outgoing, *mine.incoming)]
            assert starts == [sum(sizes[:index]) for index in range(len(sizes))]
            packed = [slot for gather in mine.packing for slot in gather.slots]
            assert sorted(packed, key=lambda slot: slot.start) == list(mine.outgoing)
        assert sent == got and sum(map(len, sent.values())) == len(one)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_an_atom_is_held_whole_or_not_at_all(case):
    config, source, target = case
    found = atoms(config, source, target)
    assert len({(atom.range.piece.hf, atom.range.lo) for atom in found}) == len(found)
    for layout, side in ((source, "sources"), (target, "targets")):
        for rank in layout.ranks:
            mine, wanted = Counter(), Counter()
            for held in (held for atom in found for held in getattr(atom, side) if rank in held.ranks):
                mine[held.range.piece.param] += held.range.elements
            for one in owned(config, layout, rank):
                wanted[one.piece.param] += one.elements
            assert mine == wanted


def sized(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocab: int, moe=None, tied=False):
    attention = SoftmaxAttention(heads=heads, kv_heads=kv_heads, head_dim=128, scale=1.0)
    return ModelConfig(
        family="qwen3_moe" if moe else "llama",
        vocab_size=vocab,
        hidden_size=hidden,
        max_position_embeddings=8,
        layers=(transformer_layer(attention, moe or DenseMLP(intermediate_size=inner)),) * layers,
        tie_embeddings=tied,
    )


SMALL = sized(28, 1024, 16, 8, 3072, 151936, tied=True)
LARGE = sized(80, 8192, 64, 8, 28672, 128256)
EXPERTS = sized(
    8, 2048, 32, 4, 6144, 32000, Experts(num_experts=64, intermediate_size=768, router=Router(top_k=8, normalize=True))
)
PAIRS = [
    (SMALL, Layout(2, 2, 1), Layout(4, 1, 1)),
    (SMALL, Layout(2, 1, 2), Layout(4, 1, 1, first_rank=4)),
    (LARGE, Layout(8, 4, 2), Layout(8, 1, 8)),
    (EXPERTS, Layout(4, 2, 2), Layout(8, 1, 2)),
]


@pytest.mark.parametrize("config, source, target", PAIRS, ids=["0.6B", "0.6B-apart", "70B", "experts"])
def test_sending_is_shared_and_rounds_are_few(config, source, target):
    """At real sizes no holder sends much more than another, and the busiest rank has work in nearly every round."""
    transfers = plan(config, source, target)
    sent, busy = defaultdict(int), defaultdict(int)
    for transfer in transfers:
        if not transfer.is_local:
            sent[transfer.sender] += transfer.elements
            for rank in transfer.pair:
                busy[rank] += transfer.elements * ITEM
    assert max(sent.values()) < 1.5 * sum(sent.values()) / source.size
    size = max(busy.values()) // 20
    assert len(buckets(transfers, size, ITEM)) <= 25


def test_what_only_replicas_hold_is_sent_by_all_of_them():
    """Two replicas in training, four ranks elsewhere that need everything: each of the two sends half."""
    transfers = plan(SMALL, Layout(dp=2), Layout(4, first_rank=2))
    sent = defaultdict(int)
    for transfer in transfers:
        sent[transfer.sender] += transfer.elements
    assert abs(sent[0] - sent[1]) < 0.1 * sent[0]


def test_planning_is_quick():
    """Generous, for a busy machine: alone it takes 0.02 s and half a second."""
    for config, source, target in PAIRS[:3:2]:
        began = time.process_time()
        buckets(plan(config, source, target), 512 << 20, ITEM)
        assert time.process_time() - began < (1 if config is SMALL else 10)


def test_the_same_layout_moves_nothing_between_ranks():
    layout = Layout(2, 2, 2)
    transfers = plan(SMALL, layout, layout)
    assert all(transfer.is_local for transfer in transfers) and buckets(transfers, 1 << 20, ITEM) == []
    assert least_received(SMALL, layout, layout) == {}
