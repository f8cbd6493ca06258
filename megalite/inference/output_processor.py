"""From sampled tokens to results: text, stop strings, log-probabilities, the best of several samples. Torch-free.

`OutputProcessor` lives on the control rank of a replica.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from megalite.config.schema import SamplingParams
from megalite.inference.logprobs import FlatLogprobs, Logprob, Logprobs
from megalite.inference.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenDelta
from megalite.inference.request import FinishReason, Request, Sequence, StepPlan
from megalite.inference.stopping import StopChecker, StopMatch, stop_strings
from megalite.text.detokenizer import Detokenizer, TokenizerError
from megalite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megalite.inference.choice import TokenLogprobs

_Place = tuple[int, float, int, list[int], list[float]]
"""Fields of TokenLogprobs."""


class _Scores:
    """Places of tokens in their distributions, where params.logprobs asks for them, in a few lists until they
    are given out: many small objects would cost the garbage collector more than all else."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int] = []
        self.top_ids: list[int] = []
        """The same number of ids for each token."""
        self.top_logprobs: list[float] = []

    def append(self, details: TokenLogprobs) -> None:
        self.ids.append(details.token_id)
        self.logprobs.append(details.logprob)
        self.ranks.append(details.rank)
        self.top_ids += details.top_ids
        self.top_logprobs += details.top_logprobs

    def __iter__(self) -> Iterator[_Place]:
        """What `append` was given, token by token."""
        width = len(self.top_ids) // max(len(self.ranks), 1)
        for i, (token_id, logprob, rank) in enumerate(zip(self.ids, self.logprobs, self.ranks, strict=True)):
            part = slice(i * width, (i + 1) * width)
            yield token_id, logprob, rank, self.top_ids[part], self.top_logprobs[part]


class _Sample:
    """One completion as it grows. Where the tokenizer fails, its text ends."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        params = request.params
        self.request = request
        self.error: str | None = None
        """How the tokenizer failed."""
        self.checker = StopChecker(stop_strings(params))
        self.match: StopMatch | None = None
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.cumulative_logprob = 0.0
        self.token_logprobs: list[float] = []
        self.scores = _Scores()
        self.num_given = 0
        """Tokens that came with the request."""
        self.given_out = 0
        """Characters of the text that deltas have had."""
        self.kept_back = ""
        """The text after those characters; of a streamed request only."""
        self.final_token: int | None = None
        """A stop token that is not in the text yet: it belongs there only if it did not end the output."""
        self.finish_reason: FinishReason | None = None
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            try:
                self._detokenizer = tokenizer.detokenizer(
                    request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
                )
            except TokenizerError as error:
                self.error = str(error)

    def replay(self, given: Iterable[int], *, ended: bool) -> None:
        """Go on from another replica's sample, which has given out these tokens and their text."""
        for token_id in given:
            self.append(token_id, math.nan, None)
        self.num_given, self.cumulative_logprob = len(self.token_ids), 0.0
        if ended:
            reason = self.request.end_at(self.token_ids[-1], self.num_given) if self.token_ids else None
            self.finish(reason or "error")
        self.gained()

    def _decode(self, token_id: int | None) -> str:
        """The text that is certain with one more token; None: with no more of them."""
        if self._detokenizer is None:
            return ""
        try:
            return self._detokenizer.flush() if token_id is None else self._detokenizer.feed(token_id)
        except TokenizerError as error:
            self.error, self._detokenizer = str(error), None
            return ""

    def append(self, token_id: int, logprob: float, details: TokenLogprobs | None) -> bool:
        """Add a token; True when it completes a stop string."""
        self.token_ids.append(token_id)
        self.cumulative_logprob += logprob
        self.token_logprobs.append(logprob)
        if details is not None:
            self.scores.append(details)
        text = "" if self.final_token is None else self._release()
        if token_id in self.request.stop_token_ids:
            self.final_token = token_id
        elif self._detokenizer is not None:
            text += self._decode(token_id)
        self._add(text)
        return self.match is not None

    def _release(self) -> str:
        """The text of a stop token that did not end the output."""
        token_id, self.final_token = self.final_token, None
        return "" if token_id is None else self._decode(token_id)

    def _add(self, text: str) -> None:
        self.pieces.append(text)
        if self.request.stream:
            self.kept_back += text
        if not self.checker.stops or self.match is not None:
            return
        if len(self.token_ids) > self.request.params.min_tokens:
            self.match = self.checker.feed(text)
        else:
            self.checker.skip(text)

    def finish(self, reason: FinishReason | None) -> None:
        """No more tokens will come."""
        if self.match is None:
            kept = self._release() if self.request.params.include_stop_str_in_output else ""
            self._add(kept + self._decode(None))
        # Text that was certain only at the end may hold a stop string too.
        self.finish_reason = "stop" if self.match is not None else reason

    def text(self) -> str:
        """The text, without the stop string unless that is wanted."""
        text = "".join(self.pieces)
        return text if self.match is None else text[: self._match_end(self.match)]

    def _match_end(self, match: StopMatch) -> int:
        """Length in characters of a text that a stop string ends."""
        return match.end if self.request.params.include_stop_str_in_output else match.start

    def stop_reason(self) -> str | int | None:
        if self.match is not None:
            return self.match.stop
        stops = self.request.params.stop_token_ids or ()
        ended = self.finish_reason == "stop" and self.token_ids and self.token_ids[-1] in stops
        return self.token_ids[-1] if ended else None

    def gained(self) -> str:
        """Text that is certain to stay and has not been given out."""
        count = len(self.kept_back)
        if self.match is not None:
            count = max(0, self._match_end(self.match) - self.given_out)
        elif self.checker.stops and self.finish_reason is None:
            count -= min(count, self.checker.held_back)
        gained, self.kept_back = self.kept_back[:count], self.kept_back[count:]
        self.given_out += len(gained)
        return gained

    def output(self, index: int, entry: Callable[[_Place], Logprobs]) -> CompletionOutput:
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = _listing(self.request.params)
            for _ in range(self.num_given):
                logprobs.append({})
            for details in self.scores:
                logprobs.append(entry(details))
        return CompletionOutput(
            index=index,
            text=self.text(),
            token_ids=self.token_ids,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=logprobs,
            token_logprobs=self.token_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason(),
        )


