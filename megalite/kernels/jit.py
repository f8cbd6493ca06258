"""Triton, where it can be imported, and how kernels are compiled. CPU builds of torch come without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalite.errors import ResourceError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["jit", "require_triton", "tl", "triton"]


def jit(kernel: Callable[..., Any]) -> Any:
    """Compile for the GPU at first use; lengths that change from step to step must not start another compilation."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["num_rows", "table_stride"])


def require_triton() -> None:
    """ResourceError where Triton can't be imported."""
    if triton is None:
        raise ResourceError("generation on a GPU needs Triton, and it can't be imported. Try: pip install triton")
