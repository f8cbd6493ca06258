"""Reads a Hugging Face config.json key by key, checking each value; importable without torch.

Every error is a `CheckpointError` that names the file and the key. The formats of transformers 4 (`torch_dtype`,
`rope_theta`, `rope_scaling`) and 5 (`dtype`, `rope_parameters`) read the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megalite.config.typecheck import gguf_advice
from megalite.errors import CheckpointError
from megalite.files import read_whole
from megalite.model.config import Rope, RopeScaling

MAX_CONFIG_BYTES = 16 << 20
SIZE_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "num_experts": 1 << 14,
    "max_position_embeddings": 1 << 30,
}
"""Largest plausible values: above them a file is damaged."""

UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "is_encoder_decoder": ((None, False), "only decoders are supported"),
    "add_cross_attention": ((None, False), "cross attention is not supported"),
    "use_bidirectional_attention": ((None, False), "only causal attention is supported"),
    "attention_sinks": ((None, False, 0), "attention sinks are not supported"),
    "use_attention_sinks": ((None, False), "attention sinks are not supported"),
    "add_full_attention_sink_bias": ((None, False), "attention sinks are not supported"),
    "add_swa_attention_sink_bias": ((None, False), "attention sinks are not supported"),
    "no_rope_layers": ((None, []), "layers without rotary embedding are not supported"),
    "num_nextn_predict_layers": ((None, 0), "multi-token prediction layers are not supported"),
}
"""Keys that change what a model computes as no family here does -> harmless values, why others are refused."""

DTYPES = ("float32", "bfloat16", "float16")
ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; CheckpointError if there is none."""
    try:
        text = read_whole(path, MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent
        if folder.is_file() and folder.suffix == ".gguf":
            raise CheckpointError(f"{folder}: {gguf_advice(folder.parent, folder.name)}") from None
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such model folder") from None
        quantized = min(folder.glob("*.gguf"), default=None)
        if quantized is not None:
            raise CheckpointError(f"{quantized}: {gguf_advice(folder, quantized.name)}") from None
        raise CheckpointError(f"{path}: missing. A model folder needs it; is this a model folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    try:
        values = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(values).__name__}")
    return values


REQUIRED: Any = object()
"""Stands for a default where there is none."""


class HFConfig:
    """The values of one config.json under a family's names for them; the methods read one key each and check it.

    `keys` says where a family keeps a value (first name present wins), `defaults` what an absent key means. Null counts
    as absent, except for `raw`, `optional_size` and `optional_number`, which give None.
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        keys: Mapping[str, tuple[str, ...]] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.values = values
        self.keys = keys or {}
        self.defaults = defaults or {}

    def spelling(self, key: str) -> str:
        """The name under which this file has, or should have, `key`."""
        names = self.keys.get(key, (key,))
        return next((name for name in names if name in self.values), names[0])

    def problem(self, key: str, rule: str, value: object = None) -> CheckpointError:
        shown = repr(value[:80]) if isinstance(value, str) else f"{value!r:.80}"
        return CheckpointError(
            f"{self.path}: {self.spelling(key)} {rule}" + ("" if value is None else f", got {shown}")
        )

    def raw(self, key: str) -> Any:
        """The value, the family's default for it when the key is absent, or None."""
        return self.values.get(self.spelling(key), self.defaults.get(key))

    def _given(self, key: str, default: Any = REQUIRED) -> Any:
        value = self.values.get(self.spelling(key))
        if value is None:
            value = self.defaults.get(key) if default is REQUIRED else default
        if value is None:
            raise self.problem(key, "is missing")
        return value

    def _checked_size(self, key: str, value: object, low: int) -> int:
        if type(value) is not int:
            raise self.problem(key, "must be a whole number", value)
        high = SIZE_LIMITS.get(key, 1 << 31)
        if not low <= value <= high:
            raise self.problem(key, f"must be between {low} and {high}", value)
        return value

    def size(self, key: str, default: Any = REQUIRED, *, low: int = 1) -> int:
        """A count, at least `low`."""
        return self._checked_size(key, self._given(key, default), low)

    def size_or(self, key: str, null: int, *, low: int = 1) -> int:
        """A count; `null` where the file has null, or leaves out what the family has no default for."""
        value = self.raw(key)
        return null if value is None else self._checked_size(key, value, low)

    def optional_size(self, key: str) -> int | None:
        value = self.raw(key)
        return None if value is None else self._checked_size(key, value, 1)

    def checked_number(self, key: str, value: Any, *, or_zero: bool = False) -> float:
        if type(value) not in (int, float):
            raise self.problem(key, "must be a number", value)
        if not 0 < value < 1e300 and not (or_zero and value == 0):  # NaN fails too; isfinite would overflow on an int
            raise self.problem(key, "must be positive and finite", value)
        return float(value)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A positive finite number."""
        return self.checked_number(key, self._given(key, default))

    def optional_number(self, key: str, *, or_zero: bool = False) -> float | None:
        value = self.raw(key)
        return None if value is None else self.checked_number(key, value, or_zero=or_zero)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._given(key, self.defaults.get(key, default))
        if type(value) is not bool:
            raise self.problem(key, "must be true or false", value)
        return value

    def choice(self, key: str, choices: Mapping[str, str]) -> Any:
        """The entry of `choices` that a string names."""
        value = self._given(key)
        if not isinstance(value, str) or value not in choices:
            raise self.problem(key, f"must be one of {', '.join(choices)}", value)
        return choices[value]

    def indices(self, key: str, count: int) -> tuple[int, ...]:
        """A list of layer indices below `count`; empty when absent."""
        value = self._given(key, [])
        if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < count for item in value):
            raise self.problem(key, f"must be a list of layer indices below {count}", value)
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One token id or a list of them; None when absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if any(type(item) is not int or item < 0 for item in ids):
            raise self.problem(key, "must be a token id or a list of token ids", value)
        return tuple(ids)

    def of_layer(self, layer: int, layers: int, *keys: str) -> HFConfig:
        """These values, with one layer's entry where one of `keys` has a list of an entry for each of `layers`."""
        given = {name: self.values.get(name) for name in map(self.spelling, keys)}
        own = {name: one[layer] for name, one in given.items() if isinstance(one, list) and len(one) == layers}
        return HFConfig(self.path, {**self.values, **own}, self.keys, self.defaults)

    def dtype(self) -> Any:
        """One of DTYPES; float32 when absent."""
        key = "dtype" if self.values.get("dtype") is not None else "torch_dtype"
        value = self.values.get(key)
        if value is None:
            return "float32"
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPES:
            raise self.problem(key, f"must be one of {', '.join(DTYPES)}", value)
        return name

    def refuse_unsupported(self, reads: Collection[str] = (), harmless_only: Collection[str] = ()) -> None:
        """CheckpointError for a key that would change what the model computes in a way that is not supported.

        `reads`: keys that this family knows; `harmless_only`: keys of this family that must be false.
        """
        for key in harmless_only:
            if self.raw(key) not in (None, False):
                raise self.problem(key, "must be false: what it asks for is not supported", self.raw(key))
        for key, (harmless, reason) in UNSUPPORTED.items():
            value = None if key in reads else self.values.get(key)
            if not any(value is item or value == item for item in harmless):
                raise CheckpointError(f"{self.path}: {key}: {reason}")


def read_rope(
    config: HFConfig,
    head_dim: int,
    *,
    partial: bool,
    kinds: Mapping[str, str],
    interleaved: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Rope:
    """The rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    `partial`: the family reads `partial_rotary_factor`. `kinds`: the family's own names for a scaling. `given`: used in
    place of `rope_parameters`, for one kind of layer.
    """
    key, stated = rope_values(config)
    given = stated if given is None else given
    if not isinstance(given, dict):
        raise config.problem(key, "must be an object", given)
    if any(isinstance(value, dict) for value in given.values()):
        raise config.problem(key, "differs by layer type, which is not supported for this family")
    inner = HFConfig(config.path, {**config.values, **given}, config.keys, config.defaults)
    theta = inner.number("rope_theta", config.defaults.get("rope_theta", 10000.0))
    if theta <= 1:
        raise inner.problem("rope_theta", "must be above 1", theta)
    factor = inner.number("partial_rotary_factor", config.defaults.get("partial_rotary_factor", 1.0))
    if factor != 1.0 and not partial:
        raise inner.problem("partial_rotary_factor", "must be 1 for this family", factor)
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise inner.problem(
            "partial_rotary_factor" if partial else "head_dim",
            f"must give an even number of rotated channels, at most {head_dim}, gives {rotary_dim}",
        )
    kind = given.get("rope_type", given.get("type", "default"))
    kind = kinds.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default" and "factor" in given:
        raise config.problem(key, "has a factor but no rope_type")
    if kind == "default":
        return Rope(theta=theta, rotary_dim=rotary_dim, interleaved=interleaved)
    if kind == "dynamic" and given.get("alpha") is not None:  # NTK-aware: a fixed alpha is another theta (Hunyuan)
        if rotary_dim < 4:
            raise config.problem("rope_type", "dynamic needs 4 rotated channels or more", rotary_dim)
        theta *= inner.number("alpha") ** (rotary_dim / (rotary_dim - 2))
        return Rope(theta=theta, rotary_dim=rotary_dim, interleaved=interleaved)
    if kind not in ROPE_KINDS:
        raise config.problem(key, f"has an unsupported rope_type (supported: default, {', '.join(ROPE_KINDS)})", kind)
    scaling = _scaling(config, inner, kind, rotary_dim)
    return Rope(theta=theta, rotary_dim=rotary_dim, scaling=scaling, interleaved=interleaved)


def rope_values(config: HFConfig) -> tuple[str, Any]:
    """The key that says how heads are rotated, and its value: the family's default where the file has none."""
    for key in ("rope_scaling", "rope_parameters"):
        if config.values.get(key):
            return key, config.values[key]
    return "rope_parameters", config.defaults.get("rope_parameters", {})


def _scaling(config: HFConfig, inner: HFConfig, kind: Any, rotary_dim: int) -> RopeScaling:
    """The scaling of the frequencies; in `inner` its own keys override those of the file."""
    longest = config.size("max_position_embeddings")
    if kind == "linear":
        original = inner.optional_size("original_max_position_embeddings") or longest
        return RopeScaling(kind=kind, factor=inner.number("factor"), original_max_position=original)
    if kind == "dynamic":
        if rotary_dim < 4:
            raise config.problem("rope_type", "dynamic needs 4 rotated channels or more", rotary_dim)
        return RopeScaling(kind=kind, factor=inner.number("factor"), original_max_position=longest)
    # The key beside the scaling wins over the one in it, as in transformers (Phi-3 keeps it there).
    original = config.optional_size("original_max_position_embeddings") or inner.size(
        "original_max_position_embeddings", REQUIRED if kind == "longrope" else longest, low=2
    )
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high < low:
            raise inner.problem("high_freq_factor", f"must be at least low_freq_factor ({low})", high)
        more: dict[str, Any] = {"factor": inner.number("factor"), "low_freq_factor": low, "high_freq_factor": high}
        return RopeScaling(kind=kind, original_max_position=original, **more)
    factor = inner.optional_number("factor") or longest / original
    attention_factor = inner.optional_number("attention_factor")
    if kind == "yarn":
        betas = {"beta_fast": inner.optional_number("beta_fast"), "beta_slow": inner.optional_number("beta_slow")}
        more = {key: value for key, value in betas.items() if value is not None}
        more["truncate"] = inner.flag("truncate", True)
        attention_factor = attention_factor or _yarn_attention_factor(inner, factor)
    else:
        more = {key: _divisors(inner, key, rotary_dim // 2) for key in ("short_factor", "long_factor")}
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind=kind, factor=factor, original_max_position=original, attention_factor=attention_factor, **more
    )


def rope_parameters(config: HFConfig, kind: str) -> Mapping[str, Any]:
    """`rope_parameters` of one kind of layer: full_attention or sliding_attention.

    Older files have one scaling, of full attention alone, and perhaps a theta of the windows.
    """
    given = config.values.get("rope_parameters") or {}
    if isinstance(given, dict) and any(isinstance(value, dict) for value in given.values()):
        inner = given.get(kind) or {}
        if not isinstance(inner, dict):
            raise config.problem("rope_parameters", f"must be an object for {kind}", inner)
        return inner
    if kind == "sliding_attention":
        local = config.raw("rope_local_base_freq")
        theta = local if local is not None else config.raw("rope_theta")
        return {} if theta is None else {"rope_theta": theta}
    scaling = config.values.get("rope_scaling") or given
    if not isinstance(scaling, dict):
        raise config.problem("rope_scaling", "must be an object", scaling)
    return scaling


def longest_sequence(ropes: Iterable[Rope | None], stated: int) -> int:
    """Longest sequence in tokens: `stated` (max_position_embeddings), or the original length times the factor.

    As vLLM reads it: for llama3 and longrope `stated` is the scaled length, where it is above the original one; so it
    is where rotary embeddings differ by layer.
    """
    different = {rope for rope in ropes if rope is not None}
    scaling = different.pop().scaling if len(different) == 1 else None
    if scaling is None or (scaling.kind in ("llama3", "longrope") and stated > scaling.original_max_position):
        return stated
    stretched = scaling.original_max_position * scaling.factor
    return max(stated, int(min(stretched, SIZE_LIMITS["max_position_embeddings"])))


def _yarn_attention_factor(inner: HFConfig, factor: float) -> float:
    """YaRN's softmax temperature, arXiv 2309.00071 section 3.4, with DeepSeek's two scales when both are given."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = inner.values.get("mscale"), inner.values.get("mscale_all_dim")
    if mscale and mscale_all:
        over = temperature(inner.number("mscale")), temperature(inner.number("mscale_all_dim"))
        return over[0] / over[1]
    return temperature(1.0)


def _divisors(inner: HFConfig, key: str, count: int) -> tuple[float, ...]:
    """LongRoPE's divisors of the frequencies."""
    value = inner.raw(key)
    if not isinstance(value, list) or len(value) != count:
        raise inner.problem(key, f"must be a list of {count} numbers, one a rotated channel pair")
    return tuple(inner.checked_number(key, item) for item in value)
