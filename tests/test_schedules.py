"""Pipeline schedules, all stages of them simulated without processes."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.schedules import (
    Backward,
    Forward,
    Receive,
    Send,
    forward_only,
    in_flight,
    receives_with_sends,
    training,
)

MAKERS = {"training": training, "forward only": forward_only}


class Simulation:
    """Stages that carry out their lists in any order of progress; messages between two stages know no tags.

    A send waits while `window` earlier ones of its kind have not been received; a computation waits for its message.
    """

    def __init__(self, lists: list[list], chunks: int, window: int):
        self.lists, self.chunks, self.window = lists, chunks, window
        self.stages = len(lists)
        self.done = [0] * self.stages
        self.sent: dict[tuple, list[tuple]] = defaultdict(list)
        self.awaited: dict[tuple, list[tuple]] = defaultdict(list)
        self.place: dict[tuple, tuple[tuple, int]] = {}
        """Of a message a stage has begun to receive: its flow, and how many came before."""
        self.kept = [0] * self.stages
        self.most_kept = [0] * self.stages
        self.computed: list[tuple] = []

    def run(self, random: Random) -> None:
        """Until all are done; AssertionError if none can go on."""
        while left := [stage for stage in range(self.stages) if self.done[stage] < len(self.lists[stage])]:
            random.shuffle(left)
            assert any(self._advance(stage) for stage in left), f"all wait: {[self._next(stage) for stage in left]}"

    def _next(self, stage: int):
        return self.lists[stage][self.done[stage]]

    def _advance(self, stage: int) -> bool:
        step = self._next(stage)
        match step:
            case Receive(kind, micro_batch, chunk):
                there = self._virtual(stage, chunk) + (-1 if kind == "activation" else 1)
                flow = there % self.stages, stage, kind
                self.place[stage, step] = flow, len(self.awaited[flow])
                self.awaited[flow].append((kind, micro_batch, there))
            case Send(kind, micro_batch, chunk):
                here = self._virtual(stage, chunk)
                flow = stage, (here + (1 if kind == "activation" else -1)) % self.stages, kind
                if len(self.sent[flow]) - len(self.awaited[flow]) >= self.window:
                    return False
                assert (kind, micro_batch, here) in self.computed, "sent before it is computed"
                self.sent[flow].append((kind, micro_batch, here))
            case Forward(micro_batch, chunk) | Backward(micro_batch, chunk):
                kind = "activation" if isinstance(step, Forward) else "gradient"
                message = stage, Receive(kind, micro_batch, chunk)
                if message in self.place:
                    flow, before = self.place[message]
                    if len(self.sent[flow]) <= before:
                        return False
                    assert self.sent[flow][before] == self.awaited[flow][before], "the ends disagree on the order"
                else:
                    ends = 0, self.stages * self.chunks - 1
                    assert self._virtual(stage, chunk) == ends[kind == "gradient"], "computed without its input"
                here = self._virtual(stage, chunk)
                self.computed.append((kind, micro_batch, here))
                if kind == "gradient":
                    assert ("activation", micro_batch, here) in self.computed, "backward before forward"
                self.kept[stage] += 1 if kind == "activation" else -1
                self.most_kept[stage] = max(self.most_kept[stage], self.kept[stage])
        self.done[stage] += 1
        return True

    def _virtual(self, stage: int, chunk: int) -> int:
        return chunk * self.stages + stage


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(MAKERS)),
    st.integers(1, 6),
    st.integers(1, 13),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 2**32),
)
def test_stages_come_to_an_end_in_any_order_of_progress(name, stages, micro_batches, chunks, window, seed):
    chunks = chunks if stages > 1 else 1
    lists = [MAKERS[name](stages, stage, micro_batches, chunks) for stage in range(stages)]
    simulation = Simulation(lists, chunks, window)
    simulation.run(Random(seed))
    kinds = ("activation", "gradient") if name == "training" else ("activation",)
    every = [(kind, m, virtual) for kind in kinds for m in range(micro_batches) for virtual in range(stages * chunks)]
    assert sorted(simulation.computed) == sorted(every)
    assert simulation.sent == simulation.awaited, "what is sent is received"
    if name == "training":
        for stage in range(stages):
            assert simulation.most_kept[stage] <= min(in_flight(stages, stage, chunks), micro_batches * chunks)


def test_1f1b_keeps_as_many_activations_as_stages_follow():
    assert [in_flight(4, stage) for stage in range(4)] == [4, 3, 2, 1]


def duration(stages: int, micro_batches: int, chunks: int, forward: int, backward: int) -> int:
    """Time until every stage is done, when messages take none."""
    lists = [
        [step for step in training(stages, stage, micro_batches, chunks) if isinstance(step, Forward | Backward)]
        for stage in range(stages)
    ]
    ends: dict[tuple, int] = {}
    free, at = [0] * stages, [0] * stages
    while any(at[stage] < len(lists[stage]) for stage in range(stages)):
        for stage in range(stages):
            while at[stage] < len(lists[stage]):
                step = lists[stage][at[stage]]
                here, ahead = step.chunk * stages + stage, isinstance(step, Forward)
                there = here - 1 if ahead else here + 1
                needs = (ahead, step.micro_batch, there)
                if 0 <= there < stages * chunks and needs not in ends:
                    break
                free[stage] = max(free[stage], ends.get(needs, 0)) + (forward if ahead else backward)
                ends[ahead, step.micro_batch, here] = free[stage]
                at[stage] += 1
    return max(free)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_stages_idle_as_long_as_the_paper_says(stages, rounds, chunks):
    """arXiv 2104.04473, section 2.2: (stages - 1) / chunks micro batches; in units of a chunk's forward."""
    micro_batches, whole = rounds * stages, 1 + 2
    busy = micro_batches * chunks * whole
    assert duration(stages, micro_batches, chunks, 1, 2) == busy + (stages - 1) * whole
    assert duration(stages, micro_batches, 1, chunks, 2 * chunks) == busy + (stages - 1) * chunks * whole


