"""Plans of moving a model between layouts, for any model and any pair of layouts: complete, minimal, bounded."""

import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import configs, local_parameters

from megalite.core.layout import Layout
from megalite.model.config import AttentionSpec, ModelConfig, MoESpec
from megalite.weights.reshard_plan import atoms, buckets, least_received, parcels, plan, received
from megalite.weights.table import owned

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


def region(params, place, count) -> np.ndarray:
    index = [slice(None)] * params[place.rank, place.param].ndim
    index[place.dim] = slice(place.start, place.start + count)
    return params[place.rank, place.param][tuple(index)]


def perform(transfers, source, target) -> dict[tuple[int, str], np.ndarray]:
    """The target's parameters, filled by the transfers; fails where one is written twice."""
    filled = {key: np.full_like(param, -1) for key, param in target.items()}
    for transfer in transfers:
        goal = region(filled, transfer.target, transfer.count)
        assert (goal == -1).all(), f"{transfer} is written twice"
        assert goal.size == transfer.elements
        goal[...] = region(source, transfer.source, transfer.count)
    return filled


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_element_goes_where_the_weight_table_wants_it(case):
    config, source, target = case
    wanted = values(config, target)
    filled = perform(plan(config, source, target), values(config, source), wanted)
    for key, param in wanted.items():
        np.testing.assert_array_equal(filled[key], param, err_msg=str(key))


@settings(max_examples=30, deadline=None)
@given(cases())
def test_a_rank_gets_no_more_than_it_lacks(case):
    config, source, target = case

    def held(layout: Layout, rank: int) -> set[tuple[str, int]]:
        if rank not in layout.ranks:
            return set()
        return {(part.piece.hf, index) for part in owned(config, layout, rank) for index in range(part.lo, part.hi)}

    rows = {
        part.piece.hf: part.elements // (part.hi - part.lo) for r in target.ranks for part in owned(config, target, r)
    }
    least = {rank: sum(rows[hf] for hf, _ in held(target, rank) - held(source, rank)) for rank in target.ranks}
    least = {rank: count for rank, count in least.items() if count}
    assert received(plan(config, source, target)) == least == least_received(config, source, target)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 2000))
def test_rounds_are_bounded_and_move_everything(case, bucket_bytes):
    config, source, target = case
    transfers = plan(config, source, target)
    rounds = buckets(transfers, bucket_bytes, ITEM)
    longest = max((transfer.row * ITEM for transfer in transfers), default=0)
    total = 0
    for one in rounds:
        assert one, "a round without work"
        needs: dict[int, list[int]] = defaultdict(list)
        for transfer in one:
            assert not transfer.is_local
            for rank in transfer.pair:
                needs[rank].append(transfer.elements * ITEM)
        for needed in needs.values():
            assert sum(needed) <= bucket_bytes or (len(needed) == 1 and needed[0] <= longest)
        total += sum(transfer.elements for transfer in one)
        for rank in needs:
            sent, got = parcels(one, rank)
            assert len({parcel.peer for parcel in sent}) == len(sent) and len({p.peer for p in got}) == len(got)
            for parcel in got:  # both ends pack and unpack in the same order
                theirs, _ = parcels(one, parcel.peer)
                assert parcel.transfers == next(p.transfers for p in theirs if p.peer == rank)
    assert total == sum(received(transfers).values())
    local = [transfer for transfer in transfers if transfer.is_local]
    wanted = values(config, target)
    filled = perform([*local, *(t for one in rounds for t in one)], values(config, source), wanted)
    assert all((filled[key] == param).all() for key, param in wanted.items())


@settings(max_examples=30, deadline=None)
@given(cases())
def test_an_atom_is_held_whole_or_not_at_all(case):
    config, source, target = case
    found = atoms(config, source, target)
    assert len({(atom.hf, atom.lo) for atom in found}) == len(found)
    for layout, side in ((source, "sources"), (target, "targets")):
        for rank in layout.ranks:
            mine = defaultdict(int)
            for atom in found:
                for held in getattr(atom, side):
                    if rank in held.ranks:
                        mine[held.param] += atom.elements
            wanted = defaultdict(int)
            for part in owned(config, layout, rank):
                wanted[part.piece.param] += part.elements
            assert mine == wanted


def sized(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocab: int, moe=None, tied=False):
    return ModelConfig(
        family="qwen3_moe" if moe else "llama",
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=inner,
        max_position_embeddings=8,
        attention=tuple(AttentionSpec(layer=layer, scale=1.0) for layer in range(layers)),
        moe=(moe,) * layers,
        tie_embeddings=tied,
    )


SMALL = sized(28, 1024, 16, 8, 3072, 151936, tied=True)
LARGE = sized(80, 8192, 64, 8, 28672, 128256)
EXPERTS = sized(
    8, 2048, 32, 4, 6144, 32000, MoESpec(num_experts=64, top_k=8, intermediate_size=768, normalize_top_k=True)
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
            sent[transfer.source.rank] += transfer.elements
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
        sent[transfer.source.rank] += transfer.elements
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
