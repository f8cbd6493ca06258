"""The planner's predictions beside what is measured here: memory and speed of every layout of some ranks.

Models of random weights from a shape alone; requests of random token ids and lengths, all at the start. Speed: output
tokens over the time of one `generate`, once everything has run before. Memory: on a GPU what the device has less than
before the start, on a CPU the peak of the process's resident memory less what it had once everything was imported,
both of the fullest rank. Run `megalite plan --calibrate` first: then rates are this machine's. `--published` needs no
machine: predictions beside NVIDIA's published tables.

Started as `python -m megalite.tools.benchmarks.plan TASK` it is one rank.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout
from megalite.model import families
from megalite.planner.cost import Cluster
from megalite.planner.devices import Device, named, visible_gpus
from megalite.planner.generation import Prediction, Span, Workload, predict
from megalite.planner.memory import PROCESS, RankMemory
from megalite.planner.search import layouts
from megalite.tools.benchmarks import published
from megalite.tools.benchmarks.frame import LayoutTask, head, row, write_figures
from megalite.tools.benchmarks.shapes import SHAPES, save_config

HEADER = head(
    *("model", "layout", "tokens/s predicted", "measured", "ratio", "MiB predicted", "measured", "ratio", "weights")
)


@dataclass(frozen=True, kw_only=True)
class Task(LayoutTask):
    """What a rank is told."""

    requests: int
    input: tuple[int, int]
    output: tuple[int, int]
    batched_tokens: int
    out: str
    """File of which every rank writes one that ends in its number."""

    def lengths(self) -> list[tuple[int, int]]:
        """As the planner plays them."""
        draw = random.Random(0)
        return [(draw.randint(*self.input), draw.randint(*self.output)) for _ in range(self.requests)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-10M", "llama-34M"], help="models")
    parser.add_argument("--requests", type=int, default=32, help="of a job (default: %(default)s)")
    parser.add_argument("--input", type=int, nargs=2, default=[16, 128], help="their shortest and longest prompt")
    parser.add_argument("--output", type=int, nargs=2, default=[16, 128], help="and output")
    parser.add_argument("--batched-tokens", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts (default: %(default)s)")
    parser.add_argument("--published", action="store_true", help="published tables instead; runs nothing")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    if args.published:
        print("\n".join(published.lines()))
        return 0
    gpus = visible_gpus()
    kind = args.device or ("cuda" if gpus else "cpu")
    device = named(gpus[0][0]) if kind == "cuda" else named("cpu")
    print(f"{device.name}: {device.source}\n\n{HEADER}", flush=True)
    found: list[dict[str, Any]] = []
    codes = [0]
    with tempfile.TemporaryDirectory(prefix="megalite-plan-") as name:
        for shape in args.shapes:
            folder = save_config(shape, Path(name) / shape)
            for ranks in args.ranks:
                for layout in layouts(ranks, families.read(folder)):
                    runs = [_one(args, folder, layout, kind, device, Path(name)) for _ in range(args.rounds)]
                    well = [one for one in runs if one is not None]
                    codes.append(int(not well))
                    if well:
                        best = max(well, key=lambda one: one["measured"])
                        found.append({"shape": shape, "ranks": ranks, **best})
                        print(_line(found[-1]), flush=True)
                for line in _ranking([one for one in found if (one["shape"], one["ranks"]) == (shape, ranks)]):
                    print(line, flush=True)
    write_figures(found, args.json)
    return max(codes)


def _one(
    args: argparse.Namespace, folder: str, layout: Layout, kind: str, device: Device, place: Path
) -> dict[str, Any] | None:
    """One start of one layout; None if it failed."""
    task = Task(
        folder=folder,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        device=kind,
        requests=args.requests,
        input=tuple(args.input),
        output=tuple(args.output),
        batched_tokens=args.batched_tokens,
        out=str(place / f"found-{time.monotonic_ns()}"),
    )
    ranks = start(task)
    if ranks is None:
        return None
    predicted = foresee(task, device)
    itemsize = 2 if kind == "cuda" else 4
    config = families.read(folder)
    exact = all(rank["weights"] == RankMemory(config, layout, rank["rank"], itemsize).weights for rank in ranks)
    return {
        "layout": str(layout),
        "predicted": predicted.throughput,
        "measured": speed(task, ranks),
        "memory_predicted": max(_kept(task, predicted, layout, rank) for rank in ranks),
        "memory_measured": max(rank["memory"] for rank in ranks),
        "weights_exact": exact,
    }


def start(task: Task) -> list[dict[str, Any]] | None:
    """Run the task's layout; what each rank found, or None if the run failed."""
    if task.start(__name__):
        return None
    return [json.loads(Path(f"{task.out}-{rank}").read_text()) for rank in range(task.ranks)]


