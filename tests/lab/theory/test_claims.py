"""Each claim holds where it should, and its check fails on a planted violation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.lab.theory import claims, iteration, solvers
from alflb_megatron.lab.theory.claims.balance import ApproximateBalance
from alflb_megatron.lab.theory.claims.convexity import StrongConvexity
from alflb_megatron.lab.theory.claims.lagrangian import LagrangianChange, largest_step
from alflb_megatron.lab.theory.claims.preference import Preference
from alflb_megatron.lab.theory.claims.regret import Regret
from alflb_megatron.lab.theory.claims.structure import Structure
from alflb_megatron.lab.theory.claims.within_batch import WithinBatch
from alflb_megatron.lab.theory.curvature import IndependentScores, laplacian
from alflb_megatron.lab.theory.growth_fit import fit_growth
from alflb_megatron.lab.theory.iteration import Move, Step
from alflb_megatron.lab.theory.problem import AssignmentProblem, Optimum, random_problem
from alflb_megatron.lab.theory.score_stream import Stream, run_stream

SMALL = {
    "lagrangian": LagrangianChange(tokens=256, steps=150, seeds=2),
    "preference": Preference(tokens=256, steps=100, seeds=2),
    "balance": ApproximateBalance(
        shapes=((200, 8, 2),), instances=2, step_sizes=(1e-1, 1e-3), batches=(512,), steps=80
    ),
    "structure": Structure(tokens=128, instances=6),
    "convexity": StrongConvexity(directions=3, tails=(1.5,), seeds=1, samples=30_000),
    "regret": Regret(stream=Stream(seeds=6), steps=256),
    "within_batch": WithinBatch(batches=24),
}


def failing(finding: claims.Finding) -> list[str]:
    return [row.statement for row in finding.rows if row.verdict is claims.Verdict.FAILS]


def test_the_claims_are_registered_in_the_order_of_the_exposition() -> None:
    assert claims.names() == list(claims.ORDER) == list(SMALL)
    for name in claims.names():
        assert claims.get(name).__doc__ and claims.get(name).source and claims.get(name).title
        assert isinstance(claims.make(name, full=True), claims.get(name))


@pytest.mark.parametrize("name", list(SMALL))
def test_a_claim_holds_as_stated(name: str) -> None:
    seen: list[tuple[int, int]] = []
    finding = SMALL[name].check(lambda done, of: seen.append((done, of)))
    assert failing(finding) == [] and finding.sound
    assert len(finding.rows) >= 2 and finding.figures
    assert seen[-1][0] == seen[-1][1] and all(a[0] <= b[0] for a, b in itertools.pairwise(seen))


# -- planted violations --------------------------------------------------------------------------------------------


def _altered(**fields: float) -> iteration.Move:
    """An iteration that reports fields of its steps wrongly."""

    def iterate(problem: AssignmentProblem, move: Move, bias: Tensor, steps: int) -> Iterator[Step]:
        for step in iteration.iterate(problem, move, bias, steps):
            yield dataclasses.replace(step, **{name: getattr(step, name) + by for name, by in fields.items()})

    return iterate  # type: ignore[return-value]


def test_a_lagrangian_that_changes_otherwise_is_found() -> None:
    wrong = dataclasses.replace(SMALL["lagrangian"], iterate=_altered(gained=1e-4))
    assert "L(x', p') - L(x, p) = sum b - sum eps (A - L)^2" in failing(wrong.check())
    lost = dataclasses.replace(SMALL["lagrangian"], iterate=_altered(gained=-1.0))
    assert "no token loses by its switch under p': b >= 0" in failing(lost.check())


def _wrong_sign(problem: AssignmentProblem, move: Move, bias: Tensor, steps: int) -> Iterator[Step]:
    """Moves the bias with the load, not against it, and reports the move that should have been."""
    for step in iteration.iterate(problem, lambda gradient, n: -move(gradient, n), bias, steps):
        yield dataclasses.replace(step, move=-step.move)


def test_a_step_of_the_wrong_sign_is_found() -> None:
    found = failing(dataclasses.replace(SMALL["preference"], iterate=_wrong_sign).check())
    assert "a token that drops k for k' has dp_k' >= dp_k" in found
    assert "under the sign rule tokens leave overloaded experts for underloaded ones" in found
    assert failing(dataclasses.replace(SMALL["lagrangian"], iterate=_wrong_sign).check())


def test_a_step_too_large_is_told_from_one_that_is_not() -> None:
    verdicts = {}
    for step_size in (1e-5, 1.0):
        finding = LagrangianChange(tokens=256, steps=60, seeds=1, step_size=step_size).check()
        verdicts[step_size] = {row.statement: row.verdict for row in finding.rows}["every step lowers the Lagrangian"]
    assert verdicts == {1e-5: claims.Verdict.HOLDS, 1.0: claims.Verdict.CONDITIONAL}


def test_a_step_too_large_raises_the_lagrangian() -> None:
    problem = random_problem(256, 8, 2, seed=0)
    start = torch.zeros(8, dtype=torch.float64)
    direction = -torch.sign(problem.gradient(start))
    limit = largest_step(problem, start, direction)
    assert problem.dual(start + 0.99 * limit * direction) <= problem.dual(start)
    assert problem.dual(start + 1.01 * limit * direction) > problem.dual(start)
    assert largest_step(problem, start, -direction) == 0


def test_an_oracle_that_is_not_one_is_found() -> None:
    def near(problem: AssignmentProblem) -> Optimum:
        """Stops half way."""
        found = solvers.minimum_cost_flow(problem)
        bias = found.bias / 2
        return Optimum(found.assignment, bias, found.value, problem.dual(bias))

    found = failing(dataclasses.replace(SMALL["balance"], oracle=near).check())
    assert "the optimum is proved: D(p) = value of a feasible x" in found
    assert "max|A - L| <= E - 1 at the optimum" in found


def test_a_biased_gradient_is_found() -> None:
    def biased(problem: AssignmentProblem, bias: Tensor) -> Tensor:
        gradient = problem.gradient(bias)
        gradient[0] += 0.05 * problem.tokens
        return gradient

    found = failing(dataclasses.replace(SMALL["structure"], gradient=biased).check())
    assert "A - L is the gradient of D where no token is tied" in found
    assert "A - L is a subgradient everywhere: D(q) >= D(p) + (A - L)(q - p)" in found
    assert "|A - L|^2 <= K T^2 (1 - K/E)" in found


def test_a_wrong_hessian_is_found() -> None:
    def halved(model: IndependentScores, bias: Tensor) -> Tensor:
        return laplacian(model.weights(bias)) / 2

    found = failing(dataclasses.replace(SMALL["structure"], hessian=halved).check())
    assert found == ["the Hessian of the expected dual is the Laplacian of h"]


def test_regret_that_grows_faster_than_a_logarithm_is_found() -> None:
    """A constant step and u / sqrt n, passed off as u/n: each by itself, and through the whole check."""
    planted = {"constant": rules.make("proportional", step_size=0.3), "sqrt": rules.make("sqrt", step_size=0.75)}
    small = SMALL["regret"]
    assert isinstance(small, Regret)
    regret = run_stream(small.stream, planted, small.steps).regret
    for label, curves in regret.items():
        growth = fit_growth(curves)
        rows = [small._enough([label], {label: growth}), small._fits(growth, label)]
        assert [row.verdict for row in rows] == [claims.Verdict.FAILS] * 2, label
    found = failing(Regret(stream=Stream(seeds=4), steps=128, enough=planted).check())
    assert "with u >= 1/mu(p*) the regret of u/n grows no faster than log N" in found
    assert "a + b ln N fits it better than a + b sqrt N" in found


def test_a_bias_that_does_not_follow_the_rounds_as_the_filter_does_is_found() -> None:
    found = failing(dataclasses.replace(SMALL["within_batch"], gain=0.0).check())
    assert found[0].startswith("with M rounds between two moves of the comparator")
    assert "one that follows the rounds pays less than that" in found
    for gain in (0.3, 2.0):
        (found_,) = failing(dataclasses.replace(SMALL["within_batch"], gain=gain).check())
        assert found_ == found[0]


def test_too_few_samples_do_not_give_the_modulus() -> None:
    found = failing(dataclasses.replace(SMALL["convexity"], samples=60).check())
    assert found == ["near ties of a sample give mu"]
