"""What can be said, with proof, of one layer's routing at one step, from a sample of its scores.

The dual of the sample at the bias the layer used, the exact optimum of the same sample with its proof, and the
curvature there: how far the bias is from the best one, in score per token, and which step sizes follow.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.theory.curvature import moduli, near_ties
from alflb_megatron.theory.oracles import minimum_cost_flow
from alflb_megatron.theory.problem import AssignmentProblem

NEAR = 0.1
"""Share of the sample's tokens whose last place counts as nearly tied."""


@dataclass(frozen=True)
class Certificate:
    """Values are per token, in score units; step sizes in the unit of the rules: score per relative violation."""

    tokens: int
    maxvio: float
    """Of the sample, under the bias."""
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
    modulus: float
    """mu: smallest curvature of D / T on the zero-sum subspace at the bias, from near ties; 0 where the sample does not
    show that every expert competes with every other, if through others."""
    largest: float
    """The largest curvature."""
    harmonic_step: float | None
    """u of u / n that the logarithmic bound asks for at the least: K / (E mu). None where mu is 0."""
    largest_step: float | None
    """u from which on the proportional rule overshoots: 2 K / (E largest). None where no two experts compete."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(scores_TE: Tensor, topk: int, bias_E: Tensor) -> Certificate:
    """The certificate of a sample of T tokens: scores [T, E] before the bias, and the bias [E] they were routed with.

    ValueError for scores that are not finite, and where topk = E, which leaves nothing to choose.
    """
    problem = AssignmentProblem(scores_TE, topk)
    bias_E = bias_E.double()
    h_EE, _ = near_ties(problem, bias_E, NEAR)
    found = minimum_cost_flow(problem, bias_E)
    curved = moduli(h_EE)
    share, tokens = topk / problem.experts, problem.tokens
    away_E = bias_E - bias_E.mean() - found.bias
    # eigenvalues below rounding are zero: the graph of near ties falls apart
    smallest = curved.smallest if curved.smallest > 1e-9 * curved.largest else 0.0
    return Certificate(
        tokens=tokens,
        maxvio=float(metrics.max_vio(problem.gradient(bias_E) + problem.load)),
        dual=problem.dual(bias_E) / tokens,
        optimum=found.value / tokens,
        gap=max(0.0, problem.dual(bias_E) - found.dual) / tokens,
        proof=abs(found.gap) / tokens,
        tied=problem.tied(found.bias),
        distance=float(away_E.abs().max()),
        modulus=smallest,
        largest=curved.largest,
        harmonic_step=share / smallest if smallest > 0 else None,
        largest_step=2 * share / curved.largest if curved.largest > 0 and math.isfinite(curved.largest) else None,
    )
