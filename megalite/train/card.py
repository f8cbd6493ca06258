"""The model card of a trained model: its shape, training text and settings, held-out loss, and samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalite.config.schema import TrainConfig
from megalite.model.config import ModelConfig
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.train.data.prepared import Corpus
from megalite.weights.adapter_table import AdapterTable
from megalite.weights.table import Weights, hf_shapes

SAMPLE_TOKENS = 160
SAMPLE_TEMPERATURE = 0.5
CURVE_ROWS = 12
PSF_LICENCE = "https://docs.python.org/3/license.html"
LICENCE = ("license", "license_name", "license_link")
"""Keys of a model card's front matter."""
FRONT_MATTER_BYTES = 1 << 16
"""Leading bytes of a card in which its front matter is looked for."""


@dataclass
class RunHistory:
    """What a run has read and how it was evaluated; saved with the weights.

    There is no state of a random generator to save: new weights follow from train.seed, the order of the data from
    data.seed and the number of sequences read, and nothing else in training is random.
    """

    sequences: int = 0
    """Training sequences read; counted, because the number in a step changes with the layout."""
    tokens: int = 0
    """Tokens of the sequences."""
    best_loss: float | None = None
    """Lowest held-out loss. It and the next four fields are of the exported weights."""
    best_step: int = 0
    best_sequences: int = 0
    best_tokens: int = 0
    evaluations_since_best: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """step, loss and bits_per_byte of each."""


def bits_per_byte(loss: float, corpus: Corpus) -> float:
    """Held-out nats per token as bits per byte of held-out text: comparable between tokenizers."""
    return loss / math.log(2) * corpus.held_out_tokens_per_byte


def licence_of(folder: Path) -> dict[str, Any]:
    """What the model card in a folder says of its licence, by the keys of a card's front matter; empty if nothing."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            found = re.match(r"\ufeff?---\s*\n(.*?)\n---", file.read(FRONT_MATTER_BYTES), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        values = None
    kept = {key: values[key] for key in LICENCE if values.get(key)} if isinstance(values, dict) else {}
    if not kept and (folder / "LICENSE").is_file():
        return {"license": "other", "license_name": "of-the-base-model", "license_link": "LICENSE"}
    return kept


def write(
    config: TrainConfig,
    model: ModelConfig,
    corpus: Corpus,
    history: RunHistory,
    *,
    steps_run: int,
    loss: float,
    samples: Sequence[tuple[str, str]],
    base_licence: dict[str, Any],
    adapter: AdapterTable | None = None,
) -> str:
    """The card of the exported model, or of an adapter beside it, in Markdown.

    `loss`: of its weights as stored, held-out nats per token; `samples`: prompts and completions; `base_licence`:
    `licence_of` the model that was trained further, empty for a new one.
    """
    count = _count(model)
    title = f"A {_size(count)}-parameter {model.family} model"
    if adapter is not None:
        title = f"A LoRA adapter of {_size(_count(adapter))} parameters for {title.replace('A ', 'a ', 1)},"
    optimizer, step, tokens = config.optimizer, history.best_step, history.best_tokens
    epochs, per_step = tokens / corpus.facts["splits"]["train"]["tokens"], tokens // max(1, step)
    attention, mlp = next(iter(model.of(SoftmaxAttention)), None), next(iter(model.of(DenseMLP)), None)
    heads = (
        f"{attention.heads} query, {attention.kv_heads} key/value, {attention.head_dim} wide" if attention else "none"
    )
    shape = [
        ("parameters", f"{count:,}"),
        *([("of the adapter", f"{_count(adapter):,}"), ("beside", _beside(adapter))] if adapter else []),
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("heads", heads),
        *([("MLP width", mlp.intermediate_size)] if mlp else []),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_position_embeddings:,} tokens"),
    ]
    curve = [(row["step"], f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}") for row in _curve(history.evaluations)]
    parts = [
        front_matter(config, base_licence),
        f"# {title} trained with megalite\n\n{_summary(config)}\n",
        f"## Shape\n\n{_table(('', ''), shape)}",
        f"## Text\n\n{_text(config, corpus)}",
        "## Training\n\n"
        f"{step:,} steps of {per_step:,} tokens ({tokens:,} tokens, {epochs:.1f} times the training text), AdamW, "
        f"learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}, {config.model.dtype} "
        f"with float32 optimizer state, DeepSpeed ZeRO-{config.train.zero_stage}. The run took {steps_run:,} steps; "
        "these are the weights with the lowest held-out loss.\n\n"
        f"**Held-out loss: {loss:.4f} nats per token, {bits_per_byte(loss, corpus):.4f} bits per byte**, of the "
        f"weights as they are stored here.\n\n{_table(('step', 'held-out loss', 'bits per byte'), curve)}",
        _samples(config, corpus, samples),
    ]
    return "\n".join(parts)


def _count(weights: Weights) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(weights).values())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count / 1e3:.0f}K"


def _beside(adapter: AdapterTable) -> str:
    ranks = sorted({module.rank for module in adapter.modules})
    return f"{', '.join(sorted({module.short for module in adapter.modules}))}; rank {', '.join(map(str, ranks))}"


def front_matter(config: TrainConfig, base_licence: dict[str, Any]) -> str:
    """A model trained further is under its base's licence; what is not known is not claimed."""
    stdlib = config.data.source == "stdlib"
    new = {"license": "other", "license_name": "psf-2.0", "license_link": PSF_LICENCE} if stdlib else {}
    licence = (base_licence if config.model.path is not None else new) or {"license": "unknown"}
    adapts = config.train.lora.is_asked
    base = {"base_model": config.model.path} if adapts else {}
    library = "peft" if adapts else "transformers"
    values = {**licence, **base, "library_name": library, "pipeline_tag": "text-generation"}
    if stdlib:
        values["tags"] = ["code", "python"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"|{''.join(f' {cell} |' if cell != '' else ' |' for cell in line)}\n" for line in lines)


