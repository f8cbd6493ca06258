"""What requests and answers look like: OpenAI's fields, and vLLM's beside them. Torch-free.

Models say types only. What values of sampling parameters mean, alone and together, is for `config.sampling`; fields
that may be long are not looked into here, since pydantic would list each wrong entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic.config import JsonDict

from megalite.config.explain import meanings
from megalite.config.rules import NO_BOUNDS
from megalite.config.schema import SamplingParams
from megalite.config.vllm import SAMPLING, Refused

MAX_MESSAGES = 2048
"""Of a chat; as many as OpenAI takes."""
Json = dict[str, Any]
_BOUNDS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
_FIELDS = {field.name: field for field in fields(SamplingParams)}


def _like(name: str) -> Any:
    """A field with the meaning of a sampling parameter and, in the schema only, its bounds; null: the server's."""
    bounds = _FIELDS[name].metadata.get("bounds", NO_BOUNDS)
    shown: JsonDict = {_BOUNDS[kind]: limit for kind, limit in bounds.limits.items()}
    if bounds.cap is not None and name in ("n", "best_of"):
        shown["maximum"] = bounds.cap
    return Field(None, description=meanings()["SamplingParams"][name], json_schema_extra=shown)


def _shape(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


_ID: Json = {"type": "integer", "minimum": 0}
_TEXT: Json = {"type": "string"}
_IDS: Json = {"type": "array", "items": _ID}
Ids = Annotated[Any, _shape(anyOf=[_IDS, {"type": "null"}])]
Texts = Annotated[Any, _shape(anyOf=[{"type": "array", "items": _TEXT}, {"type": "null"}])]
Stops = Annotated[Any, _shape(anyOf=[_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}])]
Biases = Annotated[
    Any,
    _shape(
        anyOf=[
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]+$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            {"type": "null"},
        ]
    ),
]
Prompts = Annotated[
    Any,
    _shape(
        anyOf=[
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            {**_IDS, "minItems": 1},
            {"type": "array", "items": {**_IDS, "minItems": 1}, "minItems": 1},
        ]
    ),
]
"""Text, token ids, or a list of either."""
Mappings = Annotated[Any, _shape(anyOf=[{"type": "array", "items": {"type": "object"}}, {"type": "null"}])]
Mapped = Annotated[Any, _shape(anyOf=[{"type": "object"}, {"type": "null"}])]


def _closed(schema: JsonDict) -> None:
    schema["additionalProperties"] = False


class Closed(BaseModel):
    """Fields beside the known ones are kept, to be refused or ignored by `server.unknown_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True, json_schema_extra=_closed)


class Open(BaseModel):
    """Fields beside the known ones mean something to somebody else."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)


class StreamOptions(Closed):
    include_usage: bool | None = None
    """Send the usage in a chunk of its own before the end."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Of no effect."""


class JsonSchemaFormat(Closed):
    name: str | None = None
    """Of no effect."""
    description: str | None = None
    """Of no effect."""
    schema_: Json | None = Field(None, alias="schema")
    """The JSON schema that the answer obeys."""
    strict: bool | None = None
    """Of no effect: a schema is always obeyed."""


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Sampled(Closed):
    """What both ways to generate have in common."""

    model: str | None = None
    """One of `/v1/models`; null: the first."""
    stream: bool | None = None
    """Send server-sent events as tokens come."""
    stream_options: StreamOptions | None = None
    n: int | None = _like("n")
    temperature: float | None = _like("temperature")
    top_p: float | None = _like("top_p")
    top_k: int | None = _like("top_k")
    min_p: float | None = _like("min_p")
    seed: int | None = Field(None, description="Same seed, same answer; null or -1: another one for each request.")
    presence_penalty: float | None = _like("presence_penalty")
    frequency_penalty: float | None = _like("frequency_penalty")
    repetition_penalty: float | None = _like("repetition_penalty")
    max_tokens: int | None = None
    """Largest number of tokens generated for each sample."""
    min_tokens: int | None = _like("min_tokens")
    stop: Stops = _like("stop")
    stop_token_ids: Ids = _like("stop_token_ids")
    ignore_eos: bool | None = _like("ignore_eos")
    logit_bias: Biases = _like("logit_bias")
    allowed_token_ids: Ids = _like("allowed_token_ids")
    bad_words: Texts = _like("bad_words")
    prompt_logprobs: int | None = _like("prompt_logprobs")
    skip_special_tokens: bool | None = _like("skip_special_tokens")
    include_stop_str_in_output: bool | None = _like("include_stop_str_in_output")
    response_format: ResponseFormat | None = None
    """The form of the answer: text, any JSON object, or JSON that obeys a schema."""
    structured_outputs: Mapped = _like("structured_outputs")
    guided_json: Annotated[Any, _shape(anyOf=[{"type": "object"}, _TEXT, {"type": "null"}])] = None
    """An older name of structured_outputs.json; likewise the next three."""
    guided_regex: str | None = None
    guided_choice: Texts = None
    guided_grammar: str | None = None
    user: str | None = None
    """Of no effect; likewise the next two."""
    metadata: Mapped = None
    store: bool | None = None


