"""Mistakes that users make: what they are told, with which exit code, and that nothing was started.

To add one, add a line to `MISTAKES`. Bounds of keys, sampling rules and YAML are in test_config.py.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from random_models import write_tensors
from waiting import PATIENCE, free_port

from megalite import cli
from megalite.config.load import load_config
from megalite.errors import CheckpointError, RankLost, Stopped
from megalite.inference.io.output_file import fingerprint
from megalite.model import families
from megalite.run import start as starting
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
MODEL_ALONE = "model: {path: model}\n"
JOB = f"{MODEL_ALONE}input: {{prompts: [hello]}}\n"
NEW_MODEL = """model: {config: {model_type: llama, hidden_size: 48, intermediate_size: 44, num_hidden_layers: 4,
  num_attention_heads: 6}}
output: {folder: out}
"""
TRAIN = f"{NEW_MODEL}data: {{source: job.yaml}}\n"
HYBRID = f"""{NEW_MODEL}data: {{source: "configs.hybrid.grpo_arithmetic:additions"}}
hybrid: {{reward: "megalite.rewards:exact_match"}}
"""
USAGE, CHECKPOINT, RESOURCES = 2, 3, 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Of a tiny model."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "config.json").write_text(json.dumps(MODEL))
    entries = {name: ("F32", shape) for name, shape in hf_shapes(families.read(folder)).items()}
    write_tensors(folder / "model.safetensors", entries, Random(0))
    return folder


@pytest.fixture
def job(tmp_path, monkeypatch, model_folder):
    """A folder with a good model and a good job.yaml, in which the test stands; no launcher."""
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    for name in (*launched(0, 1), "TORCHELASTIC_RUN_ID", "CROSS_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def launched(rank: int | str, world_size: int) -> dict[str, str]:
    """What a launcher sets for one of its ranks on one host."""
    return {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world_size}", "MASTER_PORT": "29500"}


def put_under_launcher(monkeypatch, rank: int | str, world_size: int, **more: str) -> None:
    for name, value in (launched(rank, world_size) | more).items():
        monkeypatch.setenv(name, value)


def start(kind: str, args: Sequence[str], *, config: str) -> tuple[int, list]:
    """Run the command line, but note only that the work was reached. No `config`: `args` are all.

    A hybrid job's functions are looked up in two processes, so only where `args` are about them.
    """
    ran = []
    Path("job.yaml").write_text(config) if config else None
    argv = ["--config", "job.yaml", *args] if config else [*args]
    looked_up = kind != "hybrid" or any(one.startswith(("data.", "hybrid.reward")) for one in args)
    with patch.object(cli, "job_problems", cli.job_problems if looked_up else lambda kind, config: []):
        return with_work(lambda kind, loaded, options: ran.append(loaded) or 0, kind, argv), ran


def with_work(work: Callable[..., int], kind: str, argv: Sequence[str]) -> int:
    with patch.object(cli, "run_job", work):
        return cli.main(kind, argv, [f"launch/{kind}.py"])


@pytest.fixture
def refusal(job, capfd):
    """`refusal(args, ...)`: what is said of a mistake, which must be short and start nothing."""

    def refusal(args: Sequence[str], *, kind="infer", config=JOB, code=USAGE, problems=1) -> str:
        got, ran = start(kind, args, config=config)
        out, err = capfd.readouterr()
        assert (got, ran, out) == (code, [], ""), err
        lines = err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == problems
        assert lines[0].startswith("error: ") and "Traceback" not in err
        assert len(lines) <= 3 * problems and max(map(len, lines)) < 400
        return err

    return refusal


MISTAKES = {
    ("infer", ""): """
        --config=jop.yaml -> jop.yaml: no such file. Did you mean job.yaml?
        --config model -> model: is a folder
        job.yaml -> --config: is needed | --config job.yaml
        model -> Write --config configs/infer/demo.yaml model.path=model.
        """,
    ("serve", ""): """
        model -> Write --config configs/serve/demo.yaml model.path=model.
        """,
    ("infer", JOB): r"""
        --nothing -> --nothing: unknown option
        --chek -> --chek: unknown option. Did you mean --check?
        --model other -> --model: unknown option. Write model.path=other.
        --tensor-parallel-size=2 -> --tensor-parallel-size: unknown option. Write parallel.tp=2.
        -tp --check -> -tp: unknown option. Write parallel.tp=VALUE.
        --max-model-len 64 parallel.tp=2 -> --max-model-len: unknown option. Write engine.max_model_len=64.
        --deepspeed_config ds.json -> DeepSpeed's keys go into a training config's section `deepspeed`
        --check=yes -> --check: takes no value
        --resolved-sha256 -> --resolved-sha256: needs a value
        --config other.yaml -> --config: is given twice
        --resolved-sha256 0000 -> config differs from the one the run was started with
        parallel.tp=010 -> parallel.tp: must be a whole number or null, got '010'. Write 10, | (from the command line)
        parallel.tp=2.5 -> parallel.tp: must be a whole number or null, got 2.5 | (from the command line)
        parallel.tp=true -> must be a whole number or null, got true
        parallel.tp=0x2 -> must be a whole number or null, got '0x2'
        parallel.tp -> parallel.tp: an override is written section.key=value | Write parallel.tp=VALUE.
        parallel.tp= -> Write parallel.tp=VALUE.
        =2 -> an override is written section.key=value | Write section.key=2.
        'parallel.tp = 2' -> without spaces round its `=`. Write parallel.tp=2.
        parallel.tp = 2 -> without spaces round its `=`. Write parallel.tp=2.
        parallel.tp= 2 -> Write parallel.tp=2.
        parallel.tp =2 -> Write parallel.tp=2.
        --parallel.tp 2 -> Write parallel.tp=2.
        parallel.tp=2 parallel.tp=4 -> is set twice. Keep one of | parallel.tp=4
        'sampling.logit_bias={5: 1}' sampling.logit_bias.5=2 -> sampling.logit_bias.5: is set twice
        paralel.tp=2 -> paralel.tp: unknown key. Did you mean parallel.tp?
        sampling.temprature=1 -> unknown key. Did you mean sampling.temperature?
        engine.tp=2 -> engine.tp: unknown key. Did you mean parallel.tp?
        temperature=1 -> Did you mean sampling.temperature?
        engine.tensor_parallel_size=2 -> Did you mean parallel.tp?
        qqqqq.zzzzz=2 -> qqqqq.zzzzz: unknown key. --help lists all keys.
        parallel.tp.x=2 -> parallel.tp has no keys of its own
        parallel..tp=2 -> parallel..tp: unknown key
        parallel=2 -> parallel: is a section. Set one of its keys, e.g. parallel.tp=VALUE
        parallel.tp=[ -> parallel.tp: not YAML | (from the command line)
        sampling.structured_outputs.regex=[a-z]+ -> not YAML | 'sampling.structured_outputs.regex="[a-z]+"'
        'parallel.tp=!!python/name:os.system ' -> parallel.tp:
        'model.path=${oc.env:HOME}' -> model.path: must be a plain value
        'model.tokenizer=${model.path}' -> are not expanded
        'parallel.dp_mode=Async' -> must be one of sync, async, got 'Async'. Did you mean async?
        model.dtype=bf16 -> must be one of auto, float32, bfloat16, float16 | mean bfloat16?

        model.path=mdoel -> no such folder, and not a hub id (owner/name), got 'mdoel' | model?
        model.path=./a/b/c -> no such folder | There is no folder a/b either
        model.path=~/model -> `~` is not expanded here
        model.path=job.yaml -> model.path: must be a folder, not a file
        model.quantization=squeezellm -> 'squeezellm' is not supported | vLLM removed it
        model.quantization=AWQ -> 'AWQ' is not supported: write it awq
        model.quantization=gptq -> 'gptq' is not how the checkpoint is stored, which is not quantized
        model.quantization=foo -> 'foo' is not supported: it is not a format known here
        model.trust_remote_code=true -> code from a model folder is never run | family_module
        model.family_module=no_such_module_here -> model.family_module: importing it failed
        model.family_module=my/family.py -> model.family_module: must be the name of a module
        model.revision=main -> 'main' is for a hub id
        model.tokenizer=nowhere -> model.tokenizer: no such folder
        model.tokenizer=model -> model.tokenizer: has no tokenizer.json
        model.dtype=float16 distributed.device=cpu -> model.dtype: float16 is for GPUs
        --dry-run model.path=owner/name -> --dry-run needs the model's config.json on this disk

        parallel.pp=5 -> the model has 4 layers
        parallel.interleave=2 -> parallel.interleave: is for training
        parallel.sequence_parallel=true -> parallel.sequence_parallel: is for training
        engine.max_model_len=129 -> the model was made for at most 128 tokens, got 129
        engine.block_size=12 -> engine.block_size: must be a power of two
        engine.num_kv_blocks=2 engine.max_model_len=64 -> 2 blocks of 16 tokens can't hold | 4 or more
        engine.max_num_batched_tokens=8 -> must be at least max_num_seqs = 256
        distributed.interface=eth77 -> no such network interface on this host, which has
        distributed.backend=nccl distributed.device=cpu -> distributed.backend: 'nccl' is for GPUs
        sampling.stop_token_ids=[103] -> token ids are 0 to 102, got 103
        'sampling.logit_bias={999: 1}' -> token ids are 0 to 102, got 999

        input.file=job.yaml -> input.file: there are input.prompts too
        input.prompts=[] -> input.prompts: must hold at least one prompt
        "input.prompts=['']" -> input.prompts[0]: an empty prompt
        'input.prompts=[hi, []]' -> input.prompts[1]: an empty prompt
        input.prompts=hello -> must be a list of values or null, got 'hello' | [hello]
        input.prompts=[5] -> a prompt must be text, a list of token ids, or a chat
        'input.prompts=[a: b]' -> goes in quotes
        'input.prompts=[[5, 103]]' -> prompts[0][1] | ids are 0 to 102, got 103
        'input.prompts=[[{content: a}]]' -> input.prompts[0][0]: a chat message needs a role
        output.file=model -> output.file: is a folder, not a file
        output.file=job.yaml/out -> output.file: can't be written: job.yaml is a file
        output.file=/proc/nowhere/out -> output.file: can't be written (
        output.file=/dev/null -> output.file: must be a regular file
        output.overwrite=true -> there is no output.file to overwrite
        """,
    ("infer", "input: {prompts: [a]}\n"): """
        parallel.tp=1 -> model.path: is needed. Set model.path to a folder in Hugging Face layout or a hub id
        """,
    ("infer", MODEL_ALONE): """
        parallel.tp=1 -> input: there is nothing to generate from
        input.file=jop.yaml -> input.file: no such file, got 'jop.yaml'. Did you mean job.yaml?
        input.file=model -> is a folder, not a file
        input.file=job.yaml output.file=model/../job.yaml -> output.file: is the input file as well
        """,
    ("train", TRAIN): """
        model.config=null -> there is no model to train
        output.folder=null -> output.folder: is needed
        output.folder=job.yaml -> output.folder: is a file, not a folder
        model.config.hidden_size=0 -> model.config: hidden_size must be between 1
        model.config.initializer_range=0 -> initializer_range: must be a number above 0
        parallel.first_rank=1 -> is for hybrid jobs, which have two layouts
        parallel.dp_mode=async -> replicas of a training run go in step
        parallel.interleave=2 -> parallel.interleave: needs more than one pipeline stage
        parallel.pp=2 parallel.layers=[4] -> parallel.layers: must be one number for each of the 2 pipeline stages
        parallel.pp=2 parallel.layers=[3,2] -> parallel.layers: must add up to the model's 4 layers, and is 5
        parallel.pp=2 parallel.layers=[4,0] -> parallel.layers[1]: must be >= 1
        parallel.pp=3 parallel.interleave=2 -> interleave: makes 6 chunks, and the model has 4 layers
        parallel.pp=2 train.zero_stage=3 -> train.zero_stage: 3 leaves norms and biases | Use stage 1
        model.config.tie_word_embeddings=true parallel.pp=2 train.zero_stage=2 -> zero_stage: 2 cuts gradients over dp
        train.zero_stage=0 -> train.zero_stage: 0 has no gradient norm to report in float32
        'deepspeed={bf16: {enabled: true}}' -> deepspeed.bf16: is set by model.dtype
        deepspeed.zero_optimization.stage=2 -> is set by train.zero_stage
        deepspeed.gradient_allreduce_op=sum -> deepspeed.gradient_allreduce_op: is set by megalite itself
        deepspeed.wall_clock_breakdwn=true -> no key of DeepSpeed's that has an effect | wall_clock_breakdown?
        deepspeed.nonsense=1 -> deepspeed.nonsense: is no key of DeepSpeed's that has an effect | Leave it out
        optimizer.lr=1 -> optimizer.lr: unknown key. Did you mean optimizer.learning_rate?
        train.num_train_epochs=3 -> Did you mean train.steps?
        optimizer.amsgrad=true -> optimizer.amsgrad: unknown key. --help lists all keys.
        data.sequence_length=4096 -> the model has 2048 positions
        tokenizer.vocab_size=256 -> tokenizer.vocab_size: must be above 256
        optimizer.betas=[0.9] -> optimizer.betas: must be two numbers
        """,
    ("hybrid", HYBRID): """
        output.folder=null -> output.folder: is needed
        'deepspeed.bf16={enabled: true}' -> deepspeed.bf16: is set by model.dtype
        hybrid.steps=20 -> optimizer.warmup_steps: must be at most supervised.steps
        hybrid.reward=null -> hybrid.reward: is needed. Such as megalite.rewards:
        hybrid.reward=parses -> must be package.module:function, got 'parses'
        hybrid.reward=no_such:thing -> hybrid.reward | no_such
        hybrid.reward=megalite.hybrid.rewards:exact_mach -> hybrid.reward | megalite.rewards:exact_match
        data.source=configs.hybrid.grpo_arithmetic:addition -> data.source | arithmetic:additions
        'data.options={digts: 1}' -> data.options | digts
        data.source=null -> data.source: is needed
        data.source=prompts.jsonl -> data.source: no such file
        hybrid.num_generations=8 -> Did you mean hybrid.samples_per_prompt?
        hybrid.samples_per_prompt=1 -> must be >= 2 for grpo | got 1
        hybrid.updates_per_step=3 -> must divide prompts_per_step = 16 | got 3
        hybrid.sync_every=2 -> hybrid.sync_every | hybrid.importance_correction
        infer.model=other -> infer.model: one model trains and generates
        sampling.max_tokens=2048 -> leaves no room for a prompt | 2048 positions
        sampling.temperature=0 -> sampling.temperature: must be above 0
        sampling.n=4 -> sampling.n: is hybrid.samples_per_prompt here
        infer.parallel.first_rank=3 -> infer.parallel.first_rank: leaves ranks without work
        train.parallel.first_rank=1 infer.parallel.first_rank=1 -> one of the two layouts must begin at rank 0
        infer.parallel.sequence_parallel=true -> infer.parallel.sequence_parallel | generating has no use for it
        train.zero_stage=3 train.parallel.pp=2 -> train.zero_stage: 3 leaves norms and biases
        train.zero_stage=0 -> train.zero_stage: 0 has no gradient norm
        """,
}
"""By job and good config, lines `ARGUMENTS -> TEXT | TEXT`: what is typed after the config, and what is said."""


LINES = [
    (kind, config, line.strip())
    for (kind, config), lines in MISTAKES.items()
    for line in lines.splitlines()
    if line.strip()
]
LINES += [
    ("infer", JOB, f"parallel.tp={'9' * 5000} -> parallel.tp: must be a whole number or null"),
    ("infer", JOB, "model.path=\x1b[31m -> printable text on one line, got '\\x1b[31m'"),
]


@pytest.mark.parametrize(("kind", "config", "line"), LINES, ids=[f"{kind} {line[:60]}" for kind, _, line in LINES])
def test_mistakes(refusal, kind, config, line):
    typed, says = line.split(" -> ")
    said = refusal(shlex.split(typed), kind=kind, config=config)
    for text in says.split(" | "):
        assert text in said


def test_all_problems_are_told_at_once(refusal):
    config = """modle: {path: model}
model: {pth: x}
parallel: {tp: 0, pp: x}
input: {prompts: ['']}
"""
    said = refusal(("sampling.n=0", "zero=1"), config=config, problems=7).splitlines()
    assert {line.removeprefix("error: ") for line in said} == {
        "modle: unknown key. Did you mean model? (from job.yaml:1)",
        "model.pth: unknown key. Did you mean model.path? (from job.yaml:2)",
        "parallel.pp: must be a whole number or null, got 'x'. (from job.yaml:3)",
        "parallel.tp: must be >= 1, or null, got 0. (from job.yaml:3)",
        "input.prompts[0]: an empty prompt, got ''. A prompt holds at least one token. (from job.yaml:4)",
        "zero: unknown key. --help lists all keys. (from the command line)",
        "sampling.n: must be >= 1, got 0. (from the command line)",
    }
    said = refusal(("model.path=model", "data.sequence_length=64"), kind="train", config=TRAIN, problems=2)
    assert "model.config: there is a model.path too" in said
    assert "tokenizer.path: is needed: model.path has no tokenizer" in said


# ---- files -------------------------------------------------------------------------------------------------------

WEIGHTS = "model/model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
INPUT = ("input.file=prompts.jsonl",)


def changed(**values) -> bytes:
    return json.dumps({**MODEL, **values}).encode()


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("model/config.json", None, CHECKPOINT, "model/config.json: missing"),
        ("model/config.json", b"{", CHECKPOINT, "model/config.json: not JSON"),
        (
            "model/config.json",
            changed(quantization_config={"bits": 4}),
            CHECKPOINT,
            "quantization_config | not support",
        ),
        ("model/config.json", changed(architectures=["Mamba"], model_type="mamba"), USAGE, "Mamba | LlamaForCausalLM"),
        ("model/config.json", changed(vocab_size=104), CHECKPOINT, "wrong shapes: | lm_head.weight is [103, 48]"),
        ("model/config.json", changed(num_hidden_layers=5), CHECKPOINT, "missing tensors: model.layers.4.input_layer"),
        (WEIGHTS, None, CHECKPOINT, "has no weights"),
        (WEIGHTS, b"\xff" * 64, CHECKPOINT, WEIGHTS),
    ],
)
def test_models_that_are_damaged(refusal, name, content, code, says):
    """What else is seen of a folder is in the tests of model configs and weight files."""
    Path(name).unlink()
    Path(name).write_bytes(content) if content else None
    said = refusal((), code=code)
    assert all(text in said for text in says.split(" | "))


@pytest.mark.parametrize(
    ("name", "args", "config", "code"),
    [
        ("other.yaml", ("--config", "other.yaml"), "", USAGE),
        ("prompts.jsonl", INPUT, MODEL_ALONE, USAGE),
        ("model/config.json", (), JOB, CHECKPOINT),
        (INDEX, (), JOB, CHECKPOINT),
    ],
)
def test_what_is_no_file_or_too_large_a_one_is_not_read(refusal, name, args, config, code):
    path = Path(name)
    Path(WEIGHTS).unlink() if name == INDEX else None
    no_file, large = "a pipe or a device, not a file", " MiB, so not what it should be"
    for make, why in (
        (os.mkfifo, no_file),
        (lambda path: path.symlink_to("/dev/zero"), no_file),
        (lambda path: path.write_bytes(bytes(50_000_000)), large),
    ):
        if name != "prompts.jsonl" or why == no_file:  # prompts may be many
            path.unlink(missing_ok=True)
            make(path)
            assert f"{'input.file' if args == INPUT else name}: " in (said := refusal(args, config=config, code=code))
            assert why in said


def test_a_config_that_is_not_utf8_is_told_with_the_line(refusal):
    Path("bad.yaml").write_bytes(b"a: 1\nb: \xff")
    assert "bad.yaml:2: is not UTF-8" in refusal(("--config", "bad.yaml"), config="")


# ---- ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "launcher", "args", "says"),
    [
        (
            (0, 2),
            {},
            "sampling.n=1",
            "the launcher started 2 ranks | 1 * 1 * 1 = 1 | deepspeed --num_gpus 1 |  sampling.n=1",
        ),
        (
            (0, 4),
            {"CROSS_SIZE": "1"},
            "parallel.dp=2",
            "deepspeed started 4 ranks, but the config asks for tp * pp * dp = 1 * 1 * 2 = 2 | --num_gpus 2 ",
        ),
        (
            (0, 1),
            {"TORCHELASTIC_RUN_ID": "x"},
            "parallel.pp=4",
            "torchrun started 1 rank, | = 4 | torchrun --nproc_per_node 4 ",
        ),
        (("x", 2), {}, "sampling.n=1", "RANK: must be a whole number"),
    ],
)
def test_ranks_that_the_layout_does_not_need(refusal, monkeypatch, rank, launcher, args, says):
    put_under_launcher(monkeypatch, *rank, **launcher)
    said = refusal((args,))
    assert all(text in said for text in says.split(" | "))


def test_too_many_ranks(refusal):
    assert "100000 ranks on this host" in refusal(("parallel.dp=100000",), code=RESOURCES)


# ---- what is good is let through ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "args"),
    [
        ("infer", JOB, ("--parallel.dp=1", "engine.max_model_len=128", "--local_rank=0")),
        ("infer", JOB, ("model.path=owner/name", "model.revision=main")),
        ("infer", JOB, ("output.file=new/folder/out.jsonl",)),
        ("infer", JOB, ("model.load_format=dummy",)),
        ("infer", MODEL_ALONE, ("input.file=-", "sampling.n=2", "sampling.best_of=3")),
        ("infer", MODEL_ALONE, ("input.prompts=[[1, 2], [{role: user, content: hi}]]",)),
        ("train", TRAIN, ()),
    ],
)
def test_good_input_reaches_the_job(job, capfd, kind, config, args):
    if "model.load_format=dummy" in args:
        Path(WEIGHTS).unlink()
    code, ran = start(kind, args, config=config)
    out, err = capfd.readouterr()
    assert (code, len(ran), out, err) == (0, 1, "", "")
    assert not (job / "new").exists() and not (job / "out").exists()  # checks leave nothing behind


def test_only_one_rank_of_a_host_reports(job, monkeypatch, capfd):
    monkeypatch.setattr(cli, "QUIET_WAIT", 0)
    for rank in range(3):
        put_under_launcher(monkeypatch, rank, 3)
        assert start("infer", (), config=JOB)[0] == USAGE
        assert ("error: " in capfd.readouterr().err) == (rank == 0)


def test_ranks_get_the_resolved_file(job, monkeypatch):
    seen = {}

    def run_ranks(command, num_ranks, *, files, stdin, stopped_timeout):
        script, *options, sha256, debug = command
        resolved = f"/proc/self/fd/{files[0]}"
        assert (options, stdin) == (["--config", resolved, "--resolved-sha256"], False)
        seen.update(script=script, text=Path(resolved).read_text(), sha256=sha256, ranks=num_ranks, debug=debug)
        ran = []
        put_under_launcher(monkeypatch, 0, 4)
        seen["rank"] = with_work(lambda kind, loaded, options: ran.append(loaded) or 0, "infer", command[1:5])
        seen["loaded"] = ran[0]
        return 7

    monkeypatch.setattr(starting, "run_ranks", run_ranks)
    args = ("parallel.tp=2", "parallel.pp=2", "sampling.stop=${x}", "--debug")
    assert start("infer", args, config=JOB) == (7, [])
    assert (seen["ranks"], seen["debug"], seen["rank"]) == (4, "--debug", 0)
    assert os.path.isabs(seen["script"])
    assert seen["loaded"].sha256 == seen["sha256"] and seen["loaded"].given == seen["text"]
    assert seen["loaded"].origins["sampling.max_tokens"] == "default", "what nobody set stays so on the ranks"
    assert seen["loaded"].config.sampling.stop == "${x}"


def test_text_in_arguments_of_a_bare_multi_host_launch_is_refused(job, monkeypatch, capfd):
    put_under_launcher(monkeypatch, 0, 2, CROSS_SIZE="2", LOCAL_SIZE="1", MASTER_PORT=str(free_port()))
    monkeypatch.setattr("megalite.run.rendezvous._AFTER_PROBLEM", 0.0)  # the other host's rank does not come
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
    assert start("infer", ("--check", "parallel.tp=2", "input.prompts=[[5]]"), config=JOB) == (0, [])
    assert "job.yaml: no problem found; tp=2,pp=1,dp=1: 2 ranks" in capfd.readouterr().out


def test_check_reads_the_tokenizer_and_every_prompt(refusal):
    check = ("--check", "engine.max_model_len=8")
    assert "input.prompts[0]: the model has no tokenizer.json" in refusal(check)
    assert "input.prompts[1]: the prompt has 9 tokens" in refusal((*check, f"input.prompts=[[5],{[5] * 9}]"))
    Path("model/tokenizer.json").write_text("[]")
    for kind, config in (("infer", JOB), ("serve", MODEL_ALONE)):
        assert "model/tokenizer.json: is not a tokenizer" in refusal(check, kind=kind, config=config, code=CHECKPOINT)


def test_results_of_other_settings_show_before_any_rank_starts(refusal, job, capfd):
    before = fingerprint(load_config("infer", "job.yaml").config, weights="some", inputs="others")
    Path("out.jsonl").write_text("{}\n")
    Path("out.jsonl.run.json").write_text(json.dumps({"decided_by": before}))
    says = "output.file: holds results of another run (sampling.max_tokens was 16, is 5), got"
    assert says in refusal(("output.file=out.jsonl", "sampling.max_tokens=5"))
    assert start("infer", ("output.file=out.jsonl", "output.overwrite=true"), config=JOB)[0] == 0


def test_print_config_shows_origins_and_the_owners_sampling(job, capfd):
    owners = job / "model" / "generation_config.json"

    def printed(*args: str) -> dict[str, list[str]]:
        assert start("infer", ("--print-config", *args), config=JOB) == (0, [])
        return {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines()}

    # max_length counts as little as it does for vLLM
    owners.write_text('{"temperature": 0.25, "top_k": 9, "max_new_tokens": 7, "max_length": 5, "do_sample": false}')
    shown = printed("sampling.top_k=3")
    origin = "model/generation_config.json"
    assert shown["model.path"] == ["model", "job.yaml:1"]
    assert shown["sampling.temperature"] == ["0.25", origin] and shown["sampling.max_tokens"] == ["7", origin]
    assert shown["sampling.top_k"] == ["3", "the", "command", "line"] and shown["sampling.top_p"] == ["1.0", "default"]
    none = printed("model.generation_config=none")
    assert none["sampling.temperature"] == ["1.0", "default"] and none["sampling.max_tokens"] == ["16", "default"]
    owners.write_text('{"temperature": -1}')
    assert start("infer", (), config=JOB)[0] == USAGE
    assert "sampling.temperature: must be >= 0, got -1.0. (from model/generation_config.json)" in capfd.readouterr().err
    owners.write_text('{"top_p": "high"}')
    assert start("infer", (), config=JOB)[0] == CHECKPOINT
    assert "generation_config.json: top_p must be a number" in capfd.readouterr().err


def test_dry_run_counts_what_each_rank_holds(job, capfd):
    def rows(*args: str) -> dict[str, list[str]]:
        assert start("infer", ("--dry-run", *args), config=JOB) == (0, [])
        lines = map(str.split, capfd.readouterr().out.splitlines())
        return {cells[0]: cells[1:] for cells in lines if cells and cells[0].isdigit()}

    held = rows("parallel.tp=4", "parallel.pp=2", "engine.max_num_seqs=2", "engine.max_model_len=100")
    assert sorted(held) == [str(rank) for rank in range(8)]
    # dp pp tp, layers, query heads, kv heads, vocabulary rows; 6 query and 2 KV heads over 4 ranks
    assert held["0"][:7] == ["0", "0", "0", "0-1", "0-1", "0", "0-25"]
    assert held["7"][:7] == ["0", "1", "3", "2-3", "5", "1", "78-102"]
    # KV of a token: 2 layers, keys and values, one head of 8 channels, 4 bytes
    assert held["3"][9:11] == ["128", "B"]
    assert held["3"][11:13] == ["25.0", "KiB"]  # of 2 sequences of 100 tokens
    weights = Path(WEIGHTS).stat().st_size / 1024
    alone = rows()["0"]
    assert float(alone[7]) == pytest.approx(weights, rel=0.02)  # the header is 1 KiB or so
    assert alone[8] == "KiB"


def test_help_comes_first(capfd):
    assert cli.main("infer", ["--help", "--nonsense", "a.b=c"], ["launch/infer.py"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("usage: python launch/infer.py --config FILE")
    assert "deepspeed --num_gpus N launch/infer.py" in out and "sampling:" in out


# ---- failures of the job itself ----------------------------------------------------------------------------------


def run_and_raise(error: BaseException, *args: str) -> int:
    def fail(kind, loaded, options):
        raise error

    Path("job.yaml").write_text(JOB)
    return with_work(fail, "infer", ["--config", "job.yaml", *args])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (CheckpointError("no good"), 3, "error: no good\n"),
        (RankLost("rank 3 died"), 70, "error: rank 3 died\n"),
        (Stopped(15), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oh"), 1, "Traceback"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes_of_the_job(job, capfd, error, code, says):
    assert run_and_raise(error) == code
    said = capfd.readouterr().err
    assert said.startswith(says) if says else said == ""


def test_debug_shows_the_traceback_of_a_users_mistake(job, capfd):
    assert run_and_raise(CheckpointError("no good"), "--debug") == 3
    err = capfd.readouterr().err
    assert "Traceback" in err and err.endswith("error: no good\n")
    assert start("infer", ("parallel.tp=0", "--debug"), config=JOB)[0] == USAGE
    assert "Traceback" in capfd.readouterr().err


def test_a_rank_says_which_it_is_once_at_work(job, capfd, monkeypatch):
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
    heavy = {{"torch", "deepspeed", "transformers", "tokenizers", "huggingface_hub", "numpy"}} & set(sys.modules)
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
    for _ in range(3):  # the first may have to compile what it imports
        before = os.times()
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
        after = os.times()
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        # Processor time, 0.3 s where this was written: other tests on the machine do not count towards the 2 s.
        took = after.children_user + after.children_system - before.children_user - before.children_system
        if took < 2:
            break
    assert took < 2


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


# ---- the server

SERVE = "model: {path: model}"


def test_a_servers_key_is_told_by_its_place_and_never_shown(refusal, monkeypatch, capfd):
    for config, *args in ((SERVE, "server.api_key=hunter22"), (f"{SERVE}\nserver: {{api_key: 4711}}",)):
        said = refusal(args, kind="serve", config=config)
        assert "server.api_key: must say where the key is, as env:NAME or file:PATH" in said
        assert "hunter22" not in said and "4711" not in said
    start("serve", ["server.api_key=hunter22", "--print-config"], config=SERVE)
    assert "hunter22" not in "".join(capfd.readouterr())
    assert "server.api_key: " in refusal(["server.api_key=env:NO_SUCH_KEY"], kind="serve", config=SERVE)
    monkeypatch.setenv("NO_SUCH_KEY", "hunter22")
    assert start("serve", ["server.api_key=env:NO_SUCH_KEY", "--check"], config=SERVE)[0] == 0
    assert "hunter22" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("host", "warned"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("localhost", False)]
)
def test_a_server_open_to_a_network_without_a_key_is_warned_of(host, warned, job, capfd):
    assert start("serve", [f"server.host={host}", "--check"], config=SERVE)[0] == 0
    assert ("is open to a network" in capfd.readouterr().err.replace("\n  ", " ")) == warned


def test_a_server_says_what_has_to_be_installed(refusal):
    with patch("megalite.serve.checks.find_spec", lambda name: None if name == "uvicorn" else name):
        said = refusal([], kind="serve", config=SERVE)
    assert "needs uvicorn, which is not installed. Type: pip install 'megalite[serve]'" in said
