"""Shares, weights and moduli against simulation, finite differences and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from alflb_megatron.lab.theory.claims.convexity import moduli_around, modulus_within, normal_experts
from alflb_megatron.lab.theory.claims.structure import mixed_experts
from alflb_megatron.lab.theory.curvature import IndependentScores, counts_above, laplacian, moduli, near_ties
from alflb_megatron.lab.theory.problem import zero_sum


def test_two_normal_experts_have_the_density_of_their_difference() -> None:
    """h_12 is the density of s_1 - s_2 = normal(0, 2) at p_2 - p_1; the modulus of two experts is 2 h."""
    p = torch.tensor([0.4, -0.4], dtype=torch.float64)
    model = normal_experts(2, 1)
    expected = stats.norm(scale=math.sqrt(2)).pdf(0.8)
    assert float(model.weights(p)[0, 1]) == pytest.approx(expected, rel=1e-8)
    assert moduli(model.weights(p)).smallest == pytest.approx(2 * expected, rel=1e-8)
    assert model.shares(p)[0] == pytest.approx(stats.norm(scale=math.sqrt(2)).cdf(0.8), rel=1e-8)


def test_hessian_against_finite_differences_of_the_gradient() -> None:
    model = mixed_experts(6, 2)
    p = zero_sum(0.2 * torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    hessian, step = laplacian(model.weights(p)), 1e-4
    for k in range(6):
        e = torch.zeros(6, dtype=torch.float64)
        e[k] = step
        column = (model.shares(p + e) - model.shares(p - e)) / (2 * step)
        assert torch.allclose(column, hessian[:, k], atol=1e-6)


def test_shares_are_those_of_a_sample() -> None:
    model = mixed_experts(5, 2)
    p = torch.tensor([0.1, -0.2, 0.3, 0.0, -0.2], dtype=torch.float64)
    problem = model.sample(200_000, seed=0)
    measured = torch.bincount(problem.choose(p).reshape(-1), minlength=5) / problem.tokens
    assert torch.allclose(measured.double(), model.shares(p), atol=5e-3)
    assert float(model.shares(p).sum()) == pytest.approx(2, abs=1e-5)


def test_weights_from_near_ties() -> None:
    model = normal_experts(5, 2, [0.3, 0.1, 0.0, -0.1, -0.3])
    p = torch.tensor([0.2, 0.0, -0.1, 0.1, -0.2], dtype=torch.float64)
    measured, near = near_ties(model.sample(300_000, seed=1), p, share=0.03)
    assert 0 < near < 0.1
    assert torch.allclose(measured, model.weights(p), atol=0.02)
    with pytest.raises(ValueError, match="topk = experts"):
        near_ties(normal_experts(3, 3).sample(10, 0), torch.zeros(3, dtype=torch.float64))


def test_counts_above_is_a_poisson_binomial() -> None:
    above = np.array([[0.2], [0.5], [0.9]])
    assert counts_above(above)[:, 0] == pytest.approx(
        [0.8 * 0.5 * 0.1, 0.2 * 0.5 * 0.1 + 0.8 * 0.5 * 0.1 + 0.8 * 0.5 * 0.9,
         0.2 * 0.5 * 0.1 + 0.2 * 0.5 * 0.9 + 0.8 * 0.5 * 0.9, 0.2 * 0.5 * 0.9]
    )  # fmt: skip


def test_the_optimum_balances_and_cancels_means() -> None:
    means = [0.9, -0.4, 0.2, -0.7]
    model = normal_experts(4, 1, means)
    best = model.optimum()
    assert torch.allclose(model.shares(best), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(best, -torch.tensor(means, dtype=torch.float64), atol=1e-6)
    uneven = IndependentScores([stats.norm(), stats.norm(scale=3), stats.logistic(loc=1)], 1)
    assert torch.allclose(uneven.shares(uneven.optimum()), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-9)


def test_a_graph_that_falls_apart_has_modulus_zero() -> None:
    h = torch.zeros(4, 4, dtype=torch.float64)
    h[0, 1] = h[1, 0] = h[2, 3] = h[3, 2] = 1.0
    found = moduli(h)
    assert found.smallest == pytest.approx(0, abs=1e-12) and found.largest == pytest.approx(2)
    assert found.bound == 0


def test_the_modulus_falls_with_the_radius() -> None:
    model = normal_experts(4, 1)
    assert modulus_within(model, 1.0, 4) < modulus_within(model, 0.5, 4) < moduli_around(model, 0.0, 4)[0].smallest
