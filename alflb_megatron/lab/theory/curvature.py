"""The curvature of the expected dual: a weighted graph Laplacian over the experts.

Per token, with scores drawn at random, d(p) = E[TopKSum(s + p)] - (K / E) sum p. Its gradient is P[k chosen] - K / E,
and moving p_k - p_l moves tokens between k and l alone: those for which k and l are K-th and (K+1)-th. So

    v' H v = sum_{k<l} h_kl (v_k - v_l)^2,    h_kl = density at a tie of k and l for the last place,

H = diag(sum_l h_kl) - h. On {sum v = 0} the smallest eigenvalue of H is the modulus of strong convexity, mu; as
sum_{k<l} (v_k - v_l)^2 = E |v|^2 there, mu >= E min h_kl, and a single weak pair does not make mu small: the graph has
to fall apart. All of it is in units of one token; a batch's dual is T times as curved.

For independent scores with densities f_k and distribution functions F_k:

    h_kl = integral f_k(z - p_k) f_l(z - p_l) P[exactly K - 1 of the other E - 2 experts lie above z] dz.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from scipy.integrate import trapezoid
from torch import Tensor

from alflb_megatron.lab.theory.problem import AssignmentProblem, zero_sum

Array = NDArray[np.float64]

ROUNDING = 1e-12
"""Eigenvalues below so much of the largest are rounding errors."""

NODES = 2001
"""Of the quadrature, at the least: the trapezoid rule, at its best for smooth integrands that vanish at both ends."""


class Distribution(Protocol):
    """One expert's score, as SciPy's frozen distributions describe it."""

    def pdf(self, x: Array) -> Array: ...
    def cdf(self, x: Array) -> Array: ...
    def ppf(self, q: Array | float) -> Array: ...


@dataclass(frozen=True)
class IndependentScores:
    """Experts whose scores are drawn independently of one another: the setting in which everything is computable."""

    experts: Sequence[Distribution]
    topk: int
    nodes: int = NODES
    tail: float = 1e-10  # probability left out at each end

    def _grid(self, bias_E: Tensor) -> tuple[Array, Array, Array]:
        """Nodes z [Z]; densities f_k(z - p_k) and probabilities of lying above z, both [E, Z]."""
        p = bias_E.double().numpy()
        low = min(float(d.ppf(self.tail)) + b for d, b in zip(self.experts, p, strict=True))
        high = max(float(d.ppf(1 - self.tail)) + b for d, b in zip(self.experts, p, strict=True))
        narrowest = min(float(d.ppf(0.75)) - float(d.ppf(0.25)) for d in self.experts)
        z = np.linspace(low, high, max(self.nodes, math.ceil(20 * (high - low) / narrowest)))
        density = np.stack([d.pdf(z - b) for d, b in zip(self.experts, p, strict=True)])
        above = np.stack([1 - d.cdf(z - b) for d, b in zip(self.experts, p, strict=True)])
        return z, density, above

    def shares(self, bias_E: Tensor) -> Tensor:
        """P[expert k is among a token's K largest], float64 [E]: A_k / T in expectation."""
        z, density, above = self._grid(bias_E)
        shares = []
        for k in range(len(self.experts)):
            others = np.delete(above, k, axis=0)
            at_most = counts_above(others)[: self.topk].sum(axis=0)  # fewer than K of the others above z
            shares.append(trapezoid(density[k] * at_most, z))
        return torch.from_numpy(np.array(shares))

    def weights(self, bias_E: Tensor) -> Tensor:
        """h, float64 [E, E], symmetric with a zero diagonal."""
        z, density, above = self._grid(bias_E)
        experts = len(self.experts)
        h = np.zeros((experts, experts))
        if self.topk == experts:
            return torch.from_numpy(h)
        for k in range(experts):
            for other in range(k + 1, experts):
                others = np.delete(above, (k, other), axis=0)
                exactly = counts_above(others)[self.topk - 1]
                h[k, other] = h[other, k] = trapezoid(density[k] * density[other] * exactly, z)
        return torch.from_numpy(h)

    def optimum(self, bias_E: Tensor | None = None, tolerance: float = 1e-12) -> Tensor:
        """The minimiser of the expected dual, float64 [E], zero-sum, by Powell's hybrid method on shares = K / E.

        ArithmeticError where it does not get there.
        """
        experts = len(self.experts)
        start_E = torch.zeros(experts, dtype=torch.float64) if bias_E is None else zero_sum(bias_E.double())

        def gradient(bias_E: Array) -> Array:
            p = torch.from_numpy(bias_E)
            return (self.shares(zero_sum(p)) - self.topk / experts + p.mean()).numpy()

        def curvature(bias_E: Array) -> Array:
            # adding 1 1' makes H invertible and leaves it what it is on the zero-sum subspace
            return (laplacian(self.weights(zero_sum(torch.from_numpy(bias_E)))) + 1 / experts).numpy()

        found = optimize.root(gradient, start_E.numpy(), jac=curvature, method="hybr", tol=tolerance)
        if (left := float(np.abs(found.fun).max())) > 1e-6:
            raise ArithmeticError(f"no balance found: a share is {left:.1e} off")
        return zero_sum(torch.from_numpy(found.x))

    def sample(self, tokens: int, seed: int) -> AssignmentProblem:
        """T tokens' scores by inversion, seeded."""
        uniform = np.random.default_rng(seed).random((len(self.experts), tokens))
        columns = [d.ppf(u) for d, u in zip(self.experts, uniform, strict=True)]
        return AssignmentProblem(torch.from_numpy(np.stack(columns, axis=1)), self.topk)


def counts_above(above_EZ: Array) -> Array:
    """P[exactly j of the experts lie above z], [E + 1, Z], from each one's probability [E, Z]: a Poisson binomial."""
    experts, nodes = above_EZ.shape
    exactly = np.zeros((experts + 1, nodes))
    exactly[0] = 1.0
    for k, q in enumerate(above_EZ):
        exactly[1 : k + 2] = exactly[1 : k + 2] * (1 - q) + exactly[: k + 1] * q
        exactly[0] *= 1 - q
    return exactly


# -- from samples ------------------------------------------------------------------------------------------------------


def near_ties(problem: AssignmentProblem, bias_E: Tensor, share: float = 0.1) -> tuple[Tensor, float]:
    """h estimated from the tokens whose last place is nearly tied, float64 [E, E], and the gap that counts as near.

    The `share` of tokens with the smallest gap between K-th and (K+1)-th are taken; each says that its two experts
    compete. With gap d: h_kl = (tokens whose pair is k, l in either order) / (2 d T), the density of s_k + p_k - s_l -
    p_l at zero averaged over [-d, d]. No distribution is assumed, and scores may depend on one another. The average is
    a little below the density at zero, the more so the larger the share. Exact ties (a coarse dtype, equal scores) say
    nothing about a density and are left out; h is zero where nothing is left. ValueError where K = E.
    """
    experts = problem.experts
    if problem.topk == experts:
        raise ValueError("with topk = experts there is no choice, and no curvature")
    top_TJ, index_TJ = (problem.scores + bias_E).topk(problem.topk + 1, dim=1)
    gaps_T = top_TJ[:, -2] - top_TJ[:, -1]
    h = torch.zeros(experts, experts, dtype=torch.float64)
    open_T = gaps_T > 1e-12 * top_TJ.abs().max().clamp(min=1e-30)
    wanted = min(int(open_T.sum()), max(1, round(share * problem.tokens)))
    if wanted == 0:
        return h, 0.0
    near = float(gaps_T[open_T].kthvalue(wanted).values)
    pairs_2N = index_TJ[open_T & (gaps_T <= near), -2:].t()
    h.index_put_((pairs_2N[0], pairs_2N[1]), torch.ones((), dtype=torch.float64), accumulate=True)
    return (h + h.t()) / (2 * near * problem.tokens), near


# -- the matrix --------------------------------------------------------------------------------------------------------


def laplacian(weights_EE: Tensor) -> Tensor:
    """H = diag(sum_l h_kl) - h."""
    return torch.diag(weights_EE.sum(dim=1)) - weights_EE


@dataclass(frozen=True)
class Moduli:
    """What the curvature allows: all in units of one token's dual."""

    smallest: float
    """mu: the smallest eigenvalue of H on {sum v = 0}; D / T is mu-strongly convex there. 0 below `ROUNDING`."""
    largest: float
    """The largest: a gradient step on D / T beyond 2 / largest makes it rise."""
    bound: float
    """E min h_kl, never above `smallest`."""


def moduli(weights_EE: Tensor) -> Moduli:
    """The extreme eigenvalues of the Laplacian on the zero-sum subspace, and the bound E min h_kl."""
    experts = weights_EE.shape[0]
    values = torch.linalg.eigvalsh(laplacian(weights_EE))  # ascending; the first is that of (1, .., 1), zero
    off = weights_EE[~torch.eye(experts, dtype=torch.bool)]
    smallest, largest = float(values[1]), float(values[-1])
    return Moduli(smallest if smallest > ROUNDING * largest else 0.0, largest, experts * float(off.min()))
