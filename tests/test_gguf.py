"""GGUF files into model folders: against the gguf library's dequantisation and transformers' reading of the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_random_configs import weights
from tiny_models import YARN

from megalite.convert.from_gguf import from_gguf
from megalite.convert.gguf_model import GgufModel
from megalite.core.layout import Layout
from megalite.errors import CheckpointError, ConfigError, MegaliteError
from megalite.model import families
from megalite.text.tokenizer import Tokenizer
from megalite.weights.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")
import gguf_models  # noqa: E402

HEADS, KV_HEADS, HIDDEN, WIDTH, LAYERS = 8, 2, 256, 512, 2
MERGES = ["t h", "th e", "Ġ the", "a n", "Ġ an"]
KIND = gguf.GGMLQuantizationType


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), *(one.replace(" ", "") for one in MERGES)]


def blocks(generator, rows: int, columns: int, kind) -> tuple[np.ndarray, np.ndarray]:
    """Random stored bytes of a quantised matrix, and what they mean by the gguf library."""
    if kind in (KIND.Q8_0, KIND.Q4_0, KIND.F16, KIND.F32):
        data = gguf.quants.quantize(generator.normal(size=(rows, columns)).astype(np.float32) / 16, kind)
    else:  # the library reads these but makes none
        per_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, size=(rows, columns // per_block, nbytes), dtype=np.uint8)
        scales = {KIND.Q4_K: (0, 2), KIND.Q6_K: (208,)}[kind]
        for at in scales:
            data[..., at : at + 2] = np.array([0.002], np.float16).view(np.uint8)
        data = data.reshape(rows, -1)
    return data, gguf.quants.dequantize(data, kind)


def write(path, arch: str, kind, *, tokenizer: str | None = "gpt2", **more):
    """A tiny random file as llama.cpp's converter writes it; its matrices by name, as they are in it."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(more.get("theta", 10000.0))
    head = 128 if arch == "qwen3" else HIDDEN // HEADS
    if arch == "qwen3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    tokens = vocabulary()
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    if tokenizer == "gpt2":
        writer.add_tokenizer_pre(more.get("pre", "qwen2" if arch.startswith("qwen") else "llama-bpe"))
        writer.add_token_merges(MERGES)
    values = {}

    def add(name: str, rows: int, columns: int | None = None) -> None:
        if columns is None:
            values[name] = generator.normal(size=rows).astype(np.float32)
            writer.add_tensor(name, values[name])
            return
        data, values[name] = blocks(generator, rows, columns, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if "rope_freqs" in more:
        writer.add_tensor("rope_freqs.weight", more["rope_freqs"])
    for layer in range(LAYERS):
        start = f"blk.{layer}."
        for name, rows in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            add(f"{start}attn_{name}.weight", rows, HIDDEN)
            if arch == "qwen2":
                add(f"{start}attn_{name}.bias", rows)
        add(f"{start}attn_output.weight", HIDDEN, HEADS * head)
        for name in ("attn_norm", "ffn_norm"):
            add(f"{start}{name}.weight", HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm") if arch == "qwen3" else ():
            add(f"{start}{name}.weight", head)
        add(f"{start}ffn_gate.weight", WIDTH, HIDDEN)
        add(f"{start}ffn_up.weight", WIDTH, HIDDEN)
        add(f"{start}ffn_down.weight", HIDDEN, WIDTH)
    for name in more.get("extra", ()):
        add(name, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    "arch, kind", [("llama", KIND.Q8_0), ("qwen2", KIND.Q4_0), ("qwen3", KIND.Q4_K), ("qwen2", KIND.Q6_K)]
)
def test_tensors_are_those_of_the_library_and_of_transformers(tmp_path, arch, kind):
    values = write(tmp_path / "tiny.gguf", arch, kind)
    from_gguf(tmp_path / "tiny.gguf", None, tmp_path / "model")
    made = load_file(tmp_path / "model" / "model.safetensors")
    assert made["model.layers.1.mlp.down_proj.weight"].equal(torch.from_numpy(values["blk.1.ffn_down.weight"]))
    assert made["model.norm.weight"].equal(torch.from_numpy(values["output_norm.weight"]))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    theirs.config.quantization_config = None
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = theirs.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in made.items())
    ids = torch.arange(3, 19)[None]
    assert mine(ids).logits.equal(theirs(ids).logits)


def test_float_files_keep_their_dtype_and_can_be_cut_in_one_go(tmp_path):
    write(tmp_path / "tiny.gguf", "llama", KIND.F16)
    from_gguf(tmp_path / "tiny.gguf", None, tmp_path / "model")
    from_gguf(tmp_path / "tiny.gguf", Layout(tp=2, pp=2), tmp_path / "shards")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"
    shards = open_checkpoint(tmp_path / "shards")
    assert shards.manifest and set(shards.dtypes.values()) == {"F16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "shards", "tiny.gguf"]
    assert from_gguf(tmp_path / "tiny.gguf", None, tmp_path / "half", dtype="bfloat16").nbytes > 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    whole = load_file(tmp_path / "model" / "model.safetensors")
    assert all(half[name].equal(tensor.to(torch.bfloat16)) for name, tensor in whole.items() if tensor.ndim == 2)


def test_the_scaling_of_llama_3_is_found_by_its_divisors(tmp_path):
    """transformers reads none of it from such files; these divisors are made by its own formula."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, **given}
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    count = HIDDEN // HEADS // 2
    divisors = (5e5 ** (-np.arange(count) / count) / frequencies.double().numpy()).astype(np.float32)
    write(tmp_path / "tiny.gguf", "llama", KIND.F32, theta=5e5, rope_freqs=divisors)
    from_gguf(tmp_path / "tiny.gguf", None, tmp_path / "model")
    found = json.loads((tmp_path / "model" / "config.json").read_text())["rope_scaling"]
    assert found == {"rope_type": "llama3", **given}
    write(tmp_path / "other.gguf", "llama", KIND.F32, theta=5e5, rope_freqs=divisors * 1.5)
    with pytest.raises(CheckpointError, match="divisors that are not those"):
        from_gguf(tmp_path / "other.gguf", None, tmp_path / "other")


def test_tokenizers_of_both_kinds_are_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    text = "the  an 123 then Ännchen\n\n the"
    write(tmp_path / "bytes.gguf", "qwen2", KIND.F32)
    from_gguf(tmp_path / "bytes.gguf", None, tmp_path / "bytes")
    mine, theirs = Tokenizer.load(tmp_path / "bytes"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="bytes.gguf")
    assert mine.encode(text) == theirs(text).input_ids and mine.decode(mine.encode(text)) == text
    pieces(tmp_path / "pieces.gguf")
    from_gguf(tmp_path / "pieces.gguf", None, tmp_path / "pieces")
    mine, theirs = Tokenizer.load(tmp_path / "pieces"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="pieces.gguf")
    for text in ("the cat", "cathe é the", "cats  the"):
        assert mine.encode(text) == theirs(text).input_ids
        assert mine.decode(mine.encode(text)[1:]) == text
    assert "messages" in (tmp_path / "bytes" / "chat_template.jinja").read_text()


def pieces(path) -> None:
    """A file with a SentencePiece tokenizer."""
    bytes_ = [f"<0x{index:02X}>" for index in range(256)]
    words = ["▁", *"theacs", "th", "the", "▁the", "ca", "at", "cat", "▁cat", "he"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 0),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(1 if add == writer.add_block_count else value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SAID = {
    "qwen2_moe": {"mlp_only_layers": []},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "gpt_oss": {"swiglu_limit": 7.0},
    "llama4_text": {
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": None,
        "attention_chunk_size": None,
        "floor_scale": None,
    },
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "deepseek_v3": {"attention_bias": False, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}
"""Changes to tiny models, to what GGUF files can say; None: left out."""


@pytest.mark.parametrize("name", [*gguf_models.ARCHITECTURES, "granitemoehybrid_dense"])
def test_what_the_converter_changes_is_changed_back(name, tiny, tmp_path):
    """Config and tensors of a model are what they were before llama.cpp's converter; so it computes the same."""
    values = json.loads((tiny({"gemma3_text": "gemma3"}.get(name, name)) / "config.json").read_text())
    changes = SAID.get(name, {})
    values = {key: changes.get(key, value) for key, value in values.items() if changes.get(key, 0) is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    wanted = families.read(tmp_path)
    tensors = weights(wanted, seed=1)
    save_file(tensors, tmp_path / "model.safetensors")
    gguf_models.write(tmp_path, tmp_path / "tiny.gguf")
    read = GgufModel(tmp_path / "tiny.gguf")
    other = {"bos_token_id": wanted.bos_token_id, "eos_token_ids": wanted.eos_token_ids}
    assert replace(read.config, router_aux_loss_coef=wanted.router_aux_loss_coef, **other) == wanted
    for hf in read.shapes:
        found = np.concatenate([part.reshape(-1) for part in read.tensor(hf)])
        rounded = 2.0**-22 if hf.endswith(".A_log") or (hf.endswith("norm.weight") and wanted.zero_centred) else 0.0
        assert np.abs(found - tensors[hf].numpy().reshape(-1)).max() <= rounded, hf


@pytest.mark.parametrize(
    "arch, more, change, message",
    [
        ("llama", {}, lambda data: data[: len(data) // 2], "damaged or truncated"),
        ("llama", {}, lambda data: b"NOPE" + data[4:], "no GGUF file"),
        ("llama", {}, lambda data: data[:8] + b"\xff" * 8 + data[16:], "damaged or truncated"),
        ("mamba", {}, None, "architecture mamba, which is not read"),
        ("llama", {"tokenizer": None}, None, "has no tokenizer"),
        ("llama", {"tokenizer": "t5"}, None, "of the kind t5"),
        ("llama", {"pre": "unheard-of"}, None, "word pattern that is not known"),
        ("qwen2", {"extra": ["blk.0.attn_q_norm.weight"]}, None, "1 tensors that are not the model's"),
        ("llama", {"extra": ["blk.0.attn_q.bias"]}, None, "lacks 7 of the model's tensors"),
    ],
)
def test_what_is_damaged_or_unknown_is_refused(tmp_path, arch, more, change, message):
    path = tmp_path / "tiny.gguf"
    write(path, arch, KIND.F32, **more)
    if change:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MegaliteError, match=message) as error:
        from_gguf(path, None, tmp_path / "model")
    assert isinstance(error.value, CheckpointError | ConfigError) and str(path) in str(error.value)
    assert not (tmp_path / "model" / "model.safetensors").exists()
