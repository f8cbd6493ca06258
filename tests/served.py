"""`launch/serve.py` as a program that was started, and a client of it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from forks import ROOT, Forks, Program
from waiting import PATIENCE, wait_until

from megalite.run.processes import Process, descendants

PRELOAD = ("megalite.serve.front", "megalite.serve.worker")
TOKENS = 24


class Served:
    """A server that was started, and a client of it."""

    def __init__(self, forks: Forks, folder: Path, model: Path, *overrides: str):
        config = folder / "serve.yaml"
        config.write_text(json.dumps({"model": {"path": str(model), "dtype": "float32"}, "server": {"port": 0}}))
        arguments = ["--config", config, "monitor.report=false", *overrides]
        self.program: Program = forks.start(ROOT / "launch" / "serve.py", *arguments, preload=PRELOAD)
        wait_until(lambda: "listening at" in self.err, "its address")
        self.url = self.err.partition("listening at ")[2].split()[0]
        self.client = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE)

    def ask(self, path: str, **body: Any) -> httpx.Response:
        """POST `body`, or GET without one."""
        url = self.url + path
        return httpx.post(url, json=body, timeout=PATIENCE) if body else httpx.get(url, timeout=PATIENCE)

    def wait_ready(self, replicas: int) -> None:
        wait_until(
            lambda: [one["state"] for one in self.ask("/stats").json()["replicas"]] == ["ready"] * replicas,
            "its replicas",
        )

    @property
    def err(self) -> str:
        assert self.program.runs, self.program.ended().err
        return self.program.err

    async def ready(self, replicas: int) -> None:
        while [one["state"] for one in await self.replicas()] != ["ready"] * replicas:
            await asyncio.sleep(0.05)

    async def replicas(self) -> Any:
        return (await self.client.get("/stats")).json()["replicas"]

    async def stream(self, place: int, heard: Callable[[], None]) -> list[Any]:
        """Text, log-probabilities and end of each sample; `heard` is called for each event."""
        asked = {"prompt": f"prompt {place}", "max_tokens": TOKENS, "ignore_eos": True}
        return await stream(self.client, asked, place, heard)

    async def streams(self, at: int = 0, then: Callable[[], None] = lambda: None) -> list[Any]:
        """12 streams at once; `then` is called once, when that many events have come."""
        heard = after(at, then)
        return await asyncio.gather(*(self.stream(place, heard) for place in range(12)))


async def stream(client: httpx.AsyncClient, asked: dict[str, Any], seed: int, heard: Callable[[], None]) -> list[Any]:
    """Text, tokens and end of each of one or two samples, by the seed; `heard` is called for each event."""
    samples: list[Any] = [["", [], None] for _ in range(1 + seed % 2)]
    body = {**asked, "n": len(samples), "seed": seed, "logprobs": 1, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                heard()
                for choice in json.loads(line.removeprefix("data: ")).get("choices", []):
                    own = samples[choice["index"]]
                    own[0] += choice["text"]
                    own[1] += (choice["logprobs"] or {}).get("tokens", [])
                    own[2] = choice["finish_reason"] or own[2]
    return samples


def after(count: int, then: Callable[[], None]) -> Callable[[], None]:
    """A function whose call number `count` calls `then`."""
    calls = itertools.count(1)
    return lambda: then() if next(calls) == count else None


def ranks(server: Program, replica: int) -> list[Process]:
    """Of the replica whose door was started earlier or later."""
    children = [one for one in descendants(server.pid) if (parent := one.parent()) and parent.pid == server.pid]
    door = sorted(children, key=lambda one: (one.start, one.pid))[replica]
    return sorted(descendants(door.pid), key=lambda one: (one.start, one.pid))
