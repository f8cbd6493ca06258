"""The KV block pool: sharing by content, what is given up first, runs of neighbouring blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.inference.blocks import BlockPool, block_keys


def chain(*token_ids, salt=bytes(16)):
    """Keys of the full blocks, of two tokens each, of a token list."""
    return block_keys(salt, token_ids[: len(token_ids) // 2 * 2], 2)


def take(pool, count, keys=(), *, owner=-1, expected=0, table=None):
    """A new (or longer) table, whose first blocks are known by `keys`; `expected` more blocks in the end."""
    table = [] if table is None else table
    pool.claim(owner, table, count, len(table) + (expected or count))
    pool.extend(owner, table, count)
    for block, key in zip(table, keys, strict=False):
        pool.register(block, key)
    return table


def cached(pool, keys):
    """Blocks with some content that nobody holds any more."""
    table = take(pool, len(keys), keys)
    pool.release(-1, table)
    return table


def test_keys_depend_on_every_token_before_and_on_the_salt():
    same = chain(1, 2, 3, 4)
    assert chain(1, 2, 3, 4, 5) == same
    assert chain(9, 2, 3, 4)[1] != same[1]
    assert chain(1, 2, 3, 9)[0] == same[0] and chain(1, 2, 3, 9)[1] != same[1]
    assert not set(chain(1, 2, 3, 4, salt=b"x" * 16)) & set(same)
    assert [len(key) for key in same] == [16, 16]


def test_blocks_are_taken_lowest_first_and_come_back():
    pool = BlockPool(4)
    first, second = take(pool, 2), take(pool, 1)
    assert (first, second, pool.num_free) == ([0, 1], [2], 1)
    pool.check([first, second])
    pool.release(-1, first)
    assert pool.num_free == 3 and take(pool, 3) == [0, 1, 3]
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 free"):
        pool.extend(-1, second, 1)


def test_known_content_is_found_and_shared():
    pool = BlockPool(4)
    keys = chain(1, 2, 3, 4)
    table = take(pool, 2, keys)
    found = pool.match([*keys, b"unknown"])
    assert found == table and pool.num_held(found) == 2
    pool.share(found)
    pool.check([table, found])
    assert pool.num_free == 2
    pool.release(-1, table)
    assert pool.num_free == 2, "the other table still holds them"
    pool.release(-1, found)
    assert pool.num_free == 4 and pool.match(keys) == table and pool.num_held(table) == 0
    pool.check([])


def test_a_match_stops_at_the_first_gap_and_the_first_block_of_some_content_stays_the_one_that_is_found():
    pool = BlockPool(5)
    keys = chain(1, 2, 3, 4, 5, 6)
    table = take(pool, 3, keys[:1])
    pool.register(table[2], keys[2])
    assert pool.match(keys) == table[:1]
    second = take(pool, 1, keys[:1])
    pool.release(-1, second)
    pool.check([table])
    assert pool.match(keys[:1]) == table[:1]


def test_blank_blocks_go_before_cached_ones_and_the_least_recent_of_those_first():
    pool = BlockPool(6, contiguous=False)
    a, b = chain(1, 2, 3, 4), chain(5, 6)
    cached(pool, a), cached(pool, b)
    again = pool.match(a)  # used once more: now b is the oldest
    pool.share(again)
    pool.release(-1, again)
    assert take(pool, 6) == [3, 4, 5, 2, 1, 0], "of a sequence the end goes first"
    assert pool.match(a) == pool.match(b) == []


def test_reset_forgets_cached_and_held_content():
    pool = BlockPool(6)
    a, b = chain(1, 2, 3, 4), chain(5, 6)
    cached(pool, a)
    table = take(pool, 5, b)
    pool.reset_cache()
    pool.check([table])
    assert pool.match(a) == pool.match(b) == []
    pool.release(-1, table)
    pool.check([])
    assert pool.num_free == 6


# ---- runs


@pytest.mark.parametrize(
    ("contiguous", "tables"), [(True, [[0, 1, 2, 3], [4, 5, 6, 7]]), (False, [[0, 2, 4, 6], [1, 3, 5, 7]])]
)
def test_tables_that_grow_in_turn_stay_in_one_run_each(contiguous, tables):
    pool = BlockPool(12, contiguous=contiguous)
    grown = [take(pool, 1, owner=owner, expected=4) for owner in range(2)]
    for _ in range(3):
        for owner, table in enumerate(grown):
            pool.extend(owner, table, 1)
    assert grown == tables
    pool.check(grown)


def test_a_shorter_run_is_taken_where_the_wished_one_is_not_there():
    pool = BlockPool(10)
    take(pool, 1, owner=0, expected=5)
    table = take(pool, 1, owner=1, expected=8)
    pool.extend(1, table, 3)
    assert table == [5, 6, 7, 8]


def test_runs_end_when_nothing_else_is_free():
    pool = BlockPool(8)
    first, second = take(pool, 1, owner=0, expected=6), take(pool, 2, owner=1)  # 1..5 are set aside
    assert second == [6, 7]
    pool.extend(1, second, 1)
    pool.check([first, second])
    pool.extend(0, first, 4)
    assert (first, second) == ([0, 2, 3, 4, 5], [6, 7, 1]) and pool.num_free == 0
    pool.check([first, second])


def test_a_run_over_cached_blocks_evicts_them_only_when_they_are_written_and_those_first_that_were_the_oldest():
    pool = BlockPool(6)
    low, high = chain(1, 2, 3, 4, 5, 6), chain(7, 8, 9, 10, 11, 12)
    filler = take(pool, 3)
    cached(pool, high)
    pool.release(-1, filler)
    assert cached(pool, low) == [0, 1, 2], "cached later than what is in 3 to 5"
    table = take(pool, 1, owner=0, expected=3)
    assert table == [3] and pool.match(low) == [0, 1, 2]
    assert pool.match(high[1:]) == [4, 5], "set aside, but not yet lost"
    pool.check([table])
    pool.release(0, table)
    tables = [take(pool, 1, owner=owner) for owner in range(1, 4)]
    assert sorted(sum(tables, [])) == [3, 4, 5] and pool.match(low) == [0, 1, 2], "what was not needed goes first"


def test_sharing_a_cached_block_inside_a_run_ends_the_run():
    pool = BlockPool(6)
    filler = take(pool, 3)
    block = cached(pool, chain(1, 2))
    pool.release(-1, filler)
    table = take(pool, 1, owner=1, expected=6)
    assert block == [3] and table == [0]
    pool.share(block)
    pool.check([table, block])
    pool.extend(1, table, 3)
    assert table == [0, 1, 2, 4], "a run as far as it goes"
    pool.check([table, block])


def test_a_run_continues_a_cached_beginning():
    pool = BlockPool(8)
    keys = chain(1, 2, 3, 4)
    filler = take(pool, 2)
    cached(pool, keys)
    pool.release(-1, filler)
    table = pool.match(keys)
    pool.share(table)
    take(pool, 1, owner=1, expected=3, table=table)
    other = take(pool, 2, owner=2)
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


@settings(max_examples=200, deadline=None)
@given(num_blocks=st.integers(1, 24), contiguous=st.booleans(), operations=OPERATIONS)
def test_no_history_breaks_an_invariant(num_blocks, contiguous, operations):
    pool = BlockPool(num_blocks, contiguous=contiguous)
    tables: dict[int, list[int]] = {}
    beginning = chain(*range(12))
    for action, owner, count, more in operations:
        table = tables.get(owner)
        if action in ("new", "hit") and table is None:
            hits = pool.match(beginning[:count]) if action == "hit" else []
            if pool.num_free - (len(hits) - pool.num_held(hits)) >= count:
                pool.share(hits)
                tables[owner] = take(pool, count, owner=owner, expected=count + more, table=hits)
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
