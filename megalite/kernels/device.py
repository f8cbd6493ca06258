"""CUDA devices: what goes to them, their memory and names."""

from __future__ import annotations

import gc

import numpy as np
import torch
from torch import Tensor


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device: one copy from page-locked memory, for which nothing waits. On a CPU the array itself."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Free memory of a CUDA device in bytes, after this process has given back what it only caches."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def memory_in_use() -> int:
    """Bytes of the current CUDA device that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def device_memory(device: torch.device) -> int:
    """All memory of a CUDA device in bytes, whoever uses it."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def release_memory(device: torch.device) -> None:
    """Give back a CUDA device's memory that this process no longer uses."""
    if device.type == "cuda":
        gc.collect()  # an engine's objects know each other
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done all that it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use_device(device: torch.device) -> None:
    """Make a CUDA device this thread's own; a new thread has the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def device_name(device: torch.device) -> str:
    """Product name of a GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def has_fp8(device: torch.device) -> bool:
    """Whether kernels on a CUDA device know float8 e4m3."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def timing_event() -> torch.cuda.Event:
    """A mark in the stream, whose distance to others can be asked for."""
    return torch.cuda.Event(enable_timing=True)


def ranks_on_device(ranks_on_host: int) -> int:
    """Most ranks on one CUDA device when a host's ranks are spread over its devices."""
    return -(-ranks_on_host // torch.cuda.device_count())
