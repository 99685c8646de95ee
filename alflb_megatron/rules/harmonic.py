"""p_k <- p_k + (u / n) (L - A_k) / L at update n: the step that uses strong convexity.

With u at least 1 / (modulus of strong convexity) the expected regret is O(log N) (Hazan et al. 2007). That the dual is
strongly convex on the zero-sum subspace, and its regret logarithmic for certain step sizes, is Han and Zhong's (2025,
arXiv 2512.03915); whose u this is: docs/theory.md, "What could not be confirmed". The same 1/n freezes the bias while
the router keeps learning, so it suits a router that changes little, or a `floor` or `restart` (`rules/_decay.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alflb_megatron.rules import register
from alflb_megatron.rules._decay import Decaying
from alflb_megatron.settings import knob


@register("harmonic")
@dataclass(frozen=True)
class Harmonic(Decaying):
    power: ClassVar[float] = 1.0

    step_size: float = knob(1.0, "u: move of a bias per unit of relative violation at update 1", minimum=0.0)
