"""A linear map as one object: a weight, cut over tp, in a format that says how it is stored and applied. T tokens.

    format            which tensors are stored for a weight [N, K], in which units they may be cut, what they weigh,
                      how they are applied, and which work beside the product their kernels take in
    column-parallel   N is cut over tp, and the result with it
    row-parallel      K is cut over tp, and the partial products are summed

Checkpoint ranges and parameters agree because both are cut by the same `Split`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalite.core.collectives import enter_tp, leave_tp
from megalite.core.formats import WeightFormat
from megalite.core.functional import by_kernels, gated
from megalite.core.layers import Residual, RMSNorm, VocabParallelEmbedding, replicated, sharded
from megalite.core.layout import Split, width
from megalite.core.parallel_state import ParallelState
from megalite.core.quantized import SCALED_BLOCK, coded, dequantize, has_nan, largest_of, to_fp8
from megalite.kernels import codes as codes_kernels
from megalite.kernels.codes import LEAST_BLOCK, block_of
from megalite.kernels.device import has_fp8
from megalite.kernels.jit import launches_dependents, triton
from megalite.kernels.thin import MAX_ROWS, thin_linear

Stored = Mapping[str, Tensor | None]
"""The tensors of a weight by the format's names for them; others are passed over."""
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input [T, K], weight [N, K], bias [N]) -> [T, ...], as `F.linear`."""
Norm = tuple[Tensor, float, bool]
"""Of an RMSNorm: its weight [K], eps, whether it is zero-centred."""
SCALED_ROWS = 16
"""Rows up to which multiplying by fp8 as it is read is as fast as making them fp8 first, and exacter."""


class Format:
    """How a weight is applied, from its stored tensors: here as the matrix that they make, made anew each time."""

    def matrix(self, stored: Stored) -> Tensor:
        """The weight [N, K], for a product that a caller makes himself."""
        raise NotImplementedError

    def takes_more(self, x: Tensor, stored: Stored) -> bool:
        """Whether the kernel of this product takes in the norm before and the sum after it."""
        return False

    def adds(self, x: Tensor, stored: Stored, bias: Tensor | None) -> bool:
        """Whether the kernel of this product adds it to what is there."""
        return False

    def product(
        self,
        x: Tensor,
        stored: Stored,
        bias: Tensor | None = None,
        *,
        gate: str | None = None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x W^T + b: [T, K] -> [T, N].

        `gate`: an activation; the outputs are [gate | up] and the result is act(gate) * up, [T, N / 2]. Where the
        product `takes_more`: `norm` of x comes first. Where it `adds`: the result is added to `residual` [T, N], in
        place.
        """
        assert norm is None and residual is None
        y = F.linear(x, self.matrix(stored), bias)
        return y if gate is None else gated(y, gate)

    def suit_cpu(self, stored: Stored) -> None:
        """Store the weight as a CPU reads it fastest."""


