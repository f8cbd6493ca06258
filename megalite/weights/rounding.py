"""Converts weights from one dtype to another with numpy alone, rounding to nearest even as torch does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.errors import CheckpointError
from megalite.weights.dtypes import STORAGE

Elements = NDArray[Any]
"""Of one of the types of `STORAGE`."""


def convert(values: Elements, source: str, target: str, what: str) -> Elements:
    """Elements of dtype `source` as those of `target`; `what` names them in messages.

    CheckpointError if a finite value is too large for the target, rather than an infinity in the weights.
    """
    if source == target:
        return values
    exact = to_float(values, source)
    with np.errstate(over="ignore", invalid="ignore"):
        result: Elements = _to_bfloat16(exact) if target == "BF16" else exact.astype(STORAGE[target])
    if target == "F16" or source == "F64" or target == "BF16":
        seen = to_float(result, target)
        if not np.array_equal(np.isfinite(seen), np.isfinite(exact)):
            largest = float(np.max(np.abs(exact[np.isfinite(exact)])))
            raise CheckpointError(f"{what}: holds {largest:g}, which is too large for {target}. Choose another dtype.")
    return result


def to_float(values: Elements, dtype: str) -> Elements:
    """Stored values as float32 (float64 if they are that), exactly."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "F16" else values


def _to_bfloat16(values: Elements) -> Elements:
    values = values.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
