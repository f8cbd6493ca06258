"""Mistakes that users make, one line each: what they are told, with which exit code, and that nothing was started.

To add a case, add a `Case`: `setup` spoils the folder, `args` and `config` are what the user gives.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from waiting import PATIENCE

from megalite import cli
from megalite.hybrid.checks import problems as hybrid_checks
from megalite.model import families
from megalite.weights.table import hf_shapes

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
JOB = "model: {path: model}\ninput: {prompts: [hello]}\n"
NEW_MODEL = "model: {config: {model_type: llama, hidden_size: 48, intermediate_size: 44, num_hidden_layers: 4,\n"
TRAIN = f"{NEW_MODEL}  num_attention_heads: 6}}}}\noutput: {{folder: out}}\n"
SHORT = f"{TRAIN}data: {{sequence_length: 64}}\n"
HYBRID = f"""{TRAIN}data: {{source: "megalite.hybrid.tasks:additions"}}
hybrid: {{reward: "megalite.rewards.functions:exact_match"}}
"""
USAGE, CHECKPOINT, RESOURCES = 2, 3, 4


def write_model(folder: Path) -> None:
    """A tiny model folder, all zeros, made without torch."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    header, end = {}, 0
    for name, shape in hf_shapes(families.read(folder)).items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def edit_model(**changes) -> Callable[[Path], None]:
    """A setup that changes config.json; None takes a key out."""

    def setup(folder: Path) -> None:
        values = {key: value for key, value in {**MODEL, **changes}.items() if value is not None}
        (folder / "model" / "config.json").write_text(json.dumps(values))

    return setup


