"""Reads a GGUF file (llama.cpp's format) as a Hugging Face model: config.json's values and dequantised tensors.

Needs the gguf library, which knows the file format, how blocks are quantised, and which GGUF tensor stands for which
Hugging Face one; what is here is how llama.cpp's converter changes values on the way, taken back. Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp writes one Hugging Face architecture."""

    family: str
    """Key in families.FAMILIES."""
    permuted: bool = False
    """The rows of q and k of each head lie as neighbouring channels are rotated, where Hugging Face rotates halves."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Metadata key, without the architecture -> key of config.json; besides the usual ones."""
    values: Mapping[str, object] = field(default_factory=dict)
    """Of config.json, where the file says nothing of them."""


_WINDOW = {"attention.sliding_window": "sliding_window"}
_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_PARTIAL = {"rope.dimension_count": "partial_rotary_factor"}

ARCHITECTURES = {
    "llama": Architecture(family="llama", permuted=True),
    "llama with experts": Architecture(
        family="mixtral",
        permuted=True,
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        values={"sliding_window": None},
    ),
    "qwen2": Architecture(family="qwen2"),
    "qwen3": Architecture(family="qwen3"),
    "qwen3moe": Architecture(family="qwen3_moe", keys=_MOE, values={"norm_topk_prob": True}),
    "gemma": Architecture(family="gemma"),
    "gemma2": Architecture(family="gemma2", keys={**_WINDOW, **_CAPS}),
    "gemma3": Architecture(family="gemma3_text", keys={**_WINDOW, **_CAPS}, values=_NO_CAPS),
    "phi3": Architecture(family="phi3", keys={**_WINDOW, **_PARTIAL}),
    "gpt2": Architecture(family="gpt2"),
    "starcoder2": Architecture(family="starcoder2", values={"use_bias": True}),
    "stablelm": Architecture(family="stablelm", keys={**_PARTIAL, "use_parallel_residual": "use_parallel_residual"}),
    "granite": Architecture(family="granite", permuted=True, keys=_GRANITE),
    "smollm3": Architecture(family="smollm3", permuted=True),
    "arcee": Architecture(family="arcee", permuted=True),
    "olmo2": Architecture(family="olmo2", keys=_WINDOW),
    "seed_oss": Architecture(family="seed_oss"),
}
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
_BIASES = {"attn_q": "qkv_bias", "attn_output": "attention_out_bias", "ffn_up": "mlp_bias"}
"""Tensor of a layer whose bias shows -> switch of the family."""
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of rotary frequencies; config.json has them, or what they are made from."""
_SWA_THETA = "rope.freq_base_swa"


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
        name = self.name
        if name == "llama" and self.metadata.get("llama.expert_count"):
            name = "llama with experts"
        if name not in ARCHITECTURES:
            raise ConfigError(
                Problem(
                    key="--model",
                    rule=f"{self.path} has the architecture {self.name}, which is not read from GGUF",
                    fix=f"Read are: {', '.join(ARCHITECTURES)}. Give the model that it was made from.",
                )
            )
        return ARCHITECTURES[name]

    def of(self, key: str) -> Any:
        """The value of a metadata key of this architecture, or None. CheckpointError if layers differ in it."""
        value = self.metadata.get(f"{self.name}.{key}")
        if isinstance(value, list) and value:
            if any(one != value[0] for one in value):
                raise self.problem(f"{self.name}.{key} differs by layer, which is not supported")
            value = value[0]
        return value

    # ---- config.json

    def _config_values(self) -> dict[str, Any]:
        spelled = {**COMMON_KEYS, **self.family.keys}
        values: dict[str, Any] = {
            "architectures": [self.family.architecture],
            "model_type": self._kind.family,
            **self._kind.values,
        }
        for key, meant in {**_COMMON, **self._kind.keys}.items():
            value = self.of(key)
            if value is not None:
                values[spelled.get(meant, (meant,))[0]] = _plain(value)
        for required in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            if spelled.get(required, (required,))[0] not in values:
                raise self.problem(f"says nothing of the model's {required}")
        if "token_embd.weight" not in self._tensors:
            raise self.problem("has no tensor token_embd.weight")
        values["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        values["tie_word_embeddings"] = "output.weight" not in self._tensors
        for tensor, switch in _BIASES.items():
            if switch in self.family.flags:
                flag = self.family.flags[switch]
                values[flag] = values.get(flag, False) or f"blk.0.{tensor}.bias" in self._tensors
        if "partial_rotary_factor" in values:
            heads = self.of("attention.key_length") or self.of("embedding_length") // self.of("attention.head_count")
            values["partial_rotary_factor"] /= heads
        self._add_scales(values)
        values |= self._rope(values)
        ids = {name: self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        values |= {f"{name}_token_id": value for name, value in ids.items() if value is not None}
        values["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(self.dtype, "float32")
        return values

    def _add_scales(self, values: dict[str, Any]) -> None:
        """What Gemma's files leave to whoever runs them."""
        if self._kind.family not in ("gemma2", "gemma3_text"):
            return
        heads, layers = self.of("attention.head_count"), self.of("block_count")
        large = {"gemma2": 46, "gemma3_text": 62}[self._kind.family]  # of 27B, whose scale is that of hidden / heads
        values["query_pre_attn_scalar"] = values["hidden_size"] / heads if layers == large else values["head_dim"]
        if self._kind.family == "gemma3_text":
            values["rope_local_base_freq"] = _plain(self.of(_SWA_THETA) or 10000.0)
            pattern = self.of("attention.sliding_window_pattern") or 6
            values["sliding_window_pattern"] = int(pattern)

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
            return {}
        if kind not in ("linear", "yarn"):
            raise self.problem(f"{self.name}.rope.scaling.type is {kind!r}, which is not read from GGUF")
        scaling = {"rope_type": kind, "factor": _plain(factor)}
        return {"rope_scaling": scaling | ({"original_max_position_embeddings": original} if original else {})}

    def _llama3(self, divisors: Elements, theta: float) -> dict[str, Any]:
        """The scaling of Llama 3.1 that gives these divisors; the file has no more of it. CheckpointError if none."""
        count = len(divisors)
        wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
        factor = float(divisors.max())
        for original in (8192, self.of("rope.scaling.original_context_length")):
            if original is None:
                continue
            smooth = np.clip((original / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
            expected = 1 / ((1 - smooth) / factor + smooth)
            if np.allclose(divisors, expected, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": int(original),
                }
        raise self.problem("rope_freqs.weight has divisors that are not those of Llama 3.1's scaling")

    # ---- tensors

    @property
    def dtype(self) -> str:
        """What keeps every value: the type of the matrices if they are not quantised, else float32 (safetensors')."""
        types = {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        return NATIVE.get(next(iter(types)), "F32") if len(types) == 1 else "F32"

    def _matched(self) -> dict[str, tuple[str, int | None]]:
        """Hugging Face tensor -> the GGUF tensor, and which of its experts."""
        arch = {name: arch for arch, name in self._gguf.MODEL_ARCH_NAMES.items()}[self.name]
        names = self._gguf.get_tensor_name_map(arch, self.config.num_layers)
        found = {}
        for hf in self.shapes:
            expert = re.search(r"\.experts\.(\d+)\.", hf)
            name = names.get_name(_of_all_experts(hf), try_suffixes=(".weight", ".bias"))
            found[hf] = (str(name), int(expert[1]) if expert else None)
        missing = [f"{name} ({hf})" for hf, (name, _) in found.items() if name not in self._tensors]
        if missing:
            raise self.problem(f"lacks {len(missing)} of the model's tensors: {', '.join(missing[:4])}")
        unknown = sorted(self._tensors.keys() - {name for name, _ in found.values()} - set(_FACTORS))
        if unknown:
            raise self.problem(f"has {len(unknown)} tensors that are not the model's: {', '.join(unknown[:4])}")
        for hf, (name, expert_index) in found.items():
            self._check_shape(hf, name, expert_index)
        return found

    def _check_shape(self, hf: str, name: str, expert: int | None) -> None:
        shape = tuple(int(one) for one in reversed(self._tensors[name].shape))
        shape = shape[1:] if expert is not None else shape
        shape = shape[::-1] if self._is_transposed(hf) else shape
        if shape != self.shapes[hf]:
            raise self.problem(f"{name} has the shape {shape}, the model's {hf} has {self.shapes[hf]}")

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
        """A tensor in float32, as Hugging Face has it: parts of whole rows, one after the other."""
        name, expert = self._sources[hf]
        stored = self._tensors[name]
        data = stored.data if expert is None else stored.data[expert]
        whole = self._is_transposed(hf) or self._heads(hf) is not None or len(self.shapes[hf]) == 1
        rows = len(data) if whole else max(1, CHUNK_BYTES // (4 * self.shapes[hf][-1]))
        for start in range(0, len(data), rows):
            part = self._dequantised(name, data[start : start + rows], stored.tensor_type)
            yield self._changed_back(hf, part)

    def _dequantised(self, name: str, data: Elements, kind: Any) -> Elements:
        try:
            return np.asarray(self._gguf.quants.dequantize(data, kind), dtype=np.float32)
        except NotImplementedError as error:
            raise self.problem(f"{name} is stored as {kind.name}, which the gguf library can't read") from error

    def _changed_back(self, hf: str, values: Elements) -> Elements:
        """What llama.cpp's converter does to some tensors, undone."""
        heads = self._heads(hf)
        if heads is not None:
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if self.config.zero_centred and hf.endswith("norm.weight"):
            return values - np.float32(1)
        return np.ascontiguousarray(values.T) if self._is_transposed(hf) else values

    def _heads(self, hf: str) -> int | None:
        """Of a permuted q or k, weight or bias."""
        match = re.search(r"\.([qk])_proj\.", hf) if self._kind.permuted else None
        if match is None:
            return None
        kind = self.config.of(SoftmaxAttention)[0]
        return kind.heads if match[1] == "q" else kind.kv_heads


def _of_all_experts(hf: str) -> str:
    """The library's name for the tensor of which an expert's is a part; others stay."""
    name = re.sub(r"\.experts\.\d+\.", ".experts.", hf)
    return re.sub(r"^model\.(.*)\.block_sparse_moe\.experts\.w", r"\1.feed_forward.experts.w", name)


def _plain(value: Any) -> Any:
    """A number as JSON has it; float32 as the shortest decimal that means it."""
    if isinstance(value, float):
        short = float(np.format_float_positional(np.float32(value), unique=True))
        return int(short) if short.is_integer() and abs(short) > 1e6 else short
    return value


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        rule = "is a GGUF file, which is read by the gguf library"
        raise ConfigError(Problem(key="--model", rule=rule, fix="pip install 'megalite[gguf]'")) from error
    return gguf
