"""Every rule that config values must obey together: with each other, the model, the machine and the number of ranks.

Each check gives back all problems it finds, so that a user sees them at once, before a weight is read or torch
imported.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Literal

from megalite.config.chat import section_problems
from megalite.config.hybrid_rules import hybrid_problems
from megalite.config.hybrid_rules import num_ranks as hybrid_ranks
from megalite.config.parallel_rules import generating_layout_problems, layout_problems, training_layout_problems
from megalite.config.sampling import (
    MAX_SAMPLES,
    price_problem,
    prompt_problem,
    sampling_from_mapping,
    sampling_problems,
)
from megalite.config.schema import (
    Config,
    DistributedSection,
    EngineSection,
    HybridConfig,
    InferConfig,
    InputSection,
    ModelSection,
    OutputSection,
    ParallelSection,
    SamplingParams,
    TrainConfig,
)
from megalite.config.train_rules import learning_problems, train_problems
from megalite.config.typecheck import ModelFacts, Rules, nearest_path, printable, problem
from megalite.errors import Problem
from megalite.files import open_regular

__all__ = [
    "engine_problems",
    "layout_words",
    "model_location",
    "num_ranks",
    "prompt_problem",
    "sampling_from_mapping",
    "sampling_problems",
    "validate",
    "world_size_problem",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_QUANTIZATIONS = {
    "squeezellm": "its kernels exist for CUDA only and are unmaintained, and vLLM removed it in 2024",
    "awq": "there are no 4-bit kernels here",
    "gptq": "there are no 4-bit kernels here",
    "marlin": "there are no 4-bit kernels here",
    "bitsandbytes": "it needs a CUDA-only library and its own kernels",
    "gguf": "it is a file format of llama.cpp's; only safetensors are read",
    "fp8": "there are no fp8 kernels here",
    "int8": "there are no int8 kernels here",
    "compressed-tensors": "compressed weights are not read",
}


def validate(config: Config, model: ModelFacts | None, world_size: int | None) -> list[Problem]:
    """Every rule that `config` breaks; empty when it can run.

    `model`: what the model folder says, where it is known. `world_size`: ranks started; None before there are any.
    """
    if isinstance(config, HybridConfig):
        found = _hybrid_problems(config, model)
    elif isinstance(config, TrainConfig):
        found = train_problems(config, model) + _training_problems(config, model)
        found += layout_problems(config.parallel, model)
        found += training_layout_problems(config.parallel, config.train.zero_stage, model)
    else:
        found = engine_problems(config, model)
        found += _input_problems(config.input, model) + _output_problems(config.output, config.input)
        found += section_problems(config.input, "input.")
        if config.monitor.status_file is not None:
            found += _writable_problems("monitor.status_file", config.monitor.status_file)
    mismatch = world_size_problem(config, world_size)
    return found + ([mismatch] if mismatch else [])


def _training_problems(config: TrainConfig | HybridConfig, model: ModelFacts | None) -> list[Problem]:
    """The rules that every job which trains has with an output folder and several processes."""
    found = _distributed_problems(config.distributed)
    if config.output.folder is not None:
        found += _writable_problems("output.folder", config.output.folder, is_folder=True)
    return found


def _hybrid_problems(config: HybridConfig, model: ModelFacts | None) -> list[Problem]:
    train, infer = config.train, config.infer
    steps = config.supervised.steps + config.hybrid.steps * config.hybrid.updates_per_step
    named = "supervised.steps + hybrid.steps * hybrid.updates_per_step"
    found = hybrid_problems(config, model) + _training_problems(config, model)
    found += learning_problems(config, model, steps=steps, steps_are=named)
    for side, section in (("train", train), ("infer", infer)):
        found += layout_problems(section.parallel, model, prefix=f"{side}.parallel.", first_rank=True)
    found += training_layout_problems(train.parallel, train.zero_stage, model, prefix="train.parallel.")
    found += generating_layout_problems(infer.parallel, prefix="infer.parallel.")
    found += _engine_problems(infer.engine, model, prefix="infer.engine.")
    found += _sampling_problems(config.sampling, infer.engine, model, samples=config.hybrid.samples_per_prompt)
    return found


def engine_problems(config: InferConfig, model: ModelFacts | None) -> list[Problem]:
    """The rules for an engine by itself, without the input, output and ranks of a job."""
    found = _model_problems(config.model) + layout_problems(config.parallel, model)
    found += generating_layout_problems(config.parallel) + _engine_problems(config.engine, model)
    found += _sampling_problems(config.sampling, config.engine, model)
    found += _distributed_problems(config.distributed)
    if config.model.dtype == "float16" and config.distributed.device == "cpu":
        rule = "float16 is for GPUs, and distributed.device is cpu"
        found.append(Problem(key="model.dtype", rule=rule, fix="Use float32 or bfloat16 on the CPU."))
    return found


def num_ranks(config: Config) -> int:
    """Ranks that the config's layout, or layouts, need."""
    if isinstance(config, HybridConfig):
        return hybrid_ranks(config.train.parallel, config.infer.parallel)
    return config.parallel.tp * config.parallel.pp * config.parallel.dp


