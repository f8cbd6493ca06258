"""Which sequences compute which tokens in which step: continuous batching over a paged KV cache. Torch-free.

Every rank of a replica runs the same scheduler on the same history and so makes the same plans: nothing here reads a
clock, a device or a random number.

Plans run in the order in which they were made, and within a plan every row's keys and values are written before any
row attends. A block is therefore known to the prefix cache from the moment its last token is scheduled and its value
known, and a sequence in the same plan may share it already. For the same reason blocks can be given back while plans
that use them are in flight: whoever gets them writes later.

With a pipeline of p stages, p cohorts take turns. Results come back (`finish`) in the order of the plans, any number of
plans later: the next token of a sequence is planned before the last one is known. Where it turns out that the sequence
had ended, the token that was planned in vain is dropped.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from zlib import crc32

from megalite.errors import MegaliteError, ResourceError
from megalite.inference.blocks import BlockPool, block_keys
from megalite.inference.request import BlockCopy, FinishReason, Request, Row, Sampled, Sequence, StepPlan


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the scheduler was made."""

    preemptions: int = 0
    swapped_blocks: int = 0
    """Blocks copied to host memory."""
    prefix_hit_tokens: int = 0
    """Tokens whose keys and values were found in the cache instead of being computed."""
    prefix_query_tokens: int = 0
    """Tokens that were looked up there: prompts, of every sample, and after a preemption what had been written too."""


