"""Reads a GGUF file (llama.cpp's format) as a Hugging Face model: config.json's values and dequantised tensors.

Needs the gguf library, which knows the file format, how blocks are quantised, and which GGUF tensor stands for which
Hugging Face one; what is here, and in gguf_architectures.py, is how llama.cpp's converter changes values on the way,
taken back. Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megalite.convert.gguf_architectures import ARCHITECTURES, PATTERN, Architecture, Joined, plain
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.family_spec import COMMON_KEYS
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.rounding import Elements
from megalite.weights.table import hf_shapes

CHUNK_BYTES = 64 << 20
"""Of dequantised numbers held at a time, where rows can be taken one by one."""
NATIVE = {"F16": "F16", "BF16": "BF16"}
"""Types of matrices that are no wider than what they are stored as; all others become float32."""


_COMMON = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
_BIASES = {
    "attn_q": "qkv_bias",
    "attn_qkv": "qkv_bias",
    "attn_output": "attention_out_bias",
    "ffn_up": "mlp_bias",
}
"""Tensor of a layer whose bias shows -> switch of the family."""
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of rotary frequencies; config.json has them, or what they are made from."""
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
SIGMOID = 2
"""Of `expert_gating_func`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a Hugging Face tensor is in the file."""

    names: tuple[str, ...]
    expert: int | None
    """Index of the expert, where one tensor holds all experts'."""
    joined: Joined | None = None


