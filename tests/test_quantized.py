"""Quantized checkpoints: every format becomes the numbers that its documentation says, in every layout."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pool_replica import generate, make_replica
from quantized_models import CACHE_SCALES, KINDS, VOCAB, with_cache_scales, write, write_mxfp4
from safetensors.torch import load_file, save_file

from megalite import LLM, SamplingParams
from megalite.convert import scaling
from megalite.convert.convert import convert, export, reshard
from megalite.convert.quantize import quantize, to_e4m3
from megalite.convert.sample import whole_model
from megalite.convert.verify import verify
from megalite.core import linear as linears
from megalite.core import quantized
from megalite.core.layout import Layout
from megalite.core.linear import settle
from megalite.core.parallel_state import ParallelState
from megalite.core.quantized import E2M1, coded
from megalite.errors import CheckpointError, ConfigError
from megalite.kernels import codes as codes_kernels
from megalite.kernels.codes import block_of
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.layers import experts
from megalite.planner import applied as planned
from megalite.planner.applied import applied
from megalite.weights.checkpoint import open_checkpoint
from megalite.weights.table import check_cuts, hf_shapes, local_bytes, local_elements, owned
from megalite.weights.transfer import build, load_folder

MIXTURES = ("awq", "fp8_blocks", "fp8_scalar", "packed_4_zeros")
MODELS = [(kind, "llama") for kind in KINDS] + [(kind, "mixtral") for kind in MIXTURES] + [("mxfp4", "gpt_oss")]


WHOLE = Layout()


def loaded(folder, layout=WHOLE, *, model=None, quantization=None):
    """The parameters of a rank's decoder as it computes with them; `model`: in place of what the folder says."""
    model = model or families.read(folder)
    decoder = build(model, ParallelState(layout), dtype=torch.float32, device=torch.device("cpu"))
    load_folder(decoder, folder)
    settle(decoder, quantization)
    params = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        for param in ("up", "down") if getattr(module, "turned", False) else ():  # as codes have them
            values = params[f"{name}.{param}"]
            params[f"{name}.{param}"] = values.unflatten(0, (module.num_local, -1)).mT.flatten(0, 1)
    return params


