"""One step of the method on one batch, as the paper writes it, in float64: what the deterministic claims are about.

    x   =  the K largest s + p of each token
    p'  =  p + eps * (L - A(x))           eps_k = u / |L - A_k| (sign), u (proportional), ...
    x'  =  the K largest s + p'

The scores stay the same from step to step (Han and Zhong 2025, arXiv 2512.03915: the deterministic setting). The rules
that train models are `alflb_megatron.rules`; this is the bare iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.lab.theory.problem import AssignmentProblem

Move = Callable[[Tensor, int], Tensor]
"""Gradient A - L [E] and the number n of the step, from 1, -> the move p' - p [E]."""


def sign(step_size: float) -> Move:
    """Wang et al. 2024: eps_k = u / |L - A_k|."""
    return lambda gradient_E, n: -step_size * torch.sign(gradient_E)


def proportional(step_size: float, power: float = 0.0) -> Move:
    """eps = u / n^power, the same for every expert, in score units per token of violation."""
    return lambda gradient_E, n: -step_size / n**power * gradient_E


@dataclass(frozen=True)
class Step:
    """Where a step began, where it ended, and what it did to the Lagrangian."""

    n: int
    bias: Tensor
    move: Tensor
    gradient: Tensor  # A - L under `bias`
    before: Tensor  # bool [T, E], x
    after: Tensor  # bool [T, E], x'
    lagrangian_before: float
    lagrangian_after: float
    gained: float
    """sum_i b_i, b_i = what token i gains under p' by its new experts over its old: never negative."""

    @property
    def paid(self) -> float:
        """sum_k eps_k (A_k - L)^2, which is -sum_k (p'_k - p_k)(A_k - L)."""
        return -float(self.move @ self.gradient)


Iterate = Callable[[AssignmentProblem, Move, Tensor, int], Iterator[Step]]
"""Problem, move, bias to begin with, number of steps -> the steps; `iterate`, or what a test plants in its place."""


def iterate(problem: AssignmentProblem, move: Move, bias_E: Tensor, steps: int) -> Iterator[Step]:
    """`steps` steps from `bias_E`."""
    bias_E = bias_E.double()
    before = problem.choice(bias_E)
    lagrangian = problem.lagrangian(before, bias_E)
    for n in range(1, steps + 1):
        gradient_E = before.sum(dim=0) - problem.load
        move_E = move(gradient_E, n)
        moved_E = bias_E + move_E
        after = problem.choice(moved_E)
        gained = float(((after - before) * (problem.scores + moved_E)).sum())
        lagrangian_after = problem.lagrangian(after, moved_E)
        yield Step(n, bias_E, move_E, gradient_E, before.bool(), after.bool(), lagrangian, lagrangian_after, gained)
        bias_E, before, lagrangian = moved_E, after, lagrangian_after
