"""Linear layers of few rows with norm, gate, bias and residual inside, against float64 and torch's own linear.

The kernels run compiled where there is a CUDA device and under Triton's interpreter where there is none.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_kernels import CUDA, DEVICE, equal_lines, needs_cuda, needs_triton, randn  # noqa: F401

from megalite.core.functional import ACTIVATIONS
from megalite.kernels.jit import launches_dependents
from megalite.kernels.thin import MAX_ROWS, Tile, thin_linear, tile_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def formula(x, weight, *, bias=None, norm=None, gated=None, residual=None, dtype=torch.float64):
    """The same by torch: in float64, or in the tensors' dtype with a rounding after every operation."""

    def cast(tensor):
        return None if tensor is None else tensor.to(dtype)

    x = cast(x)
    if norm is not None:
        norm_weight, eps, zero_centred = norm
        x = F.rms_norm(x, x.shape[-1:], cast(norm_weight) + zero_centred, eps)
    y = F.linear(x, cast(weight), cast(bias))
    if gated is not None:
        left, right = y.chunk(2, -1)
        y = ACTIVATIONS[gated](left) * right
    return y if residual is None else y + cast(residual)


def check(x, weight, *, tile=None, pdl=False, **given) -> torch.Tensor:
    """Into an output of NaN; at most as far from float64 as torch in the same dtype, but for chance."""
    exact = formula(x, weight, **given)
    out = torch.full(exact.shape, math.nan, dtype=x.dtype, device=DEVICE)
    got = thin_linear(x, weight, out=out, tile=tile, pdl=pdl, **given)
    assert got is out
    theirs = (formula(x, weight, dtype=x.dtype, **given).double() - exact).norm()
    rounding = exact.norm() * torch.finfo(x.dtype).eps
    assert (got.double() - exact).norm() <= 1.5 * theirs + 0.5 * rounding
    return got


def parts(rows: int, outputs: int, dim: int, dtype: torch.dtype, which: str) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """x, weight and options; x, the residual and the weight are views into larger tensors."""
    torch.manual_seed(rows * outputs + dim)
    pair = 2 if "gated" in which else 1
    x = randn(rows, dim + 3, dtype=dtype)[:, 3:]
    weight = randn(pair * outputs, dim + 8, dtype=dtype)[:, :dim] * dim**-0.5
    given = {}
    if "norm" in which:
        norm_weight = randn(dim, dtype=dtype) * 0.3
        given["norm"] = (norm_weight if "zero" in which else norm_weight + 1, 1e-5, "zero" in which)
    if "gated" in which:
        given["gated"] = "gelu" if "zero" in which else "silu"
    if "bias" in which:
        given["bias"] = randn(pair * outputs, dtype=dtype)
    if "residual" in which:
        given["residual"] = randn(rows, outputs + 5, dtype=dtype)[:, 5:]
    return x, weight, given


KINDS = [
    "plain",
    "bias residual",
    "norm",
    "norm zero bias",
    "norm gated",
    "norm zero gated bias",
    "gated residual",
]


# float32 is for one row only; Triton's interpreter multiplies bfloat16 tiles wrongly.
FEW = (torch.bfloat16, torch.float16) if CUDA else (torch.float16,)


@needs_triton
@pytest.mark.parametrize("rows, outputs, dim", [(1, 50, 200), (1, 64, 1536), (3, 37, 130), (5, 20, 72), (8, 64, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, rows, outputs, dim):
    for dtype in DTYPES if rows == 1 else FEW:
        x, weight, given = parts(rows, outputs, dim, dtype, kind)
        check(x, weight, **given)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS])
@pytest.mark.parametrize("outputs, dim", [(1, 1), (1, 40), (17, 1), (3, 65)])
def test_any_shape(rows, outputs, dim):
    x, weight, given = parts(rows, outputs, dim, torch.float16, "norm bias residual")
    check(x, weight, **given)


@needs_triton
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 2])
def test_activations(rows, activation):
    x, weight, _ = parts(rows, 24, 100, torch.float16, "gated")
    check(x, weight, gated=activation)


@needs_triton
@pytest.mark.parametrize("rows", [1, 4])
def test_the_residual_may_be_the_output(rows):
    x, weight, given = parts(rows, 40, 96, torch.float16, "bias residual")
    stream = given["residual"].clone()
    expected = thin_linear(x, weight, **given)
    assert thin_linear(x, weight, bias=given["bias"], residual=stream, out=stream) is stream
    assert torch.equal(stream, expected)


