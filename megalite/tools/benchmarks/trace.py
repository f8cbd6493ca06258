"""What measuring every step costs: one model on one rank, generating without a collector, with it, and with a timeline.

The three take turns. Two ratios of each to none: of tokens a second, and of the CPU time of this process, which other
programs on the machine disturb less. Medians of the rounds' ratios: 1.00 costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megalite import LLM
from megalite.config.schema import SamplingParams
from megalite.monitor.collector import Meter
from megalite.monitor.timeline import Timeline
from megalite.tools import toolkit
from megalite.tools.benchmarks.frame import head, row, timed, write_figures

MODES = ("none", "collector", "timeline")


def add_arguments(parser: toolkit.Parser) -> None:
    parser.add_argument("--model", default="checkpoints/demo", help="folder (default: %(default)s)")
    parser.add_argument("--batch", type=toolkit.positive, default=8, help="prompts at once (default: %(default)s)")
    parser.add_argument("--new", type=toolkit.positive, default=64, help="tokens of each (default: %(default)s)")
    parser.add_argument("--rounds", type=toolkit.positive, default=9, help="(default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    prompts: Any = [{"prompt_token_ids": [3 + place] * 16} for place in range(args.batch)]
    params = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with LLM(args.model) as llm, tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):
            for mode in MODES[number % 3 :] + MODES[: number % 3]:
                with _measuring(llm.replica.meter, mode, Path(folder) / "t.json.gz"):
                    took = timed(lambda: llm.generate(prompts, params, use_tqdm=False))
                    if number:
                        found[mode].append((took.seconds, took.cpu_seconds))
    tokens = args.batch * args.new
    figures = {}
    print(head("measured by", "tokens/s", "of none", "CPU time, of none"))
    for mode in MODES:
        seconds, cpus = zip(*found[mode], strict=True)
        speed = statistics.median(none / own for (none, _), own in zip(found["none"], seconds, strict=True))
        effort = statistics.median(own / none for (_, none), own in zip(found["none"], cpus, strict=True))
        rate = tokens / statistics.median(seconds)
        figures[mode] = {"tokens_per_second": rate, "speed": speed, "cpu": effort}
        print(row(mode, f"{rate:,.0f}", f"{speed:.3f}", f"{effort:.3f}"))
    write_figures(figures, args.json)
    return 0


@contextmanager
def _measuring(meter: Meter, mode: str, file: Path) -> Iterator[None]:
    """Meanwhile the collector does nothing, its work, or that and writing a timeline."""
    if mode == "none":
        nothing = nullcontext()
        switched_off = {
            "phase": lambda *args, **how: nothing,
            "step": lambda **how: None,
            "count_bytes": lambda *args: None,
        }
        vars(meter).update(switched_off)
        yield
        for name in switched_off:
            del vars(meter)[name]
        return
    if mode == "timeline":
        Timeline.create(file, "")
        meter.sink = Timeline(file, rank=0, ranks=1, label="rank 0", to_origin=lambda at: at, ends=True)
    yield
    timeline, meter.sink = meter.sink, None
    if timeline is not None:
        timeline.close()
