"""p_k <- p_k + u (L - A_k) / L: a gradient step on the dual with constant step size.

The variant "b += u e" of Wang et al. 2024 (arXiv 2408.15664, section 4.4), whose unit of e is not stated; here e is
the violation relative to the mean load, so u means the same at every batch size. In the unit of Han and Zhong (2025)
eps = u / L. Too large a u oscillates: gradient descent needs eps below 2 / (largest eigenvalue of the dual's Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("proportional")
@dataclass(frozen=True)
class Proportional(Rule):
    step_size: float = knob(1e-2, "u: move of a bias per unit of relative violation, in score units", minimum=0.0)

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        return bias + stats.violation * self.step_size, state
