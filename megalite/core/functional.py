"""RMSNorm, rotary rotation and gated activation with their backward passes written out.

They take fewer passes over memory than autograd's and keep less for the backward pass. Without gradients each is the
plain operation, so that a model computes the same in training and in inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels import gate as gate_kernels
from megalite.kernels import rope as rope_kernels
from megalite.kernels.jit import launches_dependents, triton


def has_kernels(x: Tensor) -> bool:
    """Whether our kernels can take `x`: on CUDA, where there is Triton."""
    return x.is_cuda and triton is not None and x.dtype != torch.float64


def by_kernels(x: Tensor) -> bool:
    """Whether `x` goes through our kernels now: `has_kernels`, and gradients are off, as in a written-out backward."""
    return has_kernels(x) and not torch.is_grad_enabled()


class Activation(NamedTuple):
    """An elementwise function, its derivative and the keyword arguments of both."""

    function: Callable[..., Tensor]
    backward: Any
    """aten operator: (gradient of the output, input) -> gradient of the input."""
    arguments: dict[str, str]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, **self.arguments)


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward, {}),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": Activation(F.gelu, torch.ops.aten.gelu_backward, {"approximate": "tanh"}),
}
"""Activations of gated MLPs; the kernels have them too."""
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: one.__call__ for name, one in ACTIVATIONS.items()}
PLAIN_ACTIVATIONS |= {"relu": F.relu, "relu2": relu2}
"""Activations of MLPs without a gate."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [..., D], [D] -> [..., D]."""
    if x.is_cuda or not torch.is_grad_enabled():  # CUDA has a fused kernel for both directions
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    apply: Callable[..., Tensor] = _RMSNorm.apply
    return apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With r = 1 / rms(x): dx = r w g - x r^3 sum(w g x) / D for a row, and dw = sum(r g x) over rows."""
        x, weight = ctx.saved_tensors
        dim = x.shape[-1]
        rows, grads, scale = x.float().reshape(-1, dim), grad.float().reshape(-1, dim), weight.float()
        inverse = (torch.linalg.vecdot(rows, rows) / dim + ctx.eps).rsqrt()
        products = grads * rows
        along = products.mv(scale) * inverse.pow(3) / dim
        into_x = (grads * scale).mul_(inverse[:, None]).addcmul_(rows, along[:, None], value=-1)
        into_weight = products.t().mv(inverse)
        return into_x.view_as(x).to(x.dtype), into_weight.to(weight.dtype), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels c and c + R of each head by the c-th angle of its token.

    x [T, H, D], cos and sin [T, 1, R] with 2 R <= D -> [T, H, D]; channels from 2 R on pass through.
    """
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin)
    apply: Callable[..., Tensor] = _Rotate.apply
    return apply(x, cos, sin)


def rotate_by_table(x: Tensor, table: Tensor, positions: Tensor | None) -> Tensor:
    """`rotate` on CUDA, in one kernel; see `kernels.rope.rotate`."""
    if not torch.is_grad_enabled():
        return rope_kernels.rotate(x, table, positions)
    apply: Callable[..., Tensor] = _RotateByTable.apply
    return apply(x, table, positions)


class _RotateByTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor | None) -> Tensor:
        ctx.save_for_backward(table, positions)
        return rope_kernels.rotate(x, table, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return rope_kernels.rotate(grad, *ctx.saved_tensors, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def gated(hidden: Tensor, activation: str) -> Tensor:
    """act(gate) * up of hidden = [gate | up]: [T, 2 I] -> [T, I]; `activation` is a key of ACTIVATIONS."""
    if not torch.is_grad_enabled():
        return _gated(hidden, activation)
    apply: Callable[..., Tensor] = _Gated.apply
    return apply(hidden, activation)


def _gated(hidden: Tensor, activation: str) -> Tensor:
    if by_kernels(hidden):
        return gate_kernels.gate(hidden, activation, pdl=launches_dependents(hidden.device))
    gate, up = hidden.chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return _gated(hidden, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        if by_kernels(hidden):
            return gate_kernels.gate_backward(grad.contiguous(), hidden, ctx.activation), None
        activation = ACTIVATIONS[ctx.activation]
        gate, up = hidden.chunk(2, -1)
        result = torch.empty_like(hidden)
        into_gate, into_up = result.chunk(2, -1)
        torch.mul(grad, activation(gate), out=into_up)
        activation.backward.grad_input(grad * up, gate, **activation.arguments, grad_input=into_gate)
        return result, None
