"""Training runs that others published, with their source, and what the planner makes of them. Imports no torch.

The layout, batch and model are theirs. Megatron's of 2021 wrote attention's scores to memory and computed those above
the diagonal too, as all did before FlashAttention (arXiv 2205.14135); that is added to what is predicted. How often
Llama 3's stages interleave is not said, so its runs can't be compared, only held between two schedules.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalite.core.layout import Layout
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.planner.cost import SCORE_SHARE, Cluster
from megalite.planner.devices import named
from megalite.planner.search import search_training
from megalite.planner.training import TrainingWork, predict
from megalite.tools.benchmarks.shapes import decoder

MEGATRON = "arXiv 2104.04473, table 1"
LLAMA = "arXiv 2407.21783, table 4"
HOST = 8
"""GPUs of a host."""
SCORE_BYTES = 43
"""Of a score in float16 and its dropout's mask, that kernels read and write: 13 forward, 13 when that is computed again
(product, softmax, dropout, product), 17 backward."""
MOST_SEARCHED = 1024
"""GPUs up to which all layouts are ranked."""


def gpt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """What config.json says of a GPT of that table."""
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": 2048, "vocab_size": 51200}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, "dtype": "float16"}


LLAMA_405B = decoder(
    *("llama", 126, 16384, 128, 8, 53248), vocab_size=128256, max_position_embeddings=8192, dtype="bfloat16"
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run of a table."""

    name: str
    source: str
    device: str
    values: dict[str, Any]
    layout: Layout
    sequence: int
    batch: int
    """Sequences of a step."""
    teraflops: float
    """That each GPU achieved, as the source counts them."""
    recompute: bool
    """Activations are computed again; their count of operations has the forward pass twice."""
    writes_scores: bool = False
    """Attention writes its scores to memory, those above the diagonal too."""
    missing: str | None = None
    """What the source does not say and a prediction needs."""

    @property
    def config(self) -> ModelConfig:
        return families.from_values(Path(self.name), self.values)

    @property
    def tokens_a_second(self) -> float:
        """Of the teraflops: operations of a token are 2 a weight and pass, and 4 a key, layer and unit of width."""
        config = self.config
        layers, hidden = config.num_layers, config.hidden_size
        passes = 4 if self.recompute else 3
        weights = matmul_weights(self.values)
        attention = 2 * layers * hidden * self.sequence  # causal: half of the keys, for scores and values
        per_token = passes * (2 * weights + (2 if self.recompute else 1) * attention)
        head = 2 * hidden * config.vocab_size * (3 - passes)  # which is not computed again
        return self.teraflops * 1e12 * self.layout.size / (per_token + head)

    @property
    def cluster(self) -> Cluster:
        return Cluster(named(self.device), self.layout.size, self.layout.size // HOST)

    @property
    def work(self) -> TrainingWork:
        return TrainingWork(sequence=self.sequence, batch=self.batch, recompute=self.recompute)

    def predicted(self, *, interleave: int = 1) -> float:
        """Tokens a second."""
        layout = replace(self.layout, interleave=interleave)
        found = predict(self.config, layout, self.cluster, self.work, itemsize=2)
        return 1 / (1 / found.throughput + self._scores() / (1 - found.bubble))

    def _scores(self) -> float:
        """Seconds of each token, of all replicas together, that writing scores takes."""
        if not self.writes_scores:
            return 0.0
        config, layout, device = self.config, self.layout, self.cluster.device
        layers = -(-config.num_layers // layout.pp)
        moved = SCORE_BYTES * config.num_heads / layout.tp * self.sequence / device.read
        above = 4 * 4 * config.hidden_size / layout.tp * self.sequence / 2 / (device.matmul * SCORE_SHARE)
        return layers * (moved + above) / layout.dp

    def row(self) -> dict[str, object]:
        config, cluster, work = self.config, self.cluster, self.work
        predicted = self.predicted()
        shown: dict[str, object] = {
            "run": self.name,
            "GPUs": f"{self.layout.size} {self.device}",
            "layout": str(self.layout),
            "published tokens/s": round(self.tokens_a_second),
            "predicted": round(predicted),
            "ratio": predicted / self.tokens_a_second,
            "not said": self.missing or "",
        }
        if self.layout.size <= MOST_SEARCHED:
            began = time.process_time()
            found = search_training(config, cluster, work, itemsize=2)
            shown["planner's first"] = f"{found[0].layout}: {found[0].prediction.throughput:,.0f}"
            place = [choice.layout for choice in found].index(self.layout) + 1
            shown["theirs is"] = f"{place} of {len(found)}"
            shown["CPU seconds"] = time.process_time() - began
        return shown


def matmul_weights(values: dict[str, Any]) -> int:
    """Weights that a token is multiplied with, those of the head among them."""
    if values["model_type"] == "gpt2":
        hidden = values["n_embd"]
        return int(12 * values["n_layer"] * hidden**2 + hidden * values["vocab_size"])
    hidden, heads, shared = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    attention = 2 * hidden**2 * (1 + shared / heads)
    layer = attention + 3 * hidden * values["intermediate_size"]
    return int(values["num_hidden_layers"] * layer + hidden * values["vocab_size"])


def _megatron(rows: list[tuple[float, int, int, int, int, int, int, int, float]]) -> list[Trained]:
    """Billions of parameters, heads, hidden size, layers, tp, pp, GPUs, batch, teraflops of a GPU."""
    return [
        Trained(
            name=f"GPT {billions:g}B",
            source=MEGATRON,
            device="a100",
            values=gpt(layers, hidden, heads),
            layout=Layout(tp, pp, gpus // (tp * pp)),
            sequence=2048,
            batch=batch,
            teraflops=teraflops,
            recompute=True,
            writes_scores=True,
        )
        for billions, heads, hidden, layers, tp, pp, gpus, batch, teraflops in rows
    ]


def _llama(gpus: int, batch: int, teraflops: float) -> Trained:
    return Trained(
        name="Llama 3 405B",
        source=LLAMA,
        device="h100",
        values=LLAMA_405B,
        layout=Layout(8, 16, gpus // 128),
        sequence=8192,
        batch=batch,
        teraflops=teraflops,
        recompute=False,
        missing="chunks of a stage",
    )


TRAINED = [
    *_megatron([(1.7, 24, 2304, 24, 1, 1, 32, 512, 137), (3.6, 32, 3072, 30, 2, 1, 64, 512, 138)]),
    *_megatron([(7.5, 32, 4096, 36, 4, 1, 128, 512, 142), (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135)]),
    *_megatron([(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138), (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140)]),
    *_megatron([(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148), (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155)]),
    _llama(8192, 2048, 430),
    _llama(16384, 2048, 400),
]
"""float16 on A100 of 80 GB, and bfloat16 on H100."""
