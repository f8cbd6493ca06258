"""The one memory model: what a rank holds when it generates or trains, and how many KV blocks fit.

Arithmetic only, importable without torch. The planner, `--dry-run` and the engine's own sizing all ask it. Weights and
KV blocks are exact; all else is an upper estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megalite.config.schema import EngineSection
from megalite.core.layout import Layout, width
from megalite.errors import Problem, ResourceError
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import CacheSpec
from megalite.monitor.words import format_bytes
from megalite.planner.applied import written_out
from megalite.weights.table import Weights, local_bytes, local_elements

GIB = 2**30
SCORED_LOGITS = 2**24
"""Logits of scored prompts that exist at a time, where those of the sampled rows are not more already."""
SAMPLING_CHUNK = 2**23
"""Logits that the sampler works on at once on an accelerator, with about 25 bytes for each."""
GRAPH_OVERHEAD = 12 << 20
"""Bytes left for what the driver keeps of a captured graph."""
ROW_OVERHEAD = 256
"""Bytes of a row's sampling parameters."""

PROCESS = 22 << 20
"""Bytes of torch's and gloo's code (18 MiB) that a process on a CPU reads in once it works, and of Python's objects
with the pieces in which they leave the heap."""
HOLES = 2.0
"""Times what is alive at once that the heap holds: glibc's aligned allocations do not fit the holes that their equals
left. 1.3 to 2.8, measured."""
CPU_CHUNK = 2**17
"""Logits that the sampler works on at once on a CPU: what stays in its cache."""
SEGMENT = 1 << 20
"""Bytes that gloo sums at a time, of which it keeps two."""


STATES_NOTE = (
    "layers of this model keep a state of each sequence, which blocks of the cache do not have; a prompt is always "
    "computed from its beginning, and so is a preempted sequence"
)
"""Why nothing that sequences have in common is computed only once; see `ModelConfig.has_states`."""


