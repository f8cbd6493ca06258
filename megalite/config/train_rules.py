"""The rules of a training config's own sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalite.config.chat import section_problems
from megalite.config.rules import ModelFacts, Rules
from megalite.config.schema import DataSection, HybridConfig, LoraSection, NewModelSection, TrainConfig
from megalite.config.typecheck import nearest_path, problem
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
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "steps_per_print": "train.log_every",
    "data_types": "optimizer.gradient_dtype",
    "communication_data_type": "optimizer.gradient_dtype",
    "zero_allow_untested_optimizer": "megalite itself",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "gradient_allreduce_op": "megalite itself",
    "managed_gradient_accumulation": "megalite itself",
    "activation_checkpointing": "train.recompute",
    "checkpoint": "train.save_every",
    "data_efficiency": "the data section",
    "dataloader_drop_last": "the data section",
    "expert_parallel": "parallel.tp",
}
"""Keys of DeepSpeed's config that follow from ours, and from which."""
DEEPSPEED_PASSED = (
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "aio", "prescale_gradients", "gradient_predivide_factor"),
    *(
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "timers",
        "flops_profiler",
        "comms_logger",
        "log_level",
    ),
    *("tensorboard", "wandb", "csv_monitor", "comet", "disable_python_gc", "disable_allgather"),
    "weight_quantization",
)
"""Keys that DeepSpeed gets as they are; it passes over all others, with their misprints."""

_TARGETS = "must be all-linear, a list of names such as [q_proj, v_proj], or a regular expression for whole names"
_NO_BASE = "asks for adapters, which are trained beside a model that there is"


def train_rules(rules: Rules, model: ModelFacts | None) -> None:
    """What the sections of a training config must obey among themselves."""
    train = rules.section.train
    learning_rules(rules, model, steps=train.steps, steps_are="train.steps")
    _data_rules(rules.at("data"), model)
    rules.at("train").need("sample_prompts", all(train.sample_prompts), "must not hold an empty text")


def learning_rules(rules: Rules, model: ModelFacts | None, *, steps: int, steps_are: str) -> None:
    """Rules of the sections that all training jobs have; `steps`: optimizer steps, `steps_are`: their name."""
    config: TrainConfig | HybridConfig = rules.section
    _model_rules(rules, model)
    optimizer = rules.at("optimizer")
    least, peak = config.optimizer.min_learning_rate, config.optimizer.learning_rate
    if optimizer.sound("learning_rate"):
        optimizer.need("min_learning_rate", least <= peak, f"must be between 0 and learning_rate = {peak}")
    if rules.sound(steps_are):
        late = f"must be at most {steps_are} = {steps}"
        optimizer.need("warmup_steps", config.optimizer.warmup_steps <= max(steps, 1), late)
    optimizer.need("betas", len(config.optimizer.betas) == 2, "must be two numbers, each at least 0 and below 1")
    fits = config.optimizer.gradient_dtype == "float32" or config.model.dtype != "float32"
    rule, fix = "model.dtype is float32, and so are its gradients", "Leave it out, or train in bfloat16."
    optimizer.need("gradient_dtype", fits, rule, fix)
    rules.problems += _deepspeed_problems(config.deepspeed)
    _lora_rules(rules.at("train.lora"), config.model, is_hybrid=isinstance(config, HybridConfig))
    there = not config.output.tensorboard or find_spec("tensorboard") is not None
    fix = "pip install tensorboard, or leave it null."
    rules.at("output").need("tensorboard", there, "TensorBoard is not installed", fix)


def _deepspeed_problems(section: Mapping[str, Any]) -> list[Problem]:
    """Of keys that are set by ours, and of those that DeepSpeed would pass over."""
    found = [
        problem(f"deepspeed.{key}", f"is set by {ours}", value, "Leave it out here.")
        for key, ours in DEEPSPEED_KEYS.items()
        if (value := _inside(section, key)) is not None
    ]
    for key, value in section.items():
        if key not in DEEPSPEED_PASSED and not any(key == one.partition(".")[0] for one in DEEPSPEED_KEYS):
            near = get_close_matches(key, (*DEEPSPEED_PASSED, *DEEPSPEED_KEYS), n=1)
            fix = f"Did you mean deepspeed.{near[0]}?" if near else "Leave it out."
            rule = "is no key of DeepSpeed's that has an effect on a training step"
            found.append(problem(f"deepspeed.{key}", rule, value, fix))
    if not isinstance(zero := section.get("zero_optimization", {}), dict):
        found.append(problem("deepspeed.zero_optimization", "must be a mapping", zero))
    return found