def same(left, right):
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype and torch.equal(values, right[name]), name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of a kind and family: the folder with codes, and the one with the numbers."""
    made = {}

    def folders(kind, family="llama"):
        if (kind, family) not in made:
            at = tmp_path_factory.mktemp(f"{kind}-{family}")
            if kind == "mxfp4":
                write_mxfp4(at / "codes", at / "numbers")
            else:
                write(kind, at / "codes", at / "numbers", family=family)
            made[kind, family] = at / "codes", at / "numbers"
        return made[kind, family]

    return folders


@pytest.mark.parametrize(("kind", "family"), MODELS)
def test_codes_become_the_numbers_that_they_stand_for(kind, family, models):
    codes, numbers = models(kind, family)
    same(loaded(codes), loaded(numbers))
    model, plain = families.read(codes), families.read(numbers)
    assert local_elements(model, Layout(), 0) == local_elements(plain, Layout(), 0)
    assert local_bytes(model, Layout(), 0, 4) < 0.6 * local_bytes(plain, Layout(), 0, 4)


def on_ranks(rank, folders, layout):
    for codes, numbers in folders:
        model = families.read(codes)
        cut_alike = families.read(numbers) if model.quantized_as == "mxfp4" else replace(model, quantization=None)
        mine, theirs = loaded(codes, layout), loaded(numbers, layout, model=cut_alike)
        if mine["head.weight"].shape != theirs["head.weight"].shape:  # of three blocks
            assert len(mine.pop("head.weight")) == (64, 32)[rank] and len(theirs.pop("head.weight")) == 48
        same(mine, theirs)


def test_ranks_hold_their_part(models, ranks):
    """The widths are five groups, of which one rank has three."""
    ranks(2).run(on_ranks, [models(kind, family) for kind, family in MODELS], Layout(2))


def engine_on_ranks(rank, folders):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=VOCAB)
    asked = [([3, 14, 15, 9, 26, 5], params), ([7, 8], params)]
    for number, (codes, numbers) in enumerate(folders):
        answers = []
        for folder, layout in ((codes, Layout(2, 1)), ((codes, numbers)[number % 2], Layout(1, 2))):
            replica = make_replica(rank, folder, layout, block_size=4, max_num_batched_tokens=4)
            answers.append([output.outputs[0] for output in generate(replica, asked)])
        for got, want in zip(*answers, strict=True):
            assert got.token_ids == want.token_ids, codes
            for mine, theirs in zip(got.logprobs or (), want.logprobs or (), strict=True):
                assert all(abs(mine[token].logprob - theirs[token].logprob) < 1e-4 for token in range(VOCAB))


def test_engines_on_ranks_say_the_same(models, ranks):
    """Every format with tp=2, against itself or its numbers with pp=2."""
    named = [(kind, family) for kind, family in MODELS if family != "mixtral" or kind == "awq"]
    ranks(2).run(engine_on_ranks, [models(kind, family) for kind, family in named])


CHAINED = ("gptq_act_order", "packed_4_zeros", "fp8_static", "fp8_scalar", "fp8_uneven", "int8_rows")


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "llama") for kind in CHAINED), ("awq", "mixtral"), ("fp8_blocks", "mixtral"), ("mxfp4", "gpt_oss")],
)
def test_a_chain_of_layouts_gives_the_checkpoint_back(kind, family, models, tmp_path):
    codes, numbers = models(kind, family)
    convert(codes, Layout(2), tmp_path / "tp2", dtype="float32")
    reshard(tmp_path / "tp2", Layout(1, 2), tmp_path / "pp2")
    assert verify(tmp_path / "pp2", codes).is_well
    export(tmp_path / "pp2", tmp_path / "out")
    before, after = load_file(codes / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype, name
        assert torch.equal(values.reshape(after[name].shape).view(torch.uint8), after[name].view(torch.uint8)), name
    same(loaded(tmp_path / "pp2"), loaded(numbers))
    if kind == "mxfp4":
        report = verify(codes, numbers)
        assert report.is_well and sum("0.00% of its norm, at most 0" in note for note in report.notes) == 4


@pytest.mark.parametrize("kind", ["packed_4", "packed_8_rows", "fp8_rows", "fp8_blocks", "mxfp4"])
def test_tokens_are_those_of_transformers(kind, models):
    """What transformers can run on a CPU: it turns codes into numbers as well."""
    from reference import greedy

    codes, _ = models(kind, "gpt_oss" if kind == "mxfp4" else "llama")
    want = greedy(codes, [3, 14, 15, 9, 26], 8)
    assert tokens_of(codes, want.prompt, 8) == want.tokens


@pytest.mark.parametrize("kind", ["packed_4_zeros", "packed_8_rows"])
def test_matrices_are_those_of_compressed_tensors(kind, models):
    """By its own code, also where transformers can't load what it makes: with zero points."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder, _ = models(kind)
    given = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    begin, mine = "model.layers.1.mlp.down_proj.", loaded(folder)["layers.1.mlp.down.weight"]
    tensors = load_file(folder / "model.safetensors")
    stored = {name.removeprefix(begin): values for name, values in tensors.items() if name.startswith(begin)}
    theirs = PackedQuantizationCompressor.decompress(stored, QuantizationScheme.model_validate(given))["weight"]
    torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quant_method": "squeezellm"}, "vLLM removed it"),
        ({"quant_method": "mxfp4"}, "experts whose matrices are one tensor"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits must be one of 4, 8, got 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 33}, "group_size must be -1 or a multiple of 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int8"}, "pack_dtype must be int32"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version must be one of gemm"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme must be one of dynamic, static"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size must be two whole numbers"),
        ({"quant_method": "fp8", "modules_to_convert": ["embed_tokens"]}, "modules_to_convert must be absent"),
        ({"quant_method": "fp8", "kv_cache_scheme": {"type": "int"}}, "kv_cache_scheme.type must be float, got 'int'"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["self_attn.k_proj"]}, "computed as one matrix"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 4}}},
            },
            "format of 4 bits",
        ),
    ],
)
def test_what_is_not_read_is_refused(changes, says, models):
    folder, _ = models("packed_4")
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=says):
        families.from_values(folder / "config.json", {**values, "quantization_config": changes})


