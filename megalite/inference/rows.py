"""What each running sequence has on the device, by row number, and the tensors of a step made of it.

A step plan names rows; their tokens, block tables and lengths are here already. So a plan is a few small integer
arrays, copied to the device at once, and a step never waits for the host to learn a token: the sampler writes it here.
On a CPU the same buffers are tensors in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megalite.inference.request import Sequence, StepPlan
from megalite.kernels.device import send
from megalite.kernels.step import read_rows
from megalite.model.attention import AttentionContext
from megalite.model.device_attention import DeviceAttention
from megalite.model.host_attention import CacheRow, HostAttention
from megalite.model.kv_cache import DeviceCache, HostCache
from megalite.model.recurrence import Recurrence, Run

FIELDS = 6
"""Integers for each row in a step of a padded size: row number; position, block and id of its first token (block and id
are -1 where the device knows them); number of tokens; and, in place n, which row is the n-th sampled one, or -1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass of a stage needs. T tokens, R sampled rows, P rows of prompts that are scored."""

    token_ids: Tensor
    """int64 [T]; read by the first stage only."""
    context: AttentionContext
    logit_rows: Tensor | None
    """int64 [R]: tokens from which is sampled, in the plan's order; None: every token."""
    prompt_rows: Tensor
    """int64 [P]: tokens of prompts whose logits score the next one, in the plan's order."""
    rows: Tensor
    """int64 [R]: row numbers of the sampled rows."""
    positions: Tensor
    """int64 [R]: where their new tokens will stand."""
    token_rows: Tensor
    """int64 [T]: row number of each token."""