SAMPLING_FIELDS = tuple(name for name in Sampled.model_fields if name in _FIELDS and name != "structured_outputs")
"""Those that are sampling parameters of the same name."""


class CompletionRequest(Sampled):
    prompt: Prompts
    """Text, token ids, or a list of either: several prompts."""
    best_of: int | None = _like("best_of")
    logprobs: int | None = Field(None, json_schema_extra={"minimum": 0})
    """Largest number of top tokens reported for each token, beside itself, with their log-probabilities."""
    echo: bool | None = None
    """Begin the text, and the log-probabilities, with the prompt."""
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 0})
    """Largest number of tokens generated for each sample; null: 16, if the server's config does not say otherwise;
    0: with echo, the prompt is only scored."""


_PART: Json = {"type": "object", "properties": {"type": {"const": "text"}, "text": _TEXT}, "required": ["type", "text"]}


class ChatMessage(Open):
    """A turn of a chat. Fields beside these reach the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, _shape(anyOf=[_TEXT, {"type": "array", "items": _PART}, {"type": "null"}])] = None
    """Text, or a list of text parts."""
    name: str | None = None
    tool_calls: Mappings = None
    tool_call_id: str | None = None


class ChatRequest(Closed):
    """What becomes a prompt by the chat template."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Mappings = None
    """JSON schemas of tools that the chat template shows."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an answer; null: true, unless continue_final_message."""
    continue_final_message: bool | None = None
    """The answer goes on with the last message."""
    chat_template_kwargs: Mapped = None
    """Variables of the chat template, e.g. {"enable_thinking": false}."""
    documents: Mappings = None
    """Reach the chat template."""


class ChatCompletionRequest(ChatRequest, Sampled):
    max_completion_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    """Largest number of tokens generated for each sample; null: as the server's config says, else up to the model's
    length."""
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    """The older name."""
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: int | None = Field(None, json_schema_extra={"minimum": 0})
    """Largest number of top tokens reported for each token; needs logprobs."""
    tool_choice: Annotated[Any, _shape(anyOf=[{"enum": ["none", "auto"]}, {"type": "null"}])] = None
    """auto: the template shows the tools, and what the model writes is text; none: it does not show them."""
    reasoning_effort: str | None = None
    """Reaches the chat template."""
    parallel_tool_calls: bool | None = None
    """Of no effect."""


class TokenizeRequest(Closed):
    """A text, or the fields of a chat."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Mappings = None
    add_special_tokens: bool | None = None
    """Of a text: put the tokens around it that the tokenizer adds; null: true."""
    return_token_strs: bool | None = None
    tools: Mappings = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Mapped = None
    documents: Mappings = None


class DetokenizeRequest(Closed):
    model: str | None = None
    tokens: Annotated[Any, _shape(**_IDS)]


# ---- fields that real clients send and that mean nothing here

WITHOUT_EFFECT = frozenset(
    """
    prompt_cache_key prompt_cache_retention safety_identifier service_tier verbosity
    request_id return_tokens_as_token_ids
    """.split()
) | (SAMPLING.without_effect - {"output_kind"})
"""Fields that are passed over: they can change no answer."""

_TEXT_ONLY = "only texts come in and go out"
REFUSED: Mapping[str, Refused] = {
    **SAMPLING.refused,
    "suffix": Refused("text is generated after the prompt only", (None, "")),
    "audio": Refused(_TEXT_ONLY),
    "modalities": Refused(_TEXT_ONLY, (None, ["text"])),
    "prediction": Refused("there is no speculative decoding"),
    "web_search_options": Refused("nothing is looked up", (None, {})),
    "functions": Refused("use tools", (None, [])),
    "function_call": Refused("use tools", (None, "none", "auto")),
    "add_special_tokens": Refused("give token ids instead", (None, True)),
    "chat_template": Refused("the model's own is used"),
    "priority": Refused("requests are served in their order", (None, 0)),
    "guided_decoding_backend": Refused("there is one", (None, "", "auto", "guidance")),
    "guided_whitespace_pattern": Refused("white space in JSON is as the grammar has it"),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, (None, {})),
}
"""Fields that are refused unless they ask for nothing."""


# ---- answers


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int
    """Of the prompt: those whose keys and values were in the prefix cache."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    """Half a character is written as `bytes:\\xe2\\x82`."""
    token_logprobs: list[float | None]
    """-9999 stands for an impossible token's, null for that of a text's first token."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token begins in `text`, characters; those of one character begin together."""


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Json] | None] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    """Of a streamed answer: null but in the last chunk."""


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    """The token's UTF-8 bytes, also where they are half a character."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Json] | None] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """Where the model or adapter was loaded from, as the config names it."""
    parent: str | None
    """Of an adapter: the model."""
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


class VersionAnswer(BaseModel):
    version: str
