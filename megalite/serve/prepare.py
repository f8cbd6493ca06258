"""From a request's fields to what the engine takes: sampling parameters, prompts, prices. Torch-free.

Everything that can be told from numbers is told before a prompt is tokenised, which happens in a few threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel

from megalite import json_text
from megalite.config.chat import variables_problem
from megalite.config.sampling import prompt_problem, sampling_from_mapping, sampling_problems
from megalite.config.schema import MAX_TOKEN_IDS, SamplingParams, ServeConfig
from megalite.errors import ConfigError
from megalite.inference.io.inputs import GrammarRefused, PromptLimits, RawRequest, make_requests
from megalite.inference.request import Request
from megalite.json_text import JsonError
from megalite.monitor.words import format_count
from megalite.serve.answers import encode
from megalite.serve.envelope import ApiError, problem_error
from megalite.serve.errors import Overloaded
from megalite.serve.logprobs import TokenTexts
from megalite.serve.protocol import (
    REFUSED,
    SAMPLING_FIELDS,
    WITHOUT_EFFECT,
    ChatMessage,
    ChatRequest,
    Closed,
    Sampled,
    TokenizeRequest,
)
from megalite.serve.router import Router
from megalite.text.tokenizer import MAX_TEXT, Tokenizer

KEPT, LONGEST_KEPT = 256, 2048
"""Ways of sampling that are known to be right, and characters of the longest of them: a client has few."""
THREADS = 4
"""In which prompts are tokenised and chats rendered."""
AT_ONCE = 1024
"""Characters of prompts, or four times as many token ids, or entries of a field, that are read without a thread."""
MOST_SEEDS = 1 << 63
MAX_TOKENISED = 1 << 20
"""Characters that `/tokenize` takes in any case; more only where the model does."""
MAX_ENTRIES = 1 << 14
"""Parts of contents and tool calls that the messages of a chat may have together."""
NOT_SAID = SamplingParams().max_tokens
"""max_tokens of a config that does not say it: what OpenAI gives a completion. A chat then has the model's length."""

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of one HTTP request, not looked into yet."""

    values: Sequence[Any]
    """Texts, token ids or chats."""
    where: str
    """The field that they came in."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Reach the chat template."""

    def raw(
        self, params: SamplingParams, name: str, first: int, special_tokens: bool, lora: str = ""
    ) -> list[RawRequest]:
        several = len(self.values) > 1
        return [
            RawRequest(
                prompt=prompt,
                params=params,
                id=f"{name}-{first + place}",
                index=first + place,
                where=f"{self.where}[{place}]" if several else self.where,
                chat_variables=self.variables,
                special_tokens=special_tokens,
                lora=lora,
            )
            for place, prompt in enumerate(self.values)
        ]


