"""The engine on a GPU: right in float32, steady in bfloat16, with and without captured graphs, alone and in parallel.

Run these on a machine with a GPU; they are skipped elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite import LLM, SamplingParams

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
NEW = 24
BFLOAT16_BOUND = {"demo": 0.25, "shaped": 0.25}
"""Largest difference of a token's log-probability between bfloat16 and float32 that is let pass."""


@pytest.fixture(scope="module")
def shaped(tmp_path_factory) -> Path:
    """Random weights in the shape of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("shaped")
    with torch.device("cuda"):
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["demo", "shaped"])
def model(request) -> tuple[str, Path]:
    name = request.param
    return name, DEMO if name == "demo" else request.getfixturevalue("shaped")


def prompts(vocab: int) -> list[list[int]]:
    """Lengths around the block size, one longer than a chunk of the prefill."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (1, 5, 16, 17, 33, 64, 200)]


def generate(folder: Path, dtype: str, **engine) -> list:
    options = {"max_model_len": 512, "max_num_batched_tokens": 96, "max_num_seqs": 8, "gpu_memory_utilization": 0.3}
    with LLM(folder, dtype=dtype, **{**options, **engine}) as llm:
        vocab = min(llm.replica.model.vocab_size, 4096)
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
        return [output.outputs[0] for output in llm.generate(prompts(vocab), params)]


