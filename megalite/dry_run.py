"""`--dry-run`: what each rank of a layout would hold, in layers, heads, rows and bytes; arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from megalite.config.schema import Config, EngineSection, HybridConfig, TrainConfig
from megalite.config.validate import num_ranks
from megalite.core.layout import KVHeads, Layout, QueryHeads
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.model.quantization import as_applied
from megalite.monitor.words import aligned, format_bytes, format_count
from megalite.planner.memory import STATES_NOTE, RankMemory, TrainingMemory
from megalite.preflight import layouts_of
from megalite.run import placement
from megalite.run.hostfile import check_ranks
from megalite.run.placement import Host
from megalite.weights.adapter_table import AdapterTable, adapter_of
from megalite.weights.dtypes import DTYPE_BYTES, SAFETENSORS
from megalite.weights.table import local_elements

MOST_ROWS = 256
"""Ranks listed one by one; with more, the first replica stands for the others, which hold the same."""


def describe(config: Config, model: ModelConfig | None, hosts: Sequence[Host] = ()) -> str:
    """The table of ranks, with its title and notes, and which of several hosts has what.

    ConfigError: the model's shape is not known here, or the hosts have not as many ranks as the layout.
    """
    if model is None:
        fix = "Download the model (hf download) and give the folder."
        value = config.model.path
        raise ConfigError(
            Problem(key="model.path", rule="--dry-run needs the model's config.json on this disk", value=value, fix=fix)
        )
    adapter = adapter_of(config, model) if isinstance(config, TrainConfig | HybridConfig) else None
    layouts = layouts_of(config)
    if isinstance(config, HybridConfig):
        dtype = config.model.dtype
        tables = [
            ("training", layouts["train.parallel"], _training_columns(config.train.zero_stage, dtype, adapter)),
            ("generating", layouts["infer.parallel"], _engine_columns(config.infer.engine, dtype, model)),
        ]
    elif isinstance(config, TrainConfig):
        tables = [("", layouts["parallel"], _training_columns(config.train.zero_stage, config.model.dtype, adapter))]
    else:
        model = as_applied(model, config.model.quantization)
        said = f"{model.dtype} (as the checkpoint says)" if config.model.dtype == "auto" else config.model.dtype
        tables = [("", layouts["parallel"], _engine_columns(config.engine, said, model))]
    shown = [_table(model, purpose, layout, columns) for purpose, layout, columns in tables]
    if len(hosts) > 1:
        check_ranks(hosts, num_ranks(config))
        warnings = [f"warning: {warning}" for warning in placement.warnings(layouts, hosts)]
        shown.append("\n".join([*placement.by_host(layouts, hosts), *warnings]))
    return "\n\n".join(shown)


Columns = Callable[[ModelConfig, Layout, Iterable[int]], dict[str, list[str]]]
"""The bytes on the ranks asked for, by what they are of."""


def _table(model: ModelConfig, purpose: str, layout: Layout, sized: tuple[Columns, list[str]]) -> str:
    """One layout: where each rank is and what it holds, with a title and notes."""
    columns, notes = sized
    shown = layout.ranks[: layout.size if layout.size <= MOST_ROWS else layout.tp * layout.pp]
    total = local_elements(model, Layout(), 0)
    ranks = format_count(layout.size, "rank")
    title = f"{model.family}, {model.num_layers} layers, {total:,} parameters, on {layout}: {ranks}"
    if len(shown) < layout.size:
        notes = [*notes, f"the other {layout.dp - 1} replicas hold the same as the first"]
    named = _place_columns(model, layout, shown) | columns(model, layout, shown)
    rows = aligned([dict(zip(named, cells, strict=True)) for cells in zip(*named.values(), strict=True)])
    return "\n".join([f"{purpose}: {title}" if purpose else title, "", *rows, "", *notes])


def _place_columns(model: ModelConfig, layout: Layout, shown: Iterable[int]) -> dict[str, list[str]]:
    """Where each rank is, and which parts of the model are on it."""
    names = ("rank", "dp", "pp", "tp", "layers", "query heads", "kv heads", "vocab rows")
    columns: dict[str, list[str]] = {name: [] for name in names}
    heads = sorted({(kind.heads, kind.kv_heads) for kind in model.of(SoftmaxAttention)})
    for rank in shown:
        place = layout.coord(rank)
        chunks = layout.chunks(place.pp, model.layer_costs())
        has_vocab = place.pp in (0, layout.pp - 1)
        cells = (
            *map(str, (rank, place.dp, place.pp, place.tp)),
            " ".join(_range(chunk.start, chunk.stop) for chunk in chunks),
            " ".join(_range(*QueryHeads(q, kv, 1).range(layout.tp, place.tp)) for q, kv in heads),
            " ".join(_range(*KVHeads(kv, 1).range(layout.tp, place.tp)) for _, kv in heads),
            _range(*model.vocab.range(layout.tp, place.tp)) if has_vocab else "-",
        )
        for name, cell in zip(names, cells, strict=True):
            columns[name].append(cell)
    return columns


def _engine_columns(engine: EngineSection, dtype: str, model: ModelConfig) -> tuple[Columns, list[str]]:
    """Bytes of an inference engine on each rank; and notes. `dtype` may be followed by where it comes from."""
    item = _item_bytes(dtype.split()[0])

    def columns(model: ModelConfig, layout: Layout, ranks: Iterable[int]) -> dict[str, list[str]]:
        length = engine.max_model_len or model.max_position_embeddings
        full = f"kv of {engine.max_num_seqs} x {length}"
        weights = max(local_elements(model, layout, one) for one in layout.ranks[: layout.tp * layout.pp])
        captures = not engine.enforce_eager
        found: dict[str, list[str]] = {"weights": [], "kv a token": [], full: [], "activations": []}
        for rank in ranks:
            memory = RankMemory(model, layout, rank, item, kv_cache_dtype=engine.kv_cache_dtype)
            rows = engine.max_num_seqs
            token = memory.kv_block(1)
            beside = memory.beside(engine, stage_weights=weights, captures=captures, longest=length)
            found["weights"].append(format_bytes(memory.weights))
            found["kv a token"].append(format_bytes(token))
            if model.has_states:
                found.setdefault("states of a sequence", []).append(format_bytes(memory.sequence))
            found[full].append(format_bytes(token * length * rows))
            for name in ("activations", "logits", "rows", *(["graphs"] if captures else [])):
                found.setdefault(name, []).append(format_bytes(getattr(beside, name)))
        return found

    notes = [
        f"numbers are {dtype}; weights are exact; activations and logits are upper estimates, for "
        f"{engine.max_num_batched_tokens} tokens a step"
        + ("" if engine.enforce_eager else ", and graphs, which only GPUs have, of decode steps"),
        "the KV cache takes what is left of the memory, and never more than the work needs",
        *([f"no prefix caching and no swapping: {STATES_NOTE}"] if model.has_states else []),
    ]
    return columns, notes


def _training_columns(stage: int, dtype: str, adapter: AdapterTable | None) -> tuple[Columns, list[str]]:
    """Bytes of weights, gradients and optimizer state on each rank, see `TrainingMemory`."""
    item = _item_bytes(dtype)

    def columns(model: ModelConfig, layout: Layout, ranks: Iterable[int]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"weights": [], "gradients": [], "optimizer": []}
        for rank in ranks:
            state = TrainingMemory(model, layout, rank, item, stage, gradient_bytes=item, adapter=adapter).state()
            for name, cells in found.items():
                cells.append(format_bytes(getattr(state, name)))
        return found

    notes = [
        f"numbers are {dtype}; the optimizer keeps float32 weights and two moments, cut over dp",
        "activations are not counted",
    ]
    if adapter is not None:
        count = local_elements(adapter, Layout(), 0)
        notes.append(f"adapters of {count:,} numbers train; the weights are frozen: no gradients, no optimizer of them")
    return columns, notes


def _item_bytes(dtype: str) -> int:
    return DTYPE_BYTES[SAFETENSORS[dtype]]


def _range(lo: int, hi: int) -> str:
    if hi <= lo:
        return "-"
    return str(lo) if hi == lo + 1 else f"{lo}-{hi - 1}"