def _summary(config: TrainConfig) -> str:
    if config.data.source == "stdlib":
        return (
            "It has read nothing but the Python standard library and writes text that looks like it. It is small "
            "enough to run on any computer, which is its purpose: to show and test megalite with a real model. Do not "
            "expect the code it writes to be right, or instructions to be followed."
        )
    if config.model.path is not None:
        if config.train.lora.is_asked:
            return f"It belongs beside `{config.model.path}`, and was trained on `{config.data.source}`."
        return f"`{config.model.path}`, trained further on `{config.data.source}`."
    return f"Trained from scratch on `{config.data.source}`."


def _text(config: TrainConfig, corpus: Corpus) -> str:
    if config.data.source == "stdlib":
        what = (
            f"The standard library's own source as it comes with {corpus.facts['python']}: `{config.data.pattern}`. It "
            f"is under the [PSF License Version 2]({PSF_LICENCE}), and this model is given on the same terms."
        )
    else:
        what = f"The files of `{config.data.source}`. The licence of that text decides how this model may be used."
    if config.data.exclude:
        what += f" Left out: {', '.join(f'`{pattern}`' for pattern in config.data.exclude)}."
    if corpus.is_text:
        what += " Files are kept for evaluation by a hash of their name, lines of files by a hash of what they hold."
        head = ("", "documents", "bytes", "tokens")
    else:
        what += " Examples are kept for evaluation by a hash of what they hold; the loss is on responses only."
        head = ("", "examples", "bytes of responses", "tokens")
    rows = [
        (title, *(f"{corpus.facts['splits'][name][key]:,}" for key in ("documents", "bytes", "tokens")))
        for title, name in (("training", "train"), ("held out", "held_out"))
    ]
    own = config.tokenizer.path is None and config.model.path is None
    tokenizer = "The tokenizer is a byte-level BPE trained on the training files.\n" if own else ""
    return f"{what}\n\n{_table(head, rows)}\n{tokenizer}"


def _curve(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_ROWS of the evaluations, evenly chosen, the last and the best among them."""
    if not evaluations:
        return []
    last = len(evaluations) - 1
    chosen = {round(i * last / (CURVE_ROWS - 2)) for i in range(CURVE_ROWS - 1)}
    chosen.add(min(range(len(evaluations)), key=lambda i: evaluations[i]["loss"]))
    return [evaluations[i] for i in sorted(chosen)]


def _samples(config: TrainConfig, corpus: Corpus, samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return ""
    head = f"## Samples\n\nTemperature {SAMPLE_TEMPERATURE}, up to {SAMPLE_TOKENS} tokens, the first try of each.\n"
    data = config.data
    files = data.pattern if data.source == "stdlib" or Path(data.source).is_dir() else data.source
    language = "python" if corpus.is_text and files.endswith(".py") else ""
    return head + "".join(f"\n{fenced(prompt + completion, language)}" for prompt, completion in samples)


def fenced(text: str, language: str) -> str:
    """A block of code in Markdown, behind a fence that does not occur in it."""
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"
