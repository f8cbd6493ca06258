"""The task of grpo_arithmetic.yaml: `data.source: configs.hybrid.grpo_arithmetic:additions`."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalite.errors import ConfigError, Problem
from megalite.train.data.records import is_held_out

ADDITIONS_HELD_OUT = 0.1
"""Share of all pairs of numbers that are kept for evaluation."""
_ENUMERATED = 10**6


def additions(*, split: str, seed: int = 0, digits: int = 2, count: int = 2000) -> list[dict[str, Any]]:
    """Sums of two numbers below 10**digits: `12+34=`, answer `46`, response `46` and a line end; none twice.

    Which pairs are held out depends on the pair alone, so no seed trains on what another evaluates. Fewer than `count`
    if there are no more.
    """
    if not 1 <= digits <= 9:
        raise ConfigError(Problem(key="data.options.digits", rule="must be between 1 and 9", value=digits))
    if count < 1:
        raise ConfigError(Problem(key="data.options.count", rule="must be >= 1", value=count))
    below = 10**digits
    random = np.random.Philox(key=[seed, digits])
    if below**2 <= _ENUMERATED:
        drawn = np.argsort(random.random_raw(below**2), kind="stable")
    else:  # a repetition is rare among so many, and a fifth more than can be held out is drawn
        drawn = random.random_raw(12 * count + 1000) % below**2
    records: dict[str, dict[str, Any]] = {}
    for pair in drawn.tolist():
        left, right = divmod(pair, below)
        prompt, answer = f"{left}+{right}=", str(left + right)
        if is_held_out(prompt, ADDITIONS_HELD_OUT) == (split == "held_out"):
            records[prompt] = {"prompt": prompt, "answer": answer, "response": f"{answer}\n"}
        if len(records) == count:
            break
    return list(records.values())