class Dense(Format):
    """The matrix itself in the model's dtype: one tensor, `weight` [N, K]."""

    def matrix(self, stored: Stored) -> Tensor:
        weight = stored["weight"]
        assert weight is not None
        return weight

    def takes_more(self, x: Tensor, stored: Stored) -> bool:
        """Whether the kernel of this product, of few rows on a GPU, takes in the norm before and the sum after it.

        A weight that DeepSpeed has spread over ranks (ZeRO stage 3) is whole only inside its module's call.
        """
        most = MAX_ROWS if x.dtype.itemsize == 2 else 1  # float32 has no tensor cores
        few = x.ndim == 2 and x.shape[0] <= most and by_kernels(x)
        return few and self.matrix(stored).shape[-1] == x.shape[1]

    def adds(self, x: Tensor, stored: Stored, bias: Tensor | None) -> bool:
        """Whether the kernel of this product adds it to what is there: cuBLAS' too in generation, but for a bias."""
        return (bias is None and by_kernels(x) and x.is_inference()) or self.takes_more(x, stored)

    def product(
        self,
        x: Tensor,
        stored: Stored,
        bias: Tensor | None = None,
        *,
        gate: str | None = None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        weight = self.matrix(stored)
        if self.takes_more(x, stored):
            return thin_linear(
                x,
                weight,
                bias=bias,
                norm=norm,
                gated=gate,
                residual=residual,
                out=residual,
                pdl=x.shape[0] == 1 and launches_dependents(x.device),  # measured slower for several rows
            )
        assert norm is None
        if residual is not None:
            assert bias is None and gate is None
            return residual.addmm_(x, weight.t())
        y = F.linear(x, weight, bias)
        return y if gate is None else gated(y, gate)

    def suit_cpu(self, stored: Stored) -> None:
        """Store the weight column-major (input by input); shape and values stay.

        For float32: measured 1.4 times as fast for one token and 1.6 times for two, never slower for many.
        """
        weight = self.matrix(stored)
        weight.data = weight.data.t().contiguous().t()


DENSE = Dense()


class Quantized(Format):
    """A weight in one of the formats of `core.formats`, as it is stored: what is loaded, and the reference."""

    def __init__(
        self, format: WeightFormat, segments: Sequence[int], columns: int, dtype: torch.dtype, *, all_columns: int
    ):
        """Of a rank's matrices [rows, columns] of a model in `dtype`; the rest as `WeightFormat.shapes`."""
        self.format = format
        self.all_columns = all_columns
        self.segments = segments
        self.columns = columns
        self.dtype = dtype

    def parameters(self) -> dict[str, nn.Parameter]:
        """The stored tensors, uninitialised: codes as they are in files, scales in float32."""
        parts = {part.name: part for part in self.format.parts}
        found = {}
        for name, shape in self.format.shapes(self.segments, self.columns, self.all_columns).items():
            dtype = torch.float32 if parts[name].is_float else _torch_dtype(parts[name].dtypes[0])
            found[name] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        return found

    def matrix(self, stored: Stored) -> Tensor:
        return dequantize(self.format, _present(stored), self.segments, self.columns).to(self.dtype)

    def applied(self, stored: Stored) -> tuple[Format, dict[str, Tensor]]:
        """The weight as this device applies it: codes for its kernels, or numbers."""
        tensors = _present(stored)
        if _keeps_codes(next(iter(tensors.values())), self.dtype):
            found = coded(self.format, tensors, self.segments, self.columns)
            if found is not None:
                return Coded(found[0], self.dtype), found[1]
        return DENSE, {"weight": self.matrix(stored)}


def _present(stored: Stored) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in stored.items() if tensor is not None}


