"""Generation from Python, in vLLM's spelling: `LLM(model=...).generate(prompts, SamplingParams(...))`.

In a plain process the model has one rank. Under `deepspeed` or `torchrun` every rank runs the same script and makes the
same calls, with the same prompts or there is an error, and every rank gets all results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, overload

import torch

from megalite.config import vllm
from megalite.config.load import Loaded, load_config, loaded_from
from megalite.config.schema import DistributedSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.config.typecheck import problem
from megalite.errors import ConfigError, MegaliteError, Problem
from megalite.inference.arguments import (
    as_prompts,
    check_config,
    check_params,
    engine_section,
    params_of_each,
    plain_params,
    progress_bar,
)
from megalite.inference.engine import Engine
from megalite.inference.io.inputs import RawRequest
from megalite.inference.logprobs import TokenLogprob
from megalite.inference.outputs import RequestOutput
from megalite.inference.replica import as_sampled, load_replica
from megalite.inference.request import Request
from megalite.inference.run import prepare, prompt_limits, run_everywhere
from megalite.inference.streaming import Generation, StreamedRun
from megalite.kernels.device import release_memory
from megalite.monitor.words import format_count
from megalite.planner import choose
from megalite.preflight import given, read_shape
from megalite.run import runtime as distributed
from megalite.run.launch_env import LaunchEnv
from megalite.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Params = SamplingParams | list[SamplingParams] | tuple[SamplingParams, ...] | None
"""One for all prompts or one for each."""
Chats = list[dict[str, Any]] | list[list[dict[str, Any]]]
"""A conversation, a list of {role, content}, or several."""

_DTYPES: dict[str, Any] = {"half": "float16", "float": "float32"}
"""Further names of dtypes that vLLM knows."""
_DEFAULT_LENGTH = SamplingParams().max_tokens


class LLM:
    """A model ready to generate, and the run that its ranks form. A context manager; else call `close` when done."""

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
        generation_config: Literal["auto", "vllm"] = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        quantization: str | None = None,
        trust_remote_code: bool = False,
        lora: Mapping[str, str] | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        **engine: Any,
    ):
        """Read the model and lay it out over the ranks of this run; every rank of a launcher makes the same call.

        Args:
            model: a folder with config.json and safetensors, or a hub id (`revision`: its branch, tag or commit).
            tokenizer: a folder or hub id to take the tokenizer from; None: the model's. `skip_tokenizer_init`: prompts
                and results are token ids only.
            generation_config: "vllm" leaves the sampling settings of the model's generation_config.json out of
                `get_default_sampling_params`.
            dtype: data type of weights and activations; "auto": the checkpoint's, where the device is fast in it.
            device: "cuda", "cpu"...; None: an accelerator if there is one.
            load_format: "dummy" gives the model random weights.
            quantization: as `model.quantization`; None: as the checkpoint says.
            trust_remote_code: False, as no code is run.
            lora: LoRA adapters by name, folders as PEFT saves them; see `lora_request` of `generate`.
            tensor_parallel_size, pipeline_parallel_size, data_parallel_size: their product is the number of ranks.
            engine: keys of the config's engine section: max_model_len, gpu_memory_utilization, block_size...
                Arguments of vLLM's that mean nothing here are passed over, with a line on the log that names them.

        Raises ConfigError with every problem found, CheckpointError or ResourceError.
        """
        if generation_config not in ("auto", "vllm"):
            raise ConfigError(problem("LLM: generation_config", 'must be "auto" or "vllm"', generation_config))
        dtype_name: Any = str(dtype).removeprefix("torch.")
        device_type: Any = None if device in (None, "auto") else str(device).partition(":")[0]
        config = InferConfig(
            model=ModelSection(
                path=str(model),
                tokenizer=tokenizer,
                revision=revision,
                dtype=_DTYPES.get(dtype_name, dtype_name),
                load_format=load_format,
                generation_config="auto" if generation_config == "auto" else "none",
                quantization=quantization,
                trust_remote_code=trust_remote_code,
            ),
            lora=dict(lora or {}),
            parallel=ParallelSection(tp=tensor_parallel_size, pp=pipeline_parallel_size, dp=data_parallel_size),
            engine=engine_section(engine, signature(LLM).parameters),
            distributed=DistributedSection(device=device_type),
        )
        self._start(config, with_tokenizer=not skip_tokenizer_init)

    @classmethod
    def from_config(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> LLM:
        """The model, layout, engine and default sampling of a config file; `overrides` as on the command line.

        Sizes of the layout that are null are the planner's choice for the ranks of this run, and its reason is logged.
        """
        llm = cls.__new__(cls)
        loaded = load_config("infer", path, overrides)
        env = LaunchEnv.of(os.environ)
        place = choose.Place.of(env) if env else choose.Place(ranks=1)
        loaded, said = choose.choose(loaded, lambda: read_shape(loaded.config), place)
        for line in said:
            log.info(line)
        llm._start(loaded.config, loaded)
        return llm

    def _start(
        self, config: InferConfig, loaded: Loaded[InferConfig] | None = None, *, with_tokenizer: bool = True
    ) -> None:
        """`loaded`: the config with its origins; None for one made in Python, which may hold anything until checked."""
        env = LaunchEnv.of(os.environ)
        check_config(config, env.world_size if env else 1)
        loaded = loaded or loaded_from(config)
        self.config = config
        self._launched = env is not None
        self._closed = False
        self.runtime = distributed.start(
            config.distributed,
            given(loaded),
            say=log.info,
            # in a program of the user's own, Ctrl-C is the user's; under a launcher all ranks stop together
            handle_signals=self._launched,
        )
        try:
            self.replica, folder = load_replica(config, self.runtime)
            self._sampling = as_sampled(loaded, folder).config.sampling
            if not with_tokenizer:
                self.replica.tokenizer = None
            self._engine: Engine | None = None
            if self.runtime.device.type != "cpu":
                self._engine = self.replica.engine()
                self._engine.warm_up()
        except BaseException as error:
            self._closed = True
            self.runtime.stop(error if self._launched else None)
            raise
        self._is_first = self.replica.state.rank == self.replica.layout.control_ranks[0]
        self._limits = prompt_limits(self.replica)
        self._calls = 0
        self._streamed: StreamedRun | None = None
        """The last streamed run."""
        self._hinted = False
        """The hint that outputs end at the default of max_tokens has been given."""
        self._asked = 0
        """Requests so far: what the id of the next one is, and the seed where its parameters have none."""

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave(error)

    def close(self) -> None:
        """Leave the run and give its memory back; under a launcher every rank must. Idempotent."""
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        """Ranks end together, with the error of one as everyone's; a plain process goes on after an error."""
        self._closed = True
        if self._streamed is not None:
            (self._streamed.close if error is None else self._streamed.discard)()
        if self._limits.tokenizer is not None:
            self._limits.tokenizer.close()  # its process that renders chats
        try:
            self.runtime.stop(error if self._launched else None)
        finally:
            self._engine = None
            vars(self).pop("replica", None)
            release_memory(self.runtime.device)

    @overload
    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Any = None,
        stream: Literal[False] = False,
        **others: Any,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Any = None,
        stream: Literal[True],
        **others: Any,
    ) -> Generation: ...

    def generate(
        self,
        prompts: Any = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Any = None,
        lora_request: Any = None,
        stream: bool = False,
        **others: Any,
    ) -> list[RequestOutput] | Generation:
        """Complete each prompt; results in input order, on every rank.

        Args:
            prompts: a text, token ids (any sequence or array of whole numbers), {"prompt": text} or
                {"prompt_token_ids": ids}, or several of these.
            sampling_params: one for all prompts or one for each; None: `get_default_sampling_params`. Where they have
                no seed, it follows from engine.seed and the request's id, which counts the requests of all calls: a
                second call gives other samples, and the same calls in another LLM the same.
            use_tqdm: show a progress bar on a terminal; a callable is called as tqdm is, for a bar of one's own.
            prompt_token_ids: in place of `prompts`, as older versions of vLLM take token ids.
            lora_request: the name of a LoRA adapter, one for all prompts or a list with one for each (None: none); or,
                as in vLLM, an object with `lora_name` and `lora_path`, which is read where it is new.
            stream: give a `Generation` at once, an iterator of what each sample gains (`TokenDelta`), also for
                `async for`; it has the results when it has ended. No bar is shown, and best_of may not exceed n.

        Raises ConfigError (a ValueError) before anything is computed if one of the prompts can't run.
        """
        unknown = vllm.CALL.sort_out(others)
        if unknown:
            raise ConfigError(Problem(key="generate", rule="unknown argument", value=next(iter(unknown))))
        if prompts is not None and prompt_token_ids is not None:
            raise ConfigError("generate: give either prompts or prompt_token_ids")
        given = as_prompts(prompts if prompt_token_ids is None else prompt_token_ids)
        params = self._checked(sampling_params, len(given), stream=stream)
        requests = self._requests(given, params, lora=self._adapters(lora_request, len(given)))
        return self._stream(requests) if stream else self._run(requests, use_tqdm)

    @overload
    def chat(
        self,
        messages: Chats,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        stream: Literal[False] = False,
        **variables: Any,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Chats,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        stream: Literal[True],
        **variables: Any,
    ) -> Generation: ...

    def chat(
        self,
        messages: Chats,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        stream: bool = False,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora_request: Any = None,
        **chat_variables: Any,
    ) -> list[RequestOutput] | Generation:
        """Answer a conversation, a list of {role, content}, or several; else as `generate`.

        Args:
            chat_template: Jinja text, or the name of one of the model's templates; None: the model's usual one.
            add_generation_prompt: the prompt ends where the assistant's answer begins.
            continue_final_message: the last message is the beginning of the answer; it goes with
                add_generation_prompt=False.
            tools: JSON schemas of functions. They, `chat_template_kwargs` and `chat_variables` reach the template.
        """
        alone = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], dict))
        chats = [messages] if alone else list(messages)
        for index, chat in enumerate(chats):
            if not isinstance(chat, list | tuple) or not all(isinstance(message, dict) for message in chat):
                raise ConfigError(f"chats[{index}]: a chat is a list of {{role, content}}, got {chat!r:.80}")
        variables = {**vllm.CALL.sort_out(chat_variables), **(chat_template_kwargs or {})}
        variables |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        variables |= {} if chat_template is None else {"chat_template": chat_template}
        variables |= {} if tools is None else {"tools": tools}
        params = self._checked(sampling_params, len(chats), stream=stream)
        lora = self._adapters(lora_request, len(chats))
        requests = self._requests([(chat, None) for chat in chats], params, variables, lora)
        return self._stream(requests) if stream else self._run(requests, use_tqdm)

    def logprobs(self, prompts: Any, use_tqdm: bool | Callable[..., Any] = False) -> list[list[TokenLogprob]]:
        """How likely each token of each prompt after the first is, and whether greedy decoding would have chosen it.

        `prompts` as in `generate`. What a text says is scored, with the tokens that the tokenizer puts before it.
        """
        given = as_prompts(prompts)
        scored = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
        found = []
        for output in self._run(self._requests(given, [scored] * len(given)), use_tqdm):
            if output.error is not None:
                raise MegaliteError(f"prompt {output.request_id}: {output.error}")
            assert output.prompt_logprobs is not None
            ids, entries = output.prompt_token_ids[1:], list(output.prompt_logprobs)[1:]
            each = [(token, entry[token]) for token, entry in zip(ids, entries, strict=True) if entry is not None]
            found.append([TokenLogprob(token, one.logprob, one.rank == 1) for token, one in each])
        return found

    def score(self, prompts: Any, *others: Any) -> list[list[float]]:
        """The log-probabilities of `logprobs` alone, under its older name.

        vLLM's `score` compares pairs of texts, which takes another kind of model.
        """
        if others:
            raise ConfigError("score: pairs of texts are compared by another kind of model; see LLM.logprobs")
        return [[token.logprob for token in tokens] for tokens in self.logprobs(prompts)]

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it has none."""
        return self.replica.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of what `generate` and `chat` sample by when they are given no parameters."""
        return plain_params(self._sampling)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prompt."""
        self._require_rest()
        if self._engine is not None:
            self._engine.renew()
        return True

    def _checked(self, params: Any, count: int, *, stream: bool) -> list[SamplingParams]:
        each = params_of_each(self._sampling if params is None else params, count)
        check_params(each, self._limits.vocab_size)
        for one in each if stream else ():
            if one.best_of is not None and one.best_of > one.n:
                rule = "which samples are the best is known at the end only: it must not exceed n to be streamed"
                raise ConfigError(problem("best_of", rule, one.best_of))
        return each

    def _require_rest(self) -> None:
        """ConfigError if this LLM can't begin anything now."""
        if self._closed:
            raise ConfigError("this LLM is closed; make another one")
        if self._streamed is not None and not self._streamed.ended:
            raise ConfigError("a generation of this LLM is being streamed; read it to its end, or close() it, first")

    def _requests(
        self,
        prompts: list[tuple[Any, str | None]],
        params: list[SamplingParams],
        chat_variables: dict[str, Any] | None = None,
        lora: list[str] | None = None,
    ) -> list[Request]:
        """`prompts`: each with its text, where it is token ids that came with one; `lora`: the name of each one's
        adapter. They will be run."""
        self._require_rest()
        raw = [
            RawRequest(
                prompt=prompt,
                text=text,
                params=sampling,
                id=str(self._asked + index),
                index=self._asked + index,
                where=f"prompts[{index}]",
                chat_variables=chat_variables or {},
                lora=lora[index] if lora else "",
            )
            for index, ((prompt, text), sampling) in enumerate(zip(prompts, params, strict=True))
        ]
        requests = []
        for made in prepare(self.replica, raw, self._limits):
            if isinstance(made, ConfigError):
                raise made
            requests.append(made)
        self._calls += 1
        self._asked += len(requests)
        return requests

    def _adapters(self, asked: Any, count: int) -> list[str]:
        """The name of each prompt's LoRA adapter, empty for none; what is new is read. ConfigError: it can't be."""
        each = list(asked) if isinstance(asked, list | tuple) else [asked] * count
        if len(each) != count:
            raise ConfigError(f"lora_request: {len(each)} were given for {count} prompts; give one, or one for each")
        names = []
        for one in each:
            name = one if isinstance(one, str) else getattr(one, "lora_name", "" if one is None else one)
            if not isinstance(name, str):
                raise ConfigError(problem("lora_request", "must be an adapter's name or have lora_name", name))
            path = getattr(one, "lora_path", None)
            if path:
                self._require_rest()
                self.replica.add_adapter(name, str(path))
                self._limits = prompt_limits(self.replica)
            names.append(name)
        return names

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self.replica.engine()
        return self._engine

    def _stop_requested(self) -> bool:
        return self._launched and self.runtime.signal_received() is not None

    def _stream(self, requests: list[Request]) -> Generation:
        streamed = [replace(request, stream=True) for request in requests]
        key, stop = f"generate/{self._calls}", self._stop_requested
        self._streamed = StreamedRun(self.replica, self._ready_engine(), streamed, key=key, stop_requested=stop)
        return Generation(self._streamed)

    def _run(self, requests: list[Request], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        with progress_bar(use_tqdm, len(requests), shown=self._is_first) as progress:
            outputs = run_everywhere(
                self.replica,
                self._ready_engine(),
                requests,
                key=f"generate/{self._calls}",
                stop_requested=self._stop_requested,
                progress=progress,
            )
        ends = [(one.finish_reason, len(one.token_ids)) for output in outputs for one in output.outputs]
        cut = sum(end == ("length", _DEFAULT_LENGTH) for end in ends)
        if cut and self._is_first and not self._hinted:
            self._hinted = True
            said = "%s ended at max_tokens = %d; set max_tokens in SamplingParams to allow more"
            log.warning(said, format_count(cut, "output"), _DEFAULT_LENGTH)
        return outputs