@torch.inference_mode()
def reference(folder: Path, vocab: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    found = []
    for prompt in prompts(vocab):
        ids = torch.tensor([prompt], device="cuda")
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_float32_gives_the_tokens_of_transformers(model, eager):
    name, folder = model
    outputs = generate(folder, "float32", enforce_eager=eager)
    assert [output.token_ids for output in outputs] == reference(folder, 4096)


def test_bfloat16_graphs_change_nothing(model):
    name, folder = model
    eager = generate(folder, "bfloat16", enforce_eager=True)
    graphs = generate(folder, "bfloat16", enforce_eager=False)
    assert [output.token_ids for output in graphs] == [output.token_ids for output in eager]
    assert [output.cumulative_logprob for output in graphs] == [output.cumulative_logprob for output in eager]


def test_overlap_changes_nothing(model):
    name, folder = model
    late, at_once = (generate(folder, "bfloat16", async_scheduling=overlap) for overlap in (True, False))
    assert late == at_once


STATEFUL = {
    "Qwen3Next": {
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "GraniteMoeHybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_state": 64,
        "num_local_experts": 0,
        "shared_intermediate_size": 512,
    },
}


@pytest.mark.parametrize("family", STATEFUL)
def test_states_of_sequences(family, tmp_path):
    """Prompts in chunks beside rows that decode, one by one and as graphs, which must not advance a state twice."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, eos_token_id=None, **STATEFUL[family])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    wanted = reference(tmp_path, 4096)
    for engine in ({"enforce_eager": True}, {"enforce_eager": False}, {"async_scheduling": False, "max_num_seqs": 3}):
        assert [output.token_ids for output in generate(tmp_path, "float32", **engine)] == wanted, engine


OPTIONS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    "listed": {"temperature": 0, "logprobs": 5},
    "edited": {"temperature": 0, "logit_bias": {5: 1.0}, "min_tokens": 4},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_decode_steps_wait_for_nothing_but_earlier_results(model, option):
    name, folder = model
    params = SamplingParams(max_tokens=40, ignore_eos=True, **OPTIONS[option])
    with LLM(folder, dtype="bfloat16", max_model_len=512, max_num_seqs=16, gpu_memory_utilization=0.3) as llm:
        llm.generate(prompts(4096), params)  # compiles
        engine, steps = llm._engine, []
        step = engine.step

        def watched(*args):
            alone = len(steps) > 4 and engine.scheduler.has_work()
            torch.cuda.set_sync_debug_mode("error" if alone else "default")
            try:
                return step(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                steps.append(alone)

        engine.step = watched
        llm.generate(prompts(4096), params)
        assert sum(steps) > 30


def test_graphs_take_no_more_than_the_estimate(model):
    """And give the same in whatever order steps of different sizes come, though they share their temporary memory."""
    name, folder = model
    given = prompts(4096)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(folder, dtype="float32", max_model_len=512, max_num_seqs=16, gpu_memory_utilization=0.3) as llm:
        replica = llm.replica
        llm._engine = replica.engine()
        llm.generate(given[:1], SamplingParams(max_tokens=1, ignore_eos=True))  # no decode step: libraries begin
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        made = {}
        for count in (1, 3, 2, 16, 1, 5, 3, 16, 1):
            some = [given[i % len(given)] for i in range(count)]
            tokens = [output.outputs[0].token_ids for output in llm.generate(some, params)]
            assert made.setdefault(count, tokens) == tokens
        assert {(size, size, True) for size in (1, 2, 4, 8, 16)} <= set(replica._runner.graphs.captured)
        torch.cuda.empty_cache()
        weights = sum(param.numel() for param in replica.decoder.parameters())
        tokens = llm.config.engine.max_num_batched_tokens
        estimate = replica.memory.graphs(max_rows=16, max_tokens=tokens, weights=weights)
        assert torch.cuda.memory_reserved() - before <= estimate


def test_without_a_tokenizer_results_are_ids_alone():
    with LLM(DEMO, skip_tokenizer_init=True, max_model_len=512, gpu_memory_utilization=0.3) as llm:
        [output] = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 3


def test_bfloat16_stays_near_float32(model):
    name, folder = model
    outputs = generate(folder, "bfloat16")
    texts = [prompt + output.token_ids for prompt, output in zip(prompts(4096), outputs, strict=True)]
    with LLM(folder, dtype="float32", max_model_len=512, gpu_memory_utilization=0.3) as llm:
        exact = llm.score(texts)
    differences = []
    for output, scores in zip(outputs, exact, strict=True):
        mine = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        differences += [abs(a - b) for a, b in zip(mine, scores[-NEW:], strict=True)]
    print(
        f"{name}: bfloat16 against float32: max {max(differences):.4f}, mean {sum(differences) / len(differences):.4f}"
    )
    assert max(differences) < BFLOAT16_BOUND[name]


def launch(job: str, config: Path | str, *overrides: str) -> None:
    """A job through the real door."""
    command = [sys.executable, f"launch/{job}.py", "--config", str(config), *overrides]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=True, timeout=300)


@pytest.mark.parametrize(
    ("layout", "sampling"),
    [
        (["parallel.tp=2"], ["sampling.temperature=0"]),
        (["parallel.tp=2"], ["sampling.temperature=0.8", "sampling.top_p=0.95", "sampling.top_k=40"]),
        (["parallel.pp=2"], ["sampling.temperature=0"]),
        (["parallel.tp=2", "parallel.pp=2"], ["sampling.temperature=0"]),
    ],
    ids=str,
)
def test_ranks_together_give_what_one_gives(tmp_path, layout, sampling):
    """TP and PP on CUDA tensors through the real door: over NCCL and symmetric memory where each rank has a GPU of its
    own, over gloo where they share one."""
    texts = {}
    for name, overrides in (("one", []), ("several", layout)):
        file = tmp_path / f"{name}.jsonl"
        options = [f"output.file={file}", "model.dtype=float32", "sampling.max_tokens=24", *sampling]
        options += ["engine.gpu_memory_utilization=0.1", "distributed.device=cuda", *overrides]
        launch("infer", "configs/infer/demo.yaml", *options)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts[name] = [line["outputs"][0]["token_ids"] for line in lines]
    assert texts["several"] == texts["one"]


def trained(folder: Path, *overrides: str) -> list[float]:
    """Losses of eight steps on the GPU; over NCCL where each rank has one of its own, over gloo where they share."""
    shape = "{model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 4, num_attention_heads: 4"
    config = folder / "job.yaml"
    config.write_text(
        f"model: {{config: {shape}, tie_word_embeddings: true}}, dtype: float32}}\n"
        "tokenizer: {vocab_size: 512}\n"
        "data: {pattern: 'json/*.py', sequence_length: 64, held_out: 0.3}\n"
        "optimizer: {warmup_steps: 2}\n"
        "train: {steps: 8, micro_batch_size: 2, gradient_accumulation_steps: 6, eval_every: 8, log_every: 1}\n"
        f"output: {{folder: {folder / 'run'}}}\ndistributed: {{device: cuda}}\n"
    )
    launch("train", config, *overrides)
    lines = [json.loads(line) for line in (folder / "run" / "training" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory) -> list[float]:
    return trained(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.pp=2", "parallel.interleave=2"],
        ["parallel.tp=2", "parallel.pp=2"],
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        *(["parallel.dp=2", f"train.zero_stage={stage}", "train.gradient_accumulation_steps=3"] for stage in (1, 2, 3)),
    ],
    ids=str,
)
def test_layouts_train_on_the_gpu(tmp_path, losses_alone, layout):
    losses = trained(tmp_path, *layout)
    assert len(losses) == 8 and losses == pytest.approx(losses_alone, rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        ["hybrid.free_kv_while_training=true", "hybrid.offload_optimizer=true"],
        ["train.parallel.dp=2", "infer.parallel.tp=2"],
        ["train.parallel.pp=2", "infer.parallel.dp=2"],
    ],
    ids=str,
)
def test_a_hybrid_job_on_the_gpu(tmp_path, layout):
    """In float32 sampler and trainer agree to rounding; weights go over NCCL, or over gloo where ranks share a GPU."""
    config = tmp_path / "job.yaml"
    config.write_text(
        "model: {path: checkpoints/demo, dtype: float32}\n"
        "data: {source: 'configs.hybrid.grpo_arithmetic:additions', options: {digits: 2}}\n"
        "sampling: {max_tokens: 24}\noptimizer: {learning_rate: 1.0e-4, min_learning_rate: 1.0e-5, warmup_steps: 1}\n"
        "hybrid: {steps: 3, prompts_per_step: 8, samples_per_prompt: 4, reward: 'hybrid_rewards:many_digits'}\n"
        f"infer: {{engine: {{gpu_memory_utilization: 0.2}}}}\noutput: {{folder: {tmp_path / 'run'}}}\n"
        "distributed: {device: cuda}\n"
    )
    launch("hybrid", config, *layout)
    log = [json.loads(line) for line in (tmp_path / "run" / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["weight_version"] for line in log] == [1, 2, 3]
    assert all(line["logprob_difference_max"] < 2e-3 and line["gradient_norm"] > 0 for line in log)


def test_swap_and_recompute_on_the_gpu():
    roomy = generate(DEMO, "float32")
    for extra in ({"swap_space": 0.01}, {}):
        tight = generate(DEMO, "float32", num_kv_blocks=24, max_model_len=256, **extra)
        assert [output.token_ids for output in tight] == [output.token_ids for output in roomy]


def test_grammars_on_the_gpu(tiny, tmp_path):
    """Masks made on the host are those of the step, captured or not, with results a step late or not."""
    from tiny_tokenizer import with_tokenizer

    folder = with_tokenizer(tiny("llama3"), tmp_path / "model")
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, seed=3, n=2, structured_outputs={"regex": "[a-f]{12}"}),
        SamplingParams(max_tokens=40, seed=4, structured_outputs={"choice": ["yes", "no"]}, repetition_penalty=1.2),
        SamplingParams(max_tokens=20, ignore_eos=True, seed=5),
    ]
    found = []
    for options in ({}, {"enforce_eager": True}, {"async_scheduling": False}, {"device": "cpu"}):
        with LLM(folder, dtype="float32", max_model_len=128, gpu_memory_utilization=0.1, **options) as llm:
            outputs = llm.generate([[5, 6, 7], [8] * 20, [9]], params)
            found.append([one.token_ids for output in outputs for one in output.outputs])
            texts = [one.text for output in outputs for one in output.outputs]
        assert all(len(text) == 12 and set(text) <= set("abcdef") for text in texts[:2]) and texts[2] in ("yes", "no")
    assert found[1:] == found[:1] * 3
