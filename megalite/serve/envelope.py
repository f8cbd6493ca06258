"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}}. Torch-free.

Messages never quote what a client sent as a prompt: for such keys they state the rule, not the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from megalite.errors import ConfigError, Problem
from megalite.json_text import JsonError
from megalite.serve.errors import Draining, NoReplica, Overloaded, Refused, RequestLost
from megalite.text.detokenizer import TokenizerError

MAX_MESSAGE = 2000
"""Characters of a message."""
TEXTS = ("prompt", "messages", "tools", "chat_template_kwargs", "stop", "bad_words", "documents", "tokens")
"""Keys whose values are no matter for messages."""

_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "service_unavailable",
}


class ApiError(HTTPException):
    """An error as the answer to a request; may be raised anywhere below an endpoint."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message[:MAX_MESSAGE], headers)
        self.param = param
        self.code = code or _CODES.get(status)

    @property
    def value(self) -> dict[str, Any]:
        """The envelope."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = "rate_limit_error" if self.status_code == 429 else kind
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(self.value)

    def response(self) -> Response:
        return Response(self.body, self.status_code, self.headers, "application/json")


def api_error(error: Exception) -> ApiError | None:
    """What a client is told of a failure that it can act on; None: of any other, which is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return _refused(error)
    if isinstance(error, RequestLost):
        return ApiError(503, str(error), headers={"Retry-After": "1"})
    if isinstance(error, ConfigError):
        return problem_error(error.problems[0])
    if isinstance(error, TokenizerError):
        return ApiError(400, f"{error}")
    if isinstance(error, JsonError):
        return ApiError(400, f"The request's body: {error}.", code="invalid_json")
    if isinstance(error, RequestValidationError | ValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, str(error.detail or phrase), headers=error.headers)
    return None


def _refused(error: Refused) -> ApiError:
    status = 429 if isinstance(error, Overloaded) else 503
    code = next((code for kind, code in _REFUSALS.items() if isinstance(error, kind)), None)
    return ApiError(status, str(error), code=code, headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})


_REFUSALS = {Draining: "draining", NoReplica: "no_replica"}


def problem_error(problem: Problem, names: Mapping[str, str] | None = None) -> ApiError:
    """The answer to a request that breaks a rule of the sampling parameters or of prompts.

    `names`: the names that the endpoint has for fields, where they are not ours.
    """
    root = problem.key.partition(".")[0].partition("[")[0]
    name = (names or {}).get(root, root)
    key = name + problem.key[len(root) :]
    got = f", got {problem.value!r}" if problem.value is not None and root not in TEXTS else ""
    message = f"{key}: {problem.rule}{got}. {problem.fix}" if key else f"{problem.rule}{got}. {problem.fix}"
    return ApiError(400, message.strip(), param=name or None)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """The error of the first thing that a model of `protocol` refuses."""
    first = errors[0]
    place = [str(part)[:100] for part in first["loc"] if part not in ("body", "query", "path")]
    key = ".".join(place)
    if first["type"] == "missing":
        words = f"{key}: is needed." if key else "The request needs a body: a JSON object."
    elif not key:
        words = "The request's body must be a JSON object."
    else:
        words = f"{key}: {str(first['msg']).removeprefix('Value error, ')}."
    return ApiError(400, words, param=place[0] if place else None)