class Scheduler:
    """Decides first come, first served; see `schedule` for the policy.

    Args:
        num_blocks, block_size: the KV cache of every rank, in blocks and tokens a block.
        max_num_seqs: most sequences running; each cohort gets an equal part, at least one.
        max_num_batched_tokens: most tokens in one plan; longer prompts are computed in chunks.
        max_model_len: longest prompt + output.
        cohorts: disjoint sets of sequences in flight, one for each pipeline stage.
        prefix_caching: share prompts between requests; without it only the samples of one request share.
        has_states: layers keep a state of each sequence, which no block has: every sequence computes its own prompt,
            and a preempted one is recomputed.
        host_blocks: blocks of host memory to swap preempted sequences to; one that finds no room is recomputed.
        contiguous: prefer neighbouring blocks for a sequence; on a CPU, gathering others takes a tenth of the time.
        key_variant: from prompt + max_tokens to a number; only sequences with equal numbers share keys and values.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        cohorts: int = 1,
        prefix_caching: bool = True,
        has_states: bool = False,
        host_blocks: int = 0,
        contiguous: bool = True,
        key_variant: Callable[[int], int] = lambda limit: 0,
    ):
        self.pool = BlockPool(num_blocks, contiguous=contiguous)
        self.stats = SchedulerStats()
        self._block_size = block_size
        self._max_tokens = max_num_batched_tokens
        # Each running sequence decodes one token a step, so more of them than tokens could starve the last ones.
        self._cohort_seqs = min(max(1, max_num_seqs // cohorts), max_num_batched_tokens)
        self.max_num_seqs = self._cohort_seqs * cohorts
        """Most sequences running at once, over all cohorts."""
        self._max_model_len = max_model_len
        assert not (has_states and host_blocks), "blocks that are swapped out would lose the states of their sequence"
        self._prefix_caching = prefix_caching
        self._has_states = has_states
        self._key_variant = key_variant
        self._host_free = list(reversed(range(host_blocks)))
        self._waiting: deque[Sequence] = deque()  # by arrival
        self._running: list[list[Sequence]] = [[] for _ in range(cohorts)]  # each by arrival
        self._in_flight: deque[StepPlan] = deque()  # those that have rows
        self._free_rows = list(reversed(range(self.max_num_seqs)))
        self._row_uses = [0] * self.max_num_seqs  # its sequence, if it has one, and plans in flight
        self._unfinished: dict[str, list[Sequence]] = {}
        self._copies: list[BlockCopy] = []  # for the next plan that has rows
        self._step = 0
        self._arrivals = 0
        self._cache_age = 0

    # ---- what comes in

    def add(self, request: Request) -> list[Sequence]:
        """Queue `request` and return its sequences, one a sample that has not ended.

        A sequence with given tokens goes on after them, as after a preemption; where they end it already, it comes back
        with its finish_reason and is not queued.

        Raises:
            MegaliteError: the id is in use, the prompt is empty, prompt and output exceed `max_model_len`, or what is
                given fits no samples of the request.
            ResourceError: prompt and output can never be in the KV cache at once.
        """
        prompt, max_tokens, pool = request.prompt_token_ids, request.max_tokens, self.pool
        known = list(prompt)
        if max_tokens == 0 and len(prompt) > 1:
            known.pop()  # the last token of a text that is only scored is never an input
        limit = len(known) + max_tokens
        if request.id in self._unfinished:
            raise MegaliteError(f"request {request.id}: a request of this id is unfinished")
        if not prompt:
            raise MegaliteError(f"request {request.id}: the prompt is empty")
        if limit > self._max_model_len:
            raise MegaliteError(
                f"request {request.id}: prompt ({len(prompt)} tokens) and output ({max_tokens}) exceed "
                f"max_model_len ({self._max_model_len})"
            )
        if self._blocks_for(max(len(known), limit - 1)) > pool.num_blocks:  # the last token is never an input
            raise ResourceError(
                f"request {request.id}: prompt ({len(prompt)} tokens) and output ({max_tokens}) do not fit "
                f"into the KV cache of {self.pool.num_blocks} blocks of {self._block_size} tokens"
            )
        if len(request.given) not in (0, request.num_samples) or max(map(len, request.given), default=0) > max_tokens:
            raise MegaliteError(f"request {request.id}: what it had already is not {request.num_samples} outputs")
        salt = self._salt(self._arrivals, request)
        sequences = []
        for index in range(request.num_samples):
            arrival, self._arrivals = self._arrivals, self._arrivals + 1
            if index in request.ended:
                continue
            given = request.given_to(index)
            seq = Sequence(
                request,
                index,
                [*known, *given],
                planned=len(known) + len(given),
                arrival=arrival,
                limit=limit,
                num_inputs=limit - (max_tokens > 0),
                chain=[salt],
            )
            seq.finish_reason = request.end_at(given[-1], len(given)) if given else None
            sequences.append(seq)
        queued = [seq for seq in sequences if seq.finish_reason is None]
        if queued:
            if request.params.prompt_logprobs is not None:
                queued[0].score_end = len(prompt) - 1
            self._unfinished[request.id] = list(queued)
            self._waiting.extend(queued)
        return sequences

    def stop(self, seq: Sequence) -> None:
        """End a sequence whose output is complete for a reason that the scheduler can't see."""
        self._end(seq, "stop")

    def abort(self, request_id: str) -> list[Sequence]:
        """End what is left of a request and return the sequences that ended; what is in flight for them is dropped.

        An unknown id is no error: the request may just have ended.
        """
        ended = list(self._unfinished.get(request_id, ()))
        for seq in ended:
            self._end(seq, "abort")
        return ended

    def clear(self) -> list[Sequence]:
        """End every request at once, in flight or not; the sequences that ended.

        Cached prefixes are forgotten too, as after an exception it is not known which plans have run.
        """
        ended = [seq for request_id in list(self._unfinished) for seq in self.abort(request_id)]
        self.forget_plans()
        self._copies.clear()
        self.reset_cache()
        return ended

    def forget_plans(self) -> None:
        """Drop the plans in flight, of which no results will come; no sequence may be unfinished."""
        assert not self._unfinished, "results are awaited"
        while self._in_flight:
            self._retire(self._in_flight.popleft())

    def reset_cache(self) -> None:
        """Forget every cached prefix; needed when the weights change. Sequences that have begun keep what they hold."""
        self.pool.reset_cache()
        self._cache_age += 1
        for seq in self._waiting:
            if not seq.host_blocks:
                seq.chain = [self._salt(seq.arrival - seq.index, seq.request)]

    # ---- one step

    def schedule(self, cohort: int = 0) -> StepPlan:
        """The next step of `cohort`.

        Sequences that decode come first; one that finds no free block preempts the latest arrival of its cohort, in the
        end itself. Then prompts that are partly computed, then waiting sequences in order of arrival, preempted ones
        among them.
        """
        running = self._running[cohort]
        rows: list[Row] = []
        prefills: list[Sequence] = []
        for seq in running:  # gets shorter, from its end, when sequences are preempted
            start = seq.num_computed
            if start == seq.num_inputs:  # its last token is being sampled
                continue
            if seq.request.grammar and seq.planned > len(seq.token_ids):  # what may come next hangs on the last value
                continue
            if seq.planned - start > 1:
                prefills.append(seq)
            elif start < len(seq.blocks) * self._block_size:
                rows.append(self._row(seq, 1))
            elif self._grow(seq, cohort):
                rows.append(self._row(seq, 1, block=seq.blocks[-1]))
        budget = self._max_tokens - len(rows)
        for seq in prefills:
            if budget:  # none of these was preempted: victims arrived later than the one that decodes
                count = min(seq.planned - seq.num_computed, budget)
                rows.append(self._row(seq, count))
                budget -= count
        admitted = self._admit(cohort, rows, budget) if budget and self._waiting else []
        plan = StepPlan(self._step, cohort, tuple(rows), tuple(admitted), tuple(self._copies) if rows else ())
        self._step += 1
        if rows:
            self._copies.clear()
            self._in_flight.append(plan)
            for row in rows:
                self._row_uses[row.row] += 1
        return plan

    def finish(self, plan: StepPlan, results: tuple[Sampled, ...]) -> list[Sequence]:
        """Take the results of `plan.sampled`, in order; return the sequences that ended, their finish_reason set.

        `plan` must be the oldest that has rows and is not finished. Results of sequences that have ended are dropped.
        """
        if not plan.rows:
            return []
        assert self._in_flight and self._in_flight[0] is plan, f"plan {plan.step} is not the oldest in flight"
        assert len(results) == len(plan.sampled), f"{len(results)} results for {len(plan.sampled)} sampled rows"
        self._in_flight.popleft()
        ended = []
        remaining = iter(results)
        for row in plan.rows:
            seq = row.sequence
            result = next(remaining) if row.sample else None
            if seq.finish_reason is not None:
                continue
            reason: FinishReason | None = None
            if result is not None:
                reason = self._take(seq, result)
            elif row.start + row.count == seq.limit:
                reason = "length"
            if reason is not None:
                self._end(seq, reason)
                ended.append(seq)
        self._retire(plan)
        return ended

    # ---- looking at it

    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unfinished)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks, in all cohorts."""
        return sum(len(running) for running in self._running)

    def state_hash(self) -> int:
        """32 bits of everything that decides the next plans, to compare over ranks; made anew at each call."""
        numbers = [self._step, self._arrivals, self.pool.digest(), self._cache_age, len(self._waiting)]
        numbers += [seq.arrival for seq in self._waiting]
        numbers += self._host_free
        for running in self._running:
            numbers.append(len(running))
            for seq in running:
                numbers += (seq.arrival, seq.row, seq.num_computed, len(seq.token_ids), seq.token_ids[-1])
                numbers += (len(seq.blocks), seq.blocks[-1])
        return crc32(array("q", numbers).tobytes())

    # ---- inside

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _salt(self, first_arrival: int, request: Request) -> bytes:
        """Start of a request's chain of content keys; `first_arrival` is its first sample's, so unlike any other's."""
        owner = -1 if self._prefix_caching else first_arrival
        salt = array("q", (self._cache_age, owner, self._key_variant(request.longest))).tobytes()
        return salt + request.lora.encode()  # keys and values are the adapter's as well

    def _row(self, seq: Sequence, count: int, *, block: int = -1) -> Row:
        """Schedule the next `count` tokens of a sequence that has the blocks for them."""
        start = seq.num_computed
        end = seq.num_computed = start + count
        if start // self._block_size != end // self._block_size:
            self._register(seq)
        wanted = (0, 0)
        if seq.score_from < seq.score_end:
            wanted_end = min(end, seq.score_end)
            if seq.score_from < wanted_end:
                wanted = (max(start, seq.score_from), wanted_end)
                seq.score_from = wanted_end
        sample = end == seq.planned < seq.limit
        seq.planned += sample
        token = seq.token_ids[start] if count == 1 and start < len(seq.token_ids) else -1
        return Row(seq, seq.row, start, count, sample, token, block, wanted)

    def _shares(self, seq: Sequence) -> bool:
        """Whether another sequence may look for its blocks. Else they are blank once they are released and are used
        again first: their memory is backed by pages of the host already."""
        return not self._has_states and (self._prefix_caching or seq.request.num_samples > 1)

    def _register(self, seq: Sequence) -> None:
        """Make blocks known to the prefix cache that have become full of computed and known tokens."""
        full = min(seq.num_computed, len(seq.token_ids)) // self._block_size
        if full > seq.registered and self._shares(seq):
            chain = self._chain(seq, full)
            for index in range(seq.registered, full):
                self.pool.register(seq.blocks[index], chain[index + 1])
            seq.registered = full

    def _chain(self, seq: Sequence, full: int) -> list[bytes]:
        """The sequence's chain of content keys, known for at least `full` blocks."""
        chain, size = seq.chain, self._block_size
        if len(chain) == 1 and seq.index:  # samples share the prompt, so also the work of hashing it
            first = self._unfinished[seq.request.id][0]
            if first.chain[0] == chain[0]:
                chain += first.chain[1 : 1 + seq.num_prompt // size]
        begun = len(chain) - 1
        chain += block_keys(chain[-1], seq.token_ids[begun * size : full * size], size)
        return chain

    def _grow(self, seq: Sequence, cohort: int) -> bool:
        """Give a sequence that runs in `cohort` one more block; False: it was preempted itself."""
        while self.pool.num_free == 0:
            if self._preempt(cohort) is seq:
                return False
        blocks = seq.blocks
        self.pool.extend(seq.arrival, blocks, 1)
        seq.contiguous = seq.contiguous and blocks[-1] == blocks[-2] + 1
        return True

    def _preempt(self, cohort: int) -> Sequence:
        """Move the latest arrival of a cohort, which this step has not scheduled yet, back to the queue."""
        seq = self._running[cohort].pop()
        used = self._blocks_for(seq.num_computed)
        if used <= len(self._host_free):
            seq.host_blocks = [self._host_free.pop() for _ in range(used)]
            self._copies += [BlockCopy("out", *pair) for pair in zip(seq.blocks[:used], seq.host_blocks, strict=True)]
            self.stats.swapped_blocks += used
        else:
            seq.num_computed = 0
        self.stats.preemptions += 1
        self._release(seq)
        insort(self._waiting, seq, key=attrgetter("arrival"))
        return seq

    def _admit(self, cohort: int, rows: list[Row], budget: int) -> list[Sequence]:
        """Move waiting sequences to `cohort` and schedule them while there is room, in order, none overtaking another.

        A sequence gets the blocks of all its known tokens at once, so that a prompt which is partly computed never has
        to preempt, and one free block is left for each running sequence that may grow. One that was preempted while a
        token of it was in flight waits until that is known.
        """
        running, size = self._running[cohort], self._block_size
        share = -(-(self.num_running + len(self._waiting)) // len(self._running))
        room = min(min(self._cohort_seqs, share) - len(running), len(self._free_rows))
        if room <= 0:
            return []
        growing = sum(1 for each in self._running for seq in each if len(seq.blocks) * size < seq.limit - 1)
        admitted: list[Sequence] = []
        place = 0
        while room and budget and place < len(self._waiting):
            seq = self._waiting[place]
            if self._awaits_first_sample(seq):
                place += 1
                continue
            if seq.planned > len(seq.token_ids) or not self._place(seq, growing):
                break
            del self._waiting[place]
            seq.cohort = cohort
            seq.row = self._free_rows.pop()
            self._row_uses[seq.row] = 1
            insort(running, seq, key=attrgetter("arrival"))
            growing += len(seq.blocks) * size < seq.limit - 1
            count = min(seq.planned - seq.num_computed, budget)
            rows.append(self._row(seq, count))
            admitted.append(seq)
            room -= 1
            budget -= count
        return admitted

    def _awaits_first_sample(self, seq: Sequence) -> bool:
        """Whether the prompt of `seq` is still being computed by the first sample of its request."""
        if seq.index == 0 or seq.num_computed or seq.host_blocks or not self._shares(seq):
            return False
        first = self._unfinished[seq.request.id][0]
        return first.index == 0 and first.num_computed < seq.num_prompt // self._block_size * self._block_size

    def _place(self, seq: Sequence, growing: int) -> bool:
        """Give a waiting sequence the blocks of all its known tokens, if that leaves `growing` free; False if not."""
        pool, size, known = self.pool, self._block_size, len(seq.token_ids)
        if seq.host_blocks:
            usable = seq.num_computed // size
        else:
            usable = (known - 1) // size  # the last token's logits are wanted, so it is computed in any case
            if seq.score_from < seq.score_end:
                usable = min(usable, seq.score_from // size)
        blocks = pool.match(self._chain(seq, usable)[1 : 1 + usable]) if self._shares(seq) else []
        hits = len(blocks)
        count = self._blocks_for(known) - hits
        if pool.num_free - (hits - pool.num_held(blocks)) - count < growing:
            return False
        pool.share(blocks)
        pool.claim(seq.arrival, blocks, count, self._blocks_for(max(known, seq.limit - 1)))
        pool.extend(seq.arrival, blocks, count)
        seq.blocks = blocks
        seq.contiguous = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        if seq.host_blocks:
            missing = zip(seq.host_blocks[hits:], blocks[hits:], strict=False)
            self._copies += [BlockCopy("in", source, target) for source, target in missing]
            self._host_free += reversed(seq.host_blocks)
            seq.host_blocks = []
            seq.registered = hits
            self._register(seq)
        else:
            seq.num_computed, seq.registered = hits * size, hits
            self.stats.prefix_hit_tokens += hits * size
            self.stats.prefix_query_tokens += known
        return True

    def _take(self, seq: Sequence, result: Sampled) -> FinishReason | None:
        """Append a sampled token; returns why the sequence ends with it, or None."""
        if result.token_id < 0:
            return "error"
        seq.token_ids.append(result.token_id)
        if len(seq.token_ids) % self._block_size == 0 and seq.blocks:
            self._register(seq)
        return "stop" if result.stopped else seq.request.end_at(result.token_id, seq.num_output)

    def _release(self, seq: Sequence) -> None:
        """Give back blocks and row of a running sequence."""
        self.pool.release(seq.arrival, seq.blocks)
        seq.blocks = []
        seq.contiguous = True
        seq.registered = 0
        seq.cohort = None
        self._give_back_rows([seq.row])
        seq.row = -1

    def _retire(self, plan: StepPlan) -> None:
        """Take the plan off those in flight."""
        self._give_back_rows([row.row for row in plan.rows])

    def _give_back_rows(self, rows: Iterable[int]) -> None:
        """End a use of each row. One that plans in flight still write to can't be another sequence's yet."""
        for row in rows:
            self._row_uses[row] -= 1
            if self._row_uses[row] == 0:
                self._free_rows.append(row)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """Take a sequence off its queue and give back what it holds."""
        siblings = self._unfinished[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self._unfinished[seq.request.id]
        if seq.cohort is None:
            self._waiting.remove(seq)
        else:
            self._running[seq.cohort].remove(seq)
            self._release(seq)
        self._host_free += reversed(seq.host_blocks)
        seq.host_blocks = []
        seq.chain = []
        seq.finish_reason = reason
