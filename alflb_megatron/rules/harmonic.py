"""p_k <- p_k + (u / n) (L - A_k) / L at update n: the step that uses strong convexity.

With u at least 1 / (modulus of strong convexity) the expected regret is O(log N) (Hazan et al. 2007; for this dual on
the zero-sum subspace Han and Zhong 2025, arXiv 2512.03915). The same 1/n freezes the bias while the router keeps
learning, so it suits a router that changes little.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("harmonic")
@dataclass(frozen=True)
class Harmonic(Rule):
    step_size: float = knob(1.0, "u: move of a bias per unit of relative violation at update 1", minimum=0.0)

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        rate_L1 = (self.step_size / stats.n.float()).unsqueeze(-1)
        return bias + stats.violation * rate_L1, state
