"""`parallel: {tp: null, ...}`: the layout of a config whose sizes are left open, on what is there. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalite.config.load import Loaded, loaded_from
from megalite.config.schema import (
    EngineSection,
    HybridConfig,
    InferConfig,
    ParallelSection,
    SamplingParams,
    TrainConfig,
)
from megalite.config.validate import parallel_sections
from megalite.core.layout import Layout, share
from megalite.errors import ConfigError, Problem, ResourceError
from megalite.model.config import ModelConfig
from megalite.model.quantization import as_applied
from megalite.planner import devices
from megalite.planner.cost import Cluster
from megalite.planner.generation import Span, Workload
from megalite.planner.hybrid import search_pairs
from megalite.planner.search import Choice, layouts, search, search_training
from megalite.planner.training import TrainingWork
from megalite.run.launch_env import LaunchEnv
from megalite.run.placement import Host, consecutive, tp_inside
from megalite.weights.adapter_table import adapter_of
from megalite.weights.dtypes import DTYPE_BYTES, SAFETENSORS

ORIGIN = "the planner"
PROMPT = 512
"""Tokens of a prompt, where nothing says how long prompts are."""
MOST_REQUESTS = 1024
"""Requests that a job is played through with; with more, their end matters little."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run will be."""

    ranks: int | None = None
    """That a launcher started, or a hostfile asks for; None: as many as are of use."""
    hosts: tuple[Host, ...] = ()
    """Those of the ranks; empty: one."""

    @classmethod
    def of(cls, env: LaunchEnv) -> Place:
        """The ranks that a launcher started, taken to be as many on each host."""
        count = env.hosts or -(-env.world_size // (env.started_here or env.world_size))
        each = (share(env.world_size, count, number) for number in range(count))
        return cls.on(consecutive((f"host {number}", end - start) for number, (start, end) in enumerate(each)))

    @classmethod
    def on(cls, hosts: Sequence[Host]) -> Place:
        return cls(ranks=sum(len(host.ranks) for host in hosts), hosts=tuple(hosts))

    def inside(self, layouts: list[Layout]) -> list[Layout]:
        """Those with every tp group on one host; all, if there is none."""
        return [one for one in layouts if not self.hosts or tp_inside(one, self.hosts)] or layouts


def choose(
    loaded: Loaded[Any], read_model: Callable[[], ModelConfig | None], place: Place
) -> tuple[Loaded[Any], list[str]]:
    """The config with every size of its layouts, and what to say of the choice. Every rank finds the same.

    As it is where no size is open, or one is below 1, which the checks refuse.
    `read_model` gives the model's shape; it is not asked where one rank is all there can be. ConfigError: no layout has
    so many ranks; ResourceError: none fits.
    """
    config = loaded.config
    sections = parallel_sections(config)
    each = sections.values()
    if not any(one.is_open for one in each) or any(min(one.sizes) < 1 for one in each):
        return loaded, []
    cluster, why = _cluster(config, place)
    if cluster.devices == 1:
        return _with_sizes(loaded, dict.fromkeys(sections, Layout())), [f"parallel: 1 rank: {why}"]
    model = read_model()
    if model is None:
        rule = "null needs the model's config.json on this disk"
        fix = "Download the model (hf download) and give the folder, or set tp, pp and dp."
        raise ConfigError(Problem(key=next(iter(sections)), rule=rule, fix=fix))
    if not isinstance(config, TrainConfig | HybridConfig):
        model = as_applied(model, config.model.quantization)
    itemsize = _itemsize(config.model.dtype, model, cluster)
    candidates = {key: place.inside(_candidates(key, one, cluster, model)) for key, one in sections.items()}
    if isinstance(config, HybridConfig):
        found, said = _hybrid(config, model, cluster, itemsize, candidates)
    else:
        choices = (
            search_training(model, cluster, _work(config, model), itemsize=itemsize, candidates=candidates["parallel"])
            if isinstance(config, TrainConfig)
            else search(
                model,
                cluster,
                _workload(config.engine, config.sampling, model, _requests(config), place=cluster),
                config.engine,
                itemsize=itemsize,
                candidates=candidates["parallel"],
            )
        )
        found, said = {"parallel": _best(choices).layout}, _words("parallel", choices)
    on = f"{cluster.devices} x {cluster.device.name}" + (f" of {cluster.hosts} hosts" if cluster.hosts > 1 else "")
    return _with_sizes(loaded, found), [*said, f"  on {on}: {why}"]


def _cluster(config: Any, place: Place) -> tuple[Cluster, str]:
    """The devices of the run, and why these."""
    gpus = [] if config.distributed.device == "cpu" else devices.visible_gpus()
    given = max(_product(section) for section in parallel_sections(config).values())
    if not gpus:
        device = devices.named("cpu")
        if place.ranks is not None:
            return Cluster(
                device, place.ranks, max(1, len(place.hosts))
            ), f"{_started(place.ranks)}, and no GPU is visible"
        why = "no GPU is visible, and ranks of a CPU only share its cores"
        return Cluster(device, given), why if given == 1 else f"{why}; the sizes that are given need {given}"
    name, memory = gpus[0]
    device = devices.planned_as(name)
    device = replace(device, memory=min(device.memory, memory) or device.memory)
    if place.ranks is not None:
        return Cluster(device, place.ranks, max(1, len(place.hosts))), f"as many ranks as are started ({device.source})"
    count = len(gpus) // given * given
    if not count:
        rule = f"the sizes that are given need {given} ranks, and {len(gpus)} GPUs are visible"
        raise ConfigError(Problem(key=next(iter(parallel_sections(config))), rule=rule, fix="Lower them."))
    return Cluster(device, count), f"the GPUs that are visible ({device.source})"


def _started(ranks: int) -> str:
    return "1 rank was started" if ranks == 1 else f"{ranks} ranks were started"


def _product(section: ParallelSection) -> int:
    return math.prod(section.sizes)


def _candidates(key: str, section: ParallelSection, cluster: Cluster, model: ModelConfig) -> list[Layout]:
    """Layouts with the sizes that are given. ConfigError if there is none."""
    if section.first_rank:
        rule = "null is for a layout on all ranks, and first_rank is set"
        raise ConfigError(Problem(key=key, rule=rule, fix="Set tp, pp and dp, or leave first_rank 0."))
    every = list(layouts(cluster.devices, model, tp=section.tp, pp=section.pp, dp=section.dp))
    if section.interleave > 1:
        chunks = section.interleave
        every = [replace(one, interleave=chunks) for one in every if 1 < one.pp <= model.num_layers // chunks]
    if not every:
        sizes = ", ".join(f"{name}={getattr(section, name)}" for name in ("tp", "pp", "dp") if getattr(section, name))
        rule = f"no layout of {cluster.devices} ranks has {sizes or 'a stage of one layer or more'}"
        raise ConfigError(Problem(key=key, rule=rule, fix="Change them, or the number of ranks."))
    return every


def _itemsize(dtype: str, model: ModelConfig, cluster: Cluster) -> int:
    if dtype == "auto":
        dtype = model.dtype if cluster.device.kind == "cuda" else "float32"
    return DTYPE_BYTES[SAFETENSORS[dtype]]


def _requests(config: Any) -> int | None:
    """How many there are, where a config says it."""
    if isinstance(config, InferConfig) and config.input.prompts is not None:
        return len(config.input.prompts) * (config.sampling.best_of or config.sampling.n)
    return None


def _workload(
    engine: EngineSection, sampling: SamplingParams, model: ModelConfig, requests: int | None, *, place: Cluster
) -> Workload:
    """What a config asks for, as far as it says it: outputs of max_tokens, prompts of some hundred tokens."""
    longest = engine.max_model_len or model.max_position_embeddings
    output = min(sampling.max_tokens or PROMPT, max(1, longest - 1))
    prompt = max(1, min(PROMPT, longest - output))
    most = engine.max_num_seqs * place.devices
    some = requests if requests is not None and requests <= MOST_REQUESTS else None
    return Workload(
        input=Span(prompt, prompt),
        output=Span(output, output),
        concurrency=min(requests or most, most),
        requests=some,
    )


def _work(config: TrainConfig, model: ModelConfig) -> TrainingWork:
    return TrainingWork(
        sequence=config.data.sequence_length,
        batch=None,
        micro=config.train.micro_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        zero_stage=config.train.zero_stage,
        gradient_bytes=2 if config.optimizer.gradient_dtype == "bfloat16" else 4,
        recompute=config.train.recompute,
        adapter=adapter_of(config, model),
    )


def _hybrid(
    config: HybridConfig, model: ModelConfig, cluster: Cluster, itemsize: int, candidates: dict[str, list[Layout]]
) -> tuple[dict[str, Layout], list[str]]:
    samples = config.hybrid.prompts_per_step * config.hybrid.samples_per_prompt
    load = _workload(config.infer.engine, config.sampling, model, samples, place=cluster)
    load = replace(load, requests=samples)
    length = min(load.longest, config.train.micro_batch_tokens)
    tokens = samples * load.longest // config.hybrid.updates_per_step
    work = TrainingWork(
        sequence=length,
        batch=max(1, tokens // length),
        micro=max(1, config.train.micro_batch_tokens // length),
        zero_stage=config.train.zero_stage,
        gradient_bytes=2 if config.optimizer.gradient_dtype == "bfloat16" else 4,
        recompute=config.train.recompute,
        adapter=adapter_of(config, model),
    )
    pairs, trained = search_pairs(
        model,
        cluster,
        work,
        load,
        config.infer.engine,
        itemsize=itemsize,
        train=candidates["train.parallel"],
        infer=candidates["infer.parallel"],
        offloads=config.hybrid.offload_optimizer,
    )
    _best(trained)
    if not pairs:
        raise ResourceError("infer.parallel: no layout that generates fits beside one that trains")
    first = pairs[0]
    said = [f"train.parallel: {first.train.layout}, infer.parallel: {first.infer.layout}: {first.reason}"]
    return {"train.parallel": first.train.layout, "infer.parallel": first.infer.layout}, said


def _best(choices: list[Choice]) -> Choice:
    """The first; ResourceError if even that does not fit, or there is none."""
    if not choices:
        raise ConfigError(Problem(key="train.zero_stage", rule="no layout can train with it", fix="Use stage 1."))
    if choices[0].prediction.short:
        raise ResourceError(f"parallel: no layout fits; {choices[0].layout} {choices[0].reason}")
    return choices[0]


def _words(key: str, choices: list[Choice]) -> list[str]:
    first, others = choices[0], choices[1:]
    said = [f"{key}: {first.layout}, chosen from {len(choices)}: {first.reason}"]
    return said + [f"  next {one.layout}: {one.reason}" for one in others[:1]]


def _with_sizes(loaded: Loaded[Any], found: dict[str, Layout]) -> Loaded[Any]:
    """The config with these sizes, those that were given kept, of which it says where they came from."""
    config, origins = loaded.config, dict(loaded.origins)
    for key, layout in found.items():
        section = parallel_sections(config)[key]
        missing = {name: getattr(layout, name) for name in ("tp", "pp", "dp") if getattr(section, name) is None}
        origins |= {f"{key}.{name}": ORIGIN for name in missing}
        config = _replaced(config, key.split("."), replace(section, **missing))
    return loaded_from(config, origins)


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})
