"""The model card of a trained model: what it is, what it has read, how well it predicts, and what it writes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalite.config.schema import TrainConfig
from megalite.model.config import ModelConfig
from megalite.train.data.prepared import Corpus
from megalite.weights.table import hf_shapes

SAMPLE_TOKENS = 160
SAMPLE_TEMPERATURE = 0.5
CURVE_ROWS = 12
PSF_LICENCE = "https://docs.python.org/3/license.html"
LICENCE = ("license", "license_name", "license_link")
"""Keys of a model card's front matter."""
FRONT_MATTER_BYTES = 1 << 16
"""Within which a card's front matter is looked for."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the card reports of the exported model."""

    step: int
    """Optimizer step of its weights."""
    steps_run: int
    tokens: int
    """Training tokens up to `step`."""
    loss: float
    """Held-out nats per token."""
    evaluations: list[dict[str, Any]]
    """step, loss and bits_per_byte of each evaluation."""
    samples: list[tuple[str, str]]
    """Prompt and completion."""


def bits_per_byte(loss: float, corpus: Corpus) -> float:
    """Held-out nats per token as bits per byte of held-out text: comparable between tokenizers."""
    return loss / math.log(2) * corpus.held_out_tokens_per_byte


def num_parameters(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(model).values())


def licence_of(folder: Path) -> dict[str, Any]:
    """What the model card in a folder says of its licence, by the keys of a card's front matter; empty if nothing."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(FRONT_MATTER_BYTES)
        found = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        values = None
    kept = {key: values[key] for key in LICENCE if values.get(key)} if isinstance(values, dict) else {}
    if not kept and (folder / "LICENSE").is_file():
        return {"license": "other", "license_name": "of-the-base-model", "license_link": "LICENSE"}
    return kept


def write(config: TrainConfig, model: ModelConfig, corpus: Corpus, result: Result, base_licence: dict[str, Any]) -> str:
    """The card, in Markdown. `base_licence`: `licence_of` the model that was trained further; empty for a new one."""
    parts = [
        _front_matter(config, base_licence),
        f"# {_title(model)}\n\n{_summary(config)}",
        _shape(model),
        _data(config, corpus),
        _training(config, model, corpus, result),
        _samples(config, corpus, result),
    ]
    return "\n".join(parts)


def _title(model: ModelConfig) -> str:
    count = num_parameters(model)
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count / 1e3:.0f}K"
    return f"A {size}-parameter {model.family} model trained with megalite"


def _front_matter(config: TrainConfig, base_licence: dict[str, Any]) -> str:
    """A model trained further is under its base's licence; what is not known is not claimed."""
    stdlib = config.data.source == "stdlib"
    new = {"license": "other", "license_name": "psf-2.0", "license_link": PSF_LICENCE} if stdlib else {}
    licence = (base_licence if config.model.path is not None else new) or {"license": "unknown"}
    values = {**licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if stdlib:
        values["tags"] = ["code", "python"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _summary(config: TrainConfig) -> str:
    if config.data.source == "stdlib":
        return (
            "It has read nothing but the Python standard library and writes text that looks like it. It is small "
            "enough to run on any computer, which is its purpose: to show and test megalite with a real model. Do not "
            "expect the code it writes to be right, or instructions to be followed.\n"
        )
    if config.model.path is not None:
        return f"`{config.model.path}`, trained further on `{config.data.source}`.\n"
    return f"Trained from scratch on `{config.data.source}`.\n"


def _shape(model: ModelConfig) -> str:
    return (
        "## Shape\n\n| | |\n| --- | --- |\n"
        f"| parameters | {num_parameters(model):,} |\n| layers | {model.num_layers} |\n"
        f"| hidden size | {model.hidden_size} |\n"
        f"| heads | {model.num_heads} query, {model.num_kv_heads} key/value, {model.head_dim} wide |\n"
        f"| MLP width | {model.intermediate_size} |\n| vocabulary | {model.vocab_size:,} |\n"
        f"| context | {model.max_position_embeddings:,} tokens |\n"
    )


def _data(config: TrainConfig, corpus: Corpus) -> str:
    train, held_out = (corpus.facts["splits"][name] for name in ("train", "held_out"))
    if config.data.source == "stdlib":
        what = (
            f"The standard library's own source as it comes with {corpus.facts['python']}: `{config.data.pattern}`. It "
            f"is under the [PSF License Version 2]({PSF_LICENCE}), and this model is given on the same terms."
        )
    else:
        what = f"The files of `{config.data.source}`. The licence of that text decides how this model may be used."
    excluded = ", ".join(f"`{pattern}`" for pattern in config.data.exclude)
    left_out = f" Left out: {excluded}." if excluded else ""
    if corpus.facts["format"] == "examples":
        kept = "Examples are kept for evaluation by a hash of what they hold; the loss is on responses only."
        columns = ("examples", "bytes of responses", "tokens")
    else:
        kept = "Files are kept for evaluation by a hash of their name, lines of files by a hash of what they hold."
        columns = ("documents", "bytes", "tokens")
    own = config.tokenizer.path is None and config.model.path is None
    tokenizer = "The tokenizer is a byte-level BPE trained on the training files.\n" if own else ""
    return (
        f"## Text\n\n{what}{left_out} {kept}\n\n| | {' | '.join(columns)} |\n| --- | --- | --- | --- |\n"
        f"| training | {train['documents']:,} | {train['bytes']:,} | {train['tokens']:,} |\n"
        f"| held out | {held_out['documents']:,} | {held_out['bytes']:,} | {held_out['tokens']:,} |\n\n{tokenizer}"
    )


def _training(config: TrainConfig, model: ModelConfig, corpus: Corpus, result: Result) -> str:
    optimizer, epochs = config.optimizer, result.tokens / corpus.facts["splits"]["train"]["tokens"]
    per_step = result.tokens // max(1, result.step)
    return (
        "## Training\n\n"
        f"{result.step:,} steps of {per_step:,} tokens ({result.tokens:,} tokens, {epochs:.1f} times the training "
        f"text), AdamW, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}, "
        f"{config.model.dtype} with float32 optimizer state, DeepSpeed ZeRO-{config.train.zero_stage}. The run took "
        f"{result.steps_run:,} steps; these are the weights with the lowest held-out loss.\n\n"
        f"**Held-out loss: {result.loss:.4f} nats per token, {bits_per_byte(result.loss, corpus):.4f} bits per byte**, "
        "of the weights as they are stored here.\n\n"
        "| step | held-out loss | bits per byte |\n| --- | --- | --- |\n" + _curve(result.evaluations)
    )


def _curve(evaluations: list[dict[str, Any]]) -> str:
    """At most CURVE_ROWS rows, evenly chosen, the last and the best among them."""
    if not evaluations:
        return ""
    last = len(evaluations) - 1
    chosen = {round(i * last / (CURVE_ROWS - 2)) for i in range(CURVE_ROWS - 1)}
    chosen.add(min(range(len(evaluations)), key=lambda i: evaluations[i]["loss"]))
    rows = [evaluations[i] for i in sorted(chosen)]
    return "".join(f"| {row['step']} | {row['loss']:.4f} | {row['bits_per_byte']:.4f} |\n" for row in rows)


def _samples(config: TrainConfig, corpus: Corpus, result: Result) -> str:
    if not result.samples:
        return ""
    head = f"## Samples\n\nTemperature {SAMPLE_TEMPERATURE}, up to {SAMPLE_TOKENS} tokens, the first try of each.\n"
    data = config.data
    files = data.pattern if data.source == "stdlib" or Path(data.source).is_dir() else data.source
    language = "python" if corpus.facts["format"] == "text" and files.endswith(".py") else ""
    return head + "".join(f"\n{_fenced(prompt + completion, language)}" for prompt, completion in result.samples)


def _fenced(text: str, language: str) -> str:
    """A block of code in Markdown, behind a fence that does not occur in it."""
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"