def scored_rows(config: ModelConfig, max_rows: int) -> int:
    """Rows of scored prompts that the head is applied to at a time; `max_rows` are sampled from at most."""
    return max(max_rows, SCORED_LOGITS // config.vocab_size, 1)


def sampled_row(vocab_size: int) -> int:
    """Bytes that sampling takes of a row beside its logits, at most (kernels/sampling.py: `workspace_bytes`)."""
    return 2**17 + vocab_size // 8


def kv_itemsize(kv_cache_dtype: str, itemsize: int) -> int:
    """Bytes of a number of the KV cache of a model whose numbers take `itemsize`."""
    return 1 if kv_cache_dtype == "fp8" else itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes on one rank, by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """float32 weights and two moments."""
    kv: int = 0
    """The KV cache."""
    activations: int = 0
    """Temporary memory of the layers; in training, what is kept for the backward pass."""
    logits: int = 0
    """Of sampled rows and scored prompts, or of the loss, with what works on them."""
    rows: int = 0
    """Buffers of running sequences: tokens, block tables, sampling parameters."""
    graphs: int = 0
    """Captured CUDA graphs."""
    reserve: int = 0
    """Left to others: the driver and what `engine.gpu_memory_utilization` leaves out."""

    @property
    def total(self) -> int:
        return sum(getattr(self, one.name) for one in fields(self))

    def items(self) -> dict[str, int]:
        """What is not nothing."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name))}


LOSS_BLOCK = 1 << 25
"""Logits of the loss in memory at once, in float32 (train/loss.py: `BLOCK`), and two copies of them."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What training takes on one rank, in bytes: ZeRO (arXiv 1910.02054, table 1), and micro batches in flight."""

    config: ModelConfig
    layout: Layout
    rank: int
    itemsize: int
    zero_stage: int = 1
    gradient_bytes: int = 4
    """Of a number of a gradient, as gradients are summed: `optimizer.gradient_dtype`."""
    adapter: Weights | None = None
    """Table of the adapters that train; the model's weights are frozen then. None: all of the model trains."""

    def state(self, count: int | None = None) -> Footprint:
        """Of `count` parameters that train on the rank, None: as many as it has; and of all that are frozen there."""
        place = (self.layout, self.rank)
        count = local_elements(self.adapter or self.config, *place) if count is None else count
        frozen = 0 if self.adapter is None else local_bytes(self.config, *place, self.itemsize)
        dp = self.layout.dp
        return Footprint(
            weights=frozen + count * self.itemsize // (dp if self.zero_stage == 3 else 1),
            gradients=count * self.gradient_bytes // (dp if self.zero_stage >= 2 else 1),
            optimizer=count * 12 // dp,
        )

    def token(self, layer: int) -> int:
        """Bytes that the backward pass of one layer needs of one token: what norms, projections, rotation, attention,
        gate and both residual sums were given."""
        tp, tp_rank = self.layout.tp, self.layout.coord(self.rank).tp
        kept = sum(kind.kept(tp, tp_rank) for kind in self.config.layers[layer].kinds)
        return (4 * self.config.hidden_size + kept) * self.itemsize

    def activations(self, tokens: int, micro_batches: int, *, recompute: bool) -> int:
        """Kept between forward and backward, of micro batches of `tokens` tokens, `micro_batches` in a step.

        Stage s of p has p - s of them in flight (1F1B). Recomputing keeps each layer's input, and all of one layer.
        """
        place, pp = self.layout.coord(self.rank).pp, self.layout.pp
        layers = self.layout.layers(place, self.config.layer_costs())
        flight = min(micro_batches, pp - place + (pp - 1) * (self.layout.interleave > 1))
        kept = [self.token(layer) for layer in layers]
        if recompute:
            return tokens * (flight * len(kept) * self.config.hidden_size * self.itemsize + max(kept))
        return tokens * flight * sum(kept)

    def footprint(self, tokens: int, micro_batches: int, *, recompute: bool) -> Footprint:
        """All of it."""
        vocab = width(self.config.head_vocab, self.layout.tp, self.layout.coord(self.rank).tp)
        is_last = self.layout.coord(self.rank).pp == self.layout.pp - 1
        return replace(
            self.state(),
            activations=self.activations(tokens, micro_batches, recompute=recompute),
            logits=3 * 4 * min(tokens * vocab, LOSS_BLOCK) if is_last else 0,
        )


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What generation takes on one rank, in bytes."""

    config: ModelConfig
    layout: Layout
    rank: int
    """Global."""
    itemsize: int
    """Bytes of a number of the weights and the activations."""
    kv_cache_dtype: str = "auto"
    """See `EngineSection`."""

    @property
    def weights(self) -> int:
        return local_bytes(self.config, self.layout, self.rank, self.itemsize)

    @property
    def cache(self) -> list[CacheSpec]:
        """What each layer of the rank's stage keeps of tokens and sequences."""
        place = self.layout.coord(self.rank)
        layers = self.layout.layers(place.pp, self.config.layer_costs())
        return [self.config.layers[layer].cache(self.layout.tp, place.tp) for layer in layers]

    def kv_block(self, block_size: int) -> int:
        """One KV block: what `block_size` tokens leave in the layers of the rank's stage."""
        elements = sum(spec.token_elements for spec in self.cache) * block_size
        return elements * kv_itemsize(self.kv_cache_dtype, self.itemsize)

    @property
    def sequence(self) -> int:
        """What a running sequence keeps in those layers, however long it is."""
        return sum(spec.sequence_bytes for spec in self.cache)

    def beside(self, engine: EngineSection, *, stage_weights: int, captures: bool, longest: int) -> Footprint:
        """All that an engine holds beside weights and KV cache.

        `stage_weights`: numbers on the rank of the stage that has most; `captures`: steps run as CUDA graphs;
        `longest`: the longest sequence in tokens, 0 on a CPU, where buffers take memory only as far as they are used.
        """
        tokens, rows = engine.max_num_batched_tokens, engine.max_num_seqs
        return Footprint(
            activations=self.activations(max_tokens=tokens) + self.states_in_use(max_rows=rows),
            logits=self.logits(max_tokens=tokens, max_rows=rows),
            rows=self.rows(max_rows=rows, max_len=longest, block_size=engine.block_size)
            if longest
            else (rows + 1) * self.sequence,
            graphs=self.graphs(max_rows=rows, max_tokens=tokens, weights=stage_weights) if captures else 0,
        )

    def activations(self, *, max_tokens: int) -> int:
        """Upper estimate of the layers' temporary memory in a step of `max_tokens` tokens: the widest moment of a layer
        (residual, norm, stacked projection and its activation), messages on their way, and the largest matrix of codes
        that is written out as numbers."""
        place, tp = self.layout.coord(self.rank), self.layout.tp
        kinds = {kind for layer in self.config.layers for kind in layer.kinds}
        widest = max(kind.widest(tp, place.tp) for kind in kinds)
        numbers = written_out(self.config, self.layout, self.rank, self.itemsize)
        token = (3 * self.config.hidden_size + widest) * self.itemsize + self.messages
        return max_tokens * token + numbers

    @property
    def messages(self) -> int:
        """Bytes of a token's hidden states on their way to the next stage, one message of each cohort."""
        pp = self.layout.pp
        return 0 if self.layout.coord(self.rank).pp == pp - 1 else pp * self.config.hidden_size * self.itemsize

    def step(self, *, max_tokens: int, max_rows: int) -> int:
        """What the heap of a process on a CPU holds of the steps of an engine: layers and sampling work one after the
        other. An update is added to the residual stream at once, so one hidden state less is alive than elsewhere."""
        hidden = max_tokens * self.config.hidden_size * self.itemsize
        summed = min(SEGMENT, hidden) if self.layout.tp > 1 else 0
        layers = self.activations(max_tokens=max_tokens) - hidden + 2 * summed
        if self.layout.coord(self.rank).pp < self.layout.pp - 1:
            return int(HOLES * layers)
        vocab = self.config.vocab_size
        logits = max_rows * vocab * (self.itemsize if self.layout.tp == 1 else 2 * 4)
        return int(HOLES * max(layers, hidden + logits + 25 * max(CPU_CHUNK, vocab)))

    def states_in_use(self, *, max_rows: int) -> int:
        """States of one layer on their way through a step: as they were, decayed, and what is written."""
        return 3 * max_rows * max(spec.sequence_bytes for spec in self.cache)

    def logits(self, *, max_tokens: int, max_rows: int, scores: bool = True) -> int:
        """Upper estimate of what sampling takes on the last stage, in a step of `max_tokens` tokens of which `max_rows`
        are sampled; `scores`: log-probabilities of prompts may be asked for.

        The logits of max_rows rows, or of a chunk of a scored prompt, whole and as this rank's slice on its way to the
        others, and what the sampler makes of a chunk of them.
        """
        if self.layout.coord(self.rank).pp < self.layout.pp - 1:
            return 0
        vocab = self.config.vocab_size
        scored = min(max_tokens, scored_rows(self.config, max_rows)) if scores else 0
        numbers = max(max_rows, scored) * vocab
        head = 0  # in codes, which become numbers for many rows
        if self.config.format("last", "lm_head") is not None:
            mine = width(self.config.head_vocab, self.layout.tp, self.layout.coord(self.rank).tp)
            head = mine * self.config.hidden_size * self.itemsize
        return head + 3 * numbers * 4 + 25 * min(numbers, max(SAMPLING_CHUNK, vocab)) + max_rows * sampled_row(vocab)

    def rows(self, *, max_rows: int, max_len: int, block_size: int) -> int:
        """Buffers of the running sequences: tokens, block tables (see `Rows`), what the sampler keeps of each, with how
        often each token was said, where there are penalties, and what layers keep of a sequence."""
        buffers = 4 * (2 * max_len + blocks_for(max_len, block_size)) + ROW_OVERHEAD
        return (max_rows + 1) * (buffers + self.sequence)

    def graphs(self, *, max_rows: int, max_tokens: int, weights: int) -> int:
        """Upper estimate of what captured steps keep, of up to `max_rows` sequences and `max_tokens` tokens, on a stage
        of so many weights.

        They share the temporary memory of the largest, which a warm-up before its capture takes once more; each has its
        kernels' launches.
        """
        chunks = chunk_sizes(max_tokens, weights)
        most = max(max_rows, *PROMPT_SIZES, *chunks)
        step = self.activations(max_tokens=most) + self.logits(max_tokens=most, max_rows=max_rows)
        step += self.states_in_use(max_rows=max_rows)
        return 2 * step + len([*decode_sizes(max_rows), *PROMPT_SIZES, *chunks]) * GRAPH_OVERHEAD


PROMPT_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Tokens that a prompt alone in a step is padded to; a longer one keeps the device busy while the host launches."""


CHUNK_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens that a step of several rows is padded to where it is captured."""
CAPTURED_WORK = 3e13
"""Operations of a step up to which it is captured: the host takes some 20 ms to launch the kernels of a step one by
one, in which a large GPU does about as many."""


def chunk_sizes(max_tokens: int, weights: int) -> list[int]:
    """Numbers of tokens that captured steps of several rows are padded to, on a stage of this many weights."""
    most = min(max_tokens, int(CAPTURED_WORK / (2 * weights)))
    sizes = [size for size in CHUNK_SIZES if size < most]
    return [*sizes, max_tokens] if most == max_tokens and max_tokens > CHUNK_SIZES[0] else sizes


def decode_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that decode steps are padded to: dense enough that padding costs little, `max_rows` the last."""
    sizes, size = [1, 2, 4], 8
    while size < max_rows:
        sizes.append(size)
        size += 8 if size < 64 else max(16, 1 << size.bit_length() - 5)
    return [*(size for size in sizes if size < max_rows), max_rows]


def fitting_blocks(budget: float, block_bytes: int, *, most: int) -> int:
    """Blocks of the cache that a rank has room for in `budget` bytes; `most` where layers keep nothing of tokens."""
    if block_bytes == 0:
        return most if budget >= 0 else 0
    return max(0, int(budget // block_bytes))


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // block_size)


def host_memory_available() -> int:
    """Bytes of host memory that can be had without swapping (MemAvailable, and the cgroup's limit where lower)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def host_memory() -> int:
    """Bytes of host memory, whoever uses it (MemTotal, and the cgroup's limit where lower)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    limit = _cgroup("memory.max")
    return total if limit is None else min(total, limit)


def _cgroup(name: str) -> int | None:
    try:
        with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
            text = file.read().strip()
    except OSError:  # no cgroup v2 limit here
        return None
    return int(text) if text.isdigit() else None


def settle_length(*, fitting_blocks: int, block_size: int, asked: int | None, model: int, block_bytes: int) -> int:
    """max_model_len: what was asked for, else the model's own, at most what the cache of every rank can hold.

    ResourceError when what was asked for, or even one block, does not fit.
    """
    room = fitting_blocks * block_size
    length = asked or min(model, room)
    if 1 <= length <= room:
        return length
    need = blocks_for(asked or 1, block_size) * block_bytes
    fits = fitting_blocks * block_bytes
    raise ResourceError(
        str(
            Problem(
                key="engine.max_model_len",
                value=asked,
                rule=f"one sequence needs {format_bytes(need)} of KV cache on a rank, {format_bytes(fits)} fit beside "
                "the weights",
                fix="Lower it, raise engine.gpu_memory_utilization or use more ranks (parallel.tp, parallel.pp).",
            )
        )
    )