def meets(lists: list[list], chunks: int) -> bool:
    """Whether all stages end, if between two computations each waits until all of its messages there have met.

    A message meets when its sender and its receiver have come to it.
    """
    stages = len(lists)
    programs: list[list[set[tuple]]] = []
    for stage, steps in enumerate(lists):
        program: list[set[tuple]] = [set()]
        for step in steps:
            if isinstance(step, Receive | Send):
                later = isinstance(step, Send) == (step.kind == "activation")
                program[-1].add((step.kind, step.micro_batch, step.chunk * stages + stage + later))
            else:
                program.append(set())
        programs.append([messages for messages in program if messages])
    while any(programs):
        came = [message for program in programs if program for message in program[0]]
        for messages in [program[0] for program in programs if program]:
            messages -= {message for message in messages if came.count(message) == 2}
        if all(program[0] for program in programs if program):
            return False
        programs = [[messages for i, messages in enumerate(program) if i or messages] for program in programs]
    return True


@pytest.mark.parametrize("stages", [2, 3, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 13])
def test_stages_never_wait_for_each_other_even_if_every_message_blocks_its_host(stages, micro_batches):
    """Two steps in a row. With interleaved chunks this order does not do for training."""
    for make, chunks in ((training, 1), (forward_only, 1), (forward_only, 3)):
        lists = [make(stages, stage, micro_batches, chunks) for stage in range(stages)]
        late = [receives_with_sends(steps) for steps in lists]
        assert [sorted(map(repr, steps)) for steps in late] == [sorted(map(repr, steps)) for steps in lists]
        assert meets([[*steps, "between", *steps] for steps in late], chunks)
    if micro_batches > 3:
        lists = [receives_with_sends(training(2, stage, micro_batches, 2)) for stage in range(2)]
        assert not meets(lists, 2)
