"""LoRA adapters beside a model, against PEFT in float32."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from pool_replica import generate, make_replica
from tiny_models import VOCAB

from megalite.config.schema import InputSection, ModelSection, SamplingParams, ServeConfig
from megalite.config.validate import validate
from megalite.convert.convert import convert
from megalite.convert.merge import merge
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.io.job_input import read_inputs
from megalite.model.families import read
from megalite.weights.folder import ModelFolder
from megalite.weights.lora import chosen_modules, read_adapter

_random = random.Random(5)
PROMPTS = [[_random.randrange(3, VOCAB) for _ in range(length)] for length in (5, 17, 9, 12, 7)]
CHOSEN = ["second", "", "first", "second", "first"]
MAX_TOKENS = 8
"""Of every prompt, with its adapter."""


def make_adapter(model: Path, folder: Path, seed: int, **settings):
    """A random adapter as PEFT saves it, and the model with it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_" in name:
                param.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapters of different targets and ranks, and what PEFT generates with each of them and without any."""
    folder = tmp_path_factory.mktemp("lora")
    settings = {
        "first": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "second": {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
            "rank_pattern": {"v_proj": 5, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"o_proj": 9},
        },
    }
    expected = {}
    for seed, (name, how) in enumerate(settings.items()):
        expected[name] = make_adapter(tiny("llama3", 2), folder / name, seed, **how)
    with expected["first"].disable_adapter():
        plain = [greedy(expected["first"], prompt) for prompt in PROMPTS]
    wanted = [plain[place] if not name else greedy(expected[name], PROMPTS[place]) for place, name in enumerate(CHOSEN)]
    return {name: str(folder / name) for name in settings}, wanted, plain


@torch.no_grad()
def greedy(model, prompt):
    """Tokens, and log-probabilities of them and of the prompt's after the first."""
    ids = list(prompt)
    for _ in range(MAX_TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return ids[len(prompt) :], scores[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def run_mixed(rank, folder, layout, lora, chosen):
    """All prompts at once, each with its adapter, twice: the second time over what the first left in the cache."""
    replica = make_replica(rank, folder, layout, lora=lora, block_size=4, max_num_batched_tokens=16, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    engine = replica.engine()
    found = []
    for key in ("first", "again"):
        outputs = generate(replica, [(prompt, params) for prompt in PROMPTS], chosen, engine=engine, key=key)
        for output in outputs:
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            ids = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
            scores = [entry[token].logprob for entry, token in zip(entries, ids, strict=True)]
            found.append((output.outputs[0].token_ids, torch.tensor(scores)))
    return found


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (1, 2), (3, 1)], ids=str)
def test_mixed_batches_are_those_of_peft(layout, tiny, adapters, ranks):
    """6 heads over 4 ranks and 2 KV heads over 3 are uneven."""
    folders, wanted, _ = adapters
    layout = Layout(*layout)
    for found in ranks(layout.size).run(run_mixed, tiny("llama3", 2), layout, folders, CHOSEN):
        for (tokens, scores), (expected, logprobs) in zip(found, wanted * 2, strict=True):
            assert tokens == expected
            torch.testing.assert_close(scores, logprobs, atol=1e-4, rtol=0)


def test_the_same_prompt_shares_no_cache_between_adapters(tiny, adapters, ranks):
    """Long enough for whole blocks, one request after the other."""
    folders, _, _ = adapters
    [found] = ranks(1).run(cached_tokens, tiny("llama3", 2), folders)
    assert found == [0, 0, 16, 16, 0]


def cached_tokens(rank, folder, lora):
    replica = make_replica(rank, folder, lora=lora, block_size=4, max_num_seqs=1)
    engine = replica.engine()
    params, found = SamplingParams(temperature=0, max_tokens=2), []
    for key, name in enumerate(["first", "second", "second", "first", ""]):
        before = engine.scheduler.stats.prefix_hit_tokens
        generate(replica, [(PROMPTS[1], params)], [name], engine=engine, key=str(key))
        found.append(engine.scheduler.stats.prefix_hit_tokens - before)
    return found


@pytest.mark.parametrize("name", ["phi3", "gpt2", "qwen2", "gemma2"])
def test_fused_turned_and_biased_linears(name, tiny, tmp_path, ranks):
    model = make_adapter(tiny(name), tmp_path / "own", 3, r=4, lora_alpha=8, target_modules="all-linear")
    wanted = [greedy(model, prompt) for prompt in PROMPTS]
    chosen = ["own"] * len(PROMPTS)
    for found in ranks(2).run(run_mixed, tiny(name), Layout(2), {"own": str(tmp_path / "own")}, chosen):
        for (tokens, scores), (expected, logprobs) in zip(found, wanted * 2, strict=True):
            assert tokens == expected
            torch.testing.assert_close(scores, logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora is True: DoRA scales"),
        ({"bias": "all"}, "bias is 'all': trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules are no low-rank adapter"),
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base model's weights"),
        ({"r": 7}, "rank 7 of this model's linear is"),
        ({"r": None}, "r must be a number above 0"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_reason(changes, message, tiny, adapters, tmp_path):
    source = Path(adapters[0]["first"])
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, read(tiny("llama3", 2)))


def test_tensors_that_are_not_the_models_are_refused(tiny, adapters, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(adapters[0]["first"])
    tensors = load_file(source / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    start = "base_model.model.model."
    a = f"{start}layers.0.mlp.up_proj.lora_A.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != a}, "up_proj lacks lora_A"),
        ({**tensors, f"{start}embed_tokens.lora_embedding_A": tensors[a].clone()}, "the embeddings are not adapted"),
        ({**tensors, f"{start}layers.9.mlp.up_proj.lora_A.weight": tensors[a].clone()}, "no linear of that name"),
        ({**tensors, f"{start}norm.weight": tensors[a].clone()}, "no low-rank part of a linear"),
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_adapter(tmp_path, read(tiny("llama3", 2)))
    with pytest.raises(CheckpointError, match="layers.0.mlp.experts|experts and routers"):
        chosen_modules(["experts"], read(tiny("mixtral")))


def test_targets_are_those_of_peft(tiny):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama3", 2))
    for targets in (["q_proj", "mlp.up_proj"], r".*layers\.[02]\..*(k|down)_proj", "all-linear"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
        mine = {f"base_model.model.{name}" for name in chosen_modules(targets, read(tiny("llama3", 2)))}
        adapted.unload()
        assert mine == names


@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt2"])
@pytest.mark.parametrize("cut", [False, True], ids=["folder", "shards"])
def test_merged_models_are_those_of_peft(name, cut, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_adapter(tiny(name), tmp_path / "own", 3, r=4, lora_alpha=8, target_modules="all-linear")
    source = tiny(name)
    if cut:
        convert(source, Layout(tp=2, pp=2), tmp_path / "shards")
        source = tmp_path / "shards"
    merge(source, tmp_path / "own", tmp_path / "merged", max_shard_bytes=30_000)
    ids = torch.tensor([PROMPTS[1]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-5)
        expected = model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_from_python(tiny, adapters):
    """By name, and in vLLM's spelling, which reads what is new."""
    from types import SimpleNamespace

    from megalite import LLM

    folders, wanted, plain = adapters
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(tiny("llama3", 2), dtype="float32", device="cpu", lora={"first": folders["first"]}) as llm:

        def tokens(prompts, lora):
            outputs = llm.generate([list(prompt) for prompt in prompts], params, lora_request=lora, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

        assert tokens(PROMPTS[2:3], "first") == [wanted[2][0]]
        new = SimpleNamespace(lora_name="second", lora_int_id=1, lora_path=folders["second"])
        assert tokens(PROMPTS[:3], [new, None, "first"]) == [one[0] for one in wanted[:3]]
        assert tokens(PROMPTS, None) == [one[0] for one in plain]
        with pytest.raises(ConfigError, match="there is no LoRA adapter 'third'.*There are: first, second"):
            tokens(PROMPTS[:1], "third")
        with pytest.raises(ConfigError, match="2 were given for 1 prompts"):
            tokens(PROMPTS[:1], ["first", "first"])


def test_lines_name_their_adapters(tiny, adapters, tmp_path):
    names = [*CHOSEN[:4], "third"]
    lines = [{"prompt": prompt, "lora": name} for prompt, name in zip(PROMPTS, names, strict=True)]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": [1], "lora": 3}])
    )
    model, (folders, *_) = ModelFolder.open(tiny("llama3", 2)), adapters
    limits = PromptLimits(tokenizer=None, vocab_size=model.model.vocab_size, max_model_len=64, adapters=tuple(folders))
    batch = read_inputs(InputSection(file=str(tmp_path / "in.jsonl")), SamplingParams(), limits)
    assert [request.lora for request in batch.requests] == CHOSEN[:4]
    assert "in.jsonl:5: there is no LoRA adapter 'third'" in batch.failures[0].error
    assert "in.jsonl:6: lora must be the name of an adapter, got 3" in batch.failures[1].error


def test_configs_with_adapters_that_are_not_there_are_refused(tiny, tmp_path):
    config = ServeConfig(model=ModelSection(path="m"), lora={"m": str(tmp_path), "": "x", "a": str(tmp_path / "none")})
    said = [str(one) for one in validate(config, None, None) if one.key == "lora"]
    assert len(said) == 3 and "not the model's" in said[0] and "a must be a folder as PEFT saves" in said[2]
