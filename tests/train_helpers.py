"""What the tests of training share: a run in a rank of the pool, and what a model computes, to us and to others."""

import itertools
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pool_runtime import PoolRuntime

from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.run import runtime as distributed
from megalite.weights.transfer import build, load_folder

CPU = torch.device("cpu")
_runs = itertools.count()
"""Every rank of a pool has taken part in as many."""


@contextmanager
def as_run(rank: int):
    """What `distributed.start` gives a rank, in a rank of the pool; its environment is as before afterwards."""
    before = dict(os.environ)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    store = dist.PrefixStore(f"run {next(_runs)}", dist.distributed_c10d._get_default_store())
    runtime = PoolRuntime(rank, dist.get_world_size(), store)
    distributed.prepare_deepspeed(runtime)
    try:
        yield runtime
    finally:
        os.environ.clear()
        os.environ |= before


def build_from(folder: Path, state: ParallelState):
    decoder = build(families.read(folder), state, dtype=torch.float32, device=CPU)
    load_folder(decoder, folder)
    return decoder


def logits_of(decoder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(ids, PackedAttention([len(ids)])))


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids[None]).logits[0]
