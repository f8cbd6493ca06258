"""`/v1/completions`. Torch-free."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from megalite.inference.logprobs import to_json
from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request as EngineRequest
from megalite.serve.answers import Answer, EventStream, encode, ended, usage, usage_value, whole
from megalite.serve.envelope import ApiError
from megalite.serve.logprobs import OutputOffsets, TokenTexts, prompt_parts
from megalite.serve.prepare import Preparer, Prompts
from megalite.serve.protocol import CompletionRequest
from megalite.serve.router import Router


async def completions(
    http: Request, body: CompletionRequest, answer: Answer, preparer: Preparer, router: Router
) -> Response:
    """The answer to a request; errors as exceptions that `envelope.api_error` knows."""
    preparer.check_unknown(body)
    _check(body)
    given = {"best_of": body.best_of, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params = preparer.params(body, given, {})
    prompts = Prompts(values=preparer.several(body.prompt), where="prompt")
    how = {"name": answer.id, "model": answer.model}
    requests = await preparer.requests(prompts, params, stream=bool(body.stream), **how)
    texts = preparer.texts
    parts: list[tuple[str, list[int]]] = [("", [])] * len(requests)
    if body.echo:
        parts = await preparer.in_thread(_echoed, texts, requests)
    writer = _Writer(body, answer, texts, requests, parts)
    if body.stream:
        return await EventStream(http, writer, answer, body.stream_options).begin(router, requests)
    outputs = await whole(http, router, requests, answer)
    choices = [writer.choice(place, one, output) for place, output in enumerate(outputs) for one in output.outputs]
    return Response(
        encode({**answer.head(), "choices": choices, "usage": usage(outputs)}), media_type="application/json"
    )


def _check(body: CompletionRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream true.", param="stream_options")
    if not body.stream:
        return
    if (body.best_of or 0) > (body.n or 1):
        raise ApiError(400, "best_of: which samples are best shows at their end; stream n of them.", param="best_of")
    if body.prompt_logprobs is not None or (body.echo and body.logprobs is not None):
        name = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
        raise ApiError(400, f"{name}: log-probabilities of a prompt are not streamed.", param=name)


def _echoed(texts: TokenTexts, requests: list[EngineRequest]) -> list[tuple[str, list[int]]]:
    return [prompt_parts(texts.tokenizer, one.prompt, one.prompt_token_ids) for one in requests]


class _Writer:
    """Choices of whole answers and events of streamed ones."""

    def __init__(
        self,
        body: CompletionRequest,
        answer: Answer,
        texts: TokenTexts,
        requests: list[EngineRequest],
        parts: list[tuple[str, list[int]]],
    ):
        self._texts, self._requests, self._parts = texts, requests, parts
        self._n = requests[0].params.n
        self._logprobs = requests[0].params.logprobs is not None
        self._prompt_logprobs = body.prompt_logprobs
        self._echo = bool(body.echo)
        head = encode({**answer.head(), "choices": []})[:-2]
        self._head = b"data: " + head
        options = body.stream_options
        self._continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        self._tail = b'],"usage":null}\n\n' if options and options.include_usage else b"]}\n\n"
        self._open = [f'{{"index":{index},"text":'.encode() for index in range(self._n * len(requests))]
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._offsets: dict[int, OutputOffsets] = {}
        self._made = 0
        self._prompt = sum(len(one.prompt_token_ids) for one in requests)

    # ---- whole

    def choice(self, place: int, one: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        text, starts = self._parts[place]
        logprobs = None
        if self._logprobs:
            positions, ids, offsets = (
                list(one.logprobs or ()),
                list(one.token_ids),
                self._begin(place).feed(one.token_ids),
            )
            if self._echo:
                positions = [*(output.prompt_logprobs or ()), *positions]
                ids, offsets = [*output.prompt_token_ids, *ids], [*starts, *offsets]
            logprobs = self._texts.completion(positions, ids, offsets)
        shown: dict[str, Any] = {
            "index": place * self._n + one.index,
            "text": text + one.text,
            "logprobs": logprobs,
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        if self._prompt_logprobs is not None and output.prompt_logprobs is not None:
            shown["prompt_logprobs"] = [to_json(entry) for entry in output.prompt_logprobs]
        return shown

    def _begin(self, place: int) -> OutputOffsets:
        request = self._requests[place]
        skip, start = request.params.skip_special_tokens, len(self._parts[place][0])
        return OutputOffsets(self._texts.tokenizer, request.prompt_token_ids, skip=skip, start=start)

    # ---- streamed

    def delta(self, place: int, delta: TokenDelta) -> bytes:
        index = place * self._n + delta.index
        self._made += len(delta.token_ids)
        text = delta.text
        if self._echo and index not in self._begun:
            self._begun.add(index)
            text = self._parts[place][0] + text
        logprobs = b"null"
        if self._logprobs and delta.logprobs:
            offsets = self._offsets.get(index) or self._offsets.setdefault(index, self._begin(place))
            shown = self._texts.completion(delta.logprobs, delta.token_ids, offsets.feed(delta.token_ids))
            logprobs = encode(shown)
        elif not text and delta.finish_reason is None:
            return b""
        ends = b"null,"
        if delta.finish_reason is not None:
            self._ended.add(index)
            ends = encode(delta.finish_reason) + b',"stop_reason":' + encode(delta.stop_reason) + b","
        return self._event(index, text, ends, logprobs)

    def _event(self, index: int, text: str, ends: bytes, logprobs: bytes) -> bytes:
        tail = self._tail
        if self._continuous:
            tail = b'],"usage":' + encode(usage_value(self._prompt, self._made)) + b"}\n\n"
        choice = self._open[index] + encode(text) + b',"finish_reason":' + ends + b'"logprobs":' + logprobs + b"}"
        return self._head + choice + tail

    def missing(self, place: int, output: RequestOutput) -> bytes:
        parts = []
        for one in output.outputs:
            if place * self._n + one.index not in self._ended:
                parts.append(self.delta(place, ended(one)))
        return b"".join(parts)

    def usage(self, value: dict[str, Any]) -> bytes:
        return self._head + b'],"usage":' + encode(value) + b"}\n\n"
