"""What one rank of `bench gpu` does: start a model of random weights, run the rows, tell each as soon as it is known.

Started as `python -m megalite.tools.benchmarks.generation TASK`, with a `Task` as JSON. All ranks run the same, and
the first one speaks. Prompts are token ids drawn anew for every repetition, so none is in the prefix cache.
"""

from __future__ import annotations

import json
import logging
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalite import LLM, SamplingParams
from megalite.errors import EXIT_CRASH, MegaliteError
from megalite.inference.outputs import RequestOutput
from megalite.tools.benchmarks.account import StepClock, decode_account, prefill_account
from megalite.tools.benchmarks.floor import Floor, measure_rates
from megalite.tools.benchmarks.gpu import WARM_UP, Row, Task

_IMPORTED = time.monotonic()

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
SAMPLED = {**GREEDY, "temperature": 0.7, "top_p": 0.95}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature, top_p": SAMPLED,
    "top_k, min_p, seeds": {**SAMPLED, "top_k": 50, "min_p": 0.02, "seed": 1},
    "penalties": {**SAMPLED, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {**GREEDY, "logprobs": 5},
    "text, stop strings": {**GREEDY, "detokenize": True, "stop": ["\x00\x01\x02", "\x03\x04\x05"]},
}
"""Ways to sample that are set beside greedy decoding. The stop strings never come; seeds count up from request to
request."""
OPTION_BATCHES = 2
"""Of the decode batches, the largest so many are run with options."""


@dataclass(frozen=True)
class Timed:
    """One call of `generate`."""

    seconds: float
    outputs: list[RequestOutput]

    @property
    def steady(self) -> float:
        """Seconds a token of the request that began last: it decodes while all others do."""
        every = [one.metrics for one in self.outputs if one.metrics is not None]
        last = max(every, key=lambda metrics: metrics.first_token_ts)
        return (last.last_token_ts - last.first_token_ts) / (last.num_generation_tokens - 1)


