"""The tensors of a step: those of a padded step, made on the device of a few numbers, equal those of the host."""

from __future__ import annotations

import torch

from megalite.config.schema import SamplingParams
from megalite.inference.request import Request, Sampled
from megalite.inference.rows import Rows
from megalite.inference.scheduler import Scheduler
from megalite.model.kinds.base import CacheSpec
from megalite.model.kv_cache import DeviceCache

NUM_ROWS = 8


def test_padded_steps_are_the_same_steps():
    """Prompts in chunks, samples of one prompt, decoding rows and rows that grow, side by side until all have ended."""
    cache = DeviceCache({0: CacheSpec.keys_and_values(2, 16)}, 200, block_size=4, dtype=torch.float32)
    scheduler = Scheduler(
        num_blocks=200, block_size=4, max_num_seqs=NUM_ROWS, max_num_batched_tokens=20, max_model_len=128
    )
    host, device = (Rows(NUM_ROWS, 128, cache=cache) for _ in range(2))
    for number, length in enumerate([3, 9, 17, 30, 1, 5, 40]):
        prompt = tuple(range(10 * number + 1, 10 * number + 1 + length))
        params = SamplingParams(n=2 if number == 1 else 1)
        scheduler.add(Request(id=str(number), prompt_token_ids=prompt, params=params, seed=0, max_tokens=9))
    steps = 0
    while (plan := scheduler.schedule()).rows:
        for rows in (host, device):
            rows.admit(plan.admitted)
        one = host.batch(plan)
        padded = device.chunk_batch(torch.from_numpy(device.step_inputs(plan, NUM_ROWS)), 24)
        tokens, rows, sampled = plan.num_tokens, len(plan.rows), len(plan.sampled)
        assert torch.equal(one.token_ids, padded.token_ids[:tokens])
        for name in ("positions", "lengths", "slots"):
            assert torch.equal(getattr(one.context, name), getattr(padded.context, name)[:tokens]), name
        assert torch.equal(one.context.query_start, padded.context.query_start[: rows + 1])
        for name in ("context_len", "table_rows"):
            assert torch.equal(getattr(one.context, name), getattr(padded.context, name)[:rows]), name
        for name in ("logit_rows", "rows", "positions"):
            assert torch.equal(getattr(one, name), getattr(padded, name)[:sampled]), name
        assert (padded.context.slots[tokens:] == -1).all() and (padded.context.context_len[rows:] == 0).all()
        assert (padded.rows[sampled:] == NUM_ROWS).all(), "what is sampled in vain goes to the row of padding"
        assert torch.equal(host.block_table[:NUM_ROWS], device.block_table[:NUM_ROWS])
        assert torch.equal(host.tokens[:NUM_ROWS], device.tokens[:NUM_ROWS])
        ids = torch.arange(sampled) + 100 + steps
        host.write(one.rows, one.positions, ids)
        device.write(padded.rows[:sampled], padded.positions[:sampled], ids)
        scheduler.finish(plan, tuple(Sampled(int(token)) for token in ids))
        steps += 1
    assert steps > 14 and not scheduler.has_work()
