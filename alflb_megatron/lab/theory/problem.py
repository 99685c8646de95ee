"""The assignment problem of load balancing, and the dual that the expert bias descends.

T tokens, E experts, scores s [T, E]; every token takes K experts and every expert is to carry L = K T / E tokens:

    maximise  sum_ik s_ik x_ik    subject to  sum_k x_ik = K for every token,  sum_i x_ik = L for every expert,

x_ik in {0, 1} in the integer programme, 0 <= x_ik <= 1 in its relaxation (Han and Zhong 2025, arXiv 2512.03915). With
one multiplier p_k for each load, the *expert bias*, and loads A_k(x) = sum_i x_ik,

    Lagrangian  L(x, p) = sum_ik s_ik x_ik + sum_k p_k (A_k(x) - L)
    dual        D(p) = max_x L(x, p) = sum_i TopKSum(s_i + p) - L sum_k p_k.

The maximising x gives each token the K experts of its largest s + p: routing with a bias. D is convex and piecewise
linear, A - L is a subgradient of it, D(p + c 1) = D(p), and min_p D(p) is the value of the relaxation. The constraint
matrix is totally unimodular, so where E divides K T the relaxation has an integer optimum; where it does not, the
integer programme has no solution and the relaxation is the problem.

Everything here is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AssignmentProblem:
    """Scores float64 [T, E] and K. ValueError unless the scores are finite and 1 <= K <= E."""

    scores: Tensor
    topk: int

    def __post_init__(self) -> None:
        if self.scores.dim() != 2 or not self.scores.numel():
            raise ValueError(f"scores: shape {tuple(self.scores.shape)}, must be [tokens, experts], neither 0")
        if not self.scores.isfinite().all():
            raise ValueError("scores: must be finite")
        if not 1 <= self.topk <= self.scores.shape[1]:
            raise ValueError(f"topk: {self.topk}, must be from 1 to the {self.scores.shape[1]} experts")
        object.__setattr__(self, "scores", self.scores.double())

    @property
    def tokens(self) -> int:
        return self.scores.shape[0]

    @property
    def experts(self) -> int:
        return self.scores.shape[1]

    @property
    def load(self) -> float:
        """L."""
        return self.topk * self.tokens / self.experts

    @property
    def units(self) -> int:
        """The smallest m for which m L is whole: the relaxation has an optimum in multiples of 1 / m."""
        return self.experts // math.gcd(self.topk * self.tokens, self.experts)

    # -- primal ----------------------------------------------------------------------------------------------------

    def choose(self, bias_E: Tensor) -> Tensor:
        """The primal step: int64 [T, K], each token's K largest s + p."""
        return (self.scores + bias_E).topk(self.topk, dim=1).indices

    def choice(self, bias_E: Tensor) -> Tensor:
        """The same as x, float64 [T, E] of zeros and ones."""
        return torch.zeros_like(self.scores).scatter_(1, self.choose(bias_E), 1.0)

    def value(self, x_TE: Tensor) -> float:
        """sum s x."""
        return float((self.scores * x_TE).sum())

    # -- dual ------------------------------------------------------------------------------------------------------

    def lagrangian(self, x_TE: Tensor, bias_E: Tensor) -> float:
        """L(x, p), for any x."""
        return self.value(x_TE) + float(bias_E @ (x_TE.sum(dim=0) - self.load))

    def dual(self, bias_E: Tensor) -> float:
        """D(p)."""
        top_TK = (self.scores + bias_E).topk(self.topk, dim=1).values
        return float(top_TK.sum() - self.load * bias_E.sum())

    def gradient(self, bias_E: Tensor) -> Tensor:
        """A - L, float64 [E]: the subgradient of D that the router's own choice gives."""
        tokens_per_expert = torch.bincount(self.choose(bias_E).reshape(-1), minlength=self.experts)
        return tokens_per_expert.double() - self.load

    # -- ties ------------------------------------------------------------------------------------------------------

    def gaps(self, bias_E: Tensor) -> Tensor:
        """How far each token's K-th largest s + p lies above its next, float64 [T]; infinite where K = E."""
        if self.topk == self.experts:
            return torch.full((self.tokens,), math.inf, dtype=torch.float64)
        top_TJ = (self.scores + bias_E).topk(self.topk + 1, dim=1).values
        return top_TJ[:, -2] - top_TJ[:, -1]

    def tied(self, bias_E: Tensor, tolerance: float = 1e-9) -> int:
        """How many tokens could take another K experts at no loss: gap at most `tolerance`, relative to the scores."""
        return int((self.gaps(bias_E) <= tolerance * self._size(bias_E)).sum())

    def _size(self, bias_E: Tensor) -> float:
        return max(1.0, float((self.scores + bias_E).abs().max()))

    def load_range(self, bias_E: Tensor, tolerance: float = 1e-9) -> tuple[Tensor, Tensor]:
        """The least and the most load of each expert under any way of breaking the ties, int64 [E] each."""
        ranked_TE, tolerance = self.scores + bias_E, tolerance * self._size(bias_E)
        top_TJ = ranked_TE.topk(min(self.topk + 1, self.experts), dim=1).values
        last_T1, next_T1 = top_TJ[:, self.topk - 1 : self.topk], top_TJ[:, -1:]
        possible_TE = ranked_TE >= last_T1 - tolerance
        certain_TE = ranked_TE > next_T1 + tolerance if self.topk < self.experts else possible_TE
        return certain_TE.sum(dim=0), possible_TE.sum(dim=0)


def random_problem(tokens: int, experts: int, topk: int, seed: int, preference: float = 0.5) -> AssignmentProblem:
    """Sigmoid scores of experts that are not equally liked: logits normal(0, 1) plus normal(0, preference^2) each."""
    generator = torch.Generator().manual_seed(seed)
    liked_E = preference * torch.randn(experts, generator=generator, dtype=torch.float64)
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64) + liked_E
    return AssignmentProblem(torch.sigmoid(logits_TE), topk)


def zero_sum(bias_E: Tensor) -> Tensor:
    """The projection of p [..., E] on {sum p = 0}, where the dual's minimum can be unique: D(p + c 1) = D(p)."""
    return bias_E - bias_E.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Optimum:
    """A solution of the relaxation with its proof: a feasible x and a p, whose values differ by the `gap`.

    value: sum s x; dual: D(p). D(p) >= sum s x holds for every pair (weak duality), so no x is better by more.
    """

    assignment: Tensor  # float64 [T, E]
    bias: Tensor  # float64 [E], zero-sum
    value: float
    dual: float
    steps: int = 0
    """What the method counts: augmenting paths, or iterations of the solver."""

    @property
    def gap(self) -> float:
        """D(p) - sum s x: 0 at an optimum but for rounding."""
        return self.dual - self.value