def test_matrices_left_as_numbers(models):
    """By name in one layer, by pattern in all."""
    folder, _ = models("fp8_blocks")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.1.mlp", "o_proj"]
    model = families.from_values(folder / "config.json", values)
    found = {(layer, weight) for layer, weight, _ in model.quantization.formats}
    assert found == {(0, "q"), (0, "k"), (0, "v"), (1, "q"), (1, "k"), (1, "v"), (0, "gate"), (0, "up"), (0, "down")}


def test_names_go_before_patterns_and_classes(models):
    """Of compressed-tensors' targets, whatever the order of their groups; what has no weights is attention."""
    folder, _ = models("packed_4")
    values = json.loads((folder / "config.json").read_text())

    def scheme(target, bits):
        return {"targets": [target], "weights": {"num_bits": bits, "strategy": "group", "group_size": 32}}

    values["quantization_config"]["config_groups"] = {
        "a": scheme("Linear", 4),
        "b": scheme("re:.*down_proj$", 8),
        "c": scheme("lm_head", 8),
        "d": {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}},
    }
    model = families.from_values(folder / "config.json", values)
    found = {(stage, weight) for stage, weight, format in model.quantization.formats if format.bits == 8}
    assert found == {(0, "down"), (1, "down"), ("last", "lm_head")}


def test_names_of_fp8_are_those_of_who_wrote_it(models):
    """transformers says `weight_block_size`, null for one scale a matrix; vLLM does not."""
    folder, _ = models("fp8_scalar")
    values = json.loads((folder / "config.json").read_text())
    names = []
    for more in ({}, {"weight_block_size": None}):
        values["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", **more}
        shapes = hf_shapes(families.from_values(folder / "config.json", values))
        names.append({name.rpartition(".")[2] for name in shapes if ".down_proj." in name})
    assert names == [{"weight", "weight_scale", "input_scale"}, {"weight", "weight_scale_inv", "activation_scale"}]


def test_parts_of_a_tensor_begin_where_its_format_can_be_parted(models):
    """The rows of up begin within the third block of those of gate and up."""
    folder, _ = models("fp8_uneven")
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
    families.from_values(folder / "config.json", values)
    values["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(CheckpointError, match="gate_up_proj.weight that begin within 64 rows"):
        families.from_values(folder / "config.json", values)


def test_a_head_that_is_the_embedding_has_no_codes(models):
    folder, _ = models("awq")
    values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="lm_head must be false where the head is the embedding"):
        families.from_values(folder / "config.json", values)


def test_biases_that_a_model_lacks_must_be_zeros(models, tmp_path):
    folder, _ = models("gptq_one_group")
    shutil.copytree(folder, tmp_path / "biased")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][7] = 0.5
    save_file(tensors, tmp_path / "biased/model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.bias is 0.5; only 0 is supported"):
        open_checkpoint(tmp_path / "biased")


def test_a_cut_within_a_group_is_refused(models):
    """Groups of 32 columns: heads of 32 can be parted, their halves can't."""
    folder, _ = models("awq")
    values = json.loads((folder / "config.json").read_text())
    check_cuts(families.from_values(folder / "config.json", values), 4)
    values["quantization_config"]["group_size"] = 64
    with pytest.raises(ConfigError, match="o_proj.qzeros within 64 columns"):
        check_cuts(families.from_values(folder / "config.json", values), 4)


def test_fp8_made_while_loading(models):
    """Rows of e4m3 with a scale each: within half a step of the last of three bits of the mantissa."""
    _, numbers = models("packed_4")
    plain, made = loaded(numbers), loaded(numbers, quantization="fp8")
    for name, values in plain.items():
        if "attn." in name or "mlp." in name:
            error = (made[name] - values).abs()
            assert (
                0 < error.max() and (error <= values.abs() / 16 + values.abs().amax(1, keepdim=True) / 448 / 512).all()
            )
        else:
            assert torch.equal(values, made[name])


