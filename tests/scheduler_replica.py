"""A replica without a model, for tests of the scheduler: it executes plans on a pretended cache and checks every read.

A cache slot holds the whole history that its keys and values would stand for, so what a row attends to can be compared
with what it must be. The next token is a hash of that history.
"""

from __future__ import annotations

from collections import Counter, deque
from zlib import crc32

from megalite.config.schema import SamplingParams
from megalite.inference.request import Request, Sampled, Sequence, StepPlan
from megalite.inference.scheduler import Scheduler

VOCAB = 5
STOP_TOKEN = 4


def request(name, prompt, max_tokens=4, *, stops=False, n=1, max_model_len=10_000, grammar="", **params) -> Request:
    """A request; `prompt` is a list of token ids or a length."""
    prompt = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Request(
        id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(n=n, **params),
        seed=len(prompt),
        max_tokens=min(max_tokens, max_model_len - len(prompt)),
        stop_token_ids=frozenset([STOP_TOKEN] if stops else []),
        grammar=grammar,
    )


def next_token(request: Request, index: int, token_ids: list[int]) -> Sampled:
    """What the pretended model says: depends on the request's seed, the sample and the history, on nothing else."""
    luck = crc32(repr((token_ids, request.seed, index % 2)).encode())  # samples 0 and 2 are clones: they may share
    return Sampled(luck % VOCAB, stopped=bool(request.stop_token_ids) and luck % 13 == 0)


def expected_output(request: Request, index: int) -> tuple[list[int], str]:
    """Output tokens and finish reason of one sample, worked out without a scheduler."""
    output: list[int] = []
    while len(output) < request.max_tokens:
        sampled = next_token(request, index, [*request.prompt_token_ids, *output])
        output.append(sampled.token_id)
        stopped = sampled.token_id in request.stop_token_ids and len(output) >= request.params.min_tokens
        if stopped or sampled.stopped:
            return output, "stop"
    return output, "length"


