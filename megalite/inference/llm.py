"""Generation from Python, in vLLM's spelling: `LLM(model=...).generate(prompts, SamplingParams(...))`.

In a plain process the model has one rank. Under `deepspeed` or `torchrun` every rank runs the same script and makes the
same calls, with the same prompts or there is an error, and every rank gets all results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.load import load_config, loaded_from
from megalite.config.sampling import sampling_problems
from megalite.config.schema import EngineSection, InferConfig, ModelSection, ParallelSection, SamplingParams
from megalite.config.shape import hints, misfit, sections
from megalite.config.validate import engine_problems, world_size_problem
from megalite.core import distributed
from megalite.core.rendezvous import Place
from megalite.errors import ConfigError, Problem, Stopped
from megalite.inference.assembly import Replica, load_replica
from megalite.inference.control import Feed, Ranks, Share, SharedQueue, broadcast_bytes, deal
from megalite.inference.engine import Engine, Hooks
from megalite.inference.inputs import Asked, Prompt, Served, make_requests
from megalite.inference.outputs import RequestOutput, pack_outputs, unpack_outputs
from megalite.inference.request import Request
from megalite.preflight import read_model


class LLM:
    """A model ready to generate. Use it as a context manager, or call `close` when done."""

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        load_format: str = "auto",
        quantization: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        **engine: Any,
    ):
        """`engine` takes the keys of the config's engine section: max_model_len, gpu_memory_utilization, swap_space...

        Raises ConfigError with every problem found, CheckpointError or ResourceError.
        """
        known = EngineSection.__dataclass_fields__
        for name in engine:
            if name not in known:
                close = get_close_matches(name, [*known, *LLM.__init__.__kwdefaults__], n=1)
                fix = f"Did you mean {close[0]}?" if close else f"The engine's are {', '.join(known)}."
                raise ConfigError(Problem(key="LLM", rule="unknown argument", value=name, fix=fix))
        config = InferConfig(
            model=ModelSection(
                path=str(model),
                tokenizer=tokenizer,
                revision=revision,
                dtype=dtype,
                load_format=load_format,
                quantization=quantization,
                trust_remote_code=trust_remote_code,
            ),
            parallel=ParallelSection(tp=tensor_parallel_size, pp=pipeline_parallel_size, dp=data_parallel_size),
            engine=EngineSection(**engine),
        )
        self._start(config)

    @classmethod
    def from_config(cls, path: str | Path, overrides: Sequence[str] = ()) -> LLM:
        """The model, layout, engine and default sampling of a config file; `overrides` as on the command line."""
        llm = cls.__new__(cls)
        llm._start(load_config("infer", path, overrides).config)
        return llm

    def _start(self, config: InferConfig) -> None:
        place = Place.of(os.environ)
        _check(config, place.world_size if place else 1)
        loaded = loaded_from(config)
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
            self.replica, _ = load_replica(config, self.runtime)
        except BaseException as error:
            self._closed = True
            self.runtime.stop(error if self._launched else None)
            raise
        self._engine: Engine | None = None
        self._served = serve(self.replica)
        self._calls = 0
        self._asked = 0
        """Requests so far: what the id of the next one is, and the seed where its parameters have none."""

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave(error)

    def close(self) -> None:
        """Leave the run; under a launcher every rank must. Idempotent."""
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        """Ranks end together, with the error of one as everyone's; a plain process goes on after an error."""
        self._closed = True
        if self._served.tokenizer is not None:
            self._served.tokenizer.close()  # its process that renders chats
        self.runtime.stop(error if self._launched else None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids); results in input order, on every rank.

        `sampling_params`: one for all prompts or one for each; None: the config's. Where they have no seed, it follows
        from engine.seed and the request's id, which counts the requests of all calls: a second call gives other
        samples, and the same calls in another LLM the same. A prompt that can't run raises ConfigError before anything
        is computed.
        """
        return self._run(_as_list(prompts), sampling_params)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **chat_variables: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, through the model's chat template; `chat_variables` reach the template."""
        alone = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], dict))
        chats = [messages] if alone else list(messages)
        for index, chat in enumerate(chats):
            if not isinstance(chat, list | tuple) or not all(isinstance(message, dict) for message in chat):
                raise ConfigError(f"chats[{index}]: a chat is a list of {{role, content}}, got {chat!r:.80}")
        return self._run(chats, sampling_params, chat_variables)

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """Log-probability of each token of each prompt after the first, by the model's full distribution."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        outputs = self._run(_as_list(prompts), params, checked=True)
        return [
            [
                entry[token].logprob
                for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
            ]
            for out in outputs
        ]

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        chat_variables: dict[str, Any] | None = None,
        *,
        checked: bool = False,
    ) -> list[RequestOutput]:
        if self._closed:
            raise ConfigError("this LLM is closed; make another one")
        params = params if params is not None else self.config.sampling
        each = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(f"generate: {len(prompts)} prompts but {len(each)} sampling params")
        if not checked:
            self._check_sampling(each)
        asked = [
            Asked(
                prompt=prompt,
                params=sampling,
                id=str(self._asked + index),
                index=self._asked + index,
                where=f"prompts[{index}]",
                chat_variables=chat_variables or {},
            )
            for index, (prompt, sampling) in enumerate(zip(prompts, each, strict=True))
        ]
        made = prepare(self.replica, asked, self._served)
        requests, texts = [request for request, _ in made], {one.id: text for one, text in made if text is not None}
        if self._engine is None:
            self._engine = self.replica.engine()
        self._calls += 1
        self._asked += len(requests)
        return run_everywhere(
            self.replica,
            self._engine,
            requests,
            texts,
            key=f"generate/{self._calls}",
            stop_requested=lambda: self._launched and self.runtime.signal_received() is not None,
        )

    def _check_sampling(self, each: Sequence[SamplingParams]) -> None:
        problems = []
        for params in {id(one): one for one in each}.values():
            if not isinstance(params, SamplingParams):
                raise ConfigError(f"generate: sampling params must be SamplingParams, got {params!r:.80}")
            problems += sampling_problems(params, prefix="", vocab_size=self._served.vocab_size)
        if problems:
            raise ConfigError(*problems)


def _check(config: InferConfig, world_size: int) -> None:
    """ConfigError with every wrong type or broken rule of a config that was made in Python."""
    problems = [
        misfit(f"{name}.{key}", hint, getattr(getattr(config, name), key))
        for name, schema in sections(InferConfig).items()
        for key, hint in hints(schema).items()
    ]
    problems = [problem for problem in problems if problem is not None]
    if not problems:
        parallel = config.parallel
        command = f"deepspeed --num_gpus {parallel.tp * parallel.pp * parallel.dp} SCRIPT"
        problems = engine_problems(config, read_model(config))
        problems += filter(None, [world_size_problem(config, world_size, command=command)])
    if problems:
        raise ConfigError(*problems)


def serve(replica: Replica) -> Served:
    """What making requests needs to know of a replica."""
    return Served(
        tokenizer=replica.tokenizer,
        vocab_size=replica.model.vocab_size,
        max_model_len=replica.max_model_len,
        eos_token_ids=replica.model.eos_token_ids,
        seed=replica.settings.seed,
    )


def prepare_each(
    replica: Replica, asked: Sequence[Asked], served: Served
) -> list[tuple[Request, str | None] | ConfigError]:
    """The request for each prompt and its text, or why it can't run. Collective over the layout.

    ConfigError: ranks were given different ones.
    """
    together = Ranks(replica.state, "prompts and sampling parameters") if replica.state.world.size > 1 else None
    return make_requests(asked, served, together)


def prepare(replica: Replica, asked: Sequence[Asked], served: Served) -> list[tuple[Request, str | None]]:
    """As `prepare_each`; ConfigError also for the first that can't run."""
    made = prepare_each(replica, asked, served)
    refused = next((one for one in made if isinstance(one, ConfigError)), None)
    if refused is not None:
        raise refused
    return made


