"""What the dual's gradient and Hessian are: invariance, boundedness, a graph Laplacian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import stats
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, holds_if, register
from alflb_megatron.lab.theory.curvature import IndependentScores, laplacian
from alflb_megatron.lab.theory.problem import AssignmentProblem, random_problem, zero_sum
from alflb_megatron.margins import BINS
from alflb_megatron.rules import Rule, Stats


def mixed_experts(experts: int, topk: int) -> IndependentScores:
    """Experts whose scores differ in shape, mean and width: normal, logistic, Gumbel and Student's t, in turn."""
    kinds = (stats.norm, stats.logistic, stats.gumbel_r, lambda **place: stats.t(5, **place))
    return IndependentScores(
        [kinds[k % 4](loc=0.3 * (k % 5) - 0.6, scale=0.6 + 0.1 * (k % 3)) for k in range(experts)],
        topk,
        nodes=20_001,
        tail=1e-7,
    )


def _hessian(model: IndependentScores, bias_E: Tensor) -> Tensor:
    return laplacian(model.weights(bias_E))


@register
@dataclass(frozen=True)
class Structure(Claim):
    """D(p + c 1) = D(p); A - L is a subgradient with |A - L|^2 <= K T^2 (1 - K/E); the expected Hessian is a Laplacian.

    The bound: sum_k A_k = K T and A_k <= T give sum A^2 <= K T^2, and |A - L|^2 = sum A^2 - K^2 T^2 / E. It is attained
    when every token takes the same K experts.
    """

    name: ClassVar[str] = "structure"
    title: ClassVar[str] = "Invariance, bounded gradient, Hessian"
    source: ClassVar[str] = "the zero-sum subspace: Han and Zhong 2025; the bound and the formula of the Hessian: ours"

    tokens: int = 512
    experts: int = 12
    topk: int = 3
    instances: int = 20
    gradient: Callable[[AssignmentProblem, Tensor], Tensor] = AssignmentProblem.gradient
    hessian: Callable[[IndependentScores, Tensor], Tensor] = _hessian

    @classmethod
    def full(cls) -> Claim:
        return cls(tokens=4096, experts=64, topk=6, instances=50)

    def check(self, progress: Progress | None = None) -> Finding:
        generator = torch.Generator().manual_seed(1)
        invariance, slope, subgradient, largest = 0.0, 0.0, 0.0, 0.0
        most = self.topk * self.tokens**2 * (1 - self.topk / self.experts)
        for seed in range(self.instances):
            problem = random_problem(self.tokens, self.experts, self.topk, seed, preference=float(seed % 5))
            p = zero_sum(torch.randn(self.experts, generator=generator, dtype=torch.float64))
            scale = max(1.0, abs(problem.dual(p)))
            invariance = max(invariance, abs(problem.dual(p + 3.7) - problem.dual(p)) / scale)
            g = self.gradient(problem, p)
            slope = max(slope, abs(float(g.sum())) / problem.tokens)
            # a subgradient lies below: D(q) >= D(p) + g (q - p)
            for distance in (1.0, 0.1, 0.01, 0.001):
                away = distance * torch.randn(self.experts, generator=generator, dtype=torch.float64)
                over = problem.dual(p) + float(g @ away) - problem.dual(p + away)
                subgradient = max(subgradient, over / scale)
            largest = max(largest, float(g @ g) / most)
            # in float64 D is linear between kinds of routing: a small step along a random direction gives g exactly
            v = torch.randn(self.experts, generator=generator, dtype=torch.float64)
            gap = float(problem.gaps(p).min())
            step = gap / (4 * float(v.abs().max()))
            if step > 1e-7:  # below, rounding of D is what the difference shows
                finite = (problem.dual(p + step * v) - problem.dual(p - step * v)) / (2 * step)
                slope = max(slope, abs(finite - float(g @ v)) / problem.tokens)
            if progress is not None:
                progress(seed + 1, self.instances)
        same = torch.zeros(self.tokens, self.experts, dtype=torch.float64)
        same[:, : self.topk] = 1.0
        collapsed = AssignmentProblem(same, self.topk)
        g = self.gradient(collapsed, torch.zeros(self.experts, dtype=torch.float64))
        attained = float(g @ g) / most
        hessian = self._hessian_error(generator)
        drift = {name: self._drift(rules.make(name)) for name in rules.names()}
        kept = [name for name in drift if drift[name] <= 1e-6]
        return Finding(
            [
                Row(
                    "D(p + c 1) = D(p)",
                    f"{self.instances} instances, c = 3.7",
                    f"{invariance:.1e} of D",
                    "1e-12",
                    holds_if(invariance <= 1e-12),
                ),
                Row(
                    "A - L is the gradient of D where no token is tied",
                    "against central differences; sums to 0",
                    f"{slope:.1e} of T",
                    "1e-6",
                    holds_if(slope <= 1e-6),
                ),
                Row(
                    "A - L is a subgradient everywhere: D(q) >= D(p) + (A - L)(q - p)",
                    "random p; q from 0.001 to 1 away",
                    f"violated by {max(0.0, subgradient):.1e} of D",
                    "1e-12",
                    holds_if(subgradient <= 1e-12),
                ),
                Row(
                    "|A - L|^2 <= K T^2 (1 - K/E)",
                    f"{self.instances} instances, and all tokens alike",
                    f"largest {largest:.3f} of it, {attained:.3f} when collapsed",
                    "1",
                    holds_if(largest <= 1 + 1e-12 and abs(attained - 1) < 1e-12),
                ),
                Row(
                    "the Hessian of the expected dual is the Laplacian of h",
                    "8 experts of four kinds; against central differences of P[chosen]",
                    f"{hessian:.1e} of the largest entry",
                    "1e-5",
                    holds_if(hessian <= 1e-5),
                ),
                Row(
                    "a rule's own update keeps sum p",
                    "random loads; the balancer centres the others after each update",
                    "kept by " + ", ".join(kept),
                    "proportional, sqrt, harmonic",
                    holds_if({"proportional", "sqrt", "harmonic"} <= set(kept)),
                ),
            ],
            {"drift_of_the_sum": drift},
        )

    def _hessian_error(self, generator: torch.Generator) -> float:
        model = mixed_experts(8, 3)
        p = zero_sum(0.3 * torch.randn(8, generator=generator, dtype=torch.float64))
        exact, step = self.hessian(model, p), 1e-4
        columns = []
        for k in range(8):
            e = torch.zeros(8, dtype=torch.float64)
            e[k] = step
            columns.append((model.shares(p + e) - model.shares(p - e)) / (2 * step))
        return float((torch.stack(columns, dim=1) - exact).abs().max() / exact.abs().max())

    def _drift(self, rule: Rule) -> float:
        """|sum of the move| / sum of |move| of one update from zero."""
        generator = torch.Generator().manual_seed(2)
        loads = torch.randint(0, 1000, (1, self.experts), generator=generator)
        histogram = None
        if rule.threshold is not None:
            histogram = torch.randint(0, 50, (1, self.experts, BINS), generator=generator, dtype=torch.int32)
        stats_ = Stats(loads, torch.ones(1, dtype=torch.int64), histogram)
        bias, _ = rule.step(torch.zeros(1, self.experts), stats_, rule.init(1, self.experts))
        return float(bias.sum().abs() / bias.abs().sum().clamp(min=1e-30))
