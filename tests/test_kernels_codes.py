"""Products with codes of 4 and 8 bits, against the numbers that the codes stand for.

The kernels run compiled where there is a CUDA device and under Triton's interpreter where there is none.
"""

from __future__ import annotations

import pytest
import torch
from test_kernels import CUDA, DEVICE, needs_triton

from megalite.core.formats import Elementwise
from megalite.core.layout import Layout
from megalite.core.linear import Coded
from megalite.core.parallel_state import ParallelState
from megalite.core.quantized import E2M1, coded, dequantize, to_fp8
from megalite.kernels.codes import bits_of, codes_linear_of_experts, expand, fp8_rows, in_bytes
from megalite.model.kinds.experts import ClampedGate, Experts, Router
from megalite.model.layers.experts import MixtureOfExperts

DTYPES = (torch.float16, torch.bfloat16) if CUDA else (torch.float16,)  # the interpreter multiplies bfloat16 wrongly
SHAPES = [(24, 64, 2), (40, 128, 4), (33, 192, 2), (20, 384, 1)] + ([(4096, 4096, 32), (512, 14336, 1)] if CUDA else [])


def drawn(kind: str, outputs: int, dim: int, groups: int):
    """Codes as kernels take them, scales, zeros, and the weight in float32."""
    torch.manual_seed(dim)
    scales = torch.rand(outputs, groups) / dim**0.5
    if kind == "fp8":
        numbers = (torch.randn(outputs, dim) * 50).to(torch.float8_e4m3fn)
        plain, values, zeros = numbers.view(torch.uint8), numbers.float(), None
    elif kind == "fp4":
        plain, zeros = torch.randint(0, 16, (outputs, dim)), None
        values = torch.tensor([*E2M1, *(-x for x in E2M1)])[plain] * 2
    else:
        most = 16 if kind == "int4" else 256
        plain = torch.randint(0, most, (outputs, dim))
        zeros = torch.randint(0, most + 1, (outputs, groups)).half()
        values = plain - zeros.float().repeat_interleave(dim // groups, 1)
    codes = in_bytes(plain.to(torch.uint8), bits_of(kind), dim // groups)
    weight = values * scales.repeat_interleave(dim // groups, 1)
    return [None if one is None else one.to(DEVICE) for one in (codes, scales, zeros, weight)]


@needs_triton
@pytest.mark.parametrize("kind", ["int4", "int8", "fp4", "fp8"])
@pytest.mark.parametrize(("outputs", "dim", "groups"), SHAPES)
def test_products_and_numbers(kind, outputs, dim, groups):
    codes, scales, zeros, weight = drawn(kind, outputs, dim, groups)
    numbers = expand(codes, scales, zeros, kind=kind, dtype=torch.float32)
    assert torch.allclose(numbers, weight, rtol=1e-6, atol=1e-7)
    for dtype in DTYPES:
        bias = torch.randn(outputs, device=DEVICE).to(dtype)
        for tokens in (1, 3, 17, 65):
            x = torch.randn(tokens, dim, device=DEVICE).to(dtype)
            want = x.double() @ weight.double().t() + bias.double()
            got = Coded(kind, dtype).multiplied(x, {"codes": codes, "scales": scales, "zeros": zeros}, bias)
            rounds_x = kind == "fp8" and tokens > 16 and dtype == torch.bfloat16 and groups == 1 and outputs % 16 == 0
            bound = 0.04 if rounds_x else 2 * torch.finfo(dtype).eps
            assert (got.double() - want).norm() <= bound * want.norm()


@needs_triton
@pytest.mark.parametrize("kind", ["int8", "fp4"])
def test_products_of_experts(kind):
    """Each row by the weight that it names; of none it becomes zero."""
    codes, scales, zeros, weight = drawn(kind, 5 * 24, 64, 2)
    codes, scales, weight = (one.unflatten(0, (5, 24)) for one in (codes, scales, weight))
    zeros = None if zeros is None else zeros.unflatten(0, (5, 24))
    expert = torch.tensor([3, -1, 0, 3], device=DEVICE)
    x, bias = torch.randn(4, 64, device=DEVICE).half(), torch.randn(5, 24, device=DEVICE).half()
    want = torch.einsum("tk,tnk->tn", x.float(), weight[expert]) + bias[expert]
    want[1] = 0
    for mine in (bias, None):
        got = codes_linear_of_experts(x, codes, scales, zeros, mine, expert, kind=kind)
        left = want if mine is not None else (want - bias[expert]) * (expert >= 0)[:, None]
        assert torch.allclose(got.float(), left, rtol=2e-3, atol=2e-3)


@needs_triton
def test_a_mixture_of_codes():
    """What experts make of few tokens by their codes, of other ranks' experts among them."""
    kind = Experts(
        num_experts=3,
        intermediate_size=32,
        router=Router(top_k=2, normalize=True),
        clamped=ClampedGate(alpha=1.7, limit=0.5),
        biases=True,
        stored="stacked",
    )
    experts = MixtureOfExperts(kind, 32, ParallelState(Layout())).to(DEVICE, torch.float16).requires_grad_(False)
    experts.first, experts.num_experts = 1, 5
    for name, outputs in (("up", 64), ("down", 32)):
        codes, scales, _, _ = drawn("fp4", 3 * outputs, 32, 1)
        experts.get_parameter(f"{name}_bias").normal_()
        experts._formats[name] = Coded("fp4", torch.float16)
        experts.register_parameter(f"{name}_codes", torch.nn.Parameter(codes, requires_grad=False))
        experts.register_parameter(f"{name}_scales", torch.nn.Parameter(scales, requires_grad=False))
    x = torch.randn(3, 32, device=DEVICE).half()
    weights, chosen = torch.rand(3, 5, device=DEVICE).half().topk(2, dim=-1)
    want = experts._one_by_one(x, weights, chosen)
    assert torch.allclose(experts._by_groups(x, weights, chosen), want, rtol=1e-2, atol=1e-2)


@needs_triton
def test_a_linear_of_codes():
    """Few rows and many, columns in an order of their own, gate."""
    codes, scales, zeros, weight = drawn("int4", 32, 64, 2)
    order = torch.randperm(64, device=DEVICE)
    stored = {"codes": codes, "scales": scales, "zeros": zeros, "order": order}
    format, whole = Coded("int4", torch.float16), weight[:, torch.argsort(order)].half()
    assert torch.equal(format.matrix(stored), whole)
    for tokens in (1, 5, 65, 257):
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


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("tokens", [17, 64, 130, 4097])
def test_fp8_in_blocks_of_many_rows(tokens):
    """Scales of blocks of 128 x 128, of two matrices that are stacked."""
    format = Elementwise(block=(128, 128), scale_name="scale")
    numbers = (torch.randn(384, 1024, device=DEVICE) * 50).to(torch.float8_e4m3fn)
    stored = {"weight": numbers, "scale": torch.rand(3, 8, device=DEVICE) + 0.1}
    kind, tensors = coded(format, stored, [256, 128], 1024)
    assert "blocks" in tensors
    x = torch.randn(tokens, 1024, device=DEVICE).bfloat16()
    got = Coded(kind, torch.bfloat16).multiplied(x, tensors, None)
    want = x.double() @ dequantize(format, stored, [256, 128], 1024).double().t()
    assert (got.double() - want).norm() <= 0.04 * want.norm()


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dim", [48, 4096, 14336])
def test_rows_in_fp8(dim):
    """A row of zeros and one that is not a number among them."""
    x = torch.randn(5, dim, device=DEVICE).bfloat16()
    x[1], x[3, 7] = 0, float("nan")
    words, scales = fp8_rows(x)
    codes = expand(words.view(torch.uint8), torch.ones(5, 1, device=DEVICE), None, kind="fp8", dtype=torch.float32)
    want, wanted_scales = to_fp8(x)
    if dim % 512 == 0:
        words_of_blocks, by_block = fp8_rows(x, 128)
        found = expand(words_of_blocks.view(torch.uint8), by_block.contiguous(), None, kind="fp8", dtype=torch.float32)
        assert (found - x.float())[:3].norm() <= 0.04 * x[:3].float().norm()
    good = [0, 1, 2, 4]
    assert torch.equal(scales[good], wanted_scales[good])
    assert (codes - want.float())[good].count_nonzero() <= 2  # quotients that a rounding error moves
    assert (words[3].view(torch.uint8) & 127 == 127).any()
