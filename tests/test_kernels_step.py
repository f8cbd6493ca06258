"""The kernel that reads a decode step's inputs against plain Python, and the steps made of it against the host's.

Compiled where there is a CUDA device, under Triton's interpreter where there is none; skipped without Triton.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from reference import attention
from test_kernels import DEVICE, close, make_spec, needs_triton

from megalite.config.schema import SamplingParams
from megalite.inference.request import Request, Sampled
from megalite.inference.rows import Rows
from megalite.inference.scheduler import Scheduler
from megalite.kernels.step import read_rows
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import DeviceCache

pytestmark = needs_triton
NUM_ROWS = 6


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel allocates holds a number that no field has."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-999))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("used", "size"), [(0, 1), (1, 1), (3, 4), (7, 8), (8, 12)])
def test_inputs_are_read_by_row_number(used, size, block_size, poisoned):
    """Rows in any order, with a new block or none, whose token the host knows or not, and padding after them."""
    luck = random.Random(100 * size + block_size)
    num_rows, max_len = 12, 37
    blocks = -(-max_len // block_size)
    tokens = [[luck.randrange(1000) for _ in range(max_len)] for _ in range(num_rows + 1)]
    table = [[luck.randrange(500) for _ in range(blocks)] for _ in range(num_rows + 1)]
    longest = [luck.randrange(1, max_len + 1) for _ in range(num_rows)] + [0]
    inputs = [
        (row, luck.randrange(max_len), luck.choice([-1, 0, 500]), luck.choice([-1, 0, 1000]), 1, -1)
        for row in luck.sample(range(num_rows), used)
    ] + [(num_rows, -1, -1, -1, 0, -1)] * (size - used)

    wanted, grown = [], [list(row) for row in table]
    for row, position, block, token, *_ in inputs:
        if position < 0:
            wanted.append((tokens[row][0], 0, 0, longest[row], -1, 0, row))
            continue
        if block >= 0:
            grown[row][position // block_size] = block
        slot = grown[row][position // block_size] * block_size + position % block_size
        known = token if token >= 0 else tokens[row][position]
        wanted.append((known, position, position + 1, longest[row], slot, position + 1, row))

    on_device = [
        torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for values in (np.array(inputs).T.copy(), tokens, table, longest)
    ]
    got = read_rows(*on_device, block_size=block_size)
    assert list(zip(*(field.tolist() for field in got), strict=True)) == wanted
    assert {field.dtype for name, field in got._asdict().items() if name != "context_len"} == {torch.int64}
    assert got.context_len.dtype == torch.int32
    assert on_device[1].tolist() == tokens and on_device[2].tolist() == grown


def test_padded_decode_steps_are_the_same_steps():
    """Rows begin, grow and end at different times; the padded steps know no more of them than the step before wrote."""
    spec = CacheSpec.keys_and_values(1, 4)
    cache = DeviceCache({0: spec}, 64, block_size=4, dtype=torch.float32, device=torch.device(DEVICE))
    scheduler = Scheduler(
        num_blocks=64, block_size=4, max_num_seqs=NUM_ROWS, max_num_batched_tokens=64, max_model_len=64
    )
    host, device = (Rows(NUM_ROWS, 64, cache=cache) for _ in range(2))
    for number, length in enumerate([3, 9, 16, 1, 5, 7, 12, 4]):
        prompt = tuple(range(20 * number + 1, 20 * number + 1 + length))
        params = SamplingParams(n=2 if number == 1 else 1)
        longest = {"max_tokens": 6 + number}
        scheduler.add(Request(id=str(number), prompt_token_ids=prompt, params=params, seed=number, **longest))
    decodes = grown = unknown = 0
    flying = None
    while True:
        plan = scheduler.schedule()
        if plan.rows:
            ids = make_alike(host, device, plan)
            decodes += plan.decodes
            grown += any(row.block >= 0 for row in plan.rows) and plan.decodes
            unknown += plan.decodes and any(row.token < 0 for row in plan.rows)
        if flying is not None:
            scheduler.finish(*flying)
        flying = (plan, tuple(map(Sampled, ids))) if plan.rows else None
        if flying is None and not scheduler.has_work():
            break
    assert decodes > 8 and grown > 2 and unknown > 8, "a step is made before the tokens of the one before are known"


def make_alike(host: Rows, device: Rows, plan) -> list[int]:
    """Compare both forms of a step's batch, and write what it samples."""
    for rows in (host, device):
        rows.admit(plan.admitted)
    size = NUM_ROWS + 2
    inputs = torch.from_numpy(device.step_inputs(plan, size)).to(DEVICE)
    one = host.batch(plan)
    padded = device.decode_batch(inputs) if plan.decodes else device.chunk_batch(inputs, 72)
    tokens, count, sampled = plan.num_tokens, len(plan.rows), len(plan.sampled)
    assert torch.equal(one.token_ids, padded.token_ids[:tokens])
    for name in ("positions", "lengths", "slots"):
        assert torch.equal(getattr(one.context, name), getattr(padded.context, name)[:tokens]), name
    assert torch.equal(one.context.query_start, padded.context.query_start[: count + 1])
    for name in ("context_len", "table_rows"):
        assert torch.equal(getattr(one.context, name), getattr(padded.context, name)[:count]), name
    for name in ("rows", "positions"):
        assert torch.equal(getattr(one, name), getattr(padded, name)[:sampled]), name
    assert (padded.context.slots[tokens:] == -1).all() and (padded.context.context_len[count:] == 0).all()
    assert (padded.rows[sampled:] == NUM_ROWS).all(), "what is sampled in vain goes to the row of padding"
    if plan.decodes:
        assert one.logit_rows.tolist() == list(range(count)) and padded.logit_rows is None, "every token"
        assert padded.context.max_query_len == 1 and padded.context.query_start.tolist() == list(range(size + 1))
    assert torch.equal(host.block_table[:NUM_ROWS], device.block_table[:NUM_ROWS])
    ids = [1000 + 10 * plan.step + place for place in range(sampled)]
    in_vain = [7] * (len(padded.rows) - sampled)
    host.write(one.rows, one.positions, torch.tensor(ids, device=DEVICE))
    device.write(padded.rows, padded.positions, torch.tensor(ids + in_vain, device=DEVICE))
    assert torch.equal(host.tokens[:NUM_ROWS], device.tokens[:NUM_ROWS])
    return ids


def test_a_prompt_of_padding_attends_and_leaves_nothing():
    """As steps that are launched kernel by kernel are warmed up with."""
    layout = CacheSpec.keys_and_values(1, 16)
    cache = DeviceCache({0: layout}, 4, block_size=4, dtype=torch.float32, device=torch.device(DEVICE))
    rows = Rows(NUM_ROWS, 16, cache=cache)
    batch = rows.padding_prompt(9)
    q, k, v = (torch.randn(9, heads, 16, device=DEVICE) for heads in (2, 1, 1))
    spec = make_spec(16)
    close(batch.context.attend(spec, q, k, v), attention(q, k, v, spec), 1e-5)
    assert not any(one.any() for one in cache.layers[0]) and not rows.tokens.any()
    assert batch.rows.tolist() == [NUM_ROWS] and batch.logit_rows.tolist() == [8]