def _listing(params: SamplingParams) -> list[Any] | FlatLogprobs:
    return FlatLogprobs() if params.flat_logprobs else []


class _Running:
    """What has come of one request so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request = request
        self.tokenizer = tokenizer if request.params.detokenize else None
        self.samples = [_Sample(request, tokenizer) for _ in range(request.num_samples)]
        if request.given or request.ended:
            for index, sample in enumerate(self.samples):
                sample.replay(request.given_to(index), ended=index in request.ended)
        self.unfinished = request.num_samples - len(request.ended)
        self.prompt_logprobs = None
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = _listing(request.params)
            self.prompt_logprobs.append(None)
        self.error: str | None = None
        """Why the text of a token among the log-probabilities is missing."""
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=time.time(), queued_ts=time.monotonic())
        self.metrics.num_generation_tokens = sum(map(len, request.given))

    def entry(self, details: _Place) -> Logprobs:
        """vLLM's form: the token itself, then the likeliest by rank."""
        token_id, logprob, rank, top_ids, top_logprobs = details
        own = Logprob(logprob, rank, self._text(token_id))
        texts = repeat(None) if self.tokenizer is None else map(self._text, top_ids)
        found = {token_id: own}
        found.update(zip(top_ids, map(Logprob, top_logprobs, range(1, len(top_ids) + 1), texts), strict=True))
        found[token_id] = own
        return found

    def _text(self, token_id: int) -> str | None:
        """One token by itself; None where no text is wanted, or the tokenizer fails."""
        if self.tokenizer is None:
            return None
        try:
            return self.tokenizer.token_text(token_id)
        except TokenizerError as error:
            self.error = str(error)
            return None

    def output(self, replica: int) -> RequestOutput:
        """The result: of best_of samples the n likeliest, best first; all in order if there are no more."""
        wanted, best = self.request.params.n, self.samples
        if wanted < len(best):
            best = sorted(best, key=lambda sample: -sample.cumulative_logprob)[:wanted]
        return RequestOutput(
            request_id=self.request.id,
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output(index, self.entry) for index, sample in enumerate(best)],
            replica=replica,
            error=next(filter(None, [self.error, *(sample.error for sample in self.samples)]), None),
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
        )


