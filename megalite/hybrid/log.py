"""The log of a hybrid job: a line on the terminal, a JSON line in a file, and a file of samples for each iteration."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.config.schema import HybridConfig
from megalite.files import LineFile
from megalite.hybrid.algorithms import chunks
from megalite.hybrid.learner import UpdateResult
from megalite.hybrid.rollout import Rollout, rollout_file, write_rollouts
from megalite.model.config import ModelConfig
from megalite.monitor.collector import Meter
from megalite.monitor.words import format_duration, format_rate, wrapped
from megalite.train.flops import AdapterSize, training_flops
from megalite.train.log import Board, continued
from megalite.weights.adapter_table import AdapterTable


class HybridLog:
    """Measures on every rank of the job, and prints and writes on one."""

    def __init__(
        self,
        config: HybridConfig,
        model: ModelConfig,
        folder: Path,
        is_writer: bool,
        *,
        adapter: AdapterTable | None = None,
        meter: Meter,
        peak: float | None,
    ):
        """`adapter`: of those that train in place of the model. `meter`: its parts are those of an iteration. `peak`:
        operations a second of the devices that train; None if it is not known."""
        self.config = config.hybrid
        self.tensorboard = config.output.tensorboard
        self.model = model
        self.adapter_size = AdapterSize.of(adapter)
        self.peak = peak
        self.supervised_steps = config.supervised.steps
        self.path = folder / "training" / "log.jsonl"
        self.rollouts = folder / "training" / "rollouts"
        self.is_writer = is_writer
        self.log: LineFile | None = None
        self.board: Board | None = None
        self.meter = meter
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()
        self.learnt_tokens = 0
        """Tokens learnt in all iterations of this run."""
        self.durations: list[float] = []
        """Seconds of each iteration of this run."""

    def resume(self, supervised_steps: int, iterations: int) -> None:
        """Open the log, without the lines of work that is to be done again."""
        if not self.is_writer:
            return
        self.log = continued(self.path, lambda values: _is_done(values, supervised_steps, iterations))
        self.board = Board(self.path.parent, step=iterations, wanted=self.tensorboard)

    def begin(self) -> None:
        """Start the clock of an iteration."""
        self.meter.take_parts()
        self.began = time.monotonic()

    def supervised(self, step: int, values: dict[str, float]) -> None:
        """Write what came of a supervised step."""
        if step % self.config.log_every == 0 or step == self.supervised_steps:
            line = f"supervised step {step}/{self.supervised_steps}  loss {values['loss']:.4f}"
            self._write(f"{line}  norm {values['gradient_norm']:.3f}", {"supervised_step": step, **values})

    def iteration(self, number: int, rollouts: Sequence[Rollout], update: UpdateResult) -> None:
        """Write what came of the `number`th iteration."""
        if not self.is_writer:
            return
        write_rollouts(rollout_file(self.rollouts, number), number, rollouts, update.scored)
        self.seconds = self.meter.take_parts()
        values = self._values(rollouts, update)
        self.learnt_tokens += sum(len(one.prompt_token_ids) + len(one.token_ids) for one in rollouts)
        self.durations.append(values["seconds"])
        line = None
        if number % self.config.log_every == 0 or number == self.config.steps:
            left = (self.config.steps - number) * statistics.median(self.durations)
            line = _line(number, self.config.steps, values, left, [one.failure for one in update.scored if one.failure])
        self._write(line, {"iteration": number, **values})
        if self.board is not None:
            self.board.write(number, values)

    def _values(self, rollouts: Sequence[Rollout], update: UpdateResult) -> dict[str, Any]:
        rewards = [one.reward for one in update.scored]
        size = self.config.samples_per_prompt
        tokens = sum(len(one.token_ids) for one in rollouts)
        seconds = time.monotonic() - self.began
        agreement = update.agreement
        lengths = [len(one.prompt_token_ids) + len(one.token_ids) for one in rollouts]
        learning = max(self.seconds.get("learning", seconds), 1e-9)
        flops = training_flops(self.model, lengths, self.adapter_size)
        return {
            "reward": statistics.fmean(rewards),
            "reward_of_best": statistics.fmean(map(max, chunks(rewards, size))),
            "reward_failures": sum(one.failure is not None for one in update.scored),
            "length": tokens / len(rollouts),
            "finished": sum(one.finish_reason == "stop" for one in rollouts) / len(rollouts),
            **update.metrics,
            "logprob_difference_max": agreement.largest,
            "logprob_difference_mean": agreement.mean,
            "logprob_off_by_1_percent": agreement.share_off,
            "weight_version": rollouts[0].weight_version,
            "seconds": round(seconds, 3),
            **{f"seconds_{name}": round(value, 3) for name, value in self.seconds.items()},
            "sampled_tokens_per_second": tokens / max(self.seconds.get("sampling", seconds), 1e-9),
            "learnt_tokens_per_second": sum(lengths) / learning,
            # model FLOPs of the update over the seconds of scoring and update together
            "mfu": flops / learning / self.peak if self.peak is not None else None,
        }

    def say(self, line: str) -> None:
        self._write(line, None)

    def _write(self, line: str | None, values: dict[str, Any] | None) -> None:
        if not self.is_writer:
            return
        if line is not None:
            print(wrapped(line), flush=True)
        if values is not None and self.log is not None:
            self.log.append(json.dumps(values))

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.board is not None:
            self.board.close()


def _line(number: int, steps: int, values: dict[str, Any], left: float, failures: Sequence[str]) -> str:
    """An iteration's line on the terminal; `left`: seconds that those to come will take, `failures`: of rewards."""
    parts = [
        f"iteration {number}/{steps}",
        f"reward {_reward(values['reward'])} (best of each prompt {_reward(values['reward_of_best'])})",
        f"{values['length']:.0f} tokens",
    ]
    if "loss" in values:
        parts += [f"loss {values['loss']:.4f}", f"norm {values['gradient_norm']:.3f}"]
    else:
        parts.append("nothing to learn")
    parts += [
        f"log-probabilities within {values['logprob_difference_max']:.1e}",
        f"{format_rate(values['sampled_tokens_per_second'], 1)} tokens/s sampled",
        f"{format_rate(values['learnt_tokens_per_second'], 1)} learnt",
        f"{values['seconds']:.1f} s" + (f", {format_duration(left)} left" if number < steps else ""),
    ]
    if values["mfu"] is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if failures:
        (why, times), *others = Counter(failures).most_common()
        words = f"{len(failures)} reward{'s' if len(failures) > 1 else ''} failed"
        parts.append(f"{words}, {times} of them for one reason: {why}" if others else f"{words}: {why}")
    return "  ".join(parts)


def _reward(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _is_done(values: Mapping[str, Any], supervised_steps: int, iterations: int) -> bool:
    return bool(values.get("supervised_step", 0) <= supervised_steps and values.get("iteration", 0) <= iterations)
