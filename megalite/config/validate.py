"""Every rule that config values must obey together: with each other, the model, the machine and the number of ranks.

All problems are found at once, before a weight is read or torch imported.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megalite.config.chat import section_problems
from megalite.config.hybrid_rules import hybrid_rules
from megalite.config.hybrid_rules import num_ranks as hybrid_ranks
from megalite.config.parallel_rules import generating_layout_rules, layout_rules, training_layout_rules
from megalite.config.rules import ModelFacts, Rules
from megalite.config.sampling import price_problem, prompt_problem, sampling_rules
from megalite.config.schema import (
    Config,
    DistributedSection,
    EngineSection,
    GeneratingConfig,
    HybridConfig,
    InferConfig,
    InputSection,
    ModelSection,
    OutputSection,
    ParallelSection,
    ServeConfig,
    TrainConfig,
)
from megalite.config.train_rules import learning_rules, train_rules
from megalite.config.typecheck import nearest_path, printable, problem
from megalite.errors import Problem
from megalite.files import open_regular

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_QUANTIZATIONS = {
    "squeezellm": "its kernels exist for CUDA only and are unmaintained, and vLLM removed it in 2024",
    "marlin": "it is a kernel of vLLM's; the formats that it runs are read by their own names",
    "bitsandbytes": "it needs a CUDA-only library and its own kernels",
    "gguf": "it is a file format of llama.cpp's; only safetensors are read",
    "int8": "only fp8 is made while a model is loaded; megalite convert --quantize int8 writes a checkpoint",
}
_FORMATS = ("fp8", "gptq", "awq", "compressed-tensors", "mxfp4")
"""What checkpoints may be stored as, by `quant_method`; fp8 is also made from weights that are not quantized."""


def validate(config: Config, model: ModelFacts | None, world_size: int | None) -> list[Problem]:
    """Every rule that `config` breaks; empty when it can run.

    `model`: what the model folder says, where it is known. `world_size`: ranks started; None before there are any.
    """
    rules = Rules(config)
    _writable_rule(rules.at("monitor"), "timeline")
    rule, fix = "needs rich", "pip install 'megalite[live]'"
    rules.at("monitor").need("live", not config.monitor.live or find_spec("rich") is not None, rule, fix)
    serves = isinstance(config, ServeConfig) and config.monitor.live
    rules.at("monitor").need("live", not serves, "is for jobs; a server shows this on its page", "Leave it false.")
    if isinstance(config, GeneratingConfig):
        _inference_rules(rules, model)
        _writable_rule(rules.at("monitor"), "status_file")
        _lora_rules(rules, config)
        if isinstance(config, InferConfig):
            _input_rules(rules.at("input"), model)
            _output_rules(rules.at("output"), config.input)
    else:
        _distributed_rules(rules.at("distributed"))
        _writable_rule(rules.at("output"), "folder", is_folder=True)
    if isinstance(config, TrainConfig):
        train_rules(rules, model)
        layout_rules(rules.at("parallel"), model)
        training_layout_rules(rules.at("parallel"), config.train.zero_stage, model, adapts=config.train.lora.is_asked)
    elif isinstance(config, HybridConfig):
        _hybrid_rules(rules, model)
    mismatch = world_size_problem(config, world_size)
    return rules.problems + ([mismatch] if mismatch else [])


def engine_problems(config: GeneratingConfig, model: ModelFacts | None) -> list[Problem]:
    """The rules for an engine by itself, without the input, output and ranks of a job."""
    rules = Rules(config)
    _inference_rules(rules, model)
    return rules.problems


def _lora_rules(rules: Rules, config: GeneratingConfig) -> None:
    own = [*(config.server.model_names or []), config.model.path] if isinstance(config, ServeConfig) else []
    for name, folder in config.lora.items():
        if not name or not name.isprintable() or name in own:
            rule = "must name adapters by printable words that are not the model's"
            rules.problems.append(problem("lora", rule, name))
        elif not Path(folder).is_dir():
            rule = f"{name} must be a folder as PEFT saves adapters"
            rules.problems.append(problem("lora", rule, folder, nearest_path(folder)))


def _hybrid_rules(rules: Rules, model: ModelFacts | None) -> None:
    config: HybridConfig = rules.section
    steps = config.supervised.steps + config.hybrid.steps * config.hybrid.updates_per_step
    named = "supervised.steps + hybrid.steps * hybrid.updates_per_step"
    hybrid_rules(rules, model)
    learning_rules(rules, model, steps=steps, steps_are=named)
    train, infer = rules.at("train.parallel"), rules.at("infer.parallel")
    for side in (train, infer):
        layout_rules(side, model, first_rank=True)
    training_layout_rules(train, config.train.zero_stage, model, adapts=config.train.lora.is_asked)
    generating_layout_rules(infer)
    _engine_rules(rules.at("infer.engine"), model)
    _sampling_rules(rules, config.infer.engine, model, samples=config.hybrid.samples_per_prompt)


def _inference_rules(rules: Rules, model: ModelFacts | None) -> None:
    config: GeneratingConfig = rules.section
    _model_rules(rules.at("model"), model)
    layout_rules(rules.at("parallel"), model)
    generating_layout_rules(rules.at("parallel"))
    _engine_rules(rules.at("engine"), model)
    _sampling_rules(rules, config.engine, model)
    _distributed_rules(rules.at("distributed"))
    if config.model.dtype == "float16" and config.distributed.device == "cpu":
        rule = "float16 is for GPUs, and distributed.device is cpu"
        rules.problems.append(Problem(key="model.dtype", rule=rule, fix="Use float32 or bfloat16 on the CPU."))


def parallel_sections(config: Config) -> dict[str, ParallelSection]:
    """The layouts of a config, by their keys."""
    if isinstance(config, HybridConfig):
        return {"train.parallel": config.train.parallel, "infer.parallel": config.infer.parallel}
    return {"parallel": config.parallel}


def num_ranks(config: Config) -> int:
    """Ranks that the config's layout, or layouts, need."""
    if isinstance(config, HybridConfig):
        return hybrid_ranks(config.train.parallel, config.infer.parallel)
    return math.prod(config.parallel.sizes)


