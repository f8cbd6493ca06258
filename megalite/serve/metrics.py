"""What the server measures: Prometheus metrics, the numbers of the page, and a line of the access log for each request.

Names, labels and buckets are vLLM's where the meaning is the same (`engine` is the replica), so its dashboards work.
Belongs to the HTTP process; torch-free.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.utils import floatToGoString

from megalite.inference.outputs import RequestOutput
from megalite.inference.request import Request
from megalite.serve.messages import Step

if TYPE_CHECKING:
    from megalite.serve.router import ReplicaState, ReplicaView

access = logging.getLogger("megalite.serve.access")
"""At level INFO: a line for each request that ended. Prompts and texts are never in it."""

RATE_WINDOW = 5.0
"""Seconds over which tokens a second are measured."""

_LABELS = ("model_name", "engine")
_TOKEN_GAPS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_LATENCIES = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
_SAMPLES = (1, 2, 5, 10, 20)

_TOTALS = {
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of the requests taken on."),
    "vllm:generation_tokens": ("output_tokens", "Tokens generated."),
    "vllm:prefix_cache_queries": ("prompt_tokens", "Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "vllm:num_preemptions": ("preemptions", "Preemptions for want of KV blocks."),
    "megalite_steps": ("step", "Steps of the engine."),
}
"""Counters over the life of the server, and the field of `Step` that counts the same over the life of a replica."""

_GAUGES = {
    "vllm:num_requests_running": "Sequences in a step.",
    "vllm:num_requests_waiting": "Sequences not yet in a step.",
    "vllm:kv_cache_usage_perc": "Share of the KV blocks that running sequences hold, 0 to 1.",
    "megalite_outstanding_tokens": "Prompt and output tokens that a replica has yet to compute, by the balancer.",
    "megalite_assigned_requests": "Requests assigned to a replica that have not ended.",
}
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From a request's arrival to its first token.", _FIRST_TOKEN),
    "vllm:request_time_per_output_token_seconds": (
        "A request's mean time a token after the first.",
        _TOKEN_GAPS,
    ),
    "vllm:e2e_request_latency_seconds": ("From a request's arrival to its end.", _LATENCIES),
    "vllm:request_queue_time_seconds": ("From a replica's taking a request on to its first step.", _LATENCIES),
    "vllm:request_prefill_time_seconds": ("From a request's first step to its first token.", _LATENCIES),
    "vllm:request_decode_time_seconds": ("From a request's first token to its last.", _LATENCIES),
    "vllm:request_inference_time_seconds": ("From a request's first step to its last token.", _LATENCIES),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "vllm:request_generation_tokens": ("Output tokens of a request.", _TOKENS),
}


class _TokenGaps:
    """The histogram of times between tokens. There is one for each token, so it must cost next to nothing."""

    NAME = "vllm:inter_token_latency_seconds"

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._counts: dict[str, list[int]] = {}
        """By engine: the count of each bucket, of which the last has no bound."""
        self._sums: dict[str, float] = {}

    def add(self, engine: str, gaps: Sequence[tuple[float, int]]) -> None:
        """`gaps`: seconds for so many tokens; most samples of a step have the same."""
        counts = self._counts.setdefault(engine, [0] * (len(_TOKEN_GAPS) + 1))
        total = 0.0
        for (seconds, tokens), samples in Tally(gaps).items():
            counts[bisect_left(_TOKEN_GAPS, seconds / tokens)] += samples
            total += samples * seconds / tokens
        self._sums[engine] = self._sums.get(engine, 0.0) + total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.NAME, "Between the tokens of a streamed sample.", labels=_LABELS)
        bounds = [*map(floatToGoString, _TOKEN_GAPS), "+Inf"]
        for engine, counts in self._counts.items():
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric((self._model_name, engine), buckets, self._sums[engine])
        yield family


class RouterView(Protocol):
    """What metrics and page ask of the router."""

    @property
    def state(self) -> str: ...

    def replicas(self) -> Sequence[ReplicaView]: ...


class _Replica:
    """A replica's part of every metric, and what its messages said."""

    def __init__(self, metrics: ServeMetrics, replica: int):
        labels = (metrics.model_name, str(replica))
        self.gauges = {name: gauge.labels(*labels) for name, gauge in metrics.gauges.items()}
        self.totals = {name: counter.labels(*labels) for name, counter in metrics.totals.items()}
        self.histograms = {name: histogram.labels(*labels) for name, histogram in metrics.histograms.items()}
        self.state: ReplicaState | None = None
        self._last: Step | None = None
        self._last_time = 0.0
        self._marks: deque[tuple[float, int]] = deque()
        """When a message came, and the tokens generated until then."""

    def forget(self) -> None:
        """The next message is of another process, which counts from 0."""
        self._last = None
        self._marks.clear()

    def add(self, message: Step, now: float) -> float:
        """Count what the replica did since its last message; gives the seconds since then."""
        if self._last is not None and message.step < self._last.step:
            self.forget()
        for name, (key, _) in _TOTALS.items():
            self.totals[name].inc(max(0, getattr(message, key) - (getattr(self._last, key) if self._last else 0)))
        passed = now - self._last_time if self._last is not None else 0.0
        self._last, self._last_time = message, now
        self._marks.append((now, message.output_tokens))
        self._trim(now)
        return passed

    def _trim(self, now: float) -> None:
        while len(self._marks) > 1 and self._marks[1][0] <= now - RATE_WINDOW:
            self._marks.popleft()

    def speed(self, now: float) -> float:
        self._trim(now)
        if len(self._marks) < 2 or now <= self._marks[0][0]:
            return 0.0
        (start, before), (_, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - start)

    def show(self, view: ReplicaView) -> None:
        """Set the gauges."""
        step = view.step
        self.gauges["vllm:num_requests_running"].set(step.running if step else 0)
        self.gauges["vllm:num_requests_waiting"].set(step.waiting if step else 0)
        self.gauges["vllm:kv_cache_usage_perc"].set(kv_usage(view))
        self.gauges["megalite_outstanding_tokens"].set(view.tokens)
        self.gauges["megalite_assigned_requests"].set(view.requests)


