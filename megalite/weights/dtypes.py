"""The one table of number formats: safetensors' names, bytes, and what torch and numpy call them. Imports neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of an element, by safetensors' name."""
WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The formats that a weight may have -> the names that torch and config.json have for them."""
SAFETENSORS = {name: dtype for dtype, name in WEIGHT_DTYPES.items()}
"""The inverse of WEIGHT_DTYPES."""
CODES = {"F8_E4M3": "float8_e4m3fn", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8"}
"""The formats of codes and indices, which make weights in a format of their own -> torch's names."""
STORAGE = {**WEIGHT_DTYPES, "BF16": "uint16", **CODES, "F8_E4M3": "uint8"}
"""All formats -> the numpy types that hold their bits. numpy has no bfloat16, which is the upper half of a float32."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype, by its own or safetensors' name: `bfloat16` or `BF16`."""
    import torch

    found = getattr(torch, {**WEIGHT_DTYPES, **CODES}.get(name, name))
    assert isinstance(found, torch.dtype), f"{name} is no dtype"
    return found