class Bench:
    """The rows of one model in one layout."""

    def __init__(self, llm: LLM, task: Task, tell: Callable[[Row], None]):
        self.llm, self.task, self.sizes, self._tell = llm, task, task.sizes, tell
        sizes, limit = self.sizes, self.sizes.vocabulary - 1
        self.random = r = random.Random(0)
        drawn = [
            [r.randint(0, limit) for _ in range(r.randint(sizes.shortest, sizes.longest))]
            for _ in range(sizes.requests)
        ]
        self.prompts = [len(prompt) for prompt in drawn]
        self.outputs = [r.randint(sizes.shortest, sizes.longest) for _ in range(sizes.requests)]
        self.warm_up()
        replica = llm.replica
        rates = measure_rates(replica.device)
        self.floor = Floor(replica.model, replica.layout, rates, replica.dtype.itemsize)
        self.tell("read rate", rates.read / 1e12, "TB/s")
        self.tell("matmul rate", rates.matmul / 1e12, "TFLOP/s")

    def run(self) -> bool:
        """The rows that the task asks for, and the account after them; whether all went well.

        Where one fails in a plain process, the others go on.
        """
        parts: dict[str, Callable[[], None]] = {
            "first": self.first,
            "decode": self.decode,
            "prefill": self.prefill,
            "requests": self.requests,
            "sampled": self.sampled,
            "options": self.options,
            "profile": self.profile,
        }
        well = True
        for name in (*self.task.rows, *(["profile"] if self.task.profile else [])):
            try:
                parts.get(name, lambda: None)()
            except Exception:
                if self.llm.replica.layout.size > 1:
                    raise
                well = False
                traceback.print_exc()
        return well

    def tell(self, what: str, value: float, unit: str, **more: Any) -> None:
        self._tell(Row(self.task.shape, self.task.layout, what, value, unit, **more))

    def tell_median(self, what: str, values: list[float], unit: str, **more: Any) -> None:
        middle = statistics.median(values)
        self.tell(what, middle, unit, spread=(max(values) - min(values)) / middle if len(values) > 1 else None, **more)

    def generate(self, prompts: Sequence[int], outputs: Sequence[int], options: dict[str, Any] = GREEDY) -> Timed:
        """Prompts and outputs of these lengths, of ids never seen before; `options` of SamplingParams."""
        limit = self.sizes.vocabulary - 1
        ids = [[self.random.randint(0, limit) for _ in range(length)] for length in prompts]
        params = [SamplingParams(max_tokens=length, **options) for length in outputs]
        if "seed" in options:
            for index, one in enumerate(params):
                one.seed = options["seed"] + index
        began = time.perf_counter()
        done = self.llm.generate(ids, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert [len(output.outputs[0].token_ids) for output in done] == list(outputs), "an output ended early"
        assert not any(output.num_cached_tokens for output in done), "a prompt was in the prefix cache"
        return Timed(seconds, done)

    def even(self, batch: int, new: int, options: dict[str, Any] = GREEDY) -> Timed:
        return self.generate([self.sizes.prompt] * batch, [new] * batch, options)

    def warm_up(self) -> None:
        """Steps of about every number of rows, and of the longest prompts: compiled and captured before it counts."""
        most, short = max(*self.sizes.batches, self.sizes.requests), min(self.sizes.prompt, WARM_UP)
        began = time.monotonic()
        self.even(1, 3)
        first = time.monotonic()
        self.generate([short] * most, [2 + number * WARM_UP // most for number in range(most)])
        self.generate([self.sizes.prefill[1]] * self.sizes.prefill[0], [1] * self.sizes.prefill[0])
        if "start" in self.task.rows:
            self.tell("first request (what is left for it)", first - began, "s")
            self.tell("warm-up of this benchmark", time.monotonic() - first, "s")

    def first(self) -> None:
        times = [1000 * self.even(1, 1).seconds for _ in range(2 * self.task.rounds + 1)]
        prompt = self.sizes.prompt
        self.tell_median(f"first token of {prompt}", times, "ms", floor=1000 * self.floor.prefill([prompt]))

    def decode(self) -> None:
        """By the difference between many tokens and one; the median of differences."""
        prompt, new = self.sizes.prompt, self.sizes.new
        for batch in self.sizes.batches:
            times = []
            for _ in range(self.task.rounds if batch > 1 else 2 * self.task.rounds + 1):
                one = self.even(batch, 1).seconds
                times.append(1000 * (self.even(batch, new + 1).seconds - one) / new)
            context = prompt + new // 2
            floor = 1000 * self.floor.decode([context] * batch)
            self.tell_median(f"decode, batch {batch}, context {context}", times, "ms", floor=floor)

    def prefill(self) -> None:
        count, length = self.sizes.prefill
        total = count * length
        rates = [total / self.generate([length] * count, [1] * count).seconds for _ in range(self.task.rounds + 1)]
        self.tell_median(
            f"prefill {count} x {length}", rates, "tok/s", floor=total / self.floor.prefill([length] * count)
        )

    def requests(self) -> None:
        self._requests(f"{self.sizes.requests} requests", GREEDY, self.task.rounds, gaps=True)

    def sampled(self) -> None:
        self._requests(f"{self.sizes.requests} requests, temperature 0.7, top_p 0.95", SAMPLED, 1)

    def _requests(self, what: str, options: dict[str, Any], rounds: int, *, gaps: bool = False) -> None:
        total, rates, steps = sum(self.outputs), [], []
        for _ in range(rounds):
            with StepClock(self.llm) as clock:
                rates.append(total / self.generate(self.prompts, self.outputs, options).seconds)
            steps.append(clock.seconds(self.task.pp))
        floor = total / self.floor.requests(self.prompts, self.outputs)
        self.tell_median(what, rates, "tok/s", floor=floor, note=f"{total:,} output tokens")
        if gaps:
            note = "longest step, as every running request gains a token in each"
            self.tell_median("longest gap between two tokens", [1000 * max(one) for one in steps], "ms", note=note)

    def options(self) -> None:
        """Options and greedy decoding take turns; what counts is the time a token while all are at it."""
        new = self.sizes.new
        for batch in self.sizes.batches[-OPTION_BATCHES:]:
            ways = {"greedy": GREEDY, **OPTIONS}
            for options in OPTIONS.values():
                self.generate([8] * batch, [4] * batch, options)
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(self.task.rounds):
                for name, options in ways.items():
                    found[name].append(1000 * self.even(batch, new + 1, options).steady)
            for name in OPTIONS:
                ratios = [mine / plain for mine, plain in zip(found[name], found["greedy"], strict=True)]
                note = f"{statistics.median(ratios):.3f} x greedy"
                self.tell_median(f"decode, batch {batch}, {name}", found[name], "ms", note=note)

    def profile(self) -> None:
        """Where time goes, as tables."""
        for batch in dict.fromkeys((self.sizes.batches[0], self.sizes.batches[-1])):
            work = partial(self.even, batch, self.sizes.new + 1)
            contexts = [self.sizes.prompt + self.sizes.new // 2] * batch
            self.say(decode_account(self.llm, work, self.sizes.new, contexts, self.floor))
        count, length = self.sizes.prefill
        lengths = [length] * count
        self.say(prefill_account(self.llm, partial(self.generate, lengths, [1] * count), lengths, self.floor))

    def say(self, text: str) -> None:
        if self.llm.replica.state.rank == 0:
            print(f"\n{text}\n", flush=True)


def main() -> int:
    task = Task.from_json(sys.argv[1])
    try:
        return run(task)
    except MegaliteError as error:
        sys.stderr.write("".join(f"{line}\n" for line in error.lines()))
        return error.exit_code


class Said(logging.Handler):
    """What the log says took how long: `WHAT in SECONDS s`."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        match = re.fullmatch(r"(.+) in (\d+(?:\.\d+)?) s", record.getMessage())
        if match:
            self.seconds.append((match[1], float(match[2])))


def run(task: Task) -> int:
    said = Said()
    log = logging.getLogger("megalite")
    log.addHandler(said)
    log.setLevel(logging.INFO)
    with task.llm(
        max_model_len=task.sizes.longest_sequence,
        max_num_seqs=max(*task.sizes.batches, task.sizes.requests),
        max_num_batched_tokens=task.batched_tokens,
    ) as llm:
        loaded = time.monotonic()
        speaks = llm.replica.state.rank == 0

        def tell(row: Row) -> None:
            if speaks:
                print(row.to_line(), flush=True)
                with Path(task.out).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(row), "of_floor": row.of_floor}) + "\n")

        if "start" in task.rows:
            steps = {"import": _IMPORTED - task.began, "model and engine": loaded - _IMPORTED}
            steps |= {f"of this, {what}": seconds for what, seconds in said.seconds}
            for what, seconds in {**steps, "ready": loaded - task.began}.items():
                tell(Row(task.shape, task.layout, f"start: {what}", seconds, "s", note=f"weights: {task.load_format}"))
        bench = Bench(llm, task, tell)
        return 0 if bench.run() else EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main())
