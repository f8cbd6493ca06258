"""The optimizer, its learning rate, and DeepSpeed's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megalite.config.schema import OptimizerSection
from megalite.model.decoder import Decoder


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) of `steps`: linear warm-up, then a cosine from peak to minimum."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    low, high = section.min_learning_rate, section.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(decoder: Decoder, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW of what trains, with decay on matrices only; PyTorch's own, so that DeepSpeed has nothing to compile."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (section.weight_decay, 0.0)]
    for param in filter(lambda one: one.requires_grad, decoder.parameters()):
        groups[param.ndim < 2]["params"].append(param)
    groups = [group for group in groups if group["params"]]
    low, high = section.betas
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=(low, high), eps=section.eps, fused=True)


def deepspeed_config(
    optimizer: OptimizerSection, *, zero_stage: int, dtype: torch.dtype, more: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and `more` from the `deepspeed` section (the config's rules keep them apart)."""
    gradients = "bf16" if dtype == torch.bfloat16 and optimizer.gradient_dtype == "bfloat16" else "fp32"
    return {
        "zero_force_ds_cpu_optimizer": False,  # ours serves where it is offloaded, too, and needs no compiling
        **more,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}, **more.get("timers", {})},  # it waits for the GPU twice a step
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many backward passes as it is given micro batches
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": {**more.get("zero_optimization", {}), "stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": gradients},
        "communication_data_type": gradients,
    }
