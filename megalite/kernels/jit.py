"""Triton, where it can be imported, and how kernels are compiled. CPU builds of torch come without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megalite.errors import ResourceError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["jit", "launches_dependents", "multiprocessors", "require_triton", "shared_memory", "tl", "triton"]

NOT_SPECIALIZED = ["num_rows", "num_outputs", "table_stride"]
NOT_ALIGNED = ["slots", "positions", "rows", "query_start", "context_len", "table_rows"]
"""Of each token or row one number, read one by one: parts of a tensor that begin where the parts before them end."""


def jit(kernel: Callable[..., Any]) -> Any:
    """Compile for the GPU at first use; lengths and places that change from step to step must not
    start another compilation."""
    if triton is None:
        return kernel
    return triton.jit(kernel, do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=NOT_ALIGNED)


def require_triton() -> None:
    """ResourceError where Triton can't be imported."""
    if triton is None:
        raise ResourceError("generation on a GPU needs Triton, and it can't be imported. Try: pip install triton")


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 16 for a CPU, where kernels run in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on a CUDA device; Hopper's for a CPU."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@cache
def launches_dependents(device: torch.device) -> bool:
    """Whether kernels can start before the one before has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
