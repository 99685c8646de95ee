"""What can be said, with proof, of one layer's routing at one step, from a sample of its scores.

The dual of the sample at the bias the layer used, the exact optimum of the same sample with its proof, and the
curvature there: how far the bias is from the best one, in score per token, and which step sizes follow. Of several
steps, the regret of their biases against the best fixed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.lab.theory.curvature import Moduli, moduli, near_ties
from alflb_megatron.lab.theory.problem import AssignmentProblem
from alflb_megatron.lab.theory.solvers import minimum_cost_flow

SOLVED = 2048
"""Tokens that the optimum is searched for; the curvature is estimated from the whole sample."""

TIES = 64
"""Near ties an expert that the curvature is estimated from. The graph of N near ties is a random one: its smallest
eigenvalue comes out too low, and its largest too high, by a share of about 2 / sqrt(2 N / E)."""

LARGEST_SHARE = 0.3
"""Of the tokens, that may count as nearly tied; where that gives fewer than `TIES`, no curvature is said."""


@dataclass(frozen=True)
class Certificate:
    """Values are per token, in score units; step sizes in the unit of the rules: score per relative violation."""

    tokens: int
    """That the optimum was solved for."""
    maxvio: float
    """Of these, under the bias."""
    dual: float
    """D(p) / T at the bias."""
    optimum: float
    """min D / T, proved by an assignment of the same value."""
    gap: float
    """dual - optimum, never negative: what the bias loses against the best one for this sample, per token."""
    proof: float
    """Duality gap of the optimum itself, per token: rounding."""
    tied: int
    """Tokens tied at the optimum; at most E - 1 in generic scores (docs/theory.md, claim 3)."""
    distance: float
    """max |p - p*| over the experts, both zero-sum; p* need not be the only optimum."""
    sample: int
    """Tokens that the curvature was estimated from."""
    modulus: float | None
    """mu: smallest curvature of D / T on the zero-sum subspace at the bias, from near ties: up to a quarter too low by
    the estimate's own noise. None where the sample holds too few near ties; 0 where some experts do not compete."""
    largest: float | None
    """The largest curvature, up to a quarter too high."""
    harmonic_step: float | None
    """u of u / n that the logarithmic bound asks for at the least: K / (E mu). None where mu is 0 or not known."""
    largest_step: float | None
    """u from which on the proportional rule overshoots: 2 K / (E largest). None where that is not known."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(scores_TE: Tensor, topk: int, bias_E: Tensor) -> Certificate:
    """The certificate of a sample of T tokens: scores [T, E] before the bias, and the bias [E] they were routed with.

    The optimum is that of the first `SOLVED` tokens. ValueError for scores that are not finite, and where topk = E,
    which leaves nothing to choose.
    """
    sample, bias_E = AssignmentProblem(scores_TE, topk), bias_E.double()
    curved = _curvature(sample, bias_E)
    problem = AssignmentProblem(scores_TE[:SOLVED], topk)
    found = minimum_cost_flow(problem, bias_E)
    share, tokens, dual = topk / problem.experts, problem.tokens, problem.dual(bias_E)
    away_E = bias_E - bias_E.mean() - found.bias
    return Certificate(
        tokens=tokens,
        maxvio=float(metrics.max_vio(problem.gradient(bias_E) + problem.load)),
        dual=dual / tokens,
        optimum=found.value / tokens,
        gap=max(0.0, dual - found.dual) / tokens,
        proof=abs(found.gap) / tokens,
        tied=problem.tied(found.bias),
        distance=float(away_E.abs().max()),
        sample=sample.tokens,
        modulus=curved.smallest if curved else None,
        largest=curved.largest if curved else None,
        harmonic_step=share / curved.smallest if curved and curved.smallest > 0 else None,
        largest_step=2 * share / curved.largest if curved and curved.largest > 0 else None,
    )


@dataclass(frozen=True)
class HindsightRegret:
    """Regret of the biases p_1 .. p_N of N steps, in score per token and step, from a sample D_n of each step's dual.

    Han and Zhong 2025 bound N times it, for scores that are drawn alike at every step. In training they move, and a
    bias that follows them may do better than every fixed one.
    """

    steps: int
    """N."""
    tokens: int
    """Of all samples together."""
    regret: float
    """(1/N) sum_n D_n(p_n) - min_p (1/N) sum_n D_n(p), per token; below 0 where the biases beat every fixed one."""
    proof: float
    """Duality gap of the minimum, per token: rounding."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def regret_in_hindsight(samples: Sequence[tuple[Tensor, Tensor]], topk: int) -> HindsightRegret:
    """The regret of pairs (scores [T, E] before the bias, bias [E] they were routed with), one a step.

    Every step counts alike: of each the first tokens, as many as the smallest sample holds. ValueError for no samples
    and for scores that are not finite.
    """
    if not samples:
        raise ValueError("samples: none, must be one a step")
    each = min(len(scores_TE) for scores_TE, _ in samples)
    parts = [AssignmentProblem(scores_TE[:each], topk) for scores_TE, _ in samples]
    paid = sum(part.dual(bias_E.double()) for part, (_, bias_E) in zip(parts, samples, strict=True))
    pooled = AssignmentProblem(torch.cat([part.scores for part in parts]), topk)
    best = minimum_cost_flow(pooled, samples[-1][1].double())
    tokens = pooled.tokens
    return HindsightRegret(len(parts), tokens, (paid - best.dual) / tokens, abs(best.gap) / tokens)


def _curvature(sample: AssignmentProblem, bias_E: Tensor) -> Moduli | None:
    """None where the sample has too few near ties: small, or scores so coarse that they are tied exactly."""
    wanted = TIES * sample.experts / 2 / sample.tokens
    h_EE, near = near_ties(sample, bias_E, min(wanted, LARGEST_SHARE))
    counted = float(h_EE.sum()) * near * sample.tokens  # h sums to 2 N / (2 near T)
    return moduli(h_EE) if counted >= 0.99 * TIES * sample.experts / 2 else None