class GgufModel:
    """One GGUF file: `values` (config.json), `config`, `metadata` (all its keys and values), and its tensors.

    ConfigError if the gguf library is missing or the architecture is not known; CheckpointError for a file that is
    damaged, truncated, or has tensors that are not the model's.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _library()
        self.metadata, self._tensors = self._read()
        self.name = str(self.metadata.get("general.architecture"))
        self._kind = self._architecture()
        self.family = families.FAMILIES[self._kind.family]
        self.values = self._config_values()
        self.config: ModelConfig = families.from_values(self.path, self.values)
        self.shapes = hf_shapes(self.config)
        self._sources = self._matched()

    def problem(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    # ---- the file

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.path.is_file():
            raise self.problem("no such file")
        try:
            reader = self._gguf.GGUFReader(self.path)
            metadata = {name: one.contents() for name, one in reader.fields.items()}
        except Exception as error:  # whatever numpy and the library make of bytes that are not what they should be
            raise self.problem(f"is damaged or truncated, or no GGUF file ({error})") from error
        if metadata.get("split.count", 1) > 1:
            raise self.problem("is one part of several; join them with llama.cpp's gguf-split --merge")
        return metadata, {tensor.name: tensor for tensor in reader.tensors}

    def _architecture(self) -> Architecture:
        name = self._variant()
        if name not in ARCHITECTURES:
            raise ConfigError(
                Problem(
                    key="--model",
                    rule=f"{self.path} has the architecture {self.name}, which is not read from GGUF",
                    fix=f"Read are: {', '.join(ARCHITECTURES)}. Give the model that it was made from.",
                )
            )
        return ARCHITECTURES[name]

    def _variant(self) -> str:
        """The architecture, and what else it depends on which family it is."""
        name = self.name
        if name == "llama" and self.of("expert_count"):
            return f"{name} with experts"
        if name == "granitehybrid" and not self.of("expert_count"):
            return f"{name} without experts"
        if name == "olmo2" and self.of("attention.sliding_window"):
            return f"{name} with windows"
        if name == "granitemoe" and self.of("expert_shared_feed_forward_length"):
            return f"{name} with a shared expert"
        corrected = any(tensor.endswith(".exp_probs_b.bias") for tensor in self._tensors)
        if name == "deepseek2" and (self.of("expert_gating_func") == SIGMOID or corrected):
            return f"{name} with sigmoid scores"
        return name

    def of(self, key: str) -> Any:
        """The value of a metadata key of this architecture, or None. CheckpointError if layers differ in it."""
        value = self.metadata.get(f"{self.name}.{key}")
        if isinstance(value, list) and value:
            if any(one != value[0] for one in value):
                raise self.problem(f"{self.name}.{key} differs by layer, which is not supported")
            value = value[0]
        return value

    def listed(self, key: str) -> list[Any] | None:
        """The value of a metadata key of this architecture for each layer, where it is a list."""
        value = self.metadata.get(f"{self.name}.{key}")
        return value if isinstance(value, list) else None

    def has(self, tensor: str) -> bool:
        return tensor in self._tensors

    # ---- config.json

    def _config_values(self) -> dict[str, Any]:
        spelled = {**COMMON_KEYS, **self.family.keys}
        values: dict[str, Any] = {
            "architectures": [self.family.architecture],
            "model_type": self._kind.family,
            **self._kind.values,
        }
        for key, meant in {**_COMMON, **self._kind.keys}.items():
            value = None if key in self._kind.by_layer else self.of(key)
            if value is not None:
                values[spelled.get(meant, (meant,))[0]] = plain(value)
        for required in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            if spelled.get(required, (required,))[0] not in values:
                raise self.problem(f"says nothing of the model's {required}")
        if "token_embd.weight" not in self._tensors:
            raise self.problem("has no tensor token_embd.weight")
        values["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        self._add_layers(values)
        values["tie_word_embeddings"] = "output.weight" not in self._tensors
        for tensor, switch in _BIASES.items():
            if switch in self.family.flags:
                flag = self.family.flags[switch]
                values[flag] = values.get(flag, False) or f"blk.0.{tensor}.bias" in self._tensors
        if "partial_rotary_factor" in values:
            heads = self.of("attention.key_length") or self.of("embedding_length") // self.of("attention.head_count")
            turned, factor = values["partial_rotary_factor"], values["partial_rotary_factor"] / heads
            values["partial_rotary_factor"] = factor if int(heads * factor) == turned else math.nextafter(factor, 2)
        if self._kind.more is not None:
            self._kind.more(self, values)
        values |= self._rope(values)
        ids = {name: self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        values |= {f"{name}_token_id": value for name, value in ids.items() if value is not None}
        values["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(self.dtype, "float32")
        return values

    def _add_layers(self, values: dict[str, Any]) -> None:
        """Which layers have windows, where the file lists them; and how many there are without further ones."""
        listed = self.listed(PATTERN)
        if listed is not None:
            values["layer_types"] = ["sliding_attention" if one else "full_attention" for one in listed]
        if "num_nextn_predict_layers" in values:
            values["num_hidden_layers"] -= values["num_nextn_predict_layers"]

    def _rope(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`rope_scaling`, where there is one."""
        kind, factor = self.of("rope.scaling.type"), self.of("rope.scaling.factor")
        original = self.of("rope.scaling.original_context_length")
        longest = values.get("max_position_embeddings")
        if "rope_factors_long.weight" in self._tensors:
            divisors = {
                f"{name}_factor": [float(one) for one in self._tensors[f"rope_factors_{name}.weight"].data.reshape(-1)]
                for name in ("long", "short")
            }
            return {
                "rope_scaling": {"rope_type": "longrope", **divisors},
                "original_max_position_embeddings": original or longest,
            }
        if "rope_freqs.weight" in self._tensors:
            divided = np.asarray(self._tensors["rope_freqs.weight"].data, dtype=np.float64).reshape(-1)
            return {"rope_scaling": self._llama3(divided, float(values["rope_theta"]))}
        if kind in (None, "none") or factor is None:
            unscaled = {"rope_parameters": {"rope_type": "default", "rope_theta": values.get("rope_theta")}}
            return unscaled if "rope_parameters" in self.family.defaults else {}
        if kind not in ("linear", "yarn"):
            raise self.problem(f"{self.name}.rope.scaling.type is {kind!r}, which is not read from GGUF")
        scaling = {"rope_type": kind, "factor": plain(factor), "original_max_position_embeddings": original}
        named = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        scaling |= {key: self.of(f"rope.scaling.{name}") for key, name in named.items()}
        if self.name == "deepseek2" and self.of(_LOG_MULTIPLIER) is not None:
            scale = plain(10 * self.of(_LOG_MULTIPLIER))
            scaling |= {"mscale": scale, "mscale_all_dim": scale}
        if self.name == "gpt-oss":
            scaling["truncate"] = False
        return {"rope_scaling": {key: plain(value) for key, value in scaling.items() if value is not None}}

    def _llama3(self, divisors: Elements, theta: float) -> dict[str, Any]:
        """The scaling of Llama 3.1 that gives these divisors; the file has no more of it. CheckpointError if none."""
        count = len(divisors)
        wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
        factor = float(divisors.max())
        originals = [one for one in (8192, self.of("rope.scaling.original_context_length")) if one is not None]
        for original, high in product(originals, (4.0, 1.0)):  # Llama 4 has no frequencies between
            turns = original / wavelengths
            smooth = np.clip((turns - 1.0) / (high - 1.0), 0, 1) if high > 1 else (turns > 1).astype(np.float64)
            expected = 1 / ((1 - smooth) / factor + smooth)
            if np.allclose(divisors, expected, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": int(original),
                }
        raise self.problem("rope_freqs.weight has divisors that are not those of Llama 3.1's scaling")

    # ---- tensors

    @property
    def dtype(self) -> str:
        """What keeps every value: the type of the matrices if they are not quantised, else float32 (safetensors')."""
        types = {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        return NATIVE.get(next(iter(types)), "F32") if len(types) == 1 else "F32"

    def _matched(self) -> dict[str, Source]:
        """Hugging Face tensor -> where it is."""
        arch = {name: arch for arch, name in self._gguf.MODEL_ARCH_NAMES.items()}[self.name]
        names = self._gguf.get_tensor_name_map(arch, self.config.num_layers)
        found = {hf: self._source(hf, names) for hf in self.shapes}
        missing = [f"{name} ({hf})" for hf, one in found.items() for name in one.names if name not in self._tensors]
        if missing:
            raise self.problem(f"lacks {len(missing)} of the model's tensors: {', '.join(missing[:4])}")
        later = tuple(f"blk.{layer}." for layer in range(self.config.num_layers, self.of("block_count")))
        mine = {name for one in found.values() for name in one.names}
        unknown = sorted(name for name in self._tensors.keys() - mine - set(_FACTORS) if not name.startswith(later))
        if unknown:
            raise self.problem(f"has {len(unknown)} tensors that are not the model's: {', '.join(unknown[:4])}")
        for hf, source in found.items():
            self._check_shape(hf, source)
        return found

    def _source(self, hf: str, names: Any) -> Source:
        expert, layer = (re.search(pattern, hf) for pattern in (r"\.experts\.(\d+)\.", r"\.(\d+)\."))
        joined = next((one for end, one in self._kind.joined.items() if hf.endswith(end)), None)
        parts = () if joined is None or layer is None else tuple(f"blk.{layer[1]}.{name}" for name in joined.parts)
        name = names.get_name(_gguf_spelling(hf), try_suffixes=(".weight", ".bias"))
        if joined is None or (name in self._tensors and len(parts) > 1):  # older files have some as they are
            return Source((str(name),), int(expert[1]) if expert else None)
        return Source(parts, None, joined)

    def _check_shape(self, hf: str, source: Source) -> None:
        shapes = [tuple(int(one) for one in reversed(self._tensors[name].shape)) for name in source.names]
        wanted, made = self.shapes[hf], shapes[0]
        if source.joined is not None:
            alone = source.joined.by_expert
            wanted = (1, *wanted[1:]) if alone else wanted
            given = [np.zeros((1, *shape[1:]) if alone else shape, np.float32) for shape in shapes]
            try:
                made = source.joined.make(given).shape
            except ValueError:
                made = ()
            if alone and any(shape[0] != self.shapes[hf][0] for shape in shapes):
                made = ()
        elif source.expert is not None:
            made = made[1:]
        elif self._is_transposed(hf):
            made = made[::-1]
        flat = len(wanted) == 1 and math.prod(made) == wanted[0]
        if not flat and [one for one in made if one != 1] != [one for one in wanted if one != 1]:
            raise self.problem(f"{source.names[0]} has the shape {shapes[0]}, the model's {hf} has {self.shapes[hf]}")

    def _is_transposed(self, hf: str) -> bool:
        return len(self.shapes[hf]) == 2 and self._weight(hf) in self._transposed

    @property
    def _transposed(self) -> set[str]:
        refs = families.weight_names(self.config).tensors.values()
        return {ref.hf for ref in refs if ref.transpose}

    @staticmethod
    def _weight(hf: str) -> str:
        """The name with `{layer}` for its number."""
        return re.sub(r"\.(\d+)\.", ".{layer}.", hf, count=1)

    def tensor(self, hf: str) -> Iterator[Elements]:
        """A tensor in float32, as Hugging Face has it: parts of whole rows, or experts, one after the other."""
        source = self._sources[hf]
        if source.joined is not None:
            yield from self._joined(source.names, source.joined)
            return
        (name,) = source.names
        stored = self._tensors[name]
        data = stored.data if source.expert is None else stored.data[source.expert]
        whole = self._is_transposed(hf) or self._is_regrouped(hf) or len(self.shapes[hf]) == 1
        rows = len(data) if whole else max(1, CHUNK_BYTES // (4 * self.shapes[hf][-1]))
        for start in range(0, len(data), rows):
            part = self._dequantised(name, data[start : start + rows], stored.tensor_type)
            yield self._changed_back(hf, part)

    def _joined(self, names: tuple[str, ...], joined: Joined) -> Iterator[Elements]:
        stored = [self._tensors[name] for name in names]
        step = 1 if joined.by_expert else len(stored[0].data)
        for start in range(0, len(stored[0].data), step):
            given = zip(names, stored, strict=True)
            parts = [self._dequantised(name, one.data[start : start + step], one.tensor_type) for name, one in given]
            yield joined.make(parts)

    def _dequantised(self, name: str, data: Elements, kind: Any) -> Elements:
        try:
            return np.asarray(self._gguf.quants.dequantize(data, kind), dtype=np.float32)
        except NotImplementedError as error:
            raise self.problem(f"{name} is stored as {kind.name}, which the gguf library can't read") from error

    def _changed_back(self, hf: str, values: Elements) -> Elements:
        """What llama.cpp's converter does to some tensors, undone."""
        heads = self._heads(hf)
        if self._kind.by_heads and ".query_key_value." in hf:
            count = self.config.of(SoftmaxAttention)[0].heads
            apart = values.reshape(3, count, -1, *values.shape[1:])
            return np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(values.shape)
        if heads is not None:
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if hf.endswith(".A_log"):
            return np.log(-values)
        if self.config.zero_centred and hf.endswith("norm.weight"):
            return values - np.float32(1)
        return np.ascontiguousarray(values.T) if self._is_transposed(hf) else values

    def _is_regrouped(self, hf: str) -> bool:
        return self._heads(hf) is not None or (self._kind.by_heads and ".query_key_value." in hf)

    def _heads(self, hf: str) -> int | None:
        """Number of heads, of a permuted weight or bias of q or k; None for others."""
        match = re.search(r"\.([qk])_proj\.", hf) if self._kind.permuted else None
        if match is None:
            return None
        kind = self.config.of(SoftmaxAttention)[0]
        return kind.heads if match[1] == "q" else kind.kv_heads


def _gguf_spelling(hf: str) -> str:
    """The library's name for a tensor, of all experts where it is one expert's."""
    name = re.sub(r"\.experts\.\d+\.", ".experts.", hf)
    name = name.removesuffix("_bias") + ".bias" if name.endswith("e_score_correction_bias") else name
    name = name.removesuffix("_bias") + "_proj.bias" if name.endswith(".dt_bias") else name
    name = name + ".weight" if name.endswith(".sinks") else name
    return re.sub(r"^model\.(.*)\.block_sparse_moe\.experts\.w", r"\1.feed_forward.experts.w", name)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        rule = "is a GGUF file, which is read by the gguf library"
        raise ConfigError(Problem(key="--model", rule=rule, fix="pip install 'megalite[gguf]'")) from error
    return gguf