def layout_words(config: Config) -> str:
    """The layouts and the number of ranks, for messages: `tp=2,pp=1,dp=1: 2 ranks`."""

    def words(parallel: ParallelSection) -> str:
        return f"tp={parallel.tp},pp={parallel.pp},dp={parallel.dp}"

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
    parallel = config.parallel
    product = f"tp * pp * dp = {parallel.tp} * {parallel.pp} * {parallel.dp} = {wanted}"
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


def _model_problems(model: ModelSection) -> list[Problem]:
    rules = Rules(model, "model.")
    if model.path is None:
        fix = "Set model.path to a folder in Hugging Face layout or a hub id (owner/name)."
        rules.problems.append(Problem(key="model.path", rule="is needed", fix=fix))
    else:
        rules.problems += _path_problems(model.path)
        if model.revision is not None and model_location(model.path) == "folder":
            rules.refuse("revision", "is for a hub id, and model.path is a folder", "Leave it out.")
    if model.tokenizer is not None:
        there = Path(model.tokenizer).is_dir()
        if rules.need("tokenizer", there, "no such folder", nearest_path(model.tokenizer, folders=True)):
            rules.need("tokenizer", (Path(model.tokenizer) / "tokenizer.json").is_file(), "has no tokenizer.json")
    if model.quantization is not None:
        reason = _QUANTIZATIONS.get(model.quantization.lower().replace("_", "-"), "it is not a format known here")
        fix = "Use the model's unquantized weights and leave quantization null."
        rules.refuse("quantization", f"is not supported: {reason}", fix)
    fix = "Register a family of your own from your own Python module and name it in model.family_module."
    if model.trust_remote_code:
        rules.refuse("trust_remote_code", "is refused: code from a model folder is never run", fix)
    if model.family_module is not None:
        names = model.family_module.split(".")
        fix = "Write it as in an import statement, e.g. mypackage.families."
        rules.need("family_module", all(name.isidentifier() for name in names), "must be the name of a module", fix)
    return rules.problems


def _path_problems(path: str) -> list[Problem]:
    place = model_location(path)
    if place == "hub":
        return []
    if place is None:
        rule = "no such folder"
        if "/" not in path.strip("/"):
            rule += ", and not a hub id (owner/name)"
        return [problem("model.path", rule, path, nearest_path(path, folders=True))]
    if not Path(path).is_dir():
        fix = "Give the folder that holds config.json and the .safetensors files."
        if path.endswith(".gguf"):
            fix = nearest_path(path)
        return [problem("model.path", "must be a folder, not a file", path, fix)]
    return []


# ---- layout, engine, processes -----------------------------------------------------------------------------------


def _engine_problems(engine: EngineSection, model: ModelFacts | None, *, prefix: str = "engine.") -> list[Problem]:
    rules = Rules(engine, prefix)
    length = engine.max_model_len
    if rules.need("max_model_len", length is None or length >= 1, "must be >= 1, or null for the largest that fits"):
        if length is not None and model is not None:
            most = model.max_position_embeddings
            fix = f"Lower it to {most} or less, or write null."
            rules.need("max_model_len", length <= most, f"the model was made for at most {most} tokens", fix)
    share = engine.gpu_memory_utilization
    rules.need("gpu_memory_utilization", 0 < share <= 1, "must be above 0 and at most 1")
    rules.need("swap_space", engine.swap_space >= 0, "must be >= 0 GiB")
    block = engine.block_size
    sound = rules.need(
        "block_size", 1 <= block <= 1024 and not block & (block - 1), "must be a power of two, at most 1024"
    )
    count = engine.num_kv_blocks
    if rules.need("num_kv_blocks", count is None or count >= 1, "must be >= 1, or null to size them from memory"):
        if count is not None and sound and length is not None:
            rule = f"{count} blocks of {block} tokens can't hold one sequence of max_model_len = {length}"
            rules.need("num_kv_blocks", count * block >= length, rule, f"It takes {math.ceil(length / block)} or more.")
    several = rules.need("max_num_seqs", engine.max_num_seqs >= 1, "must be >= 1")
    tokens = engine.max_num_batched_tokens
    if rules.need("max_num_batched_tokens", tokens >= 1, "must be >= 1") and several:
        rule = f"must be at least max_num_seqs = {engine.max_num_seqs}: each sequence takes a token in a step"
        rules.need("max_num_batched_tokens", tokens >= engine.max_num_seqs, rule, "Raise it, or lower max_num_seqs.")
    rules.need("seed", 0 <= engine.seed < 2**63, "must be between 0 and 2^63 - 1")
    return rules.problems


