"""Operations whose gradients are written out: fewer passes over memory than autograd's, and less kept for them.

Where no gradient is wanted each is the plain operation, so what a model computes is the same in training and without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {
    "silu": (F.silu, torch.ops.aten.silu_backward, {}),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": (F.gelu, torch.ops.aten.gelu_backward, {"approximate": "tanh"}),
}
"""By name: an activation, its backward pass, and the arguments of both."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.is_cuda or not torch.is_grad_enabled():  # CUDA has a fused kernel for both directions
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
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
    """Rotate channel c with c + R by an angle: [T, H, D] by [T, 1, R] each; channels from 2 R on pass through."""
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def gated(hidden: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of [T, gate | up]: [T, 2 I] -> [T, I]."""
    if not torch.is_grad_enabled():
        return _gated(hidden, activation)
    return _Gated.apply(hidden, activation)


def _gated(hidden: Tensor, activation: str) -> Tensor:
    function, _, arguments = GATES[activation]
    gate, up = hidden.chunk(2, -1)
    return function(gate, **arguments) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return _gated(hidden, activation)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (hidden,) = ctx.saved_tensors
        function, backward, arguments = GATES[ctx.activation]
        gate, up = hidden.chunk(2, -1)
        result = torch.empty_like(hidden)
        into_gate, into_up = result.chunk(2, -1)
        torch.mul(grad, function(gate, **arguments), out=into_up)
        backward.grad_input(grad * up, gate, **arguments, grad_input=into_gate)
        return result, None
