"""Converts between the dtypes that weights may have, rounding to nearest even as torch does; numpy only.

numpy has no bfloat16: its bits are kept as uint16, and it is the upper half of a float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalite.errors import CheckpointError

STORAGE = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""safetensors' dtypes and the numpy dtypes that hold their bits."""
NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's and config.json's names -> safetensors'."""


def convert(values: NDArray, source: str, target: str, what: str) -> NDArray:
    """Values in `STORAGE[source]` as `STORAGE[target]`; `what` names them in messages.

    CheckpointError if a finite value is too large for the target, rather than an infinity in the weights.
    """
    if source == target:
        return values
    exact = to_float(values, source)
    with np.errstate(over="ignore", invalid="ignore"):
        result = _to_bfloat16(exact) if target == "BF16" else exact.astype(STORAGE[target])
    if target == "F16" or source == "F64" or target == "BF16":
        seen = to_float(result, target)
        if not np.array_equal(np.isfinite(seen), np.isfinite(exact)):
            largest = float(np.max(np.abs(exact[np.isfinite(exact)])))
            raise CheckpointError(f"{what}: holds {largest:g}, which is too large for {target}. Choose another dtype.")
    return result


def to_float(values: NDArray, dtype: str) -> NDArray:
    """Stored values as float32 (float64 if they are that), exactly."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "F16" else values


def _to_bfloat16(values: NDArray) -> NDArray:
    values = values.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
