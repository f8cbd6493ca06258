"""What the tests of training share: a run in a rank of the pool, and what a model computes, to us and to others."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from pool_runtime import PoolRuntime
from safetensors.torch import load_file

from megalite.config.schema import OptimizerSection
from megalite.core.layout import Layout
from megalite.core.parallel_state import Axis, ParallelState
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.config import ModelConfig
from megalite.run import runtime as distributed
from megalite.weights.table import expected
from megalite.weights.transfer import build, load_folder

if TYPE_CHECKING:
    from megalite.train.trainer import Trainer

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


def replicas(dp: int) -> list[ParallelState]:
    """The states of dp replicas, without their groups."""
    states = []
    for rank in range(dp):
        state = ParallelState(Layout())
        state.dp = Axis(tuple(range(dp)), rank)
        states.append(state)
    return states


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}: {key}": value for file in files for key, value in load_file(file).items()}


def same_tensors(one: Path, other: Path, **tolerance: float) -> None:
    """Both folders hold the same tensors."""
    got, want = stored_tensors(one), stored_tensors(other)
    assert got.keys() == want.keys() and want
    for key, values in want.items():
        torch.testing.assert_close(got[key], values, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


LAYER_BY_LAYER = {"gpt2", "qwen3_5_text", "qwen3_next", "granitemoehybrid"}
"""Families whose config names each layer's kind, or has its own word for their number."""


def layers_for(model: str, layout: Layout) -> int:
    """For `tiny`: two, if the stages have enough with these."""
    return 2 if layout.pp * layout.interleave <= 2 and model not in LAYER_BY_LAYER else 0


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    model: str
    layout: Layout
    zero: int = 1
    accumulate: int = 1
    """Micro batches of a step, on each replica."""
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def layers(self) -> int:
        """For `tiny`."""
        return layers_for(self.model, self.layout)

    def trainer(self, folder: Path, optimizer: OptimizerSection, *, steps: int, balance: float) -> Trainer:
        """Of the model in `folder`, on this rank of the layout. `balance`: weight of the load-balancing loss."""
        from megalite.train.trainer import Trainer

        decoder = build_from(folder, ParallelState(self.layout, sequence_parallel=self.sequence_parallel))
        options = {"zero_stage": self.zero, "recompute": self.recompute, "router_aux_loss_coef": balance}
        return Trainer(decoder, optimizer, steps=steps, **options)


Parts = dict[tuple[str, int, int], torch.Tensor]
"""Values of parts of Hugging Face tensors: by the tensor's name, the start of its piece and the start in that."""


def in_parts(config: ModelConfig, layout: Layout, rank: int, values: dict[str, torch.Tensor]) -> Parts:
    """A rank's values, by local parameter, as parts of the Hugging Face tensors."""
    return {
        (part.piece.hf, part.piece.hf_start, part.lo - part.piece.hf_start): values[name]
        .narrow(part.piece.dim, part.start, part.hi - part.lo)
        .movedim(part.piece.dim, 0)
        for name, (_, parts) in expected(config, layout, rank).items()
        for part in parts
    }
