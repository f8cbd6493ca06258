"""Random model folders of any family, made from the weight table alone: no transformers, no torch, a few milliseconds.

The bytes are random and so are the sizes; what is tested with them is where bytes go, not what a model computes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megalite.model import families
from megalite.weights.dtypes import DTYPE_BYTES
from megalite.weights.hf import read_headers
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import TensorInfo, new_header

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Sizes:
    """What a random model is drawn from."""

    family: str
    layers: int = 3
    kv_heads: int = 2
    group: int = 3
    """Query heads to each key/value head."""
    head_dim: int = 4
    hidden: int = 24
    inner: int = 20
    vocab: int = 37
    experts: int = 3
    tied: bool = False
    dtype: str = "BF16"
    vector_dtype: str = ""
    """Of norms and biases, where they differ."""
    files: int = 1
    seed: int = 0


def values_of(sizes: Sizes) -> dict[str, object]:
    """config.json in the family's own spelling."""
    family = families.FAMILIES[sizes.family]
    heads = sizes.kv_heads * sizes.group
    if sizes.family == "gpt2":  # no grouped heads, and the head size follows from the hidden size
        hidden = heads * sizes.head_dim
        kv = {}
    else:
        hidden = sizes.hidden
        kv = {"num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    values = {
        "vocab_size": sizes.vocab,
        "hidden_size": hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "intermediate_size": sizes.inner,
        "max_position_embeddings": 16,
        "tie_word_embeddings": sizes.tied,
        "num_experts": sizes.experts,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": sizes.inner,
        **kv,
    }
    spelled = {family.keys.get(key, (key,))[0]: value for key, value in values.items()}
    dtype = CONFIG_DTYPES[sizes.dtype]
    return {"architectures": [family.architecture], "model_type": sizes.family, "dtype": dtype, **spelled}


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A model folder with random bytes in every tensor; finite, as a sign and seven bits are kept low."""
    how = {"dtype": sizes.dtype, "vector_dtype": sizes.vector_dtype, "files": sizes.files, "seed": sizes.seed}
    return write_folder(folder, values_of(sizes), **how)


def write_folder(
    folder: Path, values: dict[str, object], *, dtype: str, vector_dtype: str = "", files: int = 1, seed: int = 0
) -> Path:
    """The same of any config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**values, "dtype": CONFIG_DTYPES[dtype]}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    random = Random(seed)
    entries = {}
    for name, shape in hf_shapes(families.read(folder)).items():
        entries[name] = (vector_dtype if vector_dtype and len(shape) == 1 else dtype, shape)
    names = list(entries)
    random.shuffle(names)
    weight_map = {}
    for index in range(files):
        file = "model.safetensors" if files == 1 else f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        mine = {name: entries[name] for name in names[index::files]}
        write_tensors(folder / file, mine, random)
        weight_map |= dict.fromkeys(mine, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tensors(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], random: Random) -> None:
    """A safetensors file of small finite numbers."""
    header, infos = new_header(path, entries, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        for info in infos.values():
            item = DTYPE_BYTES[info.dtype]
            data = bytearray(random.randbytes(math.prod(info.shape) * item))
            for at in range(item - 1, len(data), item):
                data[at] = data[at] & 0x80 | 0x38 + data[at] % 6  # sign, and an exponent near zero
            file.write(data)


def read_bytes(info: TensorInfo) -> bytes:
    """The bytes of a tensor, read as plainly as can be."""
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a Hugging Face folder: dtype, shape and bytes."""
    return {name: (one.dtype, one.shape, read_bytes(one)) for name, one in read_headers(folder).tensors.items()}
