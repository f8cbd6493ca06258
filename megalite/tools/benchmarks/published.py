"""Throughput that others published, with its source, and what the planner predicts for it. Imports no torch.

TensorRT-LLM's tables of uniform requests without an end: another engine than this, so a prediction can only be near.
Tables of version 0.9.0 say how many requests are at work at once. That of 0.14.0 says "maximum load", which does not:
its guide (docs/source/performance/tuning-max-batch-size-and-max-num-tokens.md) has 70B on four H100, 2,048 tokens in
and out, between 1,944 and 2,467 tokens/s by the largest batch alone. Such rows are shown, with as many requests as fit,
and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.planner.cost import Cluster
from megalite.planner.devices import PROFILES, READ_SHARE, named
from megalite.planner.generation import Span, Workload, predict
from megalite.planner.memory import RankMemory
from megalite.tools.benchmarks.frame import head, row
from megalite.tools.benchmarks.shapes import decoder

_REST: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 32768, "dtype": "bfloat16"}
SHAPES = {
    "LLaMA 7B": decoder("llama", 32, 4096, 32, 32, 11008, **_REST),
    "Mistral 7B": decoder("llama", 32, 4096, 32, 8, 14336, **_REST),
    "Mixtral 8x7B": decoder("mixtral", 32, 4096, 32, 8, 14336, num_local_experts=8, num_experts_per_tok=2, **_REST),
    "LLaMA 70B": decoder("llama", 80, 8192, 64, 8, 28672, **_REST),
    "LLaMA v3 70B": decoder("llama", 80, 8192, 64, 8, 28672, **{**_REST, "vocab_size": 128256}),
}
"""What config.json says of each model."""
SOURCE = "TensorRT-LLM, docs/source/performance/perf-overview.md"


@dataclass(frozen=True)
class Published:
    """One number of a table."""

    version: str
    device: str
    model: str
    batch: int | None
    """Requests at once; None: as many as fit."""
    tp: int
    input: int
    output: int
    throughput: float
    """Output tokens a second, of all devices together."""

    @property
    def missing(self) -> str | None:
        """What the source does not say and a prediction needs; None: it says all."""
        if self.batch is None:
            return "requests at once"
        sheet = PROFILES[self.device].read / READ_SHARE
        if self.batch / self.throughput < RankMemory(self.config, Layout(self.tp), 0, 2).weights / sheet:
            return "experts of each token"  # so few that a step is shorter than to read all at the sheet's rate
        return None

    @property
    def config(self) -> ModelConfig:
        return families.from_values(Path(self.model), SHAPES[self.model])

    def predicted(self) -> float:
        layout = Layout(self.tp)
        load = Workload(
            input=Span(self.input, self.input), output=Span(self.output, self.output), concurrency=self.batch or 2048
        )
        engine = EngineSection(max_num_seqs=self.batch or 2048, gpu_memory_utilization=0.95)
        cluster = Cluster(named(self.device), self.tp)
        return predict(self.config, layout, cluster, load, engine, itemsize=2).throughput


def _a100(model: str, rows: list[tuple[int, int, int, int, float]]) -> list[Published]:
    """Of version 0.9.0, where throughput is given a GPU: batch, tp, input, output, tokens a second."""
    return [Published("0.9.0", "a100", model, batch, tp, i, o, each * tp) for batch, tp, i, o, each in rows]


PUBLISHED = [
    *_a100("Mistral 7B", [(896, 1, 128, 128, 6251), (120, 1, 128, 2048, 3776)]),
    *_a100("Mistral 7B", [(64, 1, 2048, 128, 698), (56, 1, 2048, 2048, 1576)]),
    *_a100("Mixtral 8x7B", [(512, 2, 128, 128, 2842), (128, 2, 128, 2048, 1724)]),
    *_a100("Mixtral 8x7B", [(64, 2, 2048, 128, 319), (32, 2, 2048, 2048, 801)]),
    *_a100("LLaMA 7B", [(256, 1, 128, 128, 5390), (32, 1, 128, 2048, 1484)]),
    *_a100("LLaMA 7B", [(32, 1, 2048, 128, 533), (16, 1, 2048, 2048, 603)]),
    *_a100("LLaMA 70B", [(1024, 4, 128, 128, 686), (512, 8, 128, 2048, 684)]),
    *_a100("LLaMA 70B", [(96, 4, 2048, 128, 80), (64, 4, 2048, 2048, 289)]),
    *(
        Published("0.14.0", device, "LLaMA v3 70B", None, tp, i, o, tokens)
        for tp, i, o, h100, a100 in (
            (4, 1000, 1000, 3730.2, 1765.9),
            (8, 1000, 1000, 5963.1, 3054.9),
            (4, 128, 128, 5838.0, 2421.4),
            (8, 128, 128, 10597.7, 4474.2),
            (4, 128, 2048, 5072.0, 2484.2),
            (8, 128, 2048, 7554.2, 4463.7),
            (4, 128, 4096, 3093.7, 1688.0),
            (8, 128, 4096, 5001.3, 2948.5),
            (4, 2048, 128, 670.7, 278.6),
            (8, 2048, 128, 1288.8, 547.0),
            (4, 2048, 2048, 2386.7, 1230.2),
            (8, 2048, 2048, 3991.2, 2144.3),
            (4, 500, 2000, 3698.4, 2113.4),
            (8, 500, 2000, 6321.4, 3673.6),
            (4, 5000, 500, 831.3, 362.3),
            (8, 5000, 500, 1446.4, 662.6),
        )
        for device, tokens in (("h100", h100), ("a100", a100))
    ),
]
"""float16 on H100 SXM and A100 SXM, 80 GB; the tables' rows in fp8 are left out."""


def lines() -> list[str]:
    """A table of all of them, and how many are within 30%."""
    rows = [(one, one.predicted()) for one in PUBLISHED]
    what = "version", "device", "model", "at once", "tp", "input", "output"
    found = [head(*what, "published", "predicted", "ratio", "not said")]
    for one, guess in rows:
        cells = one.version, one.device, one.model, one.batch or "what fits", one.tp, one.input, one.output
        found.append(
            row(*cells, f"{one.throughput:,.0f}", f"{guess:,.0f}", f"{guess / one.throughput:.2f}", one.missing or "")
        )
    for version in dict.fromkeys(one.version for one, _ in rows):
        ratios = [(guess / one.throughput, one.missing) for one, guess in rows if one.version == version]
        compared = [ratio for ratio, missing in ratios if missing is None]
        others = [ratio for ratio, missing in ratios if missing is not None]
        found.append(
            f"\n{SOURCE}, version {version}: {_near(compared)} within 30%; of those not said whole {_near(others)}"
        )
    return found


def _near(ratios: list[float]) -> str:
    return f"{sum(abs(ratio - 1) <= 0.3 for ratio in ratios)} of {len(ratios)}"
