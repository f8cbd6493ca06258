"""The rules of a training config's own sections."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalite.config.chat import section_problems
from megalite.config.schema import (
    DataSection,
    HybridConfig,
    OptimizerSection,
    TrainConfig,
    TrainOutputSection,
    TrainSection,
)
from megalite.config.typecheck import ModelFacts, Rules, nearest_path, problem
from megalite.errors import Problem

BYTE_TOKENS = 256
"""A byte-level tokenizer has a token for each byte."""

DEEPSPEED_KEYS = {
    "train_batch_size": "train.micro_batch_size, train.gradient_accumulation_steps and parallel.dp",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.gradient_clipping",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "steps_per_print": "train.log_every",
    "data_types": "optimizer.gradient_dtype",
    "communication_data_type": "optimizer.gradient_dtype",
    "zero_allow_untested_optimizer": "megalite itself",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
}
"""Keys of DeepSpeed's config that follow from ours, and from which."""


def train_problems(config: TrainConfig, model: ModelFacts | None) -> list[Problem]:
    """Every rule that the sections of a training config break among themselves."""
    found = learning_problems(config, model, steps=config.train.steps, steps_are="train.steps")
    return found + data_problems(config.data, model) + _train_problems(config.train)


def learning_problems(
    config: TrainConfig | HybridConfig, model: ModelFacts | None, *, steps: int, steps_are: str
) -> list[Problem]:
    """The rules of the sections that every job which trains has; `steps`: optimizer steps, and what they are called."""
    found = _model_problems(config, model) + _optimizer_problems(config.optimizer, steps, steps_are)
    if config.optimizer.gradient_dtype != "float32" and config.model.dtype == "float32":
        fix = "Leave it out, or train in bfloat16."
        rule = "model.dtype is float32, and so are its gradients"
        found.append(problem("optimizer.gradient_dtype", rule, config.optimizer.gradient_dtype, fix))
    found += [
        problem(f"deepspeed.{key}", f"is set by {ours}", value, "Leave it out here.")
        for key, ours in DEEPSPEED_KEYS.items()
        if (value := _inside(config.deepspeed, key)) is not None
    ]
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        found.append(problem("deepspeed.zero_optimization", "must be a mapping", zero))
    return found + output_problems(config.output)


def output_problems(output: TrainOutputSection) -> list[Problem]:
    """What is wrong with where a trained model goes."""
    found = []
    if output.folder is None:
        fix = "Set output.folder to where the model and the training state go."
        found.append(Problem(key="output.folder", rule="is needed", fix=fix))
    if output.tensorboard and find_spec("tensorboard") is None:
        fix = "pip install tensorboard, or leave it null."
        found.append(problem("output.tensorboard", "TensorBoard is not installed", output.tensorboard, fix))
    return found