class Replica:
    """Drives one Scheduler as the engine does, cohort by cohort, and checks each plan as it is made.

    `overlap`: steps that results come later than right before the next plan of their cohort.
    """

    def __init__(
        self, *, overlap=0, num_blocks=64, block_size=4, max_num_seqs=8, budget=64, max_model_len=10_000, **options
    ):
        self.cohorts = options.get("cohorts", 1)
        self.block_size, self.budget, self.max_num_seqs = block_size, budget, max_num_seqs
        self.host_blocks = options.get("host_blocks", 0)
        self.shared = options.get("prefix_caching", True)
        self.key_variant = options.get("key_variant", lambda limit: 0)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            **options,
        )
        self.sequences: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.in_flight: deque[tuple[StepPlan, tuple[Sampled, ...]]] = deque()
        self.lag = self.cohorts + overlap
        self.turn = 0
        self.scored: dict[str, list[int]] = {}
        self.trace: list[int] = []
        self._tokens: dict[int, list[int]] = {}  # of each row, known to the host or not
        self._device: dict[tuple[int, int], tuple] = {}
        self._host: dict[tuple[int, int], tuple] = {}

    def add(self, *requests: Request) -> list[Sequence]:
        new = [seq for each in requests for seq in self.scheduler.add(each)]
        self.sequences += new
        return new

    def abort(self, name: str) -> None:
        self.ended += self.scheduler.abort(name)
        self.check()

    def step(self):
        """Finish the plan of `lag` steps ago, make and execute the next one, and return that."""
        cohort, self.turn = self.turn, (self.turn + 1) % self.cohorts
        if len(self.in_flight) == self.lag:
            self.settle()
        plan = self.scheduler.schedule(cohort)
        self.in_flight.append((plan, self._execute(plan)))
        self.check()
        self.trace.append(self.scheduler.state_hash())
        return plan

    def settle(self) -> list[Sequence]:
        """Bring back the results of the oldest plan in flight."""
        ended = self.scheduler.finish(*self.in_flight.popleft())
        self.ended += ended
        self.check()
        return ended

    def drain(self, most_steps=5000) -> None:
        """Step until nothing is left."""
        for _ in range(most_steps):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work(), f"still at work after {most_steps} steps"
        while self.in_flight:  # planned in vain
            assert not self.settle()
        assert sorted(self.scheduler._free_rows) == list(range(self.scheduler.max_num_seqs))
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def check(self) -> None:
        """Nothing leaked, nothing counted twice, and `contiguous` tells the truth."""
        self.scheduler.pool.check([seq.blocks for seq in self.sequences if seq.blocks])
        hosts = [block for seq in self.sequences for block in seq.host_blocks]
        assert sorted([*hosts, *self.scheduler._host_free]) == list(range(self.host_blocks))
        for seq in self.sequences:
            assert seq.contiguous == all(b == a + 1 for a, b in zip(seq.blocks, seq.blocks[1:], strict=False))
            assert not (seq.finish_reason and (seq.blocks or seq.host_blocks))
        assert len(self.ended) == len(set(map(id, self.ended))), "a sequence ended twice"

    def _execute(self, plan) -> tuple[Sampled, ...]:
        assert plan.num_tokens <= self.budget
        assert len(plan.rows) <= max(1, self.max_num_seqs // self.cohorts)
        assert plan.rows or not plan.copies
        assert len({id(row.sequence) for row in plan.rows}) == len(plan.rows)
        for copy in plan.copies:
            source, target = (self._device, self._host) if copy.kind == "out" else (self._host, self._device)
            for offset in range(self.block_size):
                target[copy.target, offset] = source.get((copy.source, offset))
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        for seq in plan.admitted:
            self._tokens[seq.row] = list(seq.token_ids)
        written = set()
        for row in plan.rows:
            assert row.row == row.sequence.row and len(self._tokens[row.row]) == row.sequence.planned - row.sample
            if row.sample and row.sequence.request.grammar:
                assert self._tokens[row.row] == row.sequence.token_ids, "what may come next hangs on all values"
            if row.token >= 0:
                assert row.token == self._tokens[row.row][row.start]
            if row.block >= 0:
                assert row.start % self.block_size == 0 and row.block == row.sequence.blocks[-1]
            for position in range(row.start, row.start + row.count):
                slot = self._slot(row.sequence, position)
                assert slot not in written, "written twice"
                written.add(slot)
                self._device[slot] = self._truth(row.sequence, position)
        self._check_sharing({block for block, _ in written})
        for row in plan.rows:
            seq, end = row.sequence, row.start + row.count
            known = len(self._tokens[row.row])
            assert row.count > 0 and end == seq.num_computed <= known
            assert row.sample == (end == known and seq.request.max_tokens > 0)
            for position in range(end):
                assert self._device[self._slot(seq, position)] == self._truth(seq, position), f"stale at {position}"
            lo, hi = row.prompt_logits
            if lo < hi:
                assert row.start <= lo and hi <= end and seq.index == 0
                self.scored.setdefault(seq.request.id, []).extend(range(lo, hi))
        results = []
        for row in plan.sampled:
            tokens, seq = self._tokens[row.row], row.sequence
            results.append(next_token(seq.request, seq.index, tokens))
            tokens.append(results[-1].token_id)
        return tuple(results)

    def _check_sharing(self, written: set[int]) -> None:
        """A block that is written may be in several tables only if it is full and means the same in each."""
        meanings: dict[int, set] = {block: set() for block in written}
        holders = Counter(block for seq in self.sequences for block in seq.blocks)
        for seq in self.sequences:
            for index, block in enumerate(seq.blocks):
                if block in written and holders[block] > 1:
                    end = (index + 1) * self.block_size
                    assert seq.num_computed >= end, "a block that is not full is shared"
                    meanings[block].add(self._truth(seq, end - 1))
        assert all(len(meaning) <= 1 for meaning in meanings.values()), "a block means different things"

    def _slot(self, seq: Sequence, position: int) -> tuple[int, int]:
        return seq.blocks[position // self.block_size], position % self.block_size

    def _truth(self, seq: Sequence, position: int) -> tuple:
        """The history that stands at a position; with prefix caching off it belongs to one request alone."""
        owner = None if self.shared else seq.request.id
        return owner, self.key_variant(seq.request.longest), tuple(self._tokens[seq.row][: position + 1])
