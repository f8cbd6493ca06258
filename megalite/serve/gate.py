"""Before and around every endpoint: request ids, the key, limits of headers and bodies, strict JSON. Torch-free."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalite import json_text
from megalite.config.schema import ServerSection
from megalite.config.typecheck import printable
from megalite.errors import ConfigError, Problem
from megalite.serve.envelope import ApiError, api_error
from megalite.serve.errors import Overloaded

log = logging.getLogger(__name__)

MAX_HEADERS = 100
MAX_HEADER_BYTES = 1 << 15
"""Of all names and values together."""
MAX_BODIES = 32
"""Bodies of the largest size that are read at the same moment."""
MAX_FIELDS = 1 << 10
"""Of a request, unknown ones too."""
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""Need no key: the page holds nothing secret and asks for it, and who watches over processes has none."""

POLLED_PATHS = frozenset({"/health", "/ready", "/metrics", "/stats"})
"""Asked for every few seconds by machines and the page; the log tells of them only in detail."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")


class ClientGone(Exception):
    """Nobody is there to read the answer."""


@asynccontextmanager
async def until_gone(request: Request) -> AsyncIterator[None]:
    """Cancels the body of the statement, which is the rest of an answer, when the client goes away: ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    gone = over = False

    def leave(watcher: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over and not watcher.cancelled():
            gone = True
            task.cancel()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(watch())
    watcher.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        over = True
        watcher.cancel()


def read_api_key(place: str | None) -> str | None:
    """The key that `server.api_key` names. ConfigError: there is none; the message does not hold it."""
    if place is None:
        return None
    kind, _, name = place.partition(":")
    if kind == "env":
        found = os.environ.get(name, "")
    elif kind == "file":
        try:
            found = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            rule = f"the file can't be read: {getattr(error, 'strerror', None) or 'it is no text'}"
            raise ConfigError(Problem(key="server.api_key", rule=rule, value=place)) from None
    else:
        raise ConfigError(Problem(key="server.api_key", rule="must be env:NAME or file:PATH; the key itself is secret"))
    found = found.strip()
    if not found or not found.isascii() or not found.isprintable():
        rule = "holds no key: printable ASCII, at least one character"
        raise ConfigError(Problem(key="server.api_key", rule=rule, value=place))
    return found


def request_id(request: Request) -> str:
    """The id that the client gave, or that was made; in the answer and in the log."""
    found: str = request.scope["state"]["request_id"]
    return found


class Gate:
    """The outermost layer: no request passes without an id, a key where one is asked for, and headers within bounds;
    no failure leaves without an envelope."""

    def __init__(self, app: ASGIApp, *, api_key: str | None = None, direct: Mapping[str, ASGIApp] | None = None):
        """`direct`: what answers POST requests of these paths instead of `app`."""
        self.app = app
        self._direct = direct or {}
        self._digest = None if api_key is None else sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        name = given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else secrets.token_hex(16).encode()
        scope["state"] = {**scope.get("state", {}), "request_id": name.decode(), "arrival": begun, "send": send}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name)]}
            await send(message)

        try:
            refused = self._refusal(scope)
            following = self._direct.get(scope["path"], self.app) if scope["method"] == "POST" else self.app
            await (following if refused is None else refused.response())(scope, receive, sending)
        except ClientGone:
            status = 499  # nginx's number for it; in the log only
        except Exception as error:
            answer = api_error(error) or ApiError(500, "The server failed at this request; its log says why.")
            if answer.status_code == 500:
                log.exception("request %s failed", name.decode())
            if not status:
                await answer.response()(scope, receive, sending)
        finally:
            path, seconds = printable(scope["path"]), time.monotonic() - begun
            level = logging.DEBUG if path in POLLED_PATHS else logging.INFO
            log.log(level, "%s %s %d %.3f s, request %s", scope["method"], path, status, seconds, name.decode())

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            rule = f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together."
            return ApiError(431, rule, headers={"Connection": "close"})
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return None
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        right = hmac.compare_digest(sha256(key.strip()).digest(), self._digest)
        if right and kind.lower() == b"bearer":
            return None
        words = "Incorrect API key provided." if given else "No API key provided: send Authorization: Bearer KEY."
        return ApiError(401, words, headers={"WWW-Authenticate": "Bearer"})