class Rows:
    """The buffers of `num_rows` rows and one more, which padding uses, for sequences of `max_len` tokens at most."""

    def __init__(self, num_rows: int, max_len: int, *, cache: HostCache | DeviceCache):
        self.cache = cache
        self.device, self.block_size = cache.device, cache.block_size
        self.send = partial(send, device=self.device)
        self.padding_row = num_rows
        """The row of padding, whose tokens mean nothing."""
        self.max_len = max_len
        self.max_blocks = -(-max_len // self.block_size)
        sizes = [(num_rows + 1) * width for width in (max_len, self.max_blocks, 1)]
        # One buffer, so that all that new rows bring is one scatter. Untouched pages of host memory cost nothing.
        host = np.zeros(sum(sizes), np.int32)
        self._buffer = torch.from_numpy(host)
        if self.device.type != "cpu":
            self._buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
        tokens, tables, longest = self._buffer.split(sizes)
        self.tokens = tokens.view(-1, max_len)
        """Prompt and output of each row: int32 [rows, max_len]."""
        self.block_table = tables.view(-1, self.max_blocks)
        """Cache blocks of each row, in order: int32 [rows, max_blocks]."""
        self.longest = longest
        """Longest length that each row's sequence may get: int32 [rows]."""
        # What the host knows of them; on a CPU the very same memory.
        self._table = host[sizes[0] : sizes[0] + sizes[1]].reshape(-1, self.max_blocks)
        self._longest = host[sizes[0] + sizes[1] :]

    def admit(self, sequences: Iterable[Sequence]) -> None:
        """Write tokens, blocks and longest lengths of sequences into their rows."""
        places, values = [], []
        for seq in sequences:
            self._table[seq.row, : len(seq.blocks)] = seq.blocks
            self._longest[seq.row] = seq.request.longest
        tables = self.tokens.numel()
        lengths = tables + self.block_table.numel()
        for seq in sequences:
            tokens, blocks = seq.token_ids, seq.blocks
            for first, numbers in (
                (seq.row * self.max_len, tokens),
                (tables + seq.row * self.max_blocks, blocks),
                (lengths + seq.row, [seq.request.longest]),
            ):
                places.append(np.arange(first, first + len(numbers)))
                values.append(np.array(numbers, np.int64))
        if places:
            place, value = self.send(np.concatenate(places + values)).view(2, -1)
            self._buffer.index_copy_(0, place, value.int())

    def write(self, rows: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Put new tokens [R] where they stand; an id below 0 means that there is none, and 0 is written."""
        self.tokens[rows, positions] = ids.clamp(min=0).int()

    # ---- steps of a padded size

    def step_inputs(self, plan: StepPlan, size: int) -> np.ndarray:
        """A plan's numbers, int32 [FIELDS, size], padded with rows that do nothing."""
        rows = plan.rows
        inputs = np.full((FIELDS, size), -1, np.int32)
        inputs[0, len(rows) :] = self.padding_row
        inputs[4, len(rows) :] = 0
        inputs[0, : len(rows)] = [row.row for row in rows]
        inputs[1, : len(rows)] = [row.start for row in rows]
        inputs[2, : len(rows)] = [row.block for row in rows]
        inputs[3, : len(rows)] = [row.token for row in rows]
        inputs[4, : len(rows)] = [row.count for row in rows]
        sampled = [place for place, row in enumerate(rows) if row.sample]
        inputs[5, : len(sampled)] = sampled
        for row in rows:
            if row.block >= 0:
                self._table[row.row, row.start // self.block_size] = row.block
        return inputs

    def decode_batch(self, inputs: Tensor) -> Batch:
        """The batch of a decode step from its numbers on an accelerator; waits for nothing, so it can be captured."""
        step = read_rows(inputs, self.tokens, self.block_table, self.longest, block_size=self.block_size)
        size = inputs.shape[1]
        assert isinstance(self.cache, DeviceCache)
        context = DeviceAttention(
            cache=self.cache,
            positions=step.positions,
            lengths=step.lengths,
            slots=step.slots,
            query_start=torch.arange(size + 1, dtype=torch.int32, device=self.device),
            context_len=step.context_len,
            block_table=self.block_table,
            table_rows=inputs[0],
            max_query_len=1,
            make_recurrence=partial(Recurrence.of_rows, step.rows, step.positions, self.cache.states),
        )
        return Batch(step.token_ids, context, None, step.rows[:0], step.rows, step.next_positions, step.rows)

    def chunk_batch(self, inputs: Tensor, size: int) -> Batch:
        """The batch of rows with any numbers of tokens, padded to `size`, from the rows' numbers on an accelerator;
        waits for nothing, so it can be captured. A token is sampled for each row, those of padding to no effect."""
        row, start, block, token, count, place = inputs.long().unbind(0)  # [B]
        first = start.clamp(min=0)
        at = row, first // self.block_size
        self.block_table[at] = torch.where(block >= 0, block.int(), self.block_table[at])
        self.tokens[row, first] = torch.where(token >= 0, token.int(), self.tokens[row, first])
        ends = count.cumsum(0)
        index = torch.arange(size, device=self.device)
        real = index < ends[-1]
        of = torch.searchsorted(ends, index, right=True).clamp(max=len(row) - 1)  # [T]: the row of a token
        position = torch.where(real, (first - ends + count)[of] + index, 0)
        slot = self.block_table[row[of], position // self.block_size].long() * self.block_size
        assert isinstance(self.cache, DeviceCache)
        context = DeviceAttention(
            cache=self.cache,
            positions=position,
            lengths=self.longest[row[of]].long(),
            slots=torch.where(real, slot + position % self.block_size, -1),
            query_start=torch.cat([ends.new_zeros(1), ends]).int(),
            context_len=(first + count).int(),
            block_table=self.block_table,
            table_rows=inputs[0],
            max_query_len=size,
        )
        sampled, chosen = place >= 0, place.clamp(min=0)
        logit_rows = torch.where(sampled, ends[chosen] - 1, 0)
        rows = torch.where(sampled, row[chosen], self.padding_row)
        new = torch.where(sampled, (first + count)[chosen], 0)
        return Batch(self.tokens[row[of], position].long(), context, logit_rows, index[:0], rows, new, row[of])

    def padding_prompt(self, size: int) -> Batch:
        """A prompt of `size` tokens of padding on an accelerator, whose keys are not kept, as `batch` gives prompts."""
        assert isinstance(self.cache, DeviceCache)
        row, index = self.padding_row, torch.arange(size, device=self.device)
        context = DeviceAttention(
            cache=self.cache,
            positions=index,
            lengths=torch.full_like(index, size),
            slots=torch.full_like(index, -1),
            query_start=torch.tensor([0, size], dtype=torch.int32, device=self.device),
            context_len=torch.tensor([size], dtype=torch.int32, device=self.device),
            block_table=self.block_table,
            table_rows=torch.tensor([row], dtype=torch.int32, device=self.device),
            max_query_len=size,
            fresh=True,
            make_recurrence=lambda: Recurrence.of_runs([Run(0, size, True, row)], self.device, self.cache.states),
        )
        rows = torch.full_like(index, row)
        return Batch(torch.zeros_like(index), context, index[-1:], index[:0], rows[:1], index[:1], rows)

    # ---- any step

    def batch(self, plan: StepPlan) -> Batch:
        """The batch of any plan. The host computes all integers; token ids alone may be known to the device only."""
        size = self.block_size
        given = np.array([(row.row, row.start, row.count, row.block, row.token) for row in plan.rows])
        numbers, starts, counts, blocks, known = given.T
        ends = counts.cumsum()
        grown, told = (blocks >= 0).nonzero()[0], (known >= 0).nonzero()[0]
        self._table[numbers[grown], starts[grown] // size] = blocks[grown]
        rows, positions = numbers, starts
        if len(numbers) < ends[-1]:
            rows, positions = numbers.repeat(counts), np.arange(ends[-1]) + (starts + counts - ends).repeat(counts)
        slots = self._table[rows, positions // size].astype(np.int64) * size + positions % size
        lengths = self._longest[rows].astype(np.int64)
        (logit_rows, sampled), prompt_rows = _logit_rows(plan, ends - counts)
        wanted = (logit_rows, prompt_rows, numbers[sampled], positions[logit_rows] + 1)
        context: AttentionContext
        if isinstance(self.cache, HostCache):
            tokens = self.tokens.numpy()
            tokens[numbers[told], starts[told]] = known[told]
            ids = torch.from_numpy(tokens[rows, positions].astype(np.int64))
            places = map(torch.from_numpy, (positions, lengths, slots))
            context = HostAttention(self.cache, _cache_rows(plan, size), *places)
            return Batch(ids, context, *map(torch.from_numpy, (*wanted, rows)))
        arrays = (rows, positions, lengths, slots, *wanted, numbers, ends - counts, starts + counts)
        changes = (numbers[grown], starts[grown] // size, blocks[grown], numbers[told], starts[told], known[told])
        parts = (*arrays, ends[-1:], *changes)
        sent = self.send(np.concatenate(parts)).split([len(part) for part in parts])
        row, position, length, slot, *chosen, number, first, context_len, total = sent[: len(arrays) + 1]
        grown_row, grown_at, block, told_row, told_at, token = sent[len(arrays) + 1 :]
        self.block_table[grown_row, grown_at] = block.int()
        self.tokens[told_row, told_at] = token.int()
        context = DeviceAttention(
            cache=self.cache,
            positions=position,
            lengths=length,
            slots=slot,
            query_start=torch.cat([first, total]).int(),
            context_len=context_len.int(),
            block_table=self.block_table,
            table_rows=number.int(),
            max_query_len=int(counts.max()),
            fresh=not starts.any(),
            make_recurrence=lambda: Recurrence.of_runs(_runs(plan), self.device, self.cache.states),
        )
        return Batch(self.tokens[row, position].long(), context, *[*chosen, row])


def _logit_rows(plan: StepPlan, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices in the pack of the tokens whose logits are wanted: int64 [2, R] to sample from, with the places of their
    rows in the plan, and int64 [P] to score prompts. `offsets`: first token of each row."""
    first = offsets.tolist()
    sampled = [(first[i] + row.count - 1, i) for i, row in enumerate(plan.rows) if row.sample]
    scored = [
        first[i] - row.start + position for i, row in enumerate(plan.rows) for position in range(*row.prompt_logits)
    ]
    return np.array(sampled, np.int64).reshape(-1, 2).T, np.array(scored, np.int64)


def _runs(plan: StepPlan) -> list[Run]:
    """The rows of a plan for layers that keep a state of each."""
    offsets = accumulate((row.count for row in plan.rows), initial=0)
    return [Run(offset, row.count, row.start == 0, row.row) for offset, row in zip(offsets, plan.rows, strict=False)]


def _cache_rows(plan: StepPlan, block_size: int) -> list[CacheRow]:
    """Where the keys of each row lie in a cache in host memory."""
    rows, offset = [], 0
    for row in plan.rows:
        blocks = row.sequence.blocks
        if row.sequence.contiguous:
            rows.append(CacheRow(offset, row.start, row.count, blocks[0] * block_size, None, row.row))
        else:
            used = blocks[: -(-(row.start + row.count) // block_size)]
            rows.append(CacheRow(offset, row.start, row.count, None, torch.tensor(used), row.row))
        offset += row.count
    return rows
