"""The assignment problem and its exact solvers, against all assignments enumerated and against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alflb_megatron.lab.theory import solvers
from alflb_megatron.lab.theory.problem import AssignmentProblem, random_problem, zero_sum


def enumerated(problem: AssignmentProblem) -> float:
    """The best value of the integer programme, by trying every assignment."""
    choices = list(itertools.combinations(range(problem.experts), problem.topk))
    best = -math.inf
    for picked in itertools.product(choices, repeat=problem.tokens):
        loads = [0] * problem.experts
        for chosen in picked:
            for k in chosen:
                loads[k] += 1
        if len(set(loads)) == 1:
            value = sum(float(problem.scores[i, k]) for i, chosen in enumerate(picked) for k in chosen)
            best = max(best, value)
    return best


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"), [(4, 2, 1), (6, 3, 1), (6, 3, 2), (4, 4, 1), (4, 4, 2), (6, 2, 1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_every_solver_finds_the_enumerated_optimum(tokens: int, experts: int, topk: int, seed: int) -> None:
    problem = random_problem(tokens, experts, topk, seed)
    best = enumerated(problem)
    assert solvers.minimum_cost_flow(problem).value == pytest.approx(best, abs=1e-12)
    assert solvers.linear_programme(problem).value == pytest.approx(best, abs=1e-9)
    assert solvers.integer_programme(problem)[1] == pytest.approx(best, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 9), st.data())
def test_the_flow_is_feasible_and_proves_itself(tokens: int, experts: int, data: st.DataObject) -> None:
    """Fractional mean loads, skew and exact ties included."""
    topk = data.draw(st.integers(1, experts))
    seed, coarse = data.draw(st.integers(0, 10_000)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    scores += 3 * torch.randn(experts, generator=generator, dtype=torch.float64)
    problem = AssignmentProblem(scores.round() if coarse else scores, topk)
    found = solvers.minimum_cost_flow(problem)
    _feasible(problem, found.assignment)
    assert abs(found.gap) < 1e-9
    assert found.value == pytest.approx(solvers.linear_programme(problem).value, abs=1e-7)


def _feasible(problem: AssignmentProblem, x: Tensor) -> None:
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    assert torch.allclose(x.sum(dim=1), torch.full((problem.tokens,), float(problem.topk), dtype=torch.float64))
    assert torch.allclose(x.sum(dim=0), torch.full((problem.experts,), problem.load, dtype=torch.float64))


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(600, 16, 3), (301, 12, 5)])
def test_the_solvers_agree_on_larger_problems(tokens: int, experts: int, topk: int) -> None:
    problem = random_problem(tokens, experts, topk, seed=5, preference=1.5)
    flow, programme = solvers.minimum_cost_flow(problem), solvers.linear_programme(problem)
    assert flow.value == pytest.approx(programme.value, abs=1e-7)
    assert problem.dual(programme.bias) == pytest.approx(flow.dual, abs=1e-7)
    assert flow.steps > 0  # something was left for the exact method to do
    assert problem.tied(flow.bias) <= experts - 1


def test_a_large_batch_is_solved_with_proof() -> None:
    problem = random_problem(16_384, 64, 6, seed=1)
    found = solvers.minimum_cost_flow(problem)
    _feasible(problem, found.assignment)
    assert abs(found.gap) <= 1e-9 * found.dual


def test_the_integer_programme_needs_whole_loads() -> None:
    problem = random_problem(5, 3, 1, seed=0)
    assert problem.units == 3
    with pytest.raises(solvers.SolverError):
        solvers.integer_programme(problem)
    _feasible(problem, solvers.minimum_cost_flow(problem).assignment)


def test_weak_duality_and_the_lagrangian() -> None:
    problem = random_problem(50, 6, 2, seed=2)
    found = solvers.minimum_cost_flow(problem)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p = torch.randn(6, generator=generator, dtype=torch.float64)
        assert problem.dual(p) >= found.value - 1e-9
        assert problem.lagrangian(problem.choice(p), p) == pytest.approx(problem.dual(p), abs=1e-10)
        assert problem.lagrangian(found.assignment, p) == pytest.approx(found.value, abs=1e-9)  # loads are met


def test_gradient_against_finite_differences() -> None:
    problem = random_problem(64, 5, 2, seed=3)
    p = zero_sum(torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    step = float(problem.gaps(p).min()) / 4
    assert step > 1e-8
    for k in range(5):
        e = torch.zeros(5, dtype=torch.float64)
        e[k] = step
        difference = (problem.dual(p + e) - problem.dual(p - e)) / (2 * step)
        assert difference == pytest.approx(float(problem.gradient(p)[k]), abs=1e-4)


def test_load_range_is_what_ties_allow() -> None:
    problem = AssignmentProblem(torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), 1)
    least, most = problem.load_range(torch.zeros(3, dtype=torch.float64))
    assert least.tolist() == [1, 0, 0] and most.tolist() == [3, 2, 1]
    assert problem.tied(torch.zeros(3, dtype=torch.float64)) == 2


@pytest.mark.parametrize(
    ("scores", "topk", "said"),
    [
        (torch.zeros(3), 1, "shape"),
        (torch.zeros(0, 3), 1, "shape"),
        (torch.tensor([[float("nan"), 0.0]]), 1, "finite"),
        (torch.zeros(2, 3), 4, "from 1 to the 3 experts"),
    ],
)
def test_what_is_no_problem_is_refused(scores: Tensor, topk: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AssignmentProblem(scores, topk)
