"""A replica without a model: its tokens follow from prompt, seed, sample and position, as a real one's do.

As a program, `fake_replica.py FOLDER --replica I --socket PATH`, it is what the fleet starts. The Nth start of replica
I obeys the JSON in FOLDER/I-N.json, see `main`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request
from megalite.run.processes import die_with_parent
from megalite.serve.frames import Frames, frame
from megalite.serve.messages import Abort, Hello, Leave, Step, Submit, ToReplica


def token_at(request: Request, index: int, position: int) -> int:
    key = f"{request.prompt_token_ids} {request.seed} {index} {position}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2])


def text_of(tokens: Iterable[int]) -> str:
    return "".join(f"{token} " for token in tokens)


def expected(request: Request) -> list[list[int]]:
    """The tokens of each sample."""
    return [[token_at(request, i, j) for j in range(request.max_tokens)] for i in range(request.num_samples)]


class FakeEngine:
    """One token a sample and step, for at most `max_num_seqs` samples at once, in order of arrival."""

    def __init__(self, replica: int, *, max_num_seqs: int = 64, max_model_len: int = 1024):
        self.replica, self.max_num_seqs, self.max_model_len = replica, max_num_seqs, max_model_len
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.ended: dict[str, set[int]] = {}
        self.aborted: set[str] = set()
        self.submitted: list[Request] = []
        """All that it ever got."""
        self.steps = self.gained = 0

    @property
    def hello(self) -> Hello:
        return Hello(
            replica=self.replica,
            pid=os.getpid(),
            max_model_len=self.max_model_len,
            num_kv_blocks=64,
            block_size=16,
            max_num_seqs=self.max_num_seqs,
            vocab_size=1 << 16,
            eos_token_ids=[],
            dtype="float32",
            device="cpu",
        )

    def take(self, messages: Iterable[ToReplica]) -> None:
        for message in messages:
            if isinstance(message, Submit):
                request = message.request
                assert request.id not in self.requests
                self.submitted.append(request)
                self.requests[request.id] = request
                given = request.given or ((),) * request.num_samples
                self.tokens[request.id] = [list(tokens) for tokens in given]
                self.ended[request.id] = set(request.ended)
            elif isinstance(message, Abort) and message.id in self.requests:
                self.aborted.add(message.id)

    def step(self, only: str | None = None) -> Step:
        """One step; `only`: of this request."""
        deltas: list[TokenDelta] = []
        outputs: list[RequestOutput] = []
        started = []
        self.steps += 1
        for name in sorted(self.aborted):
            deltas += self._ends(name, "abort")
            outputs.append(self._output(name, "abort"))
        self.aborted.clear()
        rows = [(name, i) for name in self.requests for i in range(self.requests[name].num_samples)]
        rows = [(name, i) for name, i in rows if i not in self.ended[name] and only in (None, name)]
        for name, index in rows[: self.max_num_seqs]:
            request, tokens = self.requests[name], self.tokens[name][index]
            if index == 0 and len(tokens) == (len(request.given[0]) if request.given else 0):
                started.append(name)
            tokens.append(token_at(request, index, len(tokens)))
            self.gained += 1
            done = "length" if len(tokens) == request.max_tokens else None
            deltas.append(_delta(name, index, tokens[-1:], done))
            if done:
                self.ended[name].add(index)
        for name in [name for name, ended in self.ended.items() if len(ended) == self.requests[name].num_samples]:
            outputs.append(self._output(name, "length"))
        streamed = {request.id for request in self.submitted if request.stream}
        waiting = max(0, len(rows) - self.max_num_seqs)
        return Step(
            deltas=[delta for delta in deltas if delta.request_id in streamed],
            outputs=outputs,
            step=self.steps,
            running=len(rows) - waiting,
            waiting=waiting,
            free_blocks=64,
            prefix_hits=0,
            prompt_tokens=0,
            output_tokens=self.gained,
            preemptions=0,
            started=started,
        )

    def least_gained(self) -> int:
        """Tokens that the request which has gained least has gained here."""
        found = []
        for name, request in self.requests.items():
            given = request.given or ((),) * request.num_samples
            left = set(range(request.num_samples)) - self.ended[name]
            found += [len(self.tokens[name][index]) - len(given[index]) for index in left]
        return min(found, default=0)

    def _ends(self, name: str, reason: str) -> list[TokenDelta]:
        left = set(range(self.requests[name].num_samples)) - self.ended[name]
        return [_delta(name, index, [], reason) for index in sorted(left)]

    def _output(self, name: str, reason: str) -> RequestOutput:
        """Of an aborted one, samples that had ended keep their reason."""
        request = self.requests.pop(name)
        ended, tokens = self.ended.pop(name), self.tokens.pop(name)
        completions = [
            CompletionOutput(
                index=index,
                text=text_of(own),
                token_ids=own,
                cumulative_logprob=0.0,
                finish_reason="length" if index in ended else reason,
            )
            for index, own in enumerate(tokens)
        ]
        return RequestOutput(
            request_id=name,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=completions,
            replica=self.replica,
            num_cached_tokens=0,
        )


def _delta(name: str, index: int, tokens: list[int], reason: str | None) -> TokenDelta:
    return TokenDelta(request_id=name, index=index, text=text_of(tokens), token_ids=tokens, finish_reason=reason)


# ---- as a program


def _fault(folder: Path, replica: int) -> dict[str, object]:
    """What this start is to do; leaves its process id in the folder."""
    count = len(list(folder.glob(f"{replica}-started-*"))) + 1
    (folder / f"{replica}-started-{count}").write_text(str(os.getpid()))
    order = folder / f"{replica}-{count}.json"
    return json.loads(order.read_text()) if order.exists() else {}


def main() -> int:
    """Faults: `exit`, end at once with this code; `dies`, once each of its requests has gained so many tokens;
    `stalls`, after so many steps with work; `waits`, after three such steps until a file is there; `slow`, a step takes
    a hundredth of a second."""
    die_with_parent()
    folder, options = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    fault = _fault(folder, int(options["--replica"]))
    if "exit" in fault:
        return int(fault["exit"])
    engine = FakeEngine(int(options["--replica"]))
    frames = Frames.to_replica()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(options["--socket"])
        link.sendall(frame([engine.hello]))
        worked = 0
        while True:
            idle = not engine.requests
            if idle or select.select([link], [], [], 0)[0]:
                data = link.recv(1 << 20)
                messages = list(frames.feed(data))
                if not data or any(isinstance(message, Leave) for message in messages):
                    return 0
                engine.take(messages)
            if not engine.requests:
                continue
            if "dies" in fault and engine.least_gained() >= int(str(fault["dies"])):
                os.kill(os.getpid(), signal.SIGKILL)
            if worked == fault.get("stalls"):
                signal.pause()
            while worked == 3 and "waits" in fault and not Path(str(fault["waits"])).exists():
                time.sleep(0.01)
            time.sleep(0.01 if "slow" in fault else 0.0)
            worked += 1
            link.sendall(frame([engine.step()]))


if __name__ == "__main__":
    sys.exit(main())
