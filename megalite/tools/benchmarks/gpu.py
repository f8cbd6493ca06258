"""Generation on one GPU or several: throughput, decode steps, prefill, start, options, beside what the device can do.

Models of random weights from a shape alone, token ids in, end-of-sequence ignored, greedy unless said. Each model in
each layout is a process (or one for each rank) of its own, so that its start can be measured. A decode step is (time of
129 tokens - time of 1) / 128, from prompts of 448; repetitions draw new ids, so none finds another's prefix. The floor
of a row is made of read and matmul rates that are measured in the same call. Rows are lines of a Markdown table,
printed as soon as they are known; the spread is that of the repetitions. --profile adds what a step spends in which
kernel. With --ranks 2 the layouts tp=2, pp=2 and dp=2 run beside one card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.tools.benchmarks.frame import LayoutTask, head, row, write_figures
from megalite.tools.benchmarks.shapes import SHAPES, save_config, save_weights

ROWS = ("start", "first", "decode", "prefill", "requests", "sampled", "options")
QUICK = ("start", "first", "decode", "prefill", "requests")
OF_LAYOUTS = ("first", "decode", "prefill", "requests")
"""Rows that are run where layouts are compared, unless --rows says which."""


WARM_UP = 32
"""Tokens of the prompts that everything is compiled with, and of their outputs, at most."""


@dataclass(frozen=True)
class Sizes:
    """How much work; the defaults are those of the published table."""

    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    prompt: int = 448
    new: int = 128
    batches: tuple[int, ...] = (1, 32, 256)
    prefill: tuple[int, int] = (8, 2048)
    """Prompts, and tokens of each."""
    vocabulary: int = 10001
    """Ids are drawn below this."""

    def scaled(self, scale: float) -> Sizes:
        """All numbers times `scale`, as far as that makes sense."""

        def of(number: int, least: int) -> int:
            return max(least, round(number * scale))

        shortest = of(self.shortest, 2)
        return replace(
            self,
            requests=of(self.requests, 2),
            shortest=shortest,
            longest=of(self.longest, shortest + 2),
            prompt=of(self.prompt, 4),
            new=of(self.new, 4),
            batches=tuple(dict.fromkeys(of(batch, 1) for batch in self.batches)),
            prefill=(of(self.prefill[0], 2), of(self.prefill[1], 8)),
        )

    @property
    def longest_sequence(self) -> int:
        return max(2 * self.longest, self.prompt + self.new + 1, self.prefill[1] + 1, 2 * WARM_UP + 2)


@dataclass(frozen=True, kw_only=True)
class Task(LayoutTask):
    """What a rank is told."""

    shape: str
    rows: tuple[str, ...]
    sizes: Sizes
    rounds: int
    batched_tokens: int
    """Largest number of tokens in one step."""
    profile: bool
    out: str
    """File that rows are appended to, as JSON lines."""
    began: float
    """When the process was started, by time.monotonic()."""

    @property
    def layout(self) -> str:
        axes = {"tp": self.tp, "pp": self.pp, "dp": self.dp}
        return ", ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one card"

    @classmethod
    def from_json(cls, text: str) -> Task:
        values = json.loads(text)
        sizes: dict[str, Any] = {
            key: tuple(one) if isinstance(one, list) else one for key, one in values["sizes"].items()
        }
        return cls(**{**values, "rows": tuple(values["rows"]), "sizes": Sizes(**sizes)})


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    shape: str
    layout: str
    what: str
    value: float
    unit: str
    spread: float | None = None
    """Largest less smallest of the repetitions, over their median."""
    floor: float | None = None
    """In the same unit."""
    note: str = ""

    @property
    def of_floor(self) -> float | None:
        """Share of what the device could do."""
        if self.floor is None:
            return None
        return self.value / self.floor if self.unit == "tok/s" else self.floor / self.value

    def to_line(self) -> str:
        """Of a Markdown table with the columns of `HEADER`."""
        spread = "" if self.spread is None else f"{self.spread:.1%}"
        floor, share = ("", "") if self.of_floor is None else (number(self.floor), f"{self.of_floor:.0%}")
        measured = f"{number(self.value)} {self.unit}"
        return row(self.shape, self.layout, self.what, measured, spread, floor, share, self.note)


HEADER = head("model", "layout", "what", "measured", "spread", "floor", "of the floor", "")


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-0.6B", "llama-8B"], help="models")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="what to measure (default: all that fits --ranks)")
    parser.add_argument("--ranks", type=int, default=1, help="above 1: tp, pp and dp of so many, beside one card")
    parser.add_argument("--layouts", nargs="+", choices=("one", "tp", "pp", "dp"), help="of these only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="once each, and without options")
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths and batches, to try it out")
    parser.add_argument("--batched-tokens", type=int, default=16384, help="max_num_batched_tokens")
    parser.add_argument("--disk", action="store_true", help="write random weights first, and start from them")
    parser.add_argument("--profile", action="store_true", help="also kernels and host time of steps, as tables")
    parser.add_argument("--json", help="write the rows here")


def run(args: argparse.Namespace) -> int:
    if args.ranks < 1 or args.rounds < 1 or args.scale <= 0:
        raise ConfigError(Problem(key="", rule="--ranks, --rounds and --scale must be above 0"))
    rounds = 1 if args.quick else args.rounds
    rows = args.rows or (QUICK if args.quick else ROWS if args.ranks == 1 else OF_LAYOUTS)
    found: list[dict[str, Any]] = []
    codes = []
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="megalite-bench-") as place:
        for shape in args.shapes:
            folder = save_config(shape, Path(place) / shape)
            if args.disk:
                save_weights(SHAPES[shape], Path(folder))
            for layout in layouts(args):
                out = Path(place) / "rows"
                out.write_text("")
                task = Task(
                    shape=shape,
                    folder=folder,
                    **layout,
                    device=args.device,
                    load_format="auto" if args.disk else "dummy",
                    rows=tuple(name for name in ROWS if name in rows),
                    sizes=sizes_of(shape, args.scale),
                    rounds=rounds,
                    batched_tokens=args.batched_tokens,
                    profile=args.profile,
                    out=str(out),
                    began=time.monotonic(),
                )
                codes.append(task.start("megalite.tools.benchmarks.generation"))
                found += [json.loads(line) for line in out.read_text().splitlines()]
                write_figures(found, args.json)
    if args.ranks > 1:
        print("\n" + beside_one_card(found))
    return max(codes)


def layouts(args: argparse.Namespace) -> list[dict[str, int]]:
    one = {"tp": 1, "pp": 1, "dp": 1}
    every = {"one": one}
    if args.ranks > 1:
        every |= {axis: {**one, axis: args.ranks} for axis in one}
    return [layout for name, layout in every.items() if args.layouts is None or name in args.layouts]


def sizes_of(shape: str, scale: float) -> Sizes:
    vocabulary = min(Sizes.vocabulary, SHAPES[shape]["vocab_size"])
    return Sizes(vocabulary=vocabulary).scaled(scale)


def beside_one_card(rows: list[dict[str, Any]]) -> str:
    """Layouts as columns, with the speed over that of one card."""
    names = list(dict.fromkeys(one["layout"] for one in rows))
    lines = [head("model", "what", *names)]
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for one in rows:
        cells.setdefault((one["shape"], one["what"]), {})[one["layout"]] = one
    for (shape, what), by_layout in cells.items():
        alone = by_layout.get("one card")
        texts = []
        for name in names:
            here = by_layout.get(name)
            text = "" if here is None else f"{number(here['value'])} {here['unit']}"
            if here is not None and alone is not None and here is not alone and here["unit"] in ("tok/s", "ms"):
                gain = here["value"] / alone["value"]
                text += f" ({gain if here['unit'] == 'tok/s' else 1 / gain:.2f}x)"
            texts.append(text)
        lines.append(row(shape, what, *texts))
    return "\n".join(lines)
