"""`/v1/completions`. Torch-free."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from megalite.inference.logprobs import to_json
from megalite.inference.outputs import CompletionOutput, RequestOutput, TokenDelta
from megalite.inference.request import Request as EngineRequest
from megalite.serve.answers import Answer, EventStream, Writer, check_stream_options, encode, usage, whole
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
    params = await preparer.params(body, given, {})
    prompts = Prompts(values=preparer.several(body.prompt), where="prompt")
    requests = await preparer.requests(prompts, params, body, name=answer.id, model=answer.model)
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
    check_stream_options(body.stream_options, body.stream)
    if not body.stream:
        return
    if (body.best_of or 0) > (body.n or 1):
        raise ApiError(400, "best_of: which samples are best shows at their end; stream n of them.", param="best_of")
    if body.prompt_logprobs is not None or (body.echo and body.logprobs is not None):
        name = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
        raise ApiError(400, f"{name}: log-probabilities of a prompt are not streamed.", param=name)


def _echoed(texts: TokenTexts, requests: list[EngineRequest]) -> list[tuple[str, list[int]]]:
    return [prompt_parts(texts.tokenizer, one.prompt, one.prompt_token_ids) for one in requests]


class _Writer(Writer):
    """Choices of whole answers and events of streamed ones."""

    def __init__(
        self,
        body: CompletionRequest,
        answer: Answer,
        texts: TokenTexts,
        requests: list[EngineRequest],
        parts: list[tuple[str, list[int]]],
    ):
        super().__init__(answer, body.stream_options, requests)
        self._texts, self._requests, self._parts = texts, requests, parts
        self._logprobs = requests[0].params.logprobs is not None
        self._prompt_logprobs = body.prompt_logprobs
        self._echo = bool(body.echo)
        self._open = [f'{{"index":{index},"text":'.encode() for index in range(self._n * len(requests))]
        self._begins = [self._head + one for one in self._open]
        self._plain = b',"finish_reason":null,"logprobs":null}' + self._tail
        self._is_plain = not (self._echo or self._logprobs or self._continuous)
        self._offsets: dict[int, OutputOffsets] = {}

    # ---- whole

    def choice(self, place: int, one: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        text, starts = self._parts[place]
        logprobs = None
        if self._logprobs:
            positions, ids = list(one.logprobs or ()), list(one.token_ids)
            offsets = self._begin(place).feed(ids)
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
        if self._is_plain and delta.finish_reason is None:
            return b"%b%b%b" % (self._begins[index], encode(text), self._plain) if text else b""
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
        choice = self._open[index] + encode(text) + b',"finish_reason":' + ends + b'"logprobs":' + logprobs + b"}"
        return self._head + choice + self._end()