def _inside(tree: dict[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _model_problems(config: TrainConfig | HybridConfig, model: ModelFacts | None) -> list[Problem]:
    found = []
    section, tokenizer = config.model, config.tokenizer
    if section.path is None and section.config is None:
        fix = "Set model.config to the shape of a new model, or model.path to a folder to go on from."
        found.append(Problem(key="model", rule="there is no model to train", fix=fix))
    if section.path is not None and section.config is not None:
        fix = "Keep one: the folder brings its own shape."
        found.append(problem("model.config", "there is a model.path too", section.config, fix))
    std = (section.config or {}).get("initializer_range", 1.0)
    if type(std) not in (int, float) or not 0 < std <= 1:
        found.append(problem("model.config.initializer_range", "must be a number above 0 and at most 1", std))
    weight = section.router_aux_loss_coef
    if weight is not None and weight < 0:
        found.append(problem("model.router_aux_loss_coef", "must be >= 0, or null for what config.json says", weight))
    if section.path is not None and not Path(section.path).is_dir():
        found.append(problem("model.path", "no such folder", section.path, nearest_path(section.path, folders=True)))
    if tokenizer.path is not None:
        if not (Path(tokenizer.path) / "tokenizer.json").is_file():
            found.append(problem("tokenizer.path", "must be a folder with tokenizer.json", tokenizer.path))
    elif section.path is not None:
        if Path(section.path).is_dir() and not (Path(section.path) / "tokenizer.json").is_file():
            fix = "Set it to the folder with the model's tokenizer.json."
            found.append(Problem(key="tokenizer.path", rule="is needed: model.path has no tokenizer", fix=fix))
    elif tokenizer.vocab_size <= BYTE_TOKENS:
        rule = f"must be above {BYTE_TOKENS}: one token a byte, and the special ones"
        found.append(problem("tokenizer.vocab_size", rule, tokenizer.vocab_size))
    elif model is not None and tokenizer.vocab_size > model.vocab_size:
        rule = f"must be at most model.config.vocab_size = {model.vocab_size}"
        found.append(problem("tokenizer.vocab_size", rule, tokenizer.vocab_size))
    return found


def data_problems(data: DataSection, model: ModelFacts | None) -> list[Problem]:
    """What is wrong with the section by itself; the files are looked at when it is right."""
    rules = Rules(data, "data.")
    if data.source != "stdlib" and not any(mark in data.source for mark in "*?["):
        there = bool(data.source) and Path(data.source).exists()
        rules.need("source", there, "must be stdlib, a file or folder that exists, or a glob")
    fix = 'Such as "**/*.py": names are relative to data.source.'
    rules.need("pattern", _relative_glob(data.pattern), "must be a relative glob", fix)
    for pattern in data.exclude:
        if not _relative_glob(pattern):
            found = problem("data.exclude", "must hold globs of relative names", pattern, "Such as test/* or *_pb2.py.")
            rules.problems.append(found)
    rules.need("held_out", 0 < data.held_out < 1, "must be above 0 and below 1")
    if rules.need("sequence_length", data.sequence_length >= 2, "must be >= 2 tokens") and model is not None:
        most = model.max_position_embeddings
        rules.need("sequence_length", data.sequence_length <= most, f"the model has {most} positions")
    rules.need("seed", 0 <= data.seed < 2**63, "must be between 0 and 2^63 - 1")
    return rules.problems + section_problems(data, "data.")


def _relative_glob(pattern: str) -> bool:
    """Whether it can match a name relative to the source."""
    return bool(pattern) and not pattern.startswith(("/", "./", "../"))


def _optimizer_problems(optimizer: OptimizerSection, steps: int, steps_are: str) -> list[Problem]:
    rules = Rules(optimizer, "optimizer.")
    if rules.need("learning_rate", optimizer.learning_rate > 0, "must be above 0"):
        rule = f"must be between 0 and learning_rate = {optimizer.learning_rate}"
        rules.need("min_learning_rate", 0 <= optimizer.min_learning_rate <= optimizer.learning_rate, rule)
    if rules.need("warmup_steps", optimizer.warmup_steps >= 0, "must be >= 0"):
        rule = f"must be at most {steps_are} = {steps}"
        rules.need("warmup_steps", optimizer.warmup_steps <= max(steps, 1), rule)
    rules.need("weight_decay", optimizer.weight_decay >= 0, "must be >= 0")
    two = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
    rules.need("betas", two, "must be two numbers, each at least 0 and below 1")
    rules.need("eps", optimizer.eps > 0, "must be above 0")
    rules.need("gradient_clipping", optimizer.gradient_clipping >= 0, "must be >= 0", "0 is no clipping.")
    return rules.problems


def _train_problems(train: TrainSection) -> list[Problem]:
    rules = Rules(train, "train.")
    for name in ("steps", "micro_batch_size", "gradient_accumulation_steps", "eval_every", "eval_batches"):
        rules.need(name, getattr(train, name) >= 1, "must be >= 1")
    for name in ("save_every", "log_every"):
        rules.need(name, getattr(train, name) >= 1, "must be >= 1 step")
    within = train.max_seconds is None or train.max_seconds > 0
    rules.need("max_seconds", within, "must be above 0, or null to run all steps")
    rules.need("sample_prompts", all(train.sample_prompts), "must not hold an empty text")
    rules.need("patience", train.patience is None or train.patience >= 1, "must be >= 1, or null to run all steps")
    rules.need("seed", 0 <= train.seed < 2**63, "must be between 0 and 2^63 - 1")
    return rules.problems
