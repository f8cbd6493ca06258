"""Packing: every sequence once, within the capacity, as many micro batches on every replica, and in balance."""

from hypothesis import given
from hypothesis import strategies as st

from megalite.train.data.packing import pack

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 64), st.integers(1, 5), st.integers(1, 4))
def test_a_packing_keeps_its_promises(lengths, capacity, replicas, least):
    packed = pack(lengths, capacity, replicas, least=least)
    assert sorted(index for packs in packed for micro in packs for index in micro) == list(range(len(lengths)))
    (count,) = {len(packs) for packs in packed}
    assert count >= least
    for packs in packed:
        for micro in packs:
            assert micro == sorted(micro, key=lambda index: (lengths[index], index))
            assert len(micro) == 1 or sum(lengths[index] for index in micro) <= capacity
    loads = [sum(lengths[index] for micro in packs for index in micro) for packs in packed]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    fullest = max(sum(1 for micro in packs if micro) for packs in packed)
    assert count == max(least, fullest), "no replica computes a blank that none needs"
    assert packed == pack(lengths, capacity, replicas, least=least)


def test_micro_batches_are_as_few_as_they_can_be_and_even():
    (packs,) = pack([8, 8, 4, 4, 4, 4], 16, 1)
    assert sorted(sum((8, 8, 4, 4, 4, 4)[index] for index in micro) for micro in packs) == [16, 16]
    assert pack([9, 1, 1, 1], 12, 1) == [[[1, 2, 3, 0]]]
    assert pack([9, 1, 1, 1], 12, 1, least=2) == [[[0], [1, 2, 3]]]
    assert pack([30, 1], 12, 1) == [[[0], [1]]], "what is too long is alone"
    assert pack([5], 12, 3) == [[[0]], [[]], [[]]]
    assert pack([], 12, 2) == [[[]], [[]]]
