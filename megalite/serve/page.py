"""The page at `/`, with a chat and a live view of the replicas, and `/stats`, the numbers that the page shows.

The page is one file without external resources; a policy header allows it its own script and style, and to talk to
this server, and nothing else. Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from megalite import __version__
from megalite.serve.metrics import RouterView, ServeMetrics, kv_usage
from megalite.serve.router import ReplicaView

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStats:
    """One replica, as it last said; zeros while it is not there."""

    replica: int
    state: str
    restarts: int
    """Times that it was started again."""
    device: str | None
    running: int
    """Sequences in a step."""
    waiting: int
    """Sequences not yet in a step."""
    requests: int
    """Assigned to it, and not ended."""
    outstanding_tokens: int
    """Prompt and output tokens that it has yet to compute, as the balancer counts them."""
    kv_usage: float
    """Share of its KV blocks that are held, 0 to 1."""
    tokens_per_second: float
    """Generated, over the last seconds."""
    prompt_tokens: int
    """Since it started; likewise the next two."""
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    output_tokens: int
    busy: dict[str, float]
    """Share of its time by activity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What `/stats` answers."""

    model: str
    version: str
    state: str
    """State of the server: starting, ready, draining or lost."""
    replicas: list[ReplicaStats]


def page_router(metrics: ServeMetrics, router: RouterView) -> APIRouter:
    """`/`, which anyone may see, and `/stats`, which the page asks for with the API key, if one is needed."""
    routes = APIRouter()
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @routes.get("/stats")
    async def stats() -> Stats:
        replicas = [_stats(view, metrics.speed(view.replica)) for view in router.replicas()]
        return Stats(model=metrics.model_name, version=__version__, state=router.state, replicas=replicas)

    return routes


def _stats(view: ReplicaView, speed: float) -> ReplicaStats:
    step = view.step
    return ReplicaStats(
        replica=view.replica,
        state=view.state,
        restarts=view.restarts,
        device=view.hello.device if view.hello else None,
        running=step.running if step else 0,
        waiting=step.waiting if step else 0,
        requests=view.requests,
        outstanding_tokens=view.tokens,
        kv_usage=kv_usage(view),
        tokens_per_second=speed,
        prompt_tokens=step.prompt_tokens if step else 0,
        cached_tokens=step.prefix_hits if step else 0,
        output_tokens=step.output_tokens if step else 0,
        busy=step.busy if step else {},
    )


def content_security_policy(page: str) -> str:
    """Allows the scripts and styles that stand in the page, by their digests, and requests to its own server."""
    allowed = {}
    for tag in ("script", "style"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