def write_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def setup(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return setup


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_missing(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def odd_files(name: str) -> Iterator[tuple[str, Callable[[Path], None], str]]:
    """What is no file under a name, how to put it there, and what is said of it."""
    place = {"input.file": "prompts.jsonl"}.get(name, name)

    def put(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            if "index" in place:
                remove("model/model.safetensors")(folder)
            (folder / place).unlink(missing_ok=True)
            make(folder / place)

        return setup

    yield "pipe", put(os.mkfifo), "a pipe or a device, not a file"
    yield "device", put(lambda path: path.symlink_to("/dev/zero")), "a pipe or a device, not a file"
    if name != "input.file":
        yield "50 MB", put(lambda path: path.write_bytes(bytes(50_000_000))), " MiB, so not what it should be"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake."""

    says: tuple[str, ...]
    """Each must be in what is printed."""
    args: tuple[str, ...] = ()
    """After `--config job.yaml`."""
    config: str = JOB
    kind: str = "infer"
    code: int = USAGE
    setup: Callable[[Path], object] = lambda folder: None
    env: dict[str, str] = field(default_factory=dict)
    problems: int = 1
    """How many lines begin with `error: `."""


def given(override: str, *says: str, **more) -> Case:
    """One override after a good config."""
    return Case(args=(override,), says=says, **more)


def key(text: str, *says: str, **more) -> Case:
    """One more section in a good config."""
    return Case(config=JOB + text, says=says, **more)


def train(override: str, *says: str, config: str = TRAIN) -> Case:
    """One override after a good training config."""
    return Case(kind="train", config=config, args=(override,), says=says)


def hybrid(override: str, *says: str, **more) -> Case:
    """One override after a good hybrid config."""
    return Case(kind="hybrid", config=HYBRID, args=(override,), says=says, **more)


def launched(rank: int | str, world_size: int) -> dict[str, str]:
    """What a launcher sets for one of its ranks on one host."""
    return {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world_size}", "MASTER_PORT": "29500"}


FROM_HERE = "(from the command line)"
CASES = {
    # ---- the command line
    "no config": Case(args=("--nothing",), says=("--nothing: unknown option",)),
    "DeepSpeed's option": Case(
        args=("--deepspeed_config", "ds.json"),
        says=("DeepSpeed's keys go into a training config's section `deepspeed`",),
    ),
    "misspelt option": Case(args=("--chek",), says=("--chek: unknown option. Did you mean --check?",)),
    "option with a value": Case(args=("--check=yes",), says=("--check: takes no value",)),
    "option without a value": Case(args=("--resolved-sha256",), says=("--resolved-sha256: needs a value",)),
    "config given twice": Case(args=("--config", "other.yaml"), says=("--config: is given twice",)),
    "leading zero": given("parallel.tp=010", "parallel.tp: must be a whole number, got '010'. Write 10", FROM_HERE),
    "fraction": given("parallel.tp=2.5", "parallel.tp: must be a whole number, got 2.5", FROM_HERE),
    "boolean for a number": given("parallel.tp=true", "must be a whole number, got true"),
    "null for a number": given("parallel.tp=null", "must be a whole number, got null"),
    "hexadecimal": given("parallel.tp=0x2", "must be a whole number, got '0x2'"),
    "huge number": given("parallel.tp=" + "9" * 5000, "parallel.tp: must be a whole number"),
    "bare key": given(
        "parallel.tp", "parallel.tp: an override is written section.key=value", "Write parallel.tp=VALUE."
    ),
    "no value": given("parallel.tp=", "Write parallel.tp=VALUE."),
    "no key": given("=2", "an override is written section.key=value", "Write section.key=2."),
    "spaces within": given("parallel.tp = 2", "without spaces round its `=`. Write parallel.tp=2."),
    "spaces, three words": Case(args=("parallel.tp", "=", "2"), says=("spaces round its `=`. Write parallel.tp=2.",)),
    "space after": Case(args=("parallel.tp=", "2"), says=("spaces round its `=`. Write parallel.tp=2.",)),
    "space before": Case(args=("parallel.tp", "=2"), says=("spaces round its `=`. Write parallel.tp=2.",)),
    "space for =": Case(args=("--parallel.tp", "2"), says=("Write parallel.tp=2.",)),
    "twice": Case(args=("parallel.tp=2", "parallel.tp=4"), says=("is set twice. Keep one of", "parallel.tp=4")),
    "twice, in pieces": Case(
        args=("sampling.logit_bias={5: 1}", "sampling.logit_bias.5=2"), says=("sampling.logit_bias.5: is set twice",)
    ),
    "unknown section": given("paralel.tp=2", "paralel.tp: unknown key. Did you mean parallel.tp?"),
    "unknown key": given("sampling.temprature=1", "unknown key. Did you mean sampling.temperature?"),
    "key of another section": given("engine.tp=2", "engine.tp: unknown key. Did you mean parallel.tp?"),
    "key without section": given("temperature=1", "Did you mean sampling.temperature?"),
    "key of vLLM": given("engine.tensor_parallel_size=2", "Did you mean parallel.tp?"),
    "nothing alike": given("qqqqq.zzzzz=2", "qqqqq.zzzzz: unknown key. --help lists all keys."),
    "key within a number": given("parallel.tp.x=2", "parallel.tp has no keys of its own"),
    "empty part of a key": given("parallel..tp=2", "parallel..tp: unknown key"),
    "a whole section": given("parallel=2", "parallel: is a section. Set one of its keys, e.g. parallel.tp=VALUE"),
    "value is no YAML": given("parallel.tp=[", "parallel.tp: not YAML", FROM_HERE),
    "value runs code": given("parallel.tp=!!python/name:os.system ", "parallel.tp: "),
    "environment variable": given("model.path=${oc.env:HOME}", "model.path: must be a plain value"),
    "reference to a key": given("model.tokenizer=${model.path}", "are not expanded"),
    "escape sequences": given("model.path=\x1b[31m", "printable text on one line, got '\\x1b[31m'"),
    # ---- the file
    "no such file": Case(
        args=("--config=jop.yaml",), config="", says=("jop.yaml: no such file. Did you mean job.yaml?",)
    ),
    "config without --config": Case(args=("job.yaml",), config="", says=("--config: is needed", "--config job.yaml")),
    "config is a folder": Case(args=("--config", "model"), config="", says=("model: is a folder",)),
    "not YAML": key("a: [", "job.yaml:3: not YAML"),
    "tab": key("engine:\n\tseed: 1", "job.yaml:4: not YAML", "Indent with spaces"),
    "key given twice": key("engine: {seed: 1}\nengine: {seed: 2}", "job.yaml:4: the key 'engine' is given twice"),
    "alias": key("engine: &a {seed: 1}\noutput: *a", "job.yaml:4: aliases"),
    "not UTF-8": Case(
        args=("--config", "bad.yaml"),
        config="",
        setup=write_file("bad.yaml", b"a: 1\nb: \xff"),
        says=("bad.yaml:2: is not",),
    ),
    "a list": Case(config="- a\n", says=("job.yaml: must hold sections",)),
    "unknown section in a file": key("sampler: {n: 1}", "sampler: unknown key. Did you mean sampling?", "job.yaml:3)"),
    "unknown key in a file": key("engine:\n  sede: 1", "Did you mean engine.seed? (from job.yaml:4)"),
    "quoted number": key("parallel: {tp: '2'}", "must be a whole number, got '2'. Write 2, without quotes."),
    "yes for true": key(
        "engine: {enforce_eager: yes}", "must be true or false, got 'yes'. Write true. (from job.yaml:3)"
    ),
    "number for text": key("output: {file: 5}", 'output.file: must be text or null, got 5. Put it in quotes: "5".'),
    "text for a section": key("engine: fast", "engine: is a section and must hold keys, got 'fast'"),
    "unknown choice": key("parallel: {dp_mode: Async}", "must be one of sync, async, got 'Async'. Did you mean async?"),
    "not a number": key("sampling: {temperature: .nan}", "sampling.temperature: must be a finite number"),
    "list of the wrong things": key("sampling: {stop_token_ids: [1, x]}", "stop_token_ids[1]: must be a whole number"),
    "all at once": Case(
        config="modle: {path: model}\nparallel: {tp: 0, pp: x}\ninput: {prompts: ['']}",
        args=("sampling.n=0",),
        problems=6,
        says=(
            "modle: unknown key",
            "model.path: is needed",
            "tp: must be >= 1",
            "parallel.pp: must be",
            "empty prompt",
        ),
    ),
    # ---- the model
    "no model": Case(config="input: {prompts: [a]}", says=("model.path: is needed. Set model.path to a folder",)),
    "no such folder": given("model.path=mdoel", "no such folder, and not a hub id (owner/name), got 'mdoel'", "model?"),
    "no such folder in a folder": given("model.path=./a/b/c", "no such folder", "There is no folder a/b either"),
    "home": given("model.path=~/model", "`~` is not expanded here"),
    "a file": given("model.path=job.yaml", "model.path: must be a folder, not a file"),
    "no config.json": Case(code=CHECKPOINT, setup=remove("model/config.json"), says=("model/config.json: missing",)),
    "config.json is no JSON": Case(
        code=CHECKPOINT, setup=write_file("model/config.json", "{"), says=("model/config.json: not JSON",)
    ),
    "unknown architecture": Case(
        setup=edit_model(architectures=["MambaForCausalLM"], model_type="mamba"),
        says=("MambaForCausalLM", "LlamaForCausalLM"),
    ),
    "config.json without a size": Case(
        code=CHECKPOINT, setup=edit_model(hidden_size=None), says=("model/config.json: hidden_size is missing",)
    ),
    "config.json with a silly size": Case(
        code=CHECKPOINT, setup=edit_model(num_hidden_layers=-4), says=("num_hidden_layers",)
    ),
    "quantized checkpoint": Case(
        code=CHECKPOINT,
        setup=edit_model(quantization_config={"bits": 4}),
        says=("quantization_config", "not supported"),
    ),
    "pickled weights": Case(code=CHECKPOINT, setup=pickled, says=("pytorch_model.bin", "can run code", "convert")),
    "no weights": Case(code=CHECKPOINT, setup=remove("model/model.safetensors"), says=("has no weights",)),
    "truncated weights": Case(code=CHECKPOINT, setup=cut_weights, says=("model/model.safetensors",)),
    "corrupt weights": Case(
        code=CHECKPOINT, setup=write_file("model/model.safetensors", b"\xff" * 64), says=("model/model.safetensors",)
    ),
    "Git LFS pointer": Case(
        code=CHECKPOINT,
        setup=write_file(
            "model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        says=("model/model.safetensors", "LFS"),
    ),
    "missing shard": Case(
        code=CHECKPOINT, setup=shard_missing, says=("1 of the 1 weight files", "model-00001-of-00002")
    ),
    "squeezellm": given("model.quantization=squeezellm", "'squeezellm' is not supported", "vLLM removed it"),
    "awq": given("model.quantization=AWQ", "'AWQ' is not supported: there are no 4-bit kernels here"),
    "unknown quantization": given("model.quantization=foo", "'foo' is not supported: it is not a format known here"),
    "remote code": given("model.trust_remote_code=true", "code from a model folder is never run", "family_module"),
    "no such module": given("model.family_module=no_such_module_here", "model.family_module: importing it failed"),
    "a module's path": given("model.family_module=my/family.py", "model.family_module: must be the name of a module"),
    "revision of a folder": given("model.revision=main", "'main' is for a hub id"),
    "tokenizer missing": given("model.tokenizer=nowhere", "model.tokenizer: no such folder"),
    "no tokenizer in the folder": given("model.tokenizer=model", "model.tokenizer: has no tokenizer.json"),
    "float16 on the CPU": Case(
        args=("model.dtype=float16", "distributed.device=cpu"), says=("model.dtype: float16 is for GPUs",)
    ),
    "unknown dtype": given("model.dtype=bf16", "must be one of auto, float32, bfloat16, float16", "mean bfloat16?"),
    "dry run of a hub id": Case(
        args=("--dry-run", "model.path=owner/name"), says=("--dry-run needs the model's config.json on this disk",)
    ),
    # ---- layout and engine
    "negative tp": given("parallel.tp=-1", "error: parallel.tp: must be >= 1, got -1. (from the command line)"),
    "zero dp": given("parallel.dp=0", "parallel.dp: must be >= 1"),
    "more stages than layers": given("parallel.pp=5", "the model has 4 layers"),
    "chunks": given("parallel.interleave=2", "parallel.interleave: is for training"),
    "sequence parallel": given("parallel.sequence_parallel=true", "parallel.sequence_parallel: is for training"),
    "absurd number of ranks": given("parallel.dp=100000", "100000 ranks on this host", code=RESOURCES),
    "max_model_len": given("engine.max_model_len=129", "the model was made for at most 128 tokens, got 129"),
    "negative max_model_len": given("engine.max_model_len=-1", "engine.max_model_len: must be >= 1, or null"),
    "memory share": given("engine.gpu_memory_utilization=90", "must be above 0 and at most 1, got 90.0"),
    "no memory": given("engine.gpu_memory_utilization=0", "engine.gpu_memory_utilization: must be above 0"),
    "negative swap": given("engine.swap_space=-4", "engine.swap_space: must be >= 0 GiB"),
    "block size": given("engine.block_size=12", "engine.block_size: must be a power of two"),
    "too few blocks": Case(
        args=("engine.num_kv_blocks=2", "engine.max_model_len=64"),
        says=("2 blocks of 16 tokens can't hold", "4 or more"),
    ),
    "token budget": given("engine.max_num_batched_tokens=8", "must be at least max_num_seqs = 256"),
    "no sequences": given("engine.max_num_seqs=0", "engine.max_num_seqs: must be >= 1"),
    "negative seed": given("engine.seed=-1", "engine.seed: must be between 0 and"),
    "no time": given("distributed.start_timeout=0", "distributed.start_timeout: must be above 0 seconds"),
    "no such interface": given("distributed.interface=eth77", "no such network interface on this host, which has"),
    "nccl on the CPU": Case(
        args=("distributed.backend=nccl", "distributed.device=cpu"), says=("distributed.backend: 'nccl' is for GPUs",)
    ),
    # ---- sampling
    "negative temperature": given("sampling.temperature=-0.5", "sampling.temperature: must be >= 0, got -0.5"),
    "n over best_of": Case(args=("sampling.n=3", "sampling.best_of=2"), says=("must be at least n = 3, got 2",)),
    "best_of of equals": Case(
        args=("sampling.best_of=2", "sampling.temperature=0"), says=("with temperature 0 all samples are equal",)
    ),
    "top_p": given("sampling.top_p=1.5", "sampling.top_p: must be above 0 and at most 1"),
    "a billion samples": given("sampling.n=1000000000", "sampling.n: must be at most 16384"),
    "top_k": given("sampling.top_k=-2", "sampling.top_k: must be >= -1, got -2. 0 and -1 keep all"),
    "min_p": given("sampling.min_p=2", "sampling.min_p: must be between 0 and 1"),
    "no tokens": given("sampling.max_tokens=0", "sampling.max_tokens: must be >= 1"),
    "min_tokens": given("sampling.min_tokens=99", "must be at most max_tokens = 16, got 99"),
    "penalty": given("sampling.presence_penalty=3", "must be between -2 and 2"),
    "repetition penalty": given("sampling.repetition_penalty=0", "sampling.repetition_penalty: must be above 0"),
    "stop of nothing": given("sampling.stop=['']", "must not hold an empty text"),
    "stop of a number": key("sampling: {stop: 5}", "sampling.stop: must be text, a list of texts, or null, got 5"),
    "stop id beyond the vocabulary": given("sampling.stop_token_ids=[103]", "token ids are 0 to 102, got 103"),
    "bias beyond the vocabulary": given("sampling.logit_bias={999: 1}", "token ids are 0 to 102, got 999"),
    "bias too large": given("sampling.logit_bias={5: 1e3}", "logit_bias.5: must be between -100 and 100"),
    "many logprobs": given("sampling.logprobs=1000", "sampling.logprobs: must be between 0 and 20"),
    # ---- input and output
    "nothing to do": Case(config="model: {path: model}", says=("input: there is nothing to generate from",)),
    "prompts and a file": given("input.file=job.yaml", "input.file: there are input.prompts too"),
    "no prompts": given("input.prompts=[]", "input.prompts: must hold at least one prompt"),
    "empty prompt": given("input.prompts=['']", "input.prompts[0]: an empty prompt"),
    "empty list of ids": given("input.prompts=[hi, []]", "input.prompts[1]: an empty prompt"),
    "prompt that is no list": given("input.prompts=hello", "must be a list of values or null, got 'hello'", "[hello]"),
    "prompt that is a number": given("input.prompts=[5]", "a prompt must be text, a list of token ids, or a chat"),
    "prompt that is a mapping": given("input.prompts=[a: b]", "goes in quotes"),
    "token id beyond the vocabulary": given("input.prompts=[[5, 103]]", "prompts[0][1]", "ids are 0 to 102, got 103"),
    "half a chat": given("input.prompts=[[{content: a}]]", "input.prompts[0][0]: a chat message needs a role"),
    "no input file": given(
        "input.file=jop.yaml",
        "input.file: no such file, got 'jop.yaml'. Did you mean job.yaml?",
        config="model: {path: model}",
    ),
    "input is a folder": given("input.file=model", "is a folder, not a file", config="model: {path: model}"),
    "output is a folder": given("output.file=model", "output.file: is a folder, not a file"),
    "output in a file": given("output.file=job.yaml/out", "output.file: can't be written: job.yaml is a file"),
    "output in no place": given("output.file=/proc/nowhere/out", "output.file: can't be written ("),
    "output is a device": given("output.file=/dev/null", "output.file: must be a regular file"),
    "output is the input": Case(
        config="model: {path: model}",
        args=("input.file=job.yaml", "output.file=model/../job.yaml"),
        says=("output.file: is the input file as well",),
    ),
    "nothing to overwrite": given("output.overwrite=true", "there is no output.file to overwrite"),
    # ---- ranks
    "two ranks for one": Case(
        env=launched(0, 2),
        args=("sampling.n=1",),
        says=(
            "the launcher started 2 ranks",
            "tp * pp * dp = 1 * 1 * 1 = 1",
            "deepspeed --num_gpus 1 ",
            " sampling.n=1",
        ),
    ),
    "four deepspeed ranks for two": Case(
        env=launched(0, 4) | {"CROSS_SIZE": "1"},
        args=("parallel.dp=2",),
        says=("deepspeed started 4 ranks, but the config asks for tp * pp * dp = 1 * 1 * 2 = 2", "--num_gpus 2 "),
    ),
    "one torchrun rank for four": Case(
        env=launched(0, 1) | {"TORCHELASTIC_RUN_ID": "x"},
        args=("parallel.tp=2", "parallel.pp=2"),
        says=("torchrun started 1 rank,", "= 4", "torchrun --nproc_per_node 4 "),
    ),
    "rank that is no number": Case(env=launched("x", 2), says=("RANK: must be a whole number",)),
    "another config": Case(
        args=("--resolved-sha256", "0" * 64), says=("config differs from the one the run was started with",)
    ),
    # ---- training
    "nothing to train": Case(kind="train", config="output: {folder: out}", says=("there is no model to train",)),
    "nowhere to train to": Case(
        kind="train", config=TRAIN.replace("output", "#output"), says=("output.folder: is needed",)
    ),
    # ---- what is no file, or too large a one
    **{
        f"{what} as {name}": Case(setup=setup, config=config, args=args, says=(f"{name}: ", why), code=code)
        for name, config, args, code in (
            ("other.yaml", "", ("--config", "other.yaml"), USAGE),
            ("input.file", "model: {path: model}", ("input.file=prompts.jsonl",), USAGE),
            ("model/config.json", JOB, (), CHECKPOINT),
            ("model/model.safetensors.index.json", JOB, (), CHECKPOINT),
        )
        for what, setup, why in odd_files(name)
    },
    # ---- a hybrid job
    "no folder for a hybrid job": hybrid("output.folder=null", "output.folder: is needed"),
    "DeepSpeed's key in a hybrid job": hybrid(
        "deepspeed.bf16={enabled: true}", "deepspeed.bf16: is set by model.dtype"
    ),
    "warm-up longer than the job": hybrid(
        "hybrid.steps=20", "optimizer.warmup_steps: must be at most supervised.steps"
    ),
    "weights without spread": train("model.config.initializer_range=0", "initializer_range: must be a number above 0"),
    "a billion samples a prompt": hybrid(
        "hybrid.samples_per_prompt=1000000000", "hybrid.samples_per_prompt: must be at most 16384"
    ),
    "a billion prompts": hybrid(
        "hybrid.prompts_per_step=1000000000", "hybrid.prompts_per_step: must be at most 1048576"
    ),
    "no reward": hybrid("hybrid.reward=null", "hybrid.reward: is needed. Such as megalite.rewards:"),
    "reward that is no function": hybrid("hybrid.reward=parses", "must be package.module:function, got 'parses'"),
    "reward in no module": hybrid("hybrid.reward=no_such:thing", "hybrid.reward", "no_such"),
    "misspelt reward": hybrid(
        "hybrid.reward=megalite.hybrid.rewards:exact_mach", "hybrid.reward", "megalite.rewards:exact_match"
    ),
    "misspelt task": hybrid(
        "data.source=configs.hybrid.grpo_arithmetic:addition", "data.source", "arithmetic:additions"
    ),
    "task's unknown option": hybrid("data.options={digts: 1}", "data.options", "digts"),
    "no task": hybrid("data.source=null", "data.source: is needed"),
    "file of prompts that is not there": hybrid("data.source=prompts.jsonl", "data.source: no such file"),
    "group of one": hybrid("hybrid.samples_per_prompt=1", "must be >= 2 for grpo", "got 1"),
    "groups cut in two": hybrid("hybrid.updates_per_step=3", "must divide prompts_per_step = 16", "got 3"),
    "two models in one job": hybrid("infer.model=other", "infer.model: one model trains and generates"),
    "output longer than the model": hybrid("sampling.max_tokens=2048", "leaves no room for a prompt", "2048 positions"),
    "samples all the same": hybrid("sampling.temperature=0", "sampling.temperature: must be above 0"),
    "samples by another name": hybrid("sampling.n=4", "sampling.n: is hybrid.samples_per_prompt here"),
    "stale samples": hybrid("hybrid.sync_every=2", "hybrid.sync_every", "hybrid.importance_correction"),
    "ranks without work": hybrid("infer.parallel.first_rank=3", "infer.parallel.first_rank: leaves ranks without work"),
    "no rank 0": Case(
        kind="hybrid",
        config=HYBRID,
        args=("train.parallel.first_rank=1", "infer.parallel.first_rank=1"),
        says=("one of the two layouts must begin at rank 0",),
    ),
    "sequence parallel sampling": hybrid(
        "infer.parallel.sequence_parallel=true", "infer.parallel.sequence_parallel", "generating has no use for it"
    ),
    "ZeRO-3 over the stages of a job": Case(
        kind="hybrid",
        config=HYBRID,
        args=("train.zero_stage=3", "train.parallel.pp=2"),
        says=("train.zero_stage: 3 leaves norms and biases",),
    ),
    "ZeRO-0": hybrid("train.zero_stage=0", "train.zero_stage: 0 has no gradient norm"),
    "first rank of a single layout": train("parallel.first_rank=1", "is for hybrid jobs, which have two layouts"),
    "two models to train": Case(
        kind="train",
        config=SHORT,
        args=("model.path=model",),
        says=("model.config: there is a model.path too", "tokenizer.path: is needed: model.path has no tokenizer"),
        problems=2,
    ),
    "chunks of no pipeline": train("parallel.interleave=2", "parallel.interleave: needs more than one pipeline stage"),
    "more chunks than layers": Case(
        kind="train",
        config=TRAIN,
        args=("parallel.pp=3", "parallel.interleave=2"),
        says=("parallel.interleave: makes 6 chunks, and the model has 4 layers",),
    ),
    "ZeRO-3 over stages": Case(
        kind="train",
        config=TRAIN,
        args=("parallel.pp=2", "train.zero_stage=3"),
        says=("train.zero_stage: 3 leaves norms and biases", "Use stage 1"),
    ),
    "ZeRO-2 over stages with tied embeddings": Case(
        kind="train",
        config=TRAIN.replace("6}}", "6, tie_word_embeddings: true}}"),
        args=("parallel.pp=2", "train.zero_stage=2"),
        says=("train.zero_stage: 2 cuts gradients over dp before",),
    ),
    "shape of no model": train("model.config.hidden_size=0", "model.config: hidden_size must be between 1"),
    "key that DeepSpeed is given": train("deepspeed={bf16: {enabled: true}}", "deepspeed.bf16: is set by model.dtype"),
    "stage that DeepSpeed is given": train("deepspeed.zero_optimization.stage=2", "is set by train.zero_stage"),
    "no ZeRO": train("train.zero_stage=0", "train.zero_stage: 0 has no gradient norm to report in float32"),
    "long sequences": train("data.sequence_length=4096", "the model has 2048 positions"),
    "small vocabulary": train("tokenizer.vocab_size=256", "tokenizer.vocab_size: must be above 256"),
    "one beta": train("optimizer.betas=[0.9]", "optimizer.betas: must be two numbers"),
    "no evaluations": train("train.eval_every=0", "train.eval_every: must be >= 1"),
    "nothing held out": train("data.held_out=0", "data.held_out: must be above 0 and below 1"),
    "training replicas out of step": train("parallel.dp_mode=async", "replicas of a training run go in step"),
    "output folder is a file": train("output.folder=job.yaml", "output.folder: is a file, not a folder"),
}


@pytest.fixture
def job(tmp_path, monkeypatch, model_folder):
    """A folder with a good model, in which the test stands; no launcher."""
    (tmp_path / "model").mkdir()
    for path in model_folder.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "TORCHELASTIC_RUN_ID",
        "CROSS_SIZE",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    write_model(folder)
    return folder


def put_under_launcher(monkeypatch, rank: int, world_size: int) -> None:
    for name, value in launched(rank, world_size).items():
        monkeypatch.setenv(name, value)


def start(kind: str, args: tuple[str, ...], *, config: str) -> tuple[int, list]:
    """Run the command line with a `run` that notes that it was reached."""
    ran = []
    Path("job.yaml").write_text(config) if config else None
    argv = ["--config", "job.yaml", *args] if config else [*args]
    checks = {"checks": hybrid_checks} if kind == "hybrid" else {}
    return cli.main(kind, lambda loaded: ran.append(loaded) or 0, argv, **checks), ran


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(case, job, monkeypatch, capfd):
    (job / "job.yaml").write_text(JOB)
    case.setup(job)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    code, ran = start(case.kind, case.args, config=case.config)
    out, err = capfd.readouterr()
    assert (code, ran, out) == (case.code, [], ""), err
    for text in case.says:
        assert text in err
    lines = err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == case.problems
    assert lines[0].startswith("error: ") and "Traceback" not in err
    assert len(lines) <= 3 * case.problems
    assert max(map(len, lines)) < 400


def test_there_are_enough_cases():
    assert len(CASES) >= 60


# ---- what is good is let through ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "args"),
    [
        ("infer", JOB, ()),
        ("infer", JOB, ("--parallel.dp=1", "engine.max_model_len=128", "--local_rank=0")),
        ("infer", JOB, ("model.path=owner/name", "model.revision=main")),
        ("infer", JOB, ("output.file=new/folder/out.jsonl",)),
        ("infer", "model: {path: model}", ("input.file=-", "sampling.n=2", "sampling.best_of=3")),
        ("infer", "model: {path: model}", ("input.prompts=[[1, 2], [{role: user, content: hi}]]",)),
        ("train", TRAIN, ()),
    ],
)
def test_good_input_reaches_the_job(job, capfd, kind, config, args):
    code, ran = start(kind, args, config=config)
    out, err = capfd.readouterr()
    assert (code, len(ran), out, err) == (0, 1, "", "")
    assert not (job / "new").exists() and not (job / "out").exists()  # checks leave nothing behind


def test_a_dummy_model_needs_no_weights(job):
    (job / "model" / "model.safetensors").unlink()
    code, ran = start("infer", ("model.load_format=dummy",), config=JOB)
    assert (code, len(ran)) == (0, 1)


def test_a_rank_runs_in_its_process(job, monkeypatch):
    put_under_launcher(monkeypatch, 1, 2)
    code, ran = start("infer", ("parallel.tp=2",), config=JOB)
    assert (code, len(ran)) == (0, 1)


def test_only_one_rank_of_a_host_tells(job, monkeypatch, capfd):
    monkeypatch.setattr(cli, "QUIET_WAIT", 0)
    for rank in range(3):
        put_under_launcher(monkeypatch, rank, 3)
        assert start("infer", (), config=JOB)[0] == USAGE
        assert ("error: " in capfd.readouterr().err) == (rank == 0)


def test_a_stage_below_the_launcher_gets_the_resolved_file(job, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/infer.py"])
    seen = {}

    def run_ranks(command, num_ranks, *, files, stdin, stopped_timeout):
        script, config, resolved, digest, sha256, debug = command
        assert (config, digest, resolved, stdin) == (
            "--config",
            "--resolved-sha256",
            f"/proc/self/fd/{files[0]}",
            False,
        )
        seen.update(script=script, text=Path(resolved).read_text(), sha256=sha256, ranks=num_ranks, debug=debug)
        ran = []
        put_under_launcher(monkeypatch, 0, 4)
        seen["rank"] = cli.main("infer", lambda loaded: ran.append(loaded) or 0, command[1:5])
        seen["loaded"] = ran[0]
        return 7

    monkeypatch.setattr(cli, "run_ranks", run_ranks)
    args = ("parallel.tp=2", "parallel.pp=2", "sampling.stop=${x}", "--debug")
    assert start("infer", args, config=JOB) == (7, [])
    assert (seen["ranks"], seen["debug"], seen["rank"]) == (4, "--debug", 0)
    assert os.path.isabs(seen["script"])
    assert seen["loaded"].sha256 == seen["sha256"] and seen["loaded"].given == seen["text"]
    assert seen["loaded"].origins["sampling.max_tokens"] == "default", "what nobody set stays so on the ranks"
    assert seen["loaded"].config.sampling.stop == "${x}"


def test_text_in_arguments_of_a_bare_multi_host_launch_is_refused(job, monkeypatch, capfd):
    put_under_launcher(monkeypatch, 0, 2)
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert start("infer", ("parallel.tp=2", "sampling.seed=3", "model.dtype=float32"), config=JOB)[0] == 0
    assert start("infer", ("parallel.tp=2", "input.prompts=[/root]"), config=JOB) == (USAGE, [])
    error = capfd.readouterr().err
    assert error.startswith("error: input.prompts: text in arguments goes through a shell on every host")
    assert "--hostfile HOSTS --config job.yaml KEY=VALUE ..." in error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--master_port", "3"), "--master_port: needs --hostfile"),
        (("--no_ssh",), "--no_ssh: needs --hostfile"),
        (("--hostfile", "hosts", "input.prompts=null", "input.file=-"), "input.file: standard input can't be read on"),
        (("--hostfile", "nowhere"), "--hostfile: can't be read"),
        (("--hostfile", "hosts", "parallel.tp=2"), "its hosts start 1 ranks, and the layout needs 2"),
    ],
)
def test_a_start_over_hosts_that_can_not_be(job, capfd, args, says):
    Path("hosts").write_text("a slots=1\n")
    assert start("infer", args, config=JOB) == (USAGE, [])
    assert says in capfd.readouterr().err


# ---- what is printed ---------------------------------------------------------------------------------------------


def test_check_stops_after_the_checks(job, capfd):
    assert start("infer", ("--check", "parallel.tp=2"), config=JOB) == (0, [])
    assert "job.yaml: no problem found; tp=2,pp=1,dp=1: 2 ranks" in capfd.readouterr().out


def test_print_config_shows_origins(job, capfd):
    assert start("infer", ("--print-config", "parallel.tp=2"), config=JOB) == (0, [])
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["model.path", "model", "job.yaml:1"] in lines
    assert ["parallel.tp", "2", "the", "command", "line"] in lines
    assert ["parallel.pp", "1", "default"] in lines


def test_print_config_shows_the_owners_sampling(job, capfd):
    owners = job / "model" / "generation_config.json"

    def sampling(*args: str) -> dict[str, list[str]]:
        assert start("infer", ("--print-config", *args), config=JOB) == (0, [])
        lines = [line.split() for line in capfd.readouterr().out.splitlines()]
        return {line[0].removeprefix("sampling."): line[1:] for line in lines if line[0].startswith("sampling.")}

    # max_length counts as little as it does for vLLM
    owners.write_text('{"temperature": 0.25, "top_k": 9, "max_new_tokens": 7, "max_length": 5, "do_sample": false}')
    shown = sampling("sampling.top_k=3")
    origin = "model/generation_config.json"
    assert shown["temperature"] == ["0.25", origin] and shown["max_tokens"] == ["7", origin]
    assert shown["top_k"] == ["3", "the", "command", "line"] and shown["top_p"] == ["1.0", "default"]
    none = sampling("model.generation_config=none")
    assert none["temperature"] == ["1.0", "default"] and none["max_tokens"] == ["16", "default"]
    owners.write_text('{"temperature": -1}')
    assert start("infer", (), config=JOB)[0] == USAGE
    assert "sampling.temperature: must be >= 0, got -1.0. (from model/generation_config.json)" in capfd.readouterr().err
    owners.write_text('{"top_p": "high"}')
    assert start("infer", (), config=JOB)[0] == CHECKPOINT
    assert "generation_config.json: top_p must be a number" in capfd.readouterr().err


def test_dry_run_counts_what_each_rank_holds(job, capfd):
    args = ("--dry-run", "parallel.tp=4", "parallel.pp=2", "engine.max_num_seqs=2", "engine.max_model_len=100")
    assert start("infer", args, config=JOB) == (0, [])
    lines = capfd.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for cells in map(str.split, lines) if cells and cells[0].isdigit()}
    assert sorted(rows) == [str(rank) for rank in range(8)]
    # dp pp tp, layers, query heads, kv heads, vocabulary rows; 6 query and 2 KV heads over 4 ranks
    assert rows["0"][:7] == ["0", "0", "0", "0-1", "0-1", "0", "0-25"]
    assert rows["7"][:7] == ["0", "1", "3", "2-3", "5", "1", "78-102"]
    # KV of a token: 2 layers, keys and values, one head of 8 channels, 4 bytes
    assert rows["3"][9:11] == ["128", "B"]
    assert rows["3"][11:13] == ["25.0", "KiB"]  # of 2 sequences of 100 tokens


def test_dry_run_weights_are_exact(job, capfd):
    assert start("infer", ("--dry-run",), config=JOB) == (0, [])
    (row,) = [line.split() for line in capfd.readouterr().out.splitlines() if line.strip().startswith("0 ")]
    weights = (job / "model" / "model.safetensors").stat().st_size / 1024
    assert float(row[8]) == pytest.approx(weights, rel=0.02)  # the header is 1 KiB or so
    assert row[9] == "KiB"


def test_help_comes_first(capfd):
    assert cli.main("infer", lambda loaded: 1, ["--help", "--nonsense", "a.b=c"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("usage: python launch/infer.py --config FILE")
    assert "deepspeed --num_gpus N launch/infer.py" in out and "sampling:" in out


# ---- failures of the job itself ----------------------------------------------------------------------------------


def run_and_raise(error: BaseException, *args: str) -> int:
    def run(loaded):
        raise error

    Path("job.yaml").write_text(JOB)
    return cli.main("infer", run, ["--config", "job.yaml", *args])


def test_exit_codes_of_the_job(job, capfd):
    from megalite.errors import CheckpointError, RankLost, Stopped

    assert run_and_raise(CheckpointError("no good")) == 3
    assert capfd.readouterr().err == "error: no good\n"
    assert run_and_raise(RankLost("rank 3 died")) == 70
    assert capfd.readouterr().err == "error: rank 3 died\n"
    assert run_and_raise(Stopped(15)) == 143
    assert capfd.readouterr().err.startswith("stopped by SIGTERM")
    assert run_and_raise(KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == ""
    assert run_and_raise(ZeroDivisionError("oh")) == 1
    assert "Traceback" in capfd.readouterr().err


def test_debug_shows_the_traceback_of_a_users_mistake(job, capfd):
    from megalite.errors import CheckpointError

    assert run_and_raise(CheckpointError("no good"), "--debug") == 3
    err = capfd.readouterr().err
    assert "Traceback" in err and err.endswith("error: no good\n")
    assert start("infer", ("parallel.tp=0", "--debug"), config=JOB)[0] == USAGE
    assert "Traceback" in capfd.readouterr().err


def test_a_rank_says_which_it_is_once_at_work(job, capfd, monkeypatch):
    from megalite.errors import CheckpointError

    put_under_launcher(monkeypatch, 1, 2)
    assert run_and_raise(CheckpointError("no good"), "parallel.tp=2") == 3
    assert capfd.readouterr().err.startswith("[rank 1 on ")


# ---- how fast ----------------------------------------------------------------------------------------------------

LIGHT = """
import sys, runpy
sys.argv = {argv!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "deepspeed", "transformers", "tokenizers", "huggingface_hub"}} & set(sys.modules)
    assert not heavy, heavy
    sys.exit(end.code)
"""


@pytest.mark.parametrize(
    ("script", "args", "code"),
    [
        ("infer.py", ("parallel.tp=0",), 2),
        ("infer.py", ("--dry-run", "parallel.pp=2"), 0),
        ("train.py", ("--help",), 0),
        ("hybrid.py", ("--help",), 0),
    ],
)
def test_the_door_is_quick_and_imports_no_torch(job, script, args, code):
    (job / "job.yaml").write_text(JOB)
    path = str(ROOT / "launch" / script)
    program = LIGHT.format(argv=[path, "--config", "job.yaml", *args], script=path)
    before = os.times()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    after = os.times()
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    # Processor time, 0.3 s where this was written: other tests on the machine do not count towards the 2 s.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_the_command_for_evaluations_without_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.evaluate() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: megalite-eval: needs lm-evaluation-harness.") and "pip install" in said


def test_the_package_installs_no_command_of_another_project(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert [one.split(" = ")[0] for one in given["entry_points"]["console_scripts"]] == ["megalite", "megalite-eval"]
