"""One request for tests, made as those of a job are."""

from __future__ import annotations

from typing import Any

from megalite.config.schema import SamplingParams
from megalite.errors import ConfigError
from megalite.inference.io.inputs import Prompt, PromptLimits, RawRequest, make_requests
from megalite.inference.request import Request


def make_request(prompt: Prompt, params: SamplingParams, limits: PromptLimits, index: int = 0, **more: Any) -> Request:
    """`more`: other fields of RawRequest. ConfigError: it can't run."""
    [made] = make_requests([RawRequest(prompt=prompt, params=params, id=str(index), index=index, **more)], limits)
    if isinstance(made, ConfigError):
        raise made
    return made