def decoded(kind: str, tensors: dict) -> torch.Tensor:
    """The weight that codes as kernels take them stand for."""
    codes, scales = tensors["codes"], tensors["scales"].float()
    if kind in ("int4", "fp4"):
        half = block_of(2 * codes.shape[1] // scales.shape[1]) // 2
        codes = torch.stack([codes & 15, codes >> 4], 1).unflatten(2, (-1, half)).transpose(1, 2).flatten(1)
    values = codes.view(torch.float8_e4m3fn).float() if kind == "fp8" else codes.float()
    if kind == "fp4":
        values = torch.tensor([*E2M1, *(-x for x in E2M1)])[codes.int()] * 2
    width = values.shape[1] // scales.shape[1]
    if "zeros" in tensors:
        values = values - tensors["zeros"].float().repeat_interleave(width, 1)
    weight = values * scales.repeat_interleave(width, 1)
    return weight[:, torch.argsort(tensors["order"])] if "order" in tensors else weight


@pytest.mark.parametrize("kind", KINDS)
def test_codes_for_kernels(kind, models):
    """Every format as codes of 4 or 8 bits with scales of groups, but for mixed orders in one parameter, and groups of
    several lengths. The planner knows their bytes without the weights."""
    codes, _ = models(kind)
    config, planned = families.read(codes), Counter()
    for one in owned(config, WHOLE, 0):
        planned[one.piece.param.rpartition(".")[0]] += applied(one, 2, codes=True).nbytes
    decoder = build(config, ParallelState(WHOLE), dtype=torch.float32, device=torch.device("cpu"))
    load_folder(decoder, codes)
    layer = decoder.layers["0"]
    head = [decoder.head] if KINDS[kind].head else []
    for linear in (layer.attn.qkv, layer.attn.out, layer.mlp.up, layer.mlp.down, *head):
        format = linear.format
        found = coded(format.format, dict(linear.stored), format.segments, format.columns)
        if found is None:
            places = {"fp8_uneven": (layer.mlp.down,)}.get(kind, (layer.attn.qkv, layer.mlp.up))
            assert kind in ("gptq_act_order", "packed_act_order", "fp8_uneven") and linear in places
        else:
            assert torch.equal(decoded(*found), format.matrix(linear.stored))
            [name] = [name for name, module in decoder.named_modules() if module is linear]
            assert planned[name] == sum(tensor.nbytes for tensor in found[1].values())


def test_the_planner_has_the_limits_of_the_kernels():
    """It imports no torch, and so none of them."""
    assert planned.CODED_ROWS == codes_kernels.MAX_ROWS and planned.LEAST_BLOCK == codes_kernels.LEAST_BLOCK
    assert planned.SCALED_ROWS == linears.SCALED_ROWS and planned.SCALED_BLOCK == quantized.SCALED_BLOCK
    assert planned.CODED_EXPERT_ROWS == experts.CODED_ROWS


def test_codes_of_experts_for_kernels(models):
    codes, _ = models("mxfp4", "gpt_oss")
    decoder = build(families.read(codes), ParallelState(WHOLE), dtype=torch.float32, device=torch.device("cpu"))
    load_folder(decoder, codes)
    experts = decoder.layers["1"].mlp
    for name in ("up", "down"):
        format = experts._formats[name]
        stored = {part.name: experts.get_parameter(f"{name}_{part.name}") for part in format.format.parts}
        found = coded(format.format, stored, format.segments, format.columns)
        assert torch.equal(decoded(*found), format.matrix(stored))


# ---- written by tools/convert.py --quantize ----------------------------------------------------------------------


def tokens_of(folder, prompt, count):
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return list(
        LLM(str(folder), dtype="float32").generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids
    )


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int8", None), ("fp8", None)])
def test_what_is_written(kind, group, models, tmp_path):
    """Each number within half a step; read by transformers with the same tokens; in shards the same bits."""
    from reference import greedy

    _, numbers = models("packed_8_rows")
    quantize(numbers, None, tmp_path / "whole", kind, group=group)
    plain, made = loaded(numbers), loaded(tmp_path / "whole")
    for name, values in plain.items():
        if ".attn." in name or ".mlp." in name:
            blocks, errors = (x.unflatten(1, (-1, group or x.shape[1])) for x in (values, made[name] - values))
            largest = blocks.abs().amax(2, keepdim=True)
            steps = largest / (7.5 if group else 127.5)
            if kind == "fp8":  # three bits of mantissa, and no exponent below 2^-6
                steps = torch.maximum(blocks.abs(), largest / 448 / 64) / 8
            assert errors.abs().max() > 0 and (errors.abs() <= steps * 0.5001).all(), name
        else:
            assert torch.equal(values, made[name])
    want = greedy(tmp_path / "whole", [3, 14, 15, 9, 26], 6)
    assert tokens_of(tmp_path / "whole", want.prompt, 6) == want.tokens
    quantize(numbers, Layout(2), tmp_path / "cut", kind, group=group, dtype="float32")
    report = verify(tmp_path / "cut", tmp_path / "whole")
    assert report.is_well, report.findings
    report = verify(tmp_path / "cut", numbers)
    assert report.is_well and sum("rounding error" in note for note in report.notes) == 14


def test_e4m3_rounds_as_torch_does():
    values = np.random.default_rng(0).standard_normal((5, 20000)).astype(np.float32)
    values = (values * np.array([[1e-3], [0.1], [1], [60], [200]], np.float32)).clip(-448, 448)
    values[:, :2] = 0.0, -0.0
    want = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(torch.from_numpy(to_e4m3(values)), want)


def test_what_can_not_be_quantized(models, tmp_path):
    codes, numbers = models("packed_8_rows")
    with pytest.raises(ConfigError, match="is quantized already: packed int8, one group a row"):
        quantize(codes, None, tmp_path / "out", "fp8")
    with pytest.raises(ConfigError, match="64 columns, which are no whole groups of 128"):
        quantize(numbers, None, tmp_path / "out", "int4")
    with pytest.raises(ConfigError, match="fp8 has a scale a row"):
        quantize(numbers, None, tmp_path / "out", "fp8", group=32)


# ---- keys and values in fp8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("qwen3", 0.15), ("deepseek_v3", 0.5)])
def test_a_cache_in_fp8_is_near_and_cut_alike(name, near, tiny):
    """Log-probabilities move a little; steps, chunks and shared prefixes change nothing."""
    prompts = [{"prompt_token_ids": [7, 5, 3] * 7}, {"prompt_token_ids": [*[7, 5, 3] * 7, 9]}]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)

    def answers(**engine):
        with LLM(str(tiny(name)), dtype="float32", max_model_len=64, **engine) as llm:
            outputs = llm.generate(prompts, params)
        steps = [step for one in outputs for step in one.prompt_logprobs[1:]]
        scored = torch.tensor([next(iter(step.values())).logprob for step in steps])
        return [list(one.outputs[0].token_ids) for one in outputs], scored

    plain, fp8 = answers(), answers(kv_cache_dtype="fp8")
    assert 0 < (plain[1] - fp8[1]).abs().mean() < near
    cut = answers(kv_cache_dtype="fp8", max_num_batched_tokens=4, max_num_seqs=2, enable_prefix_caching=False)
    assert cut[0] == fp8[0]
    torch.testing.assert_close(cut[1], fp8[1], atol=1e-4, rtol=0)


