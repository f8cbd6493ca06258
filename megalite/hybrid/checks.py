"""What the door looks up for a hybrid job: its reward and its task, before anything is started. Imports no torch."""

from __future__ import annotations

from megalite.config.hybrid_rules import FUNCTION
from megalite.config.schema import HybridConfig
from megalite.errors import Problem
from megalite.hybrid.tasks import check_source
from megalite.rewards.pool import check_reward


def problems(config: HybridConfig) -> list[Problem]:
    """Problems with the reward and the task that the config names."""
    found = []
    reward, data = config.hybrid.reward, config.data
    if reward is not None and FUNCTION.fullmatch(reward):
        wrong = check_reward(reward)
        found += [wrong] if wrong else []
    if data.source is not None:
        found += check_source(data.source, data.options)
    return found