def kv_usage(view: ReplicaView) -> float:
    """Share of a replica's KV blocks that are held, 0 to 1."""
    if view.hello is None or view.step is None or view.hello.num_kv_blocks == 0:
        return 0.0
    return 1 - view.step.free_blocks / view.hello.num_kv_blocks


class ServeMetrics:
    """Collects what router and API tell, in a registry of its own. Called from the event loop's thread only."""

    def __init__(self, model_name: str, *, clock: Callable[[], float] = time.monotonic):
        """`clock`: that of the times which `request_finished` is given."""
        disable_created_metrics()  # a second series beside every counter, which nobody asks for
        self.model_name = model_name
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.gauges = {name: Gauge(name, said, _LABELS, registry=own) for name, said in _GAUGES.items()}
        self.totals = {name: Counter(name, said, _LABELS, registry=own) for name, (_, said) in _TOTALS.items()}
        self.histograms = {
            name: Histogram(name, said, _LABELS, buckets=buckets, registry=own)
            for name, (said, buckets) in _HISTOGRAMS.items()
        }
        self._params = {
            name: Histogram(f"vllm:request_params_{name}", said, _LABELS[:1], buckets=buckets, registry=own)
            for name, said, buckets in (
                ("n", "Samples that a request asked for.", _SAMPLES),
                ("max_tokens", "Output tokens that a request allowed.", _TOKENS),
            )
        }
        self._gaps = _TokenGaps(model_name)
        own.register(self._gaps)
        self._ends = Counter(
            "vllm:request_success", "Samples that ended, by reason.", (*_LABELS, "finished_reason"), registry=own
        )
        self._activity = Counter(
            "megalite_activity_seconds",
            "A replica's time by activity; waiting is the bubble of its pipeline.",
            (*_LABELS, "activity"),
            registry=own,
        )
        self._states = Gauge("megalite_replica_state", "1: the state it is in.", (*_LABELS, "state"), registry=own)
        self._losses = Counter("megalite_replica_losses", "Times that a replica was lost.", _LABELS, registry=own)
        self._requests = Counter("megalite_requests", "Requests that ended.", ("model_name", "endpoint"), registry=own)
        self._rejected = Counter(
            "megalite_rejected_requests", "Requests not taken on.", ("model_name", "reason"), registry=own
        )
        self._replayed = Counter(
            "megalite_replayed_requests", "Requests that went on on another replica.", ("model_name",), registry=own
        ).labels(model_name)
        self._clock = clock
        self._replicas: dict[int, _Replica] = {}
        self._last_tokens: dict[tuple[str, int], float] = {}
        """When the last token of each streamed sample came."""

    def _replica(self, replica: int) -> _Replica:
        if replica not in self._replicas:
            self._replicas[replica] = _Replica(self, replica)
        return self._replicas[replica]

    # ---- told by the router

    def replica_state(self, replica: int, state: ReplicaState) -> None:
        """A replica is in this state now."""
        one = self._replica(replica)
        if one.state == state:
            return
        if one.state is not None:
            self._states.labels(self.model_name, str(replica), one.state).set(0)
        self._states.labels(self.model_name, str(replica), state).set(1)
        one.state = state
        if state == "lost":
            self._losses.labels(self.model_name, str(replica)).inc()
            one.forget()

    def replica_step(self, replica: int, message: Step) -> None:
        """A replica's message has come."""
        now = self._clock()
        one = self._replica(replica)
        passed = one.add(message, now)
        for activity, share in message.busy.items():
            self._activity.labels(self.model_name, str(replica), activity).inc(max(0.0, share * passed))
        gaps, last_tokens = [], self._last_tokens
        for delta in message.deltas:
            sample = delta.request_id, delta.index
            if tokens := len(delta.token_ids):
                last = last_tokens.get(sample)
                if last is not None:
                    gaps.append((now - last, tokens))
                last_tokens[sample] = now
            if delta.finish_reason is not None:
                last_tokens.pop(sample, None)
        self._gaps.add(str(replica), gaps)

    def replayed(self, count: int = 1) -> None:
        """So many requests of a lost replica go on on another."""
        self._replayed.inc(count)

    def rejected(self, reason: str) -> None:
        """A request was not taken on; `reason`: one of a few words, e.g. overloaded, draining, no_replica."""
        self._rejected.labels(self.model_name, reason).inc()

    # ---- told by the API

    def request_started(self, request: Request) -> None:
        """A request was taken on."""
        self._params["n"].labels(self.model_name).observe(request.params.n)
        self._params["max_tokens"].labels(self.model_name).observe(request.max_tokens)

    def request_finished(
        self, output: RequestOutput, *, arrival: float, first_token: float | None, end: float, endpoint: str
    ) -> None:
        """A request ended, for whatever reason; also writes its line of the access log.

        Times are by `time.monotonic`: when the client's request came, when its first token was sent (None: it was not
        streamed; what counts is when the replica had it), and when its last was. `endpoint`: the path that was asked
        for, e.g. /v1/completions.
        """
        if first_token is None and output.metrics is not None:
            first_token = output.metrics.first_token_ts or None
        self._requests.labels(self.model_name, endpoint).inc()
        replica = output.replica or 0
        label = str(replica)
        for one in output.outputs:
            self._ends.labels(self.model_name, label, one.finish_reason or "error").inc()
        if not output.outputs:
            self._ends.labels(self.model_name, label, "error").inc()
        for name, value in _durations(output, arrival, first_token, end).items():
            self._replica(replica).histograms[name].observe(value)
        log_request(self.model_name, output, arrival=arrival, first_token=first_token, end=end, endpoint=endpoint)

    # ---- asked by page and /metrics

    def speed(self, replica: int) -> float:
        """Tokens that a replica generated a second, over the last `RATE_WINDOW` seconds."""
        return self._replica(replica).speed(self._clock())

    def exposition(self, router: RouterView) -> bytes:
        """All metrics, in Prometheus' text format."""
        for view in router.replicas():
            self.replica_state(view.replica, view.state)
            self._replica(view.replica).show(view)
        return generate_latest(self.registry)


