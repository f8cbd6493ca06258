"""Results of requests, whole and step by step, and results as lines of JSON. Torch-free; fields have vLLM's names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megalite import json_text
from megalite.inference.logprobs import FlatLogprobs, Logprobs, finite, from_json, number, to_json
from megalite.inference.request import FinishReason


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    """Place among the prompt's completions, from 0."""
    text: str
    """The text without the stop string or token that ended it, unless include_stop_str_in_output; empty without a
    tokenizer."""
    token_ids: list[int]
    """All that were sampled, a stop token or the tokens of a stop string included."""
    cumulative_logprob: float
    """Sum over the tokens, by the model's full distribution; over those that were sampled here, of a replay."""
    logprobs: list[Logprobs] | FlatLogprobs | None = None
    """One entry a token, if asked for; an empty one where the token was given with the request (`Request.given`)."""
    token_logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token, by the model's full distribution, asked for or not; NaN where it was given. Files
    of results leave it out."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the id among stop_token_ids, that ended it; None for end-of-sequence and length."""


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request's life; names and clocks are vLLM's."""

    arrival_time: float = 0.0
    """When the engine took it, by the clock on the wall (seconds since 1970)."""
    queued_ts: float = 0.0
    """The same by time.monotonic(), as are all times below."""
    scheduled_ts: float = 0.0
    """When its first tokens were scheduled."""
    first_token_ts: float = 0.0
    """When its first token was sampled; 0 if none was."""
    last_token_ts: float = 0.0
    """When its last token was sampled, of all samples."""
    first_token_latency: float = 0.0
    """Seconds from queued_ts to first_token_ts."""
    num_generation_tokens: int = 0
    """Tokens of all samples, those that best_of left out included."""


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """The result of one prompt."""

    request_id: str
    prompt: str | None
    """None if it was given as token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | FlatLogprobs | None = None
    """One entry a token, None for the first; if asked for."""
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    replica: int | None = None
    """The replica that ran it."""
    error: str | None = None
    """Why it could not run; there are no outputs then. Or, with outputs, why their text is not whole."""
    num_cached_tokens: int | None = field(default=None, compare=False)
    """Tokens of the prompt whose keys and values were in the prefix cache."""
    metrics: RequestMetrics | None = field(default=None, compare=False)

    def to_line(self) -> str:
        """One line of JSON, without its newline; `from_line` reads it back. Absent values are left out, and so are
        those that depend on the batch in which the request ran."""
        value: dict[str, Any] = {"id": self.request_id, "prompt": self.prompt}
        value["prompt_token_ids"] = self.prompt_token_ids
        if self.prompt_logprobs is not None:
            value["prompt_logprobs"] = [to_json(entry) for entry in self.prompt_logprobs]
        value["outputs"] = [_completion_value(output) for output in self.outputs]
        value["replica"] = self.replica
        if self.error is not None:
            value["error"] = self.error
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Half a surrogate pair, which only a refused prompt can hold, exists in JSON but not in UTF-8.
        return line if _is_unicode(line) else json.dumps(value, allow_nan=False)

    @classmethod
    def from_line(cls, line: str | bytes) -> RequestOutput:
        """The inverse of `to_line`. ValueError, KeyError or TypeError: it is no such line."""
        value = json_text.parse(line)
        prompt_logprobs = value.get("prompt_logprobs")
        return cls(
            request_id=value["id"],
            prompt=value["prompt"],
            prompt_token_ids=value["prompt_token_ids"],
            prompt_logprobs=prompt_logprobs and [from_json(entry) for entry in prompt_logprobs],
            outputs=[_completion(output) for output in value["outputs"]],
            replica=value["replica"],
            error=value.get("error"),
        )


class TokenDelta(msgspec.Struct, kw_only=True, array_like=True, gc=False):
    """What one sample of a streamed request gained with a step. There is one for each token, so it is made to cost
    little: to make, to send (a list of its fields) and to the garbage collector, which need not look at it."""

    request_id: str
    index: int
    """Number of the sample, from 0."""
    text: str
    """Text that is certain; what may yet turn out to begin a stop string, or half a character, comes later."""
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    """One entry a token, if asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last one."""
    stop_reason: str | int | None = None

    def extend(self, later: TokenDelta) -> None:
        """Add what the sample gained after this."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _completion_value(output: CompletionOutput) -> dict[str, Any]:
    value: dict[str, Any] = {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "cumulative_logprob": finite(output.cumulative_logprob),
        "logprobs": output.logprobs and [to_json(entry) for entry in output.logprobs],
        "finish_reason": output.finish_reason,
    }
    return value if output.stop_reason is None else {**value, "stop_reason": output.stop_reason}


def _completion(value: dict[str, Any]) -> CompletionOutput:
    logprobs = value["logprobs"] and [from_json(entry) or {} for entry in value["logprobs"]]
    total = number(value["cumulative_logprob"])
    return CompletionOutput(**{**value, "logprobs": logprobs, "cumulative_logprob": total})