def layout_words(config: Config) -> str:
    """The layouts and the number of ranks, for messages: `tp=2,pp=1,dp=1: 2 ranks`."""

    def words(parallel: ParallelSection) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(("tp", "pp", "dp"), parallel.sizes, strict=True))

    count = num_ranks(config)
    if isinstance(config, HybridConfig):
        text = f"train {words(config.train.parallel)}, infer {words(config.infer.parallel)}"
    else:
        text = words(config.parallel)
    return f"{text}: {count} rank{'s' if count != 1 else ''}"


def world_size_problem(config: Config, world_size: int | None, started: str = "", command: str = "") -> Problem | None:
    """The problem when the ranks that were started are not those that the layout needs.

    `started`: how they were started, in words; `command`: what to type instead.
    """
    wanted = num_ranks(config)
    if world_size is None or wanted < 1 or wanted == world_size:
        return None
    started = started or f"{world_size} rank{'s were' if world_size != 1 else ' was'} started"
    fix = f"Type:\n  {command}" if command else f"Start {wanted}, or change parallel.tp, pp or dp."
    if isinstance(config, HybridConfig):
        return Problem(key="train, infer", rule=f"{started}, but the config asks for {layout_words(config)}", fix=fix)
    tp, pp, dp = config.parallel.sizes
    product = f"tp * pp * dp = {tp} * {pp} * {dp} = {wanted}"
    return Problem(key="parallel", rule=f"{started}, but the config asks for {product}", fix=fix)


# ---- the model ---------------------------------------------------------------------------------------------------


def model_location(path: str) -> Literal["folder", "hub"] | None:
    """What `model.path` names: something on disk, a hub id (`owner/name`), or neither.

    `owner/name` is a folder's name when there is a folder `owner` here: a misspelt local path is not looked up on the
    hub.
    """
    if path and Path(path).exists():
        return "folder"
    if not _HUB_ID.fullmatch(path) or ".." in path or "--" in path or path.endswith((".git", ".", "-")):
        return None
    return None if Path(path.partition("/")[0]).is_dir() else "hub"