def _sampling_problems(
    sampling: SamplingParams, engine: EngineSection, model: ModelFacts | None, *, samples: int | None = None
) -> list[Problem]:
    """Of the sampling section; `samples` of a prompt, None: as it says."""
    vocab_size = model.vocab_size if model else None
    found = sampling_problems(sampling, vocab_size=vocab_size)
    longest = engine.max_model_len or (model.max_position_embeddings if model else None)
    if found or sampling.max_tokens is None or longest is None or (samples or 1) > MAX_SAMPLES:
        return found  # else how long an output can be shows at each prompt
    longest = min(longest, sampling.max_tokens)
    price = price_problem(sampling, key="sampling", max_tokens=longest, samples=samples, vocab_size=vocab_size)
    return [price] if price else []


def _distributed_problems(distributed: DistributedSection) -> list[Problem]:
    rules = Rules(distributed, "distributed.")
    rules.need("start_timeout", distributed.start_timeout > 0, "must be above 0 seconds")
    rules.need("peer_timeout", distributed.peer_timeout > 0, "must be above 0 seconds")
    if distributed.backend == "nccl" and distributed.device == "cpu":
        rules.refuse("backend", "is for GPUs, and distributed.device is cpu", "Use gloo, or leave it null.")
    if distributed.interface is not None:
        names = [name for _, name in socket.if_nameindex()]
        rule = f"no such network interface on this host, which has {', '.join(names)}"
        rules.need("interface", distributed.interface in names, rule, "null finds the right one.")
    return rules.problems


# ---- input and output --------------------------------------------------------------------------------------------


def _input_problems(section: InputSection, model: ModelFacts | None) -> list[Problem]:
    if section.prompts is not None and section.file is not None:
        fix = "Keep one of them; input.prompts=null unsets the prompts."
        return [Problem(key="input.file", rule="there are input.prompts too, and only one can be used", fix=fix)]
    if section.file is not None:
        return _readable_problems("input.file", section.file)
    if section.prompts is None:
        fix = "Set input.prompts to a list, or input.file to a JSON-lines file (`-`: standard input)."
        return [Problem(key="input", rule="there is nothing to generate from", fix=fix)]
    if not section.prompts:
        return [problem("input.prompts", "must hold at least one prompt", section.prompts)]
    vocab = model.vocab_size if model else None
    found = [prompt_problem(one, key=f"input.prompts[{i}]", vocab_size=vocab) for i, one in enumerate(section.prompts)]
    return [one for one in found if one]


def _readable_problems(key: str, name: str) -> list[Problem]:
    path = Path(name)
    if name == "-":
        return []
    if path.is_dir():
        return [problem(key, "is a folder, not a file", name)]
    if not path.exists():
        return [problem(key, "no such file", name, nearest_path(name))]
    try:
        open_regular(path).close()
    except OSError as error:
        fix = "Give a file, or - for standard input." if error.errno == errno.EINVAL else ""
        return [problem(key, f"can't be read: {error.strerror}", name, fix)]
    return []


def _output_problems(output: OutputSection, source: InputSection) -> list[Problem]:
    if output.file is None:
        if output.overwrite:
            return [
                Problem(key="output.overwrite", rule="there is no output.file to overwrite", fix="Set output.file.")
            ]
        return []
    if source.file not in (None, "-") and os.path.realpath(source.file) == os.path.realpath(output.file):
        return [problem("output.file", "is the input file as well", output.file, "Write to another file.")]
    return _writable_problems("output.file", output.file)


def _writable_problems(key: str, name: str, *, is_folder: bool = False) -> list[Problem]:
    """Whether `name` can be written, found out without leaving anything behind."""
    path = Path(name)
    if path.is_dir() and not is_folder:
        return [problem(key, "is a folder, not a file", name, f"Write e.g. {printable(path / 'out.jsonl')}.")]
    if path.exists() and is_folder and not path.is_dir():
        return [problem(key, "is a file, not a folder", name)]
    if path.exists() and not is_folder and not path.is_file():
        return [problem(key, "must be a regular file", name)]
    try:
        if path.is_file():
            path.open("ab").close()
        else:
            parent = path
            while not parent.exists() and parent != parent.parent:
                parent = parent.parent
            if not parent.is_dir():
                return [problem(key, f"can't be written: {printable(parent)} is a file, not a folder", name)]
            tempfile.TemporaryFile(dir=parent).close()  # root may write where the permissions say nothing about it
    except OSError as error:
        return [problem(key, f"can't be written ({error.strerror})", name, "Choose another place.")]
    return []
