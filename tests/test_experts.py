"""The ways in which a rank's experts are given their tokens are one another's equals, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model.kinds.experts import ClampedGate, Experts, Router
from megalite.model.layers.experts import MixtureOfExperts

PLAIN = Experts(num_experts=3, intermediate_size=8, router=Router(top_k=2, normalize=True))
KINDS = {
    "plain": PLAIN,
    "clamped": replace(PLAIN, clamped=ClampedGate(alpha=1.7, limit=0.5), biases=True, stored="stacked_turned"),
    "weighed before": replace(PLAIN, router=replace(PLAIN.router, weighs_input=True), stored="stacked"),
}


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("of_others", [0, 3])
def test_all_ways_give_the_same(name, of_others):
    """`of_others`: experts on other ranks; expert 1 gets no token."""
    generator = torch.Generator().manual_seed(0)
    experts = MixtureOfExperts(KINDS[name], 16, ParallelState(Layout()))
    experts.first, experts.num_experts = of_others // 2, 3 + of_others
    for param in experts.parameters():
        param.data.normal_(0, 0.5, generator=generator)
    x = torch.randn(11, 16, generator=generator)
    drawn = torch.rand(11, experts.num_experts, generator=generator)
    drawn[:, experts.first + 1] = -1
    weights, chosen = drawn.topk(2, dim=-1)
    results = []
    for way in (experts._one_by_one, experts._by_groups, experts._everywhere):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        out = way(*given, chosen)
        out.square().sum().backward()
        gradients = [param.grad for param in experts.parameters() if param.grad is not None]
        results.append([out, *(one.grad for one in given), *gradients])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