class Coded(Format):
    """A weight as the kernels of `kernels.codes` take it: `codes`, `scales`, perhaps `zeros` and `order`.

    Up to MAX_ROWS rows are multiplied by the codes as they are read, more by the numbers written out. In fp8 more than
    SCALED_ROWS are made fp8 too, with a scale a token, or for 128 channels of it, where cuBLAS multiplies by such
    weights. Codes are frozen: inputs have gradients, weights none.
    """

    def __init__(self, kind: str, dtype: torch.dtype):
        self.kind = kind
        self.dtype = dtype

    def matrix(self, stored: Stored) -> Tensor:
        codes, scales, zeros = (stored.get(name) for name in ("codes", "scales", "zeros"))
        assert codes is not None and scales is not None
        weight = codes_kernels.expand(codes, scales, zeros, kind=self.kind, dtype=self.dtype)
        order = stored.get("order")
        return weight if order is None else weight[:, torch.argsort(order)]

    def product(
        self,
        x: Tensor,
        stored: Stored,
        bias: Tensor | None = None,
        *,
        gate: str | None = None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        assert norm is None and residual is None
        if torch.is_grad_enabled() and x.requires_grad:
            apply: Callable[..., Tensor] = _FrozenProduct.apply
            y = apply(x, self, stored, bias)
        else:
            y = self.multiplied(x, stored, bias)
        return y if gate is None else gated(y, gate)

    def multiplied(self, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
        """The product itself, without gradients."""
        codes, scales, zeros = (stored.get(name) for name in ("codes", "scales", "zeros"))
        order = stored.get("order")
        assert codes is not None and scales is not None
        x = x if order is None else x[:, order]
        if self.kind == "fp8" and x.shape[0] > SCALED_ROWS and x.dtype == torch.bfloat16:
            y = _scaled_product(x, codes, scales, stored.get("blocks"))
            if y is not None:
                return y if bias is None else y + bias
        if x.shape[0] <= codes_kernels.MAX_ROWS and x.dtype.itemsize == 2:
            return codes_kernels.codes_linear(x, codes, scales, zeros, bias, kind=self.kind)
        return F.linear(x, codes_kernels.expand(codes, scales, zeros, kind=self.kind, dtype=x.dtype), bias)

    def of_experts(self, x: Tensor, stored: Stored, bias: Tensor | None, experts: Tensor) -> Tensor:
        """Each row of x [T, K] times the one of E weights that `experts` [T] names, of which `stored` has the tensors
        [E, ...], plus its bias [E, N] -> [T, N]; zero where that is -1."""
        codes, scales, zeros = (stored.get(name) for name in ("codes", "scales", "zeros"))
        assert codes is not None and scales is not None
        return codes_kernels.codes_linear_of_experts(x, codes, scales, zeros, bias, experts, kind=self.kind)


class _FrozenProduct(torch.autograd.Function):
    """A product of codes whose backward pass gives the gradient of its input, by the numbers, written out again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Coded, stored: Stored, bias: Tensor | None) -> Tensor:
        ctx.format, ctx.stored = format, stored
        return format.multiplied(x, stored, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ ctx.format.matrix(ctx.stored), None, None, None


def _scaled_product(x: Tensor, codes: Tensor, scales: Tensor, blocks: Tensor | None) -> Tensor | None:
    """x [T, K], made fp8, times fp8 [N, K] with scales [N, 1] or `blocks` -> [T, N]; None where cuBLAS has
    no such product."""
    outputs, dim = codes.shape
    if not codes.is_cuda or outputs % 16 or dim % 16:
        return None
    weight = codes.view(torch.float8_e4m3fn).t()
    if scales.shape[1] == 1:
        inputs, mine = codes_kernels.fp8_rows(x)
        return torch._scaled_mm(inputs, weight, mine, scales.t(), out_dtype=x.dtype, use_fast_accum=True)
    if blocks is None or dim % (4 * SCALED_BLOCK) or not _multiplies_blocks(x.device):
        return None
    rows = x.shape[0]
    x = F.pad(x, (0, 0, 0, -rows % 4))  # rows of scales are aligned to 16 bytes
    inputs, mine = codes_kernels.fp8_rows(x, SCALED_BLOCK)
    kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    y: Tensor = F.scaled_mm(inputs, weight, mine, kinds[0], blocks.t(), kinds[1], output_dtype=x.dtype)
    return y[:rows]


@cache
def _multiplies_blocks(device: torch.device) -> bool:
    """Whether torch multiplies fp8 with scales of blocks: on Hopper, from CUDA 12.9 on."""
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return hasattr(F, "scaled_mm") and cuda >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0)


def _keeps_codes(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels multiply codes on this device: of e4m3 from compute capability 8.9 on, so all from there on."""
    return tensor.is_cuda and triton is not None and dtype.itemsize == 2 and has_fp8(tensor.device)


def _torch_dtype(name: str) -> torch.dtype:
    return {
        "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8,
        "I32": torch.int32,
        "I64": torch.int64,
        "U8": torch.uint8,
    }[name]


def in_fp8(weight: Tensor, largest: Tensor | None = None) -> tuple[Format, dict[str, Tensor]]:
    """A matrix of numbers in fp8, see `to_fp8`, as this device applies it: without kernels as numbers again."""
    codes, scales = to_fp8(weight, largest)
    suited = _keeps_codes(weight, weight.dtype) and weight.numel() and block_of(weight.shape[1]) >= LEAST_BLOCK
    if suited and not has_nan(codes):
        return Coded("fp8", weight.dtype), {"codes": codes.view(torch.uint8), "scales": scales}
    return DENSE, {"weight": codes.float().mul_(scales).to(weight.dtype)}


class Linear(nn.Module):
    """This rank's part of a linear map: [T, in_features] -> [T, out_features], both of this rank.

    `segments`: the outputs of each of the matrices that are stacked. `format`: how they are stored; None: as numbers.
    `all_features`: inputs of all ranks together; None: as many as here.
    """

    def __init__(
        self,
        in_features: int,
        segments: Sequence[int],
        state: ParallelState,
        format: WeightFormat | None = None,
        *,
        all_features: int | None = None,
    ):
        super().__init__()
        self.state = state
        self.format: Format = DENSE
        if format is None:
            self.weight = sharded((sum(segments), in_features))
            return
        self.format = Quantized(
            format, segments, in_features, torch.get_default_dtype(), all_columns=all_features or in_features
        )
        for name, tensor in self.format.parameters().items():
            self.register_parameter(name, tensor)

    @property
    def stored(self) -> Stored:
        """The weight's tensors."""
        return self._parameters

    @torch.no_grad()
    def settle(self, quantization: str | None) -> None:
        """Once the weight is loaded: keep it in the form in which it is applied on this device."""
        if isinstance(self.format, Quantized):
            self._keep(*self.format.applied(self.stored))
        elif quantization == "fp8":
            largest = largest_of(self.weight)
            if isinstance(self, RowParallelLinear) and self.state.tp.size > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX, self.state.tp.group)
            self._keep(*in_fp8(self.weight.detach(), largest))

    def _keep(self, format: Format, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors of another format in place of those that there are."""
        for name in [name for name in self._parameters if name != "bias"]:
            del self._parameters[name]
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.format = format


class ColumnParallelLinear(Linear):
    """y = x W^T + b with the outputs (rows of W) cut over tp: [T, D] -> [T, this rank's outputs].

    Several matrices that share their input, such as q, k and v, are stacked in one weight: one `Split` each; `widths`
    are this rank's outputs of each, in order. Under sequence parallelism x is [T/tp, D] and gathered first.
    """

    def __init__(
        self,
        in_features: int,
        splits: Sequence[Split],
        state: ParallelState,
        *,
        bias: bool,
        format: WeightFormat | None = None,
    ):
        widths = [width(split, state.tp.size, state.tp.rank) for split in splits]
        super().__init__(in_features, widths, state, format)
        self.widths = widths
        self.bias = sharded((sum(widths),)) if bias else None

    def forward(self, x: Tensor, product: Product | None = None, *, gate: str | None = None) -> Tensor:
        """`product` is applied to the whole x [T, D], the weight as a matrix and the bias; None: the linear map.

        `gate`: see `Dense.product`.
        """
        x = enter_tp(x, self.state)
        if product is not None:
            return product(x, self.format.matrix(self.stored), self.bias)
        return self.format.product(x, self.stored, self.bias, gate=gate)

    def read(self, stream: Residual, norm: nn.Module | None, *, gate: str | None = None) -> Tensor:
        """The map of the normed residual stream; without a norm of the stream itself."""
        x = stream.settled()
        if x is not None and isinstance(norm, RMSNorm) and self.format.takes_more(x, self.stored):
            place = norm.weight, norm.eps, norm.zero_centred
            return self.format.product(x, self.stored, self.bias, gate=gate, norm=place)
        out: Tensor = self(stream.normed(norm), gate=gate)
        return out


class RowParallelLinear(Linear):
    """y = x W^T + b with the inputs (columns of W) cut over tp: [T, this rank's inputs] -> [T, out_features].

    The partial products are summed over tp, under sequence parallelism to [T/tp, out_features]. The bias is whole on
    every rank and added once, after the sum.
    """

    def __init__(
        self,
        split: Split,
        out_features: int,
        state: ParallelState,
        *,
        bias: bool,
        format: WeightFormat | None = None,
    ):
        mine = width(split, state.tp.size, state.tp.rank)
        super().__init__(mine, [out_features], state, format, all_features=split.total)
        self.bias = replicated((out_features,), partial_gradient=state.sequence_parallel) if bias else None

    def forward(self, x: Tensor, *, partial: bool = False) -> Tensor:
        """`partial`: this rank's summand, without the bias."""
        y = self.format.product(x, self.stored)
        if partial:
            return y
        y = leave_tp(y, self.state)
        return y if self.bias is None else y + self.bias

    def write(self, stream: Residual, x: Tensor, post: Callable[[Tensor], Tensor] | None) -> None:
        """Add the map of x to the residual stream, through `post`, such as a norm, if there is one."""
        if self.state.tp.size == 1 and post is None and self.format.adds(x, self.stored, self.bias):
            self.format.product(x, self.stored, self.bias, residual=stream.sum_in_place())
        elif self.bias is None and post is None:
            stream.add_partial(self(x, partial=True), self.state)
        else:
            stream.add(self(x), post)


def store_by_input(module: nn.Module) -> None:
    """Lay out the weights of a module's linears as a CPU reads them fastest; see `Dense.suit_cpu`.

    One weight is copied at a time. A weight that an embedding shares stays as it is.
    """
    shared = {id(part.weight) for part in module.modules() if isinstance(part, VocabParallelEmbedding)}
    for part in module.modules():
        if isinstance(part, Linear) and not any(id(tensor) in shared for tensor in part.stored.values()):
            part.format.suit_cpu(part.stored)


def settle(module: nn.Module, quantization: str | None = None) -> None:
    """Once weights are loaded: keep those in formats of their own in the form in which this device applies them.

    `quantization`: `fp8` stores the layers' linear maps so, a scale a row; an embedding and a head stay numbers.
    Collective over tp.
    """
    for name, part in module.named_modules():
        if hasattr(part, "settle"):
            part.settle(None if name == "head" else quantization)
