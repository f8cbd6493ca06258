"""Generation from Python, in vLLM's spelling: `LLM(model=...).generate(prompts, SamplingParams(...))`.

In a plain process the model has one rank. Under `deepspeed` or `torchrun` every rank runs the same script and makes the
same calls, with the same prompts or there is an error, and every rank gets all results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from megalite.config import vllm
from megalite.config.load import Loaded, load_config, loaded_from
from megalite.config.sampling import sampling_problems
from megalite.config.schema import (
    DistributedSection,
    EngineSection,
    InferConfig,
    ModelSection,
    ParallelSection,
    SamplingParams,
)
from megalite.config.typecheck import hints, misfit, problem, sections
from megalite.config.validate import engine_problems, world_size_problem
from megalite.errors import ConfigError, Problem
from megalite.inference.engine import Engine
from megalite.inference.io.inputs import Asked
from megalite.inference.io.prompts import GivenPrompt, as_prompts, plain_params
from megalite.inference.logprobs import TokenLogprob
from megalite.inference.outputs import RequestOutput
from megalite.inference.replica import as_sampled, load_replica
from megalite.inference.run import prepare, prompt_limits, run_everywhere
from megalite.model.kernels import release_memory
from megalite.monitor.progress import ProgressBar
from megalite.monitor.words import format_count
from megalite.preflight import read_model
from megalite.run import runtime as distributed
from megalite.run.launch_env import LaunchEnv
from megalite.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_DTYPES = {"half": "float16", "float": "float32"}
"""Names that vLLM knows besides."""
_DEFAULT_LENGTH = SamplingParams().max_tokens
_ENGINE_NAMES = {"num_gpu_blocks_override": "num_kv_blocks"}


class LLM:
    """A model ready to generate. Use it as a context manager, or call `close` when done."""

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
        load_format: str = "auto",
        quantization: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        **engine: Any,
    ):
        """`engine` takes the keys of the config's engine section: max_model_len, gpu_memory_utilization, swap_space...

        `generation_config`: "vllm" leaves the sampling settings of the model's generation_config.json out of
        `get_default_sampling_params`. Arguments of vLLM's that mean nothing here are passed over, with a line on the
        log that names them; see config/vllm.py. Raises ConfigError with every problem found, CheckpointError or
        ResourceError.
        """
        if generation_config not in ("auto", "vllm"):
            raise ConfigError(problem("LLM: generation_config", 'must be "auto" or "vllm"', generation_config))
        dtype = str(dtype).removeprefix("torch.")
        config = InferConfig(
            model=ModelSection(
                path=str(model),
                tokenizer=tokenizer,
                revision=revision,
                dtype=_DTYPES.get(dtype, dtype),
                load_format=load_format,
                generation_config="auto" if generation_config == "auto" else "none",
                quantization=quantization,
                trust_remote_code=trust_remote_code,
            ),
            parallel=ParallelSection(tp=tensor_parallel_size, pp=pipeline_parallel_size, dp=data_parallel_size),
            engine=_engine_section(engine),
            distributed=DistributedSection(device=None if device in (None, "auto") else str(device).partition(":")[0]),
        )
        self._start(config)
        if skip_tokenizer_init:
            self.replica.tokenizer = None
            self._limits = prompt_limits(self.replica)

    @classmethod
    def from_config(cls, path: str | Path, overrides: Sequence[str] = ()) -> LLM:
        """The model, layout, engine and default sampling of a config file; `overrides` as on the command line."""
        llm = cls.__new__(cls)
        loaded = load_config("infer", path, overrides)
        llm._start(loaded.config, loaded)
        return llm

    def _start(self, config: InferConfig, loaded: Loaded | None = None) -> None:
        """`loaded`: the config with its origins; None for one made in Python, which may hold anything until checked."""
        place = LaunchEnv.of(os.environ)
        _check(config, place.world_size if place else 1)
        loaded = loaded or loaded_from(config)
        self.config = config
        self._launched = place is not None
        self._closed = False
        self.runtime = distributed.start(
            config.distributed,
            sha256=loaded.sha256,
            config_text=loaded.text,
            # in a program of the user's own, Ctrl-C is the user's; under a launcher all ranks stop together
            handle_signals=self._launched,
        )
        try:
            self.replica, folder = load_replica(config, self.runtime)
            self._sampling = as_sampled(loaded, folder).config.sampling
        except BaseException as error:
            self._closed = True
            self.runtime.stop(error if self._launched else None)
            raise
        self._engine: Engine | None = None
        self._limits = prompt_limits(self.replica)
        self._calls = 0
        self._told = False
        """That outputs ended at the default of max_tokens."""
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
        if self._limits.tokenizer is not None:
            self._limits.tokenizer.close()  # its process that renders chats
        try:
            self.runtime.stop(error if self._launched else None)
        finally:
            self._engine = None
            vars(self).pop("replica", None)
            release_memory(self.runtime.device)

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Any = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete each prompt; results in input order, on every rank.

        `prompts`: a text, token ids (any sequence or array of whole numbers), {"prompt": text} or {"prompt_token_ids":
        ids}, or several of these; `prompt_token_ids`: the same for ids, as older versions of vLLM take them.
        `sampling_params`: one for all prompts or one for each; None: `get_default_sampling_params`. `use_tqdm`: show a
        progress bar on a terminal; a callable is called as tqdm is, for a bar of one's own. Where the parameters have
        no seed, it follows from engine.seed and the request's id, which counts the requests of all calls: a second call
        gives other samples, and the same calls in another LLM the same. A prompt that can't run raises ConfigError (a
        ValueError) before anything is computed.
        """
        self._refuse_unknown(vllm.CALL.sort_out(others))
        if prompts is not None and prompt_token_ids is not None:
            raise ConfigError("generate: give either prompts or prompt_token_ids")
        given = as_prompts(prompts if prompt_token_ids is None else prompt_token_ids)
        return self._run(given, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **chat_variables: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, through the model's chat template, or `chat_template` (Jinja) instead.

        `tools`: JSON schemas; `chat_template_kwargs` and `chat_variables` reach the template. `continue_final_message`:
        the last message is the beginning of the answer; it goes with add_generation_prompt=False.
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
        return self._run([GivenPrompt(chat) for chat in chats], sampling_params, use_tqdm, variables)

    def logprobs(self, prompts: Any, use_tqdm: bool | Callable[..., Any] = False) -> list[list[TokenLogprob]]:
        """How likely each token of each prompt after the first is, and whether greedy decoding would have chosen it.

        `prompts` as in `generate`. What a text says is scored, with the tokens that the tokenizer puts before it.
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
        outputs = self._run(as_prompts(prompts), params, use_tqdm, checked=True)
        return [
            [
                TokenLogprob(token, entry[token].logprob, entry[token].rank == 1)
                for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
            ]
            for out in outputs
        ]

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
        """A copy of what `generate` and `chat` sample by when they are not told."""
        return plain_params(self._sampling)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prompt."""
        if self._engine is not None:
            self._engine.renew()
        return True

    def _refuse_unknown(self, others: dict[str, Any]) -> None:
        if others:
            raise ConfigError(Problem(key="generate", rule="unknown argument", value=next(iter(others))))

    def _run(
        self,
        prompts: Sequence[GivenPrompt],
        params: SamplingParams | Iterable[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
        chat_variables: dict[str, Any] | None = None,
        *,
        checked: bool = False,
    ) -> list[RequestOutput]:
        if self._closed:
            raise ConfigError("this LLM is closed; make another one")
        each = self._own_params(params, len(prompts), checked=checked)
        asked = [
            Asked(
                prompt=given.prompt,
                params=sampling,
                id=str(self._asked + index),
                index=self._asked + index,
                where=f"prompts[{index}]",
                chat_variables=chat_variables or {},
            )
            for index, (given, sampling) in enumerate(zip(prompts, each, strict=True))
        ]
        made = prepare(self.replica, asked, self._limits)
        requests = [request for request, _ in made]
        written = [given.text if text is None else text for given, (_, text) in zip(prompts, made, strict=True)]
        texts = {one.id: text for one, text in zip(requests, written, strict=True) if text is not None}
        if self._engine is None:
            self._engine = self.replica.engine()
        self._calls += 1
        self._asked += len(requests)
        with _bar(
            use_tqdm, len(requests), shown=self.replica.state.rank == self.replica.layout.control_ranks[0]
        ) as bar:
            outputs = run_everywhere(
                self.replica,
                self._engine,
                requests,
                texts,
                key=f"generate/{self._calls}",
                stop_requested=lambda: self._launched and self.runtime.signal_received() is not None,
                progress=bar,
            )
        self._tell_of_default(outputs)
        return outputs

    def _tell_of_default(self, outputs: Sequence[RequestOutput]) -> None:
        """Say once that outputs end where nobody may have meant them to."""
        ends = [(one.finish_reason, len(one.token_ids)) for output in outputs for one in output.outputs]
        cut = ends.count(("length", _DEFAULT_LENGTH))
        if cut and not self._told and self.replica.state.rank == self.replica.layout.control_ranks[0]:
            self._told = True
            log.warning(
                "%s ended at max_tokens = %d, the default of SamplingParams; set it to allow more",
                format_count(cut, "output"),
                _DEFAULT_LENGTH,
            )

    def _own_params(
        self, params: SamplingParams | Iterable[SamplingParams] | None, count: int, *, checked: bool
    ) -> list[SamplingParams]:
        """A copy of the parameters for each of `count` prompts, checked unless they are known to be right."""
        params = params if params is not None else self._sampling
        each = list(params) if isinstance(params, list | tuple) else [params] * count
        if len(each) != count:
            raise ConfigError(f"generate: {count} prompts but {len(each)} sampling params")
        copies: dict[int, SamplingParams] = {}
        problems: list[Problem] = []
        for one in each:
            if not isinstance(one, SamplingParams):
                raise ConfigError(f"generate: sampling params must be SamplingParams, got {one!r:.80}")
            if id(one) not in copies:
                copies[id(one)] = plain_params(one)
                if not checked:
                    problems += sampling_problems(copies[id(one)], prefix="", vocab_size=self._limits.vocab_size)
        if problems:
            raise ConfigError(*problems)
        return [copies[id(one)] for one in each]


class _CallersBar:
    """A progress bar that the caller makes, in place of `ProgressBar`."""

    def __init__(self, make: Callable[..., Any], total: int):
        self.bar = make(total=total, desc="prompts", dynamic_ncols=True)

    def advance(self, *, prompts: int = 0, tokens: int = 0) -> None:
        if prompts:
            self.bar.update(prompts)

    def __enter__(self) -> _CallersBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _bar(use_tqdm: bool | Callable[..., Any], total: int, *, shown: bool) -> ProgressBar | _CallersBar:
    if callable(use_tqdm) and shown:
        return _CallersBar(use_tqdm, total)
    return ProgressBar(total, enabled=bool(use_tqdm) and shown)


def _engine_section(given: dict[str, Any]) -> EngineSection:
    """The engine's keys among arguments of `LLM`, of which None leaves the default. ConfigError: there are others."""
    known = EngineSection.__dataclass_fields__
    given = {_ENGINE_NAMES.get(name, name): value for name, value in given.items()}
    for name in vllm.LLM.sort_out({name: value for name, value in given.items() if name not in known}):
        close = get_close_matches(name, [*known, *LLM.__init__.__kwdefaults__], n=1)
        fix = f"Did you mean {close[0]}?" if close else f"The engine's are {', '.join(known)}."
        raise ConfigError(Problem(key="LLM", rule="unknown argument", value=name, fix=fix))
    return EngineSection(**{name: value for name, value in given.items() if name in known and value is not None})


def _check(config: InferConfig, world_size: int) -> None:
    """ConfigError with every wrong type or broken rule of a config that was made in Python."""
    problems = [
        misfit(f"{name}.{key}", hint, getattr(getattr(config, name), key))
        for name, schema in sections(InferConfig).items()
        for key, hint in hints(schema).items()
    ]
    problems = [one for one in problems if one is not None]
    if not problems:
        parallel = config.parallel
        command = f"deepspeed --num_gpus {parallel.tp * parallel.pp * parallel.dp} SCRIPT"
        problems = engine_problems(config, read_model(config))
        problems += filter(None, [world_size_problem(config, world_size, command=command)])
    if problems:
        raise ConfigError(*problems)
