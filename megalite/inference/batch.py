"""A step plan as the tensors that a forward pass takes: token ids, positions, cache slots, rows whose logits count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.inference.request import Row, StepPlan
from megalite.model.attention import AttentionContext
from megalite.model.device_attention import DeviceAttention
from megalite.model.host_attention import CacheRow, HostAttention
from megalite.model.kv_cache import DeviceCache, HostCache


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass of a stage needs. T tokens, R rows of logits."""

    token_ids: Tensor
    """int64 [T]; read by the first stage only."""
    context: AttentionContext
    logit_rows: Tensor
    """int64 [R]: tokens from which is sampled, in the plan's order."""
    prompt_rows: Tensor
    """int64 [P]: tokens of prompts whose logits score the next one, in the plan's order."""


def is_decode(plan: StepPlan) -> bool:
    """Every row computes one token and samples from it."""
    return all(row.count == 1 and row.sample and row.prompt_logits == (0, 0) for row in plan.rows)


def pack(plan: StepPlan, cache: HostCache | DeviceCache) -> Batch:
    """The batch of a plan over a cache."""
    return _pack_device(plan, cache) if isinstance(cache, DeviceCache) else _pack_host(plan, cache)


def _pack_host(plan: StepPlan, cache: HostCache) -> Batch:
    size = cache.block_size
    rows: list[CacheRow] = []
    slots: list[int] = []
    for row in plan.rows:
        blocks, offset = row.sequence.blocks, len(slots)
        first_slot = gathered = None
        if row.sequence.contiguous:
            first_slot = blocks[0] * size
            slots += range(first_slot + row.start, first_slot + row.start + row.count)
        else:
            gathered = torch.tensor(blocks[: -(-(row.start + row.count) // size)])
            slots += _slots(row, size)
        rows.append(CacheRow(offset, row.start, row.count, first_slot, gathered))
    positions, lengths = torch.tensor([_positions(plan), _lengths(plan)])
    context = HostAttention(cache, rows, positions, lengths, torch.tensor(slots))
    wanted = (torch.tensor(rows, dtype=torch.int64) for rows in logit_rows(plan))
    return Batch(torch.tensor(_token_ids(plan)), context, *wanted)


def _pack_device(plan: StepPlan, cache: DeviceCache) -> Batch:
    """A decode step is padded to a power of two rows, whether it runs as a captured graph or not, so that both give the
    same result."""
    decode = is_decode(plan)
    padding = decode_rows(len(plan.rows)) - len(plan.rows) if decode else 0
    starts, tables, context_len = [0], [], []
    for row in plan.rows:
        starts.append(starts[-1] + row.count)
        context_len.append(row.start + row.count)
        tables.append(row.sequence.blocks[: -(-context_len[-1] // cache.block_size)])
    width = max(map(len, tables))
    tables = [table + [0] * (width - len(table)) for table in tables] + [[0] * width] * padding
    starts += range(starts[-1] + 1, starts[-1] + 1 + padding)
    slots = [slot for row in plan.rows for slot in _slots(row, cache.block_size)]

    def send(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(cache.device, non_blocking=True)

    blank = [0] * padding
    positions, lengths = send([_positions(plan) + blank, _lengths(plan) + blank], torch.int64)
    context = DeviceAttention(
        cache=cache,
        positions=positions,
        lengths=lengths,
        slots=send(slots + [-1] * padding, torch.int64),
        query_start=send(starts, torch.int32),
        context_len=send(context_len + blank, torch.int32),
        block_table=send(tables, torch.int32),
        max_query_len=max(row.count for row in plan.rows),
    )
    sampled, prompt = logit_rows(plan)
    prompt_rows = send(prompt, torch.int64) if prompt else context.positions[:0]
    return Batch(send(_token_ids(plan) + blank, torch.int64), context, send(sampled, torch.int64), prompt_rows)


def decode_rows(rows: int) -> int:
    """Rows that a decode step of `rows` sequences is padded to on an accelerator: the next power of two."""
    return 1 << (rows - 1).bit_length()


def blank_decode_batch(cache: DeviceCache, rows: int, table_width: int) -> Batch:
    """A decode batch of padding only: the static buffers of a captured graph."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=cache.device)

    context = DeviceAttention(
        cache=cache,
        positions=zeros(rows, dtype=torch.int64),
        lengths=zeros(rows, dtype=torch.int64),
        slots=zeros(rows, dtype=torch.int64) - 1,
        query_start=torch.arange(rows + 1, dtype=torch.int32, device=cache.device),
        context_len=zeros(rows, dtype=torch.int32),
        block_table=zeros(rows, table_width, dtype=torch.int32),
        max_query_len=1,
    )
    every, none = torch.arange(rows, device=cache.device), zeros(0, dtype=torch.int64)
    return Batch(zeros(rows, dtype=torch.int64), context, every, none)


def fill_decode_batch(static: Batch, batch: Batch) -> None:
    """Copy a decode batch into a graph's buffers of the same padded number of rows."""
    source, target = batch.context, static.context
    assert isinstance(source, DeviceAttention) and isinstance(target, DeviceAttention)
    static.token_ids.copy_(batch.token_ids)
    target.positions.copy_(source.positions)
    target.lengths.copy_(source.lengths)
    target.slots.copy_(source.slots)
    target.context_len.copy_(source.context_len)
    target.block_table[:, : source.block_table.shape[1]].copy_(source.block_table)


def _token_ids(plan: StepPlan) -> list[int]:
    ids: list[int] = []
    for row in plan.rows:
        ids += row.sequence.token_ids[row.start : row.start + row.count]
    return ids


def _positions(plan: StepPlan) -> list[int]:
    positions: list[int] = []
    for row in plan.rows:
        positions += range(row.start, row.start + row.count)
    return positions


def _lengths(plan: StepPlan) -> list[int]:
    """Of each token the longest length of its sequence, by its own prompt and parameters."""
    lengths: list[int] = []
    for row in plan.rows:
        lengths += [row.sequence.request.longest] * row.count
    return lengths


def _slots(row: Row, size: int) -> Iterable[int]:
    """Cache slots of a row's new tokens."""
    blocks = row.sequence.blocks
    return (blocks[place // size] * size + place % size for place in range(row.start, row.start + row.count))


def logit_rows(plan: StepPlan) -> tuple[list[int], list[int]]:
    """Indices in the pack of the tokens whose logits are wanted: to sample from, and to score prompts."""
    sampled: list[int] = []
    prompt: list[int] = []
    offset = 0
    for row in plan.rows:
        if row.sample:
            sampled.append(offset + row.count - 1)
        lo, hi = row.prompt_logits
        prompt += range(offset + lo - row.start, offset + hi - row.start)
        offset += row.count
    return sampled, prompt
