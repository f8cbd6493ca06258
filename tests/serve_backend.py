"""A server with the page and a chat that answers as ours does, for tests of what talks to it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_fakes import FakeRouter
from waiting import PATIENCE, wait_until

from megalite.serve.metrics import ServeMetrics
from megalite.serve.page import page_router

KEY = "open sesame"
WRONG_KEY = JSONResponse({"error": {"message": "wrong key", "code": 401}}, status_code=401)
ANSWER = "I say <b>this</b> & <img src=x onerror=alert(1)>,\n  twice: ü 漢字"


class Backend:
    """A server with the page and a chat that says `ANSWER`, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.left = threading.Event()
        """A client went away in the middle of an answer."""
        self.needs_key = False
        self.mishap = ""
        """no template: the chat is refused so; halfway: the stream ends with an error."""
        self.endless = False
        self.app = FastAPI()
        self.app.include_router(page_router(ServeMetrics("models/demo"), FakeRouter()))
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.complete)
        self.app.post("/v1/completions")(self.complete)

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address. What a browser still holds open at the end is cut off."""
        how = {"interface": "asgi3", "lifespan": "off", "log_level": "critical", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(self.answer, port=0, **how))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started, "the server has started")
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            self.endless = False
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()

    async def answer(self, scope, receive, send) -> None:
        """The application behind the key, if one is asked for."""
        known = (b"authorization", f"Bearer {KEY}".encode()) in scope["headers"]
        app = self.app if known or scope["path"] == "/" or not self.needs_key else WRONG_KEY
        await app(scope, receive, send)

    async def models(self):
        return {"object": "list", "data": [{"id": "models/demo"}]}

    async def complete(self, request: Request):
        body = await request.json()
        self.asked.append((request.url.path, body))
        chat = request.url.path == "/v1/chat/completions"
        if chat and self.mishap == "no template":
            problem = {"message": "the model has no chat template", "type": "invalid_request_error", "code": 400}
            return JSONResponse({"error": problem}, status_code=400)
        return StreamingResponse(self.stream(chat), media_type="text/event-stream")

    async def stream(self, chat: bool):
        def event(value) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def choice(text: str, reason=None):
            said = {"delta": {"content": text}} if chat else {"text": text}
            return event({"choices": [{"index": 0, **said, "finish_reason": reason}]})

        try:
            whole = "".join(choice(ANSWER[i : i + 3]) for i in range(0, len(ANSWER), 3))
            data = whole.encode()
            for i in range(0, len(data), 50):  # cut anywhere
                yield data[i : i + 50]
                await asyncio.sleep(0)
            while self.endless:
                yield choice(".").encode()
                await asyncio.sleep(0.01)
            if self.mishap == "halfway":
                yield event({"error": {"message": "all replicas were lost"}}).encode()
                return
            yield choice("", "stop").encode()
            yield event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 17}}).encode()
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):  # as the server was waiting or writing
            self.left.set()
            raise