def _model_rules(rules: Rules, facts: ModelFacts | None) -> None:
    model: ModelSection = rules.section
    if model.path is not None:
        rules.note("path", _path_problem(model.path))
        if model.revision is not None and model_location(model.path) == "folder":
            rules.refuse("revision", "is for a hub id, and model.path is a folder", "Leave it out.")
    if model.tokenizer is not None:
        folder = Path(model.tokenizer)
        fix = "" if folder.is_dir() else nearest_path(folder, folders=True)
        rules.need("tokenizer", folder.is_dir(), "no such folder", fix)
        rules.need("tokenizer", (folder / "tokenizer.json").is_file(), "has no tokenizer.json")
    if model.quantization is not None:
        _quantization_rule(rules, model.quantization, facts)
    if model.trust_remote_code:
        fix = "Register a family of your own from your own Python module and name it in model.family_module."
        rules.refuse("trust_remote_code", "is refused: code from a model folder is never run", fix)
    named = all(name.isidentifier() for name in (model.family_module or "x").split("."))
    fix = "Write it as in an import statement, e.g. mypackage.families."
    rules.need("family_module", named, "must be the name of a module", fix)


def _quantization_rule(rules: Rules, asked: str, facts: ModelFacts | None) -> None:
    fix = "Leave quantization null: the checkpoint's own config.json says how it is stored."
    if asked not in _FORMATS:
        name = asked.lower().replace("_", "-")
        meant = f"write it {name}" if name in _FORMATS else "it is not a format known here"
        rules.refuse("quantization", f"is not supported: {_QUANTIZATIONS.get(name, meant)}", fix)
    elif facts is not None and facts.quantized_as not in (asked, None):
        rules.refuse("quantization", f"is not how the checkpoint is stored, which is {facts.quantized_as}", fix)
    elif facts is not None and facts.quantized_as is None and asked != "fp8":
        rule = "is not how the checkpoint is stored, which is not quantized; only fp8 is made while a model is loaded"
        rules.refuse("quantization", rule, fix)


def _path_problem(path: str) -> Problem | None:
    location = model_location(path)
    if location == "hub" or Path(path).is_dir():
        return None
    if location == "folder":
        fix = "Give the folder that holds config.json and the .safetensors files."
        fix = nearest_path(path) if path.endswith(".gguf") else fix
        return problem("model.path", "must be a folder, not a file", path, fix)
    rule = "no such folder" if "/" in path.strip("/") else "no such folder, and not a hub id (owner/name)"
    return problem("model.path", rule, path, nearest_path(path, folders=True))


# ---- layout, engine, processes -----------------------------------------------------------------------------------


def _engine_rules(rules: Rules, model: ModelFacts | None) -> None:
    engine: EngineSection = rules.section
    length, block, count = engine.max_model_len, engine.block_size, engine.num_kv_blocks
    if length is not None and model is not None:
        most = model.max_position_embeddings
        fix = f"Lower it to {most} or less, or write null."
        rules.need("max_model_len", length <= most, f"the model was made for at most {most} tokens", fix)
    rules.need("block_size", not block & (block - 1), "must be a power of two, at most 1024")
    if count is not None and length is not None and rules.sound("block_size"):
        rule = f"{count} blocks of {block} tokens can't hold one sequence of max_model_len = {length}"
        rules.need("num_kv_blocks", count * block >= length, rule, f"It takes {math.ceil(length / block)} or more.")
    rule = f"must be at least max_num_seqs = {engine.max_num_seqs}: each sequence takes a token in a step"
    enough = engine.max_num_batched_tokens >= engine.max_num_seqs
    rules.need("max_num_batched_tokens", enough, rule, "Raise it, or lower max_num_seqs.")


