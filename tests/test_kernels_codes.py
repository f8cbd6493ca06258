"""Products with codes of 4 and 8 bits, against the numbers that the codes stand for.

The kernels run compiled where there is a CUDA device and under Triton's interpreter where there is none.
"""

from __future__ import annotations

import pytest
import torch
from test_kernels import CUDA, DEVICE, needs_triton

from megalite.core.linear import Coded
from megalite.kernels.codes import codes_linear, expand

DTYPES = (torch.float16, torch.bfloat16) if CUDA else (torch.float16,)  # the interpreter multiplies bfloat16 wrongly
SHAPES = [(24, 64, 2), (40, 128, 1), (33, 192, 3)] + ([(4096, 4096, 32), (512, 14336, 1)] if CUDA else [])


def drawn(kind: str, outputs: int, dim: int, groups: int):
    """Codes as kernels take them, scales, zeros, and the weight in float32."""
    torch.manual_seed(dim)
    scales = torch.rand(outputs, groups) / dim**0.5
    if kind == "fp8":
        numbers = (torch.randn(outputs, dim) * 50).to(torch.float8_e4m3fn)
        codes, values, zeros = numbers.view(torch.uint8), numbers.float(), None
    else:
        most = 16 if kind == "int4" else 256
        plain = torch.randint(0, most, (outputs, dim))
        zeros = torch.randint(0, most + 1, (outputs, groups)).to(torch.int16)
        values = (plain - zeros.repeat_interleave(dim // groups, 1)).float()
        codes = (plain[:, 0::2] | (plain[:, 1::2] << 4) if kind == "int4" else plain).to(torch.uint8)
    weight = values * scales.repeat_interleave(dim // groups, 1)
    return [None if one is None else one.to(DEVICE) for one in (codes, scales, zeros, weight)]


@needs_triton
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("outputs", "dim", "groups"), SHAPES)
def test_products_and_numbers(kind, outputs, dim, groups):
    codes, scales, zeros, weight = drawn(kind, outputs, dim, groups)
    numbers = expand(codes, scales, zeros, kind=kind, dtype=torch.float32)
    assert torch.allclose(numbers, weight, rtol=1e-6, atol=1e-7)
    for dtype in DTYPES:
        bias = torch.randn(outputs, device=DEVICE).to(dtype)
        for tokens in (1, 3, 17):
            x = torch.randn(tokens, dim, device=DEVICE).to(dtype)
            want = x.double() @ weight.double().t() + bias.double()
            got = codes_linear(x, codes, scales, zeros, bias, kind=kind)
            assert (got.double() - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


@needs_triton
def test_a_linear_of_codes():
    """Few rows and many, columns in an order of their own, gate."""
    codes, scales, zeros, weight = drawn("int4", 32, 64, 2)
    order = torch.randperm(64, device=DEVICE)
    stored = {"codes": codes, "scales": scales, "zeros": zeros, "order": order}
    format, whole = Coded("int4", torch.float16), weight[:, torch.argsort(order)].half()
    assert torch.equal(format.matrix(stored), whole)
    for tokens in (1, 5, 65):
        x = torch.randn(tokens, 64, device=DEVICE).half()
        left, right = (x.float() @ whole.float().t()).chunk(2, -1)
        got = format.product(x, stored, gate="silu")
        assert torch.allclose(got.float(), torch.nn.functional.silu(left) * right, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_fp8_of_many_rows():
    """cuBLAS' product of fp8 with scales of rows: as near as codes of three bits are."""
    codes, scales, _, weight = drawn("fp8", 256, 512, 1)
    x = torch.randn(200, 512, device=DEVICE).bfloat16()
    got = Coded("fp8", torch.bfloat16).product(x, {"codes": codes, "scales": scales})
    want = x.double() @ weight.double().t()
    assert (got.double() - want).norm() <= 0.04 * want.norm()