def _durations(output: RequestOutput, arrival: float, first_token: float | None, end: float) -> dict[str, float]:
    """A request's values by the names of `_HISTOGRAMS`, as far as they exist."""
    found = {"vllm:e2e_request_latency_seconds": end - arrival}
    if first_token is not None:
        found["vllm:time_to_first_token_seconds"] = first_token - arrival
    found["vllm:request_prompt_tokens"] = len(output.prompt_token_ids)
    found["vllm:request_generation_tokens"] = sum(len(one.token_ids) for one in output.outputs)
    times = output.metrics
    if times is None or not times.scheduled_ts:
        return found
    found["vllm:request_queue_time_seconds"] = times.scheduled_ts - times.queued_ts
    if times.first_token_ts:
        decode = times.last_token_ts - times.first_token_ts
        longest = max((len(one.token_ids) for one in output.outputs), default=0)
        found["vllm:request_prefill_time_seconds"] = times.first_token_ts - times.scheduled_ts
        found["vllm:request_decode_time_seconds"] = decode
        found["vllm:request_inference_time_seconds"] = times.last_token_ts - times.scheduled_ts
        if longest > 1:
            found["vllm:request_time_per_output_token_seconds"] = decode / (longest - 1)
    return found


def log_request(
    model_name: str, output: RequestOutput, *, arrival: float, first_token: float | None, end: float, endpoint: str
) -> None:
    """Write a request's line of the access log, as JSON; `ServeMetrics.request_finished` does it."""
    if not access.isEnabledFor(logging.INFO):
        return
    said = {
        "request_id": output.request_id,
        "endpoint": endpoint,
        "model": model_name,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "output_tokens": sum(len(one.token_ids) for one in output.outputs),
        "ttft": None if first_token is None else round(first_token - arrival, 6),
        "total": round(end - arrival, 6),
        "finish_reason": [one.finish_reason for one in output.outputs] or ["error"],
        "replica": output.replica,
    }
    access.info("request %s", msgspec.json.encode(said).decode())


def metrics_router(metrics: ServeMetrics, router: RouterView) -> APIRouter:
    """`/metrics`, as Prometheus reads it."""
    routes = APIRouter()

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def read() -> Response:
        return Response(metrics.exposition(router), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
