"""DeepSpeed's ZeRO state of each parameter, read and set as whole float32 tensors whatever the stage.

All that relies on DeepSpeed's insides is here. Stages 1 and 2 cut the flat float32 weights and moments of a parameter
group over dp; stage 3 cuts every parameter by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.config.typecheck import problem
from megalite.core.functional import has_kernels
from megalite.core.progress import here
from megalite.errors import ConfigError
from megalite.kernels.training import accumulate_

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, in PyTorch's names."""
WEIGHT = "weight"
LARGE = 1 << 24
"""Elements of a gradient from which on our kernel adds it up on CUDA: its launch takes longer than PyTorch's."""


@contextmanager
def one_optimizer_for_stages_1_and_2() -> Iterator[None]:
    """While DeepSpeed makes an engine, stage 1 gets the optimizer of stage 2 whatever the dtypes.

    For bfloat16 weights with float32 gradients it would take its BF16_Optimizer, which can't offload its state, counts
    padding into other partitions, and keeps all that is read and set here under other names. The usual one accumulates
    in float32 just as well; it is what float16 weights with float32 gradients get.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    check = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = check


@contextmanager
def refusals_named(given: Mapping[str, Any]) -> Iterator[None]:
    """While DeepSpeed makes an engine, what it says against `given`, the config's keys for it, is a ConfigError."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except (DeepSpeedConfigError, ZeRORuntimeException, AssertionError, ValueError, TypeError) as error:
        if not given:
            raise
        fix = "Change the section deepspeed, or what it does not go with."
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ConfigError(problem("deepspeed", f"DeepSpeed refuses it: {said}", dict(given), fix)) from error


def begin_optimizer(optimizer: torch.optim.AdamW, zero: Any, stage: int) -> None:
    """Give AdamW its state now, as zeros, and tell DeepSpeed where it is.

    PyTorch would make it at the first step. A state that is loaded before that step needs its place now.
    """
    for partition in zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups:
        step = torch.zeros((), device=partition.device)
        optimizer.state[partition] = {"step": step, **{kind: torch.zeros_like(partition) for kind in MOMENTS}}
    if stage < 3:
        _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Stages 1 and 2: link each parameter to its part of the flat moments, as the public safe_get and safe_set need it.

    DeepSpeed calls it only from inside its step, after the first group's, when later groups would have no state yet;
    there is no public way to have it done. It does nothing the second time.
    """
    zero._lazy_init_hp_params_optimizer_state()


def accumulated_gradient(zero: Any, param: nn.Parameter) -> Tensor | None:
    """Stage 1: the gradient summed over this step's backward passes, before it is reduced over dp."""
    gradient: Tensor | None = zero.get_gradient_for_reduction(param)
    return gradient


def shorten_steps(zero: Any, stage: int) -> None:
    """Take passes over all gradients, and every wait for the device, out of DeepSpeed's step.

    What is computed stays the same: gradients are clipped, and a step whose gradients are not all finite changes
    nothing. But that is decided on the device, by AdamW itself: DeepSpeed's `overflow` stays False.
    """
    if stage == 3 or zero.cpu_offload or zero.dtype == torch.float32:
        return
    if zero.compute_grad_norm:
        zero.check_grad_overflow = False
        zero.scaled_global_norm = partial(_gradient_norm, zero)
        zero.unscale_and_clip_grads = partial(_clip_by_optimizer, zero)
    zero._update_model_bit16_weights = partial(_place_weights, zero, zero._update_model_bit16_weights)
    if stage == 1 and zero.use_grad_accum_attribute:
        FlatGradients(zero)


