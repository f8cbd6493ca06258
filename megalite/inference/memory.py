"""How much memory a rank needs, and how many KV blocks fit; arithmetic only, importable without torch."""

from __future__ import annotations

from megalite.core.layout import Even, KVHeads, Layout, QueryHeads, width
from megalite.errors import Problem, ResourceError
from megalite.model.config import ModelConfig

GIB = 2**30


def kv_heads_on(config: ModelConfig, layout: Layout, rank: int) -> int:
    """KV heads that a rank caches."""
    split = KVHeads(config.num_kv_heads, config.head_dim)
    return width(split, layout.tp, layout.coord(rank).tp) // config.head_dim


def kv_block_bytes(config: ModelConfig, layout: Layout, rank: int, *, block_size: int, itemsize: int) -> int:
    """Bytes of one KV block on a rank: keys and values of block_size tokens in the layers of its stage."""
    layers = len(layout.layers(layout.coord(rank).pp, config.layer_costs()))
    return 2 * layers * kv_heads_on(config, layout, rank) * config.head_dim * block_size * itemsize


def activation_bytes(
    config: ModelConfig, layout: Layout, rank: int, *, max_tokens: int, max_rows: int, itemsize: int
) -> int:
    """Upper estimate of a forward pass's temporary memory on a rank.

    The widest moment of a layer (residual, norm, stacked projection and its activation), and on the last stage the
    float32 logits of max_rows rows, whole and as this rank's slice.
    """
    place = layout.coord(rank)
    queries = QueryHeads(config.num_heads, config.num_kv_heads, config.head_dim)
    keys = KVHeads(config.num_kv_heads, config.head_dim)
    heads = sum(width(split, layout.tp, place.tp) for split in (queries, keys, keys))
    inner = width(Even(config.intermediate_size), layout.tp, place.tp) * (2 if config.gated_mlp else 1)
    widest = 3 * config.hidden_size + max(3 * heads, 2 * inner)
    total = max_tokens * widest * itemsize
    if place.pp == layout.pp - 1:
        total += 3 * max_rows * config.vocab_size * 4
    return total


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
    need = blocks_for(asked or 1, block_size) * block_bytes / GIB
    fits = fitting_blocks * block_bytes / GIB
    raise ResourceError(
        str(
            Problem(
                key="engine.max_model_len",
                value=asked,
                rule=f"one sequence needs {need:.2f} GiB of KV cache on a rank, {fits:.2f} GiB fit beside the weights",
                fix="Lower it, raise engine.gpu_memory_utilization or use more ranks (parallel.tp, parallel.pp).",
            )
        )
    )
