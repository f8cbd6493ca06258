"""Builds what one rank needs to generate: model, weights, KV cache, engine; every rank of the run calls it alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from megalite.config.load import Loaded, with_origins
from megalite.config.sampling import sampling_problems
from megalite.config.schema import EngineSection, GeneratingConfig, InferConfig, ModelSection
from megalite.core.agreement import minimum, wait_for_all
from megalite.core.layout import Layout
from megalite.core.linear import settle, store_by_input
from megalite.core.parallel_state import ParallelState
from megalite.errors import ConfigError, Problem
from megalite.inference.engine import Engine
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.rows import Rows
from megalite.inference.runner import Runner
from megalite.inference.sampler import Sampler
from megalite.inference.scheduler import Scheduler
from megalite.kernels.device import free_memory, has_fp8, ranks_on_device
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.model.kv_cache import DeviceCache, HostCache
from megalite.monitor.collector import Meter
from megalite.monitor.memory import peak_memory, reset_peak_memory
from megalite.monitor.metrics import RankReport
from megalite.planner.memory import (
    GIB,
    STATES_NOTE,
    RankMemory,
    blocks_for,
    fitting_blocks,
    host_memory_available,
    scored_rows,
    settle_length,
)
from megalite.run.runtime import Runtime
from megalite.text.tokenizer import Tokenizer
from megalite.weights.dtypes import torch_dtype
from megalite.weights.folder import ModelFolder
from megalite.weights.hf import resolve
from megalite.weights.lora_loading import load_adapters
from megalite.weights.table import owned
from megalite.weights.transfer import build, initialise, load_folder

log = logging.getLogger(__name__)


class Replica:
    """This rank's part of a replica, ready to generate once `engine` was called.

    Collective: every rank of the layout constructs it with the same sections.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        runtime: Runtime,
        *,
        engine: EngineSection,
        dp_mode: Literal["sync", "async"] = "sync",
        meter: Meter | None = None,
        load_peak_bytes: int = 0,
        lora: Mapping[str, str] | None = None,
    ):
        """`decoder`: filled with weights, or about to be; it may be in training as well. `lora`: folders by name."""
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.settings = engine
        self.dp_mode = dp_mode
        self._lora = dict(lora or {})
        self.adapters = load_adapters(decoder, self._lora) if self._lora else None
        """LoRA beside the decoder's linears."""
        self.meter = meter or decoder.state.meter
        self.load_peak_bytes = load_peak_bytes
        """Memory that loading took at its peak."""
        self.state = decoder.state
        self.layout = decoder.state.layout
        self.model = decoder.config
        self.dtype, self.device = decoder.some_weight.dtype, decoder.some_weight.device
        self.memory = RankMemory(
            self.model, self.layout, self.state.rank, self.dtype.itemsize, kv_cache_dtype=engine.kv_cache_dtype
        )
        if self._caches_fp8 and self.device.type == "cuda" and not has_fp8(self.device):
            rule = "needs a GPU of compute capability 8.9 or higher"
            raise ConfigError(Problem(key="engine.kv_cache_dtype", rule=rule, value="fp8", fix="Leave it auto."))
        self._runner: Runner | None = None
        runtime.before_groups_go.append(self._drop_graphs)
        self._fit()

    def add_adapter(self, name: str, folder: str) -> None:
        """Read one more LoRA adapter, for runs from now on; one that is there already stays.

        Collective over the layout. CheckpointError: it can't be used; ConfigError: another has its name.
        """
        if self._lora.setdefault(name, folder) != folder:
            raise ConfigError(f"the LoRA adapter {name!r} is {self._lora[name]} already, not {folder}")
        if self.adapters is not None and name in self.adapters.names:
            return
        try:
            self.adapters = load_adapters(self.decoder, self._lora)
        except BaseException:
            del self._lora[name]
            raise
        if self._runner is not None:
            self._runner.use_adapters(self.adapters)

    def _drop_graphs(self) -> None:
        if self._runner is not None:
            self._runner.drop_graphs()

    def _fit(self) -> None:
        """Measure what memory is left for KV blocks, now that every rank has its weights, and settle max_model_len."""
        engine, state, began = self.settings, self.state, time.monotonic()
        wait_for_all(state.world)
        block_bytes = self.memory.kv_block(engine.block_size)
        # Ranks that sum over tp must pad alike, so they go by one number.
        self.stage_weights = -minimum(-sum(param.numel() for param in self.decoder.parameters()), state.replica)
        longest = engine.max_model_len or self.model.max_position_embeddings
        longest = longest if self.device.type != "cpu" else 0
        weights, captures = self.stage_weights, self._captures()
        beside = self.memory.beside(engine, stage_weights=weights, captures=captures, longest=longest)
        budget = self._free_memory() * engine.gpu_memory_utilization - beside.total
        most = engine.max_num_seqs * self._blocks_for(longest or self.model.max_position_embeddings)
        mine = engine.num_kv_blocks or fitting_blocks(budget, block_bytes, most=most)
        self.fitting_blocks = minimum(mine, state.replica)
        swap_space = 0.0 if self.model.has_states else engine.swap_space
        self.host_blocks = minimum(int(swap_space * GIB // max(block_bytes, 1)), state.replica)
        self.max_model_len = settle_length(
            fitting_blocks=minimum(mine, state.world),
            block_size=engine.block_size,
            asked=engine.max_model_len,
            model=self.model.max_position_embeddings,
            block_bytes=block_bytes,
        )
        log.info("memory was measured in %.1f s", time.monotonic() - began)
        if self.model.has_states and (engine.enable_prefix_caching or engine.swap_space):
            log.info("engine.enable_prefix_caching and engine.swap_space are without effect: %s", STATES_NOTE)

    @property
    def shares_prefixes(self) -> bool:
        """Whether requests with a common beginning share the work on it."""
        return self.settings.enable_prefix_caching and not self.model.has_states

    def _blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.settings.block_size)

    def _free_memory(self) -> int:
        """Bytes that this rank may still take: its share of what is free on its host or device."""
        if self.device.type == "cpu":
            return host_memory_available() // self.runtime.local_world_size
        return free_memory(self.device) // ranks_on_device(self.runtime.local_world_size)

    def engine(
        self, *, longest: int | None = None, sequences: int | None = None, at_temperature: bool = False
    ) -> Engine:
        """Allocate the KV cache and make the engine over it.

        `longest` (tokens of prompt and output) and `sequences` (at once) say what the work needs, where that is known;
        on a CPU the cache gets no larger than that. `at_temperature`: see `Sampler`.
        """
        settings = self.settings
        self.num_blocks = self.fitting_blocks
        if self.device.type == "cpu" and settings.num_kv_blocks is None:
            concurrent = min(sequences or settings.max_num_seqs, settings.max_num_seqs)
            needed = self._blocks_for(min(longest or self.max_model_len, self.max_model_len))
            self.num_blocks = min(self.num_blocks, concurrent * needed)
        scheduler = self._scheduler()
        own = {**self._cache_arguments(self.num_blocks), "rows": scheduler.max_num_seqs}
        cache = HostCache(**own) if self.device.type == "cpu" else DeviceCache(**own, device=self.device)
        self.kv_bytes = cache.nbytes
        rows = Rows(scheduler.max_num_seqs, self.max_model_len, cache=cache)
        self._runner = Runner(
            self.decoder,
            rows,
            HostCache(**self._cache_arguments(self.host_blocks)) if self.host_blocks else None,
            sampler=Sampler(
                self.model.vocab_size,
                max_rows=scheduler.max_num_seqs,
                max_len=self.max_model_len,
                device=self.device,
                tokens=rows.tokens,
                at_temperature=at_temperature,
                tokenizer=self.tokenizer,
            ),
            meter=self.meter,
            max_rows=scheduler.max_num_seqs // self.layout.pp,
            max_tokens=settings.max_num_batched_tokens,
            weights=self.stage_weights,
            use_graphs=self._captures(),
            return_ids=self._overlaps(),
            scored_rows=scored_rows(self.model, settings.max_num_seqs),
            adapters=self.adapters,
        )
        return Engine(
            self.state,
            self._runner,
            scheduler,
            OutputProcessor(self.tokenizer, replica=self.state.coord.dp),
            self.meter,
            overlap=self._overlaps(),
            check_lockstep=settings.check_lockstep,
        )

    def _scheduler(self) -> Scheduler:
        settings = self.settings
        return Scheduler(
            num_blocks=self.num_blocks,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            cohorts=self.layout.pp,
            prefix_caching=self.shares_prefixes,
            has_states=self.model.has_states,
            host_blocks=self.host_blocks,
            contiguous=self.device.type == "cpu",
            key_variant=self.model.key_variant,
        )

    def _cache_arguments(self, blocks: int) -> dict[str, Any]:
        """What makes a cache of this many blocks for this rank's stage."""
        return {
            "layers": dict(zip(self.decoder.layer_range, self.memory.cache, strict=True)),
            "blocks": blocks,
            "block_size": self.settings.block_size,
            "dtype": self.dtype,
            "fp8": self._caches_fp8,
        }

    @property
    def _caches_fp8(self) -> bool:
        return self.settings.kv_cache_dtype == "fp8"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of this rank's stage."""
        return sum(param.nbytes for param in self.decoder.parameters())

    def report(self, engine: Engine, *, failed: int = 0) -> RankReport:
        """What this rank did between `meter.start` and `meter.stop`. `failed`: prompts of the run that were refused."""
        place, stats, layers = self.state.coord, engine.scheduler.stats, self.decoder.layer_range
        largest = max(part.elements for part in owned(self.model, self.layout, self.state.rank))
        return self.meter.report(
            rank=self.state.rank,
            tp=place.tp,
            pp=place.pp,
            dp=place.dp,
            layers=(layers[0], layers[-1] + 1),
            weight_bytes=self.weight_bytes,
            kv_bytes=self.kv_bytes,
            kv_blocks=self.num_blocks,
            load_peak_bytes=self.load_peak_bytes,
            load_bound_bytes=self.weight_bytes + largest * self.dtype.itemsize,
            prompts=engine.finished + failed,
            failed_prompts=failed,
            output_tokens=engine.output_tokens,
            prompt_tokens=stats.prefix_query_tokens,
            cached_tokens=stats.prefix_hit_tokens,
            preemptions=stats.preemptions,
        )

    def _overlaps(self) -> bool:
        """Whether the host prepares a step while the device runs the one before; on a CPU they are the same."""
        asked = self.settings.async_scheduling
        return self.device.type != "cpu" if asked is None else asked

    def _captures(self) -> bool:
        """Whether decode steps run as graphs; collectives inside a stage can be captured if the device runs them."""
        capturable = self.state.tp.size == 1 or self.runtime.backend == "nccl"
        return self.device.type != "cpu" and not self.settings.enforce_eager and capturable


def load_replica(config: GeneratingConfig, runtime: Runtime) -> tuple[Replica, ModelFolder]:
    """Build the decoder of a config's model on this rank, in the config's layout, read the rank's part of the weights
    into it, and make a replica of it; also what the model's folder holds beside weights.

    Collective over the run. CheckpointError: a damaged folder; ResourceError: the memory is too small.
    """
    parallel, section = config.parallel, config.model
    state = ParallelState(Layout(*parallel.sizes, stages=parallel.stages))
    folder = ModelFolder.open(_fetch(section, runtime), tokenizer=section.tokenizer)
    dtype = choose_dtype(section.dtype, folder.model, runtime.device)
    before, began = reset_peak_memory(), time.monotonic()
    decoder = build(folder.model, state, dtype=dtype, device=runtime.device)
    if section.load_format == "dummy":
        initialise(decoder, config.engine.seed)
    else:
        load_folder(decoder, folder.path)
    settle(decoder, section.quantization if folder.model.quantization is None else None)
    if runtime.device.type == "cpu":
        store_by_input(decoder)
    log.info("weights were loaded in %.1f s", time.monotonic() - began)
    replica = Replica(
        decoder.requires_grad_(False),
        folder.tokenizer,
        runtime,
        engine=config.engine,
        dp_mode=parallel.dp_mode,
        load_peak_bytes=peak_memory() - before,
        lora=config.lora,
    )
    return replica, folder


def as_sampled(loaded: Loaded[InferConfig], folder: ModelFolder) -> Loaded[InferConfig]:
    """The config with the sampling that the model's owner sets where it sets none. ConfigError: that can't be."""
    loaded = folder.generation.under(loaded)
    assert isinstance(loaded.config, InferConfig)
    problems = sampling_problems(loaded.config.sampling, vocab_size=folder.model.vocab_size)
    if problems:
        raise ConfigError(*with_origins(problems, loaded.origins))
    return loaded


def _fetch(section: ModelSection, runtime: Runtime) -> Path:
    """The model's folder; a hub id is downloaded by the first rank of each host while the others wait."""
    assert section.path is not None
    weights = section.load_format != "dummy"
    if not Path(section.path).is_dir() and runtime.world_size > 1:
        if runtime.local_rank == 0:
            resolve(section.path, section.revision, weights=weights)
        wait_for_all()
    return resolve(section.path, section.revision, weights=weights)


def choose_dtype(asked: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The data type to compute in: as asked, or the checkpoint's where this device is fast in it, else float32."""
    if asked != "auto":
        return torch_dtype(asked)
    if device.type != "cpu":
        return torch_dtype(model.dtype)
    fast = model.dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