def _gradient_norm(zero: Any, norm_type: int = 2) -> Tensor:
    """Gradient norm of all parameters over all ranks, in few kernels; infinite where a number is not finite.

    A parameter that several ranks hold whole counts once.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    assert norm_type == 2
    counted = []
    for number, params in enumerate(zero.params_in_partition):
        real = (one for one in zero.averaged_gradients[number] if not getattr(one, "_zero_padding", False))
        counted += [
            gradient.detach()
            for gradient, param in zip(real, params, strict=False)
            if not getattr(param, "ds_pipe_replicated", False)
            and (is_model_parallel_parameter(param) or zero.model_parallel_rank == 0)
        ]
    norms = torch._foreach_norm(counted, dtype=torch.float64) if counted else [torch.zeros((), device=zero.device)]
    total = torch.stack(norms).square().sum().float()
    with here.track("dp", tuple(dist.get_process_group_ranks(zero.dp_process_group))).entering("all_reduce"):
        dist.all_reduce(total, group=zero.dp_process_group)
    zero._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return torch.where(total.isfinite(), total.sqrt(), torch.inf)


def _clip_by_optimizer(zero: Any, _: Sequence[Tensor], norm: Tensor) -> None:
    """Leave it to the fused AdamW to divide gradients, and to leave a step out, as it does under a GradScaler."""
    adam = zero.optimizer
    adam.found_inf = norm.isfinite().logical_not().float()
    adam.grad_scale = ((norm + 1e-6) / zero.clip_grad).clamp(min=1.0) if zero.clip_grad > 0 else None


def _place_weights(zero: Any, place: Callable[[int], None], number: int) -> None:
    """Make the weights of a group parts of its flat tensor, which DeepSpeed does in every step, only if they are not.

    That is two new views and two assignments for each parameter, while the device has nothing to do.
    """
    flat = zero.bit16_groups_flat[number]
    begin = flat.data_ptr()
    if not all(begin <= param.data_ptr() < begin + flat.nbytes for param in zero.bit16_groups[number] if param.numel()):
        place(number)


class FlatGradients:
    """Stage 1, bfloat16 weights: a step's gradients add up in float32 in one tensor, laid out as the weights are.

    They are reduced over dp in one collective, into what the optimizer reads. DeepSpeed keeps every parameter's by
    itself; in its step it would copy them into buckets, divide, reduce, and add them to a further flat tensor.
    """

    def __init__(self, zero: Any):
        self.zero = zero
        self.flats: list[Tensor | None] = [None] * len(zero.bit16_groups)
        """Gradients of each parameter group, float32, from the first one of a step to the update."""
        self.places: dict[nn.Parameter, tuple[int, int]] = {}
        """Group of a parameter, and its first number's place in it."""
        self.gaps: list[list[slice]] = []
        """Parts of each group that belong to no parameter."""
        for number, (params, flat) in enumerate(zip(zero.bit16_groups, zero.bit16_groups_flat, strict=True)):
            starts = [(param.data_ptr() - flat.data_ptr()) // flat.itemsize for param in params]
            self.places |= {param: (number, start) for param, start in zip(params, starts, strict=True)}
            taken = sorted((start, start + param.numel()) for param, start in zip(params, starts, strict=True))
            ends, begins = [0, *(end for _, end in taken)], [*(start for start, _ in taken), len(flat)]
            self.gaps.append([slice(*gap) for gap in zip(ends, begins, strict=True) if gap[0] < gap[1]])
        zero.contiguous_gradients = False  # else it keeps buckets that are not used
        zero._fill_param_grad_accum_attribute = self.add
        zero.reduce_gradients = self.reduce

    def add(self, param: nn.Parameter) -> None:
        """Add a parameter's gradient to what it has, and drop it. DeepSpeed calls it in every backward pass."""
        if param.grad is None:
            return
        fields: Any = param
        first, part = fields.grad_accum is None, self._part(param)
        if param.numel() >= LARGE and has_kernels(part) and param.grad.is_contiguous():
            accumulate_(part, param.grad, first=first)
        elif first:
            part.copy_(param.grad)
        else:
            part.add_(param.grad)
        fields.grad_accum = part
        param.grad = None

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Give DeepSpeed the mean over dp of this rank's partitions. It calls this once a step."""
        for number, params in enumerate(self.zero.bit16_groups):
            for param in params:
                if param.grad_accum is None:
                    self._part(param).zero_()
            flat, group = self._flat(number), self.zero.real_dp_process_group[number]
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            mine = flat if size == 1 else flat.new_empty(len(flat) // size)
            if size > 1:
                with here.track("dp", tuple(dist.get_process_group_ranks(group))).entering("reduce_scatter"):
                    dist.reduce_scatter_tensor(mine, flat, group=group)
                mine.div_(size)
            owned = _Partition(mine, self, number)
            for param in self.zero.params_in_partition[number]:
                _, place = self.places[param]
                start = place - rank * len(mine)
                owned.append(mine[max(0, start) : start + param.numel()])
            self.zero.averaged_gradients[number] = owned

    def _part(self, param: nn.Parameter) -> Tensor:
        number, start = self.places[param]
        return self._flat(number).as_strided(param.shape, param.stride(), start)

    def _flat(self, number: int) -> Tensor:
        flat = self.flats[number]
        if flat is None:
            flat = torch.empty_like(self.zero.bit16_groups_flat[number], dtype=torch.float32)
            for gap in self.gaps[number]:
                flat[gap].zero_()
            self.flats[number] = flat
        return flat


class _Partition(list[Tensor]):
    """What the gradients of a partition have to be for DeepSpeed's step: one for each parameter, and all in one."""

    def __init__(self, flat: Tensor, owner: FlatGradients, number: int):
        super().__init__()
        self.flat_partition = flat
        self.owner = owner
        self.number = number

    def release_grad_buffers(self) -> None:
        """Called when the optimizer has been given them, or the step is left out."""
        self.owner.flats[self.number] = None


def offload(engine: Any, optimizer: torch.optim.AdamW, stage: int) -> None:
    """Move what only the optimizer reads, float32 weights and moments, to host memory until `reload`."""
    if stage == 3:  # the engine would do it for its own compiled optimizer only
        _move_stage3(engine.optimizer, optimizer, torch.device("cpu"))
        return
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    states = [OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states]
    engine.offload_states(include=states, pin_memory=engine.device.type == "cuda")


def reload(engine: Any, optimizer: torch.optim.AdamW, stage: int) -> None:
    """Undo `offload`: back to `engine`'s device."""
    if stage == 3:
        _move_stage3(engine.optimizer, optimizer, engine.device)
        return
    engine.reload_states()
    engine.optimizer._hp_optimizer_states_linked = False  # the offload has cut the links
    _link_moments(engine.optimizer)


def _move_stage3(zero: Any, optimizer: torch.optim.AdamW, device: torch.device) -> None:
    for partition in zero.fp32_partitioned_groups_flat:
        for tensor in (partition, *(optimizer.state[partition][kind] for kind in MOMENTS)):
            tensor.data = tensor.data.to(device)


def whole_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole local parameter; under stage 3 `param` itself is empty."""
    return tuple(getattr(param, "ds_shape", param.shape))


def get_whole(param: nn.Parameter, kind: str) -> Tensor:
    """The weights that the optimizer updates (WEIGHT) or a moment, float32. Collective over dp."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: Tensor = safe_get_full_fp32_param(param) if kind == WEIGHT else safe_get_full_optimizer_state(param, kind)
    return found.view(whole_shape(param))


def set_whole(param: nn.Parameter, kind: str, value: Tensor) -> None:
    """Put this rank's part of `value` where DeepSpeed keeps it; `finish_setting` follows when all are set."""
    import deepspeed.utils as ds

    where, cut = "full", vars(param)
    if "ds_tensor" in cut:  # stage 3: equal parts, the last padded
        where, size, rank = "local", cut["ds_tensor"].ds_numel, dist.get_rank(cut["ds_process_group"])
        mine = value.flatten()[rank * size : (rank + 1) * size]
        value = torch.cat([mine, mine.new_zeros(size - len(mine))])
    if kind == WEIGHT:
        getattr(ds, f"safe_set_{where}_fp32_param")(param, value)
    else:
        getattr(ds, f"safe_set_{where}_optimizer_state")(param, value, kind)


def finish_setting(optimizer: torch.optim.AdamW, zero: Any, stage: int, step: int) -> None:
    """Make the weights of the forward pass from the float32 ones, as after step `step`. Collective over dp."""
    for partition in optimizer.state.values():
        partition["step"].fill_(step)
    if stage < 3:
        zero.update_lp_params()
        return
    for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
        zero._unflatten_partitioned_parameters(group)  # what stage 3 itself does after its step