class Bodies:
    """Reads request bodies within the limits of the config."""

    def __init__(self, section: ServerSection):
        self._most = int(section.max_body * (1 << 20))
        self._timeout = section.body_timeout
        self._held = 0
        """Bytes of bodies that are being read or parsed."""
        self._parsing = asyncio.Lock()
        """One large one at a time, so that between two pieces of it other answers get their turn; small ones, which are
        one piece, do not wait for it."""

    async def read(self, request: Request) -> Any:
        """The JSON value of a request's body. ApiError, JsonError, Overloaded, ClientGone."""
        self._check_headers(request)
        data = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk = message.get("body", b"")
                    if len(data) + len(chunk) > self._most:
                        raise self._too_large()
                    self._held += len(chunk)
                    data += chunk
                    if self._held > MAX_BODIES * self._most:
                        raise Overloaded("Too many large requests at once.", 1.0)
                    if not message.get("more_body"):
                        break
            if not data:
                raise ApiError(400, "The request needs a body: a JSON object.")
            async with self._parsing if len(data) > json_text.PIECE else nullcontext():
                value = await json_text.parse_in_pieces(bytes(data), lambda: asyncio.sleep(0))
            if isinstance(value, dict) and len(value) > MAX_FIELDS:
                raise ApiError(400, f"A request may have {MAX_FIELDS} fields.")
            return value
        except TimeoutError:
            rule = f"The request's body did not arrive within {self._timeout:g} s."
            raise ApiError(408, rule, headers={"Connection": "close"}) from None
        finally:
            self._held -= len(data)

    def _check_headers(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise ApiError(415, "The body must be JSON: send Content-Type: application/json.")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "The body must not be compressed.")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        rule = f"The request's body is larger than {self._most} bytes (server.max_body)."
        return ApiError(413, rule, headers={"Connection": "close"})


class _StrictRequest(Request):
    """A request whose body has been read; FastAPI keeps the bytes for as long as the answer takes, so it gets none."""

    value: Any = None

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self.value


class StrictRoute(APIRoute):
    """An endpoint whose body comes through `Bodies`, and whose errors have envelopes."""

    is_admitted = False
    """Where the server takes nothing more on, the body is not read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            strict_request = _StrictRequest(request.scope, request.receive)

            async def answer() -> Response:
                if self.is_admitted:
                    request.app.state.router.admit(1, 1)
                if self.body_field is not None:
                    strict_request.value = await request.app.state.bodies.read(request)
                return await handler(strict_request)

            return await _in_envelope(request, answer)

        return strict


async def _in_envelope(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """What `answer` gives, or what it raises as an error that clients understand."""
    try:
        return await answer()
    except Exception as error:
        found = api_error(error)
        if found is None:
            raise
        request.app.state.rejected(found)
        return found.response()


B = TypeVar("B", bound=BaseModel)


def direct(endpoint: Callable[[B, Request], Awaitable[Response]], model: type[B]) -> ASGIApp:
    """An `AdmittedRoute`'s endpoint, whose body is a `model`, without FastAPI's layers: they find nothing to do for it,
    and take as long as the rest of the request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)

        async def answer() -> Response:
            request.app.state.router.admit(1, 1)
            value = await request.app.state.bodies.read(request)
            return await endpoint(model.model_validate(value), request)

        await (await _in_envelope(request, answer))(scope, receive, send)

    return app


class AdmittedRoute(StrictRoute):
    """One whose requests are work: they are refused where the queue is full or the server is about to end."""

    is_admitted = True