class Preparer:
    """Prepares the requests of one server."""

    def __init__(self, config: ServeConfig, router: Router):
        self._section = config.server
        self._defaults = replace(config.sampling, flat_logprobs=False)
        self._router = router
        self._threads = ThreadPoolExecutor(THREADS, "prompts")
        self._texts: TokenTexts | None = None
        self._params: dict[str, SamplingParams] = {}
        """Sampling parameters that were found right, by the JSON that they were made of."""
        self._waiting = 0
        self._count = 0
        """Prompts so far: what makes their ids unique, and their seeds differ."""
        self.own_names = config.server.model_names or [config.model.path or "model"]
        """Names of the model itself, beside those of adapters."""
        self.names = [*self.own_names, *config.lora]
        """With those of its adapters."""

    @property
    def limits(self) -> PromptLimits:
        return self._router.limits

    def model(self, name: str | None) -> str:
        """The name under which a request is answered. ApiError: there is no such model."""
        if name is None:
            return self.names[0]
        if name in self.names:
            return name
        words = f"The model {name[:100]!r} does not exist; see /v1/models."
        raise ApiError(404, words, param="model", code="model_not_found")

    def check_unknown(self, body: BaseModel) -> None:
        """ApiError: the request has fields that are not known, unless these are to be ignored."""
        extra = body.model_extra if isinstance(body, Closed) else None
        for name, value in (extra or {}).items():
            if name in WITHOUT_EFFECT:
                continue
            refused = REFUSED.get(name)
            if refused is not None:
                if not any(value is one or (value == one and type(value) is type(one)) for one in refused.usual):
                    raise ApiError(400, f"{name}: is not supported: {refused.reason}.", param=name)
            elif self._section.unknown_fields == "refuse":
                near = get_close_matches(name[:100], type(body).model_fields, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                words = f"{name[:100]!r} is no field of this request.{hint}"
                raise ApiError(400, words, param=name[:100], code="unknown_field")
        for key in body.model_fields_set:
            inner = getattr(body, key, None)
            if isinstance(inner, Closed):
                self.check_unknown(inner)

    async def params(
        self, body: Sampled, given: Mapping[str, Any], names: Mapping[str, str], *, to_the_end: bool = False
    ) -> SamplingParams:
        """How to sample. `given`: sampling parameters whose fields have other names or meanings than ours, null for
        those that were not sent; `names`: these fields by our names; `to_the_end`: up to the model's length, where
        neither request nor config say max_tokens. ApiError: they break a rule."""
        values = {name: getattr(body, name) for name in SAMPLING_FIELDS} | dict(given)
        values = {name: value for name, value in values.items() if value is not None}
        if (seed := values.get("seed", 0)) < 0:  # OpenAI and vLLM have signed ones, and vLLM's -1 stands for none
            values["seed"] = None if seed == -1 else seed + MOST_SEEDS
        form = structured_outputs(body)
        if form is not None:
            name, values["structured_outputs"] = form
            return await self.in_thread(self._checked, values, {**names, "structured_outputs": name}, to_the_end)
        if any(isinstance(value, list | dict | str) and len(value) > AT_ONCE for value in values.values()):
            return await self.in_thread(self._checked, values, names, to_the_end)
        key = f"{to_the_end} {values!r}"
        known = self._params.get(key)
        if known is None:
            known = self._checked(values, names, to_the_end)
            if len(key) <= LONGEST_KEPT:
                self._params[key] = known
            if len(self._params) > KEPT:
                del self._params[next(iter(self._params))]
        return known

    def _checked(self, values: dict[str, Any], names: Mapping[str, str], to_the_end: bool) -> SamplingParams:
        most = self._section.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            if values.get(name) is not None and not 0 <= values[name] <= most:
                field = names.get(name, name)
                raise ApiError(400, f"{field}: must be between 0 and {most} (server.max_logprobs).", param=field)
        only_scores = values.get("max_tokens") == 0
        if only_scores:
            values["max_tokens"] = 1
        try:
            until = None if to_the_end and self._defaults.max_tokens == NOT_SAID else self._defaults.max_tokens
            params = sampling_from_mapping(replace(self._defaults, max_tokens=until), values, prefix="")
            problems = sampling_problems(params, prefix="", vocab_size=self.limits.vocab_size)
        except ConfigError as error:
            problems = list(error.problems)
        if problems:
            raise problem_error(problems[0], names)
        return replace(params, max_tokens=0, min_tokens=0) if only_scores else params

    def several(self, prompt: Any) -> list[Any]:
        """The prompts of a completion: one text or list of token ids, or several of them. ApiError: it is neither, or
        they are too many to be looked at."""
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise ApiError(400, "prompt: must be text, token ids, or a list of either, not empty.", param="prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        if len(prompt) > (most := self._section.max_samples):
            words = f"prompt: one request may have {most} prompts (server.max_samples), got {len(prompt)}."
            raise ApiError(400, words, param="prompt")
        if any(is_chat(one) or not isinstance(one, str | list) for one in prompt):
            words = "prompt: a list must hold only token ids, only texts, or lists of token ids."
            raise ApiError(400, words, param="prompt")
        return prompt

    async def requests(
        self, prompts: Prompts, params: SamplingParams, body: Sampled, *, name: str, model: str
    ) -> list[Request]:
        """The engine's requests for all prompts of `body`, which is sampled by `params`; `model`: one of `names`.
        ApiError, Overloaded, Draining, NoReplica."""
        samples = params.best_of or params.n
        count = len(prompts.values) * samples
        if count > self._section.max_samples:
            rule = f"{format_count(len(prompts.values), 'prompt')} with {samples} samples each: {count} completions"
            most = f"{rule}, and one request may have {self._section.max_samples} (server.max_samples)."
            raise ApiError(400, most, param="n" if samples > 1 else prompts.where)
        least = sum(len(prompt) if isinstance(prompt, list) else 1 for prompt in prompts.values)
        self._router.admit(len(prompts.values), samples * (least + len(prompts.values) * (params.max_tokens or 1)))
        lora = "" if model in self.own_names else model
        raw = prompts.raw(params, name, self._count, self._section.special_tokens_in_chats, lora)
        self._count += len(raw)
        made = []
        at_once = takes_no_time(prompts.values, params)
        limits = self.limits
        for one in make_requests(raw, limits) if at_once else await self.in_thread(make_requests, raw, limits):
            if isinstance(one, GrammarRefused):
                field, _ = structured_outputs(body) or ("structured_outputs", None)
                raise ApiError(400, f"{field}: {one.problems[0].rule.partition(': ')[2]}", param=field)
            if isinstance(one, ConfigError):
                raise one
            made.append(replace(one, stream=True) if body.stream else one)
        return made

    async def in_thread(self, work: Callable[..., Found], *arguments: Any) -> Found:
        """What `work` gives, computed in one of a few threads; Overloaded: too much waits for them."""
        if self._waiting >= self._section.max_queued_requests:
            raise Overloaded("As many requests as server.max_queued_requests are being read already.", 1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._waiting -= 1

    # ---- tokens without generating

    def tokens(self, body: TokenizeRequest) -> bytes:
        """The answer to `/tokenize`; for a thread. Errors as from `_token_ids`."""
        ids = self._token_ids(body)
        texts = self.texts if body.return_token_strs else None
        strings = texts and [texts.of(one)[0] for one in ids]
        most = self.limits.max_model_len
        return encode({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    def _token_ids(self, body: TokenizeRequest) -> list[int]:
        """Token ids of a text or a chat. ApiError: it says neither or both; ConfigError: it has none."""
        tokenizer = self._tokenizer()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages.", param="prompt")
        if body.messages is None:
            assert body.prompt is not None
            most = max(MAX_TOKENISED, 8 * self.limits.max_model_len)
            if len(body.prompt) > most:
                rule = f"prompt: has {len(body.prompt)} characters, and at most {most} are tokenised."
                raise ApiError(400, rule, param="prompt")
            prompts = Prompts(values=[body.prompt], where="prompt")
        else:
            given = {name: value for name in ChatRequest.model_fields if (value := getattr(body, name)) is not None}
            prompts = chat_prompts(ChatRequest.model_validate(given), {})
        if body.prompt is not None and body.add_special_tokens is False:
            return tokenizer.encode(body.prompt, add_special_tokens=False)
        params = replace(self._defaults, max_tokens=0, stop=None, bad_words=None)
        limits = replace(self.limits, max_model_len=MAX_TEXT)  # of any length that is worth it
        [made] = make_requests(prompts.raw(params, "", 0, self._section.special_tokens_in_chats), limits)
        if isinstance(made, ConfigError):
            raise made
        return list(made.prompt_token_ids)

    def text_of(self, ids: Any) -> str:
        """The text of token ids; for a thread. ApiError: they are none."""
        if ids == []:
            return ""
        most = max(MAX_TOKEN_IDS, self.limits.max_model_len)
        if isinstance(ids, list) and len(ids) > most:
            raise ApiError(400, f"tokens: has {len(ids)} entries, and at most {most} are read.", param="tokens")
        problem = prompt_problem(ids, key="tokens", vocab_size=self.limits.vocab_size)
        if problem is not None or isinstance(ids, str) or isinstance(ids[0], dict):
            raise problem_error(problem) if problem else ApiError(400, "tokens: must be token ids.", param="tokens")
        text: str = self._tokenizer().decode(ids)
        return text

    def _tokenizer(self) -> Tokenizer:
        if self.limits.tokenizer is None:
            raise ApiError(400, "The model has no tokenizer.")
        return self.limits.tokenizer

    @property
    def texts(self) -> TokenTexts:
        """What tokens read like."""
        if self._texts is None or self._texts.tokenizer is not self.limits.tokenizer:
            self._texts = TokenTexts(self.limits.tokenizer)
        return self._texts

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def takes_no_time(prompts: Sequence[Any], params: SamplingParams) -> bool:
    """Making requests of these takes less than handing them to a thread, which alone may cost milliseconds."""
    if params.structured_outputs or params.bad_words:
        return False
    sizes = [len(one) // (1 if isinstance(one, str) else 4) for one in prompts if not is_chat(one)]
    return len(sizes) == len(prompts) and sum(sizes) <= AT_ONCE


def is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


# ---- fields of requests


def chat_prompts(body: ChatRequest, more: Mapping[str, Any]) -> Prompts:
    """The prompt of a chat; `more` template variables beside its own. ApiError: the chat can't be read."""
    lists = [one for message in body.messages for one in (message.content, message.tool_calls)]
    if sum(len(one) for one in lists if isinstance(one, list)) > MAX_ENTRIES:
        rule = f"messages: all contents and tool_calls together may have {MAX_ENTRIES} entries."
        raise ApiError(400, rule, param="messages")
    values = {"tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs}
    problem = variables_problem(values)
    if problem is not None:
        raise problem_error(problem)
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        words = "continue_final_message: goes with add_generation_prompt false."
        raise ApiError(400, words, param="continue_final_message")
    wanted = body.add_generation_prompt if body.add_generation_prompt is not None else not goes_on
    variables = dict(body.chat_template_kwargs or {})
    variables |= {name: value for name, value in more.items() if value is not None}
    if body.tools:
        variables["tools"] = body.tools
    if body.documents is not None:
        variables["documents"] = body.documents
    variables |= {"add_generation_prompt": wanted, "continue_final_message": goes_on}
    messages = [_message(message, f"messages[{place}]") for place, message in enumerate(body.messages)]
    return Prompts(values=[messages], where="messages", variables=variables)


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    """A message as templates know it: its content one text, the arguments of its calls objects."""
    found = message.model_dump(exclude_unset=True, exclude={"content"})
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str | None):
        raise ApiError(400, f"{where}.content: must be text, a list of text parts, or null.", param="messages")
    if content is not None:
        found["content"] = content
    if found.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    return found


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ApiError(400, f'{where}: must be a part such as {{"type": "text", "text": ...}}.', param="messages")
    if part["type"] != "text":
        words = f"{where}.type: only texts can be read, and {part['type'][:40]!r} is none."
        raise ApiError(400, words, param="messages", code="unsupported_content")
    if not isinstance(part.get("text"), str):
        raise ApiError(400, f"{where}.text: must be text.", param="messages")
    text: str = part["text"]
    return text


def _call(call: Any) -> Any:
    """OpenAI's clients send arguments as JSON, templates want what it says."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json_text.parse(function["arguments"])
    except JsonError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def structured_outputs(body: Sampled) -> tuple[str, Any] | None:
    """The field in which a request says what form its output has, and that as a sampling parameter. ApiError: it says
    it in several."""
    found: list[tuple[str, Any]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append(("response_format", {"json_object": True}))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, "response_format.json_schema.schema: is needed.", param="response_format")
        found.append(("response_format", {"json": form.json_schema.schema_}))
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            found.append((f"guided_{kind}", {kind: value}))
    if body.structured_outputs is not None:
        found.append(("structured_outputs", body.structured_outputs))
    if len(found) > 1:
        words = f"{found[1][0]}: an output has one form, and {found[0][0]} says another."
        raise ApiError(400, words, param=found[1][0])
    return found[0] if found else None
