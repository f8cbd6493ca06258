"""A server over replicas without a model: `serve_program.py FOLDER KEY=VALUE...`, FOLDER as for fake_replica.py.

Its app: `GET /stream?id=NAME&tokens=N` gives a line of JSON for each token, then one for the end; `GET /state`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from megalite.config.schema import ModelSection, ParallelSection, SamplingParams, ServeConfig, ServerSection
from megalite.errors import MegaliteError
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.request import Request
from megalite.serve.errors import Refused
from megalite.serve.front import event_loop_factory
from megalite.serve.listener import open_socket, url
from megalite.serve.metrics import ServeMetrics
from megalite.serve.router import Router
from megalite.serve.server import Server


def make_request(name: str, tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=tokens)
    ids = tuple(name.encode())
    return Request(id=name, prompt_token_ids=ids, params=sampling, seed=7, max_tokens=tokens, stream=True)


def make_app(config: ServeConfig, router: Router, metrics: ServeMetrics) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode()).items()}
        if scope["path"] == "/state":
            state = {"state": router.state, "replicas": [one.state for one in router.replicas()]}
            await answer(send, 200, state)
            return
        try:
            stream = router.submit(make_request(query["id"], int(query["tokens"])))
        except Refused as error:
            await answer(send, 503, {"error": str(error), "retry_after": error.retry_after})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            async with stream:
                async for delta in stream:
                    await line(send, {"tokens": delta.token_ids, "reason": delta.finish_reason})
                result = await stream.result()
                await line(send, {"all": result.outputs[0].token_ids})
        except MegaliteError as error:
            await line(send, {"error": str(error)})
        await send({"type": "http.response.body", "body": b""})

    return app


async def line(send: Any, value: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": json.dumps(value).encode() + b"\n", "more_body": True})


async def answer(send: Any, status: int, value: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


def main() -> int:
    folder, dp = Path(sys.argv[1]), int(sys.argv[2])
    section = ServerSection(port=0, balance="round_robin", **json.loads(sys.argv[3]))
    config = ServeConfig(model=ModelSection(path="fake"), parallel=ParallelSection(dp=dp), server=section)
    limits = PromptLimits(tokenizer=None, vocab_size=1 << 16, max_model_len=1024)

    async def start(replica: int, path: str) -> asyncio.subprocess.Process:
        script = Path(__file__).with_name("fake_replica.py")
        return await asyncio.create_subprocess_exec(
            sys.executable, script, folder, "--replica", str(replica), "--socket", path, start_new_session=True
        )

    with open_socket(section) as sock:
        print(url(sock), flush=True)
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            return runner.run(Server(config, limits, sock, make_app).run(start))


if __name__ == "__main__":
    sys.exit(main())