def test_scales_of_keys_and_values(models, tmp_path):
    """A cache in fp8 divides by them, as one of transformers' that does; they are kept through every form and name."""
    from reference import load
    from transformers import DynamicCache

    class Fp8Cache(DynamicCache):
        def update(self, k, v, layer, *more, **others):
            scales = (s * (layer + 1) for s in CACHE_SCALES)
            kept = (
                (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                for x, s in zip((k, v), scales, strict=True)
            )
            return super().update(*kept, layer, *more, **others)

    codes, _ = models("packed_4")
    with_cache_scales(codes, tmp_path / "scaled")
    prompt = [3, 14, 15, 9, 26, 5, 35, 8, 9]
    want, plain = (
        load(codes)(torch.tensor([prompt]), past_key_values=cache).logits[0, :-1].log_softmax(-1)
        for cache in (Fp8Cache(), DynamicCache())
    )
    assert (want - plain).abs().max() > 0.01  # a hundred times as far as both may be from what is theirs
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)

    def answers(**engine):
        with LLM(str(tmp_path / "scaled"), dtype="float32", **engine) as llm:
            steps = llm.generate([{"prompt_token_ids": prompt}], params)[0].prompt_logprobs[1:]
        return torch.tensor([[step[token].logprob for token in range(VOCAB)] for step in steps])

    torch.testing.assert_close(answers(kv_cache_dtype="fp8"), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(answers(), plain, atol=1e-4, rtol=0)
    convert(tmp_path / "scaled", Layout(2), tmp_path / "tp2", dtype="float16")
    reshard(tmp_path / "tp2", Layout(1, 2), tmp_path / "pp2")
    export(tmp_path / "pp2", tmp_path / "out")
    with_cache_scales(codes, tmp_path / "renamed", ("k_proj.output_scale", "v_proj.v_scale"), "static")
    for folder in (tmp_path / "out", tmp_path / "renamed"):
        scales = [loaded(folder)[f"layers.1.attn.{name}"] for name in ("k_scale", "v_scale")]
        assert torch.equal(torch.cat(scales), 2 * torch.tensor(CACHE_SCALES))


# ---- scaled by activations ---------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "mixtral"])
def outlying(request, models, tmp_path, monkeypatch):
    """A model some of whose channels are large, and the token ids that stand for a file of prompts."""
    _, numbers = models("packed_8_rows", request.param)
    folder = tmp_path / "outlying"
    shutil.copytree(numbers, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[[3, 17, 40]] *= 20
        elif name.endswith(("v_proj.weight", "up_proj.weight", "w3.weight")):
            values[[5, 37]] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "prompts.jsonl").touch()
    ids = torch.randint(0, VOCAB, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(scaling, "tokenizer_of", lambda folder: None)
    monkeypatch.setattr(scaling, "read_prompts", lambda path, tokenizer: ids)
    return folder, tmp_path / "prompts.jsonl", ids


def logits_of(folder, ids):
    decoder = whole_model(folder)
    return torch.stack([decoder.logits(decoder(torch.tensor(one), PackedAttention([len(one)]))) for one in ids])


def test_scaling_by_activations_rounds_better(outlying, tmp_path):
    folder, prompts, ids = outlying
    want = logits_of(folder, ids)
    for name, more in (("plain", {}), ("scaled", {"calibrate": prompts})):
        quantize(folder, None, tmp_path / name, "int4", group=32, **more)
    plain, scaled = (logits_of(tmp_path / name, ids) - want for name in ("plain", "scaled"))
    assert scaled.norm() < 0.9 * plain.norm()
    report = verify(tmp_path / "scaled", folder)  # what is at the model's ends is as it was
    assert report.is_well and report.ranges == 3 and "scaled by activations" in "".join(report.notes)


def test_scales_fold_away(outlying, tmp_path):
    """Before anything is rounded the scaled model is the model."""
    folder, prompts, ids = outlying
    found = scaling.search(folder, prompts, lambda weight: (weight * 4).round() / 4, Everything())
    tensors = load_file(folder / "model.safetensors")
    changed = {name: torch.from_numpy(found.applied(name, values.numpy())) for name, values in tensors.items()}
    kept = {name for name in tensors if torch.equal(changed[name], tensors[name])}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} and not found.notes
    shutil.copytree(folder, tmp_path / "scaled")
    save_file(changed, tmp_path / "scaled/model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(tmp_path / "scaled", ids), logits_of(folder, ids), atol=2e-3, rtol=1e-3)


class Everything:
    """Formats of all weights there are."""

    def __contains__(self, weight):
        return True