def make_feed(replica: Replica, requests: Sequence[Request], key: str) -> Feed:
    """Where this replica's work comes from; every rank calls it with the same requests."""
    replicas = replica.layout.dp
    samples = [request.num_samples for request in requests]
    if replica.dp_mode == "async" and replicas > 1:
        return SharedQueue(range(len(requests)), samples, replica.runtime.store, key, replicas)
    share = deal(requests, replicas)[replica.state.coord.dp]
    return Share(share, [samples[index] for index in share])


def agree_on_end(replica: Replica, completed: bool) -> None:
    """Raise Stopped on every rank if a replica has left off for a signal. Collective over the layout.

    A rank may not have heard of the signal yet that another's control rank acted on.
    """
    signum = torch.tensor([0 if completed else replica.runtime.signal_received() or 0])
    if replica.state.world.size > 1:
        dist.all_reduce(signum, op=dist.ReduceOp.MAX, group=replica.state.world.group)
    if signum:
        raise Stopped(int(signum))


def run_here(
    replica: Replica,
    engine: Engine,
    requests: Sequence[Request],
    texts: dict[str, str],
    *,
    key: str,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[RequestOutput]:
    """Generate; gives what this replica has finished, on its control rank, in any order.

    Collective over the layout; Stopped on every rank if it was stopped.
    """
    mine: list[RequestOutput] = []
    engine.outputs.texts.update(texts)
    feed = make_feed(replica, requests, key)
    completed = engine.run(requests, feed, Hooks(on_output=mine.append, stop_requested=stop_requested))
    engine.outputs.clear()  # the texts of what other ranks have finished
    agree_on_end(replica, completed)
    return mine


def run_everywhere(
    replica: Replica,
    engine: Engine,
    requests: Sequence[Request],
    texts: dict[str, str],
    *,
    key: str,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[RequestOutput]:
    """As `run_here`, but gives every rank all outputs, in the order of `requests`."""
    outputs = run_here(replica, engine, requests, texts, key=key, stop_requested=stop_requested)
    if replica.state.world.size > 1:
        outputs = _exchanged(outputs, replica)
    found = {output.request_id: output for output in outputs}
    return [found[request.id] for request in requests]


def _exchanged(mine: Sequence[RequestOutput], replica: Replica) -> list[RequestOutput]:
    """The outputs of all control ranks."""
    outputs = []
    for source in replica.layout.control_ranks:
        packed = pack_outputs(mine) if replica.state.rank == source else None
        outputs += unpack_outputs(broadcast_bytes(packed, source, replica.state.world))
    return outputs


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt alone (a text or a list of token ids) or several."""
    alone = not isinstance(prompts, list | tuple) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if alone else list(prompts)