class OutputProcessor:
    """Collects the tokens of a replica's requests and assembles their results."""

    def __init__(self, tokenizer: Tokenizer | None, *, replica: int = 0):
        self.tokenizer = tokenizer
        self.replica = replica
        self._running: dict[str, _Running] = {}

    def add(self, request: Request) -> RequestOutput | None:
        """Take a request on; returns its result if all its samples had ended on another replica."""
        state = _Running(request, self.tokenizer)
        if state.unfinished == 0:
            return state.output(self.replica)
        self._running[request.id] = state
        return None

    def refuse(self, request: Request, reason: str) -> RequestOutput:
        """The result of a request that can't run."""
        state = _Running(replace(request, given=(), ended=frozenset()), None)
        state.error = reason
        for sample in state.samples:
            sample.finish("error")
        return state.output(self.replica)

    def scheduled(self, plan: StepPlan) -> list[str]:
        """Note which requests have a part in a plan for the first time, and how much of their prompts was cached by
        then; their ids."""
        begun, now = [], time.monotonic()
        for row in plan.rows[len(plan.rows) - len(plan.admitted) :]:
            request = row.sequence.request
            state = self._running[request.id]
            if state.metrics.scheduled_ts == 0:
                state.metrics.scheduled_ts = now
                state.num_cached_tokens = min(row.start, len(request.prompt_token_ids))
                begun.append(request.id)
        return begun

    def append(
        self,
        sequence: Sequence,
        token_id: int,
        logprob: float,
        details: TokenLogprobs | None = None,
        deltas: list[TokenDelta] | None = None,
        now: float | None = None,
    ) -> bool:
        """Record a token sampled `now` (by time.monotonic(); None: at this moment); True when it completes a stop
        string.

        `logprob` is by the model's full distribution; `details` where params.logprobs asks for them. Of a streamed
        request, what it gained is appended to `deltas`.
        """
        state = self._running[sequence.request.id]
        sample = state.samples[sequence.index]
        if sample.match is not None:  # what a replay was given completed one already
            return True
        metrics = state.metrics
        metrics.num_generation_tokens += 1
        metrics.last_token_ts = time.monotonic() if now is None else now
        if metrics.first_token_ts == 0:
            metrics.first_token_ts = metrics.last_token_ts
            metrics.first_token_latency = metrics.first_token_ts - metrics.queued_ts
        stopped = sample.append(token_id, logprob, details)
        if sequence.request.stream and deltas is not None:
            delta = TokenDelta(
                request_id=sequence.request.id, index=sequence.index, text=sample.gained(), token_ids=[token_id]
            )
            if details is not None:
                delta.logprobs = [state.entry(details)]
            deltas.append(delta)
        return stopped

    def fail(self, sequence: Sequence, reason: str) -> None:
        """The sample gets no more tokens, for this reason."""
        self._running[sequence.request.id].error = reason

    def append_prompt(self, sequence: Sequence, start: int, scores: Iterable[TokenLogprobs | None]) -> None:
        """Record prompt log-probabilities: those of the tokens at positions start + 1 and on, None where it failed."""
        state = self._running[sequence.request.id]
        logprobs = state.prompt_logprobs
        assert logprobs is not None, "nobody asked for prompt log-probabilities"
        assert len(logprobs) == start + 1, "they come in order"
        for details in scores:
            logprobs.append(None if details is None else state.entry(details))

    def finish(self, sequence: Sequence, deltas: list[TokenDelta] | None = None) -> RequestOutput | None:
        """End a sample, for its finish_reason; the request's result when it was the last one."""
        name = sequence.request.id
        state = self._running[name]
        sample = state.samples[sequence.index]
        sample.finish(sequence.finish_reason)
        if sequence.request.stream and deltas is not None:
            delta = TokenDelta(request_id=name, index=sequence.index, text=sample.gained(), token_ids=[])
            delta.finish_reason, delta.stop_reason = sample.finish_reason, sample.stop_reason()
            deltas.append(delta)
        state.unfinished -= 1
        return None if state.unfinished else self._running.pop(name).output(self.replica)

    def clear(self) -> None:
        """Forget requests that will not be finished."""
        self._running.clear()