def _lora_rules(rules: Rules, model: NewModelSection, *, is_hybrid: bool) -> None:
    lora: LoraSection = rules.section
    usual = {one.name: getattr(LoraSection(), one.name) for one in fields(LoraSection)}
    given = [name for name in usual if getattr(lora, name) != usual[name] and name not in ("r", "path")]
    for name in given:
        rules.need(name, lora.is_asked, "is of adapters, and there are none", "Set r, their rank, too.")
        rules.need(name, lora.path is None or name == "lora_dropout", "is the adapter's own in path", "Leave it out.")
    rules.need("r", lora.r is None or lora.path is None, "is the adapter's own in path", "Leave it out.")
    rule = "must be 0 in a hybrid job: samples are drawn without it, and probabilities would not be comparable"
    rules.need("lora_dropout", not is_hybrid or lora.lora_dropout == 0, rule, "Leave it 0.")
    targets = lora.target_modules
    named = isinstance(targets, list) and targets and all(isinstance(one, str) and one for one in targets)
    rules.need("target_modules", bool(named or (isinstance(targets, str) and targets)), _TARGETS)
    rules.note("target_modules", _pattern_problem(rules, targets))
    if lora.path is not None:
        there = Path(lora.path).is_dir()
        rules.need("path", there, "must be a folder as PEFT saves adapters", "" if there else nearest_path(lora.path))
    fix = "Set model.path to the folder of the model beside which they are to be trained."
    rules.need("path" if lora.path else "r", not lora.is_asked or model.path is not None, _NO_BASE, fix)


def _pattern_problem(rules: Rules, targets: Any) -> Problem | None:
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        return problem(f"{rules.prefix}target_modules", f"must be a regular expression: {error}", targets)
    return None


def _inside(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _model_rules(rules: Rules, model: ModelFacts | None) -> None:
    model_rules, tokenizer_rules = rules.at("model"), rules.at("tokenizer")
    section, tokenizer = model_rules.section, tokenizer_rules.section
    if section.path is None and section.config is None:
        fix = "Set model.config to the shape of a new model, or model.path to a folder to go on from."
        rules.problems.append(Problem(key="model", rule="there is no model to train", fix=fix))
    twice = section.path is not None and section.config is not None
    model_rules.need("config", not twice, "there is a model.path too", "Keep one: the folder brings its own shape.")
    std = (section.config or {}).get("initializer_range", 1.0)
    if type(std) not in (int, float) or not 0 < std <= 1:
        rule = "must be a number above 0 and at most 1"
        rules.problems.append(problem("model.config.initializer_range", rule, std))
    folder = None if section.path is None else Path(section.path)
    if folder is not None and not folder.is_dir():
        model_rules.need("path", False, "no such folder", nearest_path(folder, folders=True))
    if tokenizer.path is not None:
        there = (Path(tokenizer.path) / "tokenizer.json").is_file()
        tokenizer_rules.need("path", there, "must be a folder with tokenizer.json")
    elif folder is not None:
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            rule = "is needed: model.path has no tokenizer"
            fix = "Set it to the folder with the model's tokenizer.json."
            rules.problems.append(Problem(key="tokenizer.path", rule=rule, fix=fix))
    else:
        rule = f"must be above {BYTE_TOKENS}: one token a byte, and the special ones"
        tokenizer_rules.need("vocab_size", tokenizer.vocab_size > BYTE_TOKENS, rule)
        most = tokenizer.vocab_size if model is None else model.vocab_size
        rule = f"must be at most model.config.vocab_size = {most}"
        tokenizer_rules.need("vocab_size", tokenizer.vocab_size <= most, rule)


def data_problems(data: DataSection) -> list[Problem]:
    """What is wrong with the section by itself; the files are looked at when it is right."""
    rules = Rules(data, "data.")
    _data_rules(rules, None)
    return rules.problems


def _data_rules(rules: Rules, model: ModelFacts | None) -> None:
    data: DataSection = rules.section
    there = data.source == "stdlib" or any(mark in data.source for mark in "*?[")
    there = there or (bool(data.source) and Path(data.source).exists())
    rules.need("source", there, "must be stdlib, a file or folder that exists, or a glob")
    fix = 'Such as "**/*.py": names are relative to data.source.'
    rules.need("pattern", _relative_glob(data.pattern), "must be a relative glob", fix)
    fix = "Such as test/* or *_pb2.py."
    rules.need("exclude", all(map(_relative_glob, data.exclude)), "must hold globs of relative names", fix)
    if model is not None:
        most = model.max_position_embeddings
        rules.need("sequence_length", data.sequence_length <= most, f"the model has {most} positions")
    rules.problems += section_problems(data, rules.prefix)


def _relative_glob(pattern: str) -> bool:
    """Whether it can match a name relative to the source."""
    return bool(pattern) and not pattern.startswith(("/", "./", "../"))
