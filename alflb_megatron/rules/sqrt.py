"""p_k <- p_k + (u / sqrt(n)) (L - A_k) / L at update n: the step that needs convexity alone.

Online gradient descent with steps proportional to 1/sqrt(n) has regret O(sqrt N) for convex losses (Zinkevich 2003);
Han and Zhong (2025, arXiv 2512.03915) study it for this dual. It still moves late in training, more than u/n does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("sqrt")
@dataclass(frozen=True)
class Sqrt(Rule):
    step_size: float = knob(0.1, "u: move of a bias per unit of relative violation at update 1", minimum=0.0)

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        rate_L1 = (self.step_size / stats.n.float().sqrt()).unsqueeze(-1)
        return bias + stats.violation * rate_L1, state
