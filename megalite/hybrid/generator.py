"""The generating side of a hybrid job on one rank: requests from the task's prompts, samples to every rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from megalite.config.schema import SamplingParams
from megalite.core.agreement import broadcast_bytes
from megalite.core.layout import Layout
from megalite.errors import ConfigError, Problem, Stopped
from megalite.hybrid.rollout import Rollout, pack_groups, unpack_groups
from megalite.hybrid.tasks import Example
from megalite.inference.io.inputs import RawRequest, TokenizerFailed, derived_seed
from megalite.inference.outputs import RequestOutput
from megalite.inference.replica import Replica
from megalite.inference.request import Request
from megalite.inference.run import prepare, prompt_limits, run_here

log = logging.getLogger(__name__)

_STOPPED = b"stopped "
"""Begins what is sent instead of samples when a signal has come."""


class Generator:
    """Samples for a task's examples. Every rank of the run holds one; `replica` is None outside the layout."""

    def __init__(
        self,
        replica: Replica | None,
        layout: Layout,
        examples: Sequence[Example],
        sampling: SamplingParams,
        *,
        samples: int,
        at_once: int,
        stop_requested: Callable[[], bool],
    ):
        """`samples` of each of up to `at_once` prompts are asked for in a call of `sample`. Collective over the run.

        ConfigError names every example that leaves no room for its output.
        """
        self.layout = layout
        self.sampler = None
        if replica is not None:
            self.sampler = _Sampler(replica, examples, replace(sampling, n=samples), at_once, stop_requested)
        self.rank = replica.state.rank if replica is not None else None
        first = layout.control_ranks[0]
        known = list(self.sampler.requests) if self.sampler and self.rank == first else None
        self.places: list[int] = json.loads(
            broadcast_bytes(json.dumps(known).encode() if known is not None else None, first)
        )
        """Places of the examples that can be sampled for, the same on every rank."""
        if not self.places:
            raise ConfigError(Problem(key="tokenizer.path", rule="the tokenizer fails at every example"))

    def sample(self, places: Sequence[int], *, first: int, weight_version: int) -> list[Rollout]:
        """The samples of the examples at `places`, some of `self.places`, group after group.

        Collective over the run, the same everywhere. `first`: how many prompts the run has sampled before; the seed of
        a sample comes from the count of its prompt and its place in the group, so no two are clones. Stopped on every
        rank, if a signal has stopped the sampling.
        """
        mine = self.sampler.groups(places, first, weight_version) if self.sampler else b""
        groups: dict[int, list[Rollout]] = {}
        for source in self.layout.control_ranks:
            data = broadcast_bytes(mine if self.rank == source else None, source)
            if data.startswith(_STOPPED):
                raise Stopped(int(data.removeprefix(_STOPPED)))
            groups |= unpack_groups(data)
        return [rollout for number in range(len(places)) for rollout in groups[number]]

    def renew(self) -> None:
        """Forget what was cached with the weights of before."""
        if self.sampler:
            self.sampler.engine.renew()

    def sleep(self) -> None:
        """Give the KV cache's memory back."""
        if self.sampler:
            self.sampler.engine.sleep()

    def wake(self) -> None:
        if self.sampler:
            self.sampler.engine.wake()


class _Sampler:
    """The requests of one replica, and its engine."""

    def __init__(
        self,
        replica: Replica,
        examples: Sequence[Example],
        params: SamplingParams,
        at_once: int,
        stop_requested: Callable[[], bool],
    ):
        self.replica = replica
        self.stop_requested = stop_requested
        self.requests: dict[int, Request] = {}
        """Requests by the place of their example; every iteration gives them its own ids and seeds."""
        self._prepare(examples, params)
        longest = max((len(one.prompt_token_ids) + one.max_tokens for one in self.requests.values()), default=1)
        self.engine = replica.engine(longest=longest, sequences=params.n * at_once, at_temperature=True)
        self.calls = 0

    def _prepare(self, examples: Sequence[Example], params: SamplingParams) -> None:
        limits = prompt_limits(self.replica)
        asked = [
            RawRequest(
                prompt=example.messages or example.prompt or "",
                params=params,
                id=str(index),
                index=index,
                where=example.where,
                chat_variables=example.variables,
            )
            for index, example in enumerate(examples)
        ]
        problems: list[Problem | str] = []
        for place, (example, made) in enumerate(zip(examples, prepare(self.replica, asked, limits), strict=True)):
            if isinstance(made, TokenizerFailed):  # no fault of the example's
                log.warning("%s is left out", made)
                continue
            if isinstance(made, ConfigError):
                problems += made.problems
                continue
            if params.max_tokens is not None and made.max_tokens < params.max_tokens:
                rule = (
                    f"its prompt has {len(made.prompt_token_ids)} tokens, which with sampling.max_tokens = "
                    f"{params.max_tokens} is more than max_model_len = {limits.max_model_len}"
                )
                problems.append(Problem(key=example.where, rule=rule, fix="Shorten it, or lower sampling.max_tokens."))
            self.requests[place] = made
        if limits.tokenizer is not None:
            limits.tokenizer.close()
        if problems:
            raise ConfigError(*problems[:10])

    def groups(self, places: Sequence[int], first: int, weight_version: int) -> bytes:
        """This replica's groups, packed; or the signal that has stopped them, which all ranks are to hear of."""
        seed = self.replica.settings.seed
        requests = [
            replace(self.requests[place], id=str(number), seed=derived_seed(seed, first + number))
            for number, place in enumerate(places)
        ]
        self.calls += 1
        key = f"sample/{self.calls}"
        try:
            outputs = run_here(self.replica, self.engine, requests, key=key, stop_requested=self.stop_requested)
        except Stopped as stop:
            return _STOPPED + str(stop.signum).encode()
        groups = {int(output.request_id): output for output in outputs}
        return pack_groups({number: _group(one, places[number], weight_version) for number, one in groups.items()})


def _group(output: RequestOutput, place: int, weight_version: int) -> list[Rollout]:
    return [
        Rollout(
            example=place,
            sample=sample,
            prompt=output.prompt or "",
            prompt_token_ids=tuple(output.prompt_token_ids),
            token_ids=tuple(found.token_ids),
            text=found.text,
            logprobs=tuple(found.token_logprobs),
            finish_reason=found.finish_reason,
            weight_version=weight_version,
        )
        for sample, found in enumerate(output.outputs)
    ]