def _sampling_rules(
    rules: Rules, engine: EngineSection, model: ModelFacts | None, *, samples: int | None = None
) -> None:
    """Rules of the sampling section; `samples`: of a prompt, None: as the section says."""
    vocab_size = model.vocab_size if model else None
    params = rules.section.sampling
    sampling_rules(rules.at("sampling"), vocab_size)
    longest = engine.max_model_len or (model.max_position_embeddings if model else None)
    if params.max_tokens is not None and longest is not None and rules.sound("sampling", "hybrid.samples_per_prompt"):
        longest = min(longest, params.max_tokens)  # else the length of an output is known with each prompt
        price = price_problem(params, key="sampling", max_tokens=longest, samples=samples, vocab_size=vocab_size)
        rules.note("sampling", price)


def _distributed_rules(rules: Rules) -> None:
    distributed: DistributedSection = rules.section
    if distributed.backend == "nccl" and distributed.device == "cpu":
        rules.refuse("backend", "is for GPUs, and distributed.device is cpu", "Use gloo, or leave it null.")
    if distributed.interface is not None:
        names = [name for _, name in socket.if_nameindex()]
        rule = f"no such network interface on this host, which has {', '.join(names)}"
        rules.need("interface", distributed.interface in names, rule, "null finds the right one.")


# ---- input and output --------------------------------------------------------------------------------------------


def _input_rules(rules: Rules, model: ModelFacts | None) -> None:
    section: InputSection = rules.section
    rules.problems += section_problems(section, rules.prefix)
    if section.prompts is not None and section.file is not None:
        fix = "Keep one of them; input.prompts=null unsets the prompts."
        rule = "there are input.prompts too, and only one can be used"
        rules.note("file", Problem(key="input.file", rule=rule, fix=fix))
    elif section.file is not None:
        rules.note("file", _readable_problem("input.file", section.file))
    elif section.prompts is None:
        fix = "Set input.prompts to a list, or input.file to a JSON-lines file (`-`: standard input)."
        rules.problems.append(Problem(key="input", rule="there is nothing to generate from", fix=fix))
    else:
        rules.need("prompts", bool(section.prompts), "must hold at least one prompt")
        vocab = model.vocab_size if model else None
        prompts = enumerate(section.prompts)
        rules.note("prompts", *(prompt_problem(one, key=f"input.prompts[{i}]", vocab_size=vocab) for i, one in prompts))


def _readable_problem(key: str, name: str) -> Problem | None:
    path = Path(name)
    if name == "-":
        return None
    if path.is_dir():
        return problem(key, "is a folder, not a file", name)
    if not path.exists():
        return problem(key, "no such file", name, nearest_path(name))
    try:
        open_regular(path).close()
    except OSError as error:
        fix = "Give a file, or - for standard input." if error.errno == errno.EINVAL else ""
        return problem(key, f"can't be read: {error.strerror}", name, fix)
    return None


def _output_rules(rules: Rules, source: InputSection) -> None:
    output: OutputSection = rules.section
    if output.file is None and output.overwrite:
        rule = "there is no output.file to overwrite"
        rules.note("overwrite", Problem(key="output.overwrite", rule=rule, fix="Set output.file."))
    if output.file is not None and source.file not in (None, "-"):
        differs = os.path.realpath(source.file) != os.path.realpath(output.file)
        rules.need("file", differs, "is the input file as well", "Write to another file.")
    _writable_rule(rules, "file")


def _writable_rule(rules: Rules, name: str, *, is_folder: bool = False) -> None:
    """The value of `name`, if it has one, is a path that can be written: found out without leaving anything behind."""
    value = getattr(rules.section, name)
    if value is None:
        return
    path = Path(value)
    if is_folder:
        rules.need(name, path.is_dir() or not path.exists(), "is a file, not a folder")
    else:
        fix = f"Write e.g. {printable(path / 'out.jsonl')}."
        rules.need(name, not path.is_dir(), "is a folder, not a file", fix)
        rules.need(name, path.is_file() or not path.exists(), "must be a regular file")
    if not rules.sound(name):
        return
    try:
        if path.is_file():
            path.open("ab").close()
        else:
            parent = path
            while not parent.exists() and parent != parent.parent:
                parent = parent.parent
            rules.need(name, parent.is_dir(), f"can't be written: {printable(parent)} is a file, not a folder")
            if parent.is_dir():  # root may write where the permissions say nothing about it
                tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        rules.need(name, False, f"can't be written ({error.strerror})", "Choose another place.")