@needs_triton
@pytest.mark.parametrize("kind", ["norm", "residual", "norm gated bias"])
def test_a_row_does_not_depend_on_the_others_nor_on_how_many_they_are(kind, equal_lines):  # noqa: F811
    x, weight, given = parts(MAX_ROWS, 70, 600, FEW[0], kind)
    whole = check(x, weight, **given)
    for first, last in ((0, 2), (1, 8), (3, 7), (5, 8)):
        cut = {**given, **({"residual": given["residual"][first:last]} if "residual" in given else {})}
        other = x.clone()
        other[: first + 1] = math.nan  # the first row of the cut: not seen by the others
        got = thin_linear(other[first:last], weight, **cut)
        assert torch.equal(got[1:], whole[first + 1 : last])


@needs_triton
def test_large_float16_streams_do_not_overflow_under_a_norm():
    x, weight, given = parts(4, 16, 64, torch.float16, "norm")
    norm_weight = given["norm"][0] * 50
    assert check(x * 9000, weight, norm=(norm_weight, 1e-5, False)).isfinite().all()


@needs_triton
def test_no_rows():
    x, weight, given = parts(2, 16, 64, torch.float16, "norm")
    assert thin_linear(x[:0], weight, **given).shape == (0, 16)
    assert thin_linear(x, weight[:0], **given).shape == (2, 0)


def test_tiles_depend_on_the_number_of_rows_in_two_classes_only(monkeypatch):
    pytest.importorskip("triton")
    for dtype in DTYPES[1:]:
        x = torch.empty(0, dtype=dtype)
        for outputs, dim in ((1, 1), (1024, 2048), (6144, 1024), (151936, 1024), (14336, 4096), (4096, 14336)):
            for paired in (False, True):
                tiles = [tile_of(rows, outputs, dim, paired, x) for rows in range(1, MAX_ROWS + 1)]
                assert len(set(tiles[1:])) == 1
                for tile in tiles:
                    numbers = (tile.block_n, tile.block_k, tile.slices, tile.num_warps)
                    assert all(number & (number - 1) == 0 for number in numbers) and tile.block_k // tile.slices >= 16


@needs_cuda
@pytest.mark.parametrize(
    "rows, dtype", [(1, torch.float32), *((r, dtype) for r in (1, 2, 5, 8) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("outputs, dim", [(4096, 1024), (1024, 3072), (4096, 14336), (32003, 1000)])
def test_large_shapes_on_cuda(outputs, dim, rows, dtype):
    for kind in ("norm bias", "residual", "norm gated"):
        x, weight, given = parts(rows, outputs, dim, dtype, kind)
        got = check(x, weight, **given)
        assert torch.equal(thin_linear(x, weight, **given), got)
        if rows > 2:
            cut = {**given, **({"residual": given["residual"][1:]} if "residual" in given else {})}
            assert torch.equal(thin_linear(x[1:], weight, **cut), got[1:])


@needs_cuda
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_captured_chain_under_dependent_launch_gives_the_same_bits(rows):
    """Products that feed one another through the same buffers, replayed many times: an early read would show."""
    if not launches_dependents(torch.device(DEVICE, 0)):
        pytest.skip("needs compute capability 9.0")
    layers, hidden, inner = 8, 512, 1536
    ups = [randn(2 * inner, hidden, dtype=torch.bfloat16) * hidden**-0.5 for _ in range(layers)]
    downs = [randn(hidden, inner, dtype=torch.bfloat16) * inner**-0.5 for _ in range(layers)]
    norm = (torch.ones(hidden, dtype=torch.bfloat16, device=DEVICE), 1e-6, False)
    first = randn(rows, hidden, dtype=torch.bfloat16)
    stream, middle = torch.empty_like(first), torch.empty(rows, inner, dtype=torch.bfloat16, device=DEVICE)

    def chain(pdl):
        stream.copy_(first)
        for up, down in zip(ups, downs, strict=True):
            thin_linear(stream, up, norm=norm, gated="silu", out=middle, pdl=pdl)
            thin_linear(middle, down, residual=stream, out=stream, pdl=pdl)

    chain(False)
    expected = stream.clone()
    chain(True)
    assert torch.equal(stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(True)
    for _ in range(200):
        graph.replay()
        assert torch.equal(stream, expected)


@needs_cuda
@pytest.mark.parametrize("block_n, slices", [(16, 1), (16, 8), (64, 4)])
def test_other_tiles(block_n, slices):
    x, weight, given = parts(7, 500, 1000, torch.bfloat16, "norm bias")
    check(x, weight, tile=Tile(block_n, 64 * slices, slices, 4, 3, 0), **given)
