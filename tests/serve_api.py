"""The API over a router that has no replicas: what requests gain is known before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Several
from itertools import count
from typing import Any

from test_chats import TEMPLATE
from tokenizer_family import byte_level

from megalite.config.schema import ModelSection, SamplingParams, ServeConfig, ServerSection
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.request import Request, Sequence
from megalite.inference.sampler import TokenLogprobs
from megalite.serve.app import create_app
from megalite.serve.metrics import ServeMetrics
from megalite.serve.streams import Job, Stream
from megalite.text.tokenizer import Tokenizer

TEXT = "hello the é 你 😀 ab: "
"""What every output repeats; its characters are up to four tokens."""


def tokenizer() -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(byte_level(), names, {"default": TEMPLATE})


class ScriptedRouter:
    """Gives each sample `TEXT`, from its index-th token on, a token at a time."""

    def __init__(self, known: Tokenizer | None, *, pause: float | None = None):
        self.limits = PromptLimits(tokenizer=known, vocab_size=len(known) if known else 300, max_model_len=256)
        self.state = "ready"
        self.healthy = self.ready = True
        self.refusal: Exception | None = None
        self.pause = pause
        """Seconds between tokens; None: all come at once."""
        self.script = known.encode(TEXT, add_special_tokens=False) if known else list(range(5, 40))
        self.requests: list[Request] = []
        self.running: dict[str, Job] = {}
        self.cancelled: list[str] = []
        self.lost_after: int | None = None
        """Tokens after which every replica is lost."""
        self._arrivals = count()
        self._tasks: set[asyncio.Task[None]] = set()

    def admit(self, requests: int, tokens: int) -> None:
        if self.refusal is not None:
            raise self.refusal

    def submit_all(self, requests: Several[Request]) -> list[Stream]:
        self.admit(len(requests), 0)
        return [self._submit(request) for request in requests]

    def replicas(self) -> list[Any]:
        return []

    def _submit(self, request: Request) -> Stream:
        assert request.id not in {one.id for one in self.requests}
        self.requests.append(request)
        job = self.running[request.id] = Job(request, next(self._arrivals))
        task = asyncio.ensure_future(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel(job: Job) -> None:
            if self.running.pop(request.id, None) is not None:
                self.cancelled.append(request.id)
                task.cancel()
                job.give_up()

        return Stream(job, cancel)

    async def _run(self, job: Job) -> None:
        request = job.request
        outputs = OutputProcessor(self.limits.tokenizer)
        outputs.add(request)
        samples = [
            Sequence(request=request, index=i, token_ids=list(request.prompt_token_ids))
            for i in range(request.num_samples)
        ]
        if request.params.prompt_logprobs is not None:
            ids = request.prompt_token_ids[1:]
            outputs.append_prompt(
                samples[0], 0, [self._details(token, request.params.prompt_logprobs) for token in ids]
            )
        deltas: list[Any] = []
        result = None
        for step in range(request.max_tokens + 1):
            if step == self.lost_after:
                self.running.pop(request.id, None)
                job.fail("no replica is left")
                return
            for sample in samples:
                if sample.finish_reason is not None:
                    continue
                if step == request.max_tokens:
                    sample.finish_reason = "length"
                else:
                    token = self.script[(step + sample.index) % len(self.script)]
                    listed = request.params.logprobs
                    details = None if listed is None else self._details(token, listed)
                    if outputs.append(sample, token, -0.5, details, deltas):
                        sample.finish_reason = "stop"
                if sample.finish_reason is not None:
                    result = outputs.finish(sample, deltas)
            for delta in deltas if request.stream else ():
                job.take(delta)
            deltas.clear()
            for _ in range(3):  # readers get each delta by itself
                await asyncio.sleep(0)
            if self.pause is not None:
                await asyncio.sleep(self.pause)
        self.running.pop(request.id, None)
        assert result is not None
        result.num_cached_tokens = 1
        job.finish(result)

    def _details(self, token: int, listed: int) -> TokenLogprobs:
        """The second likeliest is the token that was chosen; the others are the ids from 5 on."""
        others = [one for one in range(5, 5 + listed + 1) if one != token]
        ids = [*others[:1], token, *others[1:]][:listed]
        return TokenLogprobs(token, -1.5, 2, ids, [-1.0, -1.5, *(-2.0 - i for i in range(listed))][:listed])


class _Current:
    """Stands for the router of the test that runs: an application takes long to make and is kept."""

    def __init__(self) -> None:
        self.router: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)


_APPS: dict[str, tuple[Any, _Current]] = {}


def app_over(
    router: ScriptedRouter, *, sampling: SamplingParams | None = None, lora: dict[str, str] | None = None, **server: Any
) -> Any:
    """The application over `router`, until it is called again with the same keys."""
    name = repr((sampling, lora, sorted(server.items())))
    if name not in _APPS:
        model, section = ModelSection(path="tiny"), ServerSection(**server)
        config = ServeConfig(model=model, sampling=sampling or SamplingParams(), server=section, lora=lora or {})
        current = _Current()
        _APPS[name] = create_app(config, current, ServeMetrics("tiny")), current  # type: ignore[arg-type]
    app, current = _APPS[name]
    current.router = router
    return app
