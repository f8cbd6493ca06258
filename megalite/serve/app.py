"""The HTTP API: `create_app`. Torch-free."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from megalite import __version__
from megalite.config.schema import ServeConfig
from megalite.serve.answers import Answer, encode
from megalite.serve.chat import chat_completions
from megalite.serve.completions import completions
from megalite.serve.envelope import api_error
from megalite.serve.errors import NoReplica
from megalite.serve.gate import OPEN_PATHS, AdmittedRoute, Bodies, Gate, StrictRoute, direct, read_api_key, request_id
from megalite.serve.metrics import ServeMetrics, metrics_router
from megalite.serve.page import page_router
from megalite.serve.prepare import Preparer
from megalite.serve.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    VersionAnswer,
)
from megalite.serve.router import Router

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request breaks a rule; `param` names the field."},
    401: {"description": "No API key, or a wrong one."},
    404: {"description": "There is no such model or path."},
    405: {"description": "The path has other methods."},
    408: {"description": "The body did not arrive in time."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is not JSON."},
    429: {"description": "As much waits and runs as the server takes; see Retry-After."},
    431: {"description": "The headers are too many or too large."},
    500: {"description": "The request failed in the server."},
    503: {"description": "The server is starting, about to end, or lost its replicas; see Retry-After."},
}


def _answers(*statuses: int, **success: Any) -> dict[int | str, dict[str, Any]]:
    """The documented answers of an endpoint: these errors and those of `Gate`, which any may have."""
    chosen = sorted({431, 500, *statuses})
    errors: dict[int | str, dict[str, Any]] = {status: {**_ERRORS[status], "model": ErrorAnswer} for status in chosen}
    return {**errors, **({200: success} if success else {})}


_BODY = (400, 401, 404, 408, 413, 415, 429, 503)
_STREAM = "Server-sent events, the last one `[DONE]`, if `stream` is true. "


def _streamed(model: str) -> dict[str, Any]:
    schema = {"type": "string", "description": f"{_STREAM}Each other one's data is a {model}, or an error."}
    return {"text/event-stream": {"schema": schema}}


def create_app(config: ServeConfig, router: Router, metrics: ServeMetrics) -> FastAPI:
    """The application over `router`. ConfigError: there is no key where `server.api_key` says."""
    preparer = Preparer(config, router)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        preparer.close()

    app = FastAPI(title="megalite", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.bodies = Bodies(config.server)
    app.state.router = router
    app.state.rejected = lambda error: (
        None if error.status_code in (429, 503) else metrics.rejected(error.code or "invalid")
    )
    api_key = read_api_key(config.server.api_key)
    generating, by_path = _generating(preparer, router, metrics)
    app.add_middleware(Gate, api_key=api_key, direct=by_path)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _error_response)
    app.include_router(generating)
    app.include_router(_describing(config, preparer, router))
    app.include_router(_tokenising(preparer))
    more = _answers(401)
    app.include_router(metrics_router(metrics, router), responses=more)
    app.include_router(page_router(metrics, router), responses=more)
    make_schema = app.openapi
    app.openapi = lambda: _finished(make_schema(), api_key is not None)  # type: ignore[method-assign]
    return app


def _finished(schema: dict[str, Any], with_key: bool) -> dict[str, Any]:
    """The schema of all endpoints, without the validation errors of FastAPI's own, which never leave."""
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if with_key and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    parts = schema.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        parts.get("schemas", {}).pop(name, None)
    chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    parts["schemas"] |= chunk.pop("$defs") | {"ChatCompletionChunk": chunk}
    if with_key:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


async def _error_response(request: Request, error: Exception) -> Response:
    found = api_error(error)
    assert found is not None, "handlers are for these only"
    return found.response()


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


def _generating(preparer: Preparer, router: Router, metrics: ServeMetrics) -> tuple[APIRouter, dict[str, ASGIApp]]:
    """The endpoints that generate: as routes, which describe them, and by their paths what answers their requests."""
    routes = APIRouter(route_class=AdmittedRoute)

    def answer(http: Request, prefix: str, body: CompletionRequest | ChatCompletionRequest) -> Answer:
        kinds = {"cmpl": "text_completion", "chatcmpl": "chat.completion"}
        return Answer(
            id=f"{prefix}-{request_id(http)}",
            object=kinds[prefix] + (".chunk" if prefix == "chatcmpl" and body.stream else ""),
            created=int(time.time()),
            model=preparer.model(body.model),
            arrival=http.scope["state"]["arrival"],
            endpoint=http.scope["path"],
            metrics=metrics,
        )

    @routes.post("/v1/completions", responses=_answers(*_BODY, model=Completion, content=_streamed("Completion")))
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        """Text after a prompt."""
        return await completions(http, body, answer(http, "cmpl", body), preparer, router)

    success = {"model": ChatCompletion, "content": _streamed("ChatCompletionChunk")}

    @routes.post("/v1/chat/completions", responses=_answers(*_BODY, **success))
    async def create_chat_completion(body: ChatCompletionRequest, http: Request) -> Response:
        """The next turn of a chat."""
        return await chat_completions(http, body, answer(http, "chatcmpl", body), preparer, router)

    return routes, {
        "/v1/completions": direct(create_completion, CompletionRequest),
        "/v1/chat/completions": direct(create_chat_completion, ChatCompletionRequest),
    }


def _describing(config: ServeConfig, preparer: Preparer, router: Router) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    created = int(time.time())

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=created,
            owned_by="megalite",
            root=config.lora.get(name) or config.model.path or name,
            parent=preparer.names[0] if name not in preparer.own_names else None,
            max_model_len=preparer.limits.max_model_len,
        )

    @routes.get("/v1/models", responses=_answers(401))
    async def list_models() -> ModelList:
        """The names of the model and of its adapters."""
        return ModelList(object="list", data=[card(name) for name in preparer.names])

    @routes.get("/v1/models/{model:path}", responses=_answers(401, 404))
    async def read_model(model: str) -> ModelCard:
        """One of them."""
        return card(preparer.model(model))

    @routes.get("/health", response_class=Response, responses=_answers(503))
    async def health() -> Response:
        """200 while the process works; 503: all replicas stall or are lost, and it is about to end itself."""
        if not router.healthy:
            raise NoReplica("No replica makes progress; the server is about to end.", 5.0)
        return Response()

    @routes.get("/ready", response_class=Response, responses=_answers(503))
    async def ready() -> Response:
        """200 while requests are taken and a replica finished a step lately or has nothing to do."""
        if not router.ready:
            raise NoReplica(f"The server is not ready: {router.state}.", 1.0)
        return Response()

    @routes.get("/version", responses=_answers())
    async def version() -> VersionAnswer:
        """megalite's."""
        return VersionAnswer(version=__version__)

    return routes


def _tokenising(preparer: Preparer) -> APIRouter:
    routes = APIRouter(route_class=AdmittedRoute)

    @routes.post("/tokenize", response_model=TokenizeAnswer, responses=_answers(*_BODY))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of a chat."""
        preparer.check_unknown(body)
        preparer.model(body.model)
        return Response(await preparer.in_thread(preparer.tokens, body), media_type="application/json")

    @routes.post("/detokenize", responses=_answers(*_BODY))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        """The text of token ids."""
        preparer.check_unknown(body)
        preparer.model(body.model)
        return DetokenizeAnswer(prompt=await preparer.in_thread(preparer.text_of, body.tokens))

    return routes