def speed(task: Task, ranks: list[dict[str, Any]]) -> float:
    """Output tokens a second, of all replicas."""
    seconds: float = max(rank["seconds"] for rank in ranks)
    return sum(length for _, length in task.lengths()) / seconds


def _kept(task: Task, predicted: Prediction, layout: Layout, rank: dict[str, Any]) -> int:
    """Bytes that a rank is predicted to hold beside the cache that it made, which is as large as the work needs."""
    stage = predicted.memory[layout.coord(rank["rank"]).pp]
    if task.device == "cuda":
        return stage.total - stage.kv - stage.reserve + int(rank["kv"])
    memory = RankMemory(families.read(task.folder), layout, rank["rank"], 4)
    rows = -(-engine_keys(task)["max_num_seqs"] // task.pp)
    return memory.weights + PROCESS + memory.step(max_tokens=task.batched_tokens, max_rows=rows) + int(rank["kv"])


def foresee(task: Task, device: Device) -> Prediction:
    config = families.read(task.folder)
    spans = {"input": Span(*task.input), "output": Span(*task.output)}
    load = Workload(**spans, concurrency=task.requests, requests=task.requests)
    layout = Layout(task.tp, task.pp, task.dp)
    engine = EngineSection(**engine_keys(task))
    itemsize = 2 if task.device == "cuda" else 4
    return predict(config, layout, Cluster(device, layout.size), load, engine, itemsize=itemsize)


def engine_keys(task: Task) -> dict[str, Any]:
    return {
        "max_model_len": task.input[1] + task.output[1],
        "max_num_seqs": -(-task.requests // task.dp),
        "max_num_batched_tokens": task.batched_tokens,
    }


def _line(found: dict[str, Any]) -> str:
    cells: list[str] = [found["shape"], found["layout"]]
    mib = found["memory_predicted"] / 2**20, found["memory_measured"] / 2**20
    for said, held in ((found["predicted"], found["measured"]), mib):
        cells += [f"{said:,.0f}", f"{held:,.0f}", f"{said / held:.2f}"]
    return row(*cells, "exact" if found["weights_exact"] else "differ")


def _ranking(rows: list[dict[str, Any]]) -> list[str]:
    """Where the layout that was measured fastest stands in the prediction."""
    if len(rows) < 2:
        return []
    order = [one["layout"] for one in sorted(rows, key=lambda one: -one["predicted"])]
    best = max(rows, key=lambda one: one["measured"])["layout"]
    return [f"| {rows[0]['shape']} | fastest: {best}, number {order.index(best) + 1} of the prediction |{' |' * 7}"]


def rank(task: Task) -> int:
    """One rank: generate twice, and tell the second time and the memory."""
    from megalite import LLM, SamplingParams  # noqa: F401 (imported before memory is looked at)
    from megalite.kernels.device import memory_in_use, synchronize
    from megalite.monitor.memory import peak_memory, reset_peak_memory

    cuda = task.device == "cuda"
    before = memory_in_use() if cuda else reset_peak_memory()
    with task.llm(skip_tokenizer_init=True, **engine_keys(task)) as llm:
        draw, limit = random.Random(1), llm.replica.model.vocab_size - 1
        seconds = 0.0
        for _ in range(2):
            prompts = [[draw.randint(0, limit) for _ in range(length)] for length, _ in task.lengths()]
            params = [
                SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
                for _, tokens in task.lengths()
            ]
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - began
        synchronize(llm.replica.device)
        held = (memory_in_use() if cuda else peak_memory()) - before
        replica = llm.replica
        found = {
            "rank": replica.state.rank,
            "seconds": seconds,
            "memory": held,
            "weights": replica.weight_bytes,
            "kv": replica.kv_bytes,
        }
        Path(f"{task.out}-{replica.state.rank}").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    sys.exit(rank(Task(**{**values, "input": tuple(values["input"]), "output": tuple(values["output"])})))
