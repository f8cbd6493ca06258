"""Which replica gets a request: the books always add up, prefixes draw, imbalance and slowness repel."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megalite
from megalite.config.schema import SamplingParams
from megalite.inference.balancer import PAGE, LoadBalancer, Move
from megalite.inference.prefix_index import PrefixIndex, page_keys
from megalite.inference.request import Request

PAGE_TOKENS = 16 * PAGE


@dataclass(frozen=True)
class Work:
    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int = 10
    num_samples: int = 1


def prompt(content: int, pages: int, tail: int = 1) -> tuple[int, ...]:
    return (*[content] * (pages * PAGE_TOKENS), *[1 << 40] * tail)


POLICIES = st.sampled_from(["round_robin", "least_tokens", "prefix"])
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 200)),
        st.tuples(st.sampled_from(["started", "finished"]), st.integers(0, 30)),
        st.tuples(st.just("gained"), st.integers(0, 30), st.integers(0, 300)),
        st.tuples(st.sampled_from(["lost", "joined"]), st.integers(0, 4)),
        st.tuples(st.just("speed"), st.integers(0, 4), st.floats(0.1, 1000)),
        st.tuples(st.just("moves")),
    ),
    max_size=40,
)


class Books:
    """A balancer, and what it must know."""

    def __init__(self, policy: str):
        self.balancer = LoadBalancer(range(3), policy, num_blocks=40)
        self.members = {0, 1, 2}
        self.where: dict[str, int] = {}
        self.started: set[str] = set()
        self.made = 0
        self.said: list[object] = []

    def call(self, what: str, *values: float) -> None:
        getattr(self, "call_" + what)(*values)
        assert len(self.balancer.index) <= len(self.members) * 40 // PAGE
        assert all(self.balancer.outstanding(member) >= 0 for member in self.members)
        for member in self.members - set(self.where.values()):
            assert self.balancer.outstanding(member) == 0

    def call_assign(self, content: int, pages: int, max_tokens: int) -> None:
        work = Work(str(self.made), prompt(content, pages), max_tokens)
        if not self.members:
            with pytest.raises(LookupError):
                self.balancer.assign(work)
            return
        self.made += 1
        before = {member: self.balancer.outstanding(member) for member in self.members}
        self.where[work.id] = self.balancer.assign(work)
        assert self.where[work.id] in self.members
        gained = {member: self.balancer.outstanding(member) - before[member] for member in self.members}
        assert 0 < gained.pop(self.where[work.id]) <= len(work.prompt_token_ids) + max_tokens
        assert not any(gained.values())
        self.said.append(self.where[work.id])

    def call_started(self, number: int) -> None:
        self.balancer.started(str(number))
        self.started |= {str(number)} & set(self.where)

    def call_gained(self, number: int, tokens: int) -> None:
        self.balancer.gained(str(number), tokens)

    def call_finished(self, number: int) -> None:
        self.balancer.finished(str(number))
        self.where.pop(str(number), None)

    def call_lost(self, number: int) -> None:
        if number in self.members:
            names = self.balancer.lost(number)
            assert sorted(names) == sorted(name for name, at in self.where.items() if at == number)
            self.where = {name: at for name, at in self.where.items() if at != number}
            self.members.remove(number)
            self.said.append(names)

    def call_joined(self, number: int) -> None:
        if number not in self.members:
            self.balancer.joined(number, 40)
            self.members.add(number)

    def call_speed(self, number: int, rate: float) -> None:
        if number in self.members:
            self.balancer.speed(number, rate)

    def call_moves(self) -> None:
        moves = self.balancer.moves()
        for move in moves:
            assert move.name not in self.started and self.where[move.name] == move.source != move.target
            self.where[move.name] = move.target
        assert len({move.name for move in moves}) == len(moves)
        assert not self.balancer.moves(), "they go once, not to and fro"
        self.said.append(moves)

    def end(self) -> None:
        for name in list(self.where):
            self.call("finished", int(name))
        assert not any(self.balancer.outstanding(member) for member in self.members)


@settings(max_examples=50)
@given(POLICIES, CALLS)
def test_the_books_add_up_whatever_happens(policy, calls):
    first, second = Books(policy), Books(policy)
    for books in (first, second):
        for call in calls:
            books.call(*call)
        books.end()
    assert first.said == second.said, "the same calls, the same answers"


def test_a_request_of_the_engine_is_assigned():
    params = SamplingParams(n=2, best_of=3)
    balancer = megalite.LoadBalancer([7, 9])
    request = Request(id="a", prompt_token_ids=(1,) * 100, params=params, seed=0, max_tokens=10)
    assert balancer.assign(request) == 7
    assert (balancer.outstanding(7), balancer.outstanding(9)) == (100 + 3 * 10, 0)


def test_a_prefix_draws_until_its_replica_has_too_much_to_do():
    balancer = LoadBalancer(range(3))
    placed = [balancer.assign(Work(str(number), prompt(5, 4, 200), 200)) for number in range(30)]
    assert placed[:2] == [0, 1], "400 tokens to do outweigh 256 saved"
    assert set(placed) == {0, 1, 2}, "and then all have it"
    loads = [balancer.outstanding(replica) for replica in range(3)]
    assert max(loads) - min(loads) <= 4 * PAGE_TOKENS + 400 + 0.25 * sum(loads) / 3
    for number in range(30):
        balancer.started(str(number))
        balancer.finished(str(number))
    assert balancer.assign(Work("x", prompt(6, 1))) == 0
    assert balancer.assign(Work("long", prompt(7, 9))) == 1
    balancer.finished("x")
    assert balancer.assign(Work("longer", prompt(7, 30))) == 1, (
        "the beginning counts, though replica 0 has nothing to do"
    )


def test_unequal_speeds_give_unequal_shares():
    balancer = LoadBalancer(range(3), "least_tokens")
    for replica, rate in ((0, 50.0), (1, 100.0)):
        for _ in range(100):
            balancer.speed(replica, rate)
    placed = [balancer.assign(Work(str(number), prompt(1, 1))) for number in range(90)]
    assert [placed.count(replica) for replica in range(3)] == [20, 40, 30], "unmeasured: as the mean of the others"


def test_outputs_are_predicted_from_those_that_ended():
    balancer = LoadBalancer([0])
    for number in range(200):
        balancer.assign(Work(str(number), (1,), 1000))
        balancer.started(str(number))
        balancer.gained(str(number), 100)
        balancer.finished(str(number))
    balancer.assign(Work("like them", (1,), 1000))
    assert balancer.outstanding(0) == 1 + 100
    balancer.gained("like them", 150)
    assert balancer.outstanding(0) == 1 + 150, "it went beyond"
    balancer.assign(Work("short", (1,), 10))
    assert balancer.outstanding(0) == 151 + 1 + 10


def test_what_has_not_started_goes_to_a_replica_that_joins():
    balancer = LoadBalancer([0])
    for number in range(8):
        balancer.assign(Work(str(number), prompt(number, 1)))
    for number in range(3):
        balancer.started(str(number))
    assert balancer.moves() == []
    balancer.joined(1)
    assert balancer.moves() == [Move(name, 0, 1) for name in ("7", "6", "5")], "the last ones; half of them, not more"
    assert balancer.lost(1) == ["7", "6", "5"]
    assert balancer.assign(Work("7 again", prompt(7, 1))) == 0


def test_round_robin_takes_turns_whatever_happens():
    balancer = LoadBalancer(range(3), "round_robin")
    placed = [balancer.assign(Work(str(number), prompt(1, number))) for number in range(4)]
    balancer.lost(1)
    placed += [balancer.assign(Work(str(number), prompt(1, 1))) for number in range(4, 7)]
    assert placed == [0, 1, 2, 0, 2, 0, 2] and balancer.moves() == []


def test_pages_are_forgotten_in_the_order_of_their_last_use():
    index = PrefixIndex()
    for replica in range(2):
        index.add(replica, 4)
    index.use(0, [1, 2])
    index.use(1, [1, 2, 3])
    assert [index.match(keys) for keys in ([1, 2, 3], [1, 2, 9], [1], [9, 1])] == [(2, 3), (3, 2), (3, 1), (0, 0)]
    index.use(0, [5, 6])
    index.use(0, [1])
    index.use(0, [7])  # the end of the oldest prompt goes
    assert [index.known(0, keys) for keys in ([1, 2], [5, 6], [7])] == [1, 2, 1]
    index.use(0, [], others=3)
    assert len(index) == 3 + 2 and index.known(0, [7]) == 1, "what nobody asks for takes room too"
    index.remove(1)
    assert index.match([1, 2, 3]) == (0, 0)


def test_the_index_of_many_replicas_is_bounded_in_all():
    index = PrefixIndex(limit=100)
    for replica in range(10):
        index.add(replica, 1000)
    for replica in range(10):
        index.use(replica, page_keys(prompt(replica, 60), PAGE_TOKENS))
    assert len(index) <= 100


def test_a_key_stands_for_all_that_came_before():
    one, other = page_keys((1, 2, 3, 4, 5), 2), page_keys((9, 2, 3, 4), 2)
    assert len(one) == 2 and not set(one) & set(other)
