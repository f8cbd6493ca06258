"""A replica without a model, for `bench serve --parts`: speaks a control rank's protocol, and its tokens cost nothing.

Started as `python -m megalite.tools.benchmarks.fake_replica SOCKET STEP_MS`. Torch-free.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.serve.link import Link, connect
from megalite.serve.messages import Abort, Hello, Leave, Step, Submit

WORDS = (" the", " of", "\n", " na\u00efve", ' "', "ing", " 42", "(self")
"""Texts of tokens, in turn."""
IDLE = 0.5


@dataclass
class _Running:
    """What a request has gained."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class FakeReplica:
    """Gives every request one token a step."""

    def __init__(self, link: Link):
        self._link = link
        self._running: dict[str, _Running] = {}
        self._steps = self._tokens = self._prompts = 0
        link.send(
            Hello(
                replica=0,
                pid=os.getpid(),
                max_model_len=1 << 15,
                num_kv_blocks=1 << 16,
                block_size=16,
                max_num_seqs=1 << 12,
                vocab_size=1 << 15,
                eos_token_ids=[0],
                dtype="none",
                device="none",
            )
        )

    def serve(self, step_seconds: float) -> None:
        """Until the HTTP process says Leave or is gone."""
        following = 0.0
        while not self._link.ended:
            if not self._running:
                self._link.wait(IDLE)
                following = time.monotonic()
            else:
                time.sleep(max(0.0, following - time.monotonic()))
                following = max(following + step_seconds, time.monotonic())
            started = []
            for message in self._link.receive():
                match message:
                    case Submit(request):
                        self._running[request.id] = _Running(request)
                        self._prompts += len(request.prompt_token_ids)
                        started.append(request.id)
                    case Abort(name):
                        self._running.pop(name, None)
                    case Leave():
                        return
            self._step(started)

    def _step(self, started: list[str]) -> None:
        deltas: list[TokenDelta] = []
        outputs: list[RequestOutput] = []
        for name, one in list(self._running.items()):
            token = len(one.token_ids)
            text = WORDS[token % len(WORDS)]
            one.token_ids.append(token)
            one.text.append(text)
            last = "length" if token + 1 == one.request.max_tokens else None
            if one.request.stream:
                deltas.append(TokenDelta(request_id=name, index=0, text=text, token_ids=[token]))
                if last:
                    deltas.append(TokenDelta(request_id=name, index=0, text="", token_ids=[], finish_reason="length"))
            if last:
                del self._running[name]
                outputs.append(_output(one))
        self._steps += 1
        self._tokens += len(self._running) + len(outputs)
        if deltas or outputs or started or not self._running:
            self._link.send(
                Step(
                    deltas=deltas,
                    outputs=outputs,
                    step=self._steps,
                    running=len(self._running),
                    waiting=0,
                    free_blocks=1 << 15,
                    prefix_hits=0,
                    prompt_tokens=self._prompts,
                    output_tokens=self._tokens,
                    preemptions=0,
                    started=started,
                )
            )
        else:
            self._link.send()


def _output(one: _Running) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text="".join(one.text),
        token_ids=one.token_ids,
        cumulative_logprob=-1.0,
        token_logprobs=[-0.5] * len(one.token_ids),
        finish_reason="length",
    )
    return RequestOutput(
        request_id=one.request.id,
        prompt=one.request.prompt,
        prompt_token_ids=list(one.request.prompt_token_ids),
        outputs=[completion],
        replica=0,
        num_cached_tokens=0,
    )


if __name__ == "__main__":
    FakeReplica(Link(connect(sys.argv[1]), patience=60.0)).serve(float(sys.argv[2]) / 1000)
