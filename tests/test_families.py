"""Reading config.json: both formats of it, all families, and files that lie."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BASE, VARIANTS

from megalite.errors import CheckpointError, ConfigError
from megalite.model import families
from megalite.model.config import ModelConfig, Rope
from megalite.model.families import LLAMA_WEIGHTS, Family, TensorRef
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts, Router
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.table import pieces

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def like_llama(architecture: str, model_type: str, **more) -> dict:
    return {**LLAMA, "architectures": [architecture], "model_type": model_type, **more}


QWEN2 = like_llama("Qwen2ForCausalLM", "qwen2")
MISTRAL = like_llama("MistralForCausalLM", "mistral")
MIXTRAL = like_llama("MixtralForCausalLM", "mixtral")
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
QWEN3_MOE = like_llama("Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS)
GEMMA2 = like_llama("Gemma2ForCausalLM", "gemma2", head_dim=16)
PHI3 = like_llama("Phi3ForCausalLM", "phi3", num_key_value_heads=6)
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 103,
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 6,
    "n_positions": 128,
    "n_ctx": 128,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def read(tmp_path):
    """`read(values)` writes them as config.json and reads the folder."""

    def read(values: dict | str, generation: dict | None = None) -> ModelConfig:
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "config.json").write_text(text)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return families.read(tmp_path)

    return read


# ---- what is read


def test_llama(read):
    config = read(LLAMA)
    attention = config.of(SoftmaxAttention)[3]
    assert (config.family, config.num_layers, attention.head_dim, attention.kv_heads) == ("llama", 4, 8, 2)
    assert config.ropes == (Rope(theta=10000.0, rotary_dim=8),)
    assert (config.norm_eps, config.dtype, config.bos_token_id, config.eos_token_ids) == (1e-5, "float32", 1, (2,))


@pytest.mark.parametrize(
    "old, new",
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_scaling": None, "rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        (
            {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        ({}, {"head_dim": None}),
        ({}, {"head_dim": 8}),
        ({}, {"model_type": "mystery"}),  # the architecture decides
        ({}, {"architectures": ...}),  # model_type stands in for it
        ({"num_key_value_heads": ...}, {"num_key_value_heads": 6}),  # as the first Llama configs
    ],
)
def test_both_formats_read_the_same(read, old, new):
    """... leaves a key out."""
    old, new = ({k: v for k, v in {**LLAMA, **changes}.items() if v is not ...} for changes in (old, new))
    assert read(old) == read(new)


def test_yarn_temperature_follows_the_paper_or_the_file(read):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read({**LLAMA, "rope_scaling": yarn}).ropes[0].scaling.attention_factor == pytest.approx(1.1386294)
    given = {**yarn, "attention_factor": 1.5}
    assert read({**LLAMA, "rope_scaling": given}).ropes[0].scaling.attention_factor == 1.5
    deepseek = {**yarn, "mscale": 1.0, "mscale_all_dim": 0.5}
    assert read({**LLAMA, "rope_scaling": deepseek}).ropes[0].scaling.attention_factor == pytest.approx(
        1.1386294 / 1.0693147
    )


def test_phi3_longrope(read):
    scaling = {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    values = {**PHI3, "rope_scaling": scaling, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5}
    rope = read(values).ropes[0]
    assert rope.rotary_dim == 4
    assert (rope.scaling.kind, rope.scaling.factor, rope.scaling.original_max_position) == ("longrope", 4.0, 32)
    assert rope.scaling.attention_factor == pytest.approx((1 + 2 / 5) ** 0.5)
    assert rope.scaling.long_factor == (2.0, 3.0)


def windows(config: ModelConfig) -> list[int | None]:
    return [kind.window for kind in config.of(SoftmaxAttention)]


def test_windows_of_each_family(read):
    assert windows(read({**MISTRAL, "sliding_window": 8})) == [8] * 4
    assert windows(read({**MISTRAL, "sliding_window": None})) == [None] * 4
    assert windows(read(MISTRAL)) == [4096] * 4
    assert windows(read({**QWEN2, "sliding_window": 8, "max_window_layers": 3})) == [None] * 4
    used = {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    assert windows(read(used)) == [None, None, None, 8]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(read({**used, "layer_types": kinds})) == [8, None, None, 8]
    assert windows(read({**GEMMA2, "sliding_window": 6})) == [6, None, 6, None]
    assert windows(read({**GEMMA2, "sliding_window": 6, "layer_types": kinds})) == [6, None, None, 6]
    assert windows(read({**LLAMA, "sliding_window": 8})) == [None] * 4


def test_choices_that_no_tiny_checkpoint_makes(read):
    """All others are compared with transformers, see test_engine_matrix."""
    gemma = read({**GEMMA2, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None})
    assert gemma.of(SoftmaxAttention)[0].softcap is None and gemma.final_softcap == 30.0 and gemma.tie_embeddings
    widths = [read(values).of(DenseMLP)[0].intermediate_size for values in (GPT2, {**GPT2, "n_inner": 92})]
    assert widths == [192, 92]


def test_experts(read):
    def mlps(values: dict) -> list:
        return [layer.sublayers[1].kind for layer in read(values).layers]

    expected = Experts(num_experts=8, intermediate_size=44, router=Router(top_k=2, normalize=True))
    assert mlps(MIXTRAL) == [expected] * 4
    wide, sparse = DenseMLP(intermediate_size=44), replace(expected, num_experts=6, intermediate_size=20)
    sparse = replace(sparse, router=replace(sparse.router, normalize=False))
    assert mlps({**QWEN3_MOE, "mlp_only_layers": [1]}) == [sparse, wide, sparse, sparse]
    assert mlps({**QWEN3_MOE, "decoder_sparse_step": 2}) == [wide, sparse, wide, sparse]
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in QWEN3_MOE.items()}
    assert mlps(renamed) == [sparse] * 4
    normalized = replace(sparse, router=replace(sparse.router, normalize=True))
    assert mlps({**QWEN3_MOE, "norm_topk_prob": True})[0] == normalized


# ---- what is refused


def without(values: dict, *keys: str) -> dict:
    return {name: value for name, value in values.items() if name not in keys}


def scaled(**scaling) -> dict:
    return {**LLAMA, "rope_scaling": scaling}


DAMAGED = {
    "not JSON": ("{", "not JSON"),
    "deep nesting": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "no architecture": (without(LLAMA, "architectures", "model_type"), "architectures is missing"),
    "architectures a string": ({**LLAMA, "architectures": "LlamaForCausalLM"}, "architectures must be a list"),
    "no hidden size": (without(LLAMA, "hidden_size"), "hidden_size is missing"),
    "no vocabulary": (without(LLAMA, "vocab_size"), "vocab_size is missing"),
    "no MLP width": (without(LLAMA, "intermediate_size"), "intermediate_size is missing"),
    "gpt2 spelling": (without(GPT2, "n_embd"), "n_embd is missing"),
    "negative": ({**LLAMA, "num_hidden_layers": -4}, "num_hidden_layers must be between 1 and 4096, got -4"),
    "zero": ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads must be between"),
    "absurd": ({**LLAMA, "hidden_size": 10**12}, "hidden_size must be between"),
    "bool for int": ({**LLAMA, "vocab_size": True}, "vocab_size must be a whole number, got True"),
    "float for int": ({**LLAMA, "hidden_size": 48.0}, "hidden_size must be a whole number"),
    "string for int": ({**LLAMA, "hidden_size": "48"}, "hidden_size must be a whole number"),
    "int for bool": ({**LLAMA, "tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    "heads do not divide hidden": ({**LLAMA, "hidden_size": 50}, "hidden_size must be a multiple of"),
    "kv heads do not divide heads": ({**LLAMA, "num_key_value_heads": 4}, "num_key_value_heads must divide"),
    "odd head": ({**LLAMA, "head_dim": 7}, "head_dim must give an even number of rotated channels"),
    "eps zero": ({**LLAMA, "rms_norm_eps": 0}, "rms_norm_eps must be positive"),
    "eps NaN": ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps must be positive and finite"),
    "activation": ({**LLAMA, "hidden_act": "relu6"}, "hidden_act must be one of silu"),
    "dtype": ({**LLAMA, "torch_dtype": "int8"}, "torch_dtype must be one of float32"),
    "token id": ({**LLAMA, "eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    "negative token id": ({**LLAMA, "eos_token_id": [-1]}, "eos_token_id must be a token id"),
    "quantized": ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "quantization_config.bits must be 4"),
    "attention sinks": ({**LLAMA, "attention_sinks": 4}, "attention sinks are not supported"),
    "encoder": ({**LLAMA, "is_encoder_decoder": True}, "is_encoder_decoder: only decoders"),
    "cross attention": ({**GPT2, "add_cross_attention": True}, "add_cross_attention"),
    "bidirectional": ({**GEMMA2, "use_bidirectional_attention": True}, "only causal attention"),
    "theta": ({**LLAMA, "rope_theta": 0.5}, "rope_theta must be above 1"),
    "theta of a thousand digits": ({**LLAMA, "rope_theta": 10**1000}, "rope_theta must be positive and finite"),
    "theta a string": ({**LLAMA, "rope_theta": "10000"}, "rope_theta must be a number"),
    "scaling a string": ({**LLAMA, "rope_scaling": "yarn"}, "rope_scaling must be an object"),
    "unknown scaling": (scaled(rope_type="proportional", factor=2.0), "rope_scaling has an unsupported rope_type"),
    "scaling kind a number": (scaled(rope_type=3, factor=2.0), "rope_scaling has an unsupported rope_type"),
    "scaling without a kind": (scaled(factor=2.0), "has a factor but no rope_type"),
    "scaling without factor": (scaled(rope_type="linear"), "factor is missing"),
    "scaling by layer type": (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters differs by layer type",
    ),
    "llama3 frequencies": (
        scaled(rope_type="llama3", **{**LLAMA3, "high_freq_factor": 0.5}),
        "high_freq_factor must be at least low_freq_factor",
    ),
    "truncation of yarn": (scaled(rope_type="yarn", factor=4.0, truncate=1), "truncate must be true or false"),
    "experts in groups": (
        like_llama("Glm4MoeForCausalLM", "glm4_moe", **EXPERTS, n_routed_experts=6, n_group=4),
        "n_group must divide the number of experts",
    ),
    "too few experts in groups": (
        like_llama("Glm4MoeForCausalLM", "glm4_moe", **EXPERTS, n_routed_experts=6, n_group=6),
        "topk_group must leave as many experts as a token has",
    ),
    "other latent layers": (
        like_llama("DeepseekV3ForCausalLM", "deepseek_v3", moe_layer_freq=2),
        "moe_layer_freq must be 1",
    ),
    "chunks that are windows": (
        like_llama("Llama4ForCausalLM", "llama4_text", layer_types=["sliding_attention"] * 4),
        "layer_types of layer 0 must say how this family attends there",
    ),
    "partial rotation": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    "longrope factors": (
        {
            **PHI3,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4},
        },
        "short_factor must be a list of 4 numbers",
    ),
    "layer types short": ({**GEMMA2, "layer_types": ["full_attention"]}, "layer_types must be a list of 4 entries"),
    "layer types unknown": ({**GEMMA2, "layer_types": ["linear_attention"] * 4}, "layer_types of layer 0"),
    "layer types against the window": (
        {**QWEN2, "layer_types": ["sliding_attention"] * 4},
        "layer_types of layer 0 must say",
    ),
    "window zero": ({**MISTRAL, "sliding_window": 0}, "sliding_window must be between"),
    "more experts chosen than there are": ({**QWEN3_MOE, "num_experts_per_tok": 9}, "num_experts_per_tok must be"),
    "more experts than any file lists": (
        {**QWEN3_MOE, "num_hidden_layers": 4096, "num_experts": 16384},
        "num_experts of 4096 layers must be at most 262144 together",
    ),
    "dense layers": ({**QWEN3_MOE, "mlp_only_layers": [9]}, "mlp_only_layers must be a list of layer indices"),
}


@pytest.mark.parametrize("values, message", DAMAGED.values(), ids=DAMAGED)
def test_a_config_that_lies_is_refused_by_file_and_key(read, tmp_path, values, message):
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read(values)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "config.json")) and len(text.splitlines()) == 1 and len(text) < 600


KEYS = sorted(
    {key for values in (LLAMA, QWEN3_MOE, GEMMA2, GPT2, PHI3) for key in values}
    | {"rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "use_sliding_window", "dtype"}
    | {"original_max_position_embeddings", "partial_rotary_factor", "mlp_only_layers", "query_pre_attn_scalar"}
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "yarn", "float32", "\ud800"])
SCALING_KEYS = ["rope_type", "type", "factor", "rope_theta", "mscale", "short_factor", "long_factor", "beta_fast"]
KINDS = st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", "su", "dynamic"])
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4)
    | st.dictionaries(st.sampled_from([*SCALING_KEYS, *LLAMA3]), SCALARS | KINDS | st.lists(SCALARS, max_size=4))
)


@settings(max_examples=300, deadline=None)
@given(
    base=st.sampled_from([LLAMA, QWEN2, QWEN3_MOE, MIXTRAL, GEMMA2, GPT2, PHI3, MISTRAL]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_whatever_a_config_says_the_answer_is_a_model_or_a_message(base, changes):
    try:
        config = families.from_values(Path("config.json"), {**base, **changes})
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) < 2000
    else:
        assert all(kind.heads % kind.kv_heads == 0 for kind in config.of(SoftmaxAttention)) and config.hidden_size > 0
        families.weight_names(config)


def test_missing_folder_and_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        families.read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        families.read(tmp_path)


def test_a_damaged_generation_config_is_named(read):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be a token id"):
        read(LLAMA, {"eos_token_id": 1.5})


def test_unknown_architectures_are_refused_by_name_with_what_is_supported(read):
    for values in ({**LLAMA, "architectures": ["MambaForCausalLM"]}, {"model_type": "MambaForCausalLM"}):
        with pytest.raises(ConfigError, match="MambaForCausalLM is not supported") as caught:
            read(values)
        assert "LlamaForCausalLM: README.md has a table" in str(caught.value)


@pytest.mark.parametrize(
    "name, more, needed",
    [
        ("DeepseekV32ForCausalLM", {}, "sparse attention"),
        ("NemotronHForCausalLM", {}, "a Mamba-2 mixer, attention or MLP alone"),
        ("Mamba2ForCausalLM", {"state_size": 128}, "a Mamba-2 mixer alone"),
        ("JambaForCausalLM", {}, "Mamba-1 layers"),
        ("FalconH1ForCausalLM", {}, "side by side in a layer"),
        ("RWKV7ForCausalLM", {}, "RWKV's time and channel mixing"),
        ("MiniMaxText01ForCausalLM", {"layer_types": ["linear_attention"]}, "lightning attention"),
        ("BailingMoeForCausalLM", {}, "its router"),
        ("KimiLinearForCausalLM", {}, "gated delta net"),
        ("LlavaForConditionalGeneration", {}, "the text part"),
        ("MysteryForCausalLM", {"layer_types": ["full_attention", "conv"]}, "layers of type conv"),
        ("MysteryForCausalLM", {"num_experts": 8}, "router and experts"),
        ("MysteryForCausalLM", {"num_experts": 0, "alibi": True}, "ALiBi"),
        ("MysteryForCausalLM", {}, "an entry that names its tensors"),
    ],
)
def test_an_unknown_architecture_is_told_what_it_would_need(read, name, more, needed):
    with pytest.raises(ConfigError, match=f"{name} is not supported: it would need .*{needed}"):
        read({**LLAMA, **more, "architectures": [name]})


def test_the_readme_has_the_families_of_today():
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root / "tools"))
    from draw_families import replaced

    text = (root / "README.md").read_text(encoding="utf-8")
    assert replaced(text) == text, "python tools/draw_families.py --out README.md"


# ---- names, and families of one's own


def test_fused_tensors_have_offsets_and_plain_ones_do_not(read):
    def starts(config: ModelConfig, tensor: str) -> list[int]:
        return [piece.hf_start for piece in pieces(config) if piece.hf == tensor]

    phi3 = read({**PHI3, "num_key_value_heads": 2})
    assert starts(phi3, "model.layers.1.self_attn.qkv_proj.weight") == [0, 48, 64]
    assert starts(phi3, "model.layers.1.mlp.gate_up_proj.weight") == [0, 44]
    assert starts(phi3, "model.layers.1.mlp.down_proj.weight") == [0]
    gpt2 = families.weight_names(read(GPT2)).tensors
    assert starts(read(GPT2), "transformer.h.1.attn.c_attn.bias") == [0, 48, 96]
    assert gpt2["v"] == TensorRef("transformer.h.{layer}.attn.c_attn.weight", transpose=True)
    assert gpt2["v_bias"] == TensorRef("transformer.h.{layer}.attn.c_attn.bias")
    assert gpt2["down"].transpose and not gpt2["embed"].transpose and "lm_head" not in gpt2
    llama = families.weight_names(read({**LLAMA, "attention_bias": True, "mlp_bias": True})).tensors
    assert llama["v"] == TensorRef("model.layers.{layer}.self_attn.v_proj.weight")
    assert llama["gate_bias"] == TensorRef("model.layers.{layer}.mlp.gate_proj.bias")
    assert "attn_norm_bias" not in llama and "lm_head" in llama


def ignores(config: ModelConfig, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in families.weight_names(config).ignored)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.vision is None])
def test_an_absent_key_means_what_it_means_to_transformers(name):
    """Each key of a config.json left out, one by one."""
    import transformers

    variant = VARIANTS[name]
    kind = getattr(transformers, f"{variant.model}Config")
    changes = {**BASE, **variant.changes} if name != "gpt2" else variant.changes
    full = kind(**changes).to_dict()
    architecture, path = families.FAMILIES[full["model_type"]].architecture, Path("config.json")

    def model(values: dict) -> ModelConfig:
        found = families.from_values(path, {**values, "architectures": [architecture]})
        return replace(found, bos_token_id=None, eos_token_ids=())

    model(full)
    for key in full.keys() - {"model_type", "architectures"}:
        less = {other: value for other, value in full.items() if other != key}
        try:
            assert model(less) == model(kind(**less).to_dict()), key
        except CheckpointError:  # a size of some model, which this one's other sizes contradict: refused
            continue


def test_only_known_leftovers_are_ignored(read):
    untied, tied, gpt2 = read(LLAMA), read({**LLAMA, "tie_word_embeddings": True}), read(GPT2)
    assert ignores(untied, "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not ignores(untied, "lm_head.weight") and ignores(tied, "lm_head.weight")
    assert ignores(gpt2, "transformer.h.0.attn.bias") and ignores(gpt2, "transformer.h.0.attn.masked_bias")
    assert not ignores(gpt2, "transformer.h.0.attn.c_attn.bias")
    assert not ignores(tied, "model.lm_head.weight") and not ignores(untied, "model.layers.0.extra.weight")


@pytest.fixture
def registered():
    before = dict(families.FAMILIES)
    yield families.register
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def test_a_family_of_ones_own(read, registered):
    weights = {**LLAMA_WEIGHTS, "q_norm": "model.layers.{layer}.qn.weight", "k_norm": "model.layers.{layer}.kn.weight"}
    registered("mine", Family(architecture="MineForCausalLM", weights=weights, fixed={"qk_norm": "head"}))
    config = read({**LLAMA, "architectures": ["MineForCausalLM"]})
    assert config.family == "mine" and config.of(SoftmaxAttention)[0].qk_norm == "head"
    assert families.weight_names(config).tensors["q_norm"] == TensorRef("model.layers.{layer}.qn.weight")


def test_registering_twice_or_leaving_a_name_out_is_refused(read, registered):
    for name, architecture in (("llama", "OtherForCausalLM"), ("other", "LlamaForCausalLM")):
        with pytest.raises(ConfigError, match="already registered, as llama"):
            registered(name, Family(architecture=architecture, weights=LLAMA_WEIGHTS))
    registered("mine", Family(architecture="MineForCausalLM", weights=LLAMA_WEIGHTS, fixed={"qk_norm": "head"}))
    with pytest.raises(ConfigError, match="family mine: has no tensor name for 'q_norm'"):
        families.weight_names(read({**LLAMA, "architectures": ["MineForCausalLM"]}))


def test_transformers_saves_what_the_names_say(tiny):
    """Every tensor that transformers writes is named, and nothing else is; shapes are the mapping's to check."""
    from megalite.weights.hf import read_headers
    from megalite.weights.table import hf_shapes

    for name in VARIANTS:
        folder: Path = tiny(name)
        config = families.read(folder)
        stored = {tensor: info.shape for tensor, info in read_headers(folder).tensors.items()}
        named = {tensor: shape for tensor, shape in stored.items() if not ignores(config, tensor)}
        assert named == hf_shapes(config), name
