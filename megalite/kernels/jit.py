"""Triton, where it can be imported, and how kernels are compiled. CPU builds of torch come without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from megalite.errors import ResourceError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "cdiv",
    "jit",
    "launches_dependents",
    "multiprocessors",
    "next_power_of_2",
    "require_triton",
    "shared_memory",
    "tl",
    "triton",
]

LAUNCHED = "3.6."
"""The versions of Triton whose way to launch is known here; others launch by themselves."""
NOT_SPECIALIZED = ["num_rows", "num_outputs", "num_parts", "num_best", "table_stride"]
NOT_ALIGNED = ["slots", "positions", "rows", "query_start", "context_len", "table_rows", "masks"]
"""Of each token or row one number, read one by one: parts of a tensor that begin where the parts before them end."""


def jit(kernel: Callable[..., Any]) -> Any:
    """Compile for the GPU at first use; lengths and places that change from step to step must not
    start another compilation."""
    if triton is None:
        return kernel
    places = {"do_not_specialize": NOT_SPECIALIZED, "do_not_specialize_on_alignment": NOT_ALIGNED}
    if triton.knobs.runtime.interpret or not triton.__version__.startswith(LAUNCHED):
        return triton.jit(kernel, **places)
    return quick_launches()(kernel, **places)


@cache
def quick_launches() -> Any:
    """The class of kernels whose launches take the host half of the time that Triton's own take.

    What was compiled for arguments like these is looked up by what Triton itself makes of them, and launched; of what
    Triton looks at beside in every launch, hooks of profilers alone are heeded.
    """
    from triton.runtime import driver

    runtime = triton.knobs.runtime

    class Kernel(triton.runtime.JITFunction):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.compiled: dict[tuple[Any, ...], Any] = {}

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            return partial(self.run, grid=grid, warmup=False)

        def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
            active, hooks = driver.active, (runtime.launch_enter_hook, runtime.launch_exit_hook)
            device = active.get_current_device()
            bound, specialization, rest = self.device_caches[device][4](*args, **options)
            key = (device, *specialization, *rest.items())
            kernel = self.compiled.get(key)
            if kernel is None or warmup or any(getattr(hook, "calls", hook) for hook in hooks):
                found = super().run(*args, grid=grid, warmup=warmup, **options)
                if hasattr(found, "packed_metadata"):  # not one that is still being compiled
                    self.compiled[key] = found
                return found
            sizes = (*grid, 1, 1)[:3]
            stream = active.get_current_stream(device)
            kernel.run(*sizes, stream, kernel.function, kernel.packed_metadata, None, None, None, *bound.values())
            return kernel

    return Kernel


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own takes the host as long as an allocation."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is x or more; 1 for 0."""
    return 1 << max(x - 1, 0).bit_length()


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
