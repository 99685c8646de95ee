"""The change of the Lagrangian in one step, and when a step improves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alflb_megatron.lab.theory import curvature, iteration
from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, Verdict, holds_if, register
from alflb_megatron.lab.theory.iteration import Iterate
from alflb_megatron.lab.theory.problem import AssignmentProblem, random_problem


def largest_step(problem: AssignmentProblem, bias_E: Tensor, direction_E: Tensor, relative: float = 1e-6) -> float:
    """The largest t for which D(p + t direction) <= D(p), by bisection: D is convex, so every smaller step improves.

    0 where the direction does not descend.
    """
    start = problem.dual(bias_E)

    def rises(t: float) -> bool:
        return problem.dual(bias_E + t * direction_E) > start

    high = 1e-9
    while not rises(high):
        high *= 2
        if high > 1e9:
            return high
    low = 0.0
    while high - low > relative * high:
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
        if high < 1e-12:
            return 0.0
    return low


def step_allowed_by_curvature(problem: AssignmentProblem, bias_E: Tensor, share: float = 0.1) -> float:
    """The quadratic model's answer for the sign step: u = 2 sum|A - L| / (T v' H v), v = sign(L - A).

    D(p + u v) - D(p) = -u sum|A - L| + u^2 / 2 T v' H v to second order; H from near ties (`curvature.near_ties`).
    """
    gradient_E = problem.gradient(bias_E)
    v = -torch.sign(gradient_E)
    h, _ = curvature.near_ties(problem, bias_E, share)
    curved = problem.tokens * float(v @ curvature.laplacian(h) @ v)
    return 2 * float(gradient_E.abs().sum()) / curved if curved > 0 else float("inf")


@register
@dataclass(frozen=True)
class LagrangianChange(Claim):
    """L(x', p') - L(x, p) = sum_i b_i - sum_k eps_k (A_k - L)^2, with b_i >= 0.

    So a step improves (lowers) the Lagrangian if and only if sum_i b_i <= sum_k eps_k (A_k - L)^2.
    """

    name: ClassVar[str] = "lagrangian"
    title: ClassVar[str] = "The change of the Lagrangian"
    source: ClassVar[str] = (
        "Han and Zhong 2025: the change and its improvement; the condition, and the admissible step size as a function "
        "of the loads, are written out here"
    )

    tokens: int = 1024
    experts: int = 8
    topk: int = 1
    step_size: float = 1e-3
    """Of the sign rule; the proportional rule gets the same largest move at the first step."""
    steps: int = 400
    seeds: int = 3
    iterate: Iterate = iteration.iterate

    @classmethod
    def full(cls) -> Claim:
        return cls(tokens=4096, experts=16, topk=2, steps=1500, seeds=6)

    def check(self, progress: Progress | None = None) -> Finding:
        worst_identity, least_gain, mismatched, rises, steps = 0.0, 0.0, 0, 0, 0
        scale = 1.0
        path: list[dict[str, float]] = []
        allowed: list[dict[str, float]] = []
        too_large = 0
        for seed in range(self.seeds):
            problem = random_problem(self.tokens, self.experts, self.topk, seed)
            start_E = torch.zeros(self.experts, dtype=torch.float64)
            moves = {
                "sign": iteration.sign(self.step_size),
                "proportional": iteration.proportional(self.step_size / float(problem.gradient(start_E).abs().max())),
            }
            scale = max(1.0, abs(problem.dual(start_E)))
            for rule, move in moves.items():
                for step in self.iterate(problem, move, start_E, self.steps):
                    change = step.lagrangian_after - step.lagrangian_before
                    worst_identity = max(worst_identity, abs(change - (step.gained - step.paid)) / scale)
                    least_gain = min(least_gain, step.gained / scale)
                    if rule != "sign":
                        continue
                    steps += 1
                    rose = change > 1e-12 * scale
                    rises += rose
                    mismatched += rose != (step.gained - step.paid > 1e-12 * scale)
                    if seed == 0:
                        path.append({"step": step.n, "lagrangian": step.lagrangian_after, "rose": float(rose)})
                    if (step.n - 1) % max(1, self.steps // 40) == 0 and float(step.gradient.abs().sum()) > 0:
                        here = largest_step(problem, step.bias, -torch.sign(step.gradient))
                        too_large += rose != (here < self.step_size)
                        allowed.append(
                            {
                                "imbalance": float(step.gradient.abs().sum()),
                                "largest_step": here,
                                "by_curvature": step_allowed_by_curvature(problem, step.bias),
                            }
                        )
            if progress is not None:
                progress(seed + 1, self.seeds)
        share = rises / steps
        within = [row["largest_step"] / row["by_curvature"] for row in allowed if row["largest_step"] > 0]
        median = float(torch.tensor(within).median()) if within else float("nan")
        far = max(allowed, key=lambda row: row["imbalance"])
        near = min(allowed, key=lambda row: row["imbalance"])
        shape = f"T={self.tokens}, E={self.experts}, K={self.topk}"
        return Finding(
            [
                Row(
                    "L(x', p') - L(x, p) = sum b - sum eps (A - L)^2",
                    f"every step; sign and proportional; {shape}",
                    f"largest error {worst_identity:.1e} of D(0)",
                    "1e-9",
                    holds_if(worst_identity <= 1e-9),
                ),
                Row(
                    "no token loses by its switch under p': b >= 0",
                    "every step",
                    f"least sum b {least_gain:.1e} of D(0)",
                    "0, to 1e-12",
                    holds_if(least_gain >= -1e-12),
                ),
                Row(
                    "every step lowers the Lagrangian",
                    f"sign, u = {self.step_size:g}",
                    f"rose in {share:.0%} of {steps} steps",
                    "0%",
                    Verdict.CONDITIONAL if rises else Verdict.HOLDS,
                ),
                Row(
                    "it falls exactly when sum b <= sum eps (A - L)^2",
                    "every step of the sign rule",
                    f"{mismatched} of {steps} steps otherwise",
                    "0",
                    holds_if(mismatched == 0),
                ),
                Row(
                    "a step improves exactly when u is below the largest admissible u of the current loads",
                    f"{len(allowed)} places along the runs; at sum|A-L| = {far['imbalance']:.0f}: "
                    f"u <= {far['largest_step']:.1e}, at {near['imbalance']:.0f}: u <= {near['largest_step']:.1e}",
                    f"{too_large} of {len(allowed)} otherwise",
                    "0",
                    holds_if(too_large == 0),
                ),
                Row(
                    "the admissible u is 2 sum|A-L| / (T v'Hv), v = sign(L-A), to second order",
                    "H from near ties, 10% of the tokens",
                    f"median ratio of exact to formula {median:.2f}",
                    "0.5 to 2",
                    holds_if(0.5 <= median <= 2),
                ),
            ],
            {"lagrangian_along_a_run": path, "admissible_step": allowed, "share_of_rises": share},
        )
