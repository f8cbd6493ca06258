"""The KV block pool: sharing by content, eviction, runs of neighbouring blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.inference.blocks import BlockPool, block_key

SALT = bytes(16)


def chain(token_ids, block_size=2, salt=SALT):
    """Keys of the full blocks of a token list."""
    keys = [salt]
    for start in range(0, len(token_ids) // block_size * block_size, block_size):
        keys.append(block_key(keys[-1], token_ids[start : start + block_size]))
    return keys[1:]


def take(pool, owner, count, expected=None, table=None):
    """A new (or longer) table, checked."""
    table = [] if table is None else table
    pool.claim(owner, table, count, len(table) + (expected or count))
    pool.extend(owner, table, count)
    return table


def cached(pool, owner, keys):
    """Fill and release one block a key, so that they are cached."""
    table = take(pool, owner, len(keys))
    for block, key in zip(table, keys, strict=True):
        pool.register(block, key)
    pool.release(owner, table)
    return table


def test_keys_depend_on_every_token_before_and_on_the_salt():
    same = chain([1, 2, 3, 4])
    assert chain([1, 2, 3, 4, 5]) == same
    assert chain([9, 2, 3, 4])[1] != same[1]
    assert chain([1, 2, 3, 9])[0] == same[0] and chain([1, 2, 3, 9])[1] != same[1]
    assert not set(chain([1, 2, 3, 4], salt=b"x" * 16)) & set(same)
    assert len({len(key) for key in same}) == 1 and len(same[0]) == 16


def test_blocks_are_counted_and_come_back():
    pool = BlockPool(4, 2)
    table = take(pool, 0, 3)
    assert pool.num_free == 1 and sorted(table) == [0, 1, 2]
    pool.check([table])
    pool.release(0, table)
    assert pool.num_free == 4
    pool.check([])


def test_asking_for_more_than_is_free_is_a_bug():
    pool = BlockPool(2, 2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.extend(0, [], 3)


def test_known_content_is_found_and_shared():
    pool = BlockPool(4, 2)
    keys = chain([1, 2, 3, 4])
    table = take(pool, 0, 2)
    for block, key in zip(table, keys, strict=True):
        pool.register(block, key)
    found = pool.match([*keys, b"unknown"])
    assert found == table and pool.num_held(found) == 2
    pool.share(found)
    pool.check([table, found])
    assert pool.num_free == 2
    pool.release(0, table)
    assert pool.num_free == 2, "the other table still holds them"
    pool.release(1, found)
    assert pool.num_free == 4 and pool.match(keys) == table and pool.num_held(table) == 0
    pool.check([])


def test_a_match_stops_at_the_first_gap():
    pool = BlockPool(4, 2)
    keys = chain([1, 2, 3, 4, 5, 6])
    table = take(pool, 0, 3)
    pool.register(table[0], keys[0])
    pool.register(table[2], keys[2])
    assert pool.match(keys) == table[:1]


def test_the_first_block_with_some_content_stays_the_one_that_is_found():
    pool = BlockPool(4, 2)
    key = chain([1, 2])[0]
    first, second = take(pool, 0, 1), take(pool, 1, 1)
    pool.register(first[0], key)
    pool.register(second[0], key)
    assert pool.match([key]) == first
    pool.release(1, second)
    pool.check([first])
    assert pool.match([key]) == first


@pytest.mark.parametrize("contiguous", [False, True])
def test_blank_blocks_go_before_cached_ones_and_the_least_recent_of_those_first(contiguous):
    pool = BlockPool(6, 2, contiguous=contiguous)
    a, b = chain([1, 2, 3, 4]), chain([5, 6])
    blocks_a, blocks_b = cached(pool, 0, a), cached(pool, 1, b)
    again = pool.match(a)  # used once more: now b is the oldest
    pool.share(again)
    pool.release(0, again)
    table = []
    for expected in ({3, 4, 5}, set(blocks_b), {blocks_a[1]}, {blocks_a[0]}):
        for _ in range(len(expected)):
            pool.extend(9, table, 1)
        assert set(table[-len(expected) :]) == expected
        pool.check([table])
    assert pool.match(a) == [] and pool.match(b) == []


def test_reset_forgets_cached_and_held_content():
    pool = BlockPool(6, 2)
    a, b = chain([1, 2, 3, 4]), chain([5, 6])
    cached(pool, 0, a)
    table = take(pool, 1, 1, expected=3)
    pool.register(table[0], b[0])
    pool.reset_cache()
    pool.check([table])
    assert pool.match(a) == [] and pool.match(b) == []
    pool.release(1, table)
    pool.check([])
    assert pool.num_free == 6


def test_tables_that_grow_in_turn_stay_in_one_run_each():
    pool = BlockPool(12, 2)
    tables = [take(pool, owner, 1, expected=4) for owner in range(3)]
    for _ in range(3):
        for owner, table in enumerate(tables):
            pool.extend(owner, table, 1)
    assert tables == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    pool.check(tables)


def test_without_runs_blocks_are_simply_the_next_free_ones():
    pool = BlockPool(6, 2, contiguous=False)
    tables = [take(pool, owner, 1, expected=3) for owner in range(2)]
    for owner, table in enumerate(tables):
        pool.extend(owner, table, 1)
    assert tables == [[0, 2], [1, 3]]


def test_a_run_is_taken_from_only_when_nothing_else_is_free():
    pool = BlockPool(8, 2)
    first = take(pool, 0, 1, expected=6)  # 0, and 1..5 set aside
    second = take(pool, 1, 2, expected=2)
    assert second == [6, 7]
    pool.extend(1, second, 1)  # half of 1..5 goes over
    assert second == [6, 7, 3]
    pool.extend(1, second, 1)
    pool.extend(0, first, 2)
    assert second == [6, 7, 3, 4] and first == [0, 1, 2]
    pool.check([first, second])
    pool.extend(0, first, 1)  # its own run is used up; the last free block is in the other's
    assert first == [0, 1, 2, 5] and pool.num_free == 0
    pool.check([first, second])


def test_a_shorter_run_is_taken_where_the_wished_one_is_not_there():
    pool = BlockPool(10, 2)
    take(pool, 0, 1, expected=5)
    table = take(pool, 1, 1, expected=8)
    for _ in range(3):
        pool.extend(1, table, 1)
    assert table == [5, 6, 7, 8]


def test_what_was_set_aside_is_open_again_after_release():
    pool = BlockPool(6, 2)
    pool.release(0, take(pool, 0, 1, expected=6))
    pool.check([])
    assert take(pool, 1, 6) == [0, 1, 2, 3, 4, 5]


def test_a_run_over_cached_blocks_evicts_them_only_when_they_are_written():
    pool = BlockPool(4, 2)
    keys = chain([1, 2, 3, 4, 5, 6, 7, 8])
    cached(pool, 0, keys)
    table = take(pool, 1, 1, expected=4)
    assert table == [0] and pool.match(keys[1:]) == [1, 2, 3], "set aside, but not yet lost"
    pool.check([table])
    pool.release(1, table)
    assert pool.match(keys[1:]) == [1, 2, 3]
    pool.check([])


def test_a_run_that_must_evict_is_chosen_where_the_oldest_content_is():
    pool = BlockPool(6, 2)
    low, high = chain([1, 2, 3, 4, 5, 6]), chain([7, 8, 9, 10, 11, 12])
    filler = take(pool, 8, 3)
    cached(pool, 0, high)
    pool.release(8, filler)
    assert cached(pool, 1, low) == [0, 1, 2], "cached later than what is in 3 to 5"
    assert take(pool, 2, 3) == [3, 4, 5]
    assert pool.match(low) == [0, 1, 2]


def test_what_a_run_did_not_need_is_still_the_first_to_go():
    pool = BlockPool(6, 2)
    old, recent = chain([1, 2, 3, 4, 5, 6]), chain([7, 8, 9, 10, 11, 12])
    cached(pool, 0, old)
    filler = take(pool, 8, 3)
    for block, key in zip(filler, recent, strict=True):
        pool.register(block, key)
    table = take(pool, 0, 1, expected=3)  # the run is over the old blocks, of which one is used
    pool.release(8, filler)
    pool.release(0, table)
    tables = [[], [], []]
    for owner, table in enumerate(tables):
        pool.extend(owner, table, 1)
    assert tables == [[0], [2], [1]] and pool.match(recent) == filler


def test_sharing_a_cached_block_inside_a_run_ends_the_run_before_it():
    pool = BlockPool(6, 2)
    key = chain([1, 2])[0]
    filler = take(pool, 8, 3)
    block = cached(pool, 0, [key])
    pool.release(8, filler)
    table = take(pool, 1, 1, expected=6)
    assert block == [3] and table == [0]
    pool.share(block)
    pool.check([table, block])
    for _ in range(3):
        pool.extend(1, table, 1)
    assert table == [0, 1, 2, 4], "4 and 5 are open again"
    pool.check([table, block])


def test_free_blocks_right_after_a_cached_beginning_are_preferred():
    pool = BlockPool(8, 2)
    keys = chain([1, 2, 3, 4])
    filler = take(pool, 8, 2)
    cached(pool, 0, keys)
    pool.release(8, filler)
    table = pool.match(keys)
    assert table == [2, 3]
    pool.share(table)
    take(pool, 1, 1, expected=3, table=table)
    other = take(pool, 2, 2)
    pool.extend(1, table, 2)
    assert table == [2, 3, 4, 5, 6] and other == [0, 1]
    pool.check([table, other])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["new", "grow", "end", "hit", "fill", "reset"]),
        st.integers(0, 5),
        st.integers(1, 5),
        st.integers(0, 6),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(num_blocks=st.integers(1, 24), contiguous=st.booleans(), operations=OPERATIONS)
def test_no_history_breaks_an_invariant(num_blocks, contiguous, operations):
    pool = BlockPool(num_blocks, 2, contiguous=contiguous)
    tables: dict[int, list[int]] = {}
    beginning = chain(list(range(12)))
    for action, owner, count, more in operations:
        table = tables.get(owner)
        if action in ("new", "hit") and table is None:
            hits = pool.match(beginning[:count]) if action == "hit" else []
            if pool.num_free - (len(hits) - pool.num_held(hits)) >= count:
                pool.share(hits)
                tables[owner] = take(pool, owner, count, expected=count + more, table=hits)
        elif table is not None and action == "grow" and pool.num_free:
            pool.extend(owner, table, 1)
        elif table is not None and action == "end":
            pool.release(owner, tables.pop(owner))
        elif table is not None and action == "fill":
            for block, key in zip(table, beginning, strict=False):
                pool.register(block, key)
        elif action == "reset":
            pool.reset_cache()
        pool.check(tables.values())
    for owner, table in tables.items():
        pool.release(owner, table)
    pool.check([])
    assert pool.num_free == num_blocks
