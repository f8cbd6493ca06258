"""Gradients that are written out, against autograd's of the plain expression, in float64."""

import pytest
import torch
import torch.nn.functional as F

from megalite.core.functional import ACTIVATIONS, gated, rms_norm, rotate


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def test_a_norm_of_rows_and_of_heads_in_a_slice():
    for x in (random(5, 8), random(5, 6, 8)[:, 1:4]):
        weight = random(8)
        assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight), atol=1e-5)
        with torch.no_grad():
            assert torch.equal(rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))


def test_a_norm_in_reduced_precision_sums_in_float32():
    x, weight, grad = random(64, 128, dtype=torch.bfloat16), random(128, dtype=torch.bfloat16), random(64, 128)
    rms_norm(x, weight, 1e-6).backward(grad.bfloat16())
    exact, scale = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    F.rms_norm(exact, (128,), scale, 1e-6).backward(grad.bfloat16().double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(weight.grad.double(), scale.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rotated", [8, 6])
def test_a_rotation_with_a_factor(rotated):
    angles = torch.rand(5, 1, rotated // 2, dtype=torch.float64) * 6
    assert torch.autograd.gradcheck(lambda x: rotate(x, 1.3 * angles.cos(), 1.3 * angles.sin()), (random(5, 3, 8),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gate(activation):
    assert torch.autograd.gradcheck(lambda hidden: gated(hidden, activation), (random(4, 10),))
    hidden = random(4, 10)
    with torch.no_grad():
        plain = gated(hidden, activation)
    assert torch.equal(gated(hidden, activation), plain)
