"""Certificates of a sample: exact where the answer is known."""

from __future__ import annotations

import pytest
import torch

from alflb_megatron.lab.theory.certificate import certify, regret_in_hindsight
from alflb_megatron.lab.theory.claims.convexity import normal_experts
from alflb_megatron.lab.theory.curvature import moduli, near_ties
from alflb_megatron.lab.theory.problem import AssignmentProblem, random_problem
from alflb_megatron.lab.theory.solvers import minimum_cost_flow


def test_at_the_optimum_the_gap_is_zero_and_elsewhere_it_is_what_the_dual_says() -> None:
    problem = random_problem(512, 8, 2, seed=0)
    best = minimum_cost_flow(problem)
    at = certify(problem.scores, 2, best.bias)
    assert at.gap == pytest.approx(0, abs=1e-12) and at.proof < 1e-12 and at.tied <= 7
    off = certify(problem.scores, 2, torch.zeros(8))
    assert off.gap == pytest.approx((problem.dual(torch.zeros(8, dtype=torch.float64)) - best.dual) / 512)
    assert off.gap > 0 and off.maxvio > at.maxvio and off.distance > 0.01
    assert off.optimum == pytest.approx(at.optimum, abs=1e-12)


def test_the_step_sizes_are_those_of_the_curvature() -> None:
    model = normal_experts(6, 2)
    found = certify(model.sample(20_000, seed=0).scores, 2, torch.zeros(6))
    assert found.tokens == 2048 and found.sample == 20_000
    exact = moduli(model.weights(torch.zeros(6, dtype=torch.float64)))
    assert found.modulus == pytest.approx(exact.smallest, rel=0.35)
    assert found.largest == pytest.approx(exact.largest, rel=0.35)
    assert found.harmonic_step == pytest.approx(2 / 6 / found.modulus)
    assert found.largest_step == pytest.approx(2 * 2 / 6 / found.largest)


def test_many_experts_need_many_tokens() -> None:
    """mu of 64 equal experts from near ties of 200,000 tokens, of 16,384, and of too few to say."""
    model = normal_experts(64, 6)
    h, _ = near_ties(model.sample(200_000, seed=1), torch.zeros(64, dtype=torch.float64), share=0.1)
    found = certify(model.sample(16_384, seed=2).scores, 6, torch.zeros(64))
    assert found.modulus == pytest.approx(moduli(h).smallest, rel=0.4)
    few = certify(model.sample(2048, seed=3).scores, 6, torch.zeros(64))
    assert few.modulus is few.largest is few.harmonic_step is few.largest_step is None
    assert few.gap >= 0 and few.proof < 1e-12


def test_scores_that_are_all_alike_or_coarse_leave_no_curvature_that_is_not_there() -> None:
    alike = certify(torch.full((512, 8), 0.5), 2, torch.zeros(8))
    assert alike.modulus is None and alike.gap == 0
    fresh = torch.sigmoid(1e-3 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    coarse = certify(fresh, 2, torch.zeros(8))
    assert coarse.modulus is None or coarse.largest < 1e4


def test_experts_that_nobody_competes_for_leave_no_step_size() -> None:
    scores = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    scores[:, 2:] -= 100
    found = certify(scores, 1, torch.zeros(4))
    assert found.modulus == 0 and found.harmonic_step is None and found.largest_step is not None


def test_what_cannot_be_certified_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        certify(torch.full((4, 4), float("inf")), 1, torch.zeros(4))
    with pytest.raises(ValueError, match="topk = experts"):
        certify(torch.rand(4, 2), 2, torch.zeros(2))


def test_regret_is_against_the_best_fixed_bias_of_all_steps() -> None:
    """Three batches: nothing is lost by their common best bias, more than that is by every other fixed one."""
    parts = [random_problem(256, 8, 2, seed) for seed in range(3)]
    best = minimum_cost_flow(AssignmentProblem(torch.cat([part.scores for part in parts]), 2))
    none_lost = regret_in_hindsight([(part.scores, best.bias) for part in parts], 2)
    assert none_lost.regret == pytest.approx(0, abs=1e-12) and none_lost.proof < 1e-12
    assert (none_lost.steps, none_lost.tokens) == (3, 768)
    zero = torch.zeros(8, dtype=torch.float64)
    lost = regret_in_hindsight([(part.scores, zero) for part in parts], 2)
    assert lost.regret == pytest.approx((sum(part.dual(zero) for part in parts) - best.dual) / 768)
    assert lost.regret > 1e-4


def test_a_bias_that_follows_the_scores_beats_every_fixed_one() -> None:
    """Preferences that turn round half way: the best fixed bias is a compromise, so regret is below zero."""
    scores = random_problem(512, 8, 2, seed=1, preference=2.0).scores
    steps = [AssignmentProblem(scores, 2), AssignmentProblem(scores.flip(1), 2)]
    followed = regret_in_hindsight([(step.scores, minimum_cost_flow(step).bias) for step in steps], 2)
    assert followed.regret < -0.01


def test_every_step_counts_alike_and_no_steps_are_refused() -> None:
    long, short = random_problem(400, 8, 2, seed=2).scores, random_problem(100, 8, 2, seed=3).scores
    found = regret_in_hindsight([(long, torch.zeros(8)), (short, torch.zeros(8))], 2)
    assert (
        found == regret_in_hindsight([(long[:100], torch.zeros(8)), (short, torch.zeros(8))], 2) and found.tokens == 200
    )
    with pytest.raises(ValueError, match="samples"):
        regret_in_hindsight([], 2)
