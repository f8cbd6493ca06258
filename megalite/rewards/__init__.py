"""Rewards of a hybrid job: functions, computed in processes of their own; programs of a model's run in a sandbox."""

from megalite.rewards.functions import exact_match, length_close, matches_pattern, parses_as_python, passes_asserts

__all__ = ["exact_match", "length_close", "matches_pattern", "parses_as_python", "passes_asserts"]
