"""`/v1/chat/completions`. Torch-free."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from megalite.inference.logprobs import to_json
from megalite.inference.outputs import CompletionOutput, TokenDelta
from megalite.inference.request import Request as EngineRequest
from megalite.serve.answers import Answer, EventStream, Writer, check_stream_options, encode, usage, whole
from megalite.serve.envelope import ApiError
from megalite.serve.logprobs import TokenTexts
from megalite.serve.prepare import Preparer, chat_prompts
from megalite.serve.protocol import ChatCompletionRequest
from megalite.serve.router import Router

NAMES = {"logprobs": "top_logprobs"}
"""Sampling parameters that have another name here."""


async def chat_completions(
    http: Request, body: ChatCompletionRequest, answer: Answer, preparer: Preparer, router: Router
) -> Response:
    """The answer to a request; errors as exceptions that `envelope.api_error` knows."""
    preparer.check_unknown(body)
    _check(body)
    names = NAMES | ({"max_tokens": "max_completion_tokens"} if body.max_completion_tokens is not None else {})
    params = await preparer.params(body, _given(body), names, to_the_end=True)
    prompts = chat_prompts(body, {"reasoning_effort": body.reasoning_effort})
    if body.tool_choice == "none":
        prompts.variables.pop("tools", None)
    requests = await preparer.requests(prompts, params, body, name=answer.id, model=answer.model)
    writer = _Writer(body, answer, preparer.texts, requests[0])
    if body.stream:
        return await EventStream(http, writer, answer, body.stream_options).begin(router, requests)
    [output] = await whole(http, router, requests, answer)
    value = {**answer.head(), "choices": [writer.choice(one) for one in output.outputs], "usage": usage([output])}
    if body.prompt_logprobs is not None and output.prompt_logprobs is not None:
        value["prompt_logprobs"] = [to_json(entry) for entry in output.prompt_logprobs]
    return Response(encode(value), media_type="application/json")


def _given(body: ChatCompletionRequest) -> dict[str, Any]:
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if most == 0:
        raise ApiError(400, "max_tokens: must be >= 1.", param="max_tokens")
    return {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "max_tokens": most}


def _check(body: ChatCompletionRequest) -> None:
    check_stream_options(body.stream_options, body.stream)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs true.", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        words = "prompt_logprobs: log-probabilities of a prompt are not streamed."
        raise ApiError(400, words, param="prompt_logprobs")
    if body.tool_choice not in (None, "none", "auto"):
        words = "tool_choice: must be none or auto: what a model writes is not forced into a call."
        raise ApiError(400, words, param="tool_choice")


class _Writer(Writer):
    """Choices of whole answers and events of streamed ones."""

    def __init__(self, body: ChatCompletionRequest, answer: Answer, texts: TokenTexts, request: EngineRequest):
        super().__init__(answer, body.stream_options, [request])
        self._texts = texts
        self._most = request.params.logprobs
        self._open = [self._head + f'{{"index":{index},"delta":'.encode() for index in range(self._n)]
        self._plain = b'},"logprobs":null,"finish_reason":null}' + self._tail

    # ---- whole

    def choice(self, one: CompletionOutput) -> dict[str, Any]:
        return {
            "index": one.index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": None if self._most is None else self._texts.chat(one.logprobs or [], self._most),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }

    # ---- streamed

    def delta(self, place: int, delta: TokenDelta) -> bytes:
        index = delta.index
        self._made += len(delta.token_ids)
        if index in self._begun and delta.finish_reason is None and self._most is None and not self._continuous:
            return self._open[index] + b'{"content":' + encode(delta.text) + self._plain if delta.text else b""
        events = []
        if index not in self._begun:
            self._begun.add(index)
            events.append(self._event(index, b'{"role":"assistant","content":""}', b"null", b"null"))
        if delta.text or delta.logprobs:
            logprobs = b"null"
            if self._most is not None and delta.logprobs:
                logprobs = encode(self._texts.chat(delta.logprobs, self._most))
            events.append(self._event(index, b'{"content":' + encode(delta.text) + b"}", logprobs, b"null"))
        if delta.finish_reason is not None:
            self._ended.add(index)
            ends = encode(delta.finish_reason) + b',"stop_reason":' + encode(delta.stop_reason)
            events.append(self._event(index, b"{}", b"null", ends))
        return b"".join(events)

    def _event(self, index: int, delta: bytes, logprobs: bytes, ends: bytes) -> bytes:
        event = self._open[index] + delta + b',"logprobs":' + logprobs + b',"finish_reason":' + ends + b"}"
        return event + self._end()
